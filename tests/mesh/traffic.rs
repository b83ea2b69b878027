//! Connections between pods in every combination of places and capture (reference, dataplane §12.4: `*_captured_inpod`, `*_uncaptured_*`,
//! `service_loadbalancing`, and §12.5: IPv6 and dual stack, half-close).

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use crate::mesh::{Mesh, echo_on, serve_echo, wait_until};

const TWO_NODES: &str = r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: near, serviceAccount: near, node: left, labels: {app: echo}}
  - {name: far, serviceAccount: far, node: right, labels: {app: echo}}
  - {name: outside, node: left, captured: false}
  - {name: plain, node: right, captured: false}
services:
  - {name: echo, selector: {app: echo}, ports: [{port: 80, targetPort: 8080}]}
"#;

fn two_nodes() -> Mesh {
    let mesh = Mesh::up(TWO_NODES);
    for pod in ["near", "far", "plain"] {
        serve_echo(mesh.listen(pod, 8080));
    }
    mesh
}

#[test]
fn captured_pods_talk_over_hbone_on_one_node_and_across_nodes_in_both_families() {
    let mesh = two_nodes();
    for (server, node) in [("near", "left"), ("far", "right")] {
        for ip in [mesh.ip(server), mesh.ip6(server)] {
            mesh.echo("client", (ip, 8080)).unwrap();
            let target = SocketAddr::from((ip, 8080)).to_string();
            let account = format!("dst.identity=\"spiffe://cluster.local/ns/default/sa/{server}\"");
            let hbone = format!("dst.hbone_addr={target}");
            let outbound = mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", &hbone, &account]);
            assert!(outbound.contains("bytes_sent=23 bytes_recv=23"), "{outbound}");
            let inbound = mesh.wait_for_log(node, &["connection complete", "direction=\"inbound\"", &hbone]);
            assert!(inbound.contains("src.identity=\"spiffe://cluster.local/ns/default/sa/client\""), "{inbound}");
        }
    }
    mesh.down();
}

#[test]
fn traffic_from_and_to_pods_outside_the_mesh_is_plain_and_has_no_identity() {
    let mesh = two_nodes();
    mesh.echo("client", (mesh.ip("plain"), 8080)).unwrap();
    let line = mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", &mesh.ip("plain").to_string()]);
    assert!(!line.contains("identity") && !line.contains("hbone"), "{line}");
    mesh.echo("outside", (mesh.ip("far"), 8080)).unwrap();
    let line = mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", &mesh.ip("outside").to_string()]);
    assert!(!line.contains("src.identity") && !line.contains("hbone"), "{line}");
}

#[test]
fn the_application_sees_the_clients_own_address() {
    let mesh = two_nodes();
    let listener = mesh.listen("far", 9000);
    for client in [mesh.ip("client"), mesh.ip6("client")] {
        let target = if client.is_ipv4() { mesh.ip("far") } else { mesh.ip6("far") };
        let _socket = mesh.connect("client", (target, 9000)).unwrap();
        let (_, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_canonical(), client);
    }
}

#[test]
fn a_service_address_reaches_every_endpoint_on_its_target_port() {
    let mesh = two_nodes();
    for vip in mesh.vips("echo") {
        wait_until("both endpoints were chosen", || {
            mesh.echo("client", (vip, 80)).unwrap();
            ["near", "far"].iter().all(|server| {
                let labels = [format!("destination_workload=\"{server}"), "destination_service_name=\"echo\"".to_owned()];
                let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
                mesh.metric("left", "istio_tcp_connections_opened_total", &labels) > 0.0
            })
        });
    }
}

#[test]
fn a_pod_reaches_itself_through_its_service_and_directly() {
    let mesh = two_nodes();
    wait_until("the pod was its own endpoint", || {
        mesh.echo("near", (mesh.vip("echo"), 80)).unwrap();
        mesh.metric("left", "istio_tcp_connections_opened_total", &["source_workload=\"near", "destination_workload=\"near"]) > 0.0
    });
    mesh.echo("near", (mesh.ip("near"), 8080)).unwrap();
}

#[test]
fn each_direction_of_a_stream_closes_by_itself() {
    let mesh = two_nodes();
    let listener = mesh.listen("far", 9000);
    // The client is done first, and still gets an answer.
    let mut client = mesh.connect("client", (mesh.ip("far"), 9000)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut got = String::new();
    server.read_to_string(&mut got).unwrap();
    assert_eq!(got, "question");
    server.write_all(b"answer").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    got.clear();
    client.read_to_string(&mut got).unwrap();
    assert_eq!(got, "answer");
    // The server is done first, and still gets what the client says.
    let mut client = mesh.connect("client", (mesh.ip("far"), 9000)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"greeting").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    got.clear();
    client.read_to_string(&mut got).unwrap();
    assert_eq!(got, "greeting");
    client.write_all(b"thanks").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    got.clear();
    server.read_to_string(&mut got).unwrap();
    assert_eq!(got, "thanks");
}

#[test]
fn a_connection_of_which_one_side_has_finished_ends_when_the_other_lies_still_for_too_long() {
    let mesh = Mesh::up(&format!("{TWO_NODES}proxyEnv: {{CULVERT_HALF_CLOSED_TIMEOUT: 4s}}\n"));
    let still_for_too_long = |from: &str, to: &str, port: u16, client_ends: bool| {
        let listener = mesh.listen(to, port);
        // (who finishes, the other side)
        let connect = || {
            let near = mesh.connect(from, (mesh.ip(to), port)).unwrap();
            let (far, _) = listener.accept().unwrap();
            far.set_read_timeout(Some(crate::mesh::PATIENCE)).unwrap();
            if client_ends { (near, far) } else { (far, near) }
        };
        let [(mut idle, mut other), (mut finished, mut still), (mut waiting, mut busy)] = [connect(), connect(), connect()];
        for (socket, side) in [(&finished, &mut still), (&waiting, &mut busy)] {
            socket.shutdown(Shutdown::Write).unwrap();
            assert_eq!(side.read(&mut [0; 8]).unwrap(), 0, "the end arrives");
        }
        // One that says something every now and then goes on for longer than the limit.
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(100));
            busy.write_all(b"x").unwrap();
            waiting.read_exact(&mut [0]).unwrap();
        }
        let reset = Err(std::io::ErrorKind::ConnectionReset);
        assert_eq!(finished.read(&mut [0; 8]).map_err(|error| error.kind()), reset, "{from} to {to}");
        // One that nobody has finished may lie still.
        other.write_all(b"still here").unwrap();
        let mut got = [0; 10];
        idle.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"still here");
    };
    std::thread::scope(|scope| {
        // Over HBONE, and plain on either side of a proxy.
        for (index, (from, to, client_ends)) in
            [("client", "far", true), ("client", "far", false), ("outside", "far", true), ("client", "plain", false)].into_iter().enumerate()
        {
            let port = 9000 + u16::try_from(index).unwrap();
            let still_for_too_long = &still_for_too_long;
            scope.spawn(move || still_for_too_long(from, to, port, client_ends));
        }
    });
    mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", "one direction had ended, and in the other nothing moved for 4s"]);
    mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", "one direction had ended, and in the other nothing moved for 4s"]);
}

#[test]
fn a_reset_of_one_end_reaches_the_other_as_a_reset() {
    let mesh = two_nodes();
    let listener = mesh.listen("far", 9000);
    let mut client = mesh.connect("client", (mesh.ip("far"), 9000)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(crate::mesh::PATIENCE)).unwrap();
    client.write_all(b"part of a message").unwrap();
    let mut start = [0; 4];
    server.read_exact(&mut start).unwrap();
    culvert::sys::socket::reset_on_close(&client).unwrap();
    drop(client);
    let ended = std::iter::repeat_with(|| server.read(&mut [0; 64])).find(|read| !matches!(read, Ok(1..))).unwrap();
    assert_eq!(ended.map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionReset));
}

#[test]
fn a_server_may_speak_first() {
    let mesh = two_nodes();
    let listener = mesh.listen("far", 2525);
    let mut client = mesh.connect("client", (mesh.ip("far"), 2525)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"220 ready\r\n").unwrap();
    let mut greeting = [0; 11];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
    serve_echo(listener);
    drop(server);
    let mut socket = mesh.connect("client", (mesh.ip("far"), 2525)).unwrap();
    echo_on(&mut socket, b"EHLO client\r\n").unwrap();
}

#[test]
fn what_is_opened_is_closed_once_and_bytes_are_counted_from_client_to_server_as_received() {
    let mesh = two_nodes();
    for _ in 0..3 {
        mesh.echo("client", (mesh.ip("far"), 8080)).unwrap();
    }
    for (node, reporter) in [("left", "reporter=\"source\""), ("right", "reporter=\"destination\"")] {
        wait_until("all are closed", || mesh.metric(node, "istio_tcp_connections_closed_total", &[reporter]) == 3.0);
        assert_eq!(mesh.metric(node, "istio_tcp_connections_opened_total", &[reporter]), 3.0);
        assert_eq!(mesh.metric(node, "istio_tcp_received_bytes_total", &[reporter]), 69.0);
        assert_eq!(mesh.metric(node, "istio_tcp_sent_bytes_total", &[reporter]), 69.0);
        assert_eq!(mesh.metric(node, "istio_tcp_connections_failed_total", &[reporter]), 0.0);
        let tls = [reporter, "connection_security_policy=\"mutual_tls\"", "response_flags=\"-\"", "request_protocol=\"tcp\""];
        assert_eq!(mesh.metric(node, "istio_tcp_connections_closed_total", &tls), 3.0);
    }
}
