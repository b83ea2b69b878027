//! SOCKS5 in captured pods (reference, dataplane §2.11).

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};

use crate::mesh::{Mesh, echo_on, installed, serve_echo, wait_until};

const LAB: &str = r#"
nodes: [left, right]
proxyEnv: {UNSTABLE_ENABLE_SOCKS5: "true", CULVERT_RESOLV_CONF: /dev/null}
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: other, serviceAccount: other, node: left}
  - {name: own, serviceAccount: own, node: left, dedicated: true}
  - {name: server, serviceAccount: server, node: right, labels: {app: server}}
  - {name: outside, node: right, captured: false}
services:
  - {name: server, selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
  - {name: ghost, selector: {app: nobody}, ports: [{port: 80}]}
authorizationPolicies:
- metadata: {name: no-other}
  spec: {action: DENY, rules: [{from: [{source: {serviceAccounts: [other]}}]}]}
"#;

const SOCKS: ([u8; 4], u16) = ([127, 0, 0, 1], 15080);
const GREETING: [u8; 3] = [5, 1, 0];

fn to_address(target: SocketAddr) -> Vec<u8> {
    let (kind, ip) = match target.ip() {
        IpAddr::V4(ip) => (1, ip.octets().to_vec()),
        IpAddr::V6(ip) => (4, ip.octets().to_vec()),
    };
    [&[5, 1, 0, kind][..], &ip, &target.port().to_be_bytes()].concat()
}

fn to_name(name: &str, port: u16) -> Vec<u8> {
    [&[5, 1, 0, 3, name.len() as u8][..], name.as_bytes(), &port.to_be_bytes()].concat()
}

/// Asks a pod's proxy; gives the code of its reply.
fn ask(mesh: &Mesh, pod: &str, request: &[u8]) -> (u8, TcpStream) {
    let mut socket = mesh.connect(pod, SOCKS).unwrap();
    socket.write_all(&GREETING).unwrap();
    let mut method = [0; 2];
    socket.read_exact(&mut method).unwrap();
    assert_eq!(method, [5, 0]);
    socket.write_all(request).unwrap();
    (code(&mut socket), socket)
}

fn code(socket: &mut TcpStream) -> u8 {
    let mut reply = [0; 10];
    socket.read_exact(&mut reply).unwrap();
    assert_eq!((reply[0], &reply[2..]), (5, &[0, 1, 0, 0, 0, 0, 0, 0][..]));
    reply[1]
}

#[test]
fn what_is_asked_for_by_address_or_name_is_reached_as_if_it_had_been_captured() {
    let mesh = Mesh::up(LAB);
    serve_echo(mesh.listen("server", 8080));
    serve_echo(mesh.listen("outside", 9090));
    let by_address = [(mesh.ip("server"), 8080), (mesh.ip6("server"), 8080), (mesh.vip("server"), 80)].map(|target| to_address(target.into()));
    let by_name = ["server", "Server.DEFAULT", "server.default.svc.cluster.local."].map(|name| to_name(name, 80));
    let as_name = to_name(&mesh.vip("server").to_string(), 80);
    for pod in ["client", "own"] {
        for request in by_address.iter().chain(&by_name).chain([&as_name]) {
            let (code, mut socket) = ask(&mesh, pod, request);
            assert_eq!(code, 0, "{request:?} in {pod}");
            echo_on(&mut socket, b"hello").unwrap();
            // Each direction ends by itself, as in any connection.
            socket.shutdown(Shutdown::Write).unwrap();
            assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
        }
        mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", &format!("sa/{pod}\""), "dst.hbone_addr"]);
    }
    mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", "sa/client\"", "dst.service=\"server.default.svc.cluster.local\""]);
    // What is not in the mesh is reached in plain TCP.
    let (code, mut socket) = ask(&mesh, "client", &to_address((mesh.ip("outside"), 9090).into()));
    assert_eq!(code, 0);
    echo_on(&mut socket, b"hello").unwrap();
    // A client that does not wait for any reply loses no byte.
    let mut hasty = mesh.connect("client", SOCKS).unwrap();
    hasty.write_all(&[&GREETING[..], &by_name[0], b"first words"].concat()).unwrap();
    let mut method = [0; 2];
    hasty.read_exact(&mut method).unwrap();
    assert_eq!(self::code(&mut hasty), 0);
    let mut echoed = [0; 11];
    hasty.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"first words");
    mesh.down();
}

#[test]
fn what_cannot_be_reached_is_answered_with_the_reason_and_counted() {
    let mesh = Mesh::up(LAB);
    serve_echo(mesh.listen("server", 8080));
    let address = |ip: IpAddr, port: u16| to_address((ip, port).into());
    let loopback = IpAddr::from([127, 0, 0, 1]);
    for (what, pod, request, expected) in [
        ("policy", "other", to_name("server", 80), 2),
        ("our own port", "client", address(loopback, 15001), 2),
        ("ourselves", "client", address(loopback, 15080), 2),
        ("a name that nobody has", "client", to_name("nobody.example", 80), 4),
        ("what is no name", "client", to_name("no body", 80), 4),
        ("a service without endpoints", "client", to_name("ghost", 80), 4),
        ("a port that is closed, outside", "client", address(mesh.ip("outside"), 9), 5),
        ("a port that is closed, in the mesh", "client", address(mesh.ip("server"), 9), 5),
        ("another's SOCKS", "client", address(mesh.ip("server"), 15080), 5),
        ("BIND", "client", vec![5, 2, 0, 1, 10, 0, 0, 1, 0, 80], 7),
        ("UDP ASSOCIATE", "client", vec![5, 3, 0, 1, 0, 0, 0, 0, 0, 0], 7),
        ("an unknown kind of address", "client", vec![5, 1, 0, 9], 8),
    ] {
        let (code, mut socket) = ask(&mesh, pod, &request);
        assert_eq!(code, expected, "{what}");
        assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0, "{what}: the connection ends after the reply");
    }
    mesh.wait_for_log("right", &["connection complete", "sa/other", "policy rejection", "no-other"]);
    mesh.wait_for_log("left", &["connection failed", "nobody.example cannot be resolved"]);
    let refused = |reason: &str| mesh.metric("left", "culvert_early_refusals_total", &[&format!("reason=\"{reason}\"")]);
    wait_until("all are counted", || [refused("loop"), refused("no_route"), refused("bad_request")] == [2.0, 2.0, 4.0]);
    // Whoever speaks something else is hung up on without an answer.
    let mut other = mesh.connect("client", SOCKS).unwrap();
    other.write_all(b"G").unwrap();
    assert_eq!(other.read(&mut [0; 1]).unwrap(), 0);
    // A client that did not wait hears the reason all the same.
    let mut hasty = mesh.connect("client", SOCKS).unwrap();
    hasty.write_all(&[&GREETING[..], &to_name("ghost", 80), &[b'x'; 4000]].concat()).unwrap();
    hasty.read_exact(&mut [0; 2]).unwrap();
    assert_eq!(code(&mut hasty), 4);
    wait_until("it is counted", || refused("bad_request") == 5.0);
    mesh.down();
}

#[test]
fn silent_clients_of_one_pod_take_no_more_than_their_places_and_no_other_pods() {
    let mesh = Mesh::up(LAB);
    serve_echo(mesh.listen("server", 8080));
    let greeted = |pod: &str| -> std::io::Result<TcpStream> {
        let mut socket = mesh.connect(pod, SOCKS)?;
        socket.write_all(&GREETING)?;
        socket.read_exact(&mut [0; 2])?;
        Ok(socket)
    };
    let mut silent: Vec<TcpStream> = (0..64).map(|_| greeted("client").unwrap()).collect();
    greeted("client").unwrap_err();
    let refused = || mesh.metric("left", "culvert_early_refusals_total", &["reason=\"overload\""]);
    wait_until("it is counted", || refused() == 1.0);
    assert_eq!(ask(&mesh, "own", &to_name("server", 80)).0, 0);
    greeted("other").unwrap();
    // Connections that stand have no place among the handshakes.
    let mut first = silent.remove(0);
    first.write_all(&to_name("server", 80)).unwrap();
    assert_eq!(code(&mut first), 0);
    wait_until("a place is free", || greeted("client").is_ok());
    echo_on(&mut first, b"hello").unwrap();
    mesh.down();
}

#[test]
fn curl_reaches_services_by_address_and_by_name_and_hears_of_a_refusal() {
    if !installed("curl", "curl") {
        return;
    }
    let mesh = Mesh::up(LAB);
    serve_page(mesh.listen("server", 8080));
    let curl = |pod: &str, option: &str, url: &str| mesh.exec(pod, &["curl", "-sS", "--max-time", "20", option, "127.0.0.1:15080", url]);
    for (option, url) in [
        ("--socks5", format!("http://{}/", mesh.vip("server"))),
        ("--socks5", format!("http://[{}]:8080/", mesh.ip6("server"))),
        ("--socks5-hostname", "http://server/".to_owned()),
        ("--socks5-hostname", "http://server.default.svc.cluster.local/".to_owned()),
    ] {
        for pod in ["client", "own"] {
            let output = curl(pod, option, &url);
            assert_eq!(String::from_utf8_lossy(&output.stdout), "a page", "{option} {url}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    let denied = curl("other", "--socks5-hostname", "http://server/");
    let words = String::from_utf8_lossy(&denied.stderr);
    // CURLE_PROXY, with the code of the reply.
    assert!(denied.status.code() == Some(97) && words.contains("(2)"), "{}: {words}", denied.status);
    mesh.down();
}

/// A server that answers every request with the same page and hangs up.
fn serve_page(listener: TcpListener) {
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let (mut head, mut byte) = (Vec::new(), [0; 1]);
            while !head.ends_with(b"\r\n\r\n") && matches!(socket.read(&mut byte), Ok(1)) {
                head.extend(byte);
            }
            let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\na page");
        }
    });
}
