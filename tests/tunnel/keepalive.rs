//! Peers that fall silent, and peers that only seem to (F8).

use std::time::{Duration, Instant};

use culvert::hbone::{Config, Error};

use crate::raw_h2::{Frame, PING, RawPeer};
use crate::tunnel_peers::{OurClient, OurServer, Realm, eventually, listen, soon, tls_accept, tls_to};

fn short() -> Config {
    Config { ping_interval: Duration::from_millis(100), ping_timeout: Duration::from_millis(200), ..Config::default() }
}

#[tokio::test]
async fn a_silent_client_loses_its_tunnel_and_its_streams() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, short()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut application = server.accept_one().await;
    let silent_since = Instant::now();
    assert!(application.read_to_end().await.is_err());
    assert!(matches!(server.tunnel_end().await, Err(Error::PingTimeout(_))));
    let waited = silent_since.elapsed();
    assert!((Duration::from_millis(150)..Duration::from_millis(1000)).contains(&waited), "{waited:?}");
    // It was asked.
    while let Some(frame) = soon(peer.receive()).await {
        if frame.kind == PING {
            return;
        }
    }
    panic!("no PING");
}

#[tokio::test]
async fn a_silent_server_loses_its_tunnel_and_the_pool_forgets_it() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, short()).await;
    let credential = realm.credential("server").await;
    let serve = async {
        let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
        peer.expect_headers(1).await;
        peer.send(&Frame::status(1, "200")).await;
        peer
    };
    let (application, _peer) = tokio::join!(client.open(), soon(serve));
    assert!(application.unwrap().read_to_end().await.is_err());
    eventually("the pool forgets the tunnel", || client.pool.is_empty()).await;
}

#[tokio::test]
async fn a_peer_that_answers_pings_lives_however_idle() {
    let realm = Realm::new();
    let server = OurServer::with(&realm, short()).await.echo();
    let client = OurClient::to(server.address, &realm, short()).await;
    let mut application = client.open().await.unwrap();
    tokio::time::sleep(Duration::from_millis(800)).await;
    application.echoes(b"x").await;
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn a_peer_that_sends_but_answers_no_ping_lives_longer_but_not_for_ever() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, short()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut application = server.accept_one().await;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(600) {
        peer.send(&Frame::data(1, *b"x")).await;
        application.expect(b"x").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Three times the timeout; four are too many.
    while peer.try_send_all(&[Frame::data(1, *b"x")]).await.is_ok() && begin.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(matches!(server.tunnel_end().await, Err(Error::PingTimeout(_))));
}
