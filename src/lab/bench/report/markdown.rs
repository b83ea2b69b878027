//! For a README: one row for each value, one column for each contestant.

use std::fmt::Write as _;

use super::{Missing, Outcome, Report, Taken, number, rounds};
use crate::lab::bench::figure::Quantity;

impl Report {
    /// A table in GitHub's markdown, with what it was measured on above it.
    #[must_use]
    pub fn markdown(&self) -> String {
        let machine = &self.machine;
        let mut out = format!(
            "culvert {}, {}; {}, {} CPUs, Linux {}, {}; {} of {:?}, interleaved; median, × reference\n\n",
            env!("CARGO_PKG_VERSION"),
            self.date.split('T').next().unwrap_or_default(),
            machine.cpu,
            machine.cpus,
            machine.kernel,
            machine.congestion_control,
            rounds(self.options.rounds),
            self.options.trial,
        );
        let names: Vec<String> = self.options.contestants.iter().map(|contestant| escaped(&contestant.name)).collect();
        let _ = writeln!(out, "| figure | | {} |\n|---|---|{}", names.join(" | "), "---|".repeat(names.len()));
        let mut notes = String::new();
        for outcome in &self.outcomes {
            let mut title = outcome.figure.title();
            for quantity in outcome.quantities().into_iter().filter(|quantity| !quantity.is_part()) {
                let cells: Vec<String> = outcome.taken.iter().map(|taken| self.entry(outcome, taken, quantity)).collect();
                let _ = writeln!(out, "| {} | {} | {} |", std::mem::take(&mut title), quantity.heading(), cells.join(" | "));
            }
            for taken in &outcome.taken {
                if let Some(Missing::Failed(why)) = &taken.missing {
                    let why = why.lines().next().unwrap_or_default();
                    let _ = writeln!(notes, "\nNot taken: {} of {}: {}", outcome.figure.name(), escaped(&taken.contestant), escaped(why));
                }
            }
        }
        out + &notes
    }

    fn entry(&self, outcome: &Outcome, taken: &Taken, quantity: Quantity) -> String {
        self.shown(outcome, taken, quantity).map_or_else(
            || "–".to_owned(),
            |shown| format!("{}{}", number(shown.spread.median), shown.ratio.map(|ratio| format!(" (×{ratio:.2})")).unwrap_or_default()),
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}
