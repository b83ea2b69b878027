#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod schedules;

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("took too long")
}

async fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// A client and a server with a relay between them.
struct Relayed {
    client: TcpStream,
    server: TcpStream,
    meter: Arc<Meter>,
    relay: JoinHandle<Ended>,
}

async fn relayed() -> Relayed {
    let ((client, near), (server, far)) = (connected().await, connected().await);
    let meter = Arc::new(Meter::default());
    let counted = meter.clone();
    let relay = tokio::spawn(async move { relay(near, far, &counted).await });
    Relayed { client, server, meter, relay }
}

async fn read_to_end(socket: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    soon(socket.read_to_end(&mut bytes)).await.map(|_| bytes)
}

#[tokio::test]
async fn each_direction_ends_by_itself_and_bytes_are_counted_by_direction() {
    for client_first in [true, false] {
        let Relayed { client, server, meter, relay } = relayed().await;
        let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut second).await.unwrap(), b"question");
        for _ in 0..3 {
            second.write_all(b"answer").await.unwrap();
            let mut got = [0; 6];
            soon(first.read_exact(&mut got)).await.unwrap();
            assert_eq!(&got, b"answer");
        }
        second.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut first).await.unwrap(), b"");
        assert!(matches!(soon(relay).await.unwrap(), Ended::Finished));
        assert_eq!(meter.totals(), if client_first { (8, 18) } else { (18, 8) });
    }
}

#[tokio::test]
async fn a_reset_of_either_side_resets_the_other() {
    for client_resets in [true, false] {
        for half_closed in [true, false] {
            let Relayed { client, server, relay, .. } = relayed().await;
            let (mut gone, mut stays) = if client_resets { (client, server) } else { (server, client) };
            if half_closed {
                // Nothing is read from this side any more, and nothing is written to it.
                gone.shutdown().await.unwrap();
                assert_eq!(read_to_end(&mut stays).await.unwrap(), b"");
            }
            reset_on_close(&gone).unwrap();
            drop(gone);
            assert!(matches!(soon(relay).await.unwrap(), Ended::Disconnected(_)));
            let reset = if half_closed { stays.write_all(b"x").await.and(Ok(Vec::new())) } else { read_to_end(&mut stays).await };
            assert_eq!(reset.unwrap_err().kind(), if half_closed { io::ErrorKind::BrokenPipe } else { io::ErrorKind::ConnectionReset });
        }
    }
}

#[tokio::test]
async fn a_relay_that_is_cut_resets_both_sides() {
    let Relayed { mut client, mut server, relay, .. } = relayed().await;
    client.write_all(b"x").await.unwrap();
    soon(server.read_exact(&mut [0])).await.unwrap();
    relay.abort();
    for side in [&mut client, &mut server] {
        assert_eq!(read_to_end(side).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_receiver_that_does_not_read_stops_the_sender() {
    let Relayed { mut client, server, .. } = relayed().await;
    let mut sent = 0;
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(200), client.write(&[0; 64 << 10])).await {
        sent += written.unwrap();
        assert!(sent < 64 << 20, "{sent} bytes went somewhere");
    }
    drop(server);
}

/// What an end of the connection does.
#[derive(Debug, Clone)]
enum Step {
    Write(u16),
    Pause,
}

fn script() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(prop_oneof![(1..40_000_u16).prop_map(Step::Write), Just(Step::Pause)], 0..20)
}

async fn play(socket: TcpStream, script: Vec<Step>) -> (usize, Vec<u8>) {
    let (mut read, mut write) = socket.into_split();
    let sender = async {
        let mut sent = 0_usize;
        for step in script {
            match step {
                Step::Write(length) => {
                    let bytes: Vec<u8> = (sent..sent + usize::from(length)).map(|at| u8::try_from(at % 251).unwrap()).collect();
                    write.write_all(&bytes).await.unwrap();
                    sent += usize::from(length);
                }
                Step::Pause => tokio::task::yield_now().await,
            }
        }
        write.shutdown().await.unwrap();
        sent
    };
    let mut got = Vec::new();
    let (sent, read) = tokio::join!(sender, read.read_to_end(&mut got));
    read.unwrap();
    (sent, got)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Z11: whatever both ends write and whenever, all of it arrives in order and the ends come last.
    #[test]
    fn all_bytes_arrive_in_order_and_the_end_comes_once(up in script(), down in script()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let Relayed { client, server, meter, relay } = relayed().await;
            let ((sent_up, got_down), (sent_down, got_up)) = soon(async { tokio::join!(play(client, up), play(server, down)) }).await;
            let whole = |length: usize| (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect::<Vec<u8>>();
            assert!(got_up == whole(sent_up) && got_down == whole(sent_down));
            assert!(matches!(soon(relay).await.unwrap(), Ended::Finished));
            assert_eq!(meter.totals(), (sent_up as u64, sent_down as u64));
        });
    }
}
