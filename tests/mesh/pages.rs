//! The pages of real proxies that carry traffic: `config_dump` as istioctl reads it, and every family of metrics (reference, dataplane §10.2 and §10.4).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::config_dump::{Action, ConfigDump, Health, PodInfo, PodPhase, PolicyScope, Protocol, TunnelProtocol, WorkloadType};
use crate::mesh::{Mesh, echo_on, serve_echo, wait_until};

const LAB: &str = r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: server, serviceAccount: server, node: right, labels: {app: web, version: v1}}
  - {name: plain, node: right, captured: false}
  - {name: way, serviceAccount: way, node: right, labels: {app: way}, captured: false, nativeTunnel: true}
services:
  - {name: way, selector: {app: way}, ports: [{port: 15008}]}
  - {name: web, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
  - {name: guarded, selector: {app: web}, ports: [{port: 80, targetPort: 8080}], waypoint: way}
authorizationPolicies:
- metadata: {name: let-in}
  spec: {selector: {matchLabels: {app: web}}, action: ALLOW, rules: [{from: [{source: {serviceAccounts: [client]}}], to: [{operation: {ports: ["8080"]}}]}]}
"#;

fn dump(mesh: &Mesh, of: &str) -> ConfigDump {
    let page = mesh.config_dump(of);
    serde_path_to_error::deserialize(&page).unwrap_or_else(|error| panic!("config_dump of {of}: {error}\n{page:#}"))
}

#[test]
fn config_dump_of_a_busy_proxy_is_what_istioctl_reads() {
    let mesh = Mesh::with_control_plane(LAB);
    for pod in ["server", "plain"] {
        serve_echo(mesh.listen(pod, 8080));
    }
    let targets = [SocketAddr::new(mesh.vip("web"), 80), SocketAddr::new(mesh.ip("plain"), 8080)];
    let mut sockets = targets.map(|target| mesh.connect("client", target).unwrap());
    for socket in &mut sockets {
        echo_on(socket, b"hello").unwrap();
    }
    let (left, right) = (dump(&mesh, "left"), dump(&mesh, "right"));
    assert!(left.workloads.is_sorted_by_key(|workload| workload.uid.clone()) && left.services.is_sorted_by_key(|service| service.hostname.clone()));

    let server = left.workloads.iter().find(|workload| workload.name == "server").unwrap();
    assert_eq!((server.protocol, &server.status, &server.workload_type), (TunnelProtocol::Hbone, &Health::Healthy, &WorkloadType::Pod));
    assert_eq!((server.node.as_str(), server.service_account.as_str(), server.canonical_revision.as_str()), ("right", "server", "v1"));
    assert!(server.workload_ips.contains(&mesh.ip("server")) && server.workload_ips.contains(&mesh.ip6("server")));
    assert_eq!(server.authorization_policies, ["default/let-in"]);
    assert_eq!(server.services, ["default/guarded.default.svc.cluster.local", "default/web.default.svc.cluster.local"]);
    assert!(left.workloads.iter().any(|workload| workload.name == "plain" && workload.protocol == TunnelProtocol::Tcp));
    let guarded = left.services.iter().find(|service| service.name == "guarded").unwrap();
    let waypoint = guarded.waypoint.as_ref().unwrap();
    assert_eq!((waypoint.destination.as_str(), waypoint.hbone_mtls_port), ("default/way.default.svc.cluster.local", 15008));
    assert!(guarded.vips.iter().all(|vip| vip.starts_with('/')), "network/ip: {:?}", guarded.vips);
    let endpoint = &guarded.endpoints[&server.uid];
    assert_eq!((&endpoint.workload_uid, &endpoint.port), (&server.uid, &BTreeMap::from([(80, 8080)])));
    let [policy] = left.policies.as_slice() else { panic!("one policy: {:?}", left.policies) };
    assert_eq!(
        (policy.name.as_str(), &policy.scope, &policy.action, policy.dry_run),
        ("let-in", &PolicyScope::WorkloadSelector, &Action::Allow, false)
    );
    assert!(policy.rules.iter().flatten().flatten().any(|matched| matched.destination_ports == [8080]));

    let [certificate] = left.certificates.as_slice() else { panic!("one identity: {:?}", left.certificates) };
    assert_eq!((certificate.identity.as_str(), certificate.state.as_str()), ("spiffe://cluster.local/ns/default/sa/client", "Available"));
    for entry in certificate.cert_chain.iter().chain(&certificate.root_certs) {
        use base64::Engine;
        let pem = base64::prelude::BASE64_STANDARD.decode(&entry.pem).unwrap();
        assert!(pem.starts_with(b"-----BEGIN CERTIFICATE-----"));
        assert!(
            entry.serial_number.bytes().all(|byte| byte.is_ascii_digit()) && entry.valid_from.ends_with('Z') && entry.expiration_time.ends_with('Z')
        );
    }
    assert!(!certificate.cert_chain.is_empty() && !certificate.root_certs.is_empty());

    let [pod] = left.workload_state.values().collect::<Vec<_>>()[..] else { panic!("one pod: {:?}", left.workload_state) };
    assert_eq!(pod.info, PodInfo { name: "client".into(), namespace: "default".into(), service_account: "client".into() });
    assert_eq!(pod.state, PodPhase::Up);
    let connections = pod.connections.as_ref().unwrap();
    let outbound: BTreeMap<_, _> = connections.outbound.iter().map(|it| (it.original_dst, (it.actual_dst, &it.protocol))).collect();
    let expected = [(targets[0], (SocketAddr::new(mesh.ip("server"), 15008), &Protocol::Hbone)), (targets[1], (targets[1], &Protocol::Tcp))];
    assert_eq!((outbound, connections.inbound.len()), (expected.into_iter().collect(), 0));
    let inbound = &right.workload_state.values().next().unwrap().connections.as_ref().unwrap().inbound;
    let [inbound] = inbound.as_slice() else { panic!("one connection: {inbound:?}") };
    assert_eq!(
        (inbound.src.ip(), inbound.actual_dst, &inbound.protocol),
        (mesh.ip("client"), SocketAddr::new(mesh.ip("server"), 8080), &Protocol::Hbone)
    );
    assert_eq!(inbound.original_dst.as_deref(), Some("web.default.svc.cluster.local"), "the service that the request names");
    assert_eq!(left.version.version, env!("CARGO_PKG_VERSION"));
    assert_eq!((left.config["localNode"].as_str(), left.config["inpodPortReuse"].as_bool()), (Some("left"), Some(true)));
    assert!(left.static_config.workloads.is_empty() && left.staged_services.is_empty());
}

/// Families of the reference (dataplane §10.4) that a proxy of this mesh shows: name, type, and the labels in their order. Those of revocation lists
/// are in the tests of revocation, those of DNS in the tests of DNS.
fn families() -> Vec<(&'static str, &'static str, &'static str)> {
    const L: &str = "reporter source_workload source_canonical_service source_canonical_revision source_workload_namespace source_principal \
        source_app source_version source_cluster destination_service destination_service_namespace destination_service_name destination_workload \
        destination_canonical_service destination_canonical_revision destination_workload_namespace destination_principal destination_app \
        destination_version destination_cluster request_protocol response_flags connection_security_policy source_region source_zone \
        destination_region destination_zone";
    vec![
        ("istio_build", "gauge", "component tag"),
        ("istio_tcp_connections_opened", "counter", L),
        ("istio_tcp_connections_closed", "counter", L),
        ("istio_tcp_connections_failed", "counter", L),
        ("istio_tcp_received_bytes", "counter", L),
        ("istio_tcp_sent_bytes", "counter", L),
        ("istio_tcp_sockets_open", "gauge", "reporter"),
        ("istio_xds_message", "counter", "url"),
        ("istio_xds_message_bytes", "counter", "url"),
        ("istio_xds_connection_terminations", "counter", "reason"),
        ("workload_manager_active_proxy_count", "gauge", ""),
        ("workload_manager_pending_proxy_count", "gauge", ""),
        ("workload_manager_proxies_started", "counter", ""),
        ("workload_manager_proxies_stopped", "counter", ""),
        ("process_open_fds", "gauge", ""),
        ("process_max_fds", "gauge", ""),
        ("tokio_num_workers", "gauge", ""),
        ("tokio_global_queue_depth", "gauge", ""),
        ("tokio_num_alive_tasks", "gauge", ""),
        ("tokio_worker_total_busy_duration_seconds", "counter", "worker"),
        ("tokio_worker_park_count", "counter", "worker"),
        ("tokio_worker_park_unpark_count", "counter", "worker"),
    ]
}

/// Names of the labels of a line, in order.
fn labels(line: &str) -> String {
    let Some((_, rest)) = line.split_once('{') else { return String::new() };
    let pairs = rest.rsplit_once('}').unwrap().0;
    pairs.split("\",").map(|pair| pair.split_once('=').unwrap().0).collect::<Vec<_>>().join(" ")
}

/// What of these families a page shows, and what is wrong with those that it shows.
fn shown(page: &str) -> BTreeSet<&'static str> {
    let mut shown = BTreeSet::new();
    for (name, kind, expected) in families() {
        let suffix = if kind == "counter" { "_total" } else { "" };
        let sample = format!("{name}{suffix}");
        let lines: Vec<&str> = page.lines().filter(|line| line.strip_prefix(&sample).is_some_and(|rest| rest.starts_with(['{', ' ']))).collect();
        if lines.is_empty() {
            continue;
        }
        assert!(page.contains(&format!("# TYPE {name} {kind}\n")) && page.contains(&format!("# HELP {name} ")), "{name}\n{page}");
        for line in lines {
            // Regions and zones are left out when neither end is known.
            let found = labels(line);
            assert!(
                found == expected || expected.strip_suffix(" source_region source_zone destination_region destination_zone") == Some(&found),
                "{line}"
            );
        }
        shown.insert(name);
    }
    shown
}

#[test]
fn every_family_of_metrics_is_on_the_page_with_its_type_and_labels() {
    let mesh = Mesh::with_control_plane(LAB);
    serve_echo(mesh.listen("server", 8080));
    mesh.echo("client", (mesh.vip("web"), 80)).unwrap();
    // No waypoint listens: a failure.
    let _ = mesh.call_fails("client", (mesh.vip("guarded"), 80));
    let page = || mesh.page("left", 15020, "/metrics").1;
    let missing = |page: &str| {
        let shown = shown(page);
        families().into_iter().map(|family| family.0).filter(|name| !shown.contains(name)).collect::<Vec<_>>()
    };
    // Counters that count only what goes wrong are not there before it did.
    let rare = ["istio_xds_connection_terminations"];
    wait_until("both connections have ended", || mesh.metric("left", "istio_tcp_connections_closed_total", &[]) >= 2.0);
    let missing = missing(&page()).into_iter().filter(|name| !rare.contains(name)).collect::<Vec<_>>();
    assert_eq!(missing, Vec::<&str>::new(), "{}", page());
    let opened = mesh.metric("left", "istio_tcp_connections_opened_total", &["reporter=\"source\""]);
    assert_eq!((opened, mesh.metric("left", "istio_tcp_connections_failed_total", &["response_flags=\"CONNECT\""])), (2.0, 1.0));
    assert_eq!(mesh.metric("left", "istio_build", &["component=\"ztunnel\""]), 1.0);
    assert_eq!(mesh.metric("left", "workload_manager_active_proxy_count", &[]), 1.0);
    for url in ["type.googleapis.com/istio.workload.Address", "type.googleapis.com/istio.security.Authorization"] {
        assert!(mesh.metric("left", "istio_xds_message_total", &[&format!("url=\"{url}\"")]) >= 1.0, "{url}");
    }
    let unstable = |name: &str| page().lines().any(|line| line.starts_with(&format!("# HELP {name} ")) && line.contains("(unstable)"));
    assert!(unstable("istio_tcp_sockets_open") && unstable("istio_xds_message") && !unstable("istio_tcp_connections_opened"));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(mesh.status().control.unwrap().host_pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until("the end of the stream is counted", || shown(&page()).contains(rare[0]));
}
