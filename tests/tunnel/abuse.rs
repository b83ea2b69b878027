//! Peers that mean harm: A3–A8 of the list of attacks, scaled down. In each case a neighbour on another tunnel goes on undisturbed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use culvert::hbone::{Config, Endpoint, Error};
use tokio::io::AsyncWriteExt;

use crate::raw_h2::{self, CANCEL, COMPRESSION_ERROR, CONTINUATION, ENHANCE_YOUR_CALM, Frame, HEADERS, PING, PRIORITY, RawPeer, SETTINGS, hpack};
use crate::tunnel_peers::{Application, OurClient, OurServer, Realm, eventually, listen, soon, tls_accept, tls_to};

type RawClient = RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

/// A server of ours, an attacker, and a neighbour that must notice nothing.
struct Scene {
    _realm: Realm,
    server: OurServer,
    attacker: RawClient,
    _client: OurClient,
    near: Application,
    far: Application,
}

impl Scene {
    async fn new() -> Self {
        let realm = Realm::new();
        let mut server = OurServer::with(&realm, Config::default()).await;
        let client = OurClient::to(server.address, &realm, Config::default()).await;
        let (near, far) = tokio::join!(client.open(), server.accept_one());
        let attacker = RawPeer::client(tls_to(server.address, &*realm.credential("attacker").await).await, &[]).await;
        // What comes together with the first SETTINGS fails the handshake instead.
        eventually("the attacker has a tunnel", || server.tunnels.load(Ordering::SeqCst) == 2).await;
        Self { _realm: realm, server, attacker, _client: client, near: near.unwrap(), far }
    }

    /// The attacker's tunnel has ended because of what it did, and it was told why, unless it does not listen.
    async fn over(&mut self, code: Option<u32>, guard: &str) {
        let end = self.server.tunnel_end().await;
        assert!(matches!(end, Err(Error::Flood(name)) if name.contains(guard)), "{end:?} and not {guard}");
        if code.is_some() {
            assert_eq!(soon(self.attacker.goaway_code()).await, code);
        }
        self.neighbour().await;
    }

    async fn neighbour(&mut self) {
        self.near.send(b"ping").await;
        self.far.expect(b"ping").await;
        self.far.send(b"pong").await;
        self.near.expect(b"pong").await;
    }

    /// Sends until the tunnel no longer takes anything; returns how many rounds it took, at most `limit`.
    async fn until_closed(&mut self, limit: usize, mut round: impl FnMut(u32) -> Vec<Frame>) -> usize {
        for number in 0..limit {
            let frames = round(u32::try_from(number).unwrap());
            let sent = tokio::time::timeout(Duration::from_secs(2), self.attacker.try_send_all(&frames)).await;
            if !matches!(sent, Ok(Ok(()))) {
                return number;
            }
        }
        limit
    }
}

#[tokio::test]
async fn a_rapid_reset_ends_within_five_hundred_requests() {
    for batch in [1_u32, 100] {
        let mut scene = Scene::new().await;
        // What the proxy does: a task per request that notices when it is abandoned.
        let (_, empty) = tokio::sync::mpsc::unbounded_channel();
        let mut requests = std::mem::replace(&mut scene.server.requests, empty);
        let seen = tokio::spawn(async move {
            let mut seen = 0;
            while let Some(mut incoming) = requests.recv().await {
                seen += 1;
                tokio::spawn(async move { incoming.abandoned().await });
            }
            seen
        });
        scene
            .until_closed(20_000, |number| {
                let pairs = (0..batch).map(|index| (number * batch + index) * 2 + 1);
                pairs.flat_map(|stream| [Frame::connect(stream, "10.0.0.2:80"), Frame::reset(stream, CANCEL)]).collect()
            })
            .await;
        scene.over(None, "taken back").await;
        drop(scene);
        let seen = soon(seen).await.unwrap();
        assert!(seen <= 500, "{seen} requests in batches of {batch}");
    }
}

#[tokio::test]
async fn requests_taken_back_that_nobody_looks_at_are_bounded() {
    // Our tasks are slow: they notice nothing.
    let mut scene = Scene::new().await;
    let mut unanswered = Vec::new();
    loop {
        let stream = u32::try_from(unanswered.len()).unwrap() * 2 + 1;
        let _ = scene.attacker.try_send_all(&[Frame::connect(stream, "10.0.0.2:80")]).await;
        tokio::select! {
            incoming = scene.server.requests.recv() => unanswered.push(incoming.unwrap()),
            end = scene.server.ended.recv() => {
                assert!(matches!(end, Some(Err(Error::Flood(guard))) if guard.contains("taken back")));
                break;
            }
        }
        let _ = scene.attacker.try_send_all(&[Frame::reset(stream, CANCEL)]).await;
        assert!(unanswered.len() <= 256 + 200 + 1);
    }
    assert!(unanswered.len() >= 200);
    scene.neighbour().await;
}

#[tokio::test]
async fn requests_taken_back_one_by_one_after_they_were_accepted_are_counted_too() {
    // Slower than a flood, so that h2 never has two to accept.
    let mut scene = Scene::new().await;
    let (mut taken_back, begin) = (0, Instant::now());
    loop {
        let stream = taken_back * 2 + 1;
        let sent = scene.attacker.try_send_all(&[Frame::connect(stream, "10.0.0.2:80")]).await;
        let incoming = tokio::select! {
            incoming = scene.server.requests.recv() => incoming,
            end = scene.server.ended.recv() => {
                assert!(matches!(end, Some(Err(Error::Flood(guard))) if guard.contains("taken back")));
                break;
            }
        };
        let (Ok(()), Some(mut incoming)) = (sent, incoming) else { continue };
        let _ = scene.attacker.try_send_all(&[Frame::reset(stream, CANCEL)]).await;
        soon(incoming.abandoned()).await;
        taken_back += 1;
        assert!(taken_back <= 210 + u32::try_from(begin.elapsed().as_millis() / 20).unwrap(), "{taken_back}");
    }
    assert!(taken_back >= 200, "{taken_back}");
    assert_eq!(soon(scene.attacker.goaway_code()).await, Some(ENHANCE_YOUR_CALM));
    scene.neighbour().await;
}

#[tokio::test]
async fn clients_that_give_up_now_and_then_are_no_attack() {
    let mut scene = Scene::new().await;
    for number in 0..150 {
        let stream = number * 2 + 1;
        scene.attacker.send(&Frame::connect(stream, "10.0.0.2:80")).await;
        let mut incoming = scene.server.request().await;
        scene.attacker.send(&Frame::reset(stream, CANCEL)).await;
        soon(incoming.abandoned()).await;
    }
    scene.attacker.send(&Frame::connect(1001, "10.0.0.2:80")).await;
    scene.server.request().await;
    scene.neighbour().await;
}

#[tokio::test]
async fn resets_that_the_peer_makes_us_send_are_counted() {
    // A4a: frames on streams that are closed, each an error of its own.
    let mut scene = Scene::new().await;
    scene.attacker.send(&Frame::connect(4001, "10.0.0.2:80")).await;
    scene.server.request().await;
    scene.until_closed(3000, |number| vec![Frame::data(number % 2000 * 2 + 1, *b"x")]).await;
    scene.over(Some(ENHANCE_YOUR_CALM), "refused or reset").await;
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_too_many_of_them_end_the_tunnel() {
    let mut scene = Scene::new().await;
    scene.attacker.send(&Frame::settings_ack()).await;
    for number in 0..256 {
        scene.attacker.send(&Frame::connect(number * 2 + 1, "10.0.0.2:80")).await;
    }
    let mut held = Vec::new();
    for _ in 0..256 {
        held.push(scene.server.request().await);
    }
    scene.attacker.send(&Frame::connect(601, "10.0.0.2:80")).await;
    assert_eq!(soon(scene.attacker.expect(raw_h2::RST_STREAM, 601)).await.code(), raw_h2::REFUSED_STREAM);
    scene.until_closed(3000, |number| vec![Frame::connect(603 + number * 2, "10.0.0.2:80")]).await;
    scene.over(Some(ENHANCE_YOUR_CALM), "refused or reset").await;
}

#[tokio::test]
async fn a_burst_before_the_limit_is_known_is_served_up_to_four_times_the_limit() {
    let mut scene = Scene::new().await;
    let mut held = Vec::new();
    for number in 0..1024 {
        scene.attacker.send(&Frame::connect(number * 2 + 1, "10.0.0.2:80")).await;
        held.push(scene.server.request().await);
    }
    scene.attacker.send(&Frame::connect(2049, "10.0.0.2:80")).await;
    assert_eq!(soon(scene.attacker.expect(raw_h2::RST_STREAM, 2049)).await.code(), raw_h2::REFUSED_STREAM);
    // Whoever goes on not to say that it has heard it gets no more than the limit from here on.
    for (number, incoming) in (0..).zip(held.drain(..768)) {
        incoming.refuse(culvert::hbone::Refusal::Unavailable);
        assert_eq!(soon(scene.attacker.expect_status(number * 2 + 1)).await.0, "503");
        soon(scene.attacker.expect(raw_h2::RST_STREAM, number * 2 + 1)).await;
    }
    scene.attacker.send(&Frame::connect(2051, "10.0.0.2:80")).await;
    assert_eq!(soon(scene.attacker.expect(raw_h2::RST_STREAM, 2051)).await.code(), raw_h2::REFUSED_STREAM);
    held.pop().unwrap().refuse(culvert::hbone::Refusal::Unavailable);
    assert_eq!(soon(scene.attacker.expect_status(2047)).await.0, "503");
    soon(scene.attacker.expect(raw_h2::RST_STREAM, 2047)).await;
    scene.attacker.send(&Frame::connect(2053, "10.0.0.2:80")).await;
    scene.server.request().await;
}

#[tokio::test]
async fn a_peer_that_knows_the_limit_has_no_burst() {
    let mut scene = Scene::new().await;
    let mut held = Vec::new();
    for number in 0..300 {
        scene.attacker.send(&Frame::connect(number * 2 + 1, "10.0.0.2:80")).await;
        held.push(scene.server.request().await);
    }
    scene.attacker.send(&Frame::settings_ack()).await;
    scene.attacker.send(&Frame::connect(601, "10.0.0.2:80")).await;
    assert_eq!(soon(scene.attacker.expect(raw_h2::RST_STREAM, 601)).await.code(), raw_h2::REFUSED_STREAM);
}

#[tokio::test]
async fn continuation_without_end_is_cut_after_five() {
    let mut scene = Scene::new().await;
    let first = Frame::new(HEADERS, 0, 1, hpack::block(&[(":method", "CONNECT")]));
    scene.attacker.send(&first).await;
    for _ in 0..6 {
        let _ = scene.attacker.try_send_all(&[Frame::new(CONTINUATION, 0, 1, hpack::literal("a", b"b"))]).await;
    }
    scene.over(Some(ENHANCE_YOUR_CALM), "header list").await;
    assert!(scene.server.requests.try_recv().is_err());
}

#[tokio::test]
async fn a_header_block_of_megabytes_is_cut_before_it_is_buffered() {
    for continued in [false, true] {
        let mut scene = Scene::new().await;
        // A string that says it is six megabytes long: nothing can be decoded before all of it is there.
        let mut block = [vec![0], hpack::string(b"x"), hpack::integer(0, 7, 6 << 20)].concat();
        block.resize(if continued { 32 << 10 } else { 1 << 20 }, b'x');
        scene.attacker.send_bytes(&Frame::new(HEADERS, 0, 1, block).encode()[..30_000]).await.unwrap();
        if continued {
            let mut rest = vec![b'x'; (32 << 10) + 9 - 30_000];
            rest.extend(Frame::new(CONTINUATION, 0, 1, vec![b'x'; 30 << 10]).encode());
            rest.extend(Frame::new(CONTINUATION, 0, 1, vec![b'x'; 30 << 10]).encode());
            scene.attacker.send_bytes(&rest).await.unwrap();
        }
        scene.over(Some(ENHANCE_YOUR_CALM), "header list").await;
    }
}

#[tokio::test]
async fn an_hpack_bomb_ends_the_tunnel() {
    // A6: one field of 4 KiB (less what the table charges) put into the table and named a thousand times.
    let mut scene = Scene::new().await;
    let bomb = [
        hpack::block(&[(":method", "CONNECT"), (":authority", "10.0.0.2:80")]),
        hpack::literal_into_table("x", &[b'x'; 4000]),
        hpack::indexed(62).repeat(1000),
    ];
    scene.attacker.send(&Frame::headers(1, bomb.concat())).await;
    scene.over(Some(ENHANCE_YOUR_CALM), "header list").await;
    // Two thousand tiny fields, two thousand cookies.
    for field in [hpack::literal("a", b""), hpack::literal("cookie", b"a=b"), hpack::literal("host", b"x")] {
        let mut scene = Scene::new().await;
        scene.attacker.send(&Frame::headers(1, [hpack::block(&[(":method", "CONNECT"), (":authority", "x:1")]), field.repeat(2000)].concat())).await;
        scene.over(Some(ENHANCE_YOUR_CALM), "header list").await;
    }
}

#[tokio::test]
async fn hpack_that_is_no_hpack_ends_the_tunnel() {
    let wrong: [(&str, Vec<u8>); 7] = [
        ("index 0", hpack::indexed(0)),
        ("index beyond the table", hpack::indexed(62)),
        ("integer that overflows", vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        ("table larger than agreed", hpack::table_size(4097)),
        ("string longer than the block", vec![0x00, 0x05, b'a']),
        ("Huffman code of EOS", vec![0x00, 0x84, 0xff, 0xff, 0xff, 0xff, 0x01, b'x']),
        ("change of the table's size at the end", [hpack::block(&[(":method", "CONNECT")]), hpack::table_size(0)].concat()),
    ];
    for (what, block) in wrong {
        let mut scene = Scene::new().await;
        scene.attacker.send(&Frame::headers(1, block)).await;
        let code = soon(scene.attacker.goaway_code()).await;
        assert!(matches!(code, Some(COMPRESSION_ERROR | raw_h2::PROTOCOL_ERROR)), "{what}: {code:?}");
        scene.neighbour().await;
    }
}

#[tokio::test]
async fn a_table_that_changes_its_size_all_the_time_is_only_a_request() {
    let mut scene = Scene::new().await;
    let block = [hpack::table_size(0), hpack::table_size(4096), hpack::block(&[(":method", "CONNECT"), (":authority", "10.0.0.2:80")])].concat();
    for number in 0..200 {
        scene.attacker.send(&Frame::headers(number * 2 + 1, block.clone())).await;
        assert!(scene.server.request().await.request().is_ok());
    }
}

#[tokio::test]
async fn floods_of_control_frames_end_the_tunnel() {
    let floods: [(&str, Frame); 13] = [
        ("PING", Frame::ping([1; 8])),
        ("SETTINGS", Frame::settings(&[(raw_h2::INITIAL_WINDOW_SIZE, 1000)])),
        ("empty SETTINGS", Frame::settings(&[])),
        ("PRIORITY", Frame::new(PRIORITY, 0, 1, [0, 0, 0, 0, 1])),
        ("unknown", Frame::new(0x42, 0, 0, vec![0; 100])),
        ("acknowledged SETTINGS", Frame::settings_ack()),
        ("PINGs that nobody sent", Frame::new(PING, raw_h2::ACK, 0, [1; 8])),
        ("GOAWAY", Frame::goaway(0, raw_h2::NO_ERROR)),
        ("credit by the octet", Frame::window_update(0, 1)),
        ("credit by the octet for a stream", Frame::window_update(1, 1)),
        ("credit for a stream that is no more", Frame::window_update(3, 1000)),
        ("resets of a stream that is no more", Frame::reset(3, CANCEL)),
        ("ends of a stream that we reset", Frame::data(3, []).ends()),
    ];
    for (what, frame) in floods {
        let mut scene = Scene::new().await;
        for stream in [1, 3] {
            scene.attacker.send(&Frame::connect(stream, "10.0.0.2:80")).await;
        }
        let _open = scene.server.accept_one().await;
        scene.server.request().await.refuse(culvert::hbone::Refusal::Denied);
        while soon(scene.attacker.next()).await.unwrap().kind != raw_h2::RST_STREAM {}
        // The attacker reads what comes back, so that nothing but the count stops it.
        let (read, mut write) = tokio::io::split(scene.attacker.io);
        let mut reader = RawPeer::silent(tokio::io::join(read, tokio::io::sink()));
        let told = tokio::spawn(async move {
            loop {
                match reader.receive().await {
                    Some(frame) if frame.kind == raw_h2::GOAWAY => return Some(frame.code()),
                    Some(_) => {}
                    None => return None,
                }
            }
        });
        let batch = frame.encode().repeat(100);
        for _ in 0..1000 {
            if !tokio::time::timeout(Duration::from_secs(2), write.write_all(&batch)).await.is_ok_and(|sent| sent.is_ok()) {
                break;
            }
        }
        let end = scene.server.tunnel_end().await;
        assert!(matches!(end, Err(Error::Flood(guard)) if guard.contains("control frames")), "{what}: {end:?}");
        assert!(matches!(soon(told).await.unwrap(), Some(ENHANCE_YOUR_CALM) | None), "{what}");
        scene.near.send(b"x").await;
        scene.far.expect(b"x").await;
    }
}

#[tokio::test]
async fn a_flood_whose_sender_does_not_read_ends_without_output_piling_up() {
    // A7: the answers to 900 PINGs are 15 KiB, and more than 1,000 are too many, whether or not they can be written.
    let mut scene = Scene::new().await;
    socket2::SockRef::from(scene.attacker.io.get_ref().0).set_recv_buffer_size(4096).unwrap();
    scene.until_closed(1000, |_| vec![Frame::ping([1; 8]); 100]).await;
    scene.over(None, "control frames").await;
}

#[tokio::test]
async fn a_hundred_empty_data_frames_are_enough() {
    for frame in [Frame::data(1, []), Frame::padded_data(1, b"", 10)] {
        let mut scene = Scene::new().await;
        scene.attacker.send(&Frame::connect(1, "10.0.0.2:80")).await;
        let mut application = scene.server.accept_one().await;
        scene.attacker.send_all(&vec![frame.clone(); 100]).await;
        scene.attacker.send(&Frame::data(1, *b"x")).await;
        application.expect(b"x").await;
        let _ = scene.attacker.try_send_all(&[frame]).await;
        scene.over(Some(ENHANCE_YOUR_CALM), "empty DATA").await;
    }
}

#[tokio::test]
async fn more_data_than_the_window_is_an_error_of_the_stream_or_the_tunnel() {
    let mut scene = Scene::new().await;
    scene.attacker.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let _incoming = scene.server.request().await;
    // The stream's window is 256 KiB; nobody has taken anything.
    for _ in 0..16 {
        scene.attacker.send(&Frame::data(1, vec![0; 16 << 10])).await;
    }
    scene.attacker.send(&Frame::data(1, vec![0; 16 << 10])).await;
    assert_eq!(soon(scene.attacker.expect(raw_h2::RST_STREAM, 1)).await.code(), raw_h2::FLOW_CONTROL_ERROR);
    scene.neighbour().await;
}

#[tokio::test]
async fn small_frames_before_an_answer_cost_a_byte_each_and_nothing_else() {
    let mut scene = Scene::new().await;
    scene.attacker.send(&Frame::connect(1, "10.0.0.2:80")).await;
    let _incoming = scene.server.request().await;
    for _ in 0..100 {
        assert!(scene.attacker.try_send_all(&vec![Frame::data(1, *b"x"); 1000]).await.is_ok());
    }
    scene.neighbour().await;
}

/// A hostile server: what it does to the client that dialled it.
async fn hostile_server(answers: impl FnOnce(u32) -> Vec<Frame>) -> Arc<Error> {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let good = OurServer::with(&realm, Config::default()).await.echo();
    let neighbour = OurClient::to(good.address, &realm, Config::default()).await;
    let mut application = neighbour.open().await.unwrap();
    let credential = realm.credential("server").await;
    let serve = async {
        let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
        peer.expect_headers(1).await;
        let _ = tokio::time::timeout(Duration::from_secs(2), peer.try_send_all(&answers(1))).await;
        while peer.next().await.is_some() {}
        std::future::pending::<()>().await
    };
    let error = tokio::select! {
        outcome = client.open() => outcome.err().unwrap_or_else(|| panic!("opened")),
        () = serve => unreachable!(),
        () = async { loop { application.echoes(b"x").await; tokio::time::sleep(Duration::from_millis(5)).await } } => unreachable!(),
    };
    application.echoes(b"x").await;
    eventually("the hostile tunnel is not kept for ever", || client.pool.len() <= 1).await;
    error
}

#[tokio::test]
async fn a_hostile_server_fails_its_own_requests_only() {
    let block = |fields: &[(&str, &str)]| hpack::block(fields);
    // CVE-2023-35945: RST_STREAM and then GOAWAY.
    let error = hostile_server(|stream| vec![Frame::reset(stream, raw_h2::INTERNAL_ERROR), Frame::goaway(1, raw_h2::INTERNAL_ERROR)]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "{error}");
    let error = hostile_server(|stream| vec![Frame::headers(stream, block(&[("x", "y")]))]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "no status: {error}");
    let error = hostile_server(|stream| vec![Frame::headers(stream, block(&[(":status", "200"), (":status", "200")]))]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "two statuses: {error}");
    let error = hostile_server(|stream| vec![Frame::data(stream, *b"before the answer")]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "DATA first: {error}");
    let error =
        hostile_server(|stream| vec![Frame::new(raw_h2::PUSH_PROMISE, 4, stream, [&[0, 0, 0, 2][..], &block(&[(":method", "GET")])].concat())]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "PUSH_PROMISE: {error}");
    let error = hostile_server(|stream| {
        let interim = Frame::status(stream, "103");
        let mut frames = vec![interim; 50_000];
        frames.push(Frame::status(stream, "503").ends());
        frames
    })
    .await;
    assert!(matches!(&*error, Error::Tunnel(_) | Error::Flood(_) | Error::Status(503)), "1xx flood: {error}");
    let error = hostile_server(|_| vec![Frame::settings(&[]); 5000]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "SETTINGS flood: {error}");
    let error =
        hostile_server(|stream| vec![Frame::headers(stream, [block(&[(":status", "200")]), hpack::literal("x", &[b'x'; 20_000])].concat())]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "header list too large: {error}");
    let error = hostile_server(|_| vec![Frame::new(SETTINGS, 0, 0, [0; 5])]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "SETTINGS of five bytes: {error}");
    let error = hostile_server(|_| vec![Frame::new(PING, 0, 7, [0; 8])]).await;
    assert!(matches!(&*error, Error::Tunnel(_)), "PING on a stream: {error}");
}

#[tokio::test]
async fn many_attackers_leave_nothing_behind() {
    let realm = Realm::new();
    let endpoint = Arc::new(Endpoint::new(Config::default()));
    let mut server = OurServer::start(realm.credential("server").await, endpoint.clone()).await;
    let credential = realm.credential("attacker").await;
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    for _ in 0..20 {
        let mut attacker = RawPeer::client(tls_to(server.address, &credential).await, &[]).await;
        for number in 0..100 {
            let stream = number * 2 + 1;
            let _ = attacker.try_send_all(&[Frame::connect(stream, "10.0.0.2:80"), Frame::data(stream, vec![0; 1000])]).await;
        }
        drop(attacker);
        let _ = server.tunnel_end().await;
        while server.requests.try_recv().is_ok() {}
    }
    eventually("all tasks are gone", || tokio::runtime::Handle::current().metrics().num_alive_tasks() <= before).await;
    eventually("all credit came back", || endpoint.budget.promised() == 0).await;
}
