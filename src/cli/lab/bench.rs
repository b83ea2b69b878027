//! `culvert lab bench`: its flags, and where its results go.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::lab::Base;
use crate::lab::bench::{self, Contestant, Event, Figure, Floor, Kind, Options, Report, Words};

/// Measures what the proxies cost on this machine: bulk, requests, new connections, passthrough, memory.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these figures, by name or by what names begin with (bulk, requests, connections, passthrough, memory, …).
    #[arg(long, value_name = "FIGURE,…", value_delimiter = ',')]
    only: Vec<String>,
    /// Length of a trial, seconds [default: 3; with --quick 1].
    #[arg(long, value_name = "S", value_parser = seconds)]
    seconds: Option<Duration>,
    /// Trials of each contestant that count; one more is dropped [default: 4; with --quick 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// One round of one second, and few streams: shows that it works, its figures are rough.
    #[arg(long)]
    quick: bool,
    /// Another proxy: a name and the commands that start it on the client's and on the server's side, each one word of this shell. They
    /// are started as culvert's own: same namespace, same environment (NODE_NAME, INPOD_UDS, LOCAL_XDS_PATH, LOCAL_CA_DIR, …), which
    /// NAME=VALUE before the program adds to. May be given again.
    #[arg(long, num_args = 3, value_names = ["NAME", "CLIENT_COMMAND", "SERVER_COMMAND"], action = clap::ArgAction::Append)]
    peer: Vec<String>,
    /// The built floors (cargo bench --bench floor --no-run prints the file): relays that do the least, as reference.
    #[arg(long, value_name = "FILE")]
    floor: Option<PathBuf>,
    /// The contestant that ratios are to [default: the floor, else the first peer, else none].
    #[arg(long, value_name = "NAME")]
    reference: Option<String>,
    /// Worker threads of each proxy.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: u32,
    /// Pins the client's proxy and the server to one CPU, the server's proxy and the client to another: less is left to chance in latencies,
    /// and figures of several streams lose.
    #[arg(long)]
    pin: bool,
    /// Idle streams for the figure of memory; a tenth of them for those of 12 MiB and of tunnels [default: 10000; with --quick 200].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    streams: Option<u32>,
    /// Also writes everything as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also writes a chart.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Also writes a table for a README.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// Memory is read after half a minute without change at most; this long without change is enough.
const STEADY: Duration = Duration::from_secs(2);

pub(super) fn run(args: &Args, program: &Path, base: &Base, interrupted: &dyn Fn() -> bool) -> anyhow::Result<ExitCode> {
    let options = args.options()?;
    // Found out now, not after minutes of measuring.
    for file in [&args.json, &args.svg, &args.markdown].into_iter().flatten() {
        std::fs::OpenOptions::new().create(true).append(true).open(file).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let mut screen = Screen { terminal: std::io::stderr().is_terminal() };
    let report = bench::run(program, base, options, interrupted, &mut |event| screen.show(event));
    screen.clear();
    let Some(report) = report? else { bail!("interrupted; cleaned up") };
    args.write(&report)?;
    if report.is_incomplete() {
        bail!("some figures could not be taken; the reasons are above");
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn options(&self) -> anyhow::Result<Options> {
        let contestants = self.contestants()?;
        if let Some(name) = &self.reference
            && !contestants.iter().any(|contestant| contestant.name == *name)
        {
            bail!("--reference: nobody is named {name:?}");
        }
        let floor = self.floor.as_ref().map(|file| file.canonicalize().with_context(|| format!("--floor {}", file.display()))).transpose()?;
        if let Some(file) = floor.as_ref().filter(|file| !file.is_file()) {
            bail!("--floor {}: not a file", file.display());
        }
        Ok(Options {
            figures: Figure::select(&self.only).map_err(anyhow::Error::msg).context("--only")?,
            contestants,
            reference: self.reference.clone(),
            trial: self.seconds.unwrap_or(if self.quick { Duration::from_secs(1) } else { Duration::from_secs(3) }),
            rounds: self.rounds.unwrap_or(if self.quick { 1 } else { 4 }),
            workers: self.workers,
            pin: self.pin,
            streams: self.streams.unwrap_or(if self.quick { 200 } else { 10_000 }) as usize,
            floor,
            steady: if self.quick { STEADY / 4 } else { STEADY },
        })
    }

    fn contestants(&self) -> anyhow::Result<Vec<Contestant>> {
        let named = |name: &str, kind: Kind| Contestant { name: name.to_owned(), kind };
        let mut all = vec![named("none", Kind::Direct), named("culvert", Kind::Culvert)];
        for peer in self.peer.chunks_exact(3) {
            let [name, client, server] = peer else { continue };
            if name.is_empty() || name.contains('/') || all.iter().any(|other| other.name == *name) || ["c1", "c2", "c3"].contains(&name.as_str()) {
                bail!("--peer: the name {name:?} is taken, empty, or has a '/'");
            }
            let words = |line: &str| command(line).with_context(|| format!("--peer {name}"));
            all.push(named(name, Kind::Peer { client: words(client)?, server: words(server)? }));
        }
        if self.floor.is_some() {
            all.extend([Floor::C1, Floor::C2, Floor::C3].map(|floor| named(floor.name(), Kind::Floor(floor))));
        }
        Ok(all)
    }

    fn write(&self, report: &Report) -> anyhow::Result<()> {
        let text = [(&self.json, format!("{:#}\n", report.json())), (&self.svg, report.svg()), (&self.markdown, report.markdown())];
        for (file, text) in text.iter().filter_map(|(file, text)| file.as_ref().map(|file| (file, text))) {
            std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

/// A command line whose program exists; its path does not depend on where it is started.
fn command(line: &str) -> anyhow::Result<Words> {
    let mut words = Words::parse(line).map_err(anyhow::Error::msg)?;
    if let Some(program) = words.arguments.first_mut() {
        let found = if program.contains('/') {
            Path::new(program).canonicalize().with_context(|| format!("cannot find the program {program}"))?
        } else {
            let paths = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&paths).map(|path| path.join(&*program)).find(|file| file.is_file());
            found.with_context(|| format!("there is no program {program} in PATH"))?
        };
        *program = found.display().to_string();
    }
    Ok(words)
}

/// Tables go to standard output; what is being done goes to the terminal, in one line that is written over.
struct Screen {
    terminal: bool,
}

impl Screen {
    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Step(step) if self.terminal => drop(write!(std::io::stderr(), "\r\x1b[K{step}")),
            Event::Step(_) => {}
            Event::Text(text) => {
                self.clear();
                let mut out = std::io::stdout();
                // Whoever no longer reads us still wants the files.
                out.write_all(text.as_bytes()).and_then(|()| out.flush()).ok();
            }
        }
    }

    fn clear(&self) {
        if self.terminal {
            write!(std::io::stderr(), "\r\x1b[K").ok();
        }
    }
}

pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "0.1 to 3600".to_owned())
}
