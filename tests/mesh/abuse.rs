//! Guests who misbehave: garbage, slowness, silence, handshakes without end, too many of everything. After each attack the proxies live,
//! others have noticed nothing, nothing spins, the log is no longer than it must be, and every descriptor was given back.

mod raw;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use culvert::lab::Place;
use culvert::sys::socket::reset_on_close;
use nix::sys::signal::Signal;
use rustls::ClientConfig;

use crate::mesh::{Mesh, PATIENCE, Process, alone, echo_on, installed, report, serve_echo, until, wait_until};
use raw::{PREFACE, SETTINGS, Tunnel, client_hello, credential};

const FIELD: &str = r#"
nodes: [left, right]
pods:
  - {name: probe, serviceAccount: probe, node: left}
  - {name: attacker, serviceAccount: attacker, node: left}
  - {name: outside, node: left, captured: false}
  - {name: stranger, node: left, captured: false}
  - {name: friend, node: left, captured: false}
  - {name: victim, serviceAccount: victim, node: right}
"#;

const POLICY: &str = r#"
authorizationPolicies:
  - metadata: {name: nobody-on-7777}
    spec: {action: DENY, rules: [{to: [{operation: {ports: ["7777"]}}]}]}
"#;

/// Short times, so that tests need not wait for the usual ones.
const ENV: [(&str, &str); 2] = [("CULVERT_HANDSHAKE_DEADLINE", "1s"), ("POOL_UNUSED_RELEASE_TIMEOUT", "400ms")];

const PORTS: [u16; 3] = [15001, 15006, 15008];
const HBONE: u16 = 15008;
/// What the limit of open files is set back to.
const FILES: usize = 20_000;
const DEADLINE: Duration = Duration::from_secs(1);
const SECOND: Duration = Duration::from_secs(1);

/// A mesh with an echo server in the pod `victim`, and what its proxies were like before anything happened.
struct Field {
    mesh: Mesh,
    good: Arc<ClientConfig>,
    proxies: [(&'static str, Process, usize); 2],
    since: Instant,
}

impl Field {
    /// `env` goes over the environment that the proxies have here otherwise.
    fn up(env: &[(&str, &str)]) -> Self {
        let env: BTreeMap<&str, &str> = ENV.iter().chain(env).copied().collect();
        let mesh = Mesh::up(&format!("{FIELD}{POLICY}proxyEnv: {}\n", serde_json::to_string(&env).unwrap()));
        serve_echo(mesh.listen("victim", 8080));
        let good = credential(&mesh.status().directory.join("ca"), "friend");
        let proxies = ["left", "right"].map(|node| (node, mesh.proxy(node), mesh.proxy(node).descriptors()));
        let field = Self { mesh, good, proxies, since: Instant::now() };
        field.visit().unwrap();
        field
    }

    /// Where the victim listens.
    fn victim(&self, port: u16) -> SocketAddr {
        (self.mesh.ip("victim"), port).into()
    }

    /// One good connection through the mesh, and one good new tunnel.
    fn visit(&self) -> io::Result<()> {
        self.mesh.echo("probe", self.victim(8080))?;
        Tunnel::open(self.mesh.connect("friend", self.victim(HBONE))?, &self.good).map(drop)
    }

    /// Runs an attack while good connections come all the time, none of which may fail.
    fn while_visited<T>(&self, attack: impl FnOnce() -> T) -> T {
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let visits = scope.spawn(|| {
                let (mut count, mut worst) = (0, Duration::ZERO);
                while count < 3 || !over.load(Ordering::Relaxed) {
                    let since = Instant::now();
                    self.visit().unwrap();
                    (count, worst) = (count + 1, worst.max(since.elapsed()));
                    thread::sleep(Duration::from_millis(20));
                }
                (count, worst)
            });
            let done = Done(&over);
            let outcome = attack();
            drop(done);
            let (count, worst) = visits.join().unwrap();
            report(&format!("{count} good visits meanwhile, the slowest took {worst:.0?}"));
            outcome
        })
    }

    /// Everything is as it was before.
    fn recovered(self) {
        self.visit().unwrap();
        self.mesh.echo("attacker", self.victim(8080)).unwrap();
        thread::scope(|scope| {
            for (node, proxy, before) in self.proxies {
                scope.spawn(move || {
                    assert!(proxy.lives(), "the proxy of {node} has ended");
                    let given_back = until(|| (proxy.descriptors() <= before).then_some(()));
                    assert!(given_back.is_some(), "{node}: {} descriptors, {before} before: {}", proxy.descriptors(), proxy.open_files());
                    let busy = proxy.cpu(SECOND);
                    assert!(busy < 5.0, "{node}: {busy:.0} % of a CPU while nothing happens");
                });
            }
        });
        self.log_is_sound();
    }

    /// Every line is one line, no longer than 2 KiB, without control characters; refusals are at most 10 a second for each reason.
    fn log_is_sound(&self) {
        // The limit counts in seconds of the process, so that two halves of one may be full.
        let most = 10 * (self.since.elapsed().as_secs() as usize + 2);
        for (node, ..) in self.proxies {
            let mut refusals: BTreeMap<String, usize> = BTreeMap::new();
            for line in self.mesh.log(node) {
                let bare = |character: char| character.is_control() && character != '\t';
                assert!(line.len() < 2048 && !line.contains(bare), "{node}: {line:?}");
                let time = line.split('\t').next().unwrap();
                assert!(time.len() == 27 && time.starts_with("20") && time.ends_with('Z'), "{node}: not a line of ours: {line:?}");
                let message = line.split('\t').nth(3).unwrap();
                if message == "connection complete" {
                    continue;
                }
                // Numbers and names differ from line to line.
                let reason: String = line.split('\t').skip(3).collect::<Vec<_>>().join(" ");
                let reason = reason.rsplit_once("error=").map_or_else(|| message.to_owned(), |(_, error)| error.to_owned());
                *refusals.entry(reason.replace(|character: char| character.is_ascii_digit(), "")).or_default() += 1;
            }
            for (reason, lines) in refusals {
                assert!(lines <= most, "{node}: {lines} lines, {most} allowed: {reason}");
            }
        }
    }

    /// A connection from a pod that nobody captures, straight to the victim's port.
    fn from(&self, pod: &str, port: u16) -> TcpStream {
        self.mesh.connect(pod, self.victim(port)).unwrap()
    }

    fn refused(&self, node: &str, reason: &str) -> f64 {
        self.mesh.metric(node, "culvert_early_refusals_total", &[&format!("reason=\"{reason}\"")])
    }
}

/// Reads until the connection has ended, however it does; returns how long that took.
fn ends(socket: &TcpStream) -> Duration {
    let since = Instant::now();
    loop {
        match (&mut &*socket).read(&mut [0; 4096]) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => panic!("not closed within {PATIENCE:?}"),
            Ok(0) | Err(_) => return since.elapsed(),
        }
    }
}

/// Whether a connection is open for so long.
fn stays_open(socket: &TcpStream, time: Duration) -> bool {
    socket.set_read_timeout(Some(time)).unwrap();
    (&mut &*socket).read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Whether nothing was read from a connection and it is still open, now.
fn is_open(socket: &TcpStream) -> bool {
    socket.set_nonblocking(true).unwrap();
    let answer = socket.peek(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
    socket.set_nonblocking(false).unwrap();
    answer
}

/// About the deadline: not before it, and not long after on a busy machine.
fn is_the_deadline(took: Duration) -> bool {
    took > DEADLINE - Duration::from_millis(200) && took < DEADLINE + Duration::from_secs(4)
}

#[test]
fn garbage_on_any_port_from_anywhere_ends_its_own_connection_and_nothing_else() {
    let field = Field::up(&[]);
    let hello = client_hello(&field.good);
    let mut odd = hello.clone();
    odd.iter_mut().skip(9).step_by(7).for_each(|byte| *byte ^= 0x55);
    let garbage: &[&[u8]] = &[
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\nhost: victim\r\n\r\n",
        &[PREFACE, SETTINGS].concat(),
        &(0..65_536_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect::<Vec<_>>(),
        &[&[22, 3, 1, 0xff, 0xff], [0; 70_000].as_slice()].concat(),
        &[22, 3, 1, 2, 0, 1, 0, 1, 0xfc],
        &[21, 3, 3, 0, 2, 2, 0],
        &hello[..hello.len() / 2],
        &odd,
        &hello.repeat(3),
    ];
    let (v4, v6) = (field.mesh.ip("victim"), field.mesh.ip6("victim"));
    let own: [IpAddr; 4] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), v4, v6];
    field.while_visited(|| {
        thread::scope(|scope| {
            for (from, addresses) in [("outside", &own[2..]), ("attacker", &own[2..]), ("victim", &own)] {
                for target in addresses.iter().flat_map(|ip| PORTS.map(|port| SocketAddr::new(*ip, port))) {
                    let field = &field;
                    scope.spawn(move || {
                        let throw = |(number, bytes): (usize, &&[u8])| {
                            // A port of the proxy may be reset before the connect returns.
                            let mut socket = field.mesh.connect(from, target).ok()?;
                            // The proxy may have had enough before the end.
                            let _ = socket.write_all(bytes);
                            if number.is_multiple_of(2) {
                                let _ = socket.shutdown(Shutdown::Write);
                            }
                            Some(socket)
                        };
                        let sockets: Vec<TcpStream> = garbage.iter().enumerate().filter_map(throw).collect();
                        sockets.iter().for_each(|socket| _ = ends(socket));
                    });
                }
            }
        });
    });
    field.recovered();
}

#[test]
fn a_handshake_byte_by_byte_ends_at_the_deadline_and_a_slow_application_goes_on() {
    let field = Field::up(&[]);
    let hello = client_hello(&field.good);
    // Gives a byte each time until it is told off; returns how many, and when.
    let drip = |bytes: &[u8], socket: &TcpStream, give: &mut dyn FnMut(u8) -> io::Result<()>| {
        let since = Instant::now();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        for (number, byte) in bytes.iter().enumerate() {
            let over = match (&mut &*socket).read(&mut [0; 512]) {
                Ok(read) => read == 0,
                Err(error) => error.kind() != io::ErrorKind::WouldBlock,
            };
            if over || give(*byte).is_err() {
                return (number, since.elapsed());
            }
        }
        panic!("all {} bytes were taken", bytes.len());
    };
    field.while_visited(|| {
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let mut socket = field.from("outside", HBONE);
                    let reader = socket.try_clone().unwrap();
                    let (given, took) = drip(&hello, &reader, &mut |byte| socket.write_all(&[byte]));
                    assert!(is_the_deadline(took), "{given} bytes of the hello in {took:?}");
                });
            }
            scope.spawn(|| {
                let mut tunnel = Tunnel::tls(field.from("outside", HBONE), &field.good).unwrap();
                let reader = tunnel.socket().try_clone().unwrap();
                let (given, took) = drip(&PREFACE.repeat(4), &reader, &mut |byte| tunnel.send(&[byte]));
                assert!(is_the_deadline(took), "{given} bytes of the preface in {took:?}");
            });
            for pod in ["attacker", "outside"] {
                let field = &field;
                scope.spawn(move || {
                    let mut socket = field.mesh.connect(pod, field.victim(8080)).unwrap();
                    let since = Instant::now();
                    while since.elapsed() < DEADLINE * 2 {
                        echo_on(&mut socket, b"s").unwrap();
                        thread::sleep(Duration::from_millis(100));
                    }
                });
            }
        });
    });
    assert!(field.refused("right", "handshake") >= 9.0);
    field.recovered();
}

#[test]
fn strangers_are_capped_per_source_and_per_node_until_the_deadline_frees_their_places() {
    let field =
        Field::up(&[("CULVERT_HANDSHAKE_DEADLINE", "2s"), ("CULVERT_MAX_UNAUTHENTICATED", "16"), ("CULVERT_MAX_UNAUTHENTICATED_PER_SOURCE", "8")]);
    // One source: its share is held, the others of it are reset at once, and everybody else gets in.
    let since = Instant::now();
    let held: Vec<TcpStream> = (0..8).map(|_| field.from("outside", HBONE)).collect();
    let waiting = || field.mesh.metric("right", "istio_tcp_sockets_open", &["reporter=\"destination\""]);
    wait_until("the share of the source is taken", || waiting() >= 8.0);
    let more: Vec<io::Result<TcpStream>> = (0..600).map(|_| field.mesh.connect("outside", field.victim(HBONE))).collect();
    // Some are reset so early that they never were connected.
    more.iter().flatten().for_each(|socket| _ = ends(socket));
    if since.elapsed() < Duration::from_millis(1800) {
        assert!(held.iter().all(is_open), "those who came first were turned out");
        field.visit().unwrap();
    }
    // Sources enough for the whole node: nobody new gets in, and who is in already goes on.
    let mut inside = field.mesh.connect("probe", field.victim(8080)).unwrap();
    echo_on(&mut inside, b"before").unwrap();
    held.iter().for_each(|socket| _ = ends(socket));
    let crowd: Vec<TcpStream> = ["outside", "stranger"].iter().flat_map(|pod| (0..8).map(|_| field.from(pod, HBONE))).collect();
    wait_until("the places of the node are taken", || {
        let turned_away = field.mesh.connect("friend", field.victim(HBONE)).is_ok_and(|socket| !stays_open(&socket, DEADLINE));
        turned_away && field.refused("right", "overload") >= 601.0
    });
    for _ in 0..20 {
        echo_on(&mut inside, b"still here").unwrap();
        field.mesh.echo("probe", field.victim(8080)).unwrap();
    }
    // The deadline frees them.
    crowd.iter().for_each(|socket| _ = ends(socket));
    field.visit().unwrap();
    field.mesh.wait_for_log("right", &["connection failed", "too many connections that are not authenticated yet", "8 for one peer"]);
    field.mesh.wait_for_log("right", &["log lines suppressed", "overload"]);
    drop(inside);
    field.recovered();
}

#[test]
fn silence_after_tls_ends_at_the_deadline() {
    let field = Field::up(&[]);
    field.while_visited(|| {
        let since = Instant::now();
        let tunnels: Vec<Tunnel> = (0..20).map(|_| Tunnel::tls(field.from("outside", HBONE), &field.good).unwrap()).collect();
        tunnels.into_iter().for_each(|mut tunnel| tunnel.drain());
        assert!(is_the_deadline(since.elapsed()), "{:?}", since.elapsed());
    });
    field.recovered();
}

#[test]
fn silence_after_the_preface_ends_at_the_deadline() {
    let field = Field::up(&[]);
    field.while_visited(|| {
        let since = Instant::now();
        let mut tunnels: Vec<Tunnel> = (0..20).map(|_| Tunnel::tls(field.from("outside", HBONE), &field.good).unwrap()).collect();
        tunnels.iter_mut().for_each(|tunnel| tunnel.send(PREFACE).unwrap());
        tunnels.into_iter().for_each(|mut tunnel| tunnel.drain());
        assert!(is_the_deadline(since.elapsed()), "{:?}", since.elapsed());
    });
    field.recovered();
}

#[test]
fn a_tunnel_whose_peer_answers_no_ping_ends() {
    let field = Field::up(&[("CULVERT_PING_INTERVAL", "300ms"), ("CULVERT_PING_TIMEOUT", "700ms")]);
    field.while_visited(|| {
        let since = Instant::now();
        let tunnels: Vec<Tunnel> = (0..20).map(|_| Tunnel::open(field.from("outside", HBONE), &field.good).unwrap()).collect();
        tunnels.into_iter().for_each(|mut tunnel| tunnel.drain());
        assert!(is_the_deadline(since.elapsed()), "{:?}", since.elapsed());
    });
    field.recovered();
}

#[test]
fn a_flood_ends_its_tunnel_and_a_line_names_the_guard() {
    const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let field = Field::up(&[]);
    field.while_visited(|| {
        let mut tunnel = Tunnel::open(field.from("outside", HBONE), &field.good).unwrap();
        // It may be over before all are sent.
        let _ = tunnel.send(&PING.repeat(2000));
        tunnel.drain();
    });
    let guard = "closed with ENHANCE_YOUR_CALM: too many control frames that nothing called for";
    field.mesh.wait_for_log("right", &["\twarn\t", "tunnel ended", "sa/friend", guard]);
    field.recovered();
}

#[test]
fn two_thousand_idle_connections_cost_little_memory_and_no_cpu() {
    const COUNT: usize = 2000;
    let _alone = alone();
    culvert::sys::limits::raise_nofile().unwrap();
    let field = Field::up(&[]);
    let listener = field.mesh.listen("victim", 9000);
    let memory = || field.proxies.map(|(_, proxy, _)| proxy.memory());
    let before = memory();
    // Each says its number, so that the two ends find each other.
    let accept = thread::spawn(move || {
        let accepted = (0..COUNT).map(|_| {
            let (mut socket, _) = listener.accept().unwrap();
            let mut number = [0; 8];
            socket.read_exact(&mut number).unwrap();
            (usize::from_be_bytes(number), socket)
        });
        accepted.collect::<BTreeMap<usize, TcpStream>>()
    });
    let target = field.victim(9000);
    let connect = |number: usize| {
        let mut socket = TcpStream::connect_timeout(&target, PATIENCE).unwrap();
        socket.write_all(&number.to_be_bytes()).unwrap();
        socket
    };
    let mut clients: Vec<TcpStream> = field.mesh.run_in(Place::Pod("attacker"), || (0..COUNT).map(connect).collect());
    wait_until("all have reached the server", || accept.is_finished());
    let mut servers = accept.join().unwrap();
    let during = memory();
    for (index, (node, proxy, idle)) in field.proxies.into_iter().enumerate() {
        let grown = during[index].saturating_sub(before[index]);
        let (each, descriptors) = (grown as f64 / COUNT as f64, proxy.descriptors() - idle);
        report(&format!("{node}: {:.1} MiB more ({each:.1} KiB a connection), {descriptors} descriptors", grown as f64 / 1024.0));
        assert!(each < 24.0, "{node}: {each:.1} KiB a connection");
        // A node may open 20,000, and each connection costs it one; the tunnels are few.
        assert!(descriptors < COUNT + COUNT / 10, "{node}: {descriptors} descriptors");
    }
    field.while_visited(|| {
        thread::scope(|scope| {
            for (node, proxy, _) in field.proxies {
                // The visits cost something; two thousand sleepers must not.
                scope.spawn(move || report(&format!("{node}: {:.0} % of a CPU meanwhile", proxy.cpu(SECOND))));
            }
        });
    });
    for number in (0..COUNT).step_by(97) {
        let mut byte = [0];
        clients[number].write_all(b"?").unwrap();
        servers.get_mut(&number).unwrap().read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"?");
    }
    drop((clients, servers));
    let after = memory();
    report(&format!("MiB of left and right: {} before, {} with them, {} after", mib(&before), mib(&during), mib(&after)));
    field.recovered();
}

fn mib(kib: &[u64]) -> String {
    kib.iter().map(|kib| format!("{:.1}", *kib as f64 / 1024.0)).collect::<Vec<_>>().join(" and ")
}

/// Changes the soft limit of open files of a process.
fn limit_files(proxy: Process, most: usize) {
    let limit = format!("--nofile={most}:");
    let status = Command::new("prlimit").args(["--pid", &proxy.pid.to_string(), &limit]).status().unwrap();
    assert!(status.success());
}

/// Lets a process open only so many more files.
fn leave_files(proxy: Process, more: usize) {
    let open = std::fs::read_dir(format!("/proc/{}/fd", proxy.pid)).unwrap();
    let open: BTreeSet<usize> = open.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).collect();
    // The limit is on the number that a new one gets, which is the lowest that is free.
    limit_files(proxy, (0..).filter(|number| !open.contains(number)).nth(more).unwrap());
}

#[test]
fn a_policy_that_comes_while_no_file_can_be_opened_is_in_force_when_one_can() {
    if !installed("prlimit", "util-linux") {
        return;
    }
    let field = Field::up(&[]);
    let (_, proxy, idle) = field.proxies[1];
    wait_until("nothing will be closed any more", || proxy.descriptors() <= idle);
    leave_files(proxy, 0);
    let env: BTreeMap<&str, &str> = ENV.into_iter().collect();
    let denial = "  - metadata: {name: nobody-on-8888}\n    spec: {action: DENY, rules: [{to: [{operation: {ports: [\"8888\"]}}]}]}\n";
    field.mesh.apply(&format!("{FIELD}{POLICY}{denial}proxyEnv: {}\n", serde_json::to_string(&env).unwrap()));
    field.mesh.wait_for_log("right", &["static configuration refused", "Too many open files"]);
    limit_files(proxy, FILES);
    serve_echo(field.mesh.listen("victim", 8888));
    wait_until("the policy is in force", || field.mesh.echo("attacker", field.victim(8888)).is_err());
    field.recovered();
}

#[test]
fn a_proxy_without_descriptors_neither_spins_nor_floods_and_serves_the_waiting_when_it_has_some_again() {
    if !installed("prlimit", "util-linux") {
        return;
    }
    let _alone = alone();
    let field = Field::up(&[]);
    let mut lasting = field.mesh.connect("attacker", field.victim(8080)).unwrap();
    echo_on(&mut lasting, b"before").unwrap();
    for (node, proxy, _) in field.proxies {
        let lines = field.mesh.log(node).len();
        leave_files(proxy, 3);
        // Two ways in: captured, through a tunnel, and from outside, plain.
        let ways = (0..60).map(|number| ["attacker", "outside"][number % 2]);
        let crowd: Vec<io::Result<TcpStream>> = ways.map(|pod| field.mesh.connect(pod, field.victim(8080))).collect();
        let busy = proxy.cpu(SECOND);
        let busy = busy.min(proxy.cpu(SECOND));
        let logged = field.mesh.log(node).split_off(lines);
        let accepts = logged.iter().filter(|line| line.contains("cannot accept connections")).count();
        report(&format!("{node}: {busy:.0} % of a CPU, {} log lines, {accepts} of them about accepting", logged.len()));
        assert!(busy < 20.0, "{node} spins");
        assert!(accepts > 0, "{node}: the limit was not reached:\n{}", logged.join("\n"));
        // One line for each connection that was ended, and ten a second for each cause.
        assert!(logged.len() <= 60 + 2 * 40, "{node}: {} lines in two seconds:\n{}", logged.len(), logged.join("\n"));
        echo_on(&mut lasting, b"during").unwrap();
        limit_files(proxy, FILES);
        // Those that were accepted and could not be carried on were ended; the others had to wait, no more.
        let served = crowd.into_iter().flatten().filter_map(|mut socket| echo_on(&mut socket, b"at last").ok()).count();
        report(&format!("{node}: {served} of 60 who waited were served"));
        assert!(served > 0, "{node}: nobody who waited was served");
        echo_on(&mut lasting, b"after").unwrap();
        field.visit().unwrap();
    }
    drop(lasting);
    field.recovered();
}

#[test]
fn clients_that_stop_hold_little_memory_and_nobody_up() {
    const EACH: usize = 32 << 20;
    if !installed("curl", "curl") {
        return;
    }
    let field = Field::up(&[]);
    // Serves more than all the buffers on the way can hold.
    let listener = field.mesh.listen("victim", 9000);
    thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || (&socket).write_all(&vec![b'x'; EACH]));
        }
    });
    let memory = || field.proxies.map(|(_, proxy, _)| proxy.memory());
    let before = memory();
    let url = format!("http://{}/", field.victim(9000));
    // Born in the pod's namespace, so that it is a client there and our own child.
    let start = || Command::new("curl").args(["--silent", "--http0.9", "--output", "/dev/null", "--limit-rate", "1M", &url]).spawn().unwrap();
    let mut stopped = Stopped(Vec::new());
    // The window of a tunnel is that of four streams.
    for _ in 0..3 {
        let client = field.mesh.run_in(Place::Pod("attacker"), start);
        signal(&client, Signal::SIGSTOP);
        stopped.0.push(client);
    }
    // Stopped before they connected, some of them: each gets the time to do so, and no more.
    let connected = || field.mesh.metric("right", "istio_tcp_connections_opened_total", &["source_workload=\"attacker"]);
    for (index, client) in stopped.0.iter().enumerate() {
        wait_until("it is connected", || {
            signal(client, Signal::SIGCONT);
            thread::sleep(Duration::from_millis(5));
            signal(client, Signal::SIGSTOP);
            connected() > index as f64
        });
    }
    let since = Instant::now();
    field.while_visited(|| {
        while since.elapsed() < DEADLINE * 2 {
            // From the same pod too, which shares the tunnel with those who stopped.
            field.mesh.echo("attacker", field.victim(8080)).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
    });
    let during = memory();
    report(&format!("MiB of left and right: {} before, {} while 3 clients are stopped", mib(&before), mib(&during)));
    for (now, before) in during.into_iter().zip(before) {
        // A stream has a window of 4 MiB, filled once; what is read ahead for it and allocated around it doubles that at most.
        assert!(now < before + 3 * 8 * 1024, "{before} KiB grew to {now}");
    }
    drop(stopped);
    field.recovered();
}

/// Ended with the test, however that ends.
struct Stopped(Vec<Child>);

impl Drop for Stopped {
    fn drop(&mut self) {
        for client in &mut self.0 {
            client.kill().unwrap();
            client.wait().unwrap();
        }
    }
}

fn signal(to: &Child, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(to.id().try_into().unwrap()), signal).unwrap();
}

#[test]
fn peers_that_vanish_during_any_step_leave_nothing_behind() {
    let field = Field::up(&[("CULVERT_CONNECT_TIMEOUT", "1s")]);
    let hello = client_hello(&field.good);
    // Nobody listens, and nobody answers at all.
    let silent = SocketAddr::from(([10, 244, 2, 200], 8080));
    let leave = |socket: &TcpStream, number: usize| {
        if number.is_multiple_of(2) {
            reset_on_close(socket).unwrap();
        }
    };
    field.while_visited(|| {
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..200 {
                    let mut socket = field.from("outside", HBONE);
                    socket.write_all(&hello[..number * hello.len() / 200]).unwrap();
                    leave(&socket, number);
                }
            });
            scope.spawn(|| {
                for number in 0..60 {
                    let mut tunnel = Tunnel::tls(field.from("outside", HBONE), &field.good).unwrap();
                    let all = [PREFACE, SETTINGS].concat();
                    tunnel.send(&all[..number * all.len() / 60]).unwrap();
                    if number > 30 {
                        // A request whose answer nobody will read.
                        tunnel.send(&all[number * all.len() / 60..]).unwrap();
                        tunnel.connect(1, field.victim(if number % 3 == 0 { 8080 } else { 9 }).to_string().as_bytes(), &[]).unwrap();
                    }
                    leave(tunnel.socket(), number);
                }
            });
            scope.spawn(|| {
                for (number, target) in [field.victim(8080), field.victim(9), silent].into_iter().cycle().take(150).enumerate() {
                    // Nobody listens on one of them: a reset may come before the connect returns.
                    if let Ok(socket) = field.mesh.connect("attacker", target) {
                        leave(&socket, number);
                    }
                }
            });
        });
    });
    field.recovered();
}

#[test]
fn connections_to_a_peer_that_is_cut_off_end_by_keepalive_and_ping() {
    let field = Field::up(&[
        ("KEEPALIVE_TIME", "1s"),
        ("KEEPALIVE_INTERVAL", "1s"),
        ("KEEPALIVE_RETRIES", "2"),
        ("CULVERT_PING_INTERVAL", "500ms"),
        ("CULVERT_PING_TIMEOUT", "1s"),
    ]);
    let mut plain = field.from("outside", 8080);
    echo_on(&mut plain, b"plain").unwrap();
    let mut tunnel = Tunnel::open(field.from("outside", HBONE), &field.good).unwrap();
    tunnel.connect(1, field.victim(8080).to_string().as_bytes(), &[]).unwrap();
    assert_eq!(tunnel.answer(1).unwrap().payload[0], 0x88, "not status 200");
    let mut half = Tunnel::tls(field.from("outside", HBONE), &field.good).unwrap();
    half.send(&PREFACE[..5]).unwrap();
    let open = || field.mesh.metric("right", "istio_tcp_sockets_open", &["reporter=\"destination\""]);
    assert!(open() >= 3.0);
    // From here on no packet passes in either direction, not even a farewell.
    let chain = |hook: &str| format!("chain {hook} {{ type filter hook {hook} priority 0; policy drop; }}\n");
    let silence = format!("table inet silence {{\n{}{}}}\n", chain("input"), chain("output"));
    field.mesh.run_in(Place::Pod("outside"), || culvert::sys::nft::apply(&silence)).unwrap();
    drop((plain, tunnel, half));
    field.while_visited(|| wait_until("all have ended", || open() <= 1.0));
    field.recovered();
}

#[test]
fn a_thousand_denied_connections_make_one_line_each_and_refusals_ten_a_second() {
    const COUNT: usize = 1000;
    let field = Field::up(&[]);
    let attempt = |(pod, port): (&str, u16)| {
        let place = field.mesh.netns(Place::Pod(pod));
        let target = field.victim(port);
        move || {
            let once = |_| {
                if let Ok(socket) = TcpStream::connect_timeout(&target, PATIENCE) {
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    ends(&socket);
                }
            };
            place.run(|| (0..COUNT / 2).for_each(once)).unwrap();
        }
    };
    field.while_visited(|| {
        thread::scope(|scope| {
            // Denied by policy through a tunnel and in plain; and refused before anybody asks policy.
            for way in [("attacker", 7777), ("outside", 7777), ("outside", 15006), ("stranger", 15001)] {
                scope.spawn(attempt(way));
            }
        });
    });
    let lines = |node: &str, parts: &[&str]| field.mesh.log(node).iter().filter(|line| parts.iter().all(|part| line.contains(part))).count();
    let denied = "explicitly denied by: default/nobody-on-7777";
    wait_until("all are logged", || lines("right", &["connection complete", denied]) == COUNT);
    assert_eq!(lines("left", &["connection complete", "http status: 401"]), COUNT / 2);
    assert_eq!(field.mesh.metric("right", "istio_tcp_connections_closed_total", &["response_flags=\"DENY\""]), COUNT as f64);
    assert_eq!(field.refused("right", "loop"), COUNT as f64);
    assert!(lines("right", &["connection failed", "recursive"]) <= 10 * (field.since.elapsed().as_secs() as usize + 2));
    wait_until("the rest is counted", || lines("right", &["log lines suppressed"]) > 0);
    let suppressed = || field.mesh.metric("right", "culvert_log_lines_suppressed_total", &[]);
    wait_until("each is logged or counted", || suppressed() as usize + lines("right", &["connection failed", "recursive"]) >= COUNT);
    assert_eq!(field.mesh.metric("right", "culvert_log_lines_dropped_total", &[]), 0.0);
    field.recovered();
}

#[test]
fn what_a_peer_says_stays_inside_its_field_of_its_line() {
    const FORGED: &str = "FORGED\terror\taccess\tconnection complete";
    let field = Field::up(&[]);
    let address = field.victim(8080).to_string();
    let long = "x".repeat(6000);
    let odd: Vec<Vec<u8>> = vec![
        format!("\n{FORGED}").into(),
        format!("\r\n{FORGED}").into(),
        format!("%0A{FORGED}").replace('\t', "%09").into(),
        b"\x1b[2J\x1b]0;FORGED\x07".to_vec(),
        "\u{202e}FORGED\u{2028}\u{9b}31m".into(),
        b"\xff\xfe\x80FORGED".to_vec(),
        b"\0FORGED".to_vec(),
        "FORGED\" error=\"none\" policy=\"none".into(),
        format!("FORGED{long}").into(),
    ];
    let try_one = |authority: &[u8], headers: &[(&[u8], &[u8])]| {
        let mut tunnel = Tunnel::open(field.from("outside", HBONE), &field.good).unwrap();
        tunnel.connect(1, authority, headers).unwrap();
        // Answered, refused, or the whole tunnel ended: all are fine.
        let _ = tunnel.answer(1);
    };
    field.while_visited(|| {
        for value in &odd {
            for before in [&b""[..], b"victim", b"[::1", b"10.244.2.2"] {
                try_one(&[before, value].concat(), &[]);
                try_one(&[before, value, b":80"].concat(), &[]);
            }
            let keys: [&[u8]; 5] = [b"k8s.cluster.name=", b"k8s.pod.name=a,k8s.namespace.name=", b"k8s.deployment.name=", b"service.name=", b""];
            for key in keys {
                // From another network: then names are taken from what the peer says.
                let baggage = [key, value].concat();
                try_one(address.as_bytes(), &[(b"x-forwarded-network", b"elsewhere"), (b"baggage", &baggage)]);
            }
            for name in [&b"forwarded"[..], b"traceparent", b"x-forwarded-network", b"host", b"x-odd"] {
                try_one(address.as_bytes(), &[(name, &[b"for=1.2.3.4;host=", value.as_slice()].concat())]);
            }
        }
    });
    // Something of it is in the log, or the test shows nothing; and lines are whole (see log_is_sound).
    let log = field.mesh.log("right");
    assert!(log.iter().any(|line| line.contains("FORGED")), "nothing that was said was logged");
    for line in log.iter().filter(|line| line.contains("FORGED")) {
        let fields = line.splitn(5, '\t').collect::<Vec<_>>();
        assert!(fields.len() == 5 && fields[..4].iter().all(|column| !column.contains("FORGED")) && !fields[4].contains('\t'), "{line}");
        assert!(!line.contains(" error=\"none\""), "{line}");
    }
    field.recovered();
}

/// What a mesh consists of that could stay: processes, namespaces, mounts.
struct Parts {
    processes: Vec<Process>,
    namespaces: BTreeSet<String>,
    directory: String,
}

impl Parts {
    fn of(mesh: &Mesh) -> Self {
        let supervisor = mesh.status().supervisor;
        let link = |path: String| std::fs::read_link(path).ok().map(|target| target.display().to_string());
        let inside = |pid: i32| link(format!("/proc/{pid}/ns/pid"));
        let ours = |pid: &i32| inside(*pid) == inside(supervisor);
        let processes: Vec<Process> = pids().into_iter().filter(ours).filter_map(|pid| Process::of(pid).ok()).collect();
        // The supervisor holds the namespaces of all nodes and pods.
        let held = std::fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap();
        let held = held.filter_map(|entry| link(entry.unwrap().path().display().to_string()));
        let namespaces: BTreeSet<String> = held.filter(|target| target.starts_with("net:[") || target.starts_with("mnt:[")).collect();
        assert!(processes.len() >= 4 && namespaces.len() >= 8, "{processes:?} {namespaces:?}");
        Self { processes, namespaces, directory: mesh.directory().display().to_string() }
    }

    /// Waits until nothing is left; a program that another test is just starting may hold our descriptors for a moment.
    fn are_gone(&self) {
        wait_until("no process is left", || !self.processes.iter().any(Process::lives));
        // Other processes do not count: the number of a namespace is given out again.
        let own = |directory: &str| std::fs::read_dir(format!("/proc/self/{directory}")).unwrap();
        let link = |path: std::path::PathBuf| std::fs::read_link(path).map(|target| target.display().to_string()).unwrap_or_default();
        let threads = || own("task").filter_map(|task| task.ok()).flat_map(|task| ["net", "mnt"].map(|kind| link(task.path().join("ns").join(kind))));
        wait_until("no thread is in a namespace of it", || !threads().any(|namespace| self.namespaces.contains(&namespace)));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&self.directory), "a mount is left");
        // Whoever still had something to do with it would have been told where it is.
        let told = |pid: i32| {
            let of = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            [of("cmdline"), of("environ"), of("mountinfo")].iter().any(|text| String::from_utf8_lossy(text).contains(&self.directory))
        };
        wait_until("nobody else knows of it", || !pids().into_iter().any(told));
    }
}

fn pids() -> Vec<i32> {
    std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok()).collect()
}

#[test]
fn nothing_of_a_mesh_is_left_after_its_end_nor_after_the_death_of_its_supervisor() {
    let definition = format!("{FIELD}  - {{name: busy, node: left, tmpfs: true, command: 'sleep 1000 & sleep 1000'}}\n");
    let mesh = Mesh::up(&definition);
    let parts = Parts::of(&mesh);
    mesh.down();
    parts.are_gone();

    let mesh = Mesh::up(&definition);
    let parts = Parts::of(&mesh);
    let supervisor = nix::unistd::Pid::from_raw(mesh.status().supervisor);
    nix::sys::signal::kill(supervisor, Signal::SIGKILL).unwrap();
    parts.are_gone();
    // Removes the files.
    drop(mesh);
    assert!(!std::path::Path::new(&parts.directory).exists());
}

#[test]
fn a_pod_cannot_take_the_places_of_the_node_by_many_addresses_of_its_own_loopback() {
    let field = Field::up(&[("CULVERT_MAX_UNAUTHENTICATED", "16"), ("CULVERT_MAX_UNAUTHENTICATED_PER_SOURCE", "8")]);
    let place = field.mesh.netns(Place::Pod("victim"));
    let strangers = place.run(|| {
        let connect = |number: u8| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from(([127, 0, 0, number], 0)).into()).unwrap();
            socket.connect(&SocketAddr::from(([127, 0, 0, 1], HBONE)).into()).map(|()| TcpStream::from(socket))
        };
        (2..40).map(connect).collect::<Vec<_>>()
    });
    for _ in 0..10 {
        field.visit().unwrap();
    }
    strangers.unwrap().iter().flatten().for_each(|socket| _ = ends(socket));
    field.recovered();
}
