//! Bytes and ends through tunnels that move while they flow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use culvert::forward::Ended;
use culvert::hbone::Config;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;

use crate::ends::{Client, Dice, Pieces, Server, through_bytes};
use crate::tunnel_peers::{Answer, Application, Realm, StockClient, StockServer, eventually, soon};

/// The byte at a place of a direction: a shift, a gap or a repetition shows.
fn byte_at(seed: usize, at: usize) -> u8 {
    u8::try_from((at.wrapping_mul(0x9e37_79b1) ^ (at >> 7) ^ seed.wrapping_mul(131)) >> 5 & 0xff).unwrap()
}

fn pattern(seed: usize, from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| byte_at(seed, at)).collect()
}

/// Writes so many bytes in random pieces, then the end.
async fn write(mut socket: OwnedWriteHalf, seed: usize, total: usize) -> OwnedWriteHalf {
    let mut dice = Dice(seed as u64);
    let mut sent = 0;
    while sent < total {
        let most = if dice.roll(2) == 0 { 300 } else { 60_000 };
        let size = (1 + dice.roll(most)).min(total - sent);
        socket.write_all(&pattern(seed, sent, size)).await.unwrap();
        sent += size;
        if dice.roll(4) == 0 {
            tokio::task::yield_now().await;
        }
    }
    socket.shutdown().await.unwrap();
    socket
}

/// Reads to the end: every byte in its place, and as many as were sent.
async fn read(mut socket: OwnedReadHalf, seed: usize, total: usize, progress: Arc<AtomicUsize>) -> OwnedReadHalf {
    let mut got = 0;
    let mut buffer = vec![0; 50_000];
    loop {
        let count = socket.read(&mut buffer).await.unwrap_or_else(|error| panic!("direction {seed} broke after {got} of {total}: {error}"));
        if count == 0 {
            assert_eq!(got, total, "direction {seed} ended");
            return socket;
        }
        assert!(buffer[..count] == pattern(seed, got, count), "direction {seed}: wrong bytes behind {got}");
        got += count;
        progress.fetch_add(count, Ordering::Relaxed);
    }
}

/// Both directions of one stream, on both of its ends.
struct Traffic {
    tasks: JoinSet<()>,
    progress: Arc<AtomicUsize>,
    total: usize,
}

impl Traffic {
    fn new() -> Self {
        Self { tasks: JoinSet::new(), progress: Arc::default(), total: 0 }
    }

    /// `up` bytes one way and `down` the other; the far end begins to read when `gate` says so.
    fn run(
        &mut self,
        near: Application,
        far: Application,
        number: usize,
        (up, down): (usize, usize),
        gate: Option<tokio::sync::oneshot::Receiver<()>>,
    ) {
        self.total += up + down;
        let ((near_read, near_write), (far_read, far_write)) = (near.socket.into_split(), far.socket.into_split());
        let progress = self.progress.clone();
        self.tasks.spawn(async move {
            let there = async {
                if let Some(gate) = gate {
                    gate.await.unwrap();
                    // From now on it reads fast.
                    socket2::SockRef::from(far_read.as_ref()).set_recv_buffer_size(1 << 20).unwrap();
                }
                read(far_read, 2 * number, up, progress.clone()).await
            };
            let back = read(near_read, 2 * number + 1, down, progress.clone());
            let ends = tokio::join!(write(near_write, 2 * number, up), there, write(far_write, 2 * number + 1, down), back);
            drop(ends);
            for relay in [near.relay, far.relay] {
                let ended = relay.await.unwrap();
                assert!(matches!(ended, Ended::Moved | Ended::Finished), "{ended:?}");
            }
        });
    }

    async fn finish(mut self) {
        while let Some(done) = tokio::time::timeout(std::time::Duration::from_secs(60), self.tasks.join_next()).await.expect("stuck") {
            done.unwrap();
        }
    }
}

/// Opens one stream on our two ends.
async fn stream(client: &Client, server: &mut Server, stalled: bool) -> (Application, Application) {
    let accept = async { if stalled { server.accept_stalled().await } else { server.accept_stream().await } };
    tokio::join!(client.open(), accept)
}

const MOVES: usize = 24;

/// Several streams of all kinds, moved at random points, one end, the other or both at once.
async fn moves_mid_transfer(seed: u64, in_pieces: bool) {
    let realm = Realm::new();
    let mut dice = Dice(seed);
    let mut server = Server::new(&realm, Config::default()).await;
    let address = if in_pieces { Pieces::before(server.address, seed).await.address } else { server.address };
    let mut client = Client::to(address, &realm, Config::default()).await;
    let mut traffic = Traffic::new();
    // The pool dials as soon as somebody wants a stream.
    let (first, far) = tokio::join!(client.open(), server.accept_with_stream());
    traffic.run(first, far, 0, (3_000_000, 2_000_000), None);
    // Half closed at once: the end goes first, the other direction lasts.
    let (near, far) = stream(&client, &mut server, false).await;
    traffic.run(near, far, 1, (1000, 2_500_000), None);
    // Stalled: nobody reads what comes, until half of the moves are over.
    let (near, far) = stream(&client, &mut server, true).await;
    let (open, gate) = tokio::sync::oneshot::channel();
    traffic.run(near, far, 2, (900_000, 100_000), Some(gate));
    for number in 3..7 {
        let (near, far) = stream(&client, &mut server, false).await;
        traffic.run(near, far, number, (dice.roll(1_500_000), dice.roll(1_500_000)), None);
    }
    let mut open = Some(open);
    // Moves are spread over the transfer.
    let share = (traffic.total - 900_000) / (MOVES + 4);
    let (mut largest, mut mid_transfer) = (0, 0);
    for turn in 0..MOVES {
        if turn == MOVES / 2
            && let Some(open) = open.take()
        {
            open.send(()).unwrap();
        }
        let goal = (turn * share).min(traffic.total);
        eventually("bytes flow between moves", || traffic.progress.load(Ordering::Relaxed) >= goal).await;
        for _ in 0..dice.roll(40) {
            tokio::task::yield_now().await;
        }
        mid_transfer += usize::from(traffic.progress.load(Ordering::Relaxed) < traffic.total);
        match dice.roll(3) {
            0 => largest = largest.max(client.move_it().await),
            1 => largest = largest.max(server.move_it().await),
            _ => {
                // Both are out at the same time, and come back in any order.
                let (near, far) = tokio::join!(client.freeze(), server.freeze());
                let ((near, near_length), (far, far_length)) = (through_bytes(near), through_bytes(far));
                largest = largest.max(near_length).max(far_length);
                if dice.roll(2) == 0 {
                    client.take_up(near);
                    tokio::task::yield_now().await;
                    server.take_up(far);
                } else {
                    server.take_up(far);
                    tokio::task::yield_now().await;
                    client.take_up(near);
                }
            }
        }
    }
    traffic.finish().await;
    assert!(mid_transfer > MOVES / 2, "only {mid_transfer} moves hit running streams");
    // A backlog, half-written or half-read records were among what moved.
    assert!(largest > 64 << 10, "the largest state had {largest} bytes");
    // The tunnel is as good as new.
    let (mut near, mut far) = stream(&client, &mut server, false).await;
    near.send(b"ping").await;
    far.expect(b"ping").await;
    far.send(b"pong").await;
    near.expect(b"pong").await;
    assert_eq!(client.inner.dials(), 1, "it is still the same tunnel");
}

#[tokio::test]
async fn no_byte_is_lost_and_none_comes_twice_when_either_end_moves_mid_transfer() {
    for seed in 0..3 {
        moves_mid_transfer(seed, false).await;
    }
}

#[tokio::test]
async fn records_that_have_arrived_in_part_move_too() {
    for seed in 10..13 {
        moves_mid_transfer(seed, true).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_between_threads_loses_nothing() {
    moves_mid_transfer(20, false).await;
    moves_mid_transfer(21, true).await;
}

#[tokio::test]
async fn records_that_are_sealed_and_not_written_move() {
    const TOTAL: usize = 400_000;
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await.small_send_buffers();
    let mut client = Client::to(server.address, &realm, Config::default()).await;
    let (near, far) = tokio::join!(client.open(), server.accept_with_stream());
    // Nobody reads the tunnel while the server fills it.
    let away = client.freeze().await;
    let (_far_read, far_write) = far.socket.into_split();
    let writing = tokio::spawn(write(far_write, 9, TOTAL));
    let mut length = 0;
    soon(async {
        // A part of a slab in the state: the socket takes no more.
        while length < 64 << 10 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            length = server.move_it().await;
        }
    })
    .await;
    client.take_up(away);
    let (near_read, _near_write) = near.socket.into_split();
    soon(read(near_read, 9, TOTAL, Arc::default())).await;
    soon(writing).await.unwrap();
}

/// Echoed bytes through a stock peer, while our end moves.
async fn echo_through(client: &mut Client, near: Application, total: usize) {
    let (read_half, write_half) = near.socket.into_split();
    let progress = Arc::<AtomicUsize>::default();
    let seen = progress.clone();
    let transfer = tokio::spawn(async move { tokio::join!(write(write_half, 4, total), read(read_half, 4, total, seen)) });
    for turn in 0..12 {
        eventually("bytes flow between moves", || progress.load(Ordering::Relaxed) >= turn * total / 14).await;
        client.move_it().await;
    }
    drop(tokio::time::timeout(std::time::Duration::from_secs(60), transfer).await.expect("stuck").unwrap());
    assert!(matches!(soon(near.relay).await.unwrap(), Ended::Moved));
}

#[tokio::test]
async fn a_stock_server_does_not_notice_that_its_client_moves() {
    let realm = Realm::new();
    let server = StockServer::start(realm.credential("server").await, Answer::Echo).await;
    let mut client = Client::to(server.address, &realm, Config::default()).await;
    let near = client.open().await;
    echo_through(&mut client, near, 4_000_000).await;
    // The headers of the answers come out of the server's dynamic table by now.
    for _ in 0..3 {
        let mut near = client.open().await;
        near.echoes(b"hello").await;
        client.move_it().await;
        near.echoes(b"and again").await;
        near.finish().await;
        assert!(near.read_to_end().await.unwrap().is_empty());
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_stock_client_does_not_notice_that_its_server_moves() {
    const TOTAL: usize = 3_000_000;
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let credential = realm.credential("client").await;
    let (client, ()) = tokio::join!(StockClient::connect(server.address, &credential), server.accept());
    let opened = async { client.open("10.0.0.2:80").await.unwrap() };
    let ((_, mut stream), far) = tokio::join!(opened, server.accept_stream());
    let (far_read, far_write) = far.socket.into_split();
    let progress = Arc::<AtomicUsize>::default();
    let (seen, received) = (progress.clone(), progress.clone());
    let far_end = tokio::spawn(async move { tokio::join!(read(far_read, 0, TOTAL, seen), write(far_write, 1, TOTAL)) });
    let near_end = tokio::spawn(async move {
        let mut send = stream.send;
        let there = async {
            crate::tunnel_peers::stock_send(&mut send, pattern(0, 0, TOTAL).into()).await.unwrap();
            send.send_data(bytes::Bytes::new(), true).unwrap();
        };
        let back = async {
            let mut got = 0;
            while let Some(data) = stream.receive.data().await {
                let data = data.unwrap();
                stream.receive.flow_control().release_capacity(data.len()).unwrap();
                assert!(data[..] == pattern(1, got, data.len()), "wrong bytes behind {got}");
                got += data.len();
                received.fetch_add(data.len(), Ordering::Relaxed);
            }
            assert_eq!(got, TOTAL);
        };
        tokio::join!(there, back)
    });
    for turn in 0..12 {
        eventually("bytes flow between moves", || progress.load(Ordering::Relaxed) >= turn * TOTAL / 7).await;
        server.move_it().await;
    }
    soon(near_end).await.unwrap();
    drop(soon(far_end).await.unwrap());
    // Requests out of the client's dynamic table.
    for _ in 0..3 {
        let opened = async { client.open("10.0.0.2:80").await.unwrap() };
        let ((status, mut stream), mut far) = tokio::join!(opened, server.accept_stream());
        assert_eq!(status, 200);
        stream.send(b"hello").await;
        far.expect(b"hello").await;
        server.move_it().await;
        far.send(b"and back").await;
        assert_eq!(soon(stream.receive()).await.unwrap().unwrap(), &b"and back"[..]);
    }
}
