//! `culvert lab` from outside: what runs in it, and that nothing of it stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use culvert::lab::{Base, Lab, Launch, Place, Wiring};

const PROGRAM: &str = env!("CARGO_BIN_EXE_culvert");
const MESH: &str = include_str!("../deploy/lab/two-nodes.yaml");
const POLICIES: &str = include_str!("../deploy/lab/policies.yaml");
const PLAIN: &str = "
nodes: [left, right]
pods:
- {name: near, node: left, captured: false}
- {name: far, node: right, captured: false, command: [culvert, lab, serve-http, '8080'], waitFor: [8080]}
- {name: line, node: left, captured: false, command: 'exec culvert lab serve-echo 9000', waitFor: [9000], env: {COLOUR: blue}}
services: [{name: far-away, ports: [{port: 80}]}]
";

/// A directory for labs, removed at the end; nothing but labs may be in it, and they must be gone by then.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("lab-").tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("labs")
    }

    fn start(&self, definition: &str) -> Result<Lab, culvert::lab::Error> {
        Lab::start(self.launch("test", definition))
    }

    fn launch(&self, name: &str, definition: &str) -> Launch {
        let (name, definition) = (name.to_owned(), definition.to_owned());
        Launch { program: PROGRAM.into(), base: Base::new(self.path()), name, definition, leashed: true, wiring: Wiring::Control }
    }

    fn culvert(&self, arguments: &[&str]) -> Output {
        Command::new(PROGRAM).arg("lab").arg("--run-dir").arg(self.path()).args(arguments).stdin(Stdio::null()).output().unwrap()
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What a command in a pod prints; it must succeed.
fn run(lab: &Lab, pod: &str, arguments: &[&str]) -> String {
    let output = lab.exec(pod, arguments).unwrap();
    assert!(output.status.success(), "{pod} {arguments:?}: {}", text(&output));
    text(&output)
}

fn get(lab: &Lab, pod: &str, url: &str) -> Result<String, String> {
    let output = lab.exec(pod, &["culvert", "lab", "get", url]).unwrap();
    if output.status.success() { Ok(text(&output)) } else { Err(text(&output)) }
}

/// The namespaces of a lab, held open so that their numbers are given to nobody else.
struct Traces {
    pid: fs::File,
    nets: Vec<fs::File>,
}

impl Traces {
    fn of(lab: &Lab) -> Self {
        let status = lab.status().unwrap();
        let pid = fs::File::open(format!("/proc/{}/ns/pid", status.supervisor)).unwrap();
        assert_ne!(pid.metadata().unwrap().ino(), fs::metadata("/proc/self/ns/pid").unwrap().ino());
        let paths = status.nodes.iter().map(|node| &node.netns).chain(status.pods.iter().map(|pod| &pod.netns)).chain([&status.fabric]);
        Self { pid, nets: paths.map(|netns| fs::File::open(&netns.path).unwrap()).collect() }
    }

    /// Every process of the lab's process namespace.
    fn processes(&self) -> Vec<PathBuf> {
        let own = self.pid.metadata().unwrap().ino();
        let all = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
        all.filter(|path| fs::metadata(path.join("ns/pid")).is_ok_and(|found| found.ino() == own)).collect()
    }

    /// No process, and nobody but us who is in one of the network namespaces or holds it: as a mount, or open.
    fn assert_gone(&self) {
        assert_eq!(self.processes(), Vec::<PathBuf>::new());
        let nets: BTreeSet<PathBuf> = self.nets.iter().map(|net| PathBuf::from(format!("net:[{}]", net.metadata().unwrap().ino()))).collect();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!nets.iter().any(|net| mounts.contains(net.to_str().unwrap())), "{mounts}");
        let ids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        for other in ids.filter(|id| *id != std::process::id()).map(|id| PathBuf::from(format!("/proc/{id}"))) {
            let descriptors = fs::read_dir(other.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
            for link in [other.join("ns/net")].into_iter().chain(descriptors) {
                assert!(!fs::read_link(&link).is_ok_and(|target| nets.contains(&target)), "{} is left", link.display());
            }
        }
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn pods_reach_each_other_by_name_in_both_families_without_a_proxy() {
    let home = Home::new();
    let lab = home.start(PLAIN).unwrap();
    assert!(get(&lab, "near", "http://far:8080/x").unwrap().starts_with("far answers"));
    assert!(get(&lab, "default/near", "http://10.244.2.2:8080/").unwrap().contains("far answers 10.244.1.2"));
    assert!(get(&lab, "near", "http://[fd00:10:244:2::2]:8080/").unwrap().contains("far answers fd00:10:244:1::2"));
    assert_eq!(run(&lab, "far", &["culvert", "lab", "talk", "line.default.pod:9000", "hello"]), "hello\n");
    lab.down().unwrap();
}

#[test]
fn a_test_can_open_sockets_inside_a_pod() {
    let home = Home::new();
    let lab = home.start(PLAIN).unwrap();
    if nix::unistd::Uid::effective().is_root() {
        let near = lab.netns(Place::Pod("near")).unwrap();
        let far = lab.status().unwrap().pod("far").unwrap().addresses[0];
        near.run(|| std::net::TcpStream::connect((far, 8080))).unwrap().unwrap();
        let node = lab.netns(Place::Node("right")).unwrap();
        let admin = lab.status().unwrap().node("right").unwrap().proxy.admin.clone();
        node.run(|| std::net::TcpStream::connect(admin)).unwrap().unwrap();
        assert_ne!(lab.netns(Place::Fabric).unwrap().id(), node.id());
    }
    lab.down().unwrap();
}

#[test]
fn a_command_in_a_pod_has_its_namespaces_its_environment_and_its_exit_code() {
    let home = Home::new();
    let lab = home.start(PLAIN).unwrap();
    assert_eq!(run(&lab, "line", &["sh", "-c", "echo $COLOUR $POD_NAME $NODE_NAME $POD_IP"]), "blue line left 10.244.1.3\n");
    assert_eq!(lab.exec("near", &["sh", "-c", "exit 7"]).unwrap().status.code(), Some(7));
    assert_eq!(lab.exec("near", &["sh", "-c", "kill -9 $$"]).unwrap().status.code(), Some(137));
    let error = text(&lab.exec("near", &["no-such-program"]).unwrap());
    assert!(error.contains("no-such-program"), "{error}");
    let error = text(&lab.exec("nobody", &["true"]).unwrap());
    assert!(error.contains("no pod nobody") && error.contains("default/near"), "{error}");
    let net = run(&lab, "near", &["readlink", "/proc/self/ns/net"]);
    let node = lab.command(Place::Node("left"), &["readlink", "/proc/self/ns/net"]).output().unwrap();
    assert_ne!(net, text(&node));
    assert!(run(&lab, "near", &["cat", "/etc/hosts"]).contains("far-away.default.svc.cluster.local"));
    assert!(!fs::read_to_string("/etc/hosts").unwrap().contains("far-away"));
    lab.down().unwrap();
}

#[test]
fn captured_pods_talk_through_their_proxies_and_see_the_clients_address() {
    let home = Home::new();
    let lab = home.start(MESH).unwrap();
    let mut answered = BTreeSet::new();
    for _ in 0..40 {
        let answer = get(&lab, "client", "http://10.96.0.1/").unwrap();
        assert!(answer.contains("answers 10.244.1.2"), "{answer}");
        answered.insert(answer.split(' ').next().unwrap().to_owned());
    }
    assert_eq!(answered, BTreeSet::from(["web-0".to_owned(), "web-1".to_owned()]));
    assert!(get(&lab, "client", "http://[fd00:10:96::1]/").unwrap().contains("answers fd00:10:244:1::2"));
    assert!(get(&lab, "outsider", "http://web-0:8080/").unwrap().contains("answers"));
    let log = lab.log("right").unwrap();
    let identity = "src.identity=\"spiffe://cluster.local/ns/default/sa/client\"";
    wait_until("the access log names the client", || fs::read_to_string(&log).unwrap().contains(identity));
    lab.down().unwrap();
}

#[test]
fn a_dedicated_proxy_serves_its_own_pod() {
    let home = Home::new();
    let lab = home.start(&MESH.replace("serviceAccount: client", "serviceAccount: client\n    dedicated: true")).unwrap();
    let status = lab.status().unwrap();
    assert_eq!(status.pod("client").unwrap().proxy.as_ref().unwrap().state, "running");
    wait_until("a connection to the other node", || get(&lab, "client", "http://web/").unwrap().contains("web-1"));
    let log = &status.pod("client").unwrap().proxy.as_ref().unwrap().log;
    wait_until("its access log tells of a tunnel", || fs::read_to_string(log).unwrap().contains("dst.hbone_addr"));
    lab.down().unwrap();
}

#[test]
fn apply_changes_a_running_lab() {
    let home = Home::new();
    let lab = home.start(MESH).unwrap();
    assert!(get(&lab, "outsider", "http://web-1:8080/").is_ok());
    lab.apply(POLICIES).unwrap();
    wait_until("the outsider is shut out", || get(&lab, "outsider", "http://web-1:8080/").is_err());
    assert!(get(&lab, "client", "http://web/").is_ok());
    lab.apply(MESH).unwrap();
    wait_until("the outsider is let in", || get(&lab, "outsider", "http://web-1:8080/").is_ok());

    let broken = lab.apply(&MESH.replace("node: left", "node: nowhere")).unwrap_err().to_string();
    assert!(broken.contains("nowhere"), "{broken}");
    assert!(get(&lab, "client", "http://web/").is_ok());

    let more = MESH.replace("  - name: outsider", "  - {name: late, node: right}\n  - name: outsider");
    lab.apply(&more).unwrap();
    assert!(get(&lab, "late", "http://web/").is_ok());
    assert!(run(&lab, "client", &["cat", "/etc/hosts"]).contains(" late\n"));
    assert_eq!(lab.apply(MESH).unwrap().pods.len(), 4);
    lab.down().unwrap();
}

#[test]
fn a_proxy_can_be_replaced() {
    let home = Home::new();
    let lab = home.start(MESH).unwrap();
    let pid = |lab: &Lab| lab.status().unwrap().node("left").unwrap().proxy.host_pid;
    let before = pid(&lab);
    lab.restart_proxy("left").unwrap();
    assert_ne!(pid(&lab), before);
    wait_until("the client works again", || get(&lab, "client", "http://web/").is_ok());
    assert!(lab.restart_proxy("middle").is_err());
    lab.down().unwrap();
}

#[test]
fn down_leaves_nothing_behind() {
    let home = Home::new();
    let lab = home.start(MESH).unwrap();
    let traces = Traces::of(&lab);
    assert!(!traces.processes().is_empty());
    lab.down().unwrap();
    traces.assert_gone();
    assert!(!home.path().exists());
}

#[test]
fn a_lab_on_a_leash_ends_with_its_holder() {
    let home = Home::new();
    let lab = home.start(PLAIN).unwrap();
    let traces = Traces::of(&lab);
    drop(lab);
    traces.assert_gone();
    assert!(!home.path().exists());
}

#[test]
fn killing_any_process_of_the_lab_itself_leaves_only_files_that_down_removes() {
    for victim in ["first", "supervisor"] {
        let home = Home::new();
        let output = home.culvert(&["up", "--name", "doomed", write(&home, PLAIN).to_str().unwrap()]);
        assert!(output.status.success(), "{}", text(&output));
        let lab = Lab::find(PROGRAM.into(), Base::new(home.path()), None).unwrap();
        let traces = Traces::of(&lab);
        let supervisor = lab.status().unwrap().supervisor;
        let first = fs::read_to_string(home.path().join("doomed/pid")).unwrap().split(' ').next().unwrap().parse::<i32>().unwrap();
        let pid = if victim == "first" { first } else { supervisor };
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_until("all processes are gone", || traces.processes().is_empty());
        traces.assert_gone();
        let listed = text(&home.culvert(&["list"]));
        assert!(listed.contains("doomed") && listed.contains("crashed"), "{victim}: {listed}");
        let refused = home.culvert(&["exec", "near", "--", "true"]);
        assert!(!refused.status.success() && text(&refused).contains("no lab is running"), "{}", text(&refused));
        assert!(home.culvert(&["down"]).status.success());
        assert!(!home.path().exists(), "{victim}");
    }
}

#[test]
fn an_up_that_is_killed_half_way_leaves_no_lab() {
    let home = Home::new();
    let slow = PLAIN.replace("'exec culvert lab serve-echo 9000'", "'sleep 60'");
    let file = write(&home, &slow);
    let mut up = Command::new(PROGRAM).arg("lab").arg("--run-dir").arg(home.path()).arg("up").arg(file).stdin(Stdio::null()).spawn().unwrap();
    wait_until("the pod's command runs", || home.path().join("lab/logs/pod.default.line.log").exists());
    up.kill().unwrap();
    up.wait().unwrap();
    wait_until("the lab has ended", || !home.path().exists());
}

#[test]
fn a_process_id_that_is_used_again_is_not_killed() {
    let home = Home::new();
    let mut bystander = Command::new("sleep").arg("60").spawn().unwrap();
    fs::create_dir(home.path()).unwrap();
    fs::create_dir(home.path().join("old")).unwrap();
    fs::write(home.path().join("old/pid"), format!("{} 1\n", bystander.id())).unwrap();
    let output = home.culvert(&["down", "--name", "old"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(bystander.try_wait().unwrap().is_none());
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert!(!home.path().exists());
}

#[test]
fn a_lab_that_cannot_start_says_why_and_leaves_nothing() {
    let home = Home::new();
    let silent = PLAIN.replace("'exec culvert lab serve-echo 9000'", "'echo I would rather not; exit 3'");
    let error = home.start(&silent).unwrap_err().to_string();
    assert!(error.contains("line") && error.contains("exited with 3") && error.contains("I would rather not"), "{error}");
    assert!(!home.path().exists());
    let error = home.start(&format!("{PLAIN}\nproxyEnv: {{CULVERT_ADMIN_PORT: nonsense}}")).unwrap_err().to_string();
    assert!(error.contains("the proxy of node left exited with") && error.contains("nonsense"), "{error}");
    assert!(!home.path().exists());
}

#[test]
fn the_machines_own_network_stays_as_it_is() {
    let look = || {
        let rules = Command::new("nft").args(["list", "ruleset"]).output().map(|output| text(&output)).unwrap_or_default();
        let settings = ["ipv4/ip_forward", "ipv4/tcp_allowed_congestion_control", "ipv4/ip_local_port_range", "ipv6/conf/all/forwarding"];
        let settings: Vec<String> = settings.iter().map(|name| fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap()).collect();
        let links: BTreeSet<_> = fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let names: Vec<_> = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
        (rules, settings, links, names, fs::read_to_string("/proc/net/route").unwrap())
    };
    let before = look();
    let home = Home::new();
    let lab = home.start(MESH).unwrap();
    assert_eq!(look(), before);
    lab.down().unwrap();
    assert_eq!(look(), before);
}

#[test]
fn two_labs_do_not_see_each_other() {
    let home = Home::new();
    let (one, two) = (Lab::start(home.launch("one", PLAIN)).unwrap(), Lab::start(home.launch("two", PLAIN)).unwrap());
    let ambiguous = text(&home.culvert(&["status"]));
    assert!(ambiguous.contains("one, two"), "{ambiguous}");
    let again = Lab::start(home.launch("one", PLAIN)).unwrap_err().to_string();
    assert!(again.contains("running already"), "{again}");
    one.down().unwrap();
    assert!(get(&two, "near", "http://far:8080/").is_ok());
    two.down().unwrap();
}

#[test]
fn a_directory_that_others_may_write_to_is_not_used() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    fs::create_dir(home.path()).unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = home.start(PLAIN).unwrap_err().to_string();
    assert!(error.contains("only this user"), "{error}");
}

/// Runs this binary as a user without any privilege; the binary is copied to where that user can read it.
fn as_nobody(home: &Home, arguments: &[&str]) -> Option<Output> {
    let user = nix::unistd::Uid::effective();
    if !user.is_root() {
        return None;
    }
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let program = home.0.path().join("culvert");
    if !program.exists() {
        fs::set_permissions(home.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // By another process: a file that this one has open for writing could not be run while another test forks.
        assert!(Command::new("cp").arg(PROGRAM).arg(&program).status().unwrap().success());
        let own = home.0.path().join("own");
        fs::create_dir(&own).unwrap();
        nix::unistd::chown(&own, Some(65534.into()), Some(65534.into())).unwrap();
    }
    let mut command = Command::new(program);
    command.arg("lab").arg("--run-dir").arg(home.0.path().join("own/labs")).args(arguments);
    Some(command.uid(65534).gid(65534).current_dir("/").stdin(Stdio::null()).output().unwrap())
}

#[test]
fn it_works_without_root_in_a_user_namespace() {
    let home = Home::new();
    let file = write(&home, MESH);
    let file = file.to_str().unwrap();
    let Some(output) = as_nobody(&home, &["up", file]) else { return };
    assert!(output.status.success(), "{}", text(&output));
    let output = as_nobody(&home, &["exec", "client", "--", "/bin/sh", "-c", "culvert lab get http://10.96.0.1/; id -u"]).unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("answers 10.244.1.2") && text(&output).ends_with("\n0\n"), "{}", text(&output));
    let output = as_nobody(&home, &["down"]).unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(!home.0.path().join("own/labs").exists());
}

#[test]
fn where_the_kernel_allows_neither_way_one_sentence_says_what_is_missing() {
    let home = Home::new();
    let file = write(&home, PLAIN);
    let forbid = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all --inh-caps -all \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "sh", "-c", forbid, "sh", PROGRAM, "lab", "--run-dir"]).arg(home.path()).arg("up").arg(file);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = text(&output);
    assert!(!output.status.success());
    assert!(said.contains("needs root") && said.contains("user.max_user_namespaces is 0"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(!home.path().exists());
}

#[test]
fn the_demonstration_holds() {
    let home = Home::new();
    let output = home.culvert(&["--demo"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("every step held") && said.contains("explicitly denied by") && !said.contains("FAILED"), "{said}");
    assert!(!home.path().exists());
}

#[test]
fn an_interrupted_demonstration_cleans_up() {
    let home = Home::new();
    let mut command = Command::new(PROGRAM);
    command.arg("lab").arg("--run-dir").arg(home.path()).arg("--demo").stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.spawn().unwrap();
    wait_until("the lab is starting", || fs::read_dir(home.path()).is_ok_and(|entries| entries.count() == 1));
    let demo = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(demo, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success() && text(&output).contains("interrupted; cleaned up"), "{}", text(&output));
    assert!(!home.path().exists());
}

fn write(home: &Home, text: &str) -> PathBuf {
    let path: &Path = home.0.path();
    let file = path.join("mesh.yaml");
    fs::write(&file, text).unwrap();
    file
}
