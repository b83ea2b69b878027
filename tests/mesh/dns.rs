//! DNS of captured pods (reference, dataplane §9; §12.4 `test_dns_metrics`, `lookup`, `forward_to_server`, `large_response`; §12.5 "DNS TCP").

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use culvert::lab::Place;
use culvert::sys::netns::NetNs;
use hickory_proto::op::{Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mesh::{Mesh, PATIENCE, Process, alone, installed, report, wait_until};

/// A nameserver that pods may well be configured with; nobody has the address.
const NAMESERVER: &str = "10.96.0.10:53";
const NAMESERVER6: &str = "[fd00:10:96::a]:53";

fn definition(resolv_conf: &str) -> String {
    format!(
        r#"
nodes: [left, right]
proxyEnv: {{CULVERT_RESOLV_CONF: "{resolv_conf}", RUST_LOG: "info,dns=debug"}}
pods:
  - {{name: client, serviceAccount: client, node: left, labels: {{app: client}}}}
  - {{name: own, serviceAccount: own, node: left, dedicated: true}}
  - {{name: web-a, serviceAccount: web, node: right, labels: {{app: web}}}}
  - {{name: web-b, serviceAccount: web, node: right, labels: {{app: web}}}}
  - {{name: resolver, node: right, captured: false}}
services:
  - {{name: web, selector: {{app: web}}, ports: [{{port: 80}}]}}
  - {{name: pods, selector: {{app: web}}, ports: [{{port: 80}}], headless: true}}
extra:
  services:
    - {{name: outside, namespace: default, hostname: outside.example, vips: ["/240.240.0.1"], ports: {{"80": 80}}}}
"#
    )
}

/// A mesh whose proxies ask a pod outside of it what they do not know.
struct Ground {
    mesh: Mesh,
    _files: tempfile::TempDir,
    resolver: SocketAddr,
}

impl Ground {
    fn up() -> Self {
        Self::with(Mesh::up, |definition| definition)
    }

    /// The same with a control plane that is asked on demand.
    fn on_demand() -> Self {
        Self::with(Mesh::with_control_plane, |definition| definition.replace("proxyEnv: {", "proxyEnv: {XDS_ON_DEMAND: 'true', "))
    }

    fn with(up: impl FnOnce(&str) -> Mesh, edit: impl FnOnce(String) -> String) -> Self {
        // The resolver is the fourth pod, the third of its node: its address is known before the lab is.
        let resolver: SocketAddr = "10.244.2.4:53".parse().unwrap();
        let files = tempfile::tempdir().unwrap();
        let conf = files.path().join("resolv.conf");
        std::fs::write(&conf, format!("nameserver {}\n", resolver.ip())).unwrap();
        let mesh = up(&edit(definition(&conf.display().to_string())));
        assert_eq!(mesh.ip("resolver"), resolver.ip());
        Self { mesh, _files: files, resolver }
    }

    /// A socket of the client's pod that asks its nameserver.
    fn udp(&self, nameserver: &str) -> UdpSocket {
        udp_in(&self.mesh.netns(Place::Pod("client")), nameserver)
    }

    fn ask(&self, query: &Message) -> Message {
        exchange(&self.udp(NAMESERVER), query)
    }

    fn tcp(&self, nameserver: &str) -> TcpStream {
        self.mesh.connect("client", nameserver.parse::<SocketAddr>().unwrap()).unwrap()
    }

    /// Starts the resolver.
    fn serve(&self, answer: impl Fn(Message) -> Option<Message> + Send + Sync + 'static) -> Arc<AtomicU32> {
        let place = Place::Pod("resolver");
        let udp = self.mesh.run_in(place, || UdpSocket::bind(self.resolver)).unwrap();
        let tcp = self.mesh.run_in(place, || TcpListener::bind(self.resolver)).unwrap();
        let (answer, asked) = (Arc::new(answer), Arc::new(AtomicU32::new(0)));
        let (answer_udp, asked_udp, client) = (answer.clone(), asked.clone(), self.mesh.ip("client"));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok((length, peer)) = udp.recv_from(&mut buffer) {
                assert_eq!(peer.ip(), client, "asked by the pod itself, as its NetworkPolicy sees it");
                asked_udp.fetch_add(1, Ordering::Relaxed);
                if let Some(answer) = answer_udp(Message::from_vec(&buffer[..length]).unwrap()) {
                    udp.send_to(&answer.to_vec().unwrap(), peer).unwrap();
                }
            }
        });
        let asked_tcp = asked.clone();
        thread::spawn(move || {
            for mut stream in tcp.incoming().map_while(Result::ok) {
                assert_eq!(stream.peer_addr().unwrap().ip(), client);
                asked_tcp.fetch_add(1, Ordering::Relaxed);
                if let Some(answer) = answer(receive(&mut stream)) {
                    send(&mut stream, &answer);
                }
            }
        });
        asked
    }
}

fn udp_in(netns: &NetNs, nameserver: &str) -> UdpSocket {
    let nameserver: SocketAddr = nameserver.parse().unwrap();
    let any: SocketAddr = if nameserver.is_ipv4() { "0.0.0.0:0".parse().unwrap() } else { "[::]:0".parse().unwrap() };
    let socket = netns.run(|| UdpSocket::bind(any).and_then(|socket| socket.connect(nameserver).map(|()| socket))).unwrap().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn exchange(socket: &UdpSocket, query: &Message) -> Message {
    socket.send(&query.to_vec().unwrap()).unwrap();
    let mut buffer = vec![0; 65_535];
    let length = socket.recv(&mut buffer).unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.message_type), (query.metadata.id, MessageType::Response));
    answer
}

fn send(stream: &mut TcpStream, message: &Message) {
    let bytes = message.to_vec().unwrap();
    let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], &bytes].concat()).unwrap();
}

fn receive(stream: &mut TcpStream) -> Message {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut bytes = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut bytes).unwrap();
    Message::from_vec(&bytes).unwrap()
}

fn addresses(answer: &Message) -> BTreeSet<IpAddr> {
    answer.answers.iter().filter_map(|record| record.data.ip_addr()).collect()
}

fn said(answer: &Message) -> (ResponseCode, bool, usize) {
    (answer.metadata.response_code, answer.metadata.authoritative, answer.answers.len())
}

/// The resolver's answer to everything: one TXT record, and a bit that we would never set.
fn text(query: Message, text: &str) -> Message {
    let mut answer = query.clone().into_response();
    answer.metadata.authentic_data = true;
    let name = query.queries[0].name().clone();
    answer.add_answer(Record::from_rdata(name, 4242, RData::TXT(hickory_proto::rr::rdata::TXT::new(vec![text.to_owned()]))));
    answer
}

#[test]
fn names_of_the_mesh_are_answered_over_udp_and_tcp_in_both_families_to_raw_queries_and_real_resolvers() {
    let ground = Ground::up();
    let mesh = &ground.mesh;
    let [vip, vip6] = [mesh.vip("web"), mesh.vips("web").into_iter().find(IpAddr::is_ipv6).unwrap()];
    // Through nameservers of either family; answers come from the address that was asked, or a connected socket would not see them.
    for nameserver in [NAMESERVER, NAMESERVER6] {
        let (socket, mut stream) = (ground.udp(nameserver), ground.tcp(nameserver));
        for name in ["web.", "web.default.", "web.default.svc.", "Web.default.SVC.cluster.local."] {
            for (kind, address) in [(RecordType::A, vip), (RecordType::AAAA, vip6)] {
                let question = query(name, kind);
                let over_udp = exchange(&socket, &question);
                assert_eq!(said(&over_udp), (ResponseCode::NoError, true, 1), "{name} {kind} through {nameserver}");
                assert_eq!((addresses(&over_udp), over_udp.answers[0].ttl), ([address].into(), 30));
                assert_eq!(over_udp.queries[0].name().to_ascii(), name, "the case comes back");
                send(&mut stream, &question);
                assert_eq!(receive(&mut stream), over_udp, "several questions on one connection");
            }
        }
    }
    // A dedicated proxy does the same for its pod.
    let own = exchange(&udp_in(&mesh.netns(Place::Pod("own")), NAMESERVER), &query("web.", RecordType::A));
    assert_eq!((said(&own), addresses(&own)), ((ResponseCode::NoError, true, 1), [vip].into()));
    // A headless service is its pods.
    let pods = [mesh.ip("web-a"), mesh.ip("web-b")];
    assert_eq!(addresses(&ground.ask(&query("pods.default.svc.cluster.local.", RecordType::A))), pods.into());
    // Owned, but not of this family: no answer, and not "no such name".
    assert_eq!(said(&ground.ask(&query("outside.example.", RecordType::AAAA))), (ResponseCode::NoError, true, 0));
    // A search domain was appended: a CNAME, then the address.
    let answer = ground.ask(&query("outside.example.default.svc.cluster.local.", RecordType::A));
    assert_eq!((said(&answer), addresses(&answer)), ((ResponseCode::NoError, true, 2), ["240.240.0.1".parse().unwrap()].into()));
    assert_eq!(answer.answers[0].data.to_string(), "outside.example.");

    // The C library's resolver and Python's, past /etc/hosts; its search list is that of a pod.
    for name in ["web", "web.default", "web.default.svc.cluster.local"] {
        let printed = mesh.exec_ok("client", &["getent", "-s", "hosts:dns", "ahosts", name]);
        assert!(printed.contains(&vip.to_string()) && printed.contains(&vip6.to_string()), "{name}: {printed}");
    }
    assert!(mesh.exec_ok("client", &["getent", "ahostsv4", "outside.example"]).starts_with("240.240.0.1 "));
    if installed("python3", "python3") {
        let program = "import socket; print(sorted({a[4][0] for a in socket.getaddrinfo('outside.example', 80, socket.AF_INET)}))";
        assert_eq!(mesh.exec_ok("client", &["python3", "-c", program]), "['240.240.0.1']\n");
    }
    // Only in the pod: its neighbours cannot ask.
    let _ = mesh.call_fails("resolver", (mesh.ip("client"), 15053));
    let stranger = udp_in(&mesh.netns(Place::Pod("resolver")), &SocketAddr::from((mesh.ip("client"), 15053)).to_string());
    stranger.send(&query("web.", RecordType::A).to_vec().unwrap()).unwrap();
    assert_eq!(stranger.recv(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);

    let labels = |kind: &str, protocol: &str| [format!("request_query_type=\"{kind}\""), format!("request_protocol=\"{protocol}\"")];
    for (kind, protocol) in [("a", "udp"), ("aaaa", "udp"), ("a", "tcp"), ("aaaa", "tcp")] {
        let labels = labels(kind, protocol);
        let labels: Vec<&str> = labels.iter().map(String::as_str).chain(["source_canonical_service=\"client\""]).collect();
        assert!(mesh.metric("left", "istio_dns_requests_total", &labels) >= 8.0, "{labels:?}");
    }
    mesh.wait_for_log("left", &["debug", "\tdns", "src.workload=\"client\"", "src.namespace=\"default\"", "query=A", "domain=\"web\""]);
    ground.mesh.down();
}

#[test]
fn what_the_mesh_does_not_own_is_asked_upstream_as_it_is_from_the_pods_own_address() {
    let ground = Ground::up();
    let mesh = &ground.mesh;
    let asked = ground.serve(|query| {
        let name = query.queries[0].name().to_ascii().to_ascii_lowercase();
        match name.as_str() {
            "gone.example." => {
                let mut answer = query.into_response();
                answer.metadata.response_code = ResponseCode::NXDomain;
                Some(answer)
            }
            "silent.example." => None,
            // Over UDP this is more than a client without EDNS takes.
            "big.example." => {
                let mut answer = text(query.clone(), &"x".repeat(200));
                for _ in 0..5 {
                    answer.add_answer(answer.answers[0].clone());
                }
                Some(answer)
            }
            _ => Some(text(query, "from upstream")),
        }
    });
    // Every type but A and AAAA, also for names that are ours; and every name that is not.
    for (name, kind) in [
        ("web.default.svc.cluster.local.", RecordType::SRV),
        ("web.default.svc.cluster.local.", RecordType::TXT),
        ("1.0.244.10.in-addr.arpa.", RecordType::PTR),
        ("example.org.", RecordType::A),
        ("Example.ORG.", RecordType::AAAA),
        ("example.org.", RecordType::Unknown(65_280)),
    ] {
        let question = query(name, kind);
        for answer in [ground.ask(&question), {
            let mut stream = ground.tcp(NAMESERVER);
            send(&mut stream, &question);
            receive(&mut stream)
        }] {
            assert_eq!(answer, text(question.clone(), "from upstream"), "{name} {kind}");
        }
    }
    assert_eq!(ground.ask(&query("gone.example.", RecordType::A)).metadata.response_code, ResponseCode::NXDomain);
    // Too big for a datagram: the TC bit, and the whole over TCP.
    let question = query("big.example.", RecordType::TXT);
    let cut = ground.ask(&question);
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let mut stream = ground.tcp(NAMESERVER);
    send(&mut stream, &question);
    assert_eq!(receive(&mut stream).answers.len(), 6);
    // Nobody answers: the client hears of it before its own patience ends.
    let (begin, before) = (Instant::now(), asked.load(Ordering::Relaxed));
    let answer = ground.ask(&query("silent.example.", RecordType::A));
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert!(begin.elapsed() >= Duration::from_secs(4), "{:?}", begin.elapsed());
    assert_eq!(asked.load(Ordering::Relaxed) - before, 2, "asked once more, for a datagram that was lost");
    mesh.wait_for_log("left", &["warn", "DNS query not answered", "domain=\"silent.example\"", "no answer from"]);

    assert!(mesh.metric("left", "istio_dns_upstream_requests_total", &["request_query_type=\"srv\"", "request_protocol=\"udp\""]) >= 1.0);
    assert_eq!(mesh.metric("left", "istio_dns_upstream_failures_total", &["request_query_type=\"a\"", "request_protocol=\"udp\""]), 1.0);
    assert!(mesh.metric("left", "istio_dns_upstream_request_duration_seconds_count", &[]) >= 10.0);
    assert!(mesh.metric("left", "istio_dns_requests_total", &["request_query_type=\"unknown\""]) >= 1.0);
}

#[test]
fn garbage_is_refused_or_ignored_and_a_dead_upstream_does_not_delay_names_of_the_mesh() {
    let ground = Ground::up();
    let socket = ground.udp(NAMESERVER);
    let refused = |bytes: &[u8]| {
        socket.send(bytes).unwrap();
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!((&buffer[..2], length >= 12), (&bytes[..2], true));
        buffer[3] & 0x0f
    };
    let good = query("web.", RecordType::A).to_vec().unwrap();
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        bytes
    };
    assert_eq!(refused(&changed(&|bytes| bytes[2] |= 0x80)), 1, "FORMERR to a response");
    assert_eq!(refused(&changed(&|bytes| bytes[2] |= 5 << 3)), 4, "NOTIMP to an update");
    assert_eq!(refused(&changed(&|bytes| bytes.truncate(14))), 1);
    for bytes in [&b"x"[..], &[0xff; 11], &[0; 4097], &[0xff; 60_000]] {
        socket.send(bytes).unwrap();
    }
    let mut noise = 1_u32;
    for _ in 0..2000 {
        let mut next = || {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (noise >> 24) as u8
        };
        let length = 12 + usize::from(next() / 4);
        let bytes: Vec<u8> = (0..length).map(|_| next()).collect();
        let _ = socket.send(&bytes);
    }
    drop(socket);
    // Over TCP nonsense ends the connection or is refused, and connections that only wait are limited.
    let mut stream = ground.tcp(NAMESERVER);
    stream.write_all(&[0, 3, 1, 2, 3]).unwrap();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    let waiting: Vec<TcpStream> = (0..64).map(|_| ground.tcp(NAMESERVER)).collect();
    wait_until("further connections are closed", || ground.tcp(NAMESERVER).read(&mut [0]).is_ok_and(|length| length == 0));
    drop(waiting);

    // The resolver's pod is there, and does not answer: 300 questions wait, of which 256 may; names of the mesh are answered at once.
    let _silent = ground.mesh.run_in(Place::Pod("resolver"), || UdpSocket::bind(ground.resolver)).unwrap();
    let (pending, begin) = (ground.udp(NAMESERVER), Instant::now());
    for number in 0..300 {
        pending.send(&query(&format!("{number}.example."), RecordType::A).to_vec().unwrap()).unwrap();
        if number % 50 == 49 {
            // One after the other: when this is answered, those before it were taken out of the socket's buffer.
            ground.ask(&query("web.", RecordType::A));
        }
    }
    let mut refused = 0;
    let mut buffer = [0; 512];
    while refused < 44 {
        let length = pending.recv(&mut buffer).unwrap();
        assert_eq!(Message::from_vec(&buffer[..length]).unwrap().metadata.response_code, ResponseCode::ServFail);
        refused += 1;
    }
    assert!(begin.elapsed() < Duration::from_secs(4), "questions over the limit are refused at once, not after {:?}", begin.elapsed());
    let begin = Instant::now();
    assert_eq!(said(&ground.ask(&query("web.", RecordType::A))), (ResponseCode::NoError, true, 1));
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    let lines = ground.mesh.log("left").iter().filter(|line| line.contains("DNS query refused")).count();
    assert!((1..=20).contains(&lines), "{lines} lines for 44 refusals");
}

#[test]
fn a_thousand_questions_a_second_are_answered_in_bounded_memory() {
    let _alone = alone();
    let ground = Ground::up();
    ground.serve(|query| Some(text(query, "from upstream")));
    let proxy = ground.mesh.proxy("left");
    let burst = |rounds: u32| {
        let (begin, mut sent) = (Instant::now(), 0);
        let socket = ground.udp(NAMESERVER);
        for round in 0..rounds {
            // Half of them are passed on. Twenty at a time, as fast as they are answered, but not more than a thousand a second.
            let questions: Vec<Message> = (0..20).map(|number| query(if number % 2 == 0 { "web." } else { "example.org." }, RecordType::A)).collect();
            for question in &questions {
                socket.send(&question.to_vec().unwrap()).unwrap();
            }
            let mut left: BTreeSet<u16> = questions.iter().map(|question| question.metadata.id).collect();
            let mut buffer = [0; 512];
            while !left.is_empty() {
                let length = socket.recv(&mut buffer).unwrap();
                left.remove(&u16::from_be_bytes([buffer[0], buffer[1]]));
                assert!(length > 12 && buffer[3] & 0x0f == 0);
            }
            sent += 20;
            let due = begin + Duration::from_millis(20) * (round + 1);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        f64::from(sent) / begin.elapsed().as_secs_f64()
    };
    burst(50);
    let (before, descriptors) = (proxy.memory(), proxy.descriptors());
    let rate = burst(150);
    let grown = proxy.memory().saturating_sub(before);
    report(&format!("{rate:.0} questions a second, {grown} KiB more than before"));
    assert!(grown < 8 << 10, "{grown} KiB");
    wait_until("no socket is left over", || proxy.descriptors() <= descriptors + 4);
}

#[test]
fn a_pod_that_the_mesh_does_not_know_gets_a_failure_and_one_that_becomes_known_in_time_an_answer() {
    let ground = Ground::up();
    let whole = std::fs::read_to_string(ground.mesh.mesh_file()).unwrap();
    let without: String = {
        let mut file: serde_json::Value = serde_json::from_str(&whole).unwrap();
        file["workloads"].as_array_mut().unwrap().retain(|workload| workload["name"] != "client");
        file.to_string()
    };
    let knows = |count: usize| {
        wait_until("the proxy has read the file", || {
            let dump = ground.mesh.config_dump("left");
            dump["workloads"].as_array().unwrap().iter().filter(|workload| workload["name"] == "client").count() == count
        });
    };
    ground.mesh.replace_mesh_file(&without);
    knows(0);
    let begin = Instant::now();
    let answer = ground.ask(&query("web.", RecordType::A));
    assert_eq!(said(&answer), (ResponseCode::ServFail, false, 0));
    assert!(begin.elapsed() >= Duration::from_secs(4), "{:?}", begin.elapsed());
    let socket = ground.udp(NAMESERVER);
    let waiting = thread::spawn(move || exchange(&socket, &query("web.", RecordType::A)));
    thread::sleep(Duration::from_millis(200));
    ground.mesh.replace_mesh_file(&whole);
    assert_eq!(said(&waiting.join().unwrap()), (ResponseCode::NoError, true, 1));
}

#[test]
fn a_proxy_without_dns_capture_leaves_the_pods_dns_alone() {
    let mesh = Mesh::up(
        r#"
nodes: [left]
proxyEnv: {ISTIO_META_DNS_CAPTURE: "false"}
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: resolver, node: left, captured: false}
"#,
    );
    let resolver = SocketAddr::from((mesh.ip("resolver"), 53));
    let socket = mesh.run_in(Place::Pod("resolver"), || UdpSocket::bind(resolver)).unwrap();
    let client = udp_in(&mesh.netns(Place::Pod("client")), &resolver.to_string());
    client.send(b"to the resolver itself").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let (length, peer) = socket.recv_from(&mut [0; 64]).unwrap();
    assert_eq!((length, peer.ip()), (22, mesh.ip("client")));
    let error = mesh.run_in(Place::Pod("client"), || TcpStream::connect(("127.0.0.1", 15053))).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn questions_under_way_are_answered_while_a_proxy_drains() {
    let ground = Ground::up();
    let release = Arc::new(std::sync::Barrier::new(3));
    let held = release.clone();
    let asked = ground.serve(move |query| {
        held.wait();
        Some(text(query, "late"))
    });
    let question = query("slow.example.", RecordType::TXT);
    let (socket, mut stream) = (ground.udp(NAMESERVER), ground.tcp(NAMESERVER));
    socket.send(&question.to_vec().unwrap()).unwrap();
    send(&mut stream, &question);
    wait_until("both questions are with the resolver", || asked.load(Ordering::Relaxed) == 2);
    let proxy = ground.mesh.proxy("left");
    kill(Pid::from_raw(proxy.pid), Signal::SIGTERM).unwrap();
    ground.mesh.wait_for_log("left", &["draining"]);
    release.wait();
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(Message::from_vec(&buffer[..length]).unwrap(), text(question.clone(), "late"));
    assert_eq!(receive(&mut stream), text(question, "late"));
    wait_until("the proxy has ended, now that nobody waits", || !proxy.lives());
}

#[test]
fn on_demand_names_are_asked_for_first_and_what_nobody_explains_in_time_is_asked_upstream() {
    let ground = Ground::on_demand();
    let mesh = &ground.mesh;
    let asked_upstream = ground.serve(|query| Some(text(query, "upstream")));
    let known = || -> BTreeSet<String> {
        let dump = mesh.config_dump("left");
        dump["services"].as_array().unwrap().iter().map(|service| service["hostname"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(known(), BTreeSet::new(), "nothing is known that nobody needs");
    let pods = BTreeSet::from([mesh.ip("web-a"), mesh.ip("web-b")]);
    let expected = [("web.", [mesh.vip("web")].into()), ("pods.default.", pods), ("outside.example.", ["240.240.0.1".parse().unwrap()].into())];
    for (name, expected) in &expected {
        let answer = ground.ask(&query(name, RecordType::A));
        assert!(answer.metadata.authoritative, "{name}");
        assert_eq!(&addresses(&answer), expected, "{name}");
    }
    assert_eq!(known(), ["web.default.svc.cluster.local", "pods.default.svc.cluster.local", "outside.example"].map(str::to_owned).into());
    // Nobody's: the control plane says so, and the pod's resolver is asked at once.
    let asked_before = asked_upstream.load(Ordering::Relaxed);
    let answer = ground.ask(&query("nobody.example.", RecordType::A));
    assert!(answer.metadata.authentic_data && !answer.metadata.authoritative, "it is the resolver's answer");
    assert_eq!(asked_upstream.load(Ordering::Relaxed), asked_before + 1);
    assert!(!mesh.log("left").iter().any(|line| line.contains("the control plane has not said")), "that took no time out");

    let control = Process::of(mesh.status().control.unwrap().host_pid).unwrap();
    kill(Pid::from_raw(control.pid), Signal::SIGKILL).unwrap();
    wait_until("the control plane is dead", || !control.lives());
    for (name, expected) in &expected {
        assert_eq!(&addresses(&ground.ask(&query(name, RecordType::A))), expected, "{name} is known without it");
    }
    let begun = Instant::now();
    assert!(ground.ask(&query("somebody.example.", RecordType::A)).metadata.authentic_data);
    assert!(begun.elapsed() >= Duration::from_secs(1), "it was waited for");
    mesh.wait_for_log("left", &["the control plane has not said", "somebody.example", "no answer within 1s"]);
    ground.mesh.down();
}
