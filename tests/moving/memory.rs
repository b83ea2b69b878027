//! What TLS and HTTP/2 remember is the same after a move.

use std::time::Duration;

use culvert::hbone::{Config, ConnectResponse, Refusal};
use culvert::lifecycle::drain::DrainMode;
use tokio::io::AsyncWriteExt;

use crate::ends::{Client, Server};
use crate::raw_h2::{self, ACK, DATA, END_HEADERS, Frame, GOAWAY, HEADERS, PING, RST_STREAM, RawPeer, WINDOW_UPDATE, hpack};
use crate::tunnel_peers::{Realm, connect, connected, listen, soon, tls_accept, tls_connect, tls_to};

type Peer = RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

/// A raw client and our serving end.
async fn pair(settings: &[(u16, u32)]) -> (Realm, Server, Peer) {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let credential = realm.credential("client").await;
    let (address, settings) = (server.address, settings.to_vec());
    let peer = tokio::spawn(async move { RawPeer::client(tls_to(address, &credential).await, &settings).await });
    server.accept().await;
    let peer = soon(peer).await.unwrap();
    (realm, server, peer)
}

#[tokio::test]
async fn the_peers_dynamic_table_moves() {
    let (_realm, mut server, mut peer) = pair(&[]).await;
    let first = [
        hpack::literal(":method", b"CONNECT"),
        hpack::literal_into_table(":authority", b"10.0.0.2:80"),
        hpack::literal_into_table("x-forwarded-network", b"blue"),
        hpack::literal_into_table("x-other", b"evicts nothing"),
    ]
    .concat();
    peer.send(&Frame::new(HEADERS, END_HEADERS, 1, first)).await;
    let _far = server.accept_stream().await;
    server.move_it().await;
    // Newest first: 62 is x-other, 63 the network, 64 the authority.
    let later = [hpack::literal(":method", b"CONNECT"), hpack::indexed(64), hpack::indexed(63), hpack::literal_into_table("y", b"z")].concat();
    peer.send(&Frame::new(HEADERS, END_HEADERS, 3, later)).await;
    let incoming = server.request().await;
    let request = incoming.request().unwrap();
    assert_eq!((request.authority.to_string().as_str(), request.forwarded_network.as_deref()), ("10.0.0.2:80", Some("blue")));
    incoming.refuse(Refusal::Denied);
    server.move_it().await;
    let third = [hpack::literal(":method", b"CONNECT"), hpack::indexed(65), hpack::indexed(64)].concat();
    peer.send(&Frame::new(HEADERS, END_HEADERS, 5, third)).await;
    assert_eq!(server.request().await.request().unwrap().forwarded_network.as_deref(), Some("blue"));
    // A table that was made smaller stays so: the entry that no longer fits is gone, and asking for it ends the connection.
    let smaller = [hpack::table_size(0), hpack::block(&[(":method", "CONNECT"), (":authority", "10.0.0.2:80")])].concat();
    peer.send(&Frame::new(HEADERS, END_HEADERS, 7, smaller)).await;
    server.request().await.refuse(Refusal::Denied);
    server.move_it().await;
    let gone = [hpack::literal(":method", b"CONNECT"), hpack::literal_into_table("a", b"b"), hpack::indexed(62)].concat();
    peer.send(&Frame::new(HEADERS, END_HEADERS, 9, gone)).await;
    assert_eq!(soon(peer.goaway_code()).await, Some(raw_h2::COMPRESSION_ERROR));
}

#[tokio::test]
async fn a_header_block_and_a_frame_that_have_come_in_part_move() {
    let (_realm, mut server, mut peer) = pair(&[]).await;
    let block = hpack::block(&[(":method", "CONNECT"), (":authority", "10.0.0.2:80"), ("x-forwarded-network", "green")]);
    let whole = Frame::new(HEADERS, END_HEADERS, 1, block.clone()).encode();
    // The frame is cut in its head and in its payload, the block between two frames.
    for cut in [3, 9, 20, whole.len() - 1] {
        let id = u32::try_from(2 * cut + 1).unwrap();
        let whole = Frame::new(HEADERS, END_HEADERS, id, block.clone()).encode();
        move_between(&mut server, &mut peer, &whole[..cut], &whole[cut..]).await;
        server.request().await.refuse(Refusal::Denied);
        assert_eq!(soon(peer.expect_status(id)).await.0, "401");
        soon(peer.expect(RST_STREAM, id)).await;
    }
    let first = Frame::new(HEADERS, 0, 201, &block[..10]).encode();
    let second = Frame::new(raw_h2::CONTINUATION, END_HEADERS, 201, &block[10..]).encode();
    move_between(&mut server, &mut peer, &first, &second).await;
    assert_eq!(server.request().await.request().unwrap().forwarded_network.as_deref(), Some("green"));
}

#[tokio::test]
async fn a_data_frame_that_has_come_in_part_moves() {
    let (_realm, mut server, mut peer) = pair(&[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut far = server.accept_stream().await;
    soon(peer.expect_status(1)).await;
    let plain = Frame::data(1, *b"hello world").encode();
    let padded = Frame::padded_data(1, b"hello world", 5).encode();
    // Behind the head, the padding's length, a part of the payload, the payload, and a part of the padding.
    for (whole, cut) in [(&plain, 9), (&plain, 12), (&padded, 9), (&padded, 10), (&padded, 15), (&padded, 21), (&padded, 24)] {
        move_between(&mut server, &mut peer, &whole[..cut], &whole[cut..]).await;
        far.expect(b"hello world").await;
        // The padding has arrived too.
        peer.send(&Frame::new(PING, 0, 0, *b"anything")).await;
        while soon(peer.receive()).await.unwrap().kind != PING {}
    }
}

/// Sends the first part, moves the tunnel when it has arrived there, and sends the second part.
async fn move_between(server: &mut Server, peer: &mut Peer, first: &[u8], second: &[u8]) {
    let before = server.move_it().await;
    peer.send_bytes(first).await.unwrap();
    // What arrived makes the state longer, and only that.
    soon(async {
        while server.move_it().await <= before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    peer.send_bytes(second).await.unwrap();
}

#[tokio::test]
async fn a_record_may_be_cut_anywhere() {
    let (_realm, mut server, mut peer) = held_pair().await;
    let HeldPeer { hold, peer } = &mut peer;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    hold.pass_all().await;
    let mut far = server.accept_stream().await;
    soon(peer.expect_status(1)).await;
    // It has acknowledged our SETTINGS.
    hold.pass_all().await;
    // 5 header, 9 frame head, 11 payload, 17 type and tag.
    for cut in 1..42 {
        let before = server.move_it().await;
        peer.send(&Frame::data(1, *b"hello world")).await;
        hold.pass(cut).await;
        let mut grown = 0;
        soon(async {
            while grown < cut {
                grown = server.move_it().await - before;
                // The task gets time to read.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        assert_eq!(grown, cut, "the state holds what there is of the record");
        hold.pass_all().await;
        far.expect(b"hello world").await;
    }
}

/// A raw client whose bytes are held back until the test lets them pass.
struct HeldPeer {
    hold: Hold,
    peer: RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>,
}

struct Hold {
    from: tokio::net::tcp::OwnedReadHalf,
    to: tokio::net::tcp::OwnedWriteHalf,
}

impl Hold {
    async fn pass(&mut self, count: usize) {
        let mut bytes = vec![0; count];
        soon(tokio::io::AsyncReadExt::read_exact(&mut self.from, &mut bytes)).await.unwrap();
        self.to.write_all(&bytes).await.unwrap();
    }

    /// All that the peer has sent by now.
    async fn pass_all(&mut self) {
        soon(self.from.readable()).await.unwrap();
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = self.from.try_read(&mut bytes) {
            self.to.write_all(&bytes[..count]).await.unwrap();
        }
    }
}

async fn held_pair() -> (Realm, Server, HeldPeer) {
    let realm = Realm::new();
    let mut server = Server::new(&realm, Config::default()).await;
    let credential = realm.credential("client").await;
    let (near, middle) = connected().await;
    let far = connect(server.address).await;
    let ((mut near_from, mut near_to), (mut far_from, mut far_to)) = (middle.into_split(), far.into_split());
    tokio::spawn(async move { tokio::io::copy(&mut far_from, &mut near_to).await });
    let shake = tokio::spawn(async move { RawPeer::client(tls_connect(near, &credential).await, &[]).await });
    let forward = async {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = tokio::io::AsyncReadExt::read(&mut near_from, &mut bytes).await.unwrap();
            far_to.write_all(&bytes[..count]).await.unwrap();
        }
    };
    let peer = tokio::select! {
        () = forward => unreachable!(),
        peer = async { server.accept().await; shake.await.unwrap() } => peer,
    };
    (realm, server, HeldPeer { hold: Hold { from: near_from, to: far_to }, peer })
}

#[tokio::test]
async fn keys_are_updated_after_a_move_and_before_it() {
    let (_realm, mut server, mut peer) = pair(&[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut far = server.accept_stream().await;
    soon(peer.expect_status(1)).await;
    for _ in 0..3 {
        server.move_it().await;
        // Asks for ours too.
        peer.io.get_mut().1.refresh_traffic_keys().unwrap();
        peer.send(&Frame::data(1, *b"with new keys")).await;
        far.expect(b"with new keys").await;
        server.move_it().await;
        peer.send(&Frame::data(1, *b"and after a move")).await;
        far.expect(b"and after a move").await;
        far.send(b"back").await;
        assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b"back");
    }
}

#[tokio::test]
async fn a_drain_works_after_a_move_and_goes_on_over_one() {
    let (_realm, mut server, mut peer) = pair(&[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut far = server.accept_stream().await;
    soon(peer.expect_status(1)).await;
    server.move_it().await;
    let _drained = tokio::spawn(server.trigger.take().unwrap().start(DrainMode::Graceful, Duration::from_secs(60)));
    let mut frames = Vec::new();
    while frames.len() < 2 {
        let frame = soon(peer.receive()).await.unwrap();
        if matches!(frame.kind, GOAWAY | PING) {
            frames.push(frame);
        }
    }
    assert_eq!((frames[0].kind, frames[0].number()), (GOAWAY, 0x7fff_ffff));
    // Between the two steps of the goodbye.
    server.move_it().await;
    peer.send(&Frame::new(PING, ACK, 0, frames[1].payload.clone())).await;
    let last = soon(peer.expect(GOAWAY, 0)).await;
    assert_eq!((last.number(), last.code()), (1, raw_h2::NO_ERROR));
    server.move_it().await;
    // Behind the last word nothing is served, and the tunnel ends with its last stream.
    peer.send(&Frame::connect(3, "10.0.0.2:80")).await;
    peer.send(&Frame::data(1, *b"more")).await;
    far.expect(b"more").await;
    peer.send(&Frame::data(1, []).ends()).await;
    far.finish().await;
    assert!(soon(peer.expect(DATA, 1)).await.end_stream());
    soon(async { while peer.next().await.is_some() {} }).await;
    server.requests.try_recv().err().expect("no request behind the goodbye");
}

#[tokio::test]
async fn windows_of_both_directions_move() {
    // The stream's window is 5 octets, and no credit comes back.
    let (_realm, mut server, mut peer) = pair(&[(raw_h2::INITIAL_WINDOW_SIZE, 5)]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let mut far = server.accept_stream().await;
    soon(peer.expect_status(1)).await;
    far.send(b"hello world").await;
    assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b"hello");
    server.move_it().await;
    // Still nothing beyond the window: the PING's answer comes before any DATA.
    peer.send(&Frame::new(PING, 0, 0, *b"anything")).await;
    let next = loop {
        let frame = soon(peer.receive()).await.unwrap();
        if !matches!(frame.kind, WINDOW_UPDATE) {
            break frame;
        }
    };
    assert_eq!((next.kind, next.flags), (PING, ACK));
    peer.send(&Frame::window_update(1, 3)).await;
    assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b" wo");
    server.move_it().await;
    // A smaller initial window moves those that exist: 0 - 4 here. Eight more make four.
    peer.send(&Frame::settings(&[(raw_h2::INITIAL_WINDOW_SIZE, 1)])).await;
    peer.send(&Frame::window_update(1, 6)).await;
    assert_eq!(soon(peer.expect(DATA, 1)).await.payload, b"rl");
    // The other direction: beyond what was promised is an error, and not one octet sooner.
    let window = 256 << 10;
    let chunk = vec![7; 16 << 10];
    let mut stalled = Vec::new();
    peer.send(&Frame::connect(3, "10.0.0.2:80")).await;
    let incoming = server.request().await;
    for part in 0..window / chunk.len() {
        peer.send(&Frame::data(3, chunk.clone())).await;
        stalled.push(part);
    }
    let stream = incoming.accept(&ConnectResponse::default()).unwrap();
    let (mut reader, socket) = connected().await;
    let relay = tokio::spawn(async move { stream.relay(socket, culvert::hbone::Role::Server, &Default::default()).await });
    server.move_it().await;
    let mut got = vec![0; window];
    soon(tokio::io::AsyncReadExt::read_exact(&mut reader, &mut got)).await.unwrap();
    assert!(got.iter().all(|byte| *byte == 7));
    assert!(matches!(soon(relay).await.unwrap(), culvert::forward::Ended::Moved));
}

#[tokio::test]
async fn late_frames_of_a_stream_that_was_reset_before_the_move_are_no_error() {
    let (_realm, mut server, mut peer) = pair(&[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let far = server.accept_stream().await;
    soon(peer.expect_status(1)).await;
    socket2::SockRef::from(&far.socket).set_linger(Some(Duration::ZERO)).unwrap();
    drop(far.socket);
    soon(peer.expect(RST_STREAM, 1)).await;
    server.move_it().await;
    // As many would be too many errors.
    for _ in 0..1500 {
        peer.send(&Frame::data(1, *b"x")).await;
    }
    peer.send(&Frame::connect(3, "10.0.0.2:80")).await;
    server.request().await.refuse(Refusal::Denied);
    soon(peer.expect_status(3)).await;
}

#[tokio::test]
async fn allowances_that_were_used_up_before_a_move_are_not_given_back_by_it() {
    let (_realm, mut server, mut peer) = pair(&[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let _far = server.accept_stream().await;
    soon(peer.expect_status(1)).await;
    // 100 empty frames are allowed; time gives none of them back.
    for _ in 0..70 {
        peer.send(&Frame::data(1, [])).await;
    }
    peer.send(&Frame::new(PING, 0, 0, *b"anything")).await;
    while soon(peer.receive()).await.unwrap().kind != PING {}
    server.move_it().await;
    for _ in 0..70 {
        let _ = peer.try_send_all(&[Frame::data(1, [])]).await;
    }
    assert_eq!(soon(peer.goaway_code()).await, Some(raw_h2::ENHANCE_YOUR_CALM));
}

#[tokio::test]
async fn our_stream_ids_go_on_where_they_were() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let credential = realm.credential("server").await;
    let mut client = Client::to(address, &realm, Config::default()).await;
    let peer = async {
        let (socket, _) = listener.accept().await.unwrap();
        let mut peer = RawPeer::server(tls_accept(socket, &credential).await, &[]).await;
        peer.expect_headers(1).await;
        peer.send(&Frame::new(HEADERS, END_HEADERS, 1, hpack::literal_into_table(":status", b"200"))).await;
        peer
    };
    let (_near, mut peer) = tokio::join!(client.open(), peer);
    client.move_it().await;
    let answer = async {
        peer.expect_headers(3).await;
        peer.send(&Frame::new(HEADERS, END_HEADERS, 3, hpack::indexed(62))).await;
    };
    tokio::join!(client.open(), soon(answer)).0.finish().await;
}
