//! Credit (RFC 9113 §6.9): none is lost with streams that go, none is given for what waits, and errors of it have their codes.

use culvert::hbone::{Config, ConnectResponse, Endpoint, Role};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::opened::{ROLES, open, pattern};
use crate::raw_h2::{
    self, CANCEL, DATA, FLOW_CONTROL_ERROR, Frame, GOAWAY, INITIAL_WINDOW_SIZE, INTERNAL_ERROR, NO_ERROR, PADDED, PROTOCOL_ERROR, RST_STREAM,
    RawPeer, SETTINGS, WINDOW_UPDATE,
};
use crate::tunnel_peers::{Application, OurServer, Realm, connect, connected, listen, soon, tls_connect};

fn endpoint() -> Endpoint {
    Endpoint::new(Config::default())
}

/// Credit of the tunnel (0) and of streams, as a peer counts it.
struct Credit {
    left: BTreeMap<u32, i64>,
    initial: i64,
}

impl Credit {
    fn new<S>(peer: &RawPeer<S>) -> Self {
        let mut credit = Self { left: BTreeMap::from([(0, 65_535)]), initial: 65_535 };
        peer.passed_over.iter().for_each(|frame| credit.note(frame));
        credit
    }

    fn note(&mut self, frame: &Frame) {
        match frame.kind {
            WINDOW_UPDATE => *self.of(frame.stream) += i64::from(frame.number()),
            SETTINGS => {
                for (_, value) in frame.values().into_iter().filter(|(name, _)| *name == INITIAL_WINDOW_SIZE) {
                    let change = i64::from(value) - self.initial;
                    self.initial = i64::from(value);
                    self.left.iter_mut().filter(|(id, _)| **id != 0).for_each(|(_, left)| *left += change);
                }
            }
            _ => {}
        }
    }

    fn of(&mut self, stream: u32) -> &mut i64 {
        let initial = self.initial;
        self.left.entry(stream).or_insert(initial)
    }

    /// Takes as much of what is wished for as there is.
    fn take(&mut self, stream: u32, wish: usize) -> usize {
        let all = (*self.of(stream)).min(self.left[&0]).max(0);
        let taken = usize::try_from(all).unwrap().min(wish);
        let counted = i64::try_from(taken).unwrap();
        *self.of(0) -= counted;
        *self.of(stream) -= counted;
        taken
    }
}

#[tokio::test]
async fn late_bytes_of_a_stream_that_is_reset_give_the_tunnel_its_credit_back() {
    let realm = Realm::new();
    for padding in [0, 200] {
        let mut server = OurServer::with(&realm, Config::default()).await;
        let tls = tls_connect(connect(server.address).await, &*realm.credential("client").await).await;
        let mut peer = RawPeer::client(tls, &[]).await;
        let mut applications = Vec::new();
        for number in 0..30 {
            peer.send(&Frame::connect(number * 2 + 1, "10.0.0.2:80")).await;
            applications.push(server.accept_one().await);
            soon(peer.expect_status(number * 2 + 1)).await;
        }
        let mut credit = Credit::new(&peer);
        let survivor = applications.remove(0);
        for application in applications {
            application.relay.abort();
        }
        for _ in 0..29 {
            assert_eq!(soon(peer.next()).await.expect("the tunnel ended").kind, RST_STREAM);
        }
        // All that was under way when the resets were sent: the tunnel's whole window.
        while credit.left[&0] > 0 {
            for number in 1..30 {
                let size = credit.take(number * 2 + 1, 16_000);
                if padding > 0 && size > padding {
                    let payload = vec![1; size - 1 - padding];
                    peer.send(&Frame::padded_data(number * 2 + 1, &payload, u8::try_from(padding).unwrap())).await;
                } else if size > 0 {
                    peer.send(&Frame::data(number * 2 + 1, vec![1; size])).await;
                }
            }
        }
        // A neighbour that was idle all the time has something to say.
        peer.passed_over.clear();
        while credit.left[&0] < 5 {
            let frame = soon(peer.receive()).await.expect("the tunnel ended");
            credit.note(&frame);
        }
        peer.send(&Frame::data(1, *b"alive")).await;
        let mut survivor = survivor;
        survivor.expect(b"alive").await;
    }
}

#[tokio::test]
async fn a_goaway_that_leaves_a_live_stream_out_resets_its_application_and_keeps_the_others() {
    // The peer says that it never handled the second stream although it has answered it: bytes are missing, which is not an end.
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = crate::tunnel_peers::OurClient::to(address, &realm, Config::default()).await;
    let credential = realm.credential("server").await;
    let serve = async {
        let tls = crate::tunnel_peers::tls_accept(listener.accept().await.unwrap().0, &credential).await;
        let mut peer = RawPeer::server(tls, &[]).await;
        for stream in [1, 3] {
            peer.expect_headers(stream).await;
            peer.send(&Frame::status(stream, "200")).await;
        }
        peer
    };
    let open = async {
        let first = client.open().await.unwrap();
        let (stream, _, _) = client.pool.open(&client.key, &client.credential, &crate::tunnel_peers::request()).await.unwrap();
        (first, Application::with_small_buffers(stream, Role::Client).await)
    };
    let ((mut first, mut second), mut peer) = soon(Box::pin(async { tokio::join!(open, serve) })).await;
    // More than the application's kernel buffers: some of it waits on our side.
    for _ in 0..12 {
        peer.send(&Frame::data(3, vec![5; 16 << 10])).await;
    }
    peer.send(&Frame::goaway(1, NO_ERROR)).await;
    assert!(second.read_to_end().await.is_err(), "cut-off bytes were taken for all of them");
    // What waited for it does not count any more: the first stream can still move more than the tunnel's window.
    let bytes = pattern(3 << 20);
    let mut credit = Credit::new(&peer);
    credit.take(3, 12 * (16 << 10));
    let mut got = vec![0; bytes.len()];
    let read = first.socket.read_exact(&mut got);
    let send = async {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let size = credit.take(1, rest.len().min(16 << 10));
            if size == 0 {
                credit.note(&peer.receive().await.expect("the tunnel ended"));
                continue;
            }
            peer.send(&Frame::data(1, &rest[..size])).await;
            rest = &rest[size..];
        }
        peer.send(&Frame::data(1, []).ends()).await;
    };
    let (read, ()) = soon(async { tokio::join!(read, send) }).await;
    read.unwrap();
    assert!(got == bytes);
}

#[tokio::test]
async fn a_goaway_with_an_error_in_mid_transfer_ends_everything() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        opened.peer.send_all(&[Frame::data(1, *b"half"), Frame::goaway(1, INTERNAL_ERROR)]).await;
        opened.ends().await;
    }
}

#[tokio::test]
async fn a_server_that_is_told_goodbye_serves_what_is_open_and_closes() {
    let realm = Realm::new();
    let mut opened = open(&realm, Role::Server, endpoint()).await;
    opened.peer.send_all(&[Frame::data(1, *b"more"), Frame::goaway(0, NO_ERROR)]).await;
    opened.application.expect(b"more").await;
    opened.works().await;
    opened.peer.send(&Frame::data(1, *b"last").ends()).await;
    assert_eq!(opened.application.read_to_end().await.unwrap(), b"last");
    opened.application.send(b"answer").await;
    opened.application.finish().await;
    assert_eq!(soon(opened.peer.read_to_end(1)).await, b"answer");
    assert_eq!(soon(opened.peer.goaway_code()).await, Some(NO_ERROR));
    assert!(soon(opened.peer.next()).await.is_none());
}

#[tokio::test]
async fn errors_of_flow_control_and_of_padding_end_the_tunnel_with_their_codes() {
    let realm = Realm::new();
    let most = 0x7fff_ffff;
    let table: [(&str, Vec<Frame>, u32); 13] = [
        ("no credit for the tunnel", vec![Frame::window_update(0, 0)], PROTOCOL_ERROR),
        ("too much credit for the tunnel", vec![Frame::window_update(0, most)], FLOW_CONTROL_ERROR),
        ("a window beyond all windows", vec![Frame::settings(&[(INITIAL_WINDOW_SIZE, most + 1)])], FLOW_CONTROL_ERROR),
        (
            "a window that SETTINGS carry beyond the most",
            vec![Frame::window_update(1, 1000), Frame::settings(&[(INITIAL_WINDOW_SIZE, most)])],
            FLOW_CONTROL_ERROR,
        ),
        ("credit for a stream that never was", vec![Frame::window_update(7, 1)], PROTOCOL_ERROR),
        ("an end of a stream that never was", vec![Frame::reset(7, CANCEL)], PROTOCOL_ERROR),
        ("bytes for a stream that never was", vec![Frame::data(7, *b"x")], PROTOCOL_ERROR),
        ("bytes for no stream", vec![Frame::data(0, *b"x")], PROTOCOL_ERROR),
        ("bytes after the end", vec![Frame::data(1, []).ends(), Frame::data(1, *b"x")], raw_h2::STREAM_CLOSED),
        ("padding as long as the frame", vec![Frame::new(DATA, PADDED, 1, [5, 0, 0, 0, 0])], PROTOCOL_ERROR),
        ("padding longer than the frame", vec![Frame::new(DATA, PADDED, 1, [255, 1, 2, 3])], PROTOCOL_ERROR),
        ("no room for the length of the padding", vec![Frame::new(DATA, PADDED, 1, [])], raw_h2::FRAME_SIZE_ERROR),
        ("a frame beyond what we take", vec![Frame::new(0x42, 0, 0, vec![0; (1 << 20) + 1])], raw_h2::FRAME_SIZE_ERROR),
    ];
    for role in ROLES {
        for (what, frames, expected) in &table {
            let mut opened = open(&realm, role, endpoint()).await;
            opened.works().await;
            // It may be cut before all of it is sent.
            let _ = opened.peer.try_send_all(frames).await;
            if what.contains("after the end") {
                assert_eq!(opened.application.read_to_end().await.unwrap(), b"");
                assert_eq!(soon(opened.peer.goaway_code()).await, Some(*expected), "{role:?}: {what}");
            } else {
                assert_eq!(opened.ends().await.goaway, Some(*expected), "{role:?}: {what}");
            }
        }
    }
}

#[tokio::test]
async fn no_credit_for_a_stream_is_an_error_of_that_stream() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        opened.peer.send(&Frame::window_update(1, 0)).await;
        assert_eq!(soon(opened.peer.expect(RST_STREAM, 1)).await.code(), PROTOCOL_ERROR);
        assert!(opened.application.read_to_end().await.is_err());
        opened.peer.send(&Frame::ping([7; 8])).await;
        loop {
            let frame = soon(opened.peer.receive()).await.expect("the tunnel ended");
            assert_ne!(frame.kind, GOAWAY);
            if frame.kind == raw_h2::PING && frame.is_ack() {
                break;
            }
        }
    }
}

/// Streams of the test below: 1 is stalled.
const NEIGHBOURS: u32 = 1000;
/// What each neighbour moves while it is.
const EACH: usize = 96 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_holds_its_window_and_a_thousand_neighbours_go_on() {
    // Until each of them has moved its part, however long that takes: the reader that stops does not come back on its own.
    let realm = Realm::new();
    culvert::sys::limits::raise_nofile().unwrap();
    let config = Config { max_streams: NEIGHBOURS + 1, ..Config::default() };
    let mut server = OurServer::with(&realm, config).await;
    let tls = tls_connect(connect(server.address).await, &*realm.credential("client").await).await;
    let mut peer = RawPeer::client(tls, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let stream = server.request().await.accept(&ConnectResponse::default()).unwrap();
    let mut stalled = Application::with_small_buffers(stream, Role::Server).await;
    soon(peer.expect_status(1)).await;
    let bytes = Arc::new(pattern(EACH));
    let mut readers = Vec::new();
    for number in 1..=NEIGHBOURS {
        peer.send(&Frame::connect(number * 2 + 1, "10.0.0.2:80")).await;
        let stream = server.request().await.accept(&ConnectResponse::default()).unwrap();
        soon(peer.expect_status(number * 2 + 1)).await;
        let (mut near, far) = connected().await;
        tokio::spawn(async move { stream.relay(far, Role::Server, &Arc::default()).await });
        let bytes = bytes.clone();
        readers.push(tokio::spawn(async move {
            let mut got = vec![0; EACH];
            near.read_exact(&mut got).await.unwrap();
            assert!(got == *bytes);
            near.write_all(b"done").await.unwrap();
        }));
    }
    let mut credit = Credit::new(&peer);
    let mut held = 0;
    let mut sent = vec![0; NEIGHBOURS as usize];
    let mut last = std::time::Instant::now();
    while sent.iter().any(|sent| *sent < EACH) {
        assert!(last.elapsed() < crate::tunnel_peers::PATIENCE, "nobody moves any more");
        let mut batch = Vec::new();
        // All that it may be sent, at any time.
        while let size @ 1.. = credit.take(1, 16 << 10) {
            batch.extend(Frame::data(1, vec![9; size]).encode());
            held += size;
        }
        for (number, sent) in (1..=NEIGHBOURS).zip(&mut sent) {
            let size = credit.take(number * 2 + 1, (EACH - *sent).min(8 << 10));
            if size > 0 {
                batch.extend(Frame::data(number * 2 + 1, &bytes[*sent..*sent + size]).encode());
                *sent += size;
                last = std::time::Instant::now();
            }
        }
        if !batch.is_empty() {
            soon(peer.send_bytes(&batch)).await.unwrap();
            // What has come by now, without waiting for more.
            while let Ok(Some(frame)) = tokio::time::timeout(std::time::Duration::ZERO, peer.receive()).await {
                credit.note(&frame);
            }
            continue;
        }
        credit.note(&soon(peer.receive()).await.expect("the tunnel ended"));
    }
    for reader in readers {
        soon(reader).await.unwrap();
    }
    let taken = usize::try_from(stalled.meter.totals().0).unwrap();
    assert!(held > 200 << 10, "it was never filled: {held}");
    // Its reader never kept up, so its window has not grown beyond that of a new stream.
    assert!(held <= (256 << 10) + taken, "{held} octets, {taken} of them taken");
    // It reads again, and has all of it.
    socket2::SockRef::from(&stalled.socket).set_recv_buffer_size(1 << 20).unwrap();
    peer.send(&Frame::data(1, []).ends()).await;
    assert!(stalled.read_to_end().await.unwrap() == vec![9; held]);
}
