//! Waypoints: what is sent to them, what they may send on, and how captured ones get their connections (reference, dataplane §12.4:
//! `workload_waypoint`, `service_waypoint*`, `sandwich_waypoint_*`).

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use culvert::lab::Place;

use crate::caller::{Ca, welcome};
use crate::mesh::{Mesh, PATIENCE, echo_on, serve_echo, until, wait_until};

/// `way` speaks HBONE itself: the test speaks for it.
const NATIVE: &str = r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: web, serviceAccount: web, node: right, labels: {app: web}}
  - {name: way, serviceAccount: way, node: right, labels: {app: way}, captured: false, nativeTunnel: true}
  - {name: canary, serviceAccount: canary, node: left, captured: false, nativeTunnel: true}
"#;

const WAY: &str = "spiffe://cluster.local/ns/default/sa/way";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// With these services; `way` is the service of the waypoint.
fn native(services: &str) -> String {
    format!("{NATIVE}services:\n  - {{name: way, selector: {{app: way}}, ports: [{{port: 15008}}]}}\n{services}")
}

fn web(more: &str) -> String {
    native(&format!("  - {{name: web, selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}], {more}}}\n"))
}

#[test]
fn a_service_and_a_workload_with_a_waypoint_are_reached_by_it_under_the_address_that_was_asked_for() {
    // By the host name of a service, by the address of a pod.
    for (name, waypoint) in [("way", "way"), ("canary", "canary")] {
        let pods = NATIVE.replace("labels: {app: web}}", &format!("labels: {{app: web}}, waypoint: {waypoint}}}"));
        let mesh = Mesh::up(&web(&format!("waypoint: {waypoint}")).replace(NATIVE, &pods));
        let ca = Ca::load(&mesh.ca());
        let waypoint = ca.serve(mesh.listen(name, 15008), &format!("spiffe://cluster.local/ns/default/sa/{name}"), welcome);
        let service = ";host=web.default.svc.cluster.local";
        let calls = [(mesh.vip("web"), 80, service), (mesh.ip("web"), 8080, ""), (mesh.ip("web"), 9, "")];
        for (ip, port, host) in calls {
            let target = SocketAddr::new(ip, port);
            let mut socket = mesh.connect("client", target).unwrap();
            echo_on(&mut socket, b"hello").unwrap();
            let asked = waypoint.asked();
            assert_eq!((asked.authority, asked.identity), (target.to_string(), CLIENT.to_owned()));
            let client = socket.local_addr().unwrap();
            assert_eq!(asked.headers["forwarded"], format!("for=\"{}\"{host}", SocketAddr::new(client.ip().to_canonical(), client.port())));
            drop(socket);
            let hop = SocketAddr::new(mesh.ip(name), 15008);
            let line = mesh.wait_for_log("left", &["connection complete", &format!("dst.hbone_addr={target}"), &format!("dst.addr={hop}")]);
            assert!(line.contains(&format!("dst.workload=\"{name}\"")) && line.contains("dst.service=\"web") != host.is_empty(), "{line}");
        }
        assert_eq!(waypoint.connections(), 1, "all of them share a tunnel");
        // Nobody came past the waypoint.
        assert!(mesh.log("right").iter().all(|line| !line.contains("connection complete")));
    }
}

#[test]
fn a_waypoint_that_is_not_there_or_is_somebody_else_fails_closed_and_says_so() {
    let mesh = Mesh::up(&web("waypoint: way"));
    serve_echo(mesh.listen("web", 8080));
    let ca = Ca::load(&mesh.ca());
    let target = SocketAddr::new(mesh.vip("web"), 80);
    let listener = mesh.listen("way", 15008);
    let impostor = ca.serve(listener.try_clone().unwrap(), "spiffe://cluster.local/ns/default/sa/canary", welcome);
    assert!(mesh.call_fails("client", target).is_err());
    let refused = "identity mismatch: the peer is spiffe://cluster.local/ns/default/sa/canary, expected spiffe://cluster.local/ns/default/sa/way";
    mesh.wait_for_log("left", &["\terror\t", "connection complete", refused]);
    assert!(impostor.is_silent());
    let sick = web("waypoint: way").replace("labels: {app: way},", "labels: {app: way}, ready: false,");
    mesh.apply(&sick);
    let way = "waypoint default/way.default.svc.cluster.local:15008 of default/web.default.svc.cluster.local";
    let said = until(|| {
        assert!(mesh.call_fails("client", target).is_err());
        mesh.log("left").into_iter().find(|line| line.contains("unknown waypoint") && line.contains(way))
    });
    assert!(said.unwrap().contains("is a service without an endpoint that could take it"));
    // The waypoint's service is gone, and the reference to it stays: only the proxies' file can say that.
    let text = std::fs::read_to_string(mesh.mesh_file()).unwrap();
    mesh.replace_mesh_file(&text.replace("\"hostname\": \"way.default.svc.cluster.local\"", "\"hostname\": \"else.default.svc.cluster.local\""));
    let said = until(|| {
        assert!(mesh.call_fails("client", target).is_err());
        mesh.log("left").into_iter().find(|line| line.contains(way) && line.contains("is neither a service nor a workload that is known here"))
    });
    assert!(said.is_some());
    assert!(mesh.log("right").iter().all(|line| !line.contains("connection complete")), "a connection went past the waypoint");
    assert!(mesh.metric("left", "culvert_early_refusals_total", &["reporter=\"source\"", "reason=\"no_route\""]) >= 2.0);
}

#[test]
fn weighted_waypoints_share_connections_and_a_change_of_weights_counts_at_once() {
    let weights =
        |way: u32, canary: u32| web(&format!("weightedWaypoints: [{{waypoint: way, weight: {way}}}, {{waypoint: canary, weight: {canary}}}]"));
    let mesh = Mesh::up(&weights(1, 1));
    let ca = Ca::load(&mesh.ca());
    let peers = [("way", WAY), ("canary", "spiffe://cluster.local/ns/default/sa/canary")]
        .map(|(pod, identity)| ca.serve(mesh.listen(pod, 15008), identity, welcome));
    let target = SocketAddr::new(mesh.vip("web"), 80);
    // The odds that 64 connections go to one of two are 2^-63.
    (0..64).for_each(|_| mesh.echo("client", target).unwrap());
    let asked = |peer: &crate::caller::Peer| std::iter::from_fn(|| peer.try_asked()).count();
    let counts = peers.each_ref().map(asked);
    assert!(counts.iter().sum::<usize>() == 64 && counts.iter().all(|count| *count > 0), "{counts:?}");
    mesh.apply(&weights(0, 3));
    let moved = || {
        (0..8).for_each(|_| mesh.echo("client", target).unwrap());
        let counts = peers.each_ref().map(asked);
        counts == [0, 8]
    };
    wait_until("all go to the one that has a weight", moved);
    mesh.apply(&weights(0, 0));
    let refused = until(|| {
        let _ = mesh.connect("client", target).and_then(|mut socket| echo_on(&mut socket, b"x"));
        mesh.log("left").into_iter().find(|line| line.contains("all weighted waypoints of default/web.default.svc.cluster.local have weight 0"))
    });
    assert!(refused.is_some());
}

/// `way` is captured like any other pod: the proxy takes its HBONE and the application of the test gets the bytes.
const CAPTURED: &str = r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: web, serviceAccount: web, node: right, labels: {app: web}, waypoint: way}
  - {name: way, serviceAccount: way, node: left, labels: {app: way}, applicationTunnel: {protocol: @protocol@}}
services:
  - {name: way, selector: {app: way}, ports: [{port: 80}]}
  - {name: web, selector: {app: web}, ports: [{port: 80, targetPort: 8080}], waypoint: way}
authorizationPolicies:
  - metadata: {name: only-the-waypoint, namespace: default}
    spec:
      selector: {matchLabels: {app: web}}
      rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/way]}}]}]
"#;

/// What a waypoint is told in front of a connection.
#[derive(Debug, PartialEq, Eq)]
struct Announced {
    source: SocketAddr,
    destination: SocketAddr,
    identity: String,
}

fn announced(socket: &mut TcpStream) -> Announced {
    let mut head = [0; 16];
    socket.read_exact(&mut head).unwrap();
    assert_eq!(head[..13], *b"\r\n\r\n\0\r\nQUIT\n\x21");
    let mut body = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
    socket.read_exact(&mut body).unwrap();
    let width = if head[13] == 0x11 { 4 } else { 16 };
    let ip = |bytes: &[u8]| -> IpAddr {
        match <[u8; 4]>::try_from(bytes) {
            Ok(v4) => v4.into(),
            Err(_) => <[u8; 16]>::try_from(bytes).unwrap().into(),
        }
    };
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    let tlv = &body[2 * width + 4..];
    assert_eq!((tlv[0], usize::from(u16::from_be_bytes([tlv[1], tlv[2]]))), (0xd0, tlv.len() - 3));
    Announced {
        source: SocketAddr::new(ip(&body[..width]), port(2 * width)),
        destination: SocketAddr::new(ip(&body[width..2 * width]), port(2 * width + 2)),
        identity: String::from_utf8(tlv[3..].to_vec()).unwrap(),
    }
}

fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let (socket, _) = until(|| listener.accept().ok()).expect("nobody came");
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn a_captured_waypoint_is_told_client_and_destination_by_a_proxy_header_and_goes_on_as_itself() {
    for localhost in [true, false] {
        let tunnel = CAPTURED.replace("@protocol@", "PROXY, port: 15088");
        // Policy at the waypoint is asked about the pod's address and the port of the tunnel, wherever the application is reached.
        let guard = "
  - metadata: {name: at-the-waypoint, namespace: default}
    spec:
      selector: {matchLabels: {app: way}}
      rules: [{to: [{operation: {ports: [\"15088\"]}}], when: [{key: destination.ip, values: [10.244.0.0/16]}]}]
";
        let mesh = Mesh::up(&format!("{}{guard}proxyEnv: {{LOCALHOST_APP_TUNNEL: \"{localhost}\"}}\n", tunnel.trim_end()));
        serve_echo(mesh.listen("web", 8080));
        let address = |ip: IpAddr| SocketAddr::new(ip, 15088);
        let listener =
            mesh.run_in(Place::Pod("way"), || TcpListener::bind(address(if localhost { [127, 0, 0, 1].into() } else { mesh.ip("way") })).unwrap());
        for (asked, told) in [((mesh.vip("web"), 80), mesh.vip("web")), ((mesh.ip("web"), 8080), mesh.ip("web"))] {
            let mut client = mesh.connect("client", asked).unwrap();
            // It may speak first, or not at all before it hears something.
            client.write_all(b"hello").unwrap();
            let mut application = accept(&listener);
            let peer = application.peer_addr().unwrap().ip();
            assert_eq!(peer, if localhost { IpAddr::from([127, 0, 0, 1]) } else { mesh.ip("client") });
            let heard = announced(&mut application);
            assert_eq!((heard.source.ip(), heard.identity.as_str()), (mesh.ip("client"), CLIENT));
            assert_eq!(heard.destination, SocketAddr::new(told, asked.1));
            let mut word = [0; 5];
            application.read_exact(&mut word).unwrap();
            assert_eq!(&word, b"hello");
            // The waypoint calls the endpoint itself: not by way of itself, and as itself.
            let mut onward = mesh.connect("way", (mesh.ip("web"), 8080)).unwrap();
            echo_on(&mut onward, b"onward").unwrap();
            application.write_all(b"answer").unwrap();
            let mut answer = [0; 6];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"answer");
        }
        let line = mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", &format!("src.identity=\"{WAY}\"")]);
        assert!(line.contains("src.workload=\"way\""), "{line}");
        let line = mesh.wait_for_log("left", &["connection complete", "direction=\"inbound\"", &format!("src.identity=\"{CLIENT}\"")]);
        assert!(line.contains(&format!("dst.hbone_addr={}:80", mesh.vip("web"))), "{line}");
    }
}

#[test]
fn a_captured_waypoint_without_a_header_sees_the_clients_address_and_the_port_that_was_asked_for() {
    let mesh = Mesh::up(&CAPTURED.replace("@protocol@", "NONE").replace("ports: [{port: 80}]}", "ports: [{port: 15008}]}"));
    let listener = mesh.listen("way", 80);
    let mut client = mesh.connect("client", (mesh.vip("web"), 80)).unwrap();
    client.write_all(b"hello").unwrap();
    let mut application = accept(&listener);
    assert_eq!(application.peer_addr().unwrap().ip().to_canonical(), mesh.ip("client"));
    let mut word = [0; 5];
    application.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello", "nothing comes before the client's bytes");
}

#[test]
fn policy_that_allows_the_waypoint_only_denies_everybody_who_calls_past_it() {
    let mesh = Mesh::up(&CAPTURED.replace("@protocol@", "PROXY, port: 15088").replace(", waypoint: way}\n", "}\n"));
    serve_echo(mesh.listen("web", 8080));
    mesh.echo("way", (mesh.ip("web"), 8080)).unwrap();
    mesh.echo("way", (mesh.vip("web"), 80)).unwrap();
    for target in [(mesh.ip("web"), 8080), (mesh.vip("web"), 80)] {
        assert!(mesh.call_fails("client", target).is_err());
    }
    mesh.wait_for_log("left", &["\terror\t", "connection complete", "direction=\"outbound\"", "http status: 401"]);
}

#[test]
fn a_waypoint_takes_the_addresses_of_those_behind_it_and_no_others() {
    // Without an application tunnel: the pod is a waypoint by what others say of it, weighted or not.
    let text = "
nodes: [left, right]
pods:
  - {name: caller, node: left, captured: false}
  - {name: way, serviceAccount: way, node: right, labels: {app: way}}
  - {name: web, node: right, waypoint: way}
  - {name: free, node: right}
services:
  - {name: way, selector: {app: way}, ports: [{port: 15008}]}
  - {name: behind, ports: [{port: 80}], waypoint: way}
  - {name: mixed, ports: [{port: 80}], weightedWaypoints: [{waypoint: free, weight: 9}, {waypoint: way, weight: 1}]}
  - {name: open, ports: [{port: 80}]}
";
    let mesh = Mesh::up(text);
    serve_echo(mesh.listen("way", 80));
    let ca = Ca::load(&mesh.ca());
    let caller = ca.dial(mesh.connect("caller", (mesh.ip("way"), 15008)).unwrap(), CLIENT).unwrap();
    for ip in [mesh.ip("way"), mesh.ip("web"), mesh.vip("behind"), mesh.vip("mixed")] {
        let mut answer = caller.connect(&format!("{ip}:80"));
        assert_eq!(answer.status, 200, "{ip}");
        answer.stream.echo(b"hello");
    }
    for ip in [mesh.ip("free"), mesh.vip("open"), mesh.vip("way"), "192.0.2.1".parse().unwrap()] {
        assert_eq!(caller.connect(&format!("{ip}:80")).status, 400, "{ip}");
        mesh.wait_for_log("right", &["connection failed", "direction=\"inbound\"", &format!("ip mismatch: {} != {ip}", mesh.ip("way"))]);
    }
    // A pod that is no longer anybody's waypoint is asked in vain.
    mesh.apply(&text.replace(", waypoint: way}", "}"));
    let gone = until(|| (caller.connect(&format!("{}:80", mesh.vip("behind"))).status == 400).then_some(()));
    assert!(gone.is_some());
}

#[test]
fn the_tunnel_to_a_waypoint_is_not_used_for_another_pod_that_got_its_address() {
    let mesh = Mesh::up(&web("waypoint: way"));
    let ca = Ca::load(&mesh.ca());
    let target = SocketAddr::new(mesh.vip("web"), 80);
    let peer = ca.serve(mesh.listen("way", 15008), WAY, welcome);
    (0..3).for_each(|_| mesh.echo("client", target).unwrap());
    assert_eq!(peer.connections(), 1);
    // Another pod of the same account has the address from now on; the tunnel to the first one still works.
    let text = std::fs::read_to_string(mesh.mesh_file()).unwrap();
    assert!(text.contains("Kubernetes//Pod/default/way\""));
    mesh.replace_mesh_file(&text.replace("Kubernetes//Pod/default/way\"", "Kubernetes//Pod/default/way-2\""));
    wait_until("the client's proxy knows", || mesh.config_dump("left")["workloads"].to_string().contains("Kubernetes//Pod/default/way-2"));
    (0..3).for_each(|_| mesh.echo("client", target).unwrap());
    assert_eq!(peer.connections(), 2, "dialled anew, once");
}

#[test]
fn a_pod_that_gets_the_address_of_one_that_is_gone_is_reached_at_once() {
    let mesh = Mesh::up(&web("waypoint: way"));
    let ca = Ca::load(&mesh.ca());
    let target = SocketAddr::new(mesh.vip("web"), 80);
    let address = mesh.ip("way");
    let before = ca.serve(mesh.listen("way", 15008), WAY, welcome);
    mesh.echo("client", target).unwrap();
    before.asked();
    mesh.apply(
        &web("waypoint: way").replace("name: way, serviceAccount: way, node: right, labels", "name: way-2, serviceAccount: way, node: right, labels"),
    );
    assert!(mesh.status().pod("way-2").unwrap().addresses.contains(&address));
    let netns = mesh.lab().netns(Place::Pod("way-2")).unwrap();
    let after = ca.serve(netns.run(|| TcpListener::bind(("::", 15008))).unwrap().unwrap(), WAY, welcome);
    let began = std::time::Instant::now();
    let reached = until(|| {
        // One that was taken before the proxy knew goes on the old tunnel, to nowhere.
        let mut socket = mesh.connect("client", target).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let _ = echo_on(&mut socket, b"x");
        (after.connections() > 0).then_some(())
    });
    assert!(reached.is_some(), "it was never dialled anew:\n{}", mesh.log("left").join("\n"));
    // And not because nobody answered any more, which takes 10 s to be found out.
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
}
