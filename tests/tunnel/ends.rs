//! How the ends of an application's connection and of a stream map onto each other, in both roles and at every stage (H8).

use std::future::Future;
use std::pin::Pin;

use culvert::forward::Ended;
use culvert::hbone::{Config, ConnectResponse, Role};
use socket2::SockRef;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::{client, server};

use crate::raw_h2::{self, CANCEL, CONNECT_ERROR, DATA, Frame, INTERNAL_ERROR, NO_ERROR, RST_STREAM, RawPeer};
use crate::tunnel_peers::{Application, OurClient, OurServer, Realm, listen, soon, tls_accept, tls_to};

/// A raw peer on the other side of the tunnel, whichever that is.
enum Peer {
    Client(RawPeer<client::TlsStream<TcpStream>>),
    Server(RawPeer<server::TlsStream<TcpStream>>),
}

impl Peer {
    async fn send(&mut self, frame: &Frame) {
        match self {
            Self::Client(peer) => peer.send(frame).await,
            Self::Server(peer) => peer.send(frame).await,
        }
    }

    async fn next(&mut self) -> Frame {
        soon(async {
            match self {
                Self::Client(peer) => peer.next().await,
                Self::Server(peer) => peer.next().await,
            }
        })
        .await
        .expect("the tunnel ended")
    }

    async fn expect_end(&mut self) {
        let frame = self.next().await;
        assert!(frame.kind == DATA && frame.payload.is_empty() && frame.end_stream(), "{frame:?}");
    }
}

/// An open stream: the application on our side, the raw peer on the other. What keeps the tunnel alive comes along.
async fn open(realm: &Realm, role: Role) -> (Application, Peer, Box<dyn std::any::Any>) {
    match role {
        Role::Server => {
            let mut server = OurServer::with(realm, Config::default()).await;
            let stream = tls_to(server.address, &*realm.credential("client").await).await;
            let mut peer = RawPeer::client(stream, &[]).await;
            peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
            let application = server.accept_one().await;
            assert_eq!(soon(peer.expect_status(1)).await, ("200".to_owned(), false));
            (application, Peer::Client(peer), Box::new(server))
        }
        Role::Client => {
            let (listener, address) = listen().await;
            let client = OurClient::to(address, realm, Config::default()).await;
            let credential = realm.credential("server").await;
            let serve = async {
                let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
                peer.expect_headers(1).await;
                peer.send(&Frame::status(1, "200")).await;
                peer
            };
            let (application, peer) = tokio::join!(client.open(), soon(serve));
            (application.unwrap(), Peer::Server(peer), Box::new(client))
        }
    }
}

const ROLES: [Role; 2] = [Role::Client, Role::Server];

#[tokio::test]
async fn fin_is_an_empty_data_frame_with_end_stream_and_the_other_direction_goes_on() {
    let realm = Realm::new();
    for role in ROLES {
        let (mut application, mut peer, _keep) = open(&realm, role).await;
        application.send(b"all I have").await;
        let frame = peer.next().await;
        assert_eq!((frame.kind, &frame.payload[..], frame.end_stream()), (DATA, &b"all I have"[..], false));
        application.finish().await;
        peer.expect_end().await;
        for part in [&b"much"[..], b"more", b"to come"] {
            peer.send(&Frame::data(1, part)).await;
            application.expect(part).await;
        }
        peer.send(&Frame::data(1, *b"end").ends()).await;
        assert_eq!(application.read_to_end().await.unwrap(), b"end");
        assert!(matches!(soon(application.relay).await.unwrap(), Ended::Finished));
        let (received, sent) = application.meter.totals();
        let (out, back) = (10, 4 + 4 + 7 + 3);
        assert_eq!((received, sent), if role == Role::Client { (out, back) } else { (back, out) });
    }
}

#[tokio::test]
async fn end_stream_is_fin_and_the_other_direction_goes_on() {
    let realm = Realm::new();
    for role in ROLES {
        let (mut application, mut peer, _keep) = open(&realm, role).await;
        peer.send(&Frame::data(1, [])).await;
        peer.send(&Frame::data(1, *b"x").ends()).await;
        assert_eq!(application.read_to_end().await.unwrap(), b"x");
        for part in [&b"still"[..], b"talking"] {
            application.send(part).await;
            assert_eq!(peer.next().await.payload, part);
        }
        application.finish().await;
        peer.expect_end().await;
        assert!(matches!(soon(application.relay).await.unwrap(), Ended::Finished));
    }
}

#[tokio::test]
async fn end_stream_on_the_request_is_fin_after_the_200() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80").ends()).await;
    let mut application = server.accept_one().await;
    assert_eq!(application.read_to_end().await.unwrap(), b"");
    application.send(b"server speaks").await;
    application.finish().await;
    assert_eq!(soon(peer.expect_status(1)).await.0, "200");
    assert_eq!(soon(peer.read_to_end(1)).await, b"server speaks");
}

#[tokio::test]
async fn trailers_are_an_end_and_nothing_more() {
    let realm = Realm::new();
    for role in ROLES {
        let (mut application, mut peer, _keep) = open(&realm, role).await;
        peer.send(&Frame::data(1, *b"x")).await;
        peer.send(&Frame::headers(1, raw_h2::hpack::block(&[("x-trailer", "y")])).ends()).await;
        assert_eq!(application.read_to_end().await.unwrap(), b"x");
        application.finish().await;
        peer.expect_end().await;
    }
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Both directions are open.
    Open,
    /// The application has finished.
    ApplicationFinished,
    /// The peer has finished.
    PeerFinished,
    /// Both are open, and the application does not read what the peer sent.
    Unread,
}

const STAGES: [Stage; 4] = [Stage::Open, Stage::ApplicationFinished, Stage::PeerFinished, Stage::Unread];

async fn bring_to(stage: Stage, application: &mut Application, peer: &mut Peer) {
    match stage {
        Stage::Open => {}
        Stage::ApplicationFinished => {
            application.finish().await;
            peer.expect_end().await;
        }
        Stage::PeerFinished => {
            peer.send(&Frame::data(1, []).ends()).await;
            assert_eq!(application.read_to_end().await.unwrap(), b"");
        }
        Stage::Unread => {
            for _ in 0..4 {
                peer.send(&Frame::data(1, vec![7; 16 << 10])).await;
            }
        }
    }
}

/// What an application notices.
#[derive(Debug, PartialEq, Eq)]
enum Notices {
    /// A clean end of what it reads.
    End,
    /// A reset.
    Reset,
}

async fn notices(application: &mut Application) -> Notices {
    match application.read_to_end().await {
        Ok(_) => Notices::End,
        Err(_) => Notices::Reset,
    }
}

/// After the end of what it reads, an application learns of a reset when it writes.
async fn write_fails(application: &mut Application) -> bool {
    soon(async {
        for _ in 0..200 {
            if application.socket.write_all(b"x").await.is_err() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    })
    .await
}

#[tokio::test]
async fn a_reset_of_the_stream_resets_the_application_unless_it_says_no_error() {
    let realm = Realm::new();
    for role in ROLES {
        for stage in STAGES {
            for code in [NO_ERROR, CANCEL, CONNECT_ERROR, INTERNAL_ERROR] {
                let case = format!("{role:?} {stage:?} code {code}");
                let (mut application, mut peer, _keep) = open(&realm, role).await;
                bring_to(stage, &mut application, &mut peer).await;
                peer.send(&Frame::reset(1, code)).await;
                if stage == Stage::PeerFinished {
                    assert!(write_fails(&mut application).await, "{case}");
                } else {
                    let expected = if code == NO_ERROR { Notices::End } else { Notices::Reset };
                    assert_eq!(notices(&mut application).await, expected, "{case}");
                }
                let ended = soon(application.relay).await.unwrap();
                match code {
                    NO_ERROR => assert!(matches!(ended, Ended::Finished), "{case}: {ended:?}"),
                    INTERNAL_ERROR => assert!(matches!(ended, Ended::Failed(_)), "{case}: {ended:?}"),
                    _ => assert!(matches!(ended, Ended::Disconnected(_)), "{case}: {ended:?}"),
                }
            }
        }
    }
}

type End = fn(Application) -> Pin<Box<dyn Future<Output = ()>>>;

/// Ways in which an application goes.
const WAYS: [(&str, End); 3] = [
    ("reset", |application| {
        Box::pin(async move {
            SockRef::from(&application.socket).set_linger(Some(Duration::ZERO)).unwrap();
        })
    }),
    ("gone while the relay is cut", |application| Box::pin(async move { application.relay.abort() })),
    ("gone with bytes unread", |application| {
        Box::pin(async move {
            // Linux resets such a connection by itself; these bytes are never read.
            application.socket.readable().await.unwrap();
        })
    }),
];

#[tokio::test]
async fn an_application_that_vanishes_resets_its_stream_with_cancel() {
    let realm = Realm::new();
    for role in ROLES {
        for stage in STAGES {
            for (way, end) in WAYS {
                if way.contains("unread") && stage != Stage::Unread {
                    continue;
                }
                let case = format!("{role:?} {stage:?} {way}");
                let (mut application, mut peer, _keep) = open(&realm, role).await;
                bring_to(stage, &mut application, &mut peer).await;
                end(application).await;
                let frame = peer.next().await;
                assert_eq!((frame.kind, frame.stream), (RST_STREAM, 1), "{case}: {frame:?}");
                assert_eq!(frame.code(), CANCEL, "{case}");
            }
        }
    }
}

#[tokio::test]
async fn an_application_that_closes_after_the_peer_finished_ends_cleanly() {
    let realm = Realm::new();
    for role in ROLES {
        let (mut application, mut peer, _keep) = open(&realm, role).await;
        bring_to(Stage::PeerFinished, &mut application, &mut peer).await;
        drop(application.socket);
        peer.expect_end().await;
        assert!(matches!(soon(application.relay).await.unwrap(), Ended::Finished));
    }
}

#[tokio::test]
async fn a_cut_on_one_node_is_a_reset_for_both_applications_and_not_an_end() {
    let realm = Realm::new();
    for cut_at_client in [true, false] {
        let mut server = OurServer::with(&realm, Config::default()).await;
        let client = OurClient::to(server.address, &realm, Config::default()).await;
        let (near, mut far) = tokio::join!(client.open(), server.accept_one());
        let mut near = near.unwrap();
        near.send(b"x").await;
        far.expect(b"x").await;
        // The direction from the server to the client is over: the state in which a reset could be taken for a clean end.
        far.finish().await;
        assert_eq!(near.read_to_end().await.unwrap(), b"");
        if cut_at_client {
            near.relay.abort()
        } else {
            far.relay.abort()
        }
        assert_eq!(notices(&mut far).await, Notices::Reset, "{cut_at_client}");
        assert!(write_fails(&mut near).await, "{cut_at_client}");
    }
}

#[tokio::test]
async fn half_close_goes_through_two_nodes_in_both_directions() {
    let realm = Realm::new();
    for client_first in [true, false] {
        let mut server = OurServer::with(&realm, Config::default()).await;
        let client = OurClient::to(server.address, &realm, Config::default()).await;
        let (near, far) = tokio::join!(client.open(), server.accept_one());
        let (mut first, mut second) = if client_first { (near.unwrap(), far) } else { (far, near.unwrap()) };
        first.send(b"question").await;
        first.finish().await;
        assert_eq!(second.read_to_end().await.unwrap(), b"question");
        for _ in 0..3 {
            second.send(b"answer").await;
            first.expect(b"answer").await;
        }
        second.finish().await;
        assert_eq!(first.read_to_end().await.unwrap(), b"");
        assert!(matches!(soon(first.relay).await.unwrap(), Ended::Finished));
        assert!(matches!(soon(second.relay).await.unwrap(), Ended::Finished));
    }
}

#[tokio::test]
async fn what_was_delivered_before_a_no_error_reset_arrives_although_the_application_still_sends() {
    // RFC 9113 §8.1: a server that has answered in full may ask the client to stop.
    let realm = Realm::new();
    for role in ROLES {
        let (mut application, mut peer, _keep) = open(&realm, role).await;
        // More than the window: our side waits for credit that never comes.
        let (mut read, mut write) = application.socket.split();
        let flood = async { while write.write_all(&[1; 64 << 10]).await.is_ok() {} };
        let answer = async {
            peer.next().await;
            peer.send(&Frame::data(1, vec![9; 16 << 10]).ends()).await;
            peer.send(&Frame::reset(1, NO_ERROR)).await;
            let mut got = vec![0; 16 << 10];
            tokio::io::AsyncReadExt::read_exact(&mut read, &mut got).await.unwrap();
            assert_eq!(got, vec![9; 16 << 10]);
        };
        soon(async {
            // In the end the application cannot write any more, as with any server that does not read all that it is sent.
            tokio::join!(answer, flood)
        })
        .await;
    }
}

#[tokio::test]
async fn a_peer_error_of_a_stream_leaves_its_neighbours_alone() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    let mut applications = Vec::new();
    for stream in [1, 3] {
        peer.send(&Frame::connect(stream, "10.0.0.2:80")).await;
        applications.push(server.accept_one().await);
        assert_eq!(soon(peer.expect_status(stream)).await.0, "200");
    }
    // A window beyond 2^31-1 is an error of the stream (RFC 9113 §6.9.1).
    peer.send(&Frame::window_update(1, 0x7fff_ffff)).await;
    assert_eq!(soon(peer.expect(RST_STREAM, 1)).await.code(), raw_h2::FLOW_CONTROL_ERROR);
    assert_eq!(notices(&mut applications[0]).await, Notices::Reset);
    // Late frames of a stream that is reset are nothing.
    peer.send(&Frame::data(1, *b"late")).await;
    peer.send(&Frame::data(3, *b"x")).await;
    applications[1].expect(b"x").await;
    applications[1].send(b"y").await;
    let frame = soon(peer.next()).await.unwrap();
    assert_eq!((frame.kind, frame.stream, &frame.payload[..]), (DATA, 3, &b"y"[..]));
}

#[tokio::test]
async fn a_refused_request_delivers_none_of_its_early_bytes() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    // H5, D20: bytes before the answer wait for it.
    peer.send_all(&[Frame::connect(1, "10.0.0.2:80"), Frame::data(1, *b"early")]).await;
    let incoming = server.request().await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let stream = incoming.accept(&ConnectResponse::default()).unwrap();
    let mut application = Application::behind(stream, Role::Server).await;
    application.expect(b"early").await;
    assert_eq!(soon(peer.expect_status(1)).await.0, "200");
    peer.send_all(&[Frame::connect(3, "10.0.0.2:80"), Frame::data(3, *b"secret")]).await;
    server.request().await.refuse(culvert::hbone::Refusal::Denied);
    assert_eq!(soon(peer.expect_status(3)).await, ("401".to_owned(), true));
    assert_eq!(soon(peer.expect(RST_STREAM, 3)).await.code(), NO_ERROR);
    // Their credit comes back: the window is not eaten up by refused requests.
    for number in 0..200_u32 {
        let stream = 5 + number * 2;
        peer.send_all(&[Frame::connect(stream, "10.0.0.2:80"), Frame::data(stream, vec![1; 16 << 10])]).await;
        server.request().await.refuse(culvert::hbone::Refusal::Denied);
        loop {
            let frame = soon(peer.next()).await.expect("the tunnel ended");
            if frame.kind == raw_h2::HEADERS {
                peer.fields(&frame);
                break;
            }
        }
    }
    peer.send(&Frame::data(1, *b"still open")).await;
    application.expect(b"still open").await;
}

#[tokio::test]
async fn nothing_is_sent_before_the_200() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let credential = realm.credential("server").await;
    let serve = async {
        let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
        peer.expect_headers(1).await;
        // A 100 and the like are no answer yet (H12).
        peer.send(&Frame::status(1, "100")).await;
        peer.send(&Frame::status(1, "103")).await;
        let early = tokio::time::timeout(Duration::from_millis(100), peer.next()).await;
        assert!(early.is_err(), "{early:?}");
        peer.send(&Frame::status(1, "200")).await;
        peer
    };
    let (application, mut peer) = tokio::join!(client.open(), soon(serve));
    application.unwrap().send(b"now").await;
    assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b"now");
}

/// What our application sees when its peer sends this much and then RST_STREAM, with an application that reads, or not, before the end.
async fn after_reset(reset_is_end: bool, send: u32, code: u32) -> (usize, Result<(), std::io::ErrorKind>) {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let request = culvert::hbone::ConnectRequest { reset_is_end, ..crate::tunnel_peers::request() };
    let opened = async { soon(client.pool.open(&client.key, &client.credential, &request)).await.unwrap().0 };
    let serve = async {
        let credential = realm.credential("server").await;
        let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
        peer.expect_headers(1).await;
        peer.send(&Frame::status(1, "200")).await;
        for _ in 0..send / (16 << 10) {
            peer.send(&Frame::data(1, vec![7; 16 << 10])).await;
        }
        peer.send(&Frame::data(1, vec![7; send as usize % (16 << 10)])).await;
        peer.send(&Frame::reset(1, code)).await;
        peer
    };
    let (stream, _peer) = tokio::join!(opened, serve);
    // All of it has come before the application is there, so that no credit was given back in between.
    let mut application = Application::behind(stream, Role::Client).await;
    let mut got = vec![0; 64 << 10];
    let mut total = 0;
    loop {
        match soon(tokio::io::AsyncReadExt::read(&mut application.socket, &mut got)).await {
            Ok(0) => return (total, Ok(())),
            Ok(count) => total += count,
            Err(error) => return (total, Err(error.kind())),
        }
    }
}

#[tokio::test]
async fn a_reset_with_connect_error_is_an_end_only_where_the_request_says_so_and_the_peer_was_not_waiting_for_window() {
    use std::io::ErrorKind::ConnectionReset;
    const WINDOW: u32 = 1 << 20;
    assert_eq!(after_reset(true, 100_000, CONNECT_ERROR).await, (100_000, Ok(())));
    assert_eq!(after_reset(true, 1, CONNECT_ERROR).await, (1, Ok(())));
    assert_eq!(after_reset(true, WINDOW - 1, CONNECT_ERROR).await, (WINDOW as usize - 1, Ok(())));
    // One that has used its window up may have had more to say: the application must not take what it got for all.
    assert_eq!(after_reset(true, WINDOW, CONNECT_ERROR).await.1, Err(ConnectionReset));
    assert_eq!(after_reset(false, 100_000, CONNECT_ERROR).await.1, Err(ConnectionReset));
    for code in [CANCEL, INTERNAL_ERROR] {
        assert_eq!(after_reset(true, 100_000, code).await.1, Err(ConnectionReset));
    }
    assert_eq!(after_reset(false, 100_000, NO_ERROR).await, (100_000, Ok(())));
}
