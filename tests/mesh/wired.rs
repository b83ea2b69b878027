//! Everything over the wire: a control plane tells the proxies of the mesh and signs their certificates (reference, dataplane §5 and §7; F4 and F7 of
//! the list of faults).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mesh::{Mesh, Process, echo_on, serve_echo, wait_until};

const LAB: &str = "
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: other, serviceAccount: other, node: left}
  - {name: server, serviceAccount: server, node: right, labels: {app: server}}
  - {name: own, serviceAccount: own, node: right, dedicated: true}
services:
  - {name: server, selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
";

const DENY_OTHER: &str = "
authorizationPolicies:
- metadata: {name: no-other}
  spec: {action: DENY, rules: [{from: [{source: {serviceAccounts: [other]}}]}]}
";

fn up() -> Mesh {
    let mesh = Mesh::with_control_plane(LAB);
    serve_echo(mesh.listen("server", 8080));
    serve_echo(mesh.listen("own", 8080));
    mesh
}

fn control(mesh: &Mesh) -> i32 {
    mesh.status().control.unwrap().host_pid
}

fn kill_control(mesh: &Mesh) {
    let process = Process::of(control(mesh)).unwrap();
    kill(Pid::from_raw(process.pid), Signal::SIGKILL).unwrap();
    wait_until("the control plane is dead", || !process.lives());
}

#[test]
fn proxies_that_were_given_no_file_know_the_mesh_and_have_certificates() {
    let mesh = up();
    for of in ["left", "right", "own"] {
        let environment = std::fs::read_to_string(format!("/proc/{}/environ", mesh.proxy(of).pid)).unwrap();
        assert!(environment.contains("XDS_ADDRESS=https://") && !environment.contains("LOCAL_"), "{environment}");
    }
    for target in [(mesh.ip("server"), 8080), (mesh.ip6("server"), 8080), (mesh.vip("server"), 80), (mesh.ip("own"), 8080)] {
        mesh.echo("client", target).unwrap();
    }
    mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", "src.identity=\"spiffe://cluster.local/ns/default/sa/client\""]);
    // The policy comes by the same way, and so does a pod that was not there at the start.
    let more = LAB.replace("services:", "  - {name: late, serviceAccount: late, node: right}\nservices:");
    mesh.apply(&format!("{more}{DENY_OTHER}"));
    let mut status = mesh.status();
    let late = status.pods.iter_mut().find(|pod| pod.name == "late").unwrap().addresses[0];
    serve_echo(mesh.listen("late", 8080));
    mesh.echo("client", (late, 8080)).unwrap();
    wait_until("the policy is in force", || {
        mesh.connect("other", (mesh.ip("server"), 8080)).is_ok_and(|mut socket| echo_on(&mut socket, b"x").is_err())
    });
    mesh.echo("client", (mesh.ip("server"), 8080)).unwrap();
    let path = status.control.unwrap().log;
    let log = || std::fs::read_to_string(&path).unwrap();
    wait_until("the new pod's certificate is in the log", || {
        log().lines().any(|line| line.contains("certificate issued") && line.contains("identity=spiffe://cluster.local/ns/default/sa/late"))
    });
    let log = log();
    assert!(!log.contains("NACK") && !log.contains("refused"), "{log}");
    mesh.down();
}

#[test]
fn known_workloads_do_not_notice_that_the_control_plane_dies_and_comes_back() {
    let mesh = up();
    let target: SocketAddr = (mesh.vip("server"), 80).into();
    let mut live: Vec<_> = ["client", "own"].map(|pod| mesh.connect(pod, target).unwrap()).into();
    live.iter_mut().for_each(|socket| echo_on(socket, b"before").unwrap());
    let (stop, made) = (AtomicBool::new(false), Arc::new(AtomicUsize::new(0)));
    std::thread::scope(|scope| {
        let calls = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (pod, target) in [("client", target), ("client", (mesh.ip("own"), 8080).into()), ("own", target)] {
                    if let Err(error) = mesh.echo(pod, target) {
                        return Err(format!("{pod} to {target}: {error}"));
                    }
                    made.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        let more_calls = |count: usize| {
            let from = made.load(Ordering::Relaxed);
            wait_until("calls go on", || made.load(Ordering::Relaxed) >= from + count || calls.is_finished());
        };
        for _ in 0..2 {
            more_calls(10);
            kill_control(&mesh);
            more_calls(30);
            assert_eq!(mesh.page("left", 15021, "/healthz/ready").0, 200, "a node that lost its control plane is still ready");
            mesh.lab().restart_control().unwrap();
            more_calls(10);
        }
        // What changed while it was dead is told by the next one.
        kill_control(&mesh);
        mesh.apply(&format!("{LAB}{DENY_OTHER}"));
        mesh.echo("other", target).unwrap();
        mesh.lab().restart_control().unwrap();
        let denied = || mesh.connect("other", target).is_ok_and(|mut socket| echo_on(&mut socket, b"x").is_err());
        wait_until("the policy is in force", denied);
        more_calls(10);
        stop.store(true, Ordering::Relaxed);
        calls.join().unwrap().unwrap();
    });
    // Within a captured pod, a proxy's own calls are not caught by the pod's rules.
    let own = mesh.log("own").into_iter().filter(|line| line.contains("connection complete") && line.contains(":15012"));
    assert_eq!(own.collect::<Vec<_>>(), Vec::<String>::new());
    live.iter_mut().for_each(|socket| echo_on(socket, b"after").expect("a connection was cut by an equal snapshot"));
    mesh.down();
}

#[test]
fn strict_comes_over_the_wire_and_goes_again() {
    let outside = LAB.replace("services:", "  - {name: outside, node: left, captured: false}\nservices:");
    let mesh = Mesh::with_control_plane(&outside);
    for pod in ["server", "own"] {
        serve_echo(mesh.listen(pod, 8080));
    }
    let targets = ["server", "own"].map(|pod| SocketAddr::new(mesh.ip(pod), 8080));
    let plain = |target: SocketAddr| mesh.connect("outside", target).is_ok_and(|mut socket| echo_on(&mut socket, b"x").is_ok());
    let mut live = targets.map(|target| mesh.connect("outside", target).unwrap());
    live.iter_mut().for_each(|socket| echo_on(socket, b"plain").unwrap());
    let strict = "peerAuthentications:\n  - {metadata: {name: default, namespace: istio-system}, spec: {mtls: {mode: STRICT}}}\n";
    mesh.apply(&format!("{outside}{strict}"));
    for (target, socket) in targets.into_iter().zip(&mut live) {
        wait_until("live plain connections are cut", || echo_on(socket, b"x").is_err());
        wait_until("plain connections are refused", || !plain(target));
        mesh.echo("client", target).unwrap();
    }
    mesh.wait_for_log("right", &["connection complete", "explicitly denied by: istio-system/istio_converted_static_strict"]);
    mesh.apply(&outside);
    for target in targets {
        wait_until("plain connections pass again", || plain(target));
    }
}

#[test]
fn on_demand_a_proxy_knows_its_own_pods_and_what_was_asked_for_and_keeps_it() {
    let mesh = Mesh::with_control_plane(&format!("{LAB}proxyEnv: {{XDS_ON_DEMAND: 'true'}}\n"));
    serve_echo(mesh.listen("server", 8080));
    let known = || -> Vec<String> {
        let dump = mesh.config_dump("left");
        let name = |row: &serde_json::Value| row["name"].as_str().unwrap().to_owned();
        let rows = |section: &str| match &dump[section] {
            serde_json::Value::Array(rows) => rows.iter().map(name).collect::<Vec<_>>(),
            rows => rows.as_object().unwrap().values().map(name).collect(),
        };
        let mut names = [rows("workloads"), rows("services")].concat();
        names.sort();
        names
    };
    assert_eq!(known(), ["client", "other"]);
    // By the service's address, with its endpoints.
    mesh.echo("client", (mesh.vip("server"), 80)).unwrap();
    assert_eq!(known(), ["client", "other", "server", "server"]);
    kill_control(&mesh);
    mesh.echo("client", (mesh.vip("server"), 80)).unwrap();
    mesh.lab().restart_control().unwrap();
    // It comes back with what it has, and asks for more.
    wait_until("something that was not known is reached", || {
        mesh.connect("client", (mesh.ip("own"), 1)).is_ok() && known().contains(&"own".to_owned())
    });
    mesh.echo("client", (mesh.vip("server"), 80)).unwrap();
    mesh.down();
}
