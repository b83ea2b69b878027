//! Everything before the first request: TLS and ALPN, the preface, the first SETTINGS, and the deadline over all of it.

use std::sync::Arc;
use std::time::Duration;

use culvert::hbone::{Config, Endpoint, Error};
use culvert::lifecycle::{Clock, SettableTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::raw_h2::{self, Frame, PREFACE, RawPeer};
use crate::tunnel_peers::{CountingDialer, OurClient, OurServer, Realm, eventually, listen, soon, tls_accept, tls_to};

#[tokio::test]
async fn a_client_that_does_not_agree_on_h2_is_refused() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    for (offer, tls_refuses) in [(vec![], false), (vec![b"http/1.1".to_vec()], true)] {
        let mut config = (*realm.credential("client").await.client_config()).clone();
        config.alpn_protocols = offer;
        let socket = TcpStream::connect(server.address).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, socket).await {
            let _ = stream.write_all(&[PREFACE, &Frame::settings(&[]).encode()].concat()).await;
            let mut bytes = Vec::new();
            let _ = soon(stream.read_to_end(&mut bytes)).await;
            assert!(bytes.is_empty(), "no HTTP/2 is spoken with it");
        }
        match server.tunnel_end().await.unwrap_err() {
            Error::Tls(_) if tls_refuses => {}
            Error::Handshake(why) if !tls_refuses => assert!(why.contains("ALPN"), "{why}"),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn a_server_that_does_not_agree_on_h2_is_refused() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let mut config = (*realm.credential("server").await.server_config()).clone();
    config.alpn_protocols.clear();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let client = OurClient::to(address, &realm, Config::default()).await;
    let serve = async {
        let mut stream = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
        let mut bytes = Vec::new();
        let _ = soon(stream.read_to_end(&mut bytes)).await;
        bytes
    };
    let (opened, bytes) = tokio::join!(client.open(), serve);
    let error = opened.err().unwrap();
    assert!(matches!(&*error, Error::Handshake(why) if why.contains("ALPN")), "{error}");
    assert!(bytes.is_empty());
}

#[tokio::test]
async fn the_deadline_covers_tls_the_preface_and_the_first_settings() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config { handshake_deadline: Duration::from_millis(300), ..Config::default() }).await;
    let client = realm.credential("client").await;
    let settings = Frame::settings(&[(raw_h2::ENABLE_PUSH, 0)]).encode();
    let steps: [&[u8]; 4] = [b"", &PREFACE[..23], PREFACE, &[PREFACE, &settings[..settings.len() - 1]].concat()];
    // TCP only.
    let socket = TcpStream::connect(server.address).await.unwrap();
    assert!(matches!(server.tunnel_end().await, Err(Error::HandshakeDeadline(_))));
    drop(socket);
    for hello in steps {
        let mut stream = tls_to(server.address, &client).await;
        stream.write_all(hello).await.unwrap();
        stream.flush().await.unwrap();
        let end = server.tunnel_end().await;
        assert!(matches!(end, Err(Error::HandshakeDeadline(_))), "{} bytes: {end:?}", hello.len());
    }
    assert_eq!(server.tunnels.load(std::sync::atomic::Ordering::SeqCst), 0);
    // With the last byte it is a tunnel, and lives on.
    let mut peer = RawPeer::silent(tls_to(server.address, &client).await);
    for byte in [PREFACE, &settings].concat() {
        peer.send_bytes(&[byte]).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    server.request().await;
}

#[tokio::test]
async fn a_request_may_come_together_with_the_first_settings() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::silent(tls_to(server.address, &*realm.credential("client").await).await);
    let connects: Vec<u8> = [1, 3, 5].iter().flat_map(|stream| Frame::connect(*stream, &format!("10.0.0.{stream}:80")).encode()).collect();
    peer.send_bytes(&[PREFACE, &Frame::settings(&[]).encode(), &connects].concat()).await.unwrap();
    for stream in [1, 3, 5] {
        assert_eq!(server.request().await.request().unwrap().authority.to_string(), format!("10.0.0.{stream}:80"));
    }
}

#[tokio::test]
async fn a_peer_whose_first_frame_is_not_settings_is_refused() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let credential = realm.credential("client").await;
    for first in [Frame::ping([0; 8]), Frame::connect(1, "10.0.0.2:80"), Frame::settings_ack(), Frame::new(0x42, 0, 0, [])] {
        let mut peer = RawPeer::silent(tls_to(server.address, &credential).await);
        peer.send_bytes(&[PREFACE, &first.encode()].concat()).await.unwrap();
        let end = server.tunnel_end().await;
        assert!(matches!(end, Err(Error::Handshake(_))), "{first:?}: {end:?}");
    }
    // The same of a server.
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let serve = async {
        let credential = realm.credential("server").await;
        let mut peer = RawPeer::silent(tls_accept(listener.accept().await.unwrap().0, &credential).await);
        peer.send(&Frame::ping([0; 8])).await;
        peer
    };
    let (opened, _peer) = tokio::join!(client.open(), serve);
    assert!(matches!(&*opened.err().unwrap(), Error::Tunnel(_)));
    eventually("the tunnel is forgotten", || client.pool.is_empty()).await;
}

#[tokio::test]
async fn whatever_is_no_http2_is_refused() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let credential = realm.credential("client").await;
    for hello in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 64], &[0xff; 64], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX"] {
        let mut stream = tls_to(server.address, &credential).await;
        stream.write_all(hello).await.unwrap();
        assert!(matches!(server.tunnel_end().await, Err(Error::Handshake(_))));
    }
    // Without TLS.
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(server.tunnel_end().await, Err(Error::Tls(_))));
}

#[tokio::test]
async fn the_settings_that_we_send_are_the_agreed_ones() {
    let realm = Realm::new();
    let server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    let settings = soon(peer.receive()).await.unwrap().values();
    let expected = [
        (raw_h2::MAX_CONCURRENT_STREAMS, 256),
        (raw_h2::INITIAL_WINDOW_SIZE, 256 << 10),
        (raw_h2::MAX_FRAME_SIZE, 1 << 20),
        (raw_h2::MAX_HEADER_LIST_SIZE, 8 << 10),
    ];
    assert_eq!(settings, expected);
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let serve = async {
        let credential = realm.credential("server").await;
        let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
        let settings = peer.receive().await.unwrap().values();
        let fields = peer.expect_headers(1).await;
        peer.send(&Frame::status(1, "200")).await;
        (settings, fields)
    };
    let (opened, (settings, fields)) = tokio::join!(client.open(), serve);
    opened.unwrap();
    let expected = [
        (raw_h2::ENABLE_PUSH, 0),
        (raw_h2::INITIAL_WINDOW_SIZE, 1 << 20),
        (raw_h2::MAX_FRAME_SIZE, 1 << 20),
        (raw_h2::MAX_HEADER_LIST_SIZE, 16 << 10),
    ];
    assert_eq!(settings, expected);
    let method_and_authority = [(":method", "CONNECT"), (":authority", "10.0.0.2:80")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(fields, method_and_authority, "nothing else when nothing else is known");
}

/// An endpoint whose clock is this far before the expiry of what was just issued.
async fn shortly_before_expiry(realm: &Realm, account: &str, left: Duration) -> Endpoint {
    let not_after = realm.credential(account).await.not_after;
    let clock = Clock::fixed(SettableTime::new(not_after - left));
    Endpoint { clock, ..Endpoint::new(Config::default()) }
}

#[tokio::test]
async fn a_tunnel_says_goodbye_when_a_certificate_expires_and_serves_what_is_open() {
    let realm = Realm::new();
    let endpoint = shortly_before_expiry(&realm, "server", Duration::from_millis(200)).await;
    let server = OurServer::start(realm.credential("server").await, Arc::new(endpoint)).await.echo();
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut running = client.open().await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    running.echoes(b"x").await;
    client.open().await.unwrap().echoes(b"y").await;
    assert_eq!(client.dials(), 2, "the second stream took a new tunnel");
    // The client does the same by itself.
    let server = OurServer::with(&realm, Config::default()).await.echo();
    let endpoint = shortly_before_expiry(&realm, "client", Duration::from_millis(200)).await;
    let client = OurClient::with(server.address, &realm, endpoint, CountingDialer::default()).await;
    let mut running = client.open().await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(client.pool.is_empty());
    running.echoes(b"x").await;
}

#[tokio::test]
async fn a_live_tunnel_is_cut_a_minute_after_a_certificate_expired() {
    let realm = Realm::new();
    let late = Duration::from_millis(59_700);
    let not_after = realm.credential("server").await.not_after;
    let endpoint = Endpoint { clock: Clock::fixed(SettableTime::new(not_after + late)), ..Endpoint::new(Config::default()) };
    let mut server = OurServer::start(realm.credential("server").await, Arc::new(endpoint)).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let (opened, _far) = tokio::join!(client.open(), server.accept_one());
    let mut application = opened.unwrap();
    assert!(application.read_to_end().await.is_err());
    assert!(matches!(server.tunnel_end().await, Err(Error::Tunnel(why)) if why.contains("expired")));
    // The client does the same by itself.
    let mut server = OurServer::with(&realm, Config::default()).await;
    let not_after = realm.credential("client").await.not_after;
    let endpoint = Endpoint { clock: Clock::fixed(SettableTime::new(not_after + late)), ..Endpoint::new(Config::default()) };
    let client = OurClient::with(server.address, &realm, endpoint, CountingDialer::default()).await;
    let (opened, mut far) = tokio::join!(client.open(), server.accept_one());
    // Expired already when it was dialled: nothing new, and then the end.
    assert!(opened.unwrap().read_to_end().await.is_err());
    assert!(far.read_to_end().await.is_err());
}
