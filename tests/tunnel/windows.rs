//! Receive windows within the budget of the node.

use std::sync::Arc;
use std::time::Duration;

use culvert::hbone::{Config, Endpoint, PoolKey, ReceiveBudget};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::raw_h2::{Frame, INITIAL_WINDOW_SIZE, RawPeer, SETTINGS, WINDOW_UPDATE};
use crate::tunnel_peers::{CountingDialer, OurClient, OurServer, Realm, eventually, soon, tls_to};

const MIB: u64 = 1 << 20;

fn endpoint(total: u64) -> Endpoint {
    Endpoint { budget: ReceiveBudget::new(total), ..Endpoint::new(Config::default()) }
}

/// Sends `total` bytes on stream 1 as fast as the windows allow, while the application reads; returns the windows in force at the end.
async fn push(peer: &mut RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>, total: i64) -> (i64, i64) {
    let (mut tunnel, mut stream, mut initial, mut sent) = (65_535_i64, 65_535_i64, 65_535_i64, 0);
    let (mut used_tunnel, mut used_stream) = (0, 0);
    let early = std::mem::take(&mut peer.passed_over);
    let mut note = |frame: &Frame, tunnel: &mut i64, stream: &mut i64| match (frame.kind, frame.stream) {
        (WINDOW_UPDATE, 0) => *tunnel += i64::from(frame.number()),
        (WINDOW_UPDATE, 1) => *stream += i64::from(frame.number()),
        (SETTINGS, _) => {
            for (name, value) in frame.values() {
                if name == INITIAL_WINDOW_SIZE {
                    *stream += i64::from(value) - initial;
                    initial = i64::from(value);
                }
            }
        }
        _ => {}
    };
    early.iter().for_each(|frame| note(frame, &mut tunnel, &mut stream));
    while sent < total {
        let size = (tunnel - used_tunnel).min(stream - used_stream).min(16 << 10).min(total - sent);
        if size > 0 {
            peer.send(&Frame::data(1, vec![3; usize::try_from(size).unwrap()])).await;
            (used_tunnel, used_stream, sent) = (used_tunnel + size, used_stream + size, sent + size);
            continue;
        }
        let frame = soon(peer.receive()).await.expect("the tunnel ended");
        if frame.kind == SETTINGS && !frame.is_ack() {
            peer.send(&Frame::settings_ack()).await;
        }
        note(&frame, &mut tunnel, &mut stream);
    }
    (tunnel - used_tunnel, stream - used_stream)
}

#[tokio::test]
async fn the_windows_of_a_busy_tunnel_grow_and_its_part_comes_back_when_it_ends() {
    let realm = Realm::new();
    let endpoint = Arc::new(endpoint(64 * MIB));
    let mut server = OurServer::start(realm.credential("server").await, endpoint.clone()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let application = server.accept_one().await;
    assert_eq!(soon(peer.expect_status(1)).await.0, "200");
    assert_eq!(endpoint.budget.promised(), 768 << 10, "one mebibyte less the floor");
    let mut read = application.socket.into_split().0;
    let reader = tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 20];
        let mut total = 0;
        while let Ok(read) = read.read(&mut buffer).await {
            if read == 0 {
                break;
            }
            total += read;
        }
        total
    });
    push(&mut peer, 48 << 20).await;
    assert_eq!(endpoint.budget.promised(), 16 * MIB - (256 << 10));
    peer.send(&Frame::data(1, []).ends()).await;
    assert_eq!(soon(reader).await.unwrap(), 48 << 20);
    drop(peer);
    let _ = server.tunnel_end().await;
    eventually("the part comes back", || endpoint.budget.promised() == 0).await;
}

#[tokio::test]
async fn a_spent_budget_leaves_every_tunnel_enough_to_work_and_peers_cannot_fill_more() {
    let realm = Realm::new();
    let budget = 4 * MIB;
    let endpoint = Arc::new(endpoint(budget));
    let mut server = OurServer::start(realm.credential("server").await, endpoint.clone()).await;
    let credential = realm.credential("client").await;
    let (mut held, mut peers) = (Vec::new(), Vec::new());
    let mut buffered = 0;
    // Twenty peers fill whatever they are given on four streams each; no application reads.
    for _ in 0..20 {
        let mut peer = RawPeer::client(tls_to(server.address, &credential).await, &[]).await;
        for stream in [1, 3, 5, 7] {
            peer.send(&Frame::connect(stream, "10.0.0.2:80")).await;
            let application = server.accept_one().await;
            soon(peer.expect_status(stream)).await;
            held.push(application);
        }
        let mut tunnel = 65_535_u64;
        let mut initial = 65_535;
        for frame in &peer.passed_over {
            tunnel += if frame.kind == WINDOW_UPDATE { u64::from(frame.number()) } else { 0 };
            let found = if frame.kind == SETTINGS { frame.values() } else { Vec::new() };
            initial = found.iter().find(|(name, _)| *name == INITIAL_WINDOW_SIZE).map_or(initial, |(_, value)| *value);
        }
        buffered += tunnel;
        for stream in [1, 3, 5, 7] {
            for _ in 0..initial / (16 << 10) {
                let _ = peer.try_send_all(&[Frame::data(stream, vec![1; 16 << 10])]).await;
            }
        }
        peers.push(peer);
    }
    assert!(buffered <= budget + 20 * (256 << 10), "{buffered} bytes were promised");
    assert!(endpoint.budget.promised() <= budget);
    // One more tunnel still works.
    let client = OurClient::with(server.address, &realm, Endpoint::new(Config::default()), CountingDialer::default()).await;
    let (near, mut far) = tokio::join!(client.open(), server.accept_one());
    let mut near = near.unwrap();
    let bytes = vec![5; 3 << 20];
    let (read, write) = (&mut far.socket, &mut near.socket);
    let mut got = vec![0; bytes.len()];
    let (sent, received) = soon(async { tokio::join!(write.write_all(&bytes), read.read_exact(&mut got)) }).await;
    sent.unwrap();
    received.unwrap();
    assert!(got == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_that_shrink_and_grow_under_load_lose_nothing() {
    let realm = Realm::new();
    let budget = 8 * MIB;
    let endpoint = Arc::new(endpoint(budget));
    let server = OurServer::start(realm.credential("server").await, endpoint.clone()).await.echo();
    let client = Arc::new(OurClient::with(server.address, &realm, Endpoint::new(Config::default()), CountingDialer::default()).await);
    let until = tokio::time::Instant::now() + Duration::from_millis(2500);
    let tasks = (0..5_u8).map(|number| {
        let client = client.clone();
        tokio::spawn(async move {
            // One after the other, so that the first ones have all there is when the last ones come.
            tokio::time::sleep(Duration::from_millis(150) * u32::from(number)).await;
            let key = PoolKey { source_ip: [10, 0, 0, number].into(), ..client.key.clone() };
            let mut application = client.open_with(&key).await.unwrap();
            let (mut read, mut write) = application.socket.split();
            let block: Vec<u8> = (0..256 << 10).map(|at: usize| u8::try_from((at + usize::from(number)) % 251).unwrap()).collect();
            let send = async {
                let mut blocks = 0;
                while tokio::time::Instant::now() < until {
                    write.write_all(&block).await.unwrap();
                    blocks += 1;
                }
                write.shutdown().await.unwrap();
                blocks
            };
            let receive = async {
                let (mut got, mut blocks) = (vec![0; block.len()], 0);
                while read.read_exact(&mut got).await.is_ok() {
                    assert!(got == block);
                    blocks += 1;
                }
                blocks
            };
            let (sent, received) = soon(async { tokio::join!(send, receive) }).await;
            assert_eq!(sent, received);
            assert!(sent > 0);
        })
    });
    let watch = endpoint.clone();
    let watcher = tokio::spawn(async move {
        loop {
            assert!(watch.budget.promised() <= budget);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    for task in futures_util::future::join_all(tasks).await {
        task.unwrap();
    }
    assert!(!watcher.is_finished());
    watcher.abort();
}
