//! `culvert lab bench` from outside: its figures are of traffic that arrived, its errors say what to do, and nothing of it stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_culvert");

/// A directory for benches and their files.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("bench-").tempdir().unwrap())
    }

    fn runs(&self) -> PathBuf {
        self.0.path().join("labs")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("lab").arg("--run-dir").arg(self.runs()).args(["bench", "--quick"]).args(arguments);
        if !arguments.contains(&"--seconds") {
            command.args(["--seconds", "0.3"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a short bench; nothing of it is left afterwards.
    fn bench(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        assert!(!self.runs().exists(), "files are left: {}", text(&output));
        output
    }

    /// The JSON of a bench that went well.
    fn json(&self, arguments: &[&str]) -> Value {
        let file = self.file("bench.json");
        let output = self.bench(&[arguments, &["--json", file.to_str().unwrap()]].concat());
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What a figure of a contestant says about a quantity; it must be a sane number.
fn median(json: &Value, figure: &str, contestant: &str, quantity: &str) -> f64 {
    let figures = json["figures"].as_array().unwrap();
    let figure = figures.iter().find(|found| found["name"] == figure).unwrap_or_else(|| panic!("no figure {figure} in {json:#}"));
    let result = figure["results"].as_array().unwrap().iter().find(|found| found["contestant"] == contestant).unwrap();
    let value = &result["values"][quantity];
    let [min, median, max] = ["min", "median", "max"].map(|name| value[name].as_f64().unwrap_or_else(|| panic!("no {quantity} in {result:#}")));
    assert!(min <= median && median <= max && median.is_finite(), "{value}");
    median
}

#[test]
fn a_short_run_gives_plausible_figures_in_every_form() {
    let home = Home::new();
    let (svg, markdown) = (home.file("chart.svg"), home.file("table.md"));
    let files = ["--svg", svg.to_str().unwrap(), "--markdown", markdown.to_str().unwrap()];
    let json = home.json(&[&["--only", "bulk-1,requests-1", "--reference", "culvert"], &files[..]].concat());
    for contestant in ["none", "culvert"] {
        for figure in ["bulk-1-up", "bulk-1-down"] {
            let speed = median(&json, figure, contestant, "gbitPerSecond");
            assert!(speed > 0.01 && speed < 1000.0, "{figure} of {contestant}: {speed} Gbit/s");
        }
        let [rate, p50, p99] = ["perSecond", "p50Microseconds", "p99Microseconds"].map(|name| median(&json, "requests-1", contestant, name));
        assert!(rate > 1.0 && p50 > 1.0 && p50 <= p99, "{contestant}: {rate} {p50} {p99}");
        // One connection has one request under way: half of the time is in requests no slower than the median.
        assert!(rate * p50 / 1e6 <= 2.0, "{contestant}: {rate} requests of {p50} µs each second");
    }
    let [cpu, user, system] = ["cpuSecondsPerGb", "userSecondsPerGb", "systemSecondsPerGb"].map(|name| median(&json, "bulk-1-up", "culvert", name));
    assert!(cpu > 0.01 && cpu < 500.0 && (user + system - cpu).abs() < cpu / 100.0, "{cpu} = {user} + {system}");
    assert!(median(&json, "requests-1", "culvert", "cpuSecondsPer1000") > 0.0);
    assert!(json["figures"][0]["results"][0]["values"]["cpuSecondsPerGb"].is_null(), "no proxy has no CPU");
    assert!(json["machine"]["kernel"].as_str().unwrap().starts_with(fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim()));
    let chart = fs::read_to_string(svg).unwrap();
    assert!(chart.starts_with("<svg") && chart.ends_with("</svg>\n") && chart.contains("culvert"));
    assert!(fs::read_to_string(markdown).unwrap().contains("| none | culvert |"));
}

#[test]
fn new_connections_and_memory_and_passthrough_are_measured_too() {
    let home = Home::new();
    let json = home.json(&["--only", "connections,passthrough-bulk-up,memory-streams", "--streams", "50"]);
    assert!(median(&json, "connections", "culvert", "perSecond") > 1.0);
    assert!(median(&json, "passthrough-bulk-up", "culvert", "cpuSecondsPerGb") > 0.0);
    for side in ["movedBytesClientSide", "movedBytesServerSide"] {
        let bytes = median(&json, "memory-streams", "culvert", side);
        assert!(bytes < 4e6, "{side}: {bytes}");
    }
    let memory = json["figures"].as_array().unwrap().iter().find(|figure| figure["name"] == "memory-streams").unwrap();
    assert_eq!(memory["results"][0]["doesNotApply"], "there is no proxy");
}

#[test]
fn another_program_can_stand_in_the_place_of_the_proxies() {
    let home = Home::new();
    // Only with the lab's environment does it start at all.
    let (client, server) = (format!("{PROGRAM} proxy ztunnel"), format!("RUST_LOG=error '{PROGRAM}' proxy"));
    let json = home.json(&["--only", "requests-32", "--peer", "other", &client, &server]);
    assert_eq!(json["figures"][0]["reference"], "other");
    assert!(median(&json, "requests-32", "other", "cpuSecondsPer1000") > 0.0);
    assert!(json["figures"][0]["results"][1]["values"]["perSecond"]["ratio"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_peer_that_does_not_start_is_shown_with_its_last_words() {
    let home = Home::new();
    let own = format!("{PROGRAM} proxy");
    let output = home.bench(&["--only", "requests-1", "--peer", "bad", &own, "sh -c 'echo I know no such flag; exit 3'"]);
    let said = text(&output);
    assert!(!output.status.success());
    assert!(said.contains("I know no such flag") && said.contains("bad on the server's side") && said.contains("exited with 3"), "{said}");
}

#[test]
fn what_cannot_work_is_said_before_anything_starts() {
    let home = Home::new();
    for (arguments, expected) in [
        (&["--peer", "x", "no-such-program proxy", "true"][..], "no program no-such-program in PATH"),
        (&["--peer", "x", "/no/such/file", "true"], "/no/such/file"),
        (&["--peer", "culvert", "true", "true"], "taken"),
        (&["--only", "bulky"], "requests-beside-bulk"),
        (&["--floor", "/no/such/file"], "/no/such/file"),
        (&["--reference", "nobody"], "nobody"),
        (&["--json", "/no/such/folder/file"], "/no/such/folder/file"),
    ] {
        let output = home.bench(arguments);
        let said = text(&output);
        assert!(!output.status.success() && said.contains(expected), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

/// A bench whose contestants are ready, and the rest of what it prints.
fn ready(mut child: Child) -> (Child, impl Iterator<Item = String>) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.starts_with("interleaved:")), "it never got ready");
    (child, lines)
}

/// Every process that is in the process namespace of a running bench.
fn inside(runs: &Path) -> fs::File {
    let directory = fs::read_dir(runs).unwrap().next().unwrap().unwrap().path();
    let pid = fs::read_to_string(directory.join("pid")).unwrap();
    fs::File::open(format!("/proc/{}/ns/pid", pid.split_whitespace().next().unwrap())).unwrap()
}

fn processes(namespace: &fs::File) -> usize {
    let own = namespace.metadata().unwrap().ino();
    fs::read_dir("/proc").unwrap().flatten().filter(|entry| fs::metadata(entry.path().join("ns/pid")).is_ok_and(|found| found.ino() == own)).count()
}

#[test]
fn a_peer_that_ends_in_the_middle_costs_its_own_figures_only() {
    let home = Home::new();
    let go = home.file("go");
    let script = format!("sh -c '{PROGRAM} proxy & until [ -e {} ]; do sleep 0.02; done; kill -9 $!; echo so tired; exit 7'", go.display());
    let own = format!("{PROGRAM} proxy");
    let (mut child, lines) =
        ready(home.command(&["--only", "requests-1,connections", "--rounds", "2", "--peer", "weak", &script, &own]).spawn().unwrap());
    fs::write(&go, "").unwrap();
    let said: Vec<String> = lines.collect();
    let said = said.join("\n");
    assert!(!child.wait().unwrap().success());
    assert!(said.contains("weak: NOT TAKEN") && said.contains("so tired") && said.contains("exited with 7"), "{said}");
    let last = said.split("connections:").nth(1).unwrap();
    assert!(last.contains("  culvert ") && last.contains("  none "), "{said}");
    assert!(!home.runs().exists());
}

#[test]
fn an_interrupted_bench_leaves_nothing_behind() {
    let home = Home::new();
    let (child, lines) = ready(home.command(&["--seconds", "600", "--only", "requests-1"]).spawn().unwrap());
    let namespace = inside(&home.runs());
    assert!(processes(&namespace) > 4);
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    drop(lines);
    assert!(!output.status.success() && text(&output).contains("interrupted; cleaned up"), "{}", text(&output));
    assert_eq!(processes(&namespace), 0);
    assert!(!home.runs().exists());
}

#[test]
fn a_killed_bench_leaves_nothing_behind() {
    let home = Home::new();
    let (mut child, lines) = ready(home.command(&["--seconds", "600", "--only", "bulk-1-up"]).spawn().unwrap());
    let namespace = inside(&home.runs());
    child.kill().unwrap();
    child.wait().unwrap();
    drop(lines);
    wait_until("no process is left", || processes(&namespace) == 0);
    wait_until("no file is left", || !home.runs().exists());
}
