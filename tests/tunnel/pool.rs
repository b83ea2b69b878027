//! The pool of tunnels: what is shared, what is never shared, and what happens when a dial or a tunnel fails.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use culvert::hbone::{Config, Endpoint, Error, PoolKey};
use futures_util::future::join_all;
use proptest::prelude::*;
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;

use crate::raw_h2::{Frame, RawPeer};
use crate::tunnel_peers::{
    Answer, Application, CountingDialer, OurClient, OurServer, Realm, StockServer, eventually, id, listen, request, soon, tls_accept,
};

async fn echo_server(realm: &Realm) -> StockServer {
    StockServer::start(realm.credential("server").await, Answer::Echo).await
}

#[tokio::test]
async fn connections_share_a_tunnel() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut one = client.open().await.unwrap();
    let mut two = client.open().await.unwrap();
    one.echoes(b"one").await;
    two.echoes(b"two").await;
    drop((one, two));
    client.open().await.unwrap().echoes(b"three").await;
    assert_eq!((client.dials(), server.connections(), client.pool.len()), (1, 1, 1));
}

#[tokio::test]
async fn whatever_differs_in_the_key_makes_another_tunnel() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let base = client.key.clone();
    let keys = [
        base.clone(),
        PoolKey { source: id("other"), ..base.clone() },
        PoolKey { source_ip: "10.0.0.9".parse().unwrap(), ..base.clone() },
        PoolKey { source_ip: IpAddr::from([0, 0, 0, 0, 0, 0xffff, 0x0a00, 1]), ..base.clone() },
        PoolKey { expected: vec![id("server"), id("more")], ..base.clone() },
        // D17: the address went to another pod; our certificate was renewed.
        PoolKey { destination: "cluster//Pod/default/successor".into(), ..base.clone() },
        PoolKey { generation: base.generation + 1, ..base.clone() },
    ];
    for round in 0..3 {
        for (index, key) in keys.iter().enumerate() {
            client.open_with(key).await.unwrap().echoes(b"x").await;
            let expected = if round == 0 { index + 1 } else { keys.len() };
            assert_eq!(client.dials(), expected, "{key:?}");
        }
    }
}

#[tokio::test]
async fn a_renewed_certificate_makes_a_new_tunnel_and_old_streams_go_on() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let mut client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut old = client.open().await.unwrap();
    client.credential = realm.renewed("client").await;
    assert_ne!(client.credential.generation, client.key.generation);
    client.key.generation = client.credential.generation;
    client.open().await.unwrap().echoes(b"new").await;
    old.echoes(b"old").await;
    assert_eq!(client.dials(), 2);
}

#[tokio::test]
async fn a_full_tunnel_gets_a_sibling_and_takes_streams_again_when_old_ones_end() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config { pool_max_streams: 2, ..Config::default() }).await;
    let mut first = client.open().await.unwrap();
    let mut rest = vec![client.open().await.unwrap()];
    assert_eq!(client.dials(), 1);
    rest.push(client.open().await.unwrap());
    assert_eq!(client.dials(), 2);
    // The fourth goes beside the third.
    rest.push(client.open().await.unwrap());
    assert_eq!(client.dials(), 2);
    first.echoes(b"x").await;
    first.finish().await;
    assert_eq!(first.read_to_end().await.unwrap(), b"");
    soon(first.relay).await.unwrap();
    rest.push(client.open().await.unwrap());
    assert_eq!((client.dials(), client.pool.len()), (2, 2), "the place of the first was given back");
    for application in &mut rest {
        application.echoes(b"y").await;
    }
}

#[tokio::test]
async fn a_tunnel_takes_no_more_streams_than_its_peer_allows() {
    let realm = Realm::new();
    let credential = realm.credential("server").await;
    let server = StockServer::with(credential, Answer::Echo, |builder| {
        builder.max_concurrent_streams(1);
    })
    .await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut held = Vec::new();
    for dials in 1..=4 {
        let mut application = client.open().await.unwrap();
        application.echoes(b"x").await;
        held.push(application);
        assert_eq!(client.dials(), dials);
    }
}

#[tokio::test]
async fn after_goaway_new_streams_take_a_new_tunnel_and_running_ones_finish() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut running = client.open().await.unwrap();
    running.echoes(b"before").await;
    server.goaway();
    // The goodbye is on its way; whether the next stream meets it or not, it must be served.
    client.open().await.unwrap().echoes(b"meanwhile").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.open().await.unwrap().echoes(b"after").await;
    assert_eq!(client.dials(), 2);
    running.echoes(b"still here").await;
    running.finish().await;
    assert_eq!(running.read_to_end().await.unwrap(), b"");
    eventually("the old tunnel ends", || server.ended.load(Ordering::SeqCst) == 1).await;
    client.open().await.unwrap().echoes(b"x").await;
    assert_eq!(client.dials(), 2);
}

#[tokio::test]
async fn more_tunnels_that_said_goodbye_than_attempts_do_not_fail_an_open() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config { pool_max_streams: 2, ..Config::default() }).await;
    let mut running = Vec::new();
    for _ in 0..16 {
        running.push(client.open().await.unwrap());
    }
    // One of each pair stays, so that each of eight tunnels has a place and lives on.
    let mut number = 0;
    running.retain(|_| {
        number += 1;
        number % 2 == 0
    });
    server.goaway();
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.open().await.unwrap().echoes(b"x").await;
    for application in &mut running {
        application.echoes(b"y").await;
    }
    assert_eq!(client.dials(), 9);
}

/// A client whose dials wait for a word.
async fn held_up(server: &StockServer, realm: &Realm, error: Option<io::ErrorKind>) -> OurClient {
    let dialer = CountingDialer { gate: Some(Notify::new()), error, ..CountingDialer::default() };
    OurClient::with(server.address, realm, Endpoint::new(Config::default()), dialer).await
}

#[tokio::test]
async fn a_hundred_concurrent_opens_are_one_dial() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = held_up(&server, &realm, None).await;
    let opens = join_all((0..100).map(|_| client.open()));
    let release = async {
        eventually("a dial begins", || client.dials() > 0).await;
        tokio::task::yield_now().await;
        client.dialer.gate.as_ref().unwrap().notify_one();
    };
    let (opened, ()) = tokio::join!(opens, release);
    for application in opened {
        application.unwrap().echoes(b"x").await;
    }
    assert_eq!((client.dials(), server.connections()), (1, 1));
}

#[tokio::test]
async fn all_who_wait_for_a_dial_share_its_error_and_the_next_open_dials_again() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = held_up(&server, &realm, Some(io::ErrorKind::ConnectionRefused)).await;
    let opens = join_all((0..100).map(|_| client.open()));
    let gate = client.dialer.gate.as_ref().unwrap();
    let release = async {
        eventually("a dial begins", || client.dials() > 0).await;
        tokio::task::yield_now().await;
        gate.notify_one();
    };
    let (opened, ()) = tokio::join!(opens, release);
    let errors: Vec<Arc<Error>> = opened.into_iter().map(|open| open.err().unwrap()).collect();
    assert!(matches!(&*errors[0], Error::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused));
    assert!(errors.iter().all(|error| Arc::ptr_eq(error, &errors[0])));
    assert_eq!((client.dials(), client.pool.len()), (1, 0));
    gate.notify_one();
    assert!(client.open().await.is_err());
    assert_eq!(client.dials(), 2);
}

#[tokio::test]
async fn a_requester_that_leaves_does_not_cancel_the_dial_of_others() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = Arc::new(held_up(&server, &realm, None).await);
    let opener = |client: Arc<OurClient>| tokio::spawn(async move { client.open().await });
    let first = opener(client.clone());
    eventually("a dial begins", || client.dials() > 0).await;
    let second = opener(client.clone());
    tokio::task::yield_now().await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    client.dialer.gate.as_ref().unwrap().notify_one();
    soon(second).await.unwrap().unwrap().echoes(b"x").await;
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn a_place_is_given_back_wherever_its_requester_leaves() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let dialer = CountingDialer { gate: Some(Notify::new()), ..CountingDialer::default() };
    let endpoint = Endpoint::new(Config { pool_max_streams: 1, ..Config::default() });
    let client = Arc::new(OurClient::with(server.address, &realm, endpoint, dialer).await);
    let opener = |client: &Arc<OurClient>| {
        let client = client.clone();
        tokio::spawn(async move { client.open().await })
    };
    // During the dial.
    let open = opener(&client);
    eventually("a dial begins", || client.dials() > 0).await;
    open.abort();
    client.dialer.gate.as_ref().unwrap().notify_one();
    eventually("the tunnel is there all the same", || client.pool.len() == 1).await;
    // While the answer is awaited.
    let open = opener(&client);
    let mut incoming = server.request().await;
    open.abort();
    soon(incoming.abandoned()).await;
    assert!(incoming.accept(&Default::default()).is_err());
    // After the 200, before the first byte.
    let open = opener(&client);
    let far = server.accept_one().await;
    let near = soon(open).await.unwrap().unwrap();
    near.relay.abort();
    assert!(matches!(soon(far.relay).await.unwrap(), culvert::forward::Ended::Disconnected(_)));
    eventually("the place is free", || near.relay.is_finished()).await;
    let open = opener(&client);
    let _far = server.accept_one().await;
    soon(open).await.unwrap().unwrap();
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn an_unused_tunnel_is_released_and_a_used_one_is_not() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let config = Config { pool_unused_release: Duration::from_millis(200), ..Config::default() };
    let client = OurClient::to(server.address, &realm, config).await;
    let mut application = client.open().await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(client.pool.len(), 1, "an idle stream uses its tunnel");
    application.echoes(b"x").await;
    drop(application);
    // Each use begins the time anew.
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.open().await.unwrap().echoes(b"x").await;
    }
    assert_eq!(client.dials(), 1);
    eventually("the tunnel is released", || client.pool.is_empty()).await;
    eventually("and closed", || server.ended.load(Ordering::SeqCst) == 1).await;
    client.open().await.unwrap().echoes(b"x").await;
    assert_eq!(client.dials(), 2);
}

#[tokio::test]
async fn a_tunnel_that_is_no_longer_wanted_is_dropped_and_its_streams_go_on() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut running = client.open().await.unwrap();
    let other = PoolKey { destination: "other".into(), ..client.key.clone() };
    client.open_with(&other).await.unwrap();
    client.pool.retain(|key| *key == other);
    assert_eq!(client.pool.len(), 1);
    running.echoes(b"x").await;
    client.open().await.unwrap().echoes(b"y").await;
    assert_eq!(client.dials(), 3);
}

#[tokio::test]
async fn a_dial_for_what_is_no_longer_wanted_is_in_vain() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = held_up(&server, &realm, None).await;
    let work = async {
        eventually("a dial begins", || client.dials() > 0).await;
        client.pool.retain(|_| false);
        client.dialer.gate.as_ref().unwrap().notify_one();
    };
    let (opened, ()) = tokio::join!(client.open(), work);
    assert!(matches!(&*opened.err().unwrap(), Error::Draining));
    assert_eq!(client.pool.len(), 0);
    eventually("the connection is closed", || server.ended.load(Ordering::SeqCst) == server.connections()).await;
}

#[tokio::test]
async fn after_abort_everything_is_cut_and_nothing_is_opened() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut application = client.open().await.unwrap();
    application.echoes(b"x").await;
    client.pool.abort();
    assert_eq!(application.read_to_end().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(&*client.open().await.err().unwrap(), Error::Draining));
    assert_eq!((client.dials(), client.pool.len()), (1, 0));
    // A dial under way is stopped.
    let client = held_up(&server, &realm, None).await;
    let abort = async {
        eventually("a dial begins", || client.dials() > 0).await;
        client.pool.abort();
    };
    let (opened, ()) = tokio::join!(client.open(), abort);
    assert!(matches!(&*opened.err().unwrap(), Error::Draining));
    client.dialer.gate.as_ref().unwrap().notify_one();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((server.connections(), client.pool.len()), (1, 0));
}

#[tokio::test]
async fn streams_outlive_the_pool_and_idle_tunnels_end_with_it() {
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut running = client.open().await.unwrap();
    client.open_with(&PoolKey { destination: "idle".into(), ..client.key.clone() }).await.unwrap().echoes(b"x").await;
    drop(client);
    running.echoes(b"still here").await;
    eventually("the idle tunnel ends", || server.ended.load(Ordering::SeqCst) == 1).await;
    running.finish().await;
    assert_eq!(running.read_to_end().await.unwrap(), b"");
    eventually("the last stream ends its tunnel", || server.ended.load(Ordering::SeqCst) == 2).await;
}

#[tokio::test]
async fn a_connect_that_times_out_is_said_to_be_perhaps_a_network_policy() {
    let realm = Realm::new();
    let dialer = CountingDialer { error: Some(io::ErrorKind::TimedOut), ..CountingDialer::default() };
    let client = OurClient::with("127.0.0.1:1".parse().unwrap(), &realm, Endpoint::new(Config::default()), dialer).await;
    let error = client.open().await.err().unwrap();
    assert!(matches!(&*error, Error::ConnectTimeout(address) if *address == client.key.next_hop), "{error}");
}

#[tokio::test]
async fn a_server_of_another_identity_is_refused_and_not_pooled() {
    let realm = Realm::new();
    for account in ["neighbour", "client"] {
        let server = StockServer::start(realm.credential(account).await, Answer::Echo).await;
        let client = OurClient::to(server.address, &realm, Config::default()).await;
        let error = client.open().await.err().unwrap();
        assert!(matches!(&*error, Error::Peer(_)), "{error}");
        assert_eq!((client.pool.len(), server.requests.load(Ordering::SeqCst)), (0, 0));
    }
    let stranger = StockServer::start(Realm::new().credential("server").await, Answer::Echo).await;
    let client = OurClient::to(stranger.address, &realm, Config::default()).await;
    let error = client.open().await.err().unwrap();
    assert!(matches!(&*error, Error::Tls(_)), "{error}");
    assert!(client.pool.is_empty());
}

#[tokio::test]
async fn an_answer_other_than_200_is_an_error_and_the_tunnel_stays() {
    let realm = Realm::new();
    for status in [400, 401, 403, 503, 204, 299] {
        let server = StockServer::start(realm.credential("server").await, Answer::Status(status)).await;
        let client = OurClient::to(server.address, &realm, Config { pool_max_streams: 1, ..Config::default() }).await;
        for _ in 0..3 {
            let error = client.open().await.err().unwrap();
            assert!(matches!(&*error, Error::Status(found) if *found == status), "{error}");
        }
        assert_eq!((client.dials(), client.pool.len()), (1, 1));
    }
}

#[tokio::test]
async fn a_stream_that_is_refused_untouched_is_tried_on_another_tunnel() {
    let realm = Realm::new();
    let credential = realm.credential("server").await;
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let server = async {
        // One refuses the stream, one says goodbye below it, one answers. All promise that nothing was done.
        let mut peers = Vec::new();
        for refusal in [Some(Frame::reset(1, crate::raw_h2::REFUSED_STREAM)), Some(Frame::goaway(0, 0)), None] {
            let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
            peer.expect_headers(1).await;
            peer.send(&refusal.unwrap_or_else(|| Frame::status(1, "200"))).await;
            peers.push(peer);
        }
        peers
    };
    let (opened, _peers) = tokio::join!(client.open(), soon(server));
    opened.unwrap();
    assert_eq!((client.dials(), client.pool.len()), (3, 1));
}

#[tokio::test]
async fn a_server_that_refuses_for_ever_is_given_up() {
    let realm = Realm::new();
    let credential = realm.credential("server").await;
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let server = tokio::spawn(async move {
        loop {
            let mut peer = RawPeer::server(tls_accept(listener.accept().await.unwrap().0, &credential).await, &[]).await;
            peer.expect_headers(1).await;
            peer.send(&Frame::reset(1, crate::raw_h2::REFUSED_STREAM)).await;
            tokio::spawn(async move { while peer.next().await.is_some() {} });
        }
    });
    assert!(matches!(&*client.open().await.err().unwrap(), Error::Tunnel(_)));
    assert_eq!(client.dials(), 3);
    server.abort();
}

/// Such a tunnel may have ended before whoever asked for it has looked at it: that counts as an attempt like any other.
#[tokio::test]
async fn a_server_that_ends_every_tunnel_before_its_first_stream_is_given_up() {
    let realm = Realm::new();
    let config = realm.credential("server").await.server_config();
    let (listener, address) = listen().await;
    let client = OurClient::to(address, &realm, Config::default()).await;
    let server = tokio::spawn(async move {
        loop {
            let mut socket = listener.accept().await.unwrap().0.into_std().unwrap();
            let mut tls = rustls::ServerConnection::new(config.clone()).unwrap();
            tokio::task::spawn_blocking(move || {
                socket.set_nonblocking(false).unwrap();
                while !tls.wants_write() {
                    tls.read_tls(&mut socket).unwrap();
                    tls.process_new_packets().unwrap();
                }
                while tls.wants_write() {
                    tls.write_tls(&mut socket).unwrap();
                }
                // The client has all it needs for its side of the handshake, and the end behind it.
                socket.shutdown(std::net::Shutdown::Write).unwrap();
                let _ = io::copy(&mut socket, &mut io::sink());
            });
        }
    });
    soon(async {
        loop {
            let before = client.dials();
            let opened = join_all((0..10).map(|_| client.open())).await;
            assert!(opened.iter().all(Result::is_err));
            let dials = client.dials() - before;
            assert!(dials <= 3, "{dials} dials");
            // Fewer when the end came a moment later, and found a request on its way.
            if dials == 3 {
                return;
            }
        }
    })
    .await;
    eventually("the pool is empty", || client.pool.is_empty()).await;
    server.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_of_many_sources_share_by_source_only() {
    const SOURCES: u8 = 10;
    const CLIENTS: usize = 20;
    let realm = Realm::new();
    let server = echo_server(&realm).await;
    let client = Arc::new(OurClient::to(server.address, &realm, Config { pool_max_streams: 7, ..Config::default() }).await);
    let work = (0..SOURCES).flat_map(|source| (0..CLIENTS).map(move |number| (source, number))).map(|(source, number)| {
        let client = client.clone();
        tokio::spawn(async move {
            let key = PoolKey { source_ip: IpAddr::from([10, 0, 0, source]), ..client.key.clone() };
            for round in 0..5 {
                let mut application = client.open_with(&key).await.unwrap();
                let bytes = format!("{source} {number} {round}").repeat(100);
                application.echoes(bytes.as_bytes()).await;
                application.finish().await;
                assert_eq!(application.read_to_end().await.unwrap(), b"");
            }
        })
    });
    for done in join_all(work).await {
        done.unwrap();
    }
    let most = usize::from(SOURCES) * CLIENTS.div_ceil(7);
    assert!((usize::from(SOURCES)..=most).contains(&client.dials()), "{} dials, at most {most} expected", client.dials());
    assert_eq!(client.dials(), server.connections());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// D24: whatever the order of opening and closing, no tunnel ever carries streams of two keys.
    #[test]
    fn no_tunnel_carries_streams_of_two_tenants(steps in proptest::collection::vec((0..4_u8, 0..3_u8), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let realm = Realm::new();
            let server = echo_server(&realm).await;
            let client = OurClient::to(server.address, &realm, Config { pool_max_streams: 2, ..Config::default() }).await;
            let mut held: Vec<Application> = Vec::new();
            for (tenant, action) in steps {
                if action == 0 && !held.is_empty() {
                    held.remove(usize::from(tenant) % held.len());
                    continue;
                }
                let key = PoolKey { source_ip: IpAddr::from([10, 0, 0, tenant]), ..client.key.clone() };
                let mut request = request();
                request.authority = format!("tenant-{tenant}:80").parse().unwrap();
                let (stream, _, _) = soon(client.pool.open(&key, &client.credential, &request)).await.unwrap();
                held.push(Application::behind(stream, culvert::hbone::Role::Client).await);
            }
            for authorities in server.seen.lock().unwrap().values() {
                assert!(authorities.iter().all(|authority| *authority == authorities[0]), "{authorities:?}");
            }
        });
    }
}

#[tokio::test]
async fn a_silent_listener_fails_an_open_at_the_handshake_deadline() {
    let realm = Realm::new();
    let (listener, address) = listen().await;
    let config = Config { handshake_deadline: Duration::from_millis(200), ..Config::default() };
    let client = OurClient::to(address, &realm, config.clone()).await;
    let error = client.open().await.err().unwrap();
    assert!(matches!(&*error, Error::HandshakeDeadline(_)), "{error}");
    assert!(client.pool.is_empty());
    let (mut socket, _) = listener.accept().await.unwrap();
    soon(socket.read_to_end(&mut Vec::new())).await.ok();
    // One that finishes TLS and then says nothing.
    let credential = realm.credential("server").await;
    let client = OurClient::to(address, &realm, config).await;
    let silent = async { RawPeer::silent(tls_accept(listener.accept().await.unwrap().0, &credential).await) };
    let (opened, mut peer) = tokio::join!(client.open(), silent);
    assert!(matches!(&*opened.err().unwrap(), Error::Tunnel(_)));
    eventually("the tunnel is forgotten", || client.pool.is_empty()).await;
    soon(async { while peer.receive().await.is_some() {} }).await;
}
