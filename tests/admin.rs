//! The three windows over real sockets: admin page, readiness, metrics.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

#[path = "support/config_dump.rs"]
mod config_dump;

use culvert::admin::{AdminSources, Readiness, listen_loopback, serve_admin, serve_metrics, serve_readiness};
use culvert::discovery::local::{self, LocalSource};
use culvert::telemetry::logging::{self, LogConfig, LogHandle};
use culvert::telemetry::{RateLimit, Reporter, Telemetry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A server that ends when it is told to.
struct Served {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Served {
    async fn stop(mut self) {
        drop(self.stop.take());
        tokio::time::timeout(Duration::from_secs(5), self.task).await.expect("the server must end").unwrap();
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

macro_rules! served {
    ($serve:ident, $($argument:expr),*) => {{
        let listener = listener().await;
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { let _ = stopped.await; };
        Served { address, stop: Some(stop), task: tokio::spawn($serve(listener, $($argument,)* shutdown)) }
    }};
}

struct Answered {
    status: u16,
    head: String,
    body: String,
}

impl Answered {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.split_once(": ").filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value))
    }
}

async fn send(address: SocketAddr, request: &str) -> Answered {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    // A server that closes with unread request bytes may reset; what was answered before counts.
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes)).await.expect("the server must answer or close");
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Answered { status, head: head.to_owned(), body: body.to_owned() }
}

async fn ask(address: SocketAddr, method: &str, path: &str, headers: &str) -> Answered {
    send(address, &format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n")).await
}

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The log of this test process, set up once.
fn process_log() -> (&'static LogHandle, &'static Captured) {
    static LOG: OnceLock<(LogHandle, Captured)> = OnceLock::new();
    let (handle, sink) = LOG.get_or_init(|| {
        let sink = Captured::default();
        (logging::init(LogConfig { sink: Box::new(sink.clone()), ..LogConfig::default() }).unwrap(), sink)
    });
    (handle, sink)
}

/// Sources with a log of their own, so that tests do not change each other's filter.
fn sources() -> (AdminSources, Arc<AtomicUsize>) {
    let shutdowns = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&shutdowns);
    let (_, log) = logging::build(LogConfig { sink: Box::new(std::io::sink()), ..LogConfig::default() }).unwrap();
    let sources = AdminSources {
        config_dump: Arc::new(|| serde_json::json!({"workloads": []})),
        log,
        shutdown: Arc::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        }),
    };
    (sources, shutdowns)
}

#[tokio::test]
async fn readiness_follows_its_tasks() {
    let readiness = Readiness::new();
    let state = readiness.register("state manager");
    let pods = readiness.register("workload proxy manager");
    let proxy = readiness.register("proxy");
    let served = served!(serve_readiness, readiness.clone());
    let expect = async |status: u16, body: &str| {
        let answer = ask(served.address, "GET", "/healthz/ready", "").await;
        assert_eq!((answer.status, answer.body.as_str()), (status, body));
    };
    expect(500, "not ready, pending: proxy, state manager, workload proxy manager\n").await;
    drop(proxy);
    state.ready();
    expect(500, "not ready, pending: workload proxy manager\n").await;
    pods.ready();
    expect(200, "ready\n").await;
    pods.rearm();
    pods.rearm();
    expect(500, "not ready, pending: workload proxy manager\n").await;
    drop(pods);
    expect(200, "ready\n").await;
    served.stop().await;
}

#[tokio::test]
async fn tasks_of_one_name_count_each_and_show_once() {
    let readiness = Readiness::new();
    let (first, second) = (readiness.register("dns proxy"), readiness.register("dns proxy"));
    assert_eq!(readiness.pending(), ["dns proxy"]);
    drop(first);
    assert_eq!(readiness.pending(), ["dns proxy"]);
    drop(second);
    assert!(readiness.pending().is_empty());
}

#[tokio::test]
async fn readiness_has_one_path_and_one_method() {
    let served = served!(serve_readiness, Readiness::new());
    for (method, path, status) in [("POST", "/healthz/ready", 405), ("HEAD", "/healthz/ready", 405), ("GET", "/", 404), ("POST", "/healthz", 404)] {
        assert_eq!(ask(served.address, method, path, "").await.status, status, "{method} {path}");
    }
    assert_eq!(ask(served.address, "GET", "/healthz/ready?x=y", "").await.status, 200);
    served.stop().await;
}

#[tokio::test]
async fn metrics_have_two_paths_and_a_content_type_by_accept() {
    let telemetry = Telemetry::default();
    let _socket = telemetry.socket_opened(Reporter::Source);
    let served = served!(serve_metrics, telemetry);
    let (plain, open) = ("text/plain; charset=utf-8", "application/openmetrics-text;charset=utf-8;version=1.0.0");
    for (accept, content_type) in [
        ("", plain),
        ("Accept: */*\r\n", plain),
        ("Accept: text/plain;version=0.0.4\r\n", plain),
        ("Accept: application/openmetrics-text; version=1.0.0\r\n", open),
        ("Accept: text/plain;q=0.5, Application/OpenMetrics-Text;version=1.0.0;q=0.75,*/*;q=0.1\r\n", open),
        ("Accept: text/plain\r\nAccept: application/openmetrics-text\r\n", open),
    ] {
        for path in ["/metrics", "/stats/prometheus"] {
            let answer = ask(served.address, "GET", path, accept).await;
            assert_eq!((answer.status, answer.header("content-type")), (200, Some(content_type)), "{accept}");
            assert!(answer.body.contains("istio_tcp_sockets_open{reporter=\"source\"} 1\n") && answer.body.ends_with("# EOF\n"));
        }
    }
    assert_eq!(ask(served.address, "GET", "/", "").await.status, 404);
    assert_eq!(ask(served.address, "POST", "/metrics", "").await.status, 405);
    served.stop().await;
}

#[tokio::test]
async fn the_admin_page_has_its_paths_and_methods() {
    let (sources, shutdowns) = sources();
    let served = served!(serve_admin, sources);
    let index = ask(served.address, "GET", "/", "").await;
    assert_eq!((index.status, index.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(index.body.contains("config_dump") && index.body.contains("quitquitquit"));
    for method in ["GET", "POST"] {
        let dump = ask(served.address, method, "/config_dump", "").await;
        assert_eq!((dump.status, dump.header("content-type")), (200, Some("application/json")));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&dump.body).unwrap(), serde_json::json!({"workloads": []}));
    }
    for path in ["/drain", "/healthz", "/healthz/ready", "/metrics", "/config_dump/", "//", "/debug/pprof/profile"] {
        assert_eq!(ask(served.address, "GET", path, "").await.status, 404, "{path}");
    }
    for method in ["GET", "PUT", "HEAD", "DELETE", "OPTIONS"] {
        for path in ["/quitquitquit", "/logging"] {
            let answer = ask(served.address, method, path, "").await;
            assert_eq!((answer.status, answer.header("allow")), (405, Some("POST")), "{method} {path}");
        }
    }
    assert_eq!(shutdowns.load(Ordering::SeqCst), 0, "only POST shuts down");
    let quit = ask(served.address, "POST", "/quitquitquit", "").await;
    assert_eq!((quit.status, quit.body.as_str()), (200, "shutdown now\n"));
    assert_eq!(shutdowns.load(Ordering::SeqCst), 1);
    served.stop().await;
}

/// Everything that a row of the mesh can say (reference, dataplane §10.2), which no lab has all of.
const RICH: &str = r#"
workloads:
- uid: c/apps/Deployment/ns/rich
  name: rich
  namespace: ns
  workloadIps: [10.0.0.1, "fd00::1"]
  waypoint: {destination: net/10.0.0.9, hboneMtlsPort: 15009}
  networkGateway: {destination: ns/gate.example}
  protocol: HBONE
  networkMode: HostNetwork
  trustDomain: example.org
  serviceAccount: account
  network: net
  workloadName: rich
  workloadType: cronjob
  canonicalName: rich
  canonicalRevision: v1
  hostname: rich.example
  node: n1
  nativeTunnel: true
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [ns/p]
  status: Unhealthy
  clusterId: c
  locality: {region: r, zone: z, subzone: s}
  services: {"ns/web.example": {80: 8080}, "ns/later.example": {81: 0}}
  capacity: 3
services:
- name: web
  namespace: ns
  hostname: web.example
  vips: [net/10.1.0.1, "/fd00::2"]
  cidrVips: [{network: net, cidr: 10.2.0.0/16}]
  ports: {80: 8080}
  subjectAltNames: ["spiffe://example.org/ns/ns/sa/account"]
  waypoint: {destination: ns/way.example, hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: {destination: net/10.0.0.9, hboneMtlsPort: 15008}, weight: 7}]
  loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: Dual
  canonical: true
  visibility: Namespace
policies:
- name: p
  namespace: ns
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - principals: [{Exact: a}, {Prefix: b}, {Suffix: c}, {Presence: []}]
        notPrincipals: [{Exact: a}]
        namespaces: [{Exact: a}]
        notNamespaces: [{Exact: a}]
        serviceAccounts: [{namespace: ns, serviceAccount: account}]
        notServiceAccounts: [{namespace: ns, serviceAccount: account}]
        sourceIps: [10.0.0.0/8]
        notSourceIps: [10.0.0.0/8]
        destinationIps: ["fd00::/8"]
        notDestinationIps: [10.0.0.0/8]
        destinationPorts: [80]
        notDestinationPorts: [81]
"#;

#[tokio::test]
async fn every_field_of_the_mesh_is_where_istioctl_looks_for_it() {
    use config_dump::*;
    let mesh = local::start(LocalSource::Text(RICH.into()), local::Config::default()).await.unwrap();
    let sections = mesh.clone();
    let config_dump = move || {
        let mut page = sections.dump();
        // What other rooms add; real ones are read in tests/mesh.
        for (name, empty) in [("certificates", serde_json::json!([])), ("workloadState", serde_json::json!({})), ("config", serde_json::json!({}))] {
            page[name] = empty;
        }
        page["version"] = serde_json::json!({"version": "", "gitRevision": "", "rustVersion": "", "buildProfile": "", "buildStatus": "",
            "istioVersion": "", "cryptoProvider": ""});
        page
    };
    let served = served!(serve_admin, AdminSources { config_dump: Arc::new(config_dump), ..sources().0 });
    let page = ask(served.address, "GET", "/config_dump", "").await;
    let dump: ConfigDump = serde_json::from_str(&page.body).unwrap_or_else(|error| panic!("{error}\n{}", page.body));
    let [workload] = dump.workloads.as_slice() else { panic!("{:?}", dump.workloads) };
    let gateway = |destination: &str, hbone_mtls_port| Gateway { destination: destination.into(), hbone_mtls_port };
    assert_eq!(workload.waypoint, Some(gateway("net/10.0.0.9", 15009)));
    assert_eq!(workload.network_gateway, Some(gateway("ns/gate.example", 15008)));
    assert_eq!((workload.protocol, &workload.network_mode), (TunnelProtocol::Hbone, &NetworkMode::HostNetwork));
    assert_eq!((&workload.workload_type, &workload.status, workload.capacity), (&WorkloadType::Cronjob, &Health::Unhealthy, 3));
    assert_eq!(workload.application_tunnel, Some(ApplicationTunnel { protocol: ApplicationProtocol::Proxy, port: Some(15088) }));
    assert_eq!(workload.locality, Some(Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() }));
    let texts = [&workload.uid, &workload.name, &workload.namespace, &workload.trust_domain, &workload.service_account, &workload.network];
    assert_eq!(texts, ["c/apps/Deployment/ns/rich", "rich", "ns", "example.org", "account", "net"]);
    let texts =
        [&workload.workload_name, &workload.canonical_name, &workload.canonical_revision, &workload.hostname, &workload.node, &workload.cluster_id];
    assert_eq!(texts, ["rich", "rich", "v1", "rich.example", "n1", "c"]);
    assert_eq!((workload.native_tunnel, workload.authorization_policies.as_slice()), (true, ["ns/p".to_owned()].as_slice()));
    assert_eq!((workload.services.len(), workload.workload_ips.len()), (2, 2));
    let [service] = dump.services.as_slice() else { panic!("{:?}", dump.services) };
    assert_eq!((service.name.as_str(), service.namespace.as_str(), service.hostname.as_str()), ("web", "ns", "web.example"));
    assert_eq!(service.vips, ["net/10.1.0.1", "/fd00::2"]);
    assert_eq!(service.cidr_vips, [CidrVip { network: "net".into(), cidr: "10.2.0.0/16".parse().unwrap() }]);
    assert_eq!((service.ports.get(&80), service.subject_alt_names.len()), (Some(&8080), 1));
    assert_eq!(service.endpoints["c/apps/Deployment/ns/rich"].status, Health::Unhealthy, "AllowAll keeps it");
    assert_eq!(service.waypoint, Some(gateway("ns/way.example", 15008)));
    assert_eq!(service.weighted_waypoints, [Weighted { destination: gateway("net/10.0.0.9", 15008), weight: 7 }]);
    let routing_preferences = vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster];
    assert_eq!(service.load_balancer, Some(LoadBalancer { routing_preferences, mode: Mode::Failover, health_policy: HealthPolicy::AllowAll }));
    assert_eq!((service.ip_families.as_ref(), service.canonical, &service.visibility), (Some(&IpFamilies::Dual), true, &Visibility::Namespace));
    let staged = &dump.staged_services["ns/later.example"]["c/apps/Deployment/ns/rich"];
    assert_eq!((staged.workload_uid.as_str(), staged.port.get(&81)), ("c/apps/Deployment/ns/rich", Some(&0)));
    let [policy] = dump.policies.as_slice() else { panic!("{:?}", dump.policies) };
    assert_eq!((&policy.scope, &policy.action, policy.dry_run), (&PolicyScope::WorkloadSelector, &Action::Deny, true));
    let matched = &policy.rules[0][0][0];
    let texts = [Text::Exact("a".into()), Text::Prefix("b".into()), Text::Suffix("c".into()), Text::Presence([])];
    assert_eq!(matched.principals, texts);
    let lists = [matched.namespaces.len(), matched.not_namespaces.len(), matched.not_principals.len(), matched.service_accounts.len()];
    let others = [matched.not_service_accounts.len(), matched.source_ips.len(), matched.not_source_ips.len(), matched.destination_ips.len()];
    assert_eq!((lists, others, matched.not_destination_ips.len()), ([1; 4], [1; 4], 1));
    assert_eq!((matched.destination_ports.as_slice(), matched.not_destination_ports.as_slice()), ([80].as_slice(), [81].as_slice()));
    assert_eq!((dump.static_config.workloads.len(), dump.static_config.services.len(), dump.static_config.policies.len()), (1, 1, 1));
    served.stop().await;
}

#[tokio::test]
async fn the_log_filter_is_shown_changed_and_reset_by_post() {
    let (sources, _) = sources();
    let log = sources.log.clone();
    let served = served!(serve_admin, sources);
    for (query, status, filter) in [
        ("", 200, "hickory_server::server=off,info"),
        ("?level=debug", 200, "hickory_server::server=off,debug"),
        ("?level=access=off,discovery%3A%3Alocal=trace", 200, "access=off,discovery::local=trace,hickory_server::server=off,debug"),
        ("?level=loud", 400, ""),
        ("?level=", 400, ""),
        ("?lvl=info", 400, ""),
        ("?reset", 200, "hickory_server::server=off,info"),
        ("?level=warn", 200, "hickory_server::server=off,warn"),
        ("?reset=true&level=access=error", 200, "access=error,hickory_server::server=off,info"),
        ("?level=ev%0d%0ail=info", 400, ""),
    ] {
        let answer = ask(served.address, "POST", &format!("/logging{query}"), "").await;
        assert_eq!(answer.status, status, "{query}");
        if status == 200 {
            assert_eq!(answer.body, format!("current log level is {filter}\n"));
        } else {
            assert!(answer.body.contains("usage"), "{}", answer.body);
        }
    }
    assert_eq!(log.filter(), "access=error,hickory_server::server=off,info");
    served.stop().await;
}

#[tokio::test]
async fn a_rebound_name_or_a_foreign_page_gets_nothing_from_admin() {
    let (sources, shutdowns) = sources();
    let served = served!(serve_admin, sources);
    for request in [
        "POST /quitquitquit HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        "POST /quitquitquit HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\nConnection: close\r\n\r\n",
        "GET /config_dump HTTP/1.1\r\nHost: 10.0.0.1:15000\r\nConnection: close\r\n\r\n",
        "GET http://evil.example/config_dump HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        "GET /config_dump HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
    ] {
        assert_eq!(send(served.address, request).await.status, 403, "{request}");
    }
    assert_eq!(shutdowns.load(Ordering::SeqCst), 0);
    served.stop().await;
}

#[tokio::test]
async fn an_unfinished_or_oversized_header_is_cut_off() {
    let served = served!(serve_readiness, Readiness::new());
    let started = Instant::now();
    send(served.address, "GET /healthz/ready HTTP/1.1\r\nHost: loc").await;
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    let large = format!("GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(20_000));
    assert_ne!(send(served.address, &large).await.status, 200);
    assert_eq!(ask(served.address, "GET", "/healthz/ready", "").await.status, 200);
    served.stop().await;
}

#[tokio::test]
async fn one_source_cannot_hold_more_than_its_connections_and_room_comes_back() {
    let served = served!(serve_readiness, Readiness::new());
    let mut held = Vec::new();
    for _ in 0..16 {
        held.push(TcpStream::connect(served.address).await.unwrap());
    }
    assert_eq!(ask(served.address, "GET", "/healthz/ready", "").await.status, 0, "the seventeenth is closed");
    drop(held);
    let deadline = Instant::now() + Duration::from_secs(5);
    while ask(served.address, "GET", "/healthz/ready", "").await.status != 200 {
        assert!(Instant::now() < deadline, "room must come back");
    }
    served.stop().await;
}

#[tokio::test]
async fn scrapers_that_do_not_read_do_not_stop_the_end() {
    let served = served!(serve_metrics, Telemetry::default());
    let mut idle = TcpStream::connect(served.address).await.unwrap();
    idle.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    served.stop().await;
}

#[tokio::test]
async fn loopback_is_bound_and_a_taken_port_is_a_clear_error() {
    let first = listen_loopback(0, false).await.unwrap();
    let port = first[0].local_addr().unwrap().port();
    let error = listen_loopback(port, true).await.unwrap_err().to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("the admin page"), "{error}");
    for listener in listen_loopback(0, true).await.unwrap() {
        assert!(listener.local_addr().unwrap().ip().is_loopback());
    }
}

#[test]
fn the_process_log_says_how_many_lines_of_a_cause_were_suppressed() {
    static LIMIT: RateLimit = RateLimit::of("a flood", 10);
    let (handle, sink) = process_log();
    let admitted = (0..1000).filter(|_| LIMIT.admit_listed()).count();
    assert!((10..=20).contains(&admitted), "{admitted}");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(handle.flush(Duration::from_secs(5)));
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        if text.lines().any(|line| line.ends_with(&format!("log lines suppressed\tcause=\"a flood\" suppressed={}", 1000 - admitted))) {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(logging::init(LogConfig::default()).is_err(), "a second log is refused");
}
