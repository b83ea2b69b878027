//! `culvert lab --demo`: a small mesh that shows what it does, step by step, and whether it really did.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use super::handle::{Lab, Launch, Place, Wiring};
use super::wire_look::Seen;
use super::{Base, Error};

const MESH: &str = include_str!("demo.yaml");
const DENY: &str = include_str!("demo-deny.yaml");
/// The same client and server, and an Envoy in between.
const WAYPOINT: &str = include_str!("waypoint.yaml");
/// Two words that must never be readable between the nodes, and one that must be.
const HTTP_WORD: &str = "marigold-in-the-http-header";
const TCP_WORD: &str = "periwinkle-in-the-raw-stream";
const PLAIN_WORD: &str = "dandelion-outside-of-the-mesh";
/// A change of policy reaches a proxy's connections well within this; it also takes the time of noticing a file.
const SOON: Duration = Duration::from_secs(5);

/// What was seen, or what was seen instead.
type Outcome = Result<String, String>;
/// What to do and look at.
type Act = fn(&Lab) -> Outcome;

/// One line of the table.
#[derive(Debug)]
struct Step {
    name: &'static str,
    seen: Outcome,
    took: Duration,
}

/// The demonstration while it runs.
#[derive(Debug)]
struct Demo {
    steps: Vec<Step>,
    print: fn(&str),
}

/// What a demonstration is started with.
#[derive(Debug)]
pub struct Launcher {
    /// The `culvert` program.
    pub program: PathBuf,
    /// Where run directories are.
    pub base: Base,
    /// The lab's name.
    pub name: String,
    /// Where other programs are found: a step that needs one is left out without it.
    pub search_path: String,
}

/// Runs the demonstration, printing a table as it goes, and says whether every step held. `interrupted` is asked between steps.
///
/// # Errors
/// When the lab cannot be started or ended at all.
pub fn run(launcher: Launcher, interrupted: &dyn Fn() -> bool) -> Result<bool, Error> {
    let Launcher { program, base, name, search_path } = launcher;
    let mut demo = Demo { steps: Vec::new(), print: |line| println!("{line}") };
    (demo.print)(&format!("{:34} {:7} {:>8}  what was seen", "step", "", "ms"));
    let began = Instant::now();
    let launch = Launch { program, base: base.clone(), name: name.clone(), definition: MESH.to_owned(), leashed: true, wiring: Wiring::Control };
    let lab = Lab::start(launch)?;
    demo.note("a mesh of 2 nodes and 6 pods", began, || {
        let status = lab.status().map_err(|error| error.to_string())?;
        let captured = status.pods.iter().filter(|pod| pod.captured).count();
        Ok(format!("a control plane, {} proxies, {captured} pods captured, {} not", status.nodes.len(), status.pods.len() - captured))
    });
    // The look begins before the first connection, so that every tunnel is seen from its first byte.
    let look = Look::begin(&lab).map_err(Error::failed("cannot look at the wire"))?;
    demo.note("HTTP and raw TCP through the mesh", Instant::now(), || through_the_mesh(&lab));
    demo.note("the wire between the nodes", Instant::now(), || the_wire(look));
    let mut steps: Vec<(&'static str, Act)> = vec![
        ("the same look without the mesh", without_the_mesh),
        ("a DENY policy, a live connection", deny),
        ("the reason, in the access log", reason),
        ("the policy is removed", allow),
    ];
    if search_path.split(':').any(|place| PathBuf::from(place).join("envoy").is_file()) {
        steps.push(("an Envoy as the service's waypoint", waypoint));
    } else {
        (demo.print)("(no step with a waypoint: Envoy is not installed)");
    }
    for (name, step) in steps {
        if interrupted() {
            break;
        }
        demo.note(name, Instant::now(), || step(&lab));
    }
    let stopped = interrupted();
    demo.note("everything is gone", Instant::now(), || {
        let supervisor = lab.status().map(|status| status.supervisor).map_err(|error| error.to_string())?;
        lab.down().map_err(|error| error.to_string())?;
        let process = PathBuf::from(format!("/proc/{supervisor}"));
        if process.exists() || base.path().join(&name).exists() {
            return Err("something is left of the lab".to_owned());
        }
        Ok("no process, no namespace, no file is left".to_owned())
    });
    let failed = demo.steps.iter().filter(|step| step.seen.is_err()).count();
    let verdict = match (stopped, failed) {
        (true, _) => "interrupted; cleaned up".to_owned(),
        (false, 0) => format!("every step held ({:.1} s)", began.elapsed().as_secs_f64()),
        (false, count) => format!("{count} of {} steps FAILED", demo.steps.len()),
    };
    (demo.print)(&verdict);
    Ok(!stopped && failed == 0)
}

impl Demo {
    fn note(&mut self, name: &'static str, since: Instant, step: impl FnOnce() -> Outcome) {
        let seen = step();
        let step = Step { name, seen, took: since.elapsed() };
        (self.print)(&step.lines());
        self.steps.push(step);
    }
}

impl Step {
    fn lines(&self) -> String {
        let (verdict, text) = match &self.seen {
            Ok(text) => ("ok", text),
            Err(text) => ("FAILED", text),
        };
        let mut out = String::new();
        for (index, line) in text.lines().enumerate() {
            if index == 0 {
                let _ = write!(out, "{:34} {verdict:7} {:>8.1}  {line}", self.name, self.took.as_secs_f64() * 1000.0);
            } else {
                let _ = write!(out, "\n{:52} {line}", "");
            }
        }
        out
    }
}

fn through_the_mesh(lab: &Lab) -> Outcome {
    let status = lab.status().map_err(|error| error.to_string())?;
    let web = status.services.iter().find(|service| service.hostname.starts_with("web.")).ok_or("there is no service web")?;
    let mut text = format!("http://web: \"{}\"", get(lab, "client", "http://web/")?);
    for address in &web.addresses {
        let url = format!("http://{}/", std::net::SocketAddr::new(*address, 80));
        text = format!("{text}\n{url}: \"{}\"", get(lab, "client", &url)?);
    }
    let echoed = said(lab, "client", &["talk", "echo:9000", TCP_WORD])?;
    if echoed != TCP_WORD {
        return Err(format!("the echo was {echoed:?}"));
    }
    Ok(format!("{text}\necho:9000, raw TCP: \"{echoed}\""))
}

fn the_wire(look: Look) -> Outcome {
    let seen = look.end()?;
    let readable: usize = seen.markers.values().sum();
    let text = format!(
        "{} bytes to and from port 15008 in {} TLS records, {} of {} streams not TLS\nour words were readable in {readable} of {} packets",
        seen.tunnel_bytes, seen.tls_records, seen.not_tls, seen.tunnel_streams, seen.packets
    );
    if seen.not_tls == 0 && seen.tls_records > 0 && readable == 0 { Ok(text) } else { Err(text) }
}

fn without_the_mesh(lab: &Lab) -> Outcome {
    let look = Look::begin(lab)?;
    said(lab, "plain-client", &["talk", "plain-echo:9000", PLAIN_WORD])?;
    let seen = look.end()?;
    let readable = seen.markers.get(PLAIN_WORD).copied().unwrap_or(0);
    let text = format!("between two pods that are not captured our word was readable in {readable} of {} packets", seen.packets);
    if readable > 0 { Ok(text) } else { Err(text) }
}

fn deny(lab: &Lab) -> Outcome {
    let mut command = lab.command(Place::Pod("client"), &["culvert", "lab", "talk", "echo:9000", TCP_WORD, "--hold"]);
    let mut live = Background::start(command.stdin(Stdio::null()))?;
    live.line()?;
    let before = Instant::now();
    lab.apply(&format!("{MESH}\n{DENY}")).map_err(|error| error.to_string())?;
    let end = live.line()?;
    let cut = before.elapsed();
    if cut > SOON {
        return Err(format!("the live connection went on for {} ms", cut.as_millis()));
    }
    match get(lab, "client", "http://web/") {
        Ok(answer) => Err(format!("web still answers: {answer}")),
        Err(error) => {
            let other = get(lab, "other-client", "http://web/")?;
            let end = end.split(" after").next().unwrap_or_default().to_owned();
            Ok(format!(
                "the live connection of client was {end} {} ms after the change\na new one: {error}\nother-client: \"{other}\"",
                cut.as_millis()
            ))
        }
    }
}

fn reason(lab: &Lab) -> Outcome {
    let log = lab.log("right").map_err(|error| error.to_string())?;
    let deadline = Instant::now() + SOON;
    loop {
        let text = std::fs::read_to_string(&log).map_err(|error| error.to_string())?;
        let denied = text.lines().rev().find(|line| line.contains("error=") && line.contains("explicitly denied by"));
        if let Some(line) = denied {
            let start = line.find("error=").unwrap_or(0);
            let who = line.split_whitespace().find(|word| word.starts_with("src.identity=")).unwrap_or("src.identity is missing");
            return Ok(format!("{who}\n{}", line.get(start..).unwrap_or_default()));
        }
        if Instant::now() > deadline {
            return Err("no line of the log of node right says why".to_owned());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn allow(lab: &Lab) -> Outcome {
    let before = Instant::now();
    lab.apply(MESH).map_err(|error| error.to_string())?;
    loop {
        match get(lab, "client", "http://web/") {
            Ok(answer) => return Ok(format!("client again: \"{answer}\" ({} ms after the change)", before.elapsed().as_millis())),
            Err(error) if before.elapsed() > SOON => return Err(error),
            Err(_) => {}
        }
    }
}

fn waypoint(lab: &Lab) -> Outcome {
    let status = lab.apply(WAYPOINT).map_err(|error| error.to_string())?;
    let way = status.pod("way").map_err(|error| error.to_string())?;
    let by_waypoint = |answer: &str| way.addresses.iter().any(|address| answer.ends_with(&format!(" {address}")));
    let before = Instant::now();
    let allowed = loop {
        match get(lab, "client", "http://web/ok") {
            Ok(answer) if by_waypoint(&answer) => break answer,
            // The proxies have not read it yet.
            other if before.elapsed() > SOON => return Err(format!("client, GET /ok: {other:?}, and not by the waypoint")),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let mut text = format!("client, GET /ok: \"{allowed}\"");
    for (pod, url) in [("client", "http://web/other"), ("other-client", "http://web/ok")] {
        let refused = match get(lab, pod, url) {
            Err(refused) if refused == "status 403" => refused,
            other => return Err(format!("{pod}, {url}: {other:?} instead of status 403")),
        };
        text = format!("{text}\n{pod}, {url}: {refused}, said by Envoy");
    }
    Ok(format!("{text}\nthe server's policy allows nobody but the waypoint"))
}

/// A look at the wire between the nodes that goes on beside us.
struct Look(Background);

impl Look {
    fn begin(lab: &Lab) -> Result<Self, String> {
        let mut command = lab.command(Place::Fabric, &["culvert", "lab", "look", HTTP_WORD, TCP_WORD, PLAIN_WORD]);
        let mut look = Background::start(command.stdin(Stdio::piped()))?;
        // It says so when it looks.
        look.line()?;
        Ok(Self(look))
    }

    fn end(mut self) -> Result<Seen, String> {
        drop(self.0.child.stdin.take());
        serde_json::from_str(&self.0.line()?).map_err(|error| error.to_string())
    }
}

/// The first line of what an HTTP server answers.
fn get(lab: &Lab, pod: &str, url: &str) -> Result<String, String> {
    said(lab, pod, &["get", url, "--header", &format!("x-demo: {HTTP_WORD}")])
}

/// What one of the small programs printed first, or why it failed.
fn said(lab: &Lab, pod: &str, arguments: &[&str]) -> Result<String, String> {
    let arguments: Vec<&str> = ["culvert", "lab"].into_iter().chain(arguments.iter().copied()).collect();
    let output = lab.exec(pod, &arguments).map_err(|error| error.to_string())?;
    let first = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().next().unwrap_or_default().to_owned();
    if output.status.success() { Ok(first(&output.stdout)) } else { Err(first(&output.stderr).trim_start_matches("culvert: ").to_owned()) }
}

/// A command that goes on beside us, and is ended when it is no longer needed.
struct Background {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Background {
    fn start(command: &mut std::process::Command) -> Result<Self, String> {
        let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| error.to_string())?;
        let output = child.stdout.take().ok_or("no output")?;
        Ok(Self { child, lines: BufReader::new(output) })
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => Err("the program beside ended without a word".to_owned()),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
