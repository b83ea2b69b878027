//! The same random schedules through our sides and through stock tokio-rustls and `h2`, each way: the same bytes and the same ends.
//!
//! Applications write in pieces of any size, pause, finish or reset; they read in pieces, pause, and read to the end. On the way between the two
//! ends of the tunnel a relay cuts the bytes into other pieces, down to single octets, and in some cases breaks the connection or a bit. The core
//! owns TCP sockets and not some trait, so everything runs over loopback and not over a pipe in memory: pieces, narrow kernel buffers and resets are
//! real. What must hold:
//!
//! * bytes out are a prefix of bytes in, always;
//! * an end (FIN) comes only after all bytes, and only if the other application finished; whatever is cut off is a reset. More than one end
//!   cannot be: TCP knows one FIN, and stock `h2` refuses a second END_STREAM;
//! * without an accident, every application of our sides sees what it sees between two stock sides;
//! * no wake-up is lost: a case that does not come to its end fails.
//!
//! `PROPTEST_CASES` and `PROPTEST_RNG_SEED` make it run longer or elsewhere; a failure shows the smallest schedule that was found.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use culvert::hbone::{Config, ConnectRequest, ConnectResponse, Endpoint, Role};
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, RngSeed, TestCaseError, TestRunner};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::stock;
use crate::transport::{Accident, Fault, NARROW, Transport, Way};
use crate::tunnel_peers::{CountingDialer, OurClient, OurServer, Realm, StockClient, connected};

/// Longer than any case needs on a machine that does much else.
const BOUND: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy)]
enum Step {
    /// So many octets at once.
    Bytes(usize),
    /// Milliseconds.
    Pause(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finish {
    /// FIN after everything that is to be written.
    Fin,
    /// A reset instead.
    Reset,
}

/// What one application does.
#[derive(Debug, Clone)]
struct Script {
    writes: Vec<Step>,
    /// Then it reads to the end.
    reads: Vec<Step>,
    finish: Finish,
    /// The kernel holds little for it: what it does not read stays in the tunnel.
    small: bool,
}

#[derive(Debug, Clone)]
struct Schedule {
    /// Of the applications of each stream: the client's and the server's.
    streams: Vec<[Script; 2]>,
    way: Way,
    /// How many records our sides seal with one key.
    records_per_key: u64,
}

/// What an application saw.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// All of so many octets, and the end.
    Fin(usize),
    /// A reset.
    Reset,
    /// It left first.
    Left,
    /// There was no stream for it.
    Never,
}

/// A byte of a stream, in one direction.
fn byte(stream: usize, side: usize, at: usize) -> u8 {
    u8::try_from((at * 31 + at / 253 + at / 65_521 + stream * 89 + side * 7) % 256).unwrap()
}

fn total(script: &Script) -> usize {
    script.writes.iter().map(|step| if let Step::Bytes(count) = step { *count } else { 0 }).sum()
}

/// Plays one application. Fails when it is given a byte that was never sent.
async fn play(mut socket: TcpStream, schedule: &Schedule, stream: usize, side: usize) -> Result<End, TestCaseError> {
    let (script, other) = (&schedule.streams[stream][side], &schedule.streams[stream][1 - side]);
    if script.small {
        SockRef::from(&socket).set_recv_buffer_size(NARROW).unwrap();
        SockRef::from(&socket).set_send_buffer_size(NARROW).unwrap();
    }
    let (mut read, mut write) = socket.split();
    // The kernel tells of a reset once: if a write learns of it, the next read says "end".
    let broken = Cell::new(false);
    let writing = async {
        let mut at = 0;
        for step in &script.writes {
            match step {
                Step::Pause(time) => tokio::time::sleep(Duration::from_millis(*time)).await,
                Step::Bytes(count) => {
                    let bytes: Vec<u8> = (at..at + count).map(|at| byte(stream, side, at)).collect();
                    at += count;
                    if write.write_all(&bytes).await.is_err() {
                        return broken.set(true);
                    }
                }
            }
        }
        if script.finish == Finish::Fin {
            broken.set(write.shutdown().await.is_err());
        }
    };
    let reading = async {
        let mut got = 0;
        let mut buffer = vec![0; 64 << 10];
        let mut steps = script.reads.iter();
        loop {
            let most = match steps.next() {
                Some(Step::Pause(time)) => {
                    tokio::time::sleep(Duration::from_millis(*time)).await;
                    continue;
                }
                Some(Step::Bytes(count)) => (*count).clamp(1, buffer.len()),
                None => buffer.len(),
            };
            match read.read(&mut buffer[..most]).await {
                Ok(0) => return Ok(End::Fin(got)),
                Err(_) => return Ok(End::Reset),
                Ok(count) => {
                    for (place, octet) in buffer[..count].iter().enumerate() {
                        prop_assert_eq!(*octet, byte(stream, 1 - side, got + place), "stream {} side {} at {}", stream, side, got + place);
                    }
                    got += count;
                    prop_assert!(got <= total(other), "more than was sent");
                }
            }
        }
    };
    if script.finish == Finish::Fin {
        let ((), end) = tokio::join!(writing, reading);
        return if broken.get() { end.map(|_| End::Reset) } else { end };
    }
    // It reads while it writes, and leaves in the middle of what it is sent.
    let checked = async {
        match reading.await {
            Ok(_) => std::future::pending().await,
            Err(error) => error,
        }
    };
    tokio::select! {
        () = writing => {}
        error = checked => return Err(error),
    }
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
    Ok(End::Left)
}

/// An application's socket, and the one that the tunnel has for it: what the application does not read is soon more than the kernel holds.
async fn application() -> (TcpStream, TcpStream) {
    let (near, far) = connected().await;
    SockRef::from(&far).set_send_buffer_size(NARROW).unwrap();
    (near, far)
}

/// Who builds an end of the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    Ours,
    Stock,
}

/// Applications of the server's side that are still to come, by port.
type Expected = Arc<Mutex<HashMap<u16, oneshot::Sender<TcpStream>>>>;

fn arrived(expected: &Expected, port: u16, socket: TcpStream) {
    let waiting = expected.lock().unwrap().remove(&port);
    let unwanted = match waiting {
        Some(waiting) => waiting.send(socket).err(),
        None => Some(socket),
    };
    if let Some(socket) = unwanted {
        // Nobody plays it any more; it must not look like an end.
        SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

enum Server {
    Ours(SocketTask),
    Stock(stock::Server),
}

struct SocketTask {
    address: std::net::SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for SocketTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(maker: Maker, realm: &Realm, endpoint: Endpoint, expected: Expected) -> Self {
        let credential = realm.credential("server").await;
        match maker {
            Maker::Stock => Self::Stock(stock::Server::start(credential, move |port, socket| arrived(&expected, port, socket)).await),
            Maker::Ours => {
                let mut server = OurServer::start(credential, Arc::new(endpoint)).await;
                let address = server.address;
                let task = tokio::spawn(async move {
                    while let Some(incoming) = server.requests.recv().await {
                        let port = incoming.request().unwrap().authority.to_string().rsplit(':').next().unwrap().parse().unwrap();
                        // An accident may have happened to it.
                        let Ok(stream) = incoming.accept(&ConnectResponse::default()) else { continue };
                        let (near, far) = application().await;
                        tokio::spawn(async move { stream.relay(far, Role::Server, &Arc::default()).await });
                        arrived(&expected, port, near);
                    }
                });
                Self::Ours(SocketTask { address, task })
            }
        }
    }

    fn address(&self) -> std::net::SocketAddr {
        match self {
            Self::Ours(task) => task.address,
            Self::Stock(server) => server.address,
        }
    }
}

enum Client {
    Ours(OurClient),
    Stock(Option<StockClient>),
}

impl Client {
    async fn to(maker: Maker, transport: &Transport, realm: &Realm, endpoint: Endpoint) -> Self {
        match maker {
            Maker::Ours => Self::Ours(OurClient::with(transport.address, realm, endpoint, CountingDialer::default()).await),
            Maker::Stock => Self::Stock(StockClient::try_connect(transport.address, &*realm.credential("client").await).await),
        }
    }

    /// An application with an open stream, unless an accident prevented it.
    async fn open(&self, port: u16) -> Option<TcpStream> {
        let authority = format!("10.0.0.2:{port}");
        match self {
            Self::Ours(client) => {
                let request = ConnectRequest {
                    authority: authority.parse().unwrap(),
                    baggage: None,
                    forwarded: None,
                    traceparent: None,
                    forwarded_network: None,
                    reset_is_end: false,
                };
                let (stream, _, _) = client.pool.open(&client.key, &client.credential, &request).await.ok()?;
                let (near, far) = application().await;
                tokio::spawn(async move { stream.relay(far, Role::Client, &Arc::default()).await });
                Some(near)
            }
            Self::Stock(client) => {
                let (_, stream) = client.as_ref()?.open(&authority).await.ok()?;
                let (near, far) = application().await;
                tokio::spawn(stock::relay(far, stream));
                Some(near)
            }
        }
    }
}

/// Plays a schedule; what the applications of every stream saw.
async fn run(schedule: &Schedule, realm: &Realm, makers: [Maker; 2]) -> Result<Vec<[End; 2]>, TestCaseError> {
    let endpoint = || Endpoint { records_per_key: schedule.records_per_key, ..Endpoint::new(Config::default()) };
    let expected = Expected::default();
    let server = Server::start(makers[1], realm, endpoint(), expected.clone()).await;
    let transport = Transport::to(server.address(), schedule.way.clone()).await;
    let client = Client::to(makers[0], &transport, realm, endpoint()).await;
    let streams = (0..schedule.streams.len()).map(|stream| {
        let (client, expected) = (&client, &expected);
        async move {
            let port = u16::try_from(1000 + stream).unwrap();
            let (give, given) = oneshot::channel();
            expected.lock().unwrap().insert(port, give);
            let near = async {
                match client.open(port).await {
                    Some(socket) => play(socket, schedule, stream, 0).await,
                    None => {
                        expected.lock().unwrap().remove(&port);
                        Ok(End::Never)
                    }
                }
            };
            let far = async {
                match given.await {
                    Ok(socket) => play(socket, schedule, stream, 1).await,
                    Err(_) => Ok(End::Never),
                }
            };
            let (near, far) = tokio::join!(near, far);
            Ok([near?, far?])
        }
    });
    let all = futures_util::future::join_all(streams);
    let ends = tokio::time::timeout(BOUND, all).await.map_err(|_| TestCaseError::fail(format!("{makers:?}: it never ends: a wake-up was lost")))?;
    ends.into_iter().collect()
}

const PAIRS: [[Maker; 2]; 4] = [[Maker::Stock, Maker::Stock], [Maker::Ours, Maker::Ours], [Maker::Ours, Maker::Stock], [Maker::Stock, Maker::Ours]];

async fn check(schedule: &Schedule, realm: &Realm) -> Result<(), TestCaseError> {
    let runs = futures_util::future::join_all(PAIRS.map(|makers| run(schedule, realm, makers))).await;
    let mut oracle: Option<Vec<[End; 2]>> = None;
    for (makers, ends) in PAIRS.iter().zip(runs) {
        let ends = ends.map_err(|error| TestCaseError::fail(format!("{makers:?}: {error}")))?;
        for (stream, ends) in ends.iter().enumerate() {
            for (side, end) in ends.iter().enumerate() {
                let other = &schedule.streams[stream][1 - side];
                if let End::Fin(got) = end {
                    prop_assert_eq!(other.finish, Finish::Fin, "{:?} stream {} side {}: an end that nobody sent", makers, stream, side);
                    prop_assert_eq!(*got, total(other), "{:?} stream {} side {}: cut-off bytes with an end", makers, stream, side);
                }
            }
        }
        if schedule.way.fault.is_none() {
            let oracle = oracle.get_or_insert_with(|| ends.clone());
            prop_assert_eq!(&ends, &*oracle, "{:?} and {:?} differ", makers, PAIRS[0]);
        }
    }
    Ok(())
}

/// Sizes around those at which something changes: records, frames, windows, slabs.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1..20usize,
        3 => 20..3_000usize,
        3 => 16_360..16_400usize,
        2 => 60_000..70_000usize,
        1 => 250_000..280_000usize,
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(prop_oneof![5 => size().prop_map(Step::Bytes), 1 => (0..4u64).prop_map(Step::Pause)], 0..7)
}

fn script() -> impl Strategy<Value = Script> {
    let finish = prop_oneof![5 => Just(Finish::Fin), 1 => Just(Finish::Reset)];
    (steps(), steps(), finish, any::<bool>()).prop_map(|(writes, reads, finish, small)| Script { writes, reads, finish, small })
}

fn way(fault: impl Strategy<Value = Option<Fault>>) -> impl Strategy<Value = Way> {
    let piece = prop_oneof![2 => Just(0), 3 => 1..30usize, 2 => 30..3_000usize, 3 => 3_000..40_000usize, 2 => Just(64 << 10)];
    // One large piece at least, or a case takes for ever.
    let pieces = prop::collection::vec(piece, 0..12).prop_map(|mut pieces| {
        pieces.push(32 << 10);
        pieces
    });
    (pieces, any::<bool>(), fault).prop_map(|(pieces, narrow, fault)| Way { pieces, narrow, fault })
}

fn schedule(fault: impl Strategy<Value = Option<Fault>>) -> impl Strategy<Value = Schedule> {
    let streams = prop::collection::vec([script(), script()], 1..5);
    let keys = prop_oneof![Just(1u64), 2..30u64, Just(u64::MAX)];
    (streams, way(fault), keys).prop_map(|(streams, way, records_per_key)| Schedule { streams, way, records_per_key })
}

fn fault() -> impl Strategy<Value = Option<Fault>> {
    let accident = prop_oneof![Just(Accident::Close), Just(Accident::Reset), Just(Accident::Flip)];
    // A handshake takes some 2,500 octets in each direction.
    let after = prop_oneof![1 => 0..3_000usize, 4 => 2_500..60_000usize, 2 => 60_000..400_000usize];
    (accident, any::<bool>(), after).prop_map(|(accident, to_server, after)| Some(Fault { accident, to_server, after }))
}

fn run_cases(cases: u32, seed: u64, strategy: &impl Strategy<Value = Schedule>) {
    let told = Cases::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { told.cases } else { cases };
    let rng_seed = if told.rng_seed == RngSeed::Random { RngSeed::Fixed(seed) } else { told.rng_seed };
    let mut runner = TestRunner::new(Cases { cases, rng_seed, failure_persistence: None, max_shrink_time: 60_000, ..told });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let realm = runtime.block_on(async { Realm::new() });
    let outcome = runner.run(strategy, |schedule| runtime.block_on(check(&schedule, &realm)));
    outcome.unwrap_or_else(|failed| panic!("{failed}"));
}

#[test]
fn random_schedules_bring_the_same_bytes_and_the_same_ends_as_stock_tls_and_h2() {
    run_cases(60, 3, &schedule(Just(None)));
}

#[test]
fn whatever_happens_on_the_way_bytes_are_a_prefix_and_only_whole_ones_have_an_end() {
    run_cases(60, 4, &schedule(fault()));
}
