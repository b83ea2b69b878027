//! What a peer can make us dial: the whole inbound side of one pod, in this process.

use std::sync::Arc;
use std::time::Duration;

use culvert::discovery::LocalName;
use culvert::discovery::local::{self, LocalSource};
use culvert::hbone::{Config, Endpoint};
use culvert::lifecycle::drain::{self, DrainTrigger};
use culvert::lifecycle::{PermitLimits, Permits};
use culvert::proxy::{Departures, FailedDials, HostNames, Node, PodProxy, PodSockets};
use culvert::telemetry::{Telemetry, TelemetryConfig};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;

use crate::raw_h2::{CANCEL, Frame, HEADERS, RawPeer, field};
use crate::tunnel_peers::{Realm, listen, soon, tls_to};

/// A pod on loopback whose HBONE port is served; failed dials are limited to `per_second`.
struct Pod {
    realm: Realm,
    address: std::net::SocketAddr,
    _trigger: DrainTrigger,
}

impl Pod {
    async fn new(per_second: u32) -> Self {
        let realm = Realm::new();
        let text = "workloads:\n- uid: cluster//Pod/default/web\n  name: web\n  namespace: default\n  serviceAccount: server\n  \
                    workloadIps: [\"127.0.0.1\"]\n  protocol: HBONE\n  node: here\n";
        let mesh = local::start(LocalSource::Text(text.to_owned()), local::Config::default()).await.unwrap();
        let config = culvert::proxy::Config {
            localhost_app_tunnel: true,
            route: culvert::proxy::route::RouteConfig::default(),
            mark: None,
            keepalive: None,
            user_timeout: false,
            connect_timeout: Duration::from_secs(10),
            half_closed: Duration::from_secs(300),
            workload_timeout: Duration::from_secs(1),
            baggage: true,
            policy_info: false,
        };
        let sockets = PodSockets::new(None, false, &config);
        let departures = Departures::follow(&mesh);
        let node = Node {
            config,
            hbone: Arc::new(Endpoint::new(Config::default())),
            mesh,
            credentials: realm.credentials.clone(),
            host_names: HostNames::new(true),
            telemetry: Telemetry::new(TelemetryConfig::default()),
            unauthenticated: Permits::new(PermitLimits { total: 100, per_key: 100 }),
            dials: Permits::new(PermitLimits { total: usize::MAX, per_key: 64 }),
            failed_dials: FailedDials::new(per_second),
            departures,
        };
        let name = LocalName { name: "web".into(), namespace: "default".into(), service_account: "server".into() };
        let (listener, address) = listen().await;
        let (trigger, watcher) = drain::channel();
        PodProxy::new(Arc::new(node), name, sockets, watcher.clone()).serve_hbone(listener, watcher);
        Self { realm, address, _trigger: trigger }
    }
}

type Peer = RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

/// The status within some time, or nothing while the dial is under way.
async fn ask(peer: &mut Peer, stream: u32, authority: &str) -> Option<String> {
    peer.send(&Frame::connect(stream, authority)).await;
    let answer = async {
        loop {
            let frame = peer.next().await.expect("the tunnel ended");
            if frame.kind == HEADERS {
                let fields = peer.fields(&frame);
                assert_eq!(frame.stream, stream);
                return field(&fields, ":status").unwrap().to_owned();
            }
        }
    };
    tokio::time::timeout(Duration::from_millis(25), answer).await.ok()
}

#[tokio::test]
async fn dials_that_come_to_nothing_are_limited_and_dials_that_succeed_are_not() {
    let pod = Pod::new(10).await;
    let mut peer = RawPeer::client(tls_to(pod.address, &*pod.realm.credential("client").await).await, &[]).await;
    // A listener whose queue is full: the kernel leaves further connects without an answer.
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    full.listen(0).unwrap();
    let authority = full.local_addr().unwrap().as_socket().unwrap();
    let _in_queue = std::net::TcpStream::connect(authority).unwrap();
    let mut stream = 1;
    let begin = tokio::time::Instant::now();
    let (mut dialed, mut refused) = (0, 0);
    for _ in 0..60 {
        match soon(ask(&mut peer, stream, &authority.to_string())).await {
            None => {
                dialed += 1;
                // Given up before the 200.
                peer.send(&Frame::reset(stream, CANCEL)).await;
            }
            Some(status) => {
                assert_eq!(status, "503");
                refused += 1;
            }
        }
        stream += 2;
    }
    let most = 10 + 1 + usize::try_from(begin.elapsed().as_millis() / 100).unwrap();
    assert!((10..=most).contains(&dialed), "{dialed} dials, at most {most}");
    assert!(refused > 30, "{refused} refused");
    // Another peer is not concerned. What succeeds is not counted, however much of it there is.
    let (open, address) = listen().await;
    let accept = tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(TcpListener::accept(&open).await.unwrap());
        }
    });
    let mut other = RawPeer::client(tls_to(pod.address, &*pod.realm.credential("other").await).await, &[]).await;
    for number in 0..100 {
        let stream = number * 2 + 1;
        other.send(&Frame::connect(stream, &address.to_string())).await;
        assert_eq!(soon(other.expect_status(stream)).await.0, "200");
    }
    accept.abort();
}

#[tokio::test]
async fn a_port_that_nobody_listens_on_is_a_503_and_costs_its_own_pod_only() {
    let pod = Pod::new(5).await;
    let mut peer = RawPeer::client(tls_to(pod.address, &*pod.realm.credential("client").await).await, &[]).await;
    let (closed, address) = listen().await;
    drop(closed);
    for number in 0..50 {
        let stream = number * 2 + 1;
        peer.send(&Frame::connect(stream, &address.to_string())).await;
        assert_eq!(soon(peer.expect_status(stream)).await, ("503".to_owned(), true));
        // Its stream is not finished on our side: the server says that it needs no more.
        soon(peer.next()).await;
    }
    // After a moment the next dial is tried again.
    let (_open, address) = listen().await;
    tokio::time::sleep(Duration::from_millis(250)).await;
    peer.send(&Frame::connect(1001, &address.to_string())).await;
    assert_eq!(soon(peer.expect_status(1001)).await.0, "200");
}
