//! A state that is not exactly what was written is refused, and nobody takes it for the end of a stream.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use culvert::hbone::{Config, Endpoint, Frozen, Pool, ServerTunnel, StateError};

use crate::ends::{Client, Dice, Server};
use crate::tunnel_peers::{CountingDialer, Realm, soon};

/// One stream with bytes in flight, and the state of its serving end.
async fn frozen() -> (Realm, Client, crate::tunnel_peers::Application, crate::tunnel_peers::Application, Frozen) {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let client = Client::to(server.address, &realm, Config::default()).await;
    let (near, far) = tokio::join!(client.open(), server.accept_with_stream());
    let frozen = server.freeze().await;
    (realm, client, near, far, frozen)
}

fn copies(sockets: &[OwnedFd]) -> Vec<OwnedFd> {
    sockets.iter().map(|socket| socket.try_clone().unwrap()).collect()
}

#[tokio::test]
async fn damaged_bytes_are_refused_with_a_reason() {
    let (_realm, _client, _near, _far, frozen) = frozen().await;
    let (bytes, sockets) = frozen.into_parts();
    let refused = |bytes: &[u8]| Frozen::from_parts(bytes, copies(&sockets)).expect_err("refused");
    for length in 0..bytes.len() {
        assert_eq!(refused(&bytes[..length]), StateError::Length, "cut at {length}");
    }
    assert_eq!(refused(&[&bytes[..], &[0]].concat()), StateError::Length);
    assert_eq!(refused(b"something else entirely"), StateError::Foreign);
    for at in 0..bytes.len() {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1 << (at % 8);
        let error = refused(&flipped);
        match at {
            0..8 => assert_eq!(error, StateError::Foreign),
            8..10 => assert!(matches!(error, StateError::Version(_))),
            10..14 => assert_eq!(error, StateError::Length),
            _ => assert_eq!(error, StateError::Checksum),
        }
    }
    let mut newer = bytes.to_vec();
    newer[9] += 1;
    assert_eq!(refused(&newer).to_string(), "the state of a tunnel has version 3, this build reads version 2");
    let mut dice = Dice(1);
    for _ in 0..2000 {
        let noise: Vec<u8> = (0..dice.roll(600)).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect();
        refused(&noise);
    }
    assert_eq!(Frozen::from_parts(&bytes, copies(&sockets[..1])).unwrap_err(), StateError::Sockets { expected: 2, given: 1 });
    assert!(Frozen::from_parts(&bytes, sockets).is_ok());
}

#[tokio::test]
async fn a_state_that_is_dropped_or_refused_resets_its_connections() {
    for refused in [false, true] {
        let (_realm, _client, mut near, mut far, frozen) = frozen().await;
        if refused {
            let (mut bytes, sockets) = frozen.into_parts();
            bytes[100] ^= 1;
            assert!(Frozen::from_parts(&bytes, sockets).is_err());
        } else {
            drop(frozen);
        }
        assert!(far.read_to_end().await.is_err(), "the application behind the server");
        assert!(near.read_to_end().await.is_err(), "and the one behind the client");
    }
}

#[tokio::test]
async fn a_stream_that_nobody_takes_up_is_reset() {
    let (realm, _client, mut near, mut far, frozen) = frozen().await;
    let (tunnel, streams) = ServerTunnel::take_up(frozen, &*realm.credential("server").await, &Arc::new(Endpoint::new(Config::default()))).unwrap();
    let (_trigger, watcher) = culvert::lifecycle::drain::channel();
    let served = tokio::spawn(tunnel.serve(watcher, |_| {}));
    drop(streams);
    assert!(far.read_to_end().await.is_err());
    assert!(near.read_to_end().await.is_err());
    served.abort();
}

#[tokio::test]
async fn a_tunnel_goes_on_only_on_its_own_side_and_with_the_peer_that_is_expected() {
    let (_realm, client, mut near, mut far, serving) = frozen().await;
    let pool = Pool::new(Arc::new(Endpoint::new(Config::default())), Arc::new(CountingDialer::default()));
    let mut key = client.key.clone();
    key.expected = vec![serving.peer().clone()];
    assert!(pool.take_up(key.clone(), &client.inner.credential, serving).is_err(), "a server's tunnel in a pool");
    assert!(soon(far.read_to_end()).await.is_err());
    let _ = near.read_to_end().await;

    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let client = Client::to(server.address, &realm, Config::default()).await;
    let (_near, _far) = tokio::join!(client.open(), server.accept_with_stream());
    let frozen = client.freeze().await;
    assert!(pool.take_up(key, &client.inner.credential, frozen).is_err(), "a peer that the key does not expect");
}

#[tokio::test]
async fn no_secret_is_in_what_is_printed() {
    let (_realm, _client, _near, _far, frozen) = frozen().await;
    let shown = format!("{frozen:?}");
    assert!(shown.len() < 200 && shown.contains("spiffe://") && !shown.contains("secret"), "{shown}");
}
