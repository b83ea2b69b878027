//! The reserve of the tunnel's window: requests pass neighbours that have stalled.

use std::time::Duration;

use culvert::hbone::Config;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::raw_h2::{DATA, Frame, INITIAL_WINDOW_SIZE, RST_STREAM, RawPeer};
use crate::tunnel_peers::{Answer, Application, OurClient, OurServer, Realm, StockServer, listen, soon, tls_accept, tls_to};

/// The tunnel's window that the raw peer gives.
const WINDOW: u32 = 256 << 10;
/// What is kept of it.
const RESERVE: usize = WINDOW as usize / 16;
/// What one stream may have of that.
const SHARE: usize = RESERVE / 2;

/// Writes an upload of a mebibyte, and says when all of it was taken.
fn upload(application: Application) -> JoinHandle<Application> {
    let mut application = application;
    tokio::spawn(async move {
        application.socket.write_all(&vec![7; 1 << 20]).await.unwrap();
        application
    })
}

/// Takes what comes on stream 1 until so much was taken, and makes sure that it was all.
async fn take<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(peer: &mut RawPeer<S>, octets: usize) {
    let mut got = 0;
    while got < octets {
        got += soon(peer.expect(DATA, 1)).await.payload.len();
    }
    assert_eq!(got, octets);
    assert!(tokio::time::timeout(Duration::from_millis(50), peer.next()).await.is_err());
}

/// Sends a request on a stream and has it taken; what came of it.
async fn ask<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(peer: &mut RawPeer<S>, (near, stream): (&mut Application, u32), octets: usize) {
    near.send(&vec![b'?'; octets]).await;
    let mut got = 0;
    while got < octets {
        got += soon(peer.expect(DATA, stream)).await.payload.len();
    }
    assert_eq!(got, octets);
    peer.send(&Frame::data(stream, *b"!")).await;
    near.expect(b"!").await;
}

/// Both sides of a tunnel send alike: `near` is the application of ours.
async fn requests_pass<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(peer: &mut RawPeer<S>, applications: Vec<Application>) {
    let mut applications = applications.into_iter();
    let bulk = upload(applications.next().unwrap());
    // A lone upload has everything but the reserve.
    take(peer, WINDOW as usize - RESERVE).await;
    // One whose peer gives back what it reads goes on for ever.
    let mut sparse = applications.next().unwrap();
    for _ in 0..200 {
        ask(peer, (&mut sparse, 3), 300).await;
        peer.send(&Frame::window_update(0, 300)).await;
    }
    // One whose peer does not has its share, and leaves others theirs.
    let mut other = applications.next().unwrap();
    ask(peer, (&mut other, 5), SHARE).await;
    other.send(b"more").await;
    assert!(tokio::time::timeout(Duration::from_millis(20), peer.next()).await.is_err());
    ask(peer, (&mut sparse, 3), 300).await;
    peer.send(&Frame::window_update(0, 300)).await;
    // What the peer gives at last is for all. (Of the other, four octets.)
    peer.send_all(&[Frame::window_update(0, 2 << 20)]).await;
    let (mut rest, mut more) = ((1 << 20) - (WINDOW as usize - RESERVE), 4);
    while rest + more > 0 {
        let frame = soon(peer.next()).await.unwrap();
        assert_eq!(frame.kind, DATA);
        *(if frame.stream == 1 { &mut rest } else { &mut more }) -= frame.payload.len();
    }
    soon(bulk).await.unwrap();
}

#[tokio::test]
async fn requests_to_a_peer_pass_an_upload_that_stalls_with_the_tunnels_window() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let credential = realm.credential("server").await;
    let serve = async {
        let stream = tls_accept(listener.accept().await.unwrap().0, &credential).await;
        let mut peer = RawPeer::server(stream, &[(INITIAL_WINDOW_SIZE, 2 << 20)]).await;
        peer.send(&Frame::window_update(0, WINDOW - 65_535)).await;
        for stream in [1, 3, 5] {
            peer.expect_headers(stream).await;
            peer.send(&Frame::status(stream, "200")).await;
        }
        peer
    };
    let open = async {
        let mut applications = Vec::new();
        for _ in 0..3 {
            applications.push(client.open().await.unwrap());
        }
        applications
    };
    let (mut peer, applications) = Box::pin(soon(async { tokio::join!(serve, open) })).await;
    requests_pass(&mut peer, applications).await;
}

#[tokio::test]
async fn answers_to_a_peer_pass_a_download_that_stalls_with_the_tunnels_window() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let stream = tls_to(server.address, &*realm.credential("client").await).await;
    let mut peer = RawPeer::client(stream, &[(INITIAL_WINDOW_SIZE, 2 << 20)]).await;
    peer.send(&Frame::window_update(0, WINDOW - 65_535)).await;
    let mut applications = Vec::new();
    for stream in [1, 3, 5] {
        peer.send(&Frame::connect(stream, "10.0.0.2:80")).await;
        applications.push(server.accept_one().await);
        assert_eq!(soon(peer.expect_status(stream)).await.0, "200");
    }
    requests_pass(&mut peer, applications).await;
}

/// Our side sends to stock `h2`, as ztunnel has it: an echo whose answers nobody takes withholds the tunnel's window, and the neighbours go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_to_a_stock_peer_pass_streams_that_have_stalled() {
    let realm = Realm::new();
    let configure = |builder: &mut h2::server::Builder| {
        builder.initial_window_size(1 << 20).initial_connection_window_size(128 << 10);
    };
    let server = StockServer::with(realm.credential("server").await, Answer::Echo, configure).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut before = client.open().await.unwrap();
    before.echoes(b"before").await;
    let mut stalled = Vec::new();
    for _ in 0..2 {
        let mut application = client.open().await.unwrap();
        // Until nothing is taken any more; of the answers nothing is read.
        while let Ok(sent) = tokio::time::timeout(Duration::from_millis(300), application.socket.write(&[7; 64 << 10])).await {
            sent.unwrap();
        }
        stalled.push(application);
    }
    for _ in 0..500 {
        before.echoes(&[b'x'; 400]).await;
    }
    assert_eq!((client.dials(), server.connections()), (1, 1));
    let stuck = |socket: &TcpStream| socket.try_write(&[7; 1]).is_err();
    assert!(stalled.iter().all(|application| stuck(&application.socket)), "nothing was stalled");
    // After a second without credit new connections go another way, all of them the same.
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..50 {
        client.open().await.unwrap().echoes(&[b'x'; 400]).await;
    }
    assert_eq!((client.dials(), server.connections()), (2, 2));
    before.echoes(b"after").await;
}

/// A peer that never gives credit back.
#[tokio::test]
async fn a_tunnel_whose_credit_does_not_come_back_gets_no_more_streams_and_is_not_kept_when_nobody_uses_it() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let credential = realm.credential("server").await;
    let serve = async || {
        let stream = tls_accept(soon(listener.accept()).await.unwrap().0, &credential).await;
        let mut peer = RawPeer::server(stream, &[(INITIAL_WINDOW_SIZE, 2 << 20)]).await;
        peer.expect_headers(1).await;
        peer.send(&Frame::status(1, "200")).await;
        peer
    };
    let (near, mut first) = tokio::join!(client.open(), serve());
    let bulk = upload(near.unwrap());
    take(&mut first, 65_535 - 4_095).await;
    // For a second it may be no more than a round trip.
    let early = async {
        first.expect_headers(3).await;
        first.send(&Frame::status(3, "200")).await;
    };
    let short = tokio::join!(client.open(), early).0.unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (near, mut second) = tokio::join!(client.open(), serve());
    assert_eq!((client.dials(), client.pool.len()), (2, 2));
    // The one that was first has no streams any more, and the next connection finds it gone.
    soon(bulk).await.unwrap().relay.abort();
    short.relay.abort();
    for _ in 0..2 {
        while soon(first.next()).await.unwrap().kind != RST_STREAM {}
    }
    let open = async {
        second.expect_headers(3).await;
        second.send(&Frame::status(3, "200")).await;
    };
    let (_third, ()) = tokio::join!(client.open(), open);
    assert_eq!((client.dials(), client.pool.len()), (2, 1));
    while soon(first.next()).await.is_some() {}
    drop(near);
}
