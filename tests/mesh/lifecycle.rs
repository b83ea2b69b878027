//! How proxies begin, tell about themselves, change and end (reference, dataplane §8, 10.2–10.4, 11; §12.4: `test_ztunnel_shutdown`,
//! `test_server_shutdown`, `test_shutdown_*`, `test_quit_lifecycle`, `test_conflicting_bind_error_*`, `test_prefetch_forget_certs`,
//! `test_hbone_metrics_access`, `test_stats_exist`, `test_tcp_*_metrics`, `*_dedicated`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use culvert::identity::LocalIssuer;
use culvert::lab::Place;
use culvert::lifecycle::Clock;
use culvert::node::zds::{Delivery, ZdsError, ZdsServer};
use culvert::sys::link::Links;
use culvert::sys::netns::NetNs;
use culvert::sys::process::die_with_parent;
use culvert::wire::zds::Pod;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::caller::Ca;
use crate::mesh::{Mesh, PATIENCE, echo_on, serve_echo, until, wait_until};
use crate::pki;

const TWO: &str = "
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: server, serviceAccount: server, node: right}
  - {name: outside, node: left, captured: false}
";

fn two(env: &str) -> Mesh {
    let mesh = Mesh::up(&format!("{TWO}proxyEnv: {{{env}}}\n"));
    serve_echo(mesh.listen("server", 8080));
    mesh
}

/// Two connections that carry bytes: over HBONE, and in plain TCP from outside of the mesh.
fn two_connections(mesh: &Mesh) -> [TcpStream; 2] {
    ["client", "outside"].map(|pod| {
        let mut socket = mesh.connect(pod, (mesh.ip("server"), 8080)).unwrap();
        echo_on(&mut socket, b"before").unwrap();
        socket
    })
}

fn signal(mesh: &Mesh, proxy_of: &str, signal: Signal) {
    kill(Pid::from_raw(mesh.proxy_pid(proxy_of)), signal).unwrap();
}

/// Waits until a proxy has ended; says how.
fn wait_for_end(mesh: &Mesh, proxy_of: &str) -> String {
    let state = || {
        let status = mesh.status();
        let proxy = status.node(proxy_of).map(|node| node.proxy.clone());
        proxy.unwrap_or_else(|_| status.pod(proxy_of).unwrap().proxy.clone().unwrap()).state
    };
    until(|| Some(state()).filter(|state| state != "running")).expect("the proxy ends")
}

/// Waits for the end of a connection on which nothing more is said; `true` when it is a reset, which nobody takes for the end of the data.
fn ends_with_a_reset(mut socket: TcpStream) -> bool {
    match socket.read(&mut [0; 8]) {
        Ok(0) => false,
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => true,
        other => panic!("no end but {other:?}"),
    }
}

#[test]
fn dedicated_proxies_speak_hbone_with_each_other_and_with_shared_ones() {
    let mesh = Mesh::up(
        "
nodes: [left, right]
pods:
  - {name: one, serviceAccount: one, node: left, dedicated: true}
  - {name: two, serviceAccount: two, node: right, dedicated: true}
  - {name: shared, serviceAccount: shared, node: right}
  - {name: plain, node: left, captured: false}
",
    );
    for pod in ["one", "two", "shared", "plain"] {
        serve_echo(mesh.listen(pod, 8080));
    }
    let proxy = |pod: &'static str| if pod == "shared" { "right" } else { pod };
    for (from, to) in [("one", "two"), ("one", "shared"), ("shared", "one")] {
        for ip in [mesh.ip(to), mesh.ip6(to)] {
            mesh.echo(from, (ip, 8080)).unwrap();
            let identity = |pod| format!("spiffe://cluster.local/ns/default/sa/{pod}");
            let target = SocketAddr::from((ip, 8080)).to_string();
            let parts = |direction| ["connection complete".to_owned(), format!("direction=\"{direction}\""), format!("dst.hbone_addr={target}")];
            let outbound = [parts("outbound").to_vec(), vec![format!("dst.identity=\"{}\"", identity(to))]].concat();
            let inbound = [parts("inbound").to_vec(), vec![format!("src.identity=\"{}\"", identity(from))]].concat();
            for (of, parts) in [(proxy(from), outbound), (proxy(to), inbound)] {
                mesh.wait_for_log(of, &parts.iter().map(String::as_str).collect::<Vec<_>>());
            }
        }
    }
    // Uncaptured on either side.
    mesh.echo("one", (mesh.ip("plain"), 8080)).unwrap();
    mesh.echo("plain", (mesh.ip("two"), 8080)).unwrap();
    let line = mesh.wait_for_log("two", &["connection complete", "direction=\"inbound\"", &format!("src.addr={}", mesh.ip("plain"))]);
    assert!(!line.contains("identity") && !line.contains("hbone"), "{line}");
    // The application of a dedicated pod sees its client as well.
    let listener = mesh.listen("two", 9000);
    let _socket = mesh.connect("one", (mesh.ip("two"), 9000)).unwrap();
    assert_eq!(listener.accept().unwrap().1.ip().to_canonical(), mesh.ip("one"));
}

#[test]
fn a_proxy_that_is_told_to_end_takes_nothing_new_and_lets_connections_finish() {
    let mesh = two("CONNECTION_TERMINATION_DEADLINE: 30s");
    let open = two_connections(&mesh);
    signal(&mesh, "right", Signal::SIGTERM);
    mesh.wait_for_log("right", &["draining, told by SIGTERM"]);
    wait_until("new connections are refused", || mesh.echo("client", (mesh.ip("server"), 8080)).is_err());
    let refused = mesh.connect("outside", (mesh.ip("server"), 8080)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    for mut socket in open {
        echo_on(&mut socket, b"still here").unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(socket.read(&mut [0; 8]).unwrap(), 0, "a clean end");
    }
    let begin = Instant::now();
    assert_eq!(wait_for_end(&mesh, "right"), "exited with 0");
    assert!(begin.elapsed() < Duration::from_secs(3), "it waited for nobody: {:?}", begin.elapsed());
    mesh.wait_for_log("right", &["drained"]);
    assert_eq!(mesh.log("right").iter().filter(|line| line.contains("connection closed due to connection drain")).count(), 0);
    // The same on the side of the client: its own connections are finished, new ones refused.
    serve_echo(mesh.listen("outside", 8081));
    let mut socket = mesh.connect("client", (mesh.ip("outside"), 8081)).unwrap();
    echo_on(&mut socket, b"before").unwrap();
    signal(&mesh, "left", Signal::SIGINT);
    wait_until("new connections are refused", || {
        mesh.connect("client", (mesh.ip("outside"), 8081)).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    });
    echo_on(&mut socket, b"still here").unwrap();
    drop(socket);
    assert_eq!(wait_for_end(&mesh, "left"), "exited with 0");
}

#[test]
fn at_the_deadline_what_is_left_is_cut_and_recorded() {
    let mesh = Mesh::up(
        "
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: server, serviceAccount: server, node: right}
  - {name: outside, node: left, captured: false}
  - {name: alone, serviceAccount: alone, node: left, dedicated: true}
proxyEnv: {CONNECTION_TERMINATION_DEADLINE: 500ms}
",
    );
    for pod in ["server", "alone"] {
        serve_echo(mesh.listen(pod, 8080));
    }
    for (server, of) in [("server", "right"), ("alone", "alone")] {
        let open: Vec<TcpStream> = [("client", server), ("outside", server)]
            .iter()
            .map(|(pod, server)| {
                let mut socket = mesh.connect(pod, (mesh.ip(server), 8080)).unwrap();
                echo_on(&mut socket, b"before").unwrap();
                socket
            })
            .collect();
        let begin = Instant::now();
        signal(&mesh, of, Signal::SIGTERM);
        assert_eq!(wait_for_end(&mesh, of), "exited with 0");
        let took = begin.elapsed();
        assert!(took > Duration::from_millis(450) && took < Duration::from_secs(3), "{took:?}");
        let cut = mesh
            .log(of)
            .iter()
            .filter(|line| line.contains("connection complete") && line.contains("connection closed due to connection drain"))
            .count();
        assert_eq!(cut, 2, "{}", mesh.log(of).join("\n"));
        mesh.wait_for_log(of, &["were cut at the end of the drain", "500ms"]);
        for socket in open {
            assert!(ends_with_a_reset(socket));
        }
    }
    // The client's side of a cut: its own proxy goes, and it is no failure of the connection's.
    let listener = mesh.listen("outside", 8080);
    let _socket = mesh.connect("client", (mesh.ip("outside"), 8080)).unwrap();
    let (_server, _) = listener.accept().unwrap();
    signal(&mesh, "left", Signal::SIGTERM);
    assert_eq!(wait_for_end(&mesh, "left"), "exited with 0");
    mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", "connection closed due to connection drain"]);
}

#[test]
fn a_second_interrupt_ends_at_once() {
    let mesh = two("CONNECTION_TERMINATION_DEADLINE: 60s");
    let open = two_connections(&mesh);
    signal(&mesh, "right", Signal::SIGINT);
    mesh.wait_for_log("right", &["draining, told by SIGINT"]);
    signal(&mesh, "right", Signal::SIGINT);
    assert_eq!(wait_for_end(&mesh, "right"), "exited with 130");
    for socket in open {
        ends_with_a_reset(socket);
    }
}

#[test]
fn the_admin_page_ends_the_proxy_by_post_only() {
    let mesh = two("CONNECTION_TERMINATION_DEADLINE: 30s");
    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
    assert_eq!(mesh.page("right", 15000, "/quitquitquit").0, 405);
    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
    let post = "POST /quitquitquit HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    assert_eq!(mesh.request("right", 15000, post), (200, "shutdown now\n".to_owned()));
    assert_eq!(wait_for_end(&mesh, "right"), "exited with 0");
    mesh.wait_for_log("right", &["draining, told by the admin page"]);
}

#[test]
fn the_connections_of_a_pod_that_goes_end_at_once_and_new_ones_fail() {
    let mesh = two("CULVERT_CONNECT_TIMEOUT: 1s, CONNECTION_TERMINATION_DEADLINE: 30s");
    let [tunnelled, plain] = two_connections(&mesh);
    // One that the pod itself has opened.
    let listener = mesh.listen("outside", 8081);
    let own = mesh.connect("server", (mesh.ip("outside"), 8081)).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    let begin = Instant::now();
    let target = (mesh.ip("server"), 8080);
    mesh.apply(&TWO.replace("  - {name: server, serviceAccount: server, node: right}\n", ""));
    assert!(ends_with_a_reset(tunnelled));
    for socket in [plain, accepted] {
        assert!(ends_with_a_reset(socket));
    }
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    drop(own);
    for _ in 0..2 {
        // The application's connect succeeds: nobody knows yet that there is nobody.
        mesh.call_fails("client", target).unwrap_err();
    }
    mesh.wait_for_log("left", &["\terror\t", "connection complete", "direction=\"outbound\"", "connection failed"]);
    wait_until("the pod is forgotten", || mesh.config_dump("right")["workloadState"].as_object().is_some_and(serde_json::Map::is_empty));
    assert_eq!(mesh.metric("right", "workload_manager_active_proxy_count", &[]), 0.0);
    assert_eq!(mesh.metric("right", "workload_manager_proxies_stopped_total", &[]), 1.0);
}

#[test]
fn a_restart_of_a_proxy_under_load_leaves_nobody_hanging() {
    let mesh = two("CONNECTION_TERMINATION_DEADLINE: 1s");
    let (stop, good, longest) = (AtomicBool::new(false), AtomicUsize::new(0), std::sync::Mutex::new(Duration::ZERO));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    match mesh.echo("client", (mesh.ip("server"), 8080)) {
                        Ok(()) => drop(good.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "it hung"),
                    }
                    let mut longest = longest.lock().unwrap();
                    *longest = begin.elapsed().max(*longest);
                }
            });
        }
        for node in ["right", "left"] {
            let before = good.load(Ordering::Relaxed);
            wait_until("connections work", || good.load(Ordering::Relaxed) > before + 20);
            mesh.lab().restart_proxy(node).unwrap();
            let before = good.load(Ordering::Relaxed);
            wait_until("connections work again", || good.load(Ordering::Relaxed) > before + 20);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let longest = *longest.lock().unwrap();
    assert!(longest < Duration::from_secs(5), "{longest:?}");
    for node in ["left", "right"] {
        assert_eq!(mesh.page(node, 15021, "/healthz/ready"), (200, "ready\n".to_owned()));
    }
}

#[test]
fn no_thread_stays_in_a_pod_and_no_descriptor_is_left_after_load() {
    let mesh = two("");
    let proxies = ["left", "right"].map(|node| mesh.proxy_pid(node));
    let descriptors = |pid: i32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
    // The first connection has its tunnel, which stays.
    wait_until("it is over", || mesh.metric("right", "istio_tcp_connections_closed_total", &[]) == 1.0);
    let before = proxies.map(descriptors);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..40 {
                    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
                    mesh.echo("outside", (mesh.ip("server"), 8080)).unwrap();
                }
            });
        }
    });
    for (node, pid) in ["left", "right"].iter().zip(proxies) {
        let own = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap().path();
            assert_eq!(fs::read_link(task.join("ns/net")).unwrap(), own, "{task:?} of {node}");
        }
        assert_eq!(own, mesh.run_in(Place::Node(node), || fs::read_link("/proc/thread-self/ns/net").unwrap()));
    }
    wait_until("all descriptors are given back", || proxies.map(descriptors).iter().zip(before).all(|(now, before)| *now <= before + 2));
    wait_until("all connections are closed", || mesh.metric("right", "istio_tcp_connections_closed_total", &[]) == 321.0);
}

#[test]
fn the_config_dump_has_every_section_and_the_live_connections() {
    let mesh = two("");
    let open = two_connections(&mesh);
    let dump = mesh.config_dump("right");
    let keys: Vec<&str> = dump.as_object().unwrap().keys().map(String::as_str).collect();
    for key in ["workloads", "services", "policies", "stagedServices", "staticConfig", "version", "config", "certificates", "workloadState"] {
        assert!(keys.contains(&key), "no {key} in {keys:?}");
    }
    for key in ["version", "gitRevision", "rustVersion", "buildProfile", "buildStatus", "istioVersion", "cryptoProvider"] {
        assert!(dump["version"][key].is_string(), "no version.{key} in {}", dump["version"]);
    }
    assert_eq!(dump["config"]["localNode"], "right");
    let states = dump["workloadState"].as_object().unwrap();
    let (uid, state) = states.iter().next().unwrap();
    assert_eq!((states.len(), uid.as_str(), &state["state"]), (1, "Kubernetes//Pod/default/server", &Value::from("Up")));
    assert_eq!(state["info"], serde_json::json!({"name": "server", "namespace": "default", "serviceAccount": "server"}));
    let inbound = state["connections"]["inbound"].as_array().unwrap();
    let actual = format!("{}:8080", mesh.ip("server"));
    let mut rows: Vec<[&str; 2]> = inbound.iter().map(|row| ["protocol", "actualDst"].map(|key| row[key].as_str().unwrap())).collect();
    rows.sort_unstable();
    assert_eq!(rows, [["HBONE", actual.as_str()], ["TCP", actual.as_str()]]);
    let plain = SocketAddr::new(mesh.ip("outside"), open[1].local_addr().unwrap().port()).to_string();
    assert!(inbound.iter().any(|row| row["protocol"] == "TCP" && row["src"] == plain), "{inbound:?}");
    let client = mesh.config_dump("left");
    let outbound = &client["workloadState"]["Kubernetes//Pod/default/client"]["connections"]["outbound"];
    let expected = serde_json::json!([{
        "src": SocketAddr::new(mesh.ip("client"), open[0].local_addr().unwrap().port()).to_string(),
        "originalDst": actual, "actualDst": format!("{}:15008", mesh.ip("server")), "protocol": "HBONE",
    }]);
    assert_eq!(outbound, &expected);
    drop(open);
    wait_until("they are gone", || {
        let connections = &mesh.config_dump("right")["workloadState"]["Kubernetes//Pod/default/server"]["connections"];
        connections == &serde_json::json!({"inbound": [], "outbound": []})
    });
}

#[test]
fn the_admin_page_changes_what_is_logged() {
    let mesh = two("");
    let post = |path: &str| {
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        mesh.request("right", 15000, &head)
    };
    let opened = || mesh.log("right").iter().filter(|line| line.contains("connection opened")).count();
    mesh.echo("outside", (mesh.ip("server"), 8080)).unwrap();
    mesh.wait_for_log("right", &["connection complete"]);
    assert_eq!(opened(), 0);
    assert_eq!(mesh.page("right", 15000, "/logging?level=debug").0, 405);
    let (status, text) = post("/logging?level=access=debug,info");
    assert_eq!((status, text.contains("access=debug")), (200, true), "{text}");
    mesh.echo("outside", (mesh.ip("server"), 8080)).unwrap();
    let line = mesh.wait_for_log("right", &["\tdebug\t", "connection opened", "direction=\"inbound\""]);
    assert!(line.contains("\taccess\t"), "{line}");
    assert_eq!(post("/logging?level=nonsense=").0, 400);
    assert_eq!(post("/logging?reset").0, 200);
    mesh.echo("outside", (mesh.ip("server"), 8080)).unwrap();
    wait_until("it is logged", || mesh.log("right").iter().filter(|line| line.contains("connection complete")).count() == 3);
    assert_eq!(opened(), 1);
}

#[test]
fn certificates_are_fetched_with_the_first_pod_of_an_account_and_forgotten_with_the_last() {
    let pod = |name: &str| format!("  - {{name: {name}, serviceAccount: twin, node: right}}\n");
    let with = |pods: &[&str]| format!("{TWO}{}", pods.iter().map(|name| pod(name)).collect::<String>());
    let mesh = Mesh::up(&with(&["one", "two"]));
    let known = |node: &str| -> BTreeMap<String, String> {
        let dump = mesh.config_dump(node);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        dump["certificates"].as_array().unwrap().iter().map(|entry| (text(&entry["identity"]), text(&entry["state"]))).collect()
    };
    let are = |node: &str, accounts: &[&str]| {
        let expected: BTreeMap<String, String> =
            accounts.iter().map(|account| (format!("spiffe://cluster.local/ns/default/sa/{account}"), "Available".to_owned())).collect();
        wait_until(&format!("the certificates of {node} are {accounts:?}, not {:?}", known(node)), || known(node) == expected);
    };
    // Before any connection, one for two pods, and only those of its own node.
    are("left", &["client"]);
    are("right", &["server", "twin"]);
    let serial = |mesh: &Mesh| mesh.config_dump("right")["certificates"][1]["certChain"][0]["serialNumber"].clone();
    let before = serial(&mesh);
    mesh.apply(&with(&["two"]));
    are("right", &["server", "twin"]);
    assert_eq!(serial(&mesh), before);
    mesh.apply(TWO);
    are("right", &["server"]);
    mesh.apply(&with(&["three"]));
    are("right", &["server", "twin"]);
    assert_ne!(serial(&mesh), before);
}

#[test]
fn the_proxys_own_metrics_are_served_over_hbone_to_whom_policy_permits() {
    // The address of the node in its pods' network, which is where its proxy lives.
    let own = |policy: &str| {
        format!(
            "
nodes:
  - {{name: left, env: {{POD_NAME: ztunnel-left, POD_NAMESPACE: istio-system, SERVICE_ACCOUNT: ztunnel}}}}
  - right
pods:
  - {{name: prometheus, serviceAccount: prometheus, node: left}}
  - {{name: far, serviceAccount: prometheus, node: right}}
  - {{name: thief, serviceAccount: thief, node: right}}
extra:
  workloads:
    - uid: Kubernetes//Pod/istio-system/ztunnel-left
      name: ztunnel-left
      namespace: istio-system
      serviceAccount: ztunnel
      node: left
      workloadIps: [10.244.1.1]
      protocol: HBONE
{policy}"
        )
    };
    let mesh = Mesh::up(&own(""));
    let scrape = |pod: &str| -> io::Result<String> {
        let mut socket = mesh.connect(pod, ("10.244.1.1".parse::<IpAddr>().unwrap(), 15020))?;
        socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: ztunnel\r\nconnection: close\r\n\r\n")?;
        let mut page = String::new();
        socket.read_to_string(&mut page)?;
        Ok(page)
    };
    for pod in ["prometheus", "far"] {
        let page = scrape(pod).unwrap();
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("istio_build"), "{page}");
    }
    let inbound = mesh.wait_for_log("left", &["connection complete", "direction=\"inbound\"", "dst.hbone_addr=10.244.1.1:15020"]);
    assert!(
        inbound.contains("src.identity=\"spiffe://cluster.local/ns/default/sa/prometheus\"") && inbound.contains("dst.workload=\"ztunnel-left\"")
    );
    let policy = "
authorizationPolicies:
  - metadata: {name: scrape, namespace: istio-system}
    spec: {action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/prometheus]}}]}]}
";
    mesh.apply(&own(policy));
    // The first that fails may be one that the change has cut.
    wait_until("the thief is refused", || scrape("thief").is_err());
    assert!(scrape("thief").is_err());
    assert!(scrape("far").is_ok());
    mesh.wait_for_log("left", &["connection complete", "policy rejection", "sa/thief"]);
}

#[test]
fn every_metric_of_the_reference_exists_and_adds_up() {
    let mesh = two("");
    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
    wait_until("it is over", || mesh.metric("right", "istio_tcp_connections_closed_total", &[]) == 1.0);
    let (status, page) = mesh.page("right", 15020, "/stats/prometheus");
    assert_eq!(status, 200);
    for (name, kind) in [
        ("istio_build", "gauge"),
        ("istio_tcp_connections_opened", "counter"),
        ("istio_tcp_connections_closed", "counter"),
        ("istio_tcp_received_bytes", "counter"),
        ("istio_tcp_sent_bytes", "counter"),
        ("istio_tcp_sockets_open", "gauge"),
        ("workload_manager_active_proxy_count", "gauge"),
        ("workload_manager_pending_proxy_count", "gauge"),
        ("workload_manager_proxies_started", "counter"),
        ("workload_manager_proxies_stopped", "counter"),
        ("process_open_fds", "gauge"),
        ("process_max_fds", "gauge"),
        ("tokio_num_workers", "gauge"),
        ("tokio_num_alive_tasks", "gauge"),
        ("tokio_global_queue_depth", "gauge"),
    ] {
        assert!(page.contains(&format!("# TYPE {name} {kind}\n")), "no {kind} {name}:\n{page}");
    }
    for unstable in ["istio_tcp_sockets_open", "workload_manager_active_proxy_count"] {
        let help = page.lines().find(|line| line.starts_with(&format!("# HELP {unstable} "))).unwrap();
        assert!(help.contains("(unstable)"), "{help}");
    }
    assert!(page.contains("component=\"ztunnel\""));
    assert_eq!(mesh.metric("right", "workload_manager_active_proxy_count", &[]), 1.0);
    assert_eq!(mesh.metric("right", "workload_manager_pending_proxy_count", &[]), 0.0);
    // While a connection lives it is open and its bytes are counted already; when it ends it is closed, once.
    let mut socket = mesh.connect("outside", (mesh.ip("server"), 8080)).unwrap();
    echo_on(&mut socket, &[7; 1000]).unwrap();
    let plain = ["reporter=\"destination\"", "connection_security_policy=\"unknown\""];
    let count = |name: &str| mesh.metric("right", name, &plain);
    wait_until("its bytes are counted", || count("istio_tcp_received_bytes_total") == 1000.0 && count("istio_tcp_sent_bytes_total") == 1000.0);
    assert_eq!((count("istio_tcp_connections_opened_total"), count("istio_tcp_connections_closed_total")), (1.0, 0.0));
    drop(socket);
    wait_until("it is closed", || count("istio_tcp_connections_closed_total") == 1.0);
    assert_eq!(count("istio_tcp_connections_opened_total"), 1.0);
    wait_until("its socket too", || mesh.metric("right", "istio_tcp_sockets_open", &["reporter=\"destination\""]) == 1.0);
}

#[test]
fn nothing_is_left_of_a_lab_that_ended() {
    let mesh = two("");
    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
    let status = mesh.status();
    let places = status.nodes.iter().map(|node| &node.netns.path).chain(status.pods.iter().map(|pod| &pod.netns.path));
    let mut paths: Vec<PathBuf> = places.chain([&status.fabric.path]).cloned().collect();
    paths.push(format!("/proc/{}/ns/pid", status.supervisor).into());
    // Held by us, their numbers are given to no other namespace meanwhile.
    let held: Vec<fs::File> = paths.iter().map(|path| fs::File::open(path).unwrap()).collect();
    let ours: BTreeSet<PathBuf> = held.iter().map(|file| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()).collect();
    let namespaces: BTreeSet<PathBuf> = ours.iter().map(|path| fs::read_link(path).unwrap()).collect();
    assert_eq!(namespaces.len(), paths.len());
    mesh.down();
    let others = || -> Vec<PathBuf> {
        let mut found = Vec::new();
        let numbered = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().parse::<i32>().is_ok();
        for process in fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()).filter(numbered) {
            let list = |of: &str| fs::read_dir(process.join(of)).into_iter().flatten().flatten().map(|entry| entry.path());
            let links = list("task").flat_map(|task| [task.join("ns/net"), task.join("ns/pid")]).chain(list("fd"));
            found.extend(links.filter(|link| !ours.contains(link) && fs::read_link(link).is_ok_and(|target| namespaces.contains(&target))));
        }
        found
    };
    assert!(until(|| others().is_empty().then_some(())).is_some(), "still there: {:?}", others());
}

/// A proxy without a lab, in a namespace of its own.
pub(crate) struct Bare {
    child: Child,
    netns: NetNs,
    directory: tempfile::TempDir,
}

/// A fresh network namespace whose loopback is up.
pub(crate) fn lonely() -> NetNs {
    let netns = NetNs::create().unwrap();
    netns.run(|| Links::open().unwrap().set_up("lo").unwrap()).unwrap();
    netns
}

impl Bare {
    /// Starts it with settings that would work, over which go the given ones. Its pods are told at `zds` in its directory.
    pub(crate) fn start(netns: NetNs, env: &[(&str, &str)]) -> Self {
        let directory = tempfile::Builder::new().prefix("cv").tempdir_in("/tmp").unwrap();
        let ca = directory.path().join("ca");
        LocalIssuer::create(&ca, &Clock::system()).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
        command.arg("proxy").env_clear().env("LOCAL_CA_DIR", &ca).env("INPOD_UDS", directory.path().join("zds"));
        if env.iter().all(|(name, _)| !["LOCAL_XDS_PATH", "XDS_ADDRESS"].contains(name)) {
            command.env("LOCAL_XDS", "{}");
        }
        command.envs(env.iter().copied()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        die_with_parent(&mut command);
        let child = netns.run(|| command.spawn()).unwrap().unwrap();
        Self { child, netns, directory }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Where its agent is to be.
    pub(crate) fn zds(&self) -> PathBuf {
        self.directory.path().join("zds")
    }

    fn end(&mut self) -> ExitStatus {
        let ended = until(|| self.child.try_wait().unwrap());
        ended.unwrap_or_else(|| panic!("it does not end:\n{}", self.log()))
    }

    /// Waits until it has failed; returns what it said about it, which must be one line.
    fn failure(env: &[(&str, &str)]) -> String {
        Self::failure_in(lonely(), env)
    }

    fn failure_in(netns: NetNs, env: &[(&str, &str)]) -> String {
        let mut proxy = Self::start(netns, env);
        let status = proxy.end();
        let log = proxy.log();
        assert!(status.code().is_some_and(|code| code != 0), "{status}\n{log}");
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("\terror\t") || line.starts_with("culvert:")).collect();
        assert_eq!(errors.len(), 1, "one sentence, not:\n{log}");
        errors[0].to_owned()
    }

    pub(crate) fn page(&self, port: u16, head: &str) -> io::Result<(u16, String)> {
        let mut socket = self.netns.run(|| TcpStream::connect(("127.0.0.1", port))).unwrap()?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.write_all(format!("{head} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok((status, answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned()))
    }

    /// Waits for an answer of the readiness page.
    fn wait_for_readiness(&self, status: u16, body: &str) {
        let expected = (status, body.to_owned());
        let answers = || self.page(15021, "GET /healthz/ready").is_ok_and(|answer| answer == expected);
        assert!(
            until(|| answers().then_some(())).is_some(),
            "not {expected:?} but {:?}:\n{}",
            self.page(15021, "GET /healthz/ready").ok(),
            self.log()
        );
    }

    pub(crate) fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.netns.run(|| TcpStream::connect(("127.0.0.1", port))).unwrap()
    }

    pub(crate) fn config_dump(&self) -> io::Result<Value> {
        let (_, page) = self.page(15000, "GET /config_dump")?;
        let body = &page[page.find('{').unwrap()..=page.rfind('}').unwrap()];
        Ok(serde_json::from_str(body).unwrap())
    }

    fn workload_state(&self) -> Value {
        self.config_dump().unwrap()["workloadState"].clone()
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_bad_start_ends_with_one_sentence_that_says_what_to_change() {
    let mesh = tempfile::tempdir().unwrap();
    let file = mesh.path().join("mesh.yaml");
    let path = file.to_str().unwrap();
    fs::write(&file, "workloads:\n  - name: one\n    namespace: default\n    workloadIps: [10.0.0.300]\n").unwrap();
    let said = Bare::failure(&[("LOCAL_XDS_PATH", path)]);
    assert!(said.contains("mesh.yaml:4:") && said.contains("workloadIps") && said.contains("10.0.0.300"), "{said}");
    let absent = mesh.path().join("absent.yaml");
    let said = Bare::failure(&[("LOCAL_XDS_PATH", absent.to_str().unwrap())]);
    assert!(said.contains("absent.yaml") && said.contains("No such file"), "{said}");
    let said = Bare::failure(&[("LOCAL_XDS", "services: [{name: a, namespace: b, hostname: c, prots: {80: 80}}]")]);
    assert!(said.contains("LOCAL_XDS:1:") && said.contains("services[0].prots"), "{said}");
    // Settings.
    for (name, value, part) in [
        ("PROXY_MODE", "dedicated", "PROXY_WORKLOAD_INFO"),
        ("RUST_LOG", "no=such=level", "RUST_LOG"),
        ("ZTUNNEL_WORKER_THREADS", "many", "ZTUNNEL_WORKER_THREADS"),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "70000", "HTTP2_CONNECTION_WINDOW_SIZE"),
    ] {
        let said = Bare::failure(&[(name, value)]);
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn a_bad_ca_directory_ends_the_start_with_the_file_and_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &Path| Bare::failure(&[("LOCAL_CA_DIR", path.to_str().unwrap())]);
    let said = at(&directory.path().join("absent"));
    assert!(said.contains("absent/ca-cert.pem") && said.contains("missing"), "{said}");
    let path = directory.path().join("key");
    fs::create_dir(&path).unwrap();
    let root = pki::Authority::root("root");
    root.write(&path, &root);
    fs::write(path.join("ca-key.pem"), pki::Authority::root("other").signer.key().serialize_pem()).unwrap();
    let said = at(&path);
    assert!(said.contains("ca-key.pem") && said.contains("not"), "{said}");
    let path = directory.path().join("expired");
    fs::create_dir(&path).unwrap();
    let mut params = pki::ca_params("expired");
    params.not_before = (std::time::SystemTime::now() - 48 * pki::HOUR).into();
    params.not_after = (std::time::SystemTime::now() - 24 * pki::HOUR).into();
    let root = pki::Authority::root_with(params, rcgen::KeyPair::generate().unwrap());
    root.write(&path, &root);
    let said = at(&path);
    assert!(said.contains("ca-cert.pem") && said.contains("expired"), "{said}");
}

#[test]
fn a_port_that_is_taken_ends_the_start_of_a_dedicated_proxy_and_is_named() {
    let dedicated = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "default/one/default"), ("PACKET_MARK", "1337")];
    std::thread::scope(|scope| {
        for ports in [[15001, 15006, 15008], [15000, 15020, 15021]] {
            scope.spawn(move || {
                for port in ports {
                    let netns = lonely();
                    let _taken = netns.run(|| TcpListener::bind(("127.0.0.1", port)).unwrap()).unwrap();
                    let said = Bare::failure_in(netns, &dedicated);
                    assert!(said.contains(&port.to_string()) && said.contains("in use"), "{port}: {said}");
                }
            });
        }
    });
}

const POD: &str = "Kubernetes//Pod/default/one";

/// The mesh of one pod that can be reached at loopback.
const ONE: &str = r#"{"workloads": [{"uid": "Kubernetes//Pod/default/one", "name": "one", "namespace": "default", "workloadIps": ["127.0.0.1"], "protocol": "HBONE"}]}"#;

fn pod() -> Pod {
    Pod { uid: POD.into(), name: "one".into(), namespace: "default".into(), service_account: "default".into() }
}

#[test]
fn readiness_names_what_is_pending_until_the_agent_has_told_all_pods() {
    let proxy = Bare::start(lonely(), &[]);
    let pending = "not ready, pending: workload proxy manager\n";
    proxy.wait_for_readiness(500, pending);
    assert_eq!(proxy.page(15021, "POST /healthz/ready").unwrap().0, 405);
    assert_eq!(proxy.page(15021, "GET /").unwrap().0, 404);
    // Only readiness: everything else works.
    assert_eq!(proxy.page(15000, "GET /config_dump").unwrap().0, 200);
    assert_eq!(proxy.page(15020, "GET /metrics").unwrap().0, 200);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let agent = ZdsServer::bind(&proxy.directory.path().join("zds"), []).unwrap();
    proxy.wait_for_readiness(200, "ready\n");
    drop(agent);
    proxy.wait_for_readiness(500, pending);
}

#[test]
fn pods_go_on_without_the_agent_and_the_proxy_is_there_when_it_comes_back() {
    let proxy = Bare::start(lonely(), &[("LOCAL_XDS", ONE)]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let socket = proxy.directory.path().join("zds");
    let netns = lonely();
    let agent = ZdsServer::bind(&socket, [(pod(), Some(netns.clone()))]).unwrap();
    proxy.wait_for_readiness(200, "ready\n");
    serve_echo(netns.run(|| TcpListener::bind("127.0.0.1:8080").unwrap()).unwrap());
    let ca = Ca::load(&proxy.directory.path().join("ca"));
    let dial = || {
        let socket = netns.run(|| TcpStream::connect("127.0.0.1:15008").unwrap()).unwrap();
        ca.dial(socket, "spiffe://cluster.local/ns/default/sa/friend").unwrap()
    };
    let tunnel = dial();
    let mut stream = tunnel.connect("127.0.0.1:8080").stream;
    stream.echo(b"before");
    drop(agent);
    proxy.wait_for_readiness(500, "not ready, pending: workload proxy manager\n");
    stream.echo(b"without an agent");
    dial().connect("127.0.0.1:8080").stream.echo(b"a new one without an agent");
    // The agent comes back without the namespace: Keep.
    let agent = ZdsServer::bind(&socket, [(pod(), None)]).unwrap();
    proxy.wait_for_readiness(200, "ready\n");
    stream.echo(b"kept");
    drop(agent);
    proxy.wait_for_readiness(500, "not ready, pending: workload proxy manager\n");
    // It comes back with it: an Add of what runs changes nothing.
    let agent = ZdsServer::bind(&socket, [(pod(), Some(netns.clone()))]).unwrap();
    proxy.wait_for_readiness(200, "ready\n");
    stream.echo(b"still the same");
    drop(agent);
    // It comes back and knows the pod no longer.
    let _agent = ZdsServer::bind(&socket, []).unwrap();
    assert!(stream.read().is_none_or(|read| read.is_err()), "the pod is gone");
    wait_until("it is forgotten", || proxy.workload_state() == serde_json::json!({}));
}

#[test]
fn a_pod_whose_port_is_taken_is_pending_and_served_when_the_port_is_free() {
    let proxy = Bare::start(lonely(), &[("LOCAL_XDS", ONE)]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let agent = ZdsServer::bind(&proxy.directory.path().join("zds"), []).unwrap();
    proxy.wait_for_readiness(200, "ready\n");
    let netns = lonely();
    let taken = netns.run(|| TcpListener::bind("0.0.0.0:15006").unwrap()).unwrap();
    match runtime.block_on(agent.add(pod(), netns.clone())) {
        Err(ZdsError::Refused(reason)) => {
            assert!(reason.contains("15006") && reason.contains("in use") && reason.contains("default/one"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    let state = proxy.workload_state();
    assert_eq!((&state[POD]["state"], &state[POD]["info"]["name"]), (&Value::from("Pending"), &Value::from("one")), "{state}");
    proxy.wait_for_readiness(500, "not ready, pending: workload proxy manager\n");
    // All or nothing: no other port is held.
    let refused = netns.run(|| TcpStream::connect("127.0.0.1:15001").unwrap_err().kind()).unwrap();
    assert_eq!(refused, io::ErrorKind::ConnectionRefused);
    drop(taken);
    // By itself, within five seconds; at once when the agent says it again.
    // A program that another test is just starting may hold the squatter's socket for a moment longer.
    wait_until("it is taken", || matches!(runtime.block_on(agent.add(pod(), netns.clone())), Ok(Delivery::Acknowledged)));
    wait_until("it is up", || proxy.workload_state()[POD]["state"] == "Up");
    proxy.wait_for_readiness(200, "ready\n");
    // Another one, left to itself.
    let netns = lonely();
    let taken = netns.run(|| TcpListener::bind("0.0.0.0:15008").unwrap()).unwrap();
    let other = Pod { uid: "other".into(), ..pod() };
    assert!(matches!(runtime.block_on(agent.add(other, netns.clone())), Err(ZdsError::Refused(_))));
    drop(taken);
    proxy.wait_for_readiness(200, "ready\n");
    netns.run(|| TcpStream::connect("127.0.0.1:15008").unwrap()).unwrap();
}
