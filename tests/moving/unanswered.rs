//! What cannot move is waited for, and refused loudly when it takes too long.

use std::time::Duration;

use culvert::forward::Ended;
use culvert::hbone::{Config, ConnectResponse, Role};

use crate::ends::{Client, Server, through_bytes};
use crate::raw_h2::{self, Frame, RST_STREAM, RawPeer};
use crate::tunnel_peers::{Application, PATIENCE, Realm, soon, tls_to};

async fn raw_client(realm: &Realm, server: &mut Server) -> RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>> {
    let credential = realm.credential("client").await;
    let address = server.address;
    let peer = tokio::spawn(async move { RawPeer::client(tls_to(address, &credential).await, &[]).await });
    server.accept().await;
    soon(peer).await.unwrap()
}

#[tokio::test]
async fn a_request_that_is_soon_answered_is_waited_for_and_later_ones_are_refused() {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let mut peer = raw_client(&realm, &mut server).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let incoming = server.request().await;
    let mover = server.mover();
    let freezing = tokio::spawn(async move { mover.freeze(PATIENCE).await });
    // Once a later request is refused the freeze has begun.
    let mut id = 3;
    let refused = loop {
        peer.send(&Frame::connect(id, "10.0.0.2:80")).await;
        let frame = tokio::select! {
            frame = peer.next() => frame.unwrap(),
            early = server.request() => {
                early.refuse(culvert::hbone::Refusal::Unavailable);
                soon(peer.next()).await.unwrap()
            }
        };
        if frame.kind == RST_STREAM {
            break frame;
        }
        id += 2;
    };
    assert_eq!((refused.stream, refused.code()), (id, raw_h2::REFUSED_STREAM));
    assert!(!freezing.is_finished());
    let mut far = Application::behind(incoming.accept(&ConnectResponse::default()).unwrap(), Role::Server).await;
    let (frozen, _) = through_bytes(soon(freezing).await.unwrap().unwrap());
    assert_eq!(frozen.streams(), [1]);
    assert!(matches!(soon(&mut far.relay).await.unwrap(), Ended::Moved));
    server.take_up(frozen);
    soon(peer.expect_status(1)).await;
    peer.send(&Frame::data(1, *b"here")).await;
    far.expect(b"here").await;
}

#[tokio::test]
async fn requests_of_the_peer_that_nobody_answers_in_time_are_refused() {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let mut peer = raw_client(&realm, &mut server).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut incoming = server.request().await;
    let frozen = soon(server.mover().freeze(Duration::ZERO)).await.unwrap();
    // Whoever is about to answer learns of it.
    soon(incoming.abandoned()).await;
    assert!(incoming.accept(&ConnectResponse::default()).is_err());
    assert!(frozen.streams().is_empty());
    server.take_up(through_bytes(frozen).0);
    assert_eq!(soon(peer.expect(RST_STREAM, 1)).await.code(), raw_h2::REFUSED_STREAM);
    peer.send(&Frame::connect(3, "10.0.0.2:80")).await;
    let _far = server.accept_stream().await;
    soon(peer.expect_status(3)).await;
}

#[tokio::test]
async fn a_request_of_ours_that_is_not_answered_in_time_goes_to_another_tunnel() {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let mut client = Client::to(server.address, &realm, Config::default()).await;
    let pool = client.pool.clone();
    let (key, credential) = (client.key.clone(), client.inner.credential.clone());
    let opening = tokio::spawn(async move { pool.open(&key, &credential, &crate::tunnel_peers::request()).await });
    server.accept().await;
    let mut first = server.request().await;
    let frozen = soon(client.mover().freeze(Duration::ZERO)).await.unwrap();
    // The old pool dials another; the server hears of the first request's end when the tunnel goes on.
    server.accept().await;
    let second = server.request().await;
    client.take_up(through_bytes(frozen).0);
    soon(first.abandoned()).await;
    let mut far = Application::behind(second.accept(&ConnectResponse::default()).unwrap(), Role::Server).await;
    let (stream, _, _) = soon(opening).await.unwrap().unwrap();
    let mut near = Application::behind(stream, Role::Client).await;
    near.send(b"there").await;
    far.expect(b"there").await;
    assert_eq!(client.inner.dials(), 2);
}

#[tokio::test]
async fn a_freeze_that_is_called_off_changes_nothing() {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let mut peer = raw_client(&realm, &mut server).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let incoming = server.request().await;
    // It waits for the request, and is dropped.
    tokio::time::timeout(Duration::from_millis(20), server.mover().freeze(PATIENCE)).await.expect_err("nothing to freeze yet");
    let mut far = Application::behind(incoming.accept(&ConnectResponse::default()).unwrap(), Role::Server).await;
    soon(peer.expect_status(1)).await;
    peer.send(&Frame::data(1, *b"here")).await;
    far.expect(b"here").await;
    peer.send(&Frame::connect(3, "10.0.0.2:80")).await;
    let _other = server.accept_stream().await;
    soon(peer.expect_status(3)).await;
}

#[tokio::test]
async fn a_tunnel_that_has_ended_cannot_be_frozen() {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let peer = raw_client(&realm, &mut server).await;
    let mover = server.mover();
    drop(peer);
    for served in server.served.drain(..) {
        let _ = soon(served).await.unwrap();
    }
    assert!(soon(mover.freeze(PATIENCE)).await.is_err());
}
