//! Which endpoint of a service a connection gets (reference, dataplane §3.2, 3.4, 3.6; §12.4: `service_loadbalancing`).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::net::{IpAddr, TcpListener};

use crate::mesh::{Mesh, serve_name, until, wait_until};

/// Asks so many times, and counts who answers; an error counts by its kind.
fn answers(mesh: &Mesh, client: &str, target: (IpAddr, u16), times: usize) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..times {
        let answer = mesh.ask_name(client, target).unwrap_or_else(|error| format!("{:?}", error.kind()));
        *counts.entry(answer).or_insert(0) += 1;
    }
    counts
}

/// Waits until exactly these answer, each of them, in fifteen calls of which the file's new content must decide all.
fn only(mesh: &Mesh, client: &str, target: (IpAddr, u16), expected: &[&str]) {
    let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
    let mut last = BTreeSet::new();
    let found = until(|| {
        last = answers(mesh, client, target, 15).into_keys().collect();
        (last == expected).then_some(())
    });
    assert!(found.is_some(), "{client} → {target:?}: {last:?} answer, not {expected:?}");
}

/// Refused with this reason, and the application sees a reset.
fn refused(mesh: &Mesh, (client, node): (&str, &str), target: (IpAddr, u16)) {
    let reason = format!("no healthy upstream: {}", std::net::SocketAddr::from(target));
    let before = mesh.log(node).len();
    // What was applied may take a moment to arrive.
    wait_until("it is refused", || {
        let _ = mesh.ask_name(client, target);
        mesh.log(node).iter().skip(before).any(|line| line.contains(&reason))
    });
    assert_eq!(mesh.call_fails(client, target), Err(io::ErrorKind::ConnectionReset));
    mesh.wait_for_log(node, &["\twarn\t", "connection failed", "direction=\"outbound\"", &reason]);
}

/// Tells everybody at which of its addresses it was reached.
fn serve_address(listener: TcpListener) {
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let own = socket.local_addr().unwrap().ip().to_canonical();
            let _ = socket.write_all(own.to_string().as_bytes());
        }
    });
}

const FARM: &str = "
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: one, node: left, labels: {app: farm}}
  - {name: two, node: right, labels: {app: farm}}
  - {name: three, node: right, labels: {app: farm}}
services:
  - {name: farm, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}]}
";

fn farm() -> Mesh {
    let mesh = Mesh::up(FARM);
    for pod in ["one", "two", "three"] {
        serve_name(mesh.listen(pod, 8080), pod);
    }
    mesh
}

#[test]
fn endpoints_are_chosen_by_weight_and_one_of_weight_zero_never() {
    let mesh = farm();
    let vip = (mesh.vip("farm"), 80);
    only(&mesh, "client", vip, &["one", "two", "three"]);
    let weights = |one: u32, two: u32, three: u32| {
        let weighed = |text: String, (pod, weight): (&str, u32)| text.replace(&format!("name: {pod},"), &format!("name: {pod}, capacity: {weight},"));
        [("one", one), ("two", two), ("three", three)].into_iter().fold(FARM.to_owned(), weighed)
    };
    mesh.apply(&weights(1, 3, 0));
    only(&mesh, "client", vip, &["one", "two"]);
    let counts = answers(&mesh, "client", vip, 200);
    // Expected 150 of 200 with a standard deviation of 6: five of them are a chance of one in a million.
    assert!((120..=180).contains(&counts["two"]) && counts.len() == 2, "{counts:?}");
    mesh.apply(&weights(0, 0, 7));
    only(&mesh, "client", vip, &["three"]);
    mesh.apply(&weights(0, 0, 0));
    refused(&mesh, ("client", "left"), vip);
}

#[test]
fn endpoints_that_are_not_ready_take_nothing_unless_the_service_publishes_them() {
    let mesh = farm();
    let vip = (mesh.vip("farm"), 80);
    let sick =
        |pods: &[&str]| pods.iter().fold(FARM.to_owned(), |text, pod| text.replace(&format!("name: {pod},"), &format!("name: {pod}, ready: false,")));
    mesh.apply(&sick(&["one", "three"]));
    only(&mesh, "client", vip, &["two"]);
    // By its own address a pod is reached, however it is.
    assert_eq!(mesh.ask_name("client", (mesh.ip("one"), 8080)).unwrap(), "one");
    let all = &["one", "two", "three"];
    mesh.apply(&sick(all));
    refused(&mesh, ("client", "left"), vip);
    mesh.apply(&sick(all).replace("name: farm, selector", "name: farm, publishNotReadyAddresses: true, selector"));
    only(&mesh, "client", vip, all);
    mesh.apply(FARM);
    only(&mesh, "client", vip, all);
}

#[test]
fn a_service_without_endpoints_or_without_the_port_is_refused() {
    let none = "  - {name: none, selector: {app: nobody}, ports: [{port: 80}]}\n";
    let mesh = Mesh::up(&format!("{FARM}{none}"));
    for vip in mesh.vips("none") {
        refused(&mesh, ("client", "left"), (vip, 80));
    }
    refused(&mesh, ("client", "left"), (mesh.vip("farm"), 81));
    let refusals = || mesh.metric("left", "culvert_early_refusals_total", &["reporter=\"source\"", "reason=\"no_route\""]);
    assert!(refusals() >= 3.0, "{}", refusals());
    // No connection was counted, since nothing is known about it.
    assert_eq!(mesh.metric("left", "istio_tcp_connections_opened_total", &[]), 0.0);
}

#[test]
fn the_name_of_a_headless_service_leads_to_its_pods_over_hbone() {
    let mesh = Mesh::up(&FARM.replace("name: farm, selector", "name: farm, headless: true, selector"));
    for pod in ["one", "two", "three"] {
        serve_name(mesh.listen(pod, 80), pod);
    }
    let listed = mesh.exec_ok("client", &["getent", "ahostsv4", "farm.default.svc.cluster.local"]);
    let addresses: BTreeSet<IpAddr> = listed.lines().map(|line| line.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert_eq!(addresses, ["one", "two", "three"].map(|pod| mesh.ip(pod)).into());
    for ip in addresses {
        mesh.ask_name("client", (ip, 80)).unwrap();
        mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", &format!("dst.hbone_addr={ip}:80")]);
    }
}

#[test]
fn a_named_target_port_is_the_one_of_each_endpoint_and_endpoints_without_it_are_left_out() {
    let mesh = Mesh::up(
        "
nodes: [left]
pods:
  - {name: client, node: left}
  - {name: one, node: left, labels: {app: farm}, ports: [{name: web, containerPort: 8001}]}
  - {name: two, node: left, labels: {app: farm}, ports: [{name: web, containerPort: 8002}, {name: more, containerPort: 9002}]}
  - {name: three, node: left, labels: {app: farm}}
services:
  - name: farm
    selector: {app: farm}
    ports: [{port: 80, targetPort: web}, {port: 81, targetPort: more}, {port: 82, targetPort: none}, {port: 8003}]
",
    );
    for (pod, ports) in [("one", &[8001, 8003, 80, 81, 82][..]), ("two", &[8002, 9002, 8003, 80, 81, 82]), ("three", &[80, 81, 82, 8003])] {
        for port in ports {
            serve_name(mesh.listen(pod, *port), &format!("{pod}:{port}"));
        }
    }
    let vip = mesh.vip("farm");
    only(&mesh, "client", (vip, 80), &["one:8001", "two:8002"]);
    only(&mesh, "client", (vip, 81), &["two:9002"]);
    only(&mesh, "client", (vip, 8003), &["one:8003", "two:8003", "three:8003"]);
    refused(&mesh, ("client", "left"), (vip, 82));
}

#[test]
fn the_nearest_endpoints_are_preferred_and_the_next_ones_take_over() {
    let regions = |distribution: &str, sick: &[&str]| {
        let text = format!(
            "
nodes:
  - {{name: a1, region: a, zone: one}}
  - {{name: a1b, region: a, zone: one}}
  - {{name: a2, region: a, zone: two}}
  - {{name: b1, region: b, zone: one}}
pods:
  - {{name: client, node: a1}}
  - {{name: same-node, node: a1, labels: {{app: farm}}}}
  - {{name: same-zone, node: a1b, labels: {{app: farm}}}}
  - {{name: same-region, node: a2, labels: {{app: farm}}}}
  - {{name: elsewhere, node: b1, labels: {{app: farm}}}}
services:
  - {{name: farm, selector: {{app: farm}}, ports: [{{port: 80, targetPort: 8080}}]{distribution}}}
"
        );
        sick.iter().fold(text, |text, pod| text.replace(&format!("name: {pod},"), &format!("name: {pod}, ready: false,")))
    };
    let mesh = Mesh::up(&regions("", &[]));
    for pod in ["same-node", "same-zone", "same-region", "elsewhere"] {
        serve_name(mesh.listen(pod, 8080), pod);
    }
    let vip = (mesh.vip("farm"), 80);
    let becomes = |distribution: &str, sick: &[&str], expected: &[&str]| {
        mesh.apply(&regions(distribution, sick));
        only(&mesh, "client", vip, expected);
    };
    only(&mesh, "client", vip, &["same-node", "same-zone", "same-region", "elsewhere"]);
    for zone in [", trafficDistribution: PreferClose", ", trafficDistribution: PreferSameZone"] {
        becomes(zone, &[], &["same-node", "same-zone"]);
    }
    let zone = ", trafficDistribution: PreferSameZone";
    becomes(zone, &["same-node"], &["same-zone"]);
    becomes(zone, &["same-node", "same-zone"], &["same-region"]);
    // A zone of the same name in another region is not the same zone.
    becomes(zone, &["same-node", "same-zone", "same-region"], &["elsewhere"]);
    let node = ", trafficDistribution: PreferSameNode";
    becomes(node, &[], &["same-node"]);
    becomes(node, &["same-node"], &["same-zone"]);
    // Strict: there or nowhere.
    let local = ", internalTrafficPolicy: Local";
    becomes(local, &[], &["same-node"]);
    mesh.apply(&regions(local, &["same-node"]));
    refused(&mesh, ("client", "a1"), vip);
}

#[test]
fn a_passthrough_service_goes_where_it_was_addressed_in_plain_tcp() {
    let definition = "
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: endpoint, node: left, labels: {app: farm}}
  - {name: plain, node: right, captured: false}
  - {name: member, node: right}
services:
  - {name: farm, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}], passthrough: true, addresses: [10.244.2.2, 10.244.2.3]}
";
    let mesh = Mesh::up(definition);
    assert_eq!(["plain", "member"].map(|pod| mesh.ip(pod).to_string()), ["10.244.2.2", "10.244.2.3"]);
    for pod in ["endpoint", "plain", "member"] {
        serve_name(mesh.listen(pod, 80), pod);
        serve_name(mesh.listen(pod, 8080), "the target port");
    }
    for (pod, node) in [("plain", None), ("member", Some("right"))] {
        let ip = mesh.ip(pod);
        assert_eq!(mesh.ask_name("client", (ip, 80)).unwrap(), pod);
        // A port that the service does not list is no different.
        assert_eq!(mesh.ask_name("client", (ip, 8080)).unwrap(), "the target port");
        let line = mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", &format!("dst.addr={ip}:80")]);
        assert!(line.contains("dst.service=\"farm.default.svc.cluster.local\"") && !line.contains("hbone"), "{line}");
        if let Some(node) = node {
            // To a pod of the mesh, too: it arrives there as plain text.
            let line = mesh.wait_for_log(node, &["connection complete", "direction=\"inbound\"", &format!("dst.addr={ip}:80")]);
            assert!(!line.contains("src.identity"), "{line}");
        }
    }
}

#[test]
fn of_services_that_share_an_address_the_one_of_the_clients_namespace_is_taken() {
    let mesh = Mesh::up(
        r#"
nodes: [left, right]
pods:
  - {name: client-a, namespace: a, node: left}
  - {name: client-b, namespace: b, node: left}
  - {name: client-c, namespace: c, node: left}
  - {name: client-d, namespace: d, node: right}
  - {name: server-a, namespace: a, node: right, labels: {app: farm}}
  - {name: server-b, namespace: b, node: right, labels: {app: farm}}
  - {name: plain, namespace: b, node: right, captured: false}
services:
  - {name: farm, namespace: a, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}], addresses: [10.96.7.7]}
  - {name: farm, namespace: b, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}], addresses: [10.96.7.7]}
extra:
  services:
    - name: private
      namespace: a
      hostname: private.a.svc.cluster.local
      vips: [/10.96.8.8]
      ports: {"80": 8080}
      endpoints: {"Kubernetes//Pod/a/server-a": {workloadUid: Kubernetes//Pod/a/server-a, port: {"80": 8080}}}
      visibility: Namespace
    - name: public
      namespace: b
      hostname: public.b.svc.cluster.local
      vips: [/10.96.8.8]
      ports: {"80": 8080}
      endpoints: {"Kubernetes//Pod/b/server-b": {workloadUid: Kubernetes//Pod/b/server-b, port: {"80": 8080}}}
"#,
    );
    for pod in ["server-a", "server-b"] {
        serve_name(mesh.listen(pod, 8080), pod);
    }
    let shared = ("10.96.7.7".parse().unwrap(), 80);
    only(&mesh, "client-a", shared, &["server-a"]);
    only(&mesh, "client-b", shared, &["server-b"]);
    // For all others one of them, and on every node the same.
    only(&mesh, "client-c", shared, &["server-a"]);
    only(&mesh, "client-d", shared, &["server-a"]);
    // One that is for its namespace only is not there for others.
    let half = ("10.96.8.8".parse().unwrap(), 80);
    only(&mesh, "client-a", half, &["server-a"]);
    only(&mesh, "client-b", half, &["server-b"]);
    only(&mesh, "client-c", half, &["server-b"]);
}

#[test]
fn a_connection_keeps_its_family_if_the_service_lets_it() {
    let mesh = Mesh::up(
        "
nodes: [left, right]
pods:
  - {name: client, node: left}
  - {name: server, node: right, labels: {app: farm}}
services:
  - {name: any, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}]}
  - {name: dual, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}], ipFamilies: Dual}
  - {name: four, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}], ipFamilies: IPv4}
  - {name: six, selector: {app: farm}, ports: [{port: 80, targetPort: 8080}], ipFamilies: IPv6}
",
    );
    serve_address(mesh.listen("server", 8080));
    let (v4, v6) = (mesh.ip("server"), mesh.ip6("server"));
    for (service, from_v4, from_v6) in [("any", v4, v6), ("dual", v4, v6), ("four", v4, v4), ("six", v6, v6)] {
        for vip in mesh.vips(service) {
            let expected = if vip.is_ipv4() { from_v4 } else { from_v6 };
            assert_eq!(mesh.ask_name("client", (vip, 80)).unwrap(), expected.to_string(), "{service} by {vip}");
        }
    }
    // An IPv6 socket that calls an IPv4 address is an IPv4 connection.
    let IpAddr::V4(vip) = mesh.vip("any") else { panic!("not IPv4") };
    assert_eq!(mesh.ask_name("client", (IpAddr::from(vip.to_ipv6_mapped()), 80)).unwrap(), v4.to_string());
}
