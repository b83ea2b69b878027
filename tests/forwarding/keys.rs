//! KeyUpdate (RFC 8446 §4.6.3): the peer's with and without a request for ours, and ours when a key has sealed enough.

use std::sync::Arc;
use std::time::Duration;

use culvert::hbone::{Config, Endpoint};
use culvert::telemetry::Meter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::opened::{Opened, ROLES, open, pattern};
use crate::raw_h2::{Frame, RawPeer};
use crate::raw_tls::{APPLICATION_DATA, HANDSHAKE, RawTls, key_update};
use crate::tunnel_peers::{Answer, CountingDialer, OurClient, OurServer, Realm, StockClient, StockServer, connect, soon};

fn endpoint() -> Endpoint {
    Endpoint::new(Config::default())
}

/// Seals with one key for so many records, then with the next.
fn frugal(records_per_key: u64) -> Endpoint {
    Endpoint { records_per_key, ..endpoint() }
}

/// The application sends `length` bytes while the peer sends as many, changing its key before every piece.
async fn both_ways(opened: &mut Opened, length: usize, asked: u8) {
    let bytes = pattern(length);
    let (mut read, mut write) = opened.application.socket.split();
    let peer = &mut opened.peer;
    let applications = async {
        let mut got = vec![0; length];
        let (sent, received) = tokio::join!(write.write_all(&bytes), read.read_exact(&mut got));
        sent.unwrap();
        received.unwrap();
        assert!(got == bytes);
    };
    let raw = async {
        let mut got = Vec::new();
        for piece in bytes.chunks(5_000) {
            peer.io.update_key(asked).await;
            peer.send(&Frame::data(1, piece)).await;
            if got.len() < length {
                let frame = peer.expect(crate::raw_h2::DATA, 1).await;
                let size = u32::try_from(frame.payload.len()).unwrap();
                got.extend(frame.payload);
                peer.send_all(&[Frame::window_update(0, size), Frame::window_update(1, size)]).await;
            }
        }
        while got.len() < length {
            let frame = peer.expect(crate::raw_h2::DATA, 1).await;
            let size = u32::try_from(frame.payload.len()).unwrap();
            got.extend(frame.payload);
            peer.send_all(&[Frame::window_update(0, size), Frame::window_update(1, size)]).await;
        }
        assert!(got == bytes);
    };
    soon(async { tokio::join!(applications, raw) }).await;
}

#[tokio::test]
async fn a_peer_may_change_its_key_at_any_time_and_is_answered_only_if_it_asks() {
    let realm = Realm::new();
    for role in ROLES {
        for asked in [0, 1] {
            let mut opened = open(&realm, role, endpoint()).await;
            both_ways(&mut opened, 200_000, asked).await;
            opened.works().await;
            let answers = &opened.peer.io.updates;
            // One answer may serve several requests (RFC 8446 §4.6.3); none asks back, or the two would never come to an end.
            assert!(answers.iter().all(|(asks, _)| *asks == 0), "{answers:?}");
            assert_eq!(answers.is_empty(), asked == 0, "{role:?} {asked}: {answers:?}");
            assert!(answers.len() <= 40);
        }
    }
}

#[tokio::test]
async fn a_key_update_may_come_in_pieces_and_several_may_come_at_once() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        let tls = &mut opened.peer.io;
        for piece in key_update(1).chunks(2) {
            tls.record(HANDSHAKE, piece).await;
        }
        tls.send.update();
        // In one segment: three changes with bytes before, between and behind them.
        let mut wire = tls.send.seal(APPLICATION_DATA, &Frame::data(1, *b"a").encode(), 0);
        for letter in *b"bcd" {
            wire.extend(tls.send.seal(HANDSHAKE, &key_update(letter % 2), 3));
            tls.send.update();
            wire.extend(tls.send.seal(APPLICATION_DATA, &Frame::data(1, [letter]).encode(), 100));
        }
        tls.write_raw(&wire).await.unwrap();
        opened.application.expect(b"abcd").await;
        opened.works().await;
    }
}

/// Octets of the next DATA frame.
async fn payload(peer: &mut RawPeer<RawTls>) -> usize {
    let frame = peer.next().await.expect("the tunnel ended");
    assert_eq!(frame.kind, crate::raw_h2::DATA);
    frame.payload.len()
}

/// Waits until no application's bytes move any more.
async fn still(meters: &[Arc<Meter>]) {
    let (mut before, mut now) = (0, 0);
    while now == 0 || now != before {
        tokio::time::sleep(Duration::from_millis(50)).await;
        (before, now) = (now, meters.iter().map(|meter| meter.totals().1).sum());
    }
}

#[tokio::test]
async fn a_request_for_our_key_is_answered_although_the_peer_does_not_read_and_streams_are_busy() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let socket = connect(server.address).await;
    let tls = RawTls::client(socket, &*realm.credential("client").await).await;
    // Windows that never stop the senders: what stops them is the peer that does not read.
    let mut peer = RawPeer::client(tls, &[(crate::raw_h2::INITIAL_WINDOW_SIZE, 0x7fff_ffff)]).await;
    peer.send(&Frame::window_update(0, 0x7fff_0000)).await;
    let mut applications = Vec::new();
    for number in 0..20 {
        peer.send(&Frame::connect(number * 2 + 1, "10.0.0.2:80")).await;
        applications.push(server.accept_one().await);
        assert_eq!(soon(peer.expect_status(number * 2 + 1)).await.0, "200");
    }
    let bytes = pattern(2 << 20);
    let expected = bytes.len() * applications.len();
    let (mut readers, mut floods) = (Vec::new(), Vec::new());
    let meters: Vec<_> = applications.iter().map(|application| application.meter.clone()).collect();
    for application in applications {
        let (read, mut write) = application.socket.into_split();
        let bytes = bytes.clone();
        readers.push(read);
        floods.push(tokio::spawn(async move { write.write_all(&bytes).await.map(|()| write) }));
    }
    // Until our side has filled all that it can, the kernel's buffers and its own; once more after a part was read, now that every application
    // has more for it than a turn takes: then its slab is full.
    let mut received = 0;
    for part in [0, 8 << 20] {
        while received < part {
            received += soon(payload(&mut peer)).await;
        }
        still(&meters).await;
    }
    assert!(meters.iter().map(|meter| meter.totals().1).sum::<u64>() < expected as u64, "all of it fits into the kernel's buffers");
    // It still reads, which stream 1's application shows.
    peer.send(&Frame::data(1, *b"x")).await;
    let mut got = [0];
    soon(readers[0].read_exact(&mut got)).await.unwrap();
    for _ in 0..10 {
        peer.io.update_key(1).await;
        peer.send(&Frame::data(1, *b"y")).await;
        soon(readers[0].read_exact(&mut got)).await.unwrap();
    }
    while received < expected {
        received += soon(payload(&mut peer)).await;
    }
    assert!(!peer.io.updates.is_empty());
    for flood in floods {
        soon(flood).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_key_is_changed_when_it_has_sealed_its_share() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, frugal(4)).await;
        both_ways(&mut opened, 250_000, 0).await;
        let updates = &opened.peer.io.updates;
        // More than 15 records were needed. One fill of a slab may go on with a key that is spent: sixteen records and the control frames.
        assert!(updates.len() >= 2, "{updates:?}");
        assert!(updates.iter().all(|(asks, records)| *asks == 0 && (4..40).contains(records)), "{updates:?}");
    }
}

#[tokio::test]
async fn stock_peers_and_our_own_follow_when_keys_change_all_the_time() {
    let realm = Realm::new();
    let bytes = pattern(1 << 20);
    let ours = OurServer::start(realm.credential("server").await, Arc::new(frugal(3))).await.echo();
    let stock = StockServer::start(realm.credential("server").await, Answer::Echo).await;
    for address in [ours.address, stock.address] {
        let client = OurClient::with(address, &realm, frugal(2), CountingDialer::default()).await;
        let mut application = client.open().await.unwrap();
        let (mut read, mut write) = application.socket.split();
        let mut got = vec![0; bytes.len()];
        let (sent, received) = soon(async { tokio::join!(write.write_all(&bytes), read.read_exact(&mut got)) }).await;
        sent.unwrap();
        received.unwrap();
        assert!(got == bytes);
    }
    let client = StockClient::connect(ours.address, &*realm.credential("client").await).await;
    let (_, mut stream) = client.open("10.0.0.2:80").await.unwrap();
    for piece in bytes.chunks(20_000).take(10) {
        stream.send(piece).await;
        let mut got = Vec::new();
        while got.len() < piece.len() {
            got.extend_from_slice(&soon(stream.receive()).await.unwrap().unwrap());
        }
        assert!(got == piece);
    }
}

#[tokio::test]
async fn records_of_another_key_do_not_open() {
    let realm = Realm::new();
    for role in ROLES {
        // A key that was never announced.
        let mut opened = open(&realm, role, endpoint()).await;
        opened.peer.io.send.update();
        opened.peer.send(&Frame::data(1, *b"from the future")).await;
        assert_eq!(opened.ends().await.alert, Some(crate::raw_tls::BAD_RECORD_MAC));
        // A key that was given up.
        let mut opened = open(&realm, role, endpoint()).await;
        let tls = &mut opened.peer.io;
        let announced = tls.send.seal(HANDSHAKE, &key_update(0), 0);
        let late = tls.send.seal(APPLICATION_DATA, &Frame::data(1, *b"from the past").encode(), 0);
        tls.write_raw(&[announced, late].concat()).await.unwrap();
        assert_eq!(opened.ends().await.alert, Some(crate::raw_tls::BAD_RECORD_MAC));
        // A record twice, and a record that is missing.
        for wrong in ["twice", "missing"] {
            let mut opened = open(&realm, role, endpoint()).await;
            let tls = &mut opened.peer.io;
            let first = tls.send.seal(APPLICATION_DATA, &Frame::data(1, *b"once").encode(), 0);
            let second = tls.send.seal(APPLICATION_DATA, &Frame::data(1, *b"again").encode(), 0);
            let wire = if wrong == "twice" { [first.clone(), first].concat() } else { second };
            tls.write_raw(&wire).await.unwrap();
            assert_eq!(opened.ends().await.alert, Some(crate::raw_tls::BAD_RECORD_MAC), "{wrong}");
        }
    }
}

#[tokio::test]
async fn a_key_may_change_together_with_the_end_of_the_handshake() {
    // The moment at which rustls hands over: its last flight, then everything at once.
    let realm = Realm::new();
    for asked in [None, Some(0), Some(1)] {
        let mut server = OurServer::with(&realm, Config::default()).await;
        let socket = connect(server.address).await;
        let (mut tls, mut wire) = RawTls::client_before_its_last_flight(socket, &*realm.credential("client").await).await;
        if let Some(asked) = asked {
            wire.extend(tls.send.seal(HANDSHAKE, &key_update(asked), 0));
            tls.send.update();
        }
        let hello = [crate::raw_h2::PREFACE, &Frame::settings(&[]).encode(), &Frame::connect(1, "10.0.0.2:80").encode()].concat();
        wire.extend(tls.send.seal(APPLICATION_DATA, &hello, 0));
        tls.write_raw(&wire).await.unwrap();
        let mut peer = RawPeer::silent(tls);
        let mut application = server.accept_one().await;
        assert_eq!(soon(peer.expect_status(1)).await.0, "200");
        peer.send(&Frame::data(1, *b"x")).await;
        application.expect(b"x").await;
        application.send(b"y").await;
        assert_eq!(soon(peer.expect(crate::raw_h2::DATA, 1)).await.payload, b"y");
    }
}
