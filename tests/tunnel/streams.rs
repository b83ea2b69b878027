//! Bytes on streams: between our two sides and stock `h2`, in frames of every size, and without empty frames.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use culvert::hbone::{Config, ConnectResponse, Role};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::raw_h2::{self, DATA, Frame, HEADERS, INITIAL_WINDOW_SIZE, RawPeer};
use crate::tunnel_peers::{Answer, Application, OurClient, OurServer, Realm, StockClient, StockServer, listen, soon, tls_accept, tls_to};

/// Bytes in which every place can be told from every other.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 31 + at / 251 + at / 65_521) % 256).unwrap()).collect()
}

/// Sends everything and reads everything back at the same time.
async fn through_echo(application: &mut Application, bytes: &[u8]) {
    let (mut read, mut write) = application.socket.split();
    let send = async {
        write.write_all(bytes).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let receive = async { read.read_to_end(&mut got).await.unwrap() };
    soon(async { tokio::join!(send, receive) }).await;
    assert!(got == bytes, "{} of {} bytes, or other ones", got.len(), bytes.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_arrive_whole_between_our_sides_and_stock_ones() {
    let realm = Realm::new();
    let ours = OurServer::with(&realm, Config::default()).await.echo();
    let stock = StockServer::start(realm.credential("server").await, Answer::Echo).await;
    let bytes = pattern(3 << 20);
    for address in [ours.address, stock.address] {
        let client = OurClient::to(address, &realm, Config::default()).await;
        let (mut one, mut two) = (client.open().await.unwrap(), client.open().await.unwrap());
        tokio::join!(through_echo(&mut one, &bytes), through_echo(&mut two, &bytes[1000..]));
        let length = bytes.len() as u64;
        assert_eq!(one.meter.totals(), (length, length));
        assert_eq!(client.dials(), 1);
    }
    let client = StockClient::connect(ours.address, &*realm.credential("client").await).await;
    let (status, stream) = client.open("10.0.0.2:80").await.unwrap();
    assert_eq!(status, 200);
    let crate::tunnel_peers::StockStream { mut send, receive } = stream;
    let sent = bytes.clone();
    let sender = tokio::spawn(async move {
        crate::tunnel_peers::stock_send(&mut send, Bytes::from(sent)).await.unwrap();
        send.send_data(Bytes::new(), true).unwrap();
        send
    });
    let mut body = receive;
    let mut got = Vec::new();
    while let Some(data) = soon(body.data()).await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        got.extend_from_slice(&data);
    }
    assert!(got == bytes);
    soon(sender).await.unwrap();
}

/// A raw client with one open stream per application.
async fn raw_client(realm: &Realm, server: &mut OurServer, settings: &[(u16, u32)], streams: u32) -> (RawClient, Vec<Application>) {
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, settings).await;
    let mut applications = Vec::new();
    for number in 0..streams {
        let stream = number * 2 + 1;
        peer.send(&Frame::connect(stream, "10.0.0.2:80")).await;
        applications.push(server.accept_one().await);
        assert_eq!(soon(peer.expect_status(stream)).await.0, "200");
    }
    (peer, applications)
}

type RawClient = RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

#[tokio::test]
async fn no_data_frame_is_empty_unless_it_ends_the_stream() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    // Small windows: many partial sends.
    let (mut peer, mut applications) = raw_client(&realm, &mut server, &[(INITIAL_WINDOW_SIZE, 100)], 1).await;
    let bytes = pattern(5_000);
    let application = applications.remove(0);
    let (mut read, mut write) = application.socket.into_split();
    let sent = bytes.clone();
    let sender = tokio::spawn(async move {
        let mut rest = &sent[..];
        let mut size = 1;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(size.min(rest.len()));
            write.write_all(part).await.unwrap();
            rest = after;
            size = size * 7 % 997 + 1;
            tokio::task::yield_now().await;
        }
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    loop {
        let frame = soon(peer.expect(DATA, 1)).await;
        got.extend_from_slice(&frame.payload);
        if frame.end_stream() {
            break;
        }
        assert!(!frame.payload.is_empty(), "after {} bytes", got.len());
        let credit = u32::try_from(frame.payload.len()).unwrap();
        // In odd pieces, some of them larger than what was used.
        peer.send_all(&[Frame::window_update(0, credit), Frame::window_update(1, credit / 2 + 1)]).await;
    }
    assert!(got == bytes);
    sender.await.unwrap();
    peer.send(&Frame::data(1, []).ends()).await;
    assert_eq!(soon(read.read_to_end(&mut Vec::new())).await.unwrap(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// A8: whatever the application writes and whatever credit the peer gives.
    #[test]
    fn our_sender_never_emits_an_empty_frame(writes in proptest::collection::vec(1..5000_usize, 1..30), credits in proptest::collection::vec(1..4000_u32, 1..30), first in 0..300_u32) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let realm = Realm::new();
            let mut server = OurServer::with(&realm, Config::default()).await;
            let (mut peer, mut applications) = raw_client(&realm, &mut server, &[(INITIAL_WINDOW_SIZE, first)], 1).await;
            let (mut read, mut write) = applications.remove(0).socket.into_split();
            let total: usize = writes.iter().sum();
            let sender = tokio::spawn(async move {
                for length in writes {
                    write.write_all(&pattern(length)).await.unwrap();
                    tokio::task::yield_now().await;
                }
                write.shutdown().await.unwrap();
            });
            let (mut got, mut credits) = (0, credits.into_iter().cycle());
            peer.send_all(&[Frame::window_update(0, 1 << 20), Frame::window_update(1, 1)]).await;
            loop {
                let frame = soon(async {
                    tokio::select! {
                        frame = peer.next() => frame,
                        () = tokio::time::sleep(Duration::from_millis(2)) => None,
                    }
                }).await;
                let Some(frame) = frame else {
                    peer.send(&Frame::window_update(1, credits.next().unwrap())).await;
                    continue;
                };
                assert_eq!((frame.kind, frame.stream), (DATA, 1));
                got += frame.payload.len();
                if frame.end_stream() {
                    break;
                }
                assert!(!frame.payload.is_empty());
            }
            assert_eq!(got, total);
            sender.await.unwrap();
            peer.send(&Frame::data(1, []).ends()).await;
            soon(read.read_to_end(&mut Vec::new())).await.unwrap();
        });
    }
}

#[tokio::test]
async fn nothing_is_sent_into_a_window_of_zero_and_everything_after_it_opens() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let (mut peer, mut applications) = raw_client(&realm, &mut server, &[(INITIAL_WINDOW_SIZE, 0)], 1).await;
    let application = &mut applications[0];
    application.send(b"0123456789").await;
    assert!(tokio::time::timeout(Duration::from_millis(50), peer.next()).await.is_err());
    peer.send(&Frame::window_update(1, 1)).await;
    assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b"0");
    peer.send(&Frame::settings(&[(INITIAL_WINDOW_SIZE, 4)])).await;
    assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b"1234");
    // H10: shrunk below zero in mid-stream; credit must first make up for it.
    peer.send(&Frame::settings(&[(INITIAL_WINDOW_SIZE, 0)])).await;
    peer.send(&Frame::window_update(1, 4)).await;
    assert!(tokio::time::timeout(Duration::from_millis(50), peer.next()).await.is_err());
    peer.send(&Frame::settings(&[(INITIAL_WINDOW_SIZE, 2)])).await;
    assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b"56");
    // An end needs no credit, but comes after the bytes.
    application.finish().await;
    assert!(tokio::time::timeout(Duration::from_millis(50), peer.next()).await.is_err());
    peer.send(&Frame::window_update(1, 100)).await;
    assert_eq!(soon(peer.read_to_end(1)).await, b"789");
}

#[tokio::test]
async fn a_window_of_the_whole_connection_of_zero_stops_and_resumes() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let (mut peer, mut applications) = raw_client(&realm, &mut server, &[(INITIAL_WINDOW_SIZE, 1 << 20)], 1).await;
    let (mut read, mut write) = applications.remove(0).socket.into_split();
    let bytes = pattern(300_000);
    let sent = bytes.clone();
    let sender = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    // A sixteenth is kept for streams that send less.
    while got.len() < 65_535 - 65_535 / 16 {
        got.extend_from_slice(&soon(peer.expect(DATA, 1)).await.payload);
    }
    assert!(tokio::time::timeout(Duration::from_millis(50), peer.next()).await.is_err());
    peer.send(&Frame::window_update(0, 300_000)).await;
    got.extend(soon(peer.read_to_end(1)).await);
    assert!(got == bytes);
    sender.await.unwrap();
    peer.send(&Frame::data(1, []).ends()).await;
    soon(read.read_to_end(&mut Vec::new())).await.unwrap();
}

/// The tunnel writes two slabs, 16 full slots each, before its other direction gets a turn. Here all data fits exactly into these two, and in the
/// turn after it there is nothing but ends.
#[tokio::test]
async fn ends_that_are_found_in_a_turn_without_data_are_passed_on_at_once() {
    const STREAMS: u32 = 32;
    const SLOT: usize = 16_384 - 9;
    const LEFT: u32 = 40_000;
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    let (mut next, mut window) = (1, 65_535);
    // The first rounds make the kernel's buffers grow until they take two slabs.
    for _ in 0..12 {
        let ids: Vec<u32> = (0..STREAMS).map(|number| next + 2 * number).collect();
        next += 2 * STREAMS;
        let mut applications = Vec::new();
        for stream in &ids {
            peer.send(&Frame::connect(*stream, "10.0.0.2:80")).await;
            applications.push(server.accept_one().await);
            assert_eq!(soon(peer.expect_status(*stream)).await.0, "200");
        }
        for application in &mut applications {
            application.send(&pattern(SLOT)).await;
            application.finish().await;
        }
        // More than the reserve remains: it is not what anybody waits for.
        let needed = STREAMS * u32::try_from(SLOT).unwrap() + LEFT;
        peer.send(&Frame::window_update(0, needed - window)).await;
        window = LEFT;
        let mut ended = 0;
        while ended < STREAMS {
            let frame = soon(peer.next()).await.expect("the tunnel ended");
            ended += u32::from(frame.end_stream());
        }
        peer.send_all(&ids.iter().map(|stream| Frame::data(*stream, []).ends()).collect::<Vec<_>>()).await;
        for mut application in applications {
            assert!(soon(application.read_to_end()).await.unwrap().is_empty());
        }
    }
}

#[tokio::test]
async fn padding_counts_for_the_window_and_comes_back() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let (mut peer, mut applications) = raw_client(&realm, &mut server, &[], 1).await;
    // Four times the window of the tunnel, nearly all of it padding.
    let frame = Frame::padded_data(1, b"x", 255);
    let (mut window, mut sent) = (256_i64 << 10, 0);
    let early = peer.passed_over.iter().filter(|frame| frame.kind == raw_h2::WINDOW_UPDATE && frame.stream == 0);
    let mut tunnel = 65_535 + early.map(|frame| i64::from(frame.number())).sum::<i64>();
    while sent < 16_000 {
        while window >= 257 && tunnel >= 257 && sent < 16_000 {
            let batch = (window.min(tunnel) / 257).min(200).min(16_000 - sent);
            peer.send_all(&vec![frame.clone(); usize::try_from(batch).unwrap()]).await;
            (window, tunnel, sent) = (window - batch * 257, tunnel - batch * 257, sent + batch);
        }
        if sent < 16_000 {
            let update = soon(peer.receive()).await.expect("the tunnel ended");
            match (update.kind, update.stream) {
                (raw_h2::WINDOW_UPDATE, 0) => tunnel += i64::from(update.number()),
                (raw_h2::WINDOW_UPDATE, 1) => window += i64::from(update.number()),
                (raw_h2::SETTINGS, _) => {}
                other => panic!("{other:?}"),
            }
        }
        // The application takes what is there, so that only padding could get lost.
        let mut buffer = [0; 64 << 10];
        let _ = tokio::time::timeout(Duration::from_millis(1), applications[0].socket.read(&mut buffer)).await;
    }
}

#[tokio::test]
async fn a_window_full_of_one_byte_frames_waits_for_its_reader_and_harms_nobody() {
    // A9 and A10 in small: the reader of one stream is stalled, its sender goes on with frames of one byte up to its window. Left in h2, these
    // would be six times what ends a tunnel.
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let stream = server.request().await.accept(&ConnectResponse::default()).unwrap();
    let mut stalled = Application::with_small_buffers(stream, Role::Server).await;
    peer.send(&Frame::connect(3, "10.0.0.2:80")).await;
    let mut neighbour = server.accept_one().await;
    for stream in [1, 3] {
        assert_eq!(soon(peer.expect_status(stream)).await.0, "200");
    }
    let bytes = pattern(200 << 10);
    for chunk in bytes.chunks(4000) {
        let frames: Vec<u8> = chunk.iter().flat_map(|byte| Frame::data(1, [*byte]).encode()).collect();
        soon(peer.send_bytes(&frames)).await.unwrap();
        peer.send(&Frame::data(3, *b"x")).await;
        neighbour.expect(b"x").await;
        neighbour.send(b"y").await;
        let frame = soon(peer.next()).await.expect("the tunnel ended");
        assert_eq!((frame.kind, frame.stream), (DATA, 3));
    }
    peer.send(&Frame::data(1, []).ends()).await;
    // Now it reads, without the kernel's patience for tiny windows.
    socket2::SockRef::from(&stalled.socket).set_recv_buffer_size(1 << 20).unwrap();
    assert!(stalled.read_to_end().await.unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_stream_does_not_stop_its_neighbours() {
    let realm = Realm::new();
    for stalled_side in ["client", "server"] {
        let mut server = OurServer::with(&realm, Config::default()).await;
        let client = OurClient::to(server.address, &realm, Config::default()).await;
        let (near, far) = tokio::join!(client.open(), server.accept_one());
        // One writes for ever, the other never reads.
        let (mut writer, _stalled) = if stalled_side == "server" { (near.unwrap(), far) } else { (far, near.unwrap()) };
        let flood = tokio::spawn(async move { while writer.socket.write_all(&[7; 64 << 10]).await.is_ok() {} });
        for _ in 0..3 {
            let (near, mut far) = tokio::join!(client.open(), server.accept_one());
            let mut near = near.unwrap();
            for _ in 0..50 {
                near.send(b"there").await;
                far.expect(b"there").await;
                far.send(b"back").await;
                near.expect(b"back").await;
            }
        }
        flood.abort();
        assert_eq!(client.dials(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_streams_at_once_each_have_their_own_bytes() {
    let realm = Realm::new();
    let server = OurServer::with(&realm, Config::default()).await.echo();
    let client = Arc::new(OurClient::to(server.address, &realm, Config { pool_max_streams: 200, ..Config::default() }).await);
    let tasks = (0..200).map(|number: usize| {
        let client = client.clone();
        tokio::spawn(async move {
            let mut application = client.open().await.unwrap();
            through_echo(&mut application, &pattern(50_000 + number)[number..]).await;
        })
    });
    for task in futures_util::future::join_all(tasks).await {
        task.unwrap();
    }
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn a_transfer_survives_goaway_in_the_middle() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let credential = realm.credential("server").await;
    let serve = async {
        let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
        peer.expect_headers(1).await;
        peer.send(&Frame::status(1, "200")).await;
        peer
    };
    let (application, mut peer) = tokio::join!(client.open(), soon(serve));
    let (mut read, mut write) = application.unwrap().socket.into_split();
    let bytes = pattern(1 << 20);
    let sent = bytes.clone();
    let sender = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let first = soon(peer.expect(DATA, 1)).await;
    // Two-step goodbye: first "no more", then where it stands.
    peer.send(&Frame::goaway(0x7fff_ffff, raw_h2::NO_ERROR)).await;
    peer.send(&Frame::goaway(1, raw_h2::NO_ERROR)).await;
    let credit = u32::try_from(first.payload.len()).unwrap();
    peer.send_all(&[Frame::window_update(0, credit), Frame::window_update(1, credit), Frame::data(1, *b"me too")]).await;
    let mut got = first.payload;
    got.extend(soon(peer.read_to_end(1)).await);
    assert!(got == bytes);
    peer.send(&Frame::data(1, []).ends()).await;
    let mut back = Vec::new();
    soon(read.read_to_end(&mut back)).await.unwrap();
    assert_eq!(back, b"me too");
    sender.await.unwrap();
    // Then the tunnel closes by itself.
    assert_eq!(soon(peer.goaway_code()).await, Some(raw_h2::NO_ERROR));
    assert!(soon(peer.next()).await.is_none());
}

#[tokio::test]
async fn late_data_of_streams_that_we_reset_does_not_end_the_tunnel() {
    // An application that dies with 200 uploads under way; what is in flight arrives after our resets.
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let (mut peer, mut applications) = raw_client(&realm, &mut server, &[], 201).await;
    let survivor = applications.remove(0);
    for application in applications {
        application.relay.abort();
    }
    let mut resets = 0;
    while resets < 200 {
        resets += usize::from(soon(peer.next()).await.expect("the tunnel ended").kind == raw_h2::RST_STREAM);
    }
    for round in 0..20 {
        let late: Vec<Frame> = (1..201).map(|number| Frame::data(number * 2 + 1, [round; 16])).collect();
        peer.send_all(&late).await;
    }
    peer.send(&Frame::data(1, *b"alive")).await;
    let mut survivor = survivor;
    survivor.expect(b"alive").await;
    assert!(peer.passed_over.iter().all(|frame| frame.kind != HEADERS));
}
