//! For a terminal.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{Missing, Outcome, Report, Shown, grouped, number, rounds};
use crate::lab::bench::figure::{Figure, Quantity};
use crate::lab::bench::options::Kind;

/// More than this of a trial stolen by the hypervisor is worth a word, per cent.
const MUCH_STOLEN: f64 = 1.0;

impl Report {
    /// What stands above every table.
    #[must_use]
    pub fn heading(&self) -> String {
        let machine = &self.machine;
        let names: Vec<&str> = self.options.contestants.iter().map(|contestant| contestant.name.as_str()).collect();
        let mut out = String::new();
        let _ = writeln!(out, "culvert {} lab bench, {}", env!("CARGO_PKG_VERSION"), self.date);
        if cfg!(debug_assertions) {
            out.push_str("This is a DEBUG build of culvert: its figures mean nothing. Build with --release.\n");
        }
        let memory = grouped(&(machine.memory / (1 << 20)).to_string());
        let _ = writeln!(out, "{}, {} CPUs, {} MiB, Linux {}, {}", machine.cpu, machine.cpus, memory, machine.kernel, machine.congestion_control);
        if !machine.congestion_control.is_empty() && machine.congestion_control != "cubic" {
            out.push_str("cubic is not allowed to namespaces here (net.ipv4.tcp_allowed_congestion_control); all use the above\n");
        }
        let _ = writeln!(out, "interleaved: {}; {} of {:?}, one more dropped", names.join(", "), rounds(self.options.rounds), self.options.trial);
        let _ = writeln!(out, "this takes about {} min", self.minutes());
        let workers = self.options.workers;
        let _ = writeln!(out, "two proxies of {workers} worker thread{} each; CPU is that of both together", if workers == 1 { "" } else { "s" });
        if self.options.pin {
            out.push_str("pinned: client's proxy and server to one CPU, server's proxy and client to another\n");
        }
        let programs = self.options.contestants.iter().filter_map(|contestant| match &contestant.kind {
            Kind::Peer { client, server } if client == server => Some(format!("{}: {client} on both sides\n", contestant.name)),
            Kind::Peer { client, server } => Some(format!("{}: {client} on the client's side, {server} on the server's\n", contestant.name)),
            _ => None,
        });
        out.extend(programs);
        out.push_str("median [smallest..largest] ×median of the ratios to the reference, round by round\n");
        out
    }

    /// About how long the whole run takes, in minutes; memory of ten thousand streams is taken to be half a minute for each.
    fn minutes(&self) -> u64 {
        let seconds = self.options.trial.as_secs_f64() * f64::from(self.options.rounds + 1);
        let each = |figure: &Figure| {
            let takers = self.options.contestants.iter().filter(|contestant| figure.does_not_apply(&contestant.kind).is_none()).count();
            let one = match figure {
                Figure::Beside { .. } => seconds * 2.0,
                figure if figure.is_memory() => 60.0 * f64::from(u32::try_from(self.options.streams).unwrap_or(u32::MAX)) / 10_000.0 / 2.0 + 10.0,
                _ => seconds,
            };
            one * f64::from(u32::try_from(takers).unwrap_or(u32::MAX))
        };
        // A bounded number of bounded durations.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let minutes = (self.options.figures.iter().map(each).sum::<f64>() / 60.0).ceil() as u64;
        minutes
    }

    /// The table of a figure.
    pub(in super::super) fn table(&self, outcome: &Outcome) -> String {
        let reference = self.reference(outcome.figure).map(|name| format!(" (× {name})")).unwrap_or_default();
        let mut out = format!("\n{}: {}{reference}\n", outcome.figure.name(), outcome.figure.title());
        let quantities = outcome.quantities();
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(quantities.iter().map(|quantity| quantity.heading().to_owned()));
        let (mut notes, mut apart) = (String::new(), BTreeMap::<&str, Vec<&str>>::new());
        for taken in &outcome.taken {
            match &taken.missing {
                Some(Missing::DoesNotApply(why)) => apart.entry(why).or_default().push(&taken.contestant),
                Some(Missing::Failed(why)) => drop(writeln!(notes, "  {}: NOT TAKEN: {why}", taken.contestant)),
                None => {
                    let cell = |quantity| self.shown(outcome, taken, quantity).map_or_else(|| "–".to_owned(), |shown| cell(quantity, shown));
                    rows.push(std::iter::once(taken.contestant.clone()).chain(quantities.iter().copied().map(cell)).collect());
                }
            }
            if taken.stolen_percent > MUCH_STOLEN {
                let _ = writeln!(
                    notes,
                    "  {}: the hypervisor took up to {:.1} % of the machine's time in a trial",
                    taken.contestant, taken.stolen_percent
                );
            }
        }
        if rows.len() > 1 {
            out.push_str(&aligned(&rows));
        }
        out.push_str(&notes);
        for (why, names) in apart {
            let _ = writeln!(out, "  not of {}: {why}", names.join(", "));
        }
        out
    }

    /// Heading and every table so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.outcomes.iter().fold(self.heading(), |text, outcome| text + &self.table(outcome))
    }
}

fn cell(quantity: Quantity, shown: Shown) -> String {
    let spread = shown.spread;
    let range =
        if spread.min == spread.max || quantity.is_part() { String::new() } else { format!(" [{}..{}]", number(spread.min), number(spread.max)) };
    let ratio = shown.ratio.map(|ratio| format!(" ×{ratio:.2}")).unwrap_or_default();
    format!("{}{range}{ratio}", number(spread.median))
}

/// Columns as wide as their widest cell.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let padding = width(column).saturating_sub(cell.chars().count());
            let _ = write!(line, "  {cell}{}", " ".repeat(padding));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}
