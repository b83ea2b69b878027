//! Calls that no well-behaved proxy makes, and what our own calls look like from the other side (reference, dataplane §12.4:
//! `hbone_ip_mismatch`, `test_svc_hostname_*`, `malicious_calls_inpod`, `trust_domain_mismatch_rejected`, `test_policy`; §2.3, 2.5, 1.7).

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;

use culvert::lab::Place;
use http::{Method, Request, Response};

use crate::caller::{Answer, Ca, Caller, connect, welcome};
use crate::mesh::{Mesh, echo_on, serve_echo, serve_name, until, wait_until};
use crate::pki;

/// `caller` and `peer` are where the test sits: pods outside the mesh, with a key of whomever it likes.
const CALLS: &str = r#"
nodes: [left, {name: right, region: r1, zone: z1}]
pods:
  - {name: client, serviceAccount: client, node: left, labels: {version: v2}}
  - {name: caller, node: left, captured: false}
  - {name: server, serviceAccount: server, node: right, labels: {app: echo}, ports: [{name: web, containerPort: 9090}]}
services:
  - name: echo
    selector: {app: echo}
    ports: [{port: 80, targetPort: 8080}, {port: 81, targetPort: web}, {port: 82, targetPort: nobody}, {port: 83, targetPort: 15006}]
  - {name: other, ports: [{port: 80, targetPort: 8080}]}
"#;

const FRIEND: &str = "spiffe://cluster.local/ns/default/sa/friend";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";

fn calls() -> (Mesh, Ca) {
    let mesh = Mesh::up(CALLS);
    serve_echo(mesh.listen("server", 8080));
    serve_name(mesh.listen("server", 9090), "nine");
    let ca = Ca::load(&mesh.ca());
    (mesh, ca)
}

/// A tunnel from a pod to an address, as an identity.
fn dial(mesh: &Mesh, ca: &Ca, (pod, identity): (&str, &str), to: IpAddr) -> Result<Caller, String> {
    ca.dial(mesh.connect(pod, (to, 15008)).unwrap(), identity)
}

/// HEADERS with END_STREAM and nothing about us.
fn assert_refused(mut answer: Answer, status: u16) {
    assert_eq!(answer.status, status);
    assert!(answer.headers.is_empty(), "{:?}", answer.headers);
    assert!(answer.stream.read().is_none());
}

fn mapped(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => ip,
    }
}

/// Counts refusals before a connection's context was known.
fn refusals(mesh: &Mesh, of: &str, reporter: &str, reason: &str) -> f64 {
    mesh.metric(of, "culvert_early_refusals_total", &[&format!("reporter=\"{reporter}\""), &format!("reason=\"{reason}\"")])
}

#[test]
fn an_authority_that_is_not_the_address_dialled_is_answered_400() {
    let (mesh, ca) = calls();
    let caller = dial(&mesh, &ca, ("caller", FRIEND), mesh.ip("server")).unwrap();
    let (server, client) = (mesh.ip("server"), mesh.ip("client"));
    assert_refused(caller.connect(&format!("{client}:8080")), 400);
    mesh.wait_for_log("right", &["connection failed", "direction=\"inbound\"", &format!("ip mismatch: {server} != {client}")]);
    // The pod's other address is not the one that was dialled either, and a service's address is none of ours.
    assert_refused(caller.connect(&format!("[{}]:8080", mesh.ip6("server"))), 400);
    assert_refused(caller.connect(&format!("{}:80", mesh.vip("echo"))), 400);
    assert_refused(caller.connect("127.0.0.1:8080"), 400);
    assert_eq!(refusals(&mesh, "right", "destination", "bad_destination"), 4.0);
    // Another spelling of the same address is the same address, on the same tunnel.
    let mut answer = caller.connect(&format!("[{}]:8080", mapped(server)));
    assert_eq!(answer.status, 200);
    answer.stream.echo(b"hello");
}

#[test]
fn a_host_name_as_authority_leads_to_the_target_port_of_its_service() {
    let (mesh, ca) = calls();
    for ip in [mesh.ip("server"), mesh.ip6("server")] {
        let caller = dial(&mesh, &ca, ("caller", FRIEND), ip).unwrap();
        let mut answer = caller.connect("echo.default.svc.cluster.local:80");
        assert_eq!(answer.status, 200);
        answer.stream.echo(b"hello");
        answer.stream.finish();
        let mut answer = caller.connect("echo.default.svc.cluster.local:81");
        assert_eq!(answer.status, 200);
        assert_eq!(answer.stream.read_to_end().unwrap(), b"nine");
    }
    let line = mesh.wait_for_log("right", &["connection complete", "dst.hbone_addr=echo.default.svc.cluster.local:81"]);
    assert!(line.contains("dst.service=\"echo.default.svc.cluster.local\""), "{line}");
}

#[test]
fn what_cannot_be_resolved_or_reached_is_answered_503_and_logged_with_its_reason() {
    let (mesh, ca) = calls();
    let server = mesh.ip("server");
    let caller = dial(&mesh, &ca, ("caller", FRIEND), server).unwrap();
    let early = [
        ("nobody.default.svc.cluster.local:80".to_owned(), "no service for hostname: nobody.default.svc.cluster.local"),
        ("echo.default.svc.cluster.local:99".to_owned(), "service port unresolvable"),
        ("echo.default.svc.cluster.local:82".to_owned(), "service port unresolvable"),
        ("echo.default.svc.cluster.local:83".to_owned(), "recursive call"),
        (format!("{server}:15001"), "recursive call"),
        (format!("{server}:15006"), "recursive call"),
        (format!("{server}:15008"), "recursive call"),
        (format!("[{}]:15008", mapped(server)), "recursive call"),
    ];
    for (authority, reason) in &early {
        assert_refused(caller.connect(authority), 503);
        mesh.wait_for_log("right", &["\twarn\t", "connection failed", "direction=\"inbound\"", reason]);
    }
    assert_eq!(refusals(&mesh, "right", "destination", "loop"), 5.0);
    assert_eq!(refusals(&mesh, "right", "destination", "no_route"), 3.0);
    // From here on the connection has a context, so it has an access log line and metrics.
    assert_refused(caller.connect(&format!("{server}:9")), 503);
    let line = mesh.wait_for_log("right", &["\terror\t", "connection complete", "connection failed: ", "refused"]);
    assert!(line.contains(&format!("src.identity=\"{FRIEND}\"")), "{line}");
    wait_until("it is counted", || {
        mesh.metric("right", "istio_tcp_connections_failed_total", &["reporter=\"destination\"", "response_flags=\"CONNECT\""]) == 1.0
    });
    // None of this hurts the tunnel.
    caller.connect(&format!("{server}:8080")).stream.echo(b"still here");
}

#[test]
fn a_refusal_by_the_far_side_ends_the_applications_connection_with_a_reset() {
    let (mesh, _ca) = calls();
    // Also for a client that has said nothing, which would take an end of stream for an empty answer.
    let silent = mesh.connect("client", (mesh.ip("server"), 9)).and_then(|mut silent| silent.read(&mut [0]));
    assert_eq!(silent.map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionReset));
    let line = mesh.wait_for_log("left", &["\terror\t", "connection complete", "direction=\"outbound\"", "http status: 503"]);
    assert!(line.contains("bytes_sent=0 bytes_recv=0"), "{line}");
    // The tunnel stays and serves the next one.
    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
    assert_eq!(mesh.metric("right", "istio_tcp_sockets_open", &["reporter=\"destination\""]), 1.0);
}

#[test]
fn a_pod_that_the_mesh_does_not_know_waits_for_five_seconds_and_is_refused_everywhere() {
    let (mesh, ca) = calls();
    let server = mesh.ip("server");
    let caller = dial(&mesh, &ca, ("caller", FRIEND), server).unwrap();
    assert_eq!(caller.connect(&format!("{server}:8080")).status, 200);
    // The proxies still serve the pods, but the file names them no longer.
    let file = mesh.status().mesh_file;
    std::fs::write(file.with_extension("tmp"), r#"{"workloads": [], "services": [], "policies": []}"#).unwrap();
    std::fs::rename(file.with_extension("tmp"), &file).unwrap();
    for node in ["left", "right"] {
        wait_until("the file was read", || mesh.config_dump(node)["workloads"].as_array().is_some_and(Vec::is_empty));
    }
    let begin = std::time::Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_refused(caller.connect(&format!("{server}:8080")), 503));
        for (pod, target) in [("client", server), ("caller", mesh.ip("client"))] {
            let mesh = &mesh;
            scope.spawn(move || mesh.call_fails(pod, (target, 8080)));
        }
    });
    let took = begin.elapsed();
    assert!((4..8).contains(&took.as_secs()), "{took:?}");
    let unknown = |of: &str, reporter| refusals(&mesh, of, reporter, "unknown_workload");
    assert_eq!((unknown("right", "destination"), unknown("left", "source"), unknown("left", "destination")), (1.0, 1.0, 1.0));
    mesh.wait_for_log("right", &["connection failed", "local workload default/server"]);
}

#[test]
fn policy_sees_the_identity_of_the_certificate_and_answers_401() {
    let (mesh, ca) = calls();
    let policy = "
authorizationPolicies:
  - metadata: {name: friends, namespace: default}
    spec:
      selector: {matchLabels: {app: echo}}
      action: ALLOW
      rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/friend]}}]}]
";
    mesh.apply(&format!("{CALLS}{policy}"));
    let target = format!("{}:8080", mesh.ip("server"));
    let stranger = dial(&mesh, &ca, ("caller", "spiffe://cluster.local/ns/default/sa/stranger"), mesh.ip("server")).unwrap();
    // The file is followed with a delay of some milliseconds.
    let refused = until(|| Some(stranger.connect(&target)).filter(|answer| answer.status != 200)).unwrap();
    assert_refused(refused, 401);
    let denied = "connection closed due to policy rejection: allow policies exist, but none allowed";
    let line = mesh.wait_for_log("right", &["\terror\t", "connection complete", denied]);
    assert!(line.contains("src.identity=\"spiffe://cluster.local/ns/default/sa/stranger\""), "{line}");
    // Whoever holds a friend's key is the friend, wherever it calls from: the address proves nothing, and is shown beside the identity.
    let friend = dial(&mesh, &ca, ("caller", FRIEND), mesh.ip("server")).unwrap();
    let mut answer = friend.connect(&target);
    answer.stream.echo(b"hello");
    answer.stream.finish();
    let line = mesh.wait_for_log("right", &["\tinfo\t", "connection complete", &format!("src.identity=\"{FRIEND}\"")]);
    assert!(line.contains("src.workload=\"caller\""), "{line}");
    // The pod of the mesh is not the friend.
    assert!(mesh.call_fails("client", (mesh.ip("server"), 8080)).is_err());
    mesh.wait_for_log("left", &["\terror\t", "connection complete", "http status: 401"]);
    wait_until("both are counted", || {
        mesh.metric("right", "istio_tcp_connections_failed_total", &["reporter=\"destination\"", "response_flags=\"DENY\""]) >= 2.0
    });
}

#[test]
fn a_request_that_is_no_connect_is_answered_400() {
    let (mesh, ca) = calls();
    let server = mesh.ip("server");
    let caller = dial(&mesh, &ca, ("caller", FRIEND), server).unwrap();
    for method in [Method::GET, Method::POST, Method::OPTIONS, Method::from_bytes(b"connect").unwrap()] {
        let request = Request::builder().method(method).uri(format!("https://{server}:8080/")).body(()).unwrap();
        assert_refused(caller.ask(request).unwrap(), 400);
    }
    mesh.wait_for_log("right", &["connection failed", "method GET is not CONNECT"]);
    for authority in [format!("{server}"), format!("{server}:0"), format!("user@{server}:8080"), "under_score..:80".to_owned()] {
        assert_refused(caller.ask(connect(&authority, &[])).unwrap(), 400);
    }
    mesh.wait_for_log("right", &["connection failed", "invalid CONNECT address"]);
    assert_refused(caller.ask(connect(&format!("{server}:8080"), &[("content-length", "5")])).unwrap(), 400);
    assert_eq!(refusals(&mesh, "right", "destination", "bad_request"), 9.0);
    caller.connect(&format!("{server}:8080")).stream.echo(b"still here");
}

#[test]
fn hostile_headers_are_telemetry_and_stop_nothing() {
    let (mesh, ca) = calls();
    let target = format!("{}:8080", mesh.ip("server"));
    let caller = dial(&mesh, &ca, ("caller", FRIEND), mesh.ip("server")).unwrap();
    let hostile = [
        ("baggage", "k8s.namespace.name=a\"b\\c,,=,k8s.pod.name,k8s.cluster.name=="),
        ("baggage", "service.name=${jndi:ldap}"),
        ("forwarded", "for=;host=\"\";;host=other.default.svc.cluster.local"),
        ("traceparent", "00-zz-zz-00"),
        ("x-forwarded-network", "elsewhere"),
    ];
    let mut answer = caller.ask(connect(&target, &hostile)).unwrap();
    assert_eq!(answer.status, 200);
    answer.stream.echo(b"hello");
    answer.stream.finish();
    let line = mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\""]);
    // It says that it comes through a gateway, so its address names nobody; it names a service that is not the pod's.
    assert!(!line.contains("src.workload=\"caller\"") && !line.contains("dst.service=\"other"), "{line}");
}

#[test]
fn the_application_sees_the_address_of_the_caller_of_the_tunnel() {
    let (mesh, ca) = calls();
    let listener = mesh.listen("server", 9000);
    for (caller, server) in [(mesh.ip("caller"), mesh.ip("server")), (mesh.ip6("caller"), mesh.ip6("server"))] {
        let tunnel = dial(&mesh, &ca, ("caller", FRIEND), server).unwrap();
        let answer = tunnel.connect(&SocketAddr::from((server, 9000)).to_string());
        assert_eq!(answer.status, 200);
        let (_, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_canonical(), caller);
    }
}

#[test]
fn the_answer_describes_the_destination_and_the_requests_description_is_believed_unless_they_are_switched_off() {
    let quiet = CALLS.replace("zone: z1}", "zone: z1, env: {ENABLE_RESPONSE_BAGGAGE: \"false\"}}");
    for (definition, baggage) in [
        (
            CALLS,
            Some(
                "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.pod.name=server,service.name=echo,service.version=latest,\
                 cloud.region=r1,cloud.availability_zone=z1",
            ),
        ),
        (quiet.as_str(), None),
    ] {
        let mesh = Mesh::up(definition);
        serve_echo(mesh.listen("server", 8080));
        let ca = Ca::load(&mesh.ca());
        let caller = dial(&mesh, &ca, ("caller", FRIEND), mesh.ip("server")).unwrap();
        let answer = caller.connect(&format!("{}:8080", mesh.ip("server")));
        assert_eq!((answer.status, answer.header("baggage")), (200, baggage));
        // From another network, so that its address says nothing about it.
        let described = [("baggage", "k8s.namespace.name=abroad,service.name=traveller"), ("x-forwarded-network", "elsewhere")];
        let target = format!("{}:8080", mesh.ip("server"));
        let mut answer = caller.ask(connect(&target, &described)).unwrap();
        assert_eq!(answer.status, 200);
        answer.stream.echo(b"hello");
        answer.stream.finish();
        let line = mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", "bytes_sent=5 bytes_recv=5"]);
        assert_eq!(line.contains("src.workload=\"traveller\"") && line.contains("src.namespace=\"abroad\""), baggage.is_some(), "{line}");
        assert!(line.contains(&format!("src.identity=\"{FRIEND}\"")), "{line}");
    }
}

#[test]
fn nobody_gets_a_tunnel_without_a_certificate_of_our_ca_and_our_trust_domain() {
    let (mesh, ca) = calls();
    let server = mesh.ip("server");
    let socket = || mesh.connect("caller", (server, 15008)).unwrap();
    // None at all.
    let mut nobody = pki::credulous(rustls::crypto::aws_lc_rs::default_provider(), &[&rustls::version::TLS13]).with_no_client_auth();
    nobody.alpn_protocols = vec![b"h2".to_vec()];
    ca.dial_with(socket(), Arc::new(nobody)).map(drop).unwrap_err();
    mesh.wait_for_log("right", &["connection failed", "presented no certificate"]);
    // The right name, signed by somebody else.
    let stranger = pki::Authority::root("stranger").leaf(pki::workload(&[FRIEND]));
    ca.dial_with(socket(), Arc::new(stranger.client())).map(drop).unwrap_err();
    // Our CA, another trust domain.
    ca.dial(socket(), "spiffe://elsewhere.test/ns/default/sa/friend").map(drop).unwrap_err();
    mesh.wait_for_log("right", &["connection failed", "trust domain mismatch"]);
    assert_eq!(refusals(&mesh, "right", "destination", "handshake"), 3.0);
    // None of them counts as a connection.
    assert_eq!(mesh.metric("right", "istio_tcp_connections_opened_total", &[]), 0.0);
    dial(&mesh, &ca, ("caller", FRIEND), server).unwrap();
}

#[test]
fn pods_of_different_trust_domains_do_not_reach_each_other() {
    let mesh = Mesh::up(
        "
nodes: [left, right]
pods:
  - {name: ours, serviceAccount: ours, node: left}
  - {name: theirs, serviceAccount: theirs, node: right, trustDomain: elsewhere.test}
",
    );
    for (from, to, near, far) in [("ours", "theirs", "left", "right"), ("theirs", "ours", "right", "left")] {
        serve_echo(mesh.listen(to, 8080));
        assert_eq!(mesh.call_fails(from, (mesh.ip(to), 8080)), Err(std::io::ErrorKind::ConnectionReset));
        mesh.wait_for_log(far, &["connection failed", "direction=\"inbound\"", "trust domain mismatch"]);
        mesh.wait_for_log(near, &["\terror\t", "connection complete", "direction=\"outbound\"", &format!("dst.workload=\"{to}\"")]);
        // It is the same the second time, and nothing was let through in between.
        assert!(mesh.call_fails(from, (mesh.ip(to), 8080)).is_err());
        // A refusal that comes after the client's half of the handshake is tried again on new tunnels, but not for ever.
        wait_until("both were refused", || refusals(&mesh, far, "destination", "handshake") >= 2.0);
        let refused = refusals(&mesh, far, "destination", "handshake");
        assert!(refused <= 6.0, "{refused}");
    }
}

/// A pod outside of the mesh that the mesh takes for a member with service account `peer`: the test speaks for it.
const PEER: &str = r#"
nodes: [left, {name: right, region: r1, zone: z1}]
pods:
  - {name: client, serviceAccount: client, node: left, labels: {app: shop, version: v2}}
  - {name: peer, node: right, captured: false}
services:
  - {name: peer, ports: [{port: 80, targetPort: 8080}]}
extra:
  workloads:
    - uid: Kubernetes//Pod/default/member
      name: member
      namespace: default
      serviceAccount: peer
      workloadIps: [10.244.2.2, "fd00:10:244:2::2"]
      protocol: HBONE
      services: {"default/peer.default.svc.cluster.local": {"80": 8080}}
"#;

const PEER_IDENTITY: &str = "spiffe://cluster.local/ns/default/sa/peer";

fn peer_mesh(more: &str) -> (Mesh, Ca) {
    let mesh = Mesh::up(&format!("{PEER}{more}"));
    assert_eq!((mesh.ip("peer").to_string(), mesh.ip6("peer").to_string()), ("10.244.2.2".into(), "fd00:10:244:2::2".into()));
    let ca = Ca::load(&mesh.ca());
    (mesh, ca)
}

#[test]
fn our_connect_carries_the_authority_the_source_and_the_client() {
    let (mesh, ca) = peer_mesh("");
    let peer = ca.serve(mesh.listen("peer", 15008), PEER_IDENTITY, welcome);
    let baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.pod.name=client,service.name=shop,service.version=v2";
    let mut traces = Vec::new();
    for (target, hop, host) in [
        (mesh.ip("peer"), mesh.ip("peer"), ""),
        (mesh.ip6("peer"), mesh.ip6("peer"), ""),
        (mesh.vip("peer"), mesh.ip("peer"), ";host=peer.default.svc.cluster.local"),
    ] {
        let port = if host.is_empty() { 8080 } else { 80 };
        let mut socket = mesh.connect("client", (target, port)).unwrap();
        echo_on(&mut socket, b"hello").unwrap();
        let asked = peer.asked();
        assert_eq!(asked.method, Method::CONNECT);
        assert_eq!(asked.authority, SocketAddr::new(hop, 8080).to_string());
        assert_eq!((asked.scheme.as_deref(), asked.path.as_str()), (None, ""));
        assert_eq!(asked.identity, "spiffe://cluster.local/ns/default/sa/client");
        assert_eq!(asked.header("baggage"), baggage);
        // The application's own address and port, as the far side would see them without us.
        let client = SocketAddr::new(socket.local_addr().unwrap().ip().to_canonical(), socket.local_addr().unwrap().port());
        assert_eq!(asked.header("forwarded"), format!("for=\"{client}\"{host}"));
        assert_eq!(asked.from.ip().to_canonical(), client.ip());
        let trace = asked.header("traceparent").to_owned();
        let parts: Vec<&str> = trace.split('-').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [2, 32, 16, 2], "{trace}");
        assert!(trace.starts_with("00-") && trace.ends_with("-00") && trace.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()));
        assert_eq!(asked.headers.len(), 3, "{:?}", asked.headers);
        traces.push(trace);
    }
    traces.sort();
    traces.dedup();
    assert_eq!(traces.len(), 3, "each connection has a trace of its own");
    // The second IPv4 connection shared the tunnel of the first; that of IPv6 had its own.
    assert_eq!(peer.connections(), 2);
}

#[test]
fn a_server_with_another_identity_is_refused_and_not_pooled() {
    let (mesh, ca) = peer_mesh("");
    let peer = ca.serve(mesh.listen("peer", 15008), SERVER, welcome);
    for attempt in 1..=2 {
        assert_eq!(mesh.call_fails("client", (mesh.ip("peer"), 8080)), Err(std::io::ErrorKind::ConnectionReset));
        let expected = format!("identity mismatch: the peer is {SERVER}, expected {PEER_IDENTITY}");
        mesh.wait_for_log("left", &["\terror\t", "connection complete", "direction=\"outbound\"", &expected]);
        let flagged = || mesh.metric("left", "istio_tcp_connections_failed_total", &["response_flags=\"TLS_FAILURE\""]);
        wait_until("it is counted", || flagged() == f64::from(attempt));
        wait_until("it was dialled anew", || peer.connections() == attempt as usize);
    }
    assert!(peer.is_silent(), "a request was sent to somebody else");
    // Nor is one whose certificate is signed by somebody else.
    drop(peer);
}

#[test]
fn a_server_of_another_ca_or_without_tls_is_refused() {
    let (mesh, _) = peer_mesh("");
    let strangers = tempfile::tempdir().unwrap();
    let root = pki::Authority::root("stranger");
    root.write(strangers.path(), &root);
    let stranger = Ca::load(strangers.path());
    let listener = mesh.listen("peer", 15008);
    let peer = stranger.serve(listener.try_clone().unwrap(), PEER_IDENTITY, welcome);
    assert!(mesh.call_fails("client", (mesh.ip("peer"), 8080)).is_err());
    let flagged = || mesh.metric("left", "istio_tcp_connections_failed_total", &["response_flags=\"TLS_FAILURE\""]);
    wait_until("it is counted", || flagged() == 1.0);
    assert!(peer.is_silent());
    drop((peer, stranger));
    listener.set_nonblocking(false).unwrap();
    serve_name(listener, "220 not TLS at all\r\n");
    assert!(mesh.call_fails("client", (mesh.ip("peer"), 8080)).is_err());
    wait_until("it is counted", || flagged() == 2.0);
}

#[test]
fn a_goaway_of_the_peer_lets_streams_finish_and_the_next_connection_dials_anew() {
    let (mesh, ca) = peer_mesh("");
    let peer = ca.serve(mesh.listen("peer", 15008), PEER_IDENTITY, welcome);
    let target = (mesh.ip("peer"), 8080);
    let mut first = mesh.connect("client", target).unwrap();
    echo_on(&mut first, b"before").unwrap();
    peer.say_goaway();
    // Whatever the moment at which the GOAWAY arrives, a new connection works, and soon on a tunnel of its own.
    wait_until("a new tunnel was dialled", || {
        mesh.echo("client", target).unwrap();
        peer.connections() == 2
    });
    echo_on(&mut first, b"after").unwrap();
    drop(first);
    mesh.echo("client", target).unwrap();
    assert_eq!(peer.connections(), 2);
    wait_until("all ended well", || mesh.metric("left", "istio_tcp_connections_closed_total", &["response_flags=\"-\""]) >= 3.0);
    assert_eq!(mesh.metric("left", "istio_tcp_connections_failed_total", &[]), 0.0);
}

#[test]
fn an_answer_other_than_200_is_an_error_and_keeps_the_tunnel() {
    let (mesh, ca) = peer_mesh("");
    let peer = ca.serve(mesh.listen("peer", 15008), PEER_IDENTITY, |asked| {
        let port: u16 = asked.authority.rsplit(':').next().unwrap().parse().unwrap();
        Response::builder().status(port - 8000).body(()).unwrap()
    });
    for status in [204, 302, 400, 401, 404, 503] {
        assert!(mesh.call_fails("client", (mesh.ip("peer"), 8000 + status)).is_err());
        mesh.wait_for_log("left", &["\terror\t", "connection complete", &format!("http status: {status}")]);
    }
    mesh.echo("client", (mesh.ip("peer"), 8200)).unwrap();
    assert_eq!(peer.connections(), 1);
}

#[test]
fn a_peer_that_stops_answering_pings_loses_its_streams_and_is_dialled_anew_when_it_is_back() {
    let mesh = Mesh::up(
        "
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: server, serviceAccount: server, node: right}
proxyEnv: {CULVERT_PING_INTERVAL: 200ms, CULVERT_PING_TIMEOUT: 400ms, CULVERT_HANDSHAKE_DEADLINE: 1s}
",
    );
    serve_echo(mesh.listen("server", 8080));
    let target = (mesh.ip("server"), 8080);
    let mut socket = mesh.connect("client", target).unwrap();
    echo_on(&mut socket, b"hello").unwrap();
    // Pings are answered on an idle tunnel, or this would not outlive them.
    std::thread::sleep(std::time::Duration::from_secs(1));
    echo_on(&mut socket, b"still here").unwrap();
    let proxy = nix::unistd::Pid::from_raw(mesh.proxy_pid("right"));
    nix::sys::signal::kill(proxy, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let mut rest = Vec::new();
    let ended = socket.read_to_end(&mut rest);
    assert_eq!(ended.map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionReset));
    mesh.wait_for_log("left", &["no answer to PING within 400ms"]);
    // The kernel still takes connections for the frozen process: the handshake's deadline ends the attempt.
    assert!(mesh.call_fails("client", target).is_err());
    mesh.wait_for_log("left", &["\terror\t", "connection complete", "not finished within 1s"]);
    nix::sys::signal::kill(proxy, nix::sys::signal::Signal::SIGCONT).unwrap();
    mesh.echo("client", target).unwrap();
}

#[test]
fn a_server_may_have_any_identity_that_the_service_names_but_only_through_the_service() {
    let service = r#"
  services:
    - name: shop
      namespace: default
      hostname: shop.default.svc.cluster.local
      vips: [/10.96.9.9]
      ports: {"80": 8080}
      endpoints: {"Kubernetes//Pod/default/member": {workloadUid: Kubernetes//Pod/default/member, port: {"80": 8080}}}
"#;
    let (mesh, ca) = peer_mesh(&format!("{service}      subjectAltNames: [{SERVER}]\n"));
    let peer = ca.serve(mesh.listen("peer", 15008), SERVER, welcome);
    let vip: IpAddr = "10.96.9.9".parse().unwrap();
    mesh.echo("client", (vip, 80)).unwrap();
    assert_eq!(peer.asked().authority, "10.244.2.2:8080");
    assert_eq!(mesh.call_fails("client", (mesh.ip("peer"), 8080)), Err(std::io::ErrorKind::ConnectionReset));
    mesh.wait_for_log("left", &["\terror\t", "connection complete", &format!("identity mismatch: the peer is {SERVER}, expected {PEER_IDENTITY}")]);
    assert!(peer.is_silent());
}

/// What a call must count as.
#[derive(Debug, Clone, Copy)]
enum Counted {
    /// Refused early on this side for this reason: of, reporter, reason.
    Early(&'static str, &'static str, &'static str),
    /// Carried to the far side and refused there as a loop: the near proxy, the far one.
    FarLoop(&'static str, &'static str),
    /// Nobody listens there.
    Refused,
}

#[test]
fn calls_to_the_proxys_own_ports_fail_and_never_loop() {
    let mesh = Mesh::up(
        "
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: alone, serviceAccount: alone, node: left, dedicated: true}
  - {name: outside, node: left, captured: false}
  - {name: server, serviceAccount: server, node: right}
",
    );
    let loopback: [IpAddr; 4] =
        [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), Ipv4Addr::new(127, 1, 2, 3).into()];
    let addresses = |pod| [mesh.ip(pod), mesh.ip6(pod), mapped(mesh.ip(pod))];
    let mut calls = Vec::new();
    for (pod, own) in [("client", "left"), ("alone", "alone")] {
        for ip in loopback {
            calls.push((pod, ip, 15001, Counted::Early(own, "source", "loop")));
            calls.push((pod, ip, 15006, Counted::Early(own, "destination", "loop")));
            calls.push((pod, ip, 15008, Counted::Early(own, "destination", "handshake")));
        }
        for ip in addresses(pod) {
            calls.push((pod, ip, 15001, Counted::Early(own, "source", "loop")));
            calls.push((pod, ip, 15006, Counted::Early(own, "destination", "loop")));
            calls.push((pod, ip, 15008, Counted::Early(own, "destination", "handshake")));
        }
        for ip in addresses("server") {
            calls.extend([15001, 15006, 15008].map(|port| (pod, ip, port, Counted::FarLoop(own, "right"))));
        }
    }
    for ip in loopback {
        calls.extend([15001, 15006, 15008].map(|port| ("outside", ip, port, Counted::Refused)));
    }
    for (pod, of) in [("client", "left"), ("alone", "alone"), ("server", "right")] {
        for ip in addresses(pod) {
            calls.extend([15001, 15006].map(|port| ("outside", ip, port, Counted::Early(of, "destination", "loop"))));
            calls.push(("outside", ip, 15008, Counted::Early(of, "destination", "handshake")));
        }
    }
    let proxies = ["left", "alone", "right"];
    let failed = |of: &str| mesh.metric(of, "istio_tcp_connections_failed_total", &["reporter=\"source\"", "response_flags=\"CONNECT\""]);
    let before: Vec<_> = proxies.map(|of| (mesh.log(of).len(), cpu(mesh.proxy_pid(of)))).into();
    for (pod, ip, port, counted) in &calls {
        let target = SocketAddr::new(*ip, *port);
        let sum = |counted: &Counted| match counted {
            Counted::Early(of, reporter, reason) => refusals(&mesh, of, reporter, reason),
            Counted::FarLoop(near, far) => failed(near) + refusals(&mesh, far, "destination", "loop"),
            Counted::Refused => 0.0,
        };
        let counts = sum(counted);
        match (mesh.run_in(Place::Pod(pod), || TcpStream::connect_timeout(&target, crate::mesh::PATIENCE)), counted) {
            (Err(error), Counted::Refused) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{pod} → {target}"),
            (Err(error), _) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{pod} → {target}: {error}"),
            (Ok(_), Counted::Refused) => panic!("{pod} → {target} is connected"),
            (connected, _) => {
                // A reset may be faster than we look.
                if let Ok(socket) = connected {
                    socket.set_read_timeout(Some(crate::mesh::PATIENCE)).unwrap();
                    ends_with_an_alert_at_most(socket);
                }
                let more = if matches!(counted, Counted::FarLoop(..)) { 2.0 } else { 1.0 };
                wait_until(&format!("{pod} → {target} counts as {counted:?}"), || sum(counted) >= counts + more);
                assert_eq!(sum(counted), counts + more, "{pod} → {target} counts as {counted:?} more than once");
            }
        }
    }
    for (of, (lines, used)) in proxies.iter().zip(before) {
        wait_until("nothing of it is left but idle tunnels", || {
            mesh.metric(of, "istio_tcp_sockets_open", &["reporter=\"source\""]) == 0.0
                && mesh.metric(of, "istio_tcp_sockets_open", &["reporter=\"destination\""]) <= 6.0
        });
        let lines = mesh.log(of).len() - lines;
        assert!(lines <= 2 * calls.len(), "{lines} lines for {} calls in the log of {of}", calls.len());
        let used = cpu(mesh.proxy_pid(of)) - used;
        assert!(used < 3.0, "{of} used {used} s of CPU for {} calls", calls.len());
    }
    mesh.wait_for_log("left", &["\twarn\t", "connection failed", "direction=\"outbound\"", "recursive call: 127.0.0.1:15001"]);
    mesh.wait_for_log("right", &["\twarn\t", "connection failed", "direction=\"inbound\"", "recursive call"]);
}

#[test]
fn a_pod_that_calls_its_own_proxy_is_refused_at_once_whatever_the_mesh_knows_of_it() {
    let mesh = Mesh::up("nodes: [left]\npods:\n  - {name: client, serviceAccount: client, node: left}\n");
    // The mesh knows nothing of these.
    let unknown: [IpAddr; 2] = ["10.250.0.1".parse().unwrap(), "fd00:250::1".parse().unwrap()];
    mesh.run_in(Place::Pod("client"), || {
        let links = culvert::sys::link::Links::open().unwrap();
        for ip in unknown {
            links.add_address("eth0", ipnet::IpNet::from(ip)).unwrap();
        }
    });
    let known = [mesh.ip("client"), mesh.ip6("client")];
    let used = cpu(mesh.proxy_pid("left"));
    let mut count = 0.0;
    for of_the_mesh in [true, false] {
        if !of_the_mesh {
            // Now it knows nothing of the pod either, for whom a connection would wait for seconds.
            let file = mesh.status().mesh_file;
            std::fs::write(file.with_extension("tmp"), r#"{"workloads": [], "services": [], "policies": []}"#).unwrap();
            std::fs::rename(file.with_extension("tmp"), &file).unwrap();
            wait_until("the file was read", || mesh.config_dump("left")["workloads"].as_array().is_some_and(Vec::is_empty));
        }
        for ip in unknown.into_iter().chain(known).flat_map(|ip| [ip, mapped(ip)]) {
            for (port, listened) in [(15001, true), (15006, true), (15053, false), (15080, false)] {
                let (target, begin) = (SocketAddr::new(ip, port), std::time::Instant::now());
                let connected = mesh.run_in(Place::Pod("client"), || TcpStream::connect_timeout(&target, crate::mesh::PATIENCE));
                match (connected, listened) {
                    (Err(error), false) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{target}"),
                    (Ok(_), false) => panic!("{target} is connected"),
                    (connected, true) => {
                        if let Ok(socket) = connected {
                            socket.set_read_timeout(Some(crate::mesh::PATIENCE)).unwrap();
                            ends_with_an_alert_at_most(socket);
                        }
                        count += 1.0;
                        let loops = || refusals(&mesh, "left", "source", "loop") + refusals(&mesh, "left", "destination", "loop");
                        wait_until(&format!("{target} is refused"), || loops() >= count);
                        assert_eq!(loops(), count, "{target}");
                    }
                }
                assert!(begin.elapsed() < std::time::Duration::from_secs(3), "{target}: {:?}", begin.elapsed());
            }
        }
    }
    // Ten of these lines a second at most; the first are there.
    mesh.wait_for_log(
        "left",
        &["\twarn\t", "connection failed", "direction=\"outbound\"", "recursive call: 10.250.0.1:15001 is a port of this proxy"],
    );
    mesh.wait_for_log(
        "left",
        &["\twarn\t", "connection failed", "direction=\"inbound\"", "recursive call: 10.250.0.1:15006 is a port of this proxy"],
    );
    wait_until("nothing of it is left", || mesh.metric("left", "istio_tcp_sockets_open", &[]) == 0.0);
    assert_eq!(mesh.metric("left", "istio_tcp_connections_opened_total", &[]), 0.0);
    let used = cpu(mesh.proxy_pid("left")) - used;
    assert!(used < 2.0, "{used} s of CPU");
}

/// Says something that is no TLS and waits for the end of the connection; a TLS alert may come before it.
fn ends_with_an_alert_at_most(mut socket: TcpStream) {
    let _ = socket.write_all(b"GET / HTTP/1.1\r\n\r\n");
    let mut got = Vec::new();
    if let Err(error) = socket.read_to_end(&mut got) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert!(got.is_empty() || (got.len() == 7 && got[0] == 21), "an answer came: {got:?}");
}

/// Seconds of CPU that a process has used.
fn cpu(pid: i32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // Fields 14 and 15 of proc(5), in ticks of 10 ms; the first of these is field 3.
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}
