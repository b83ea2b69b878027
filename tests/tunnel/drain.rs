//! Our own goodbye: graceful and immediate.

use std::time::Duration;

use culvert::hbone::{Config, ConnectResponse};
use culvert::lifecycle::drain::DrainMode;

use crate::raw_h2::{self, ACK, DATA, Frame, GOAWAY, PING, RawPeer};
use crate::tunnel_peers::{OurClient, OurServer, Realm, soon, tls_to};

#[tokio::test]
async fn a_graceful_drain_says_goodbye_in_two_steps_and_lets_streams_finish() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut application = server.accept_one().await;
    assert_eq!(soon(peer.expect_status(1)).await.0, "200");
    let drained = server.drain(DrainMode::Graceful, Duration::from_secs(60));
    let mut frames = Vec::new();
    while frames.len() < 2 {
        let frame = soon(peer.receive()).await.unwrap();
        if matches!(frame.kind, GOAWAY | PING) {
            frames.push(frame);
        }
    }
    assert_eq!((frames[0].kind, frames[0].number(), frames[0].code()), (GOAWAY, 0x7fff_ffff, raw_h2::NO_ERROR));
    // A stream that was on its way when the goodbye went is served.
    peer.send(&Frame::connect(3, "10.0.0.2:80")).await;
    let mut late = server.accept_one().await;
    assert_eq!(soon(peer.expect_status(3)).await.0, "200");
    peer.send(&Frame::new(PING, ACK, 0, frames[1].payload.clone())).await;
    let last = soon(peer.expect(GOAWAY, 0)).await;
    assert_eq!((last.number(), last.code()), (3, raw_h2::NO_ERROR));
    // One that comes later is nothing.
    peer.send(&Frame::connect(5, "10.0.0.2:80")).await;
    for (stream, application) in [(1, &mut application), (3, &mut late)] {
        peer.send(&Frame::data(stream, *b"more")).await;
        application.expect(b"more").await;
        application.send(b"and back").await;
        assert_eq!(soon(peer.expect(DATA, stream)).await.payload, b"and back");
        peer.send(&Frame::data(stream, []).ends()).await;
        application.finish().await;
        assert!(soon(peer.expect(DATA, stream)).await.end_stream());
    }
    assert!(server.tunnel_end().await.is_ok());
    server.requests.try_recv().err().expect("no request after the goodbye");
    drop(server);
    assert!(soon(drained).await.unwrap(), "everything finished by itself");
}

#[tokio::test]
async fn a_drain_of_an_idle_tunnel_closes_it_at_once() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    server.request().await.refuse(culvert::hbone::Refusal::Unavailable);
    let _drained = server.drain(DrainMode::Graceful, Duration::from_secs(60));
    soon(async { while peer.next().await.is_some() {} }).await;
    assert!(server.tunnel_end().await.is_ok());
}

#[tokio::test]
async fn a_peer_that_ignores_the_goodbye_is_cut_at_the_deadline() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let application = server.accept_one().await;
    let drained = server.drain(DrainMode::Graceful, Duration::from_millis(200));
    // It never answers the PING that comes with the goodbye.
    assert!(server.tunnel_end().await.is_ok());
    assert!(!soon(drained).await.unwrap());
    assert!(matches!(soon(application.relay).await.unwrap(), culvert::forward::Ended::Disconnected(_)));
    soon(async { while peer.receive().await.is_some() {} }).await;
}

#[tokio::test]
async fn an_immediate_drain_cuts_everything_at_once() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let (near, mut far) = tokio::join!(client.open(), server.accept_one());
    let mut near = near.unwrap();
    near.send(b"x").await;
    far.expect(b"x").await;
    let _drained = server.drain(DrainMode::Immediate, Duration::from_secs(60));
    assert!(server.tunnel_end().await.is_ok());
    assert!(near.read_to_end().await.is_err());
    assert!(far.read_to_end().await.is_err());
}

#[tokio::test]
async fn a_request_whose_tunnel_is_drained_away_is_abandoned() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut incoming = server.request().await;
    let _drained = server.drain(DrainMode::Immediate, Duration::from_secs(60));
    soon(incoming.abandoned()).await;
    assert!(incoming.accept(&ConnectResponse::default()).is_err());
}
