//! Random schedules against a model, and what a connection holds while it waits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{sleep, timeout};

use super::super::*;
use crate::forward::splice::ALL_PIPES;

const PATIENCE: Duration = Duration::from_secs(20);

/// Two connected sockets; the second is the relay's.
async fn pair(buffers: Option<usize>) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    if let Some(size) = buffers {
        SockRef::from(&listener).set_recv_buffer_size(size).unwrap();
        SockRef::from(&listener).set_send_buffer_size(size).unwrap();
    }
    let (outer, inner) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (outer, inner) = (outer.unwrap(), inner.unwrap().0);
    if let Some(size) = buffers {
        SockRef::from(&outer).set_recv_buffer_size(size).unwrap();
        SockRef::from(&outer).set_send_buffer_size(size).unwrap();
    }
    for socket in [&outer, &inner] {
        socket.set_nodelay(true).unwrap();
    }
    (outer, inner)
}

struct Rig {
    client: TcpStream,
    server: TcpStream,
    relay: JoinHandle<Ended>,
    meter: Arc<Meter>,
}

async fn rig(buffers: Option<usize>) -> Rig {
    let ((client, near), (server, far)) = (pair(buffers).await, pair(buffers).await);
    let meter = Arc::new(Meter::default());
    let counted = Arc::clone(&meter);
    let relay = tokio::spawn(async move { relay(near, far, &counted).await });
    Rig { client, server, relay, meter }
}

/// On one thread, so that the pools of this thread tell all loans.
fn alone<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { timeout(PATIENCE, future).await.expect("nobody was woken") })
}

/// The byte at a position of the stream that `seed` names: not periodic in any chunk size.
fn byte(seed: u64, position: u64) -> u8 {
    let word = (position / 8 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed.wrapping_mul(0xD134_2543_DE82_EF95));
    (word ^ (word >> 29)).to_le_bytes()[(position % 8) as usize]
}

fn stream(seed: u64, from: u64, length: usize) -> Vec<u8> {
    (from..from + length as u64).map(|position| byte(seed, position)).collect()
}

#[derive(Debug, Clone)]
enum Act {
    Move(usize),
    Yield(u8),
    Stall(u8),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Last {
    Shutdown,
    Reset,
}

/// What the two ends of one direction do.
#[derive(Debug, Clone)]
struct Side {
    writes: Vec<Act>,
    last: Last,
    reads: Vec<Act>,
}

fn acts(count: usize) -> impl Strategy<Value = Vec<Act>> {
    let size = prop_oneof![3 => 1_usize..2_000, 2 => 2_000_usize..40_000, 2 => 40_000_usize..400_000];
    let act = prop_oneof![6 => size.prop_map(Act::Move), 2 => (1_u8..20).prop_map(Act::Yield), 1 => (1_u8..4).prop_map(Act::Stall)];
    prop::collection::vec(act, 0..count)
}

fn side() -> impl Strategy<Value = Side> {
    let last = prop_oneof![5 => Just(Last::Shutdown), 1 => Just(Last::Reset)];
    (acts(12), last, acts(12)).prop_map(|(writes, last, reads)| Side { writes, last, reads })
}

async fn pause(act: &Act) {
    match act {
        Act::Yield(times) => {
            for _ in 0..*times {
                yield_now().await;
            }
        }
        Act::Stall(milliseconds) => sleep(Duration::from_millis(u64::from(*milliseconds))).await,
        Act::Move(_) => {}
    }
}

/// Writes as told; counts what the kernel took. Hands its half back when it is not to shut down.
async fn write(mut half: OwnedWriteHalf, side: Side, seed: u64, taken: Arc<AtomicU64>) -> (OwnedWriteHalf, io::Result<()>) {
    for act in &side.writes {
        if let Act::Move(size) = act {
            let chunk = stream(seed, taken.load(Ordering::Relaxed), *size);
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                match half.write(rest).await {
                    Ok(bytes) => {
                        rest = &rest[bytes..];
                        taken.fetch_add(bytes as u64, Ordering::Relaxed);
                    }
                    Err(error) => return (half, Err(error)),
                }
            }
        }
        pause(act).await;
    }
    let end = if side.last == Last::Shutdown { half.shutdown().await } else { Ok(()) };
    (half, end)
}

/// Reads as told, then to the end; every byte must be the next one of the stream. How many there were, and how it ended.
async fn read(mut half: OwnedReadHalf, acts: Vec<Act>, seed: u64) -> (u64, io::Result<()>) {
    let mut seen = 0;
    let mut plan = acts.iter();
    loop {
        let act = plan.next().unwrap_or(&Act::Move(100_000));
        let Act::Move(size) = act else {
            pause(act).await;
            continue;
        };
        let mut space = vec![0; *size];
        match half.read(&mut space).await {
            Ok(0) => return (seen, Ok(())),
            Ok(bytes) => {
                assert!(space[..bytes] == stream(seed, seen, bytes)[..], "wrong bytes at {seen}..+{bytes}");
                seen += bytes as u64;
            }
            Err(error) => return (seen, Err(error)),
        }
    }
}

/// One end of the connection: writes and reads at once. A reset ends both.
async fn act(socket: TcpStream, side: Side, seeds: (u64, u64), taken: Arc<AtomicU64>) -> (u64, io::Result<()>) {
    let (read_half, write_half) = socket.into_split();
    let reset = side.last == Last::Reset;
    let reads = side.reads.clone();
    let reader = tokio::spawn(read(read_half, reads, seeds.1));
    let (half, result) = write(write_half, side, seeds.0, taken).await;
    if reset && result.is_ok() {
        reset_on_close(half.as_ref()).unwrap();
        reader.abort();
        let got = reader.await;
        // Dropping it would send FIN first.
        half.forget();
        return got.unwrap_or_else(|_| (0, Err(io::ErrorKind::Interrupted.into())));
    }
    let (seen, end) = reader.await.unwrap();
    drop(half);
    (seen, result.and(end))
}

/// The model: what comes out is a prefix of what went in; all of it, and one clean end each way, when nobody reset.
async fn schedule(client: Side, server: Side, buffers: Option<usize>) {
    let reset = client.last == Last::Reset || server.last == Last::Reset;
    let rig = rig(buffers).await;
    let (up, down) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let one = tokio::spawn(act(rig.client, client.clone(), (1, 2), Arc::clone(&up)));
    let other = tokio::spawn(act(rig.server, server.clone(), (2, 1), Arc::clone(&down)));
    let (got_down, client_end) = one.await.unwrap();
    let (got_up, server_end) = other.await.unwrap();
    let ended = rig.relay.await.unwrap();
    let (up, down) = (up.load(Ordering::Relaxed), down.load(Ordering::Relaxed));
    assert!(got_up <= up && got_down <= down, "more came out than went in");
    assert!(rig.meter.totals().0 <= up && rig.meter.totals().1 <= down);
    assert!(rig.meter.totals().0 >= got_up && rig.meter.totals().1 >= got_down);
    if reset {
        assert!(matches!(ended, Ended::Disconnected(_)), "{ended:?}");
        for (survivor, end) in [(client.last, &client_end), (server.last, &server_end)] {
            if survivor == Last::Shutdown {
                assert!(end.is_err(), "a reset arrived as a clean end");
            }
        }
    } else {
        assert!(matches!(ended, Ended::Finished), "{ended:?}");
        client_end.unwrap();
        server_end.unwrap();
        assert_eq!((got_up, got_down), (up, down));
        assert_eq!(rig.meter.totals(), (up, down));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn what_comes_out_is_what_went_in(client in side(), server in side(), buffers in prop::option::of(4_096_usize..200_000)) {
        alone(schedule(client, server, buffers));
        prop_assert_eq!((Buffer::lent(), Conduit::lent()), (0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_same_while_the_driver_runs_on_another_thread(client in side(), server in side(), buffers in prop::option::of(4_096_usize..200_000)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async { timeout(PATIENCE, schedule(client, server, buffers)).await.expect("nobody was woken") });
    }
}

#[test]
fn an_idle_connection_holds_nothing_and_a_stalled_one_what_is_in_flight() {
    let _shared = ALL_PIPES.read().unwrap();
    alone(async {
        let mut rig = rig(None).await;
        let mut back = [0; 5];
        rig.client.write_all(b"hello").await.unwrap();
        rig.server.read_exact(&mut back).await.unwrap();
        assert_eq!((Buffer::lent(), Conduit::lent()), (0, 0));
        // Nobody reads: the kernel's buffers fill, then one pipe.
        let mut total = 0_u64;
        while let Ok(Ok(bytes)) = timeout(Duration::from_millis(300), rig.client.write(&[1; 100_000])).await {
            total += bytes as u64;
        }
        assert_eq!((Buffer::lent(), Conduit::lent()), (0, 1));
        let mut space = vec![0; 1 << 20];
        let mut seen = 0;
        while seen < total {
            seen += rig.server.read(&mut space).await.unwrap() as u64;
        }
        assert_eq!(rig.meter.totals().0, total + 5);
        while Conduit::lent() != 0 {
            yield_now().await;
        }
        assert_eq!(Buffer::lent(), 0);
        drop((rig.client, rig.server));
        assert!(matches!(rig.relay.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn nothing_is_lost_on_the_way_to_a_slow_reader() {
    alone(async {
        let rig = rig(Some(8_192)).await;
        let total = 3_000_000_u64;
        let (mut from, to) = (rig.client, rig.server);
        let writer = tokio::spawn(async move {
            from.write_all(&stream(9, 0, 3_000_000)).await.unwrap();
            from.shutdown().await.unwrap();
            let mut end = [0];
            assert_eq!(from.read(&mut end).await.unwrap(), 0);
        });
        let (half, back) = to.into_split();
        let slow = (0..400).flat_map(|step| [Act::Move(1_000), if step % 20 == 0 { Act::Stall(1) } else { Act::Yield(2) }]).collect();
        let (seen, end) = read(half, slow, 9).await;
        end.unwrap();
        assert_eq!(seen, total);
        drop(back);
        writer.await.unwrap();
        assert!(matches!(rig.relay.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn an_answer_arrives_after_the_question_has_ended() {
    alone(async {
        let mut rig = rig(None).await;
        rig.client.shutdown().await.unwrap();
        let mut end = [0];
        assert_eq!(rig.server.read(&mut end).await.unwrap(), 0);
        rig.server.write_all(&stream(3, 0, 500_000)).await.unwrap();
        drop(rig.server);
        let mut all = Vec::new();
        rig.client.read_to_end(&mut all).await.unwrap();
        assert!(all == stream(3, 0, 500_000));
        assert!(matches!(rig.relay.await.unwrap(), Ended::Finished));
        assert_eq!(rig.meter.totals().1, 500_000);
    });
}

/// Urgent data ends a splice as if the socket were empty, or at its end once FIN is there. What follows it must arrive all the same.
#[test]
fn bytes_after_urgent_data_arrive() {
    let _shared = ALL_PIPES.read().unwrap();
    alone(async {
        let ((mut client, near), (mut server, far)) = (pair(None).await, pair(Some(16_384)).await);
        let relay = tokio::spawn(async move { relay(near, far, &Meter::default()).await });
        let mut all = vec![0; 400_000];
        let bulk = stream(5, 0, 800_000);
        let (sent, read) = tokio::join!(client.write_all(&bulk), server.read_exact(&mut all));
        sent.and_then(|()| read.map(drop)).unwrap();
        // The server reads no more: the relay splices by now, and holds a pipe; what follows waits in its socket.
        while Conduit::lent() == 0 {
            yield_now().await;
        }
        client.write_all(&stream(5, 800_000, 20_000)).await.unwrap();
        SockRef::from(&client).send_out_of_band(b"!").unwrap();
        client.write_all(&stream(5, 820_000, 20_000)).await.unwrap();
        client.shutdown().await.unwrap();
        sleep(Duration::from_millis(50)).await;
        server.read_to_end(&mut all).await.unwrap();
        // The kernel takes the urgent byte itself out of the stream.
        assert_eq!(all.len(), 840_000);
        assert!(all == stream(5, 0, 840_000));
        drop(server);
        assert!(matches!(relay.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn without_pipes_the_relay_goes_on_by_read_and_write() {
    let _alone = ALL_PIPES.write().unwrap();
    alone(async {
        let mut hoard = Vec::new();
        while let Ok(pipe) = Conduit::lend() {
            hoard.push(pipe);
        }
        let lent = Conduit::lent();
        let rig = rig(None).await;
        let (mut client, server) = (rig.client, rig.server);
        let writer = tokio::spawn(async move {
            client.write_all(&stream(4, 0, 4_000_000)).await.unwrap();
            client.shutdown().await.unwrap();
            client
        });
        let (half, back) = server.into_split();
        let (seen, end) = read(half, Vec::new(), 4).await;
        end.unwrap();
        assert_eq!(seen, 4_000_000);
        assert_eq!(Conduit::lent(), lent);
        drop((back, writer.await.unwrap()));
        assert!(matches!(rig.relay.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn a_relay_with_nothing_to_do_is_not_polled() {
    alone(async {
        let ((mut client, near), (mut server, far)) = (pair(None).await, pair(None).await);
        let polls = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&polls);
        let task = tokio::spawn(async move {
            let meter = Meter::default();
            let mut inner = Box::pin(relay(near, far, &meter));
            poll_fn(|context| {
                counted.fetch_add(1, Ordering::Relaxed);
                inner.as_mut().poll(context)
            })
            .await
        });
        // One side has ended: its readiness stays set for ever, and must not spin.
        client.write_all(&stream(1, 0, 700_000)).await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = Vec::new();
        server.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), 700_000);
        for _ in 0..10 {
            yield_now().await;
        }
        let before = polls.load(Ordering::Relaxed);
        sleep(Duration::from_millis(50)).await;
        let after = polls.load(Ordering::Relaxed);
        assert!(after - before <= 1, "{} polls of an idle relay", after - before);
        drop(server);
        assert!(matches!(task.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn the_state_of_a_connection_is_small() {
    alone(async {
        let ((_client, near), (_server, far)) = (pair(None).await, pair(None).await);
        let meter = Meter::default();
        let future = relay(near, far, &meter);
        assert!(size_of_val(&future) <= 500, "{} bytes", size_of_val(&future));
    });
}

#[test]
fn a_reset_is_noticed_while_its_bytes_wait_for_room() {
    let _shared = ALL_PIPES.read().unwrap();
    for clients in [true, false] {
        alone(async {
            let Rig { client, server, relay, .. } = rig(Some(16_384)).await;
            let (gone, _stays) = if clients { (client, server) } else { (server, client) };
            while let Ok(Ok(_)) =
                timeout(Duration::from_millis(50), async { gone.writable().await.and_then(|()| gone.try_write(&[1; 50_000])) }).await
            {}
            reset_on_close(&gone).unwrap();
            drop(gone);
            assert!(matches!(relay.await.unwrap(), Ended::Disconnected(_)));
        });
        assert_eq!((Buffer::lent(), Conduit::lent()), (0, 0));
    }
}
