//! Workloads of another network, behind its gateway: two tunnels, one within the other (reference, dataplane §2.8 and §12.4: `double_hbone1`,
//! `double_hbone2`).

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};

use culvert::lab::Place;

use crate::caller::{Asked, Ca, Peer};
use crate::mesh::{Mesh, echo_on, serve_echo, until, wait_until};

/// `server` is on the network `far`, which the client's proxy reaches by `gate` only: the test speaks for the gateway. The proxies' file shows what a
/// control plane of many networks would: one workload without addresses in the place of all that is behind the gateway.
const NETWORKS: &str = r#"
nodes: [left, {name: right, env: {NETWORK: far}}]
pods:
  - {name: client, serviceAccount: client, node: left, labels: {app: shop, version: v2}}
  - {name: server, serviceAccount: server, node: right, network: far, labels: {app: web}}
  - {name: gate, serviceAccount: gate, node: right, captured: false}
services:
  - {name: web, selector: {app: web}, ports: [{port: 80, targetPort: 8080}], addresses: [10.97.0.1]}
extra:
  workloads:
    - uid: far/SplitHorizonWorkload/gate/default/shared.default.svc.cluster.local
      namespace: default
      protocol: HBONE
      network: far
      networkGateway: {destination: @gateway@}
      services: {"default/shared.default.svc.cluster.local": {"80": 8080}}
    - uid: NetworkGateway/far/gate/15008
      name: gateway
      namespace: default
      serviceAccount: gate
      workloadIps: [10.244.2.3]
      protocol: HBONE
      network: far
      services: {"default/gate.test": {"15009": 15008}}
  services:
    - {name: gate, namespace: default, hostname: gate.test, ports: {"15009": 15008}}
    - name: shared
      namespace: default
      hostname: shared.default.svc.cluster.local
      vips: [/10.96.9.9]
      ports: {"80": 8080}
      subjectAltNames: ["spiffe://cluster.local/ns/default/sa/server"]
"#;

const BY_ADDRESS: &str = "far/10.244.2.3";
const GATE: &str = "spiffe://cluster.local/ns/default/sa/gate";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";

fn target() -> SocketAddr {
    SocketAddr::new("10.96.9.9".parse::<IpAddr>().unwrap(), 80)
}

/// The mesh with its gateway named in a way, and an application behind it.
fn networks(gateway: &str) -> (Mesh, Ca) {
    // The service is one for both networks; the pod behind the gateway knows it under the same name.
    let mesh = Mesh::up(&text(gateway));
    assert_eq!(mesh.ip("gate").to_string(), "10.244.2.3");
    serve_echo(mesh.listen("server", 8080));
    let ca = Ca::load(&mesh.ca());
    (mesh, ca)
}

fn text(gateway: &str) -> String {
    NETWORKS.replace("@gateway@", gateway)
}

/// Speaks for the gateway: whatever the outer streams carry goes to the server's port for HBONE, unread.
fn gate(mesh: &Mesh, ca: &Ca, identity: &str) -> Peer {
    let (netns, server) = (mesh.netns(Place::Pod("gate")), SocketAddr::new(mesh.ip("server"), 15008));
    let connect = move |_: &Asked| netns.run(|| TcpStream::connect(server)).unwrap();
    ca.forward(mesh.listen("gate", 15008), identity, connect)
}

#[test]
fn a_service_of_another_network_is_reached_through_its_gateway_by_a_tunnel_within_a_tunnel() {
    for gateway in [BY_ADDRESS.to_owned(), "default/gate.test, hboneMtlsPort: 15009".to_owned()] {
        let (mesh, ca) = networks(&gateway);
        let gate = gate(&mesh, &ca, GATE);
        let mut socket = mesh.connect("client", target()).unwrap();
        echo_on(&mut socket, b"hello").unwrap();
        let listed = mesh.config_dump("left");
        let listed = listed["workloadState"].as_object().unwrap().values().flat_map(|pod| pod["connections"]["outbound"].as_array().unwrap());
        assert_eq!(listed.map(|connection| connection["protocol"].as_str().unwrap()).collect::<Vec<_>>(), ["DOUBLEHBONE"]);
        let asked = gate.asked();
        assert_eq!((asked.authority.as_str(), asked.identity.as_str()), ("shared.default.svc.cluster.local:80", CLIENT));
        assert!(asked.headers.get("x-forwarded-network").is_none(), "the gateway needs not know");
        // Enough for all buffers of both layers, each direction by itself.
        let bytes: Vec<u8> = (0..8_000_000_usize).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
        let sent = bytes.clone();
        let mut up = socket.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            up.write_all(&sent).unwrap();
            up.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        socket.read_to_end(&mut got).unwrap();
        sender.join().unwrap();
        assert!(got == bytes, "{} of {} bytes, or other ones", got.len(), bytes.len());
        // Both sides know who the other is, although the gateway is between them.
        let line =
            mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", "dst.hbone_addr=shared.default.svc.cluster.local:80"]);
        for part in [
            format!("dst.addr={}:15008", mesh.ip("gate")),
            format!("dst.identity=\"{SERVER}\""),
            "dst.workload=\"web\"".to_owned(),
            "dst.service=\"shared.default.svc.cluster.local\"".to_owned(),
            "bytes_sent=8000005 bytes_recv=8000005".to_owned(),
        ] {
            assert!(line.contains(&part), "{part} is not in {line}");
        }
        let line = mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", &format!("src.identity=\"{CLIENT}\"")]);
        // The gateway's address names the gateway: the client is who its tunnel says.
        for part in [format!("src.addr={}:", mesh.ip("gate")), "src.workload=\"shop\"".to_owned()] {
            assert!(line.contains(&part), "{part} is not in {line}");
        }
    }
}

#[test]
fn connections_share_the_tunnel_to_the_gateway_and_nothing_within_it() {
    let (mesh, ca) = networks(BY_ADDRESS);
    let gate = gate(&mesh, &ca, GATE);
    let mut sockets: Vec<TcpStream> = (0..5).map(|_| mesh.connect("client", target()).unwrap()).collect();
    sockets.iter_mut().for_each(|socket| echo_on(socket, b"hello").unwrap());
    assert_eq!(gate.connections(), 1);
    assert_eq!(std::iter::from_fn(|| gate.try_asked()).count(), 5);
    let inner = || mesh.metric("right", "istio_tcp_sockets_open", &["reporter=\"destination\""]);
    assert_eq!(inner(), 5.0, "one inner tunnel for each connection");
    drop(sockets);
    wait_until("the inner tunnels end with their connections", || inner() == 0.0);
    mesh.echo("client", target()).unwrap();
    assert_eq!(gate.connections(), 1, "the tunnel to the gateway stays");
}

#[test]
fn policy_behind_the_gateway_sees_the_client_and_cuts_live_connections() {
    let (mesh, ca) = networks(BY_ADDRESS);
    let _gate = gate(&mesh, &ca, GATE);
    let mut live = mesh.connect("client", target()).unwrap();
    echo_on(&mut live, b"hello").unwrap();
    let deny = "
authorizationPolicies:
  - metadata: {name: no-client, namespace: default}
    spec:
      selector: {matchLabels: {app: web}}
      action: DENY
      rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]}]
";
    mesh.apply(&format!("{}{deny}", text(BY_ADDRESS)));
    assert_eq!(live.read(&mut [0; 8]).map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionReset));
    assert!(mesh.call_fails("client", target()).is_err());
    mesh.wait_for_log("right", &["\terror\t", "explicitly denied by: default/no-client", &format!("src.identity=\"{CLIENT}\"")]);
    mesh.wait_for_log("left", &["\terror\t", "connection complete", &format!("beyond gateway {}:15008: http status: 401", mesh.ip("gate"))]);
    mesh.apply(&text(BY_ADDRESS));
    assert!(until(|| mesh.echo("client", target()).ok()).is_some());
}

#[test]
fn the_gateway_and_who_answers_behind_it_must_each_be_who_they_should() {
    let (mesh, ca) = networks(BY_ADDRESS);
    let impostor = gate(&mesh, &ca, SERVER);
    assert!(mesh.call_fails("client", target()).is_err());
    let expected = format!("identity mismatch: the peer is {SERVER}, expected {GATE}");
    mesh.wait_for_log("left", &["\terror\t", "connection complete", "direction=\"outbound\"", &expected]);
    assert!(impostor.is_silent(), "somebody else was asked");
    // A gateway that leads somewhere else: the service says who may answer, and nobody else may.
    let (mesh, ca) = {
        let other =
            text(BY_ADDRESS).replace("subjectAltNames: [\"spiffe://cluster.local/ns/default/sa/server\"]", &format!("subjectAltNames: [\"{GATE}\"]"));
        let mesh = Mesh::up(&other);
        let ca = Ca::load(&mesh.ca());
        (mesh, ca)
    };
    let _gate = gate(&mesh, &ca, GATE);
    assert!(mesh.call_fails("client", target()).is_err());
    let expected = format!("beyond gateway {}:15008: identity mismatch: the peer is {SERVER}, expected {GATE}", mesh.ip("gate"));
    mesh.wait_for_log("left", &["\terror\t", "connection complete", "direction=\"outbound\"", &expected]);
    let flagged = || mesh.metric("left", "istio_tcp_connections_failed_total", &["response_flags=\"TLS_FAILURE\""]);
    wait_until("it is counted", || flagged() == 1.0);
    assert_eq!(mesh.metric("right", "istio_tcp_connections_opened_total", &["reporter=\"destination\""]), 0.0);
}

#[test]
fn a_gateway_that_is_not_there_fails_closed_and_says_so() {
    let (mesh, _ca) = networks("far/10.244.2.99");
    assert!(mesh.call_fails("client", target()).is_err());
    mesh.wait_for_log(
        "left",
        &["connection failed", "unknown network gateway: gateway far/10.244.2.99:15008", "is neither a service nor a workload"],
    );
}

#[test]
fn a_reset_on_either_side_and_the_end_of_a_pod_pass_through_the_gateway() {
    let (mesh, ca) = networks(BY_ADDRESS);
    let _gate = gate(&mesh, &ca, GATE);
    let listener = mesh.listen("server", 9000);
    let port = text(BY_ADDRESS).replace("ports: {\"80\": 8080}", "ports: {\"80\": 9000}").replace("{\"80\": 8080}}", "{\"80\": 9000}}");
    mesh.apply(&port);
    let pair = || {
        until(|| {
            let mut near = mesh.connect("client", target()).unwrap();
            listener.set_nonblocking(true).unwrap();
            near.write_all(b"x").ok()?;
            // Until both proxies have read the file, the other port answers.
            let far = (0..20).find_map(|_| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                listener.accept().ok()
            })?;
            far.0.set_nonblocking(false).unwrap();
            far.0.set_read_timeout(Some(crate::mesh::PATIENCE)).unwrap();
            Some((near, far.0))
        })
        .unwrap()
    };
    let ended = |mut socket: TcpStream| loop {
        match socket.read(&mut [0; 64]) {
            Ok(1..) => {}
            other => break other.map_err(|error| error.kind()),
        }
    };
    for by_near in [true, false] {
        let (near, far) = pair();
        let (from, to) = if by_near { (near, far) } else { (far, near) };
        culvert::sys::socket::reset_on_close(&from).unwrap();
        drop(from);
        assert_eq!(ended(to), Err(std::io::ErrorKind::ConnectionReset), "by near: {by_near}");
    }
    let (near, far) = pair();
    mesh.apply(&port.replace("  - {name: client, serviceAccount: client, node: left, labels: {app: shop, version: v2}}\n", ""));
    assert_eq!(ended(far), Err(std::io::ErrorKind::ConnectionReset), "the client's pod is gone");
    drop(near);
}
