//! Each floor carries bytes intact, both ways, with half-close: one that cheats is caught here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod crypt;
mod duplex;
mod place;
mod plain;
mod role;

use std::net::SocketAddr;
use std::time::Duration;

use role::{Kind, Options, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn options(kind: Kind, to: SocketAddr) -> Options {
    Options { kind, listen: to, to: Some(to), mark: None, original_destination: false }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A client and a server with the floor between them.
async fn through(kind: Kind, hops: usize) -> (TcpStream, TcpStream, TcpListener, SocketAddr) {
    let (server, server_address) = listener().await;
    let mut next = server_address;
    if hops == 2 {
        let (sink, address) = listener().await;
        tokio::spawn(serve(sink, options(kind, next), false));
        next = address;
    }
    let (source, address) = listener().await;
    tokio::spawn(serve(source, options(kind, next), true));
    let client = TcpStream::connect(address).await.unwrap();
    let (accepted, _) = server.accept().await.unwrap();
    (client, accepted, server, address)
}

fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .collect()
}

/// Writes in odd pieces, reads to the end at the same time, with pauses now and then so that sockets fill up.
async fn exchange(socket: TcpStream, sends: Vec<u8>, piece: usize, pause: bool) -> Vec<u8> {
    let (mut read, mut write) = socket.into_split();
    let writer = tokio::spawn(async move {
        for chunk in sends.chunks(piece) {
            write.write_all(chunk).await.unwrap();
        }
        write.shutdown().await.unwrap();
        write
    });
    let mut got = Vec::new();
    let mut space = vec![0; 70_001];
    loop {
        if pause && got.len() % 7 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        match read.read(&mut space).await.unwrap() {
            0 => break,
            count => got.extend_from_slice(&space[..count]),
        }
    }
    drop(writer.await.unwrap());
    got
}

fn both_ways(kind: Kind, hops: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for (up, down, piece, pause) in [
            (0, 0, 1, false),
            (1, 3, 1, false),
            (5_000, 900, 7, false),
            (6_000_000, 100, 1 << 17, true),
            (100, 7_000_001, 33_333, true),
            (4_000_000, 4_000_000, 99_991, false),
        ] {
            let (client, server, _listener, _) = through(kind, hops).await;
            let (question, answer) = (bytes(1, up), bytes(2, down));
            let exchanged = async { tokio::join!(exchange(client, question.clone(), piece, pause), exchange(server, answer.clone(), piece, pause)) };
            let (got_answer, got_question) = tokio::time::timeout(Duration::from_secs(60), exchanged).await.expect("somebody was not woken");
            assert!(got_question == question, "{kind:?}: {} of {up} bytes up", got_question.len());
            assert!(got_answer == answer, "{kind:?}: {} of {down} bytes down", got_answer.len());
        }
    });
}

#[test]
fn c1_one_hop_carries_bytes_both_ways() {
    both_ways(Kind::C1, 1);
}

#[test]
fn c1_two_hops_carry_bytes_both_ways() {
    both_ways(Kind::C1, 2);
}

#[test]
fn c2_carries_bytes_both_ways() {
    both_ways(Kind::C2, 2);
}

#[test]
fn c3_carries_bytes_both_ways() {
    both_ways(Kind::C3, 2);
}

#[test]
fn an_answer_comes_after_the_question_has_ended() {
    for (kind, hops) in [(Kind::C1, 1), (Kind::C1, 2), (Kind::C2, 2), (Kind::C3, 2)] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut client, mut server, _listener, _) = through(kind, hops).await;
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"question");
            server.write_all(b"answer").await.unwrap();
            drop(server);
            got.clear();
            client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"answer");
        });
    }
}

#[test]
fn a_reset_of_one_side_resets_the_other() {
    for (kind, hops) in [(Kind::C1, 1), (Kind::C1, 2), (Kind::C2, 2), (Kind::C3, 2)] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (client, mut server, _listener, _) = through(kind, hops).await;
            culvert::sys::socket::reset_on_close(&client).unwrap();
            drop(client);
            assert!(server.read(&mut [0; 10]).await.is_err(), "{kind:?}");
        });
    }
}

/// C3 must seal: the payload appears nowhere on the wire, and a flipped bit ends the connection.
#[test]
fn c3_hides_and_protects_what_it_carries() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (wire, wire_address) = listener().await;
        let (source, address) = listener().await;
        tokio::spawn(serve(source, options(Kind::C3, wire_address), true));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(&[b'a'; 40_000]).await.unwrap();
        client.shutdown().await.unwrap();
        let (mut tunnel, _) = wire.accept().await.unwrap();
        let mut sealed = Vec::new();
        tunnel.read_to_end(&mut sealed).await.unwrap();
        assert!(sealed.len() >= 40_000 + 3 * 31);
        assert!(!sealed.windows(8).any(|part| part == b"aaaaaaaa"));
        assert_eq!(sealed[..3], [23, 3, 3]);

        sealed[20_000] ^= 1;
        let (server, server_address) = listener().await;
        let (sink, sink_address) = listener().await;
        tokio::spawn(serve(sink, options(Kind::C3, server_address), false));
        let mut attacker = TcpStream::connect(sink_address).await.unwrap();
        let (mut accepted, _) = server.accept().await.unwrap();
        attacker.write_all(&sealed).await.unwrap();
        let mut got = Vec::new();
        assert!(accepted.read_to_end(&mut got).await.is_err());
        assert!(got.len() <= 16_384);
    });
}
