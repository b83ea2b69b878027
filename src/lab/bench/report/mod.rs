//! What was measured, and the forms in which it is shown.

mod json;
mod markdown;
mod svg;
mod text;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::figure::{Figure, Quantity};
use super::options::{Kind, Options};
use super::statistics::{Spread, paired_ratio};

/// A figure of all contestants.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) figure: Figure,
    /// In the contestants' order.
    pub(super) taken: Vec<Taken>,
}

/// A figure of one contestant: every value that counts, in the order of the rounds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Taken {
    pub(super) contestant: String,
    pub(super) values: BTreeMap<Quantity, Vec<f64>>,
    pub(super) missing: Option<Missing>,
    /// The worst trial's.
    pub(super) stolen_percent: f64,
}

/// Why there is no value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Missing {
    /// There is none to take.
    DoesNotApply(String),
    /// It could not be taken.
    Failed(String),
}

/// Where figures were taken.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// The CPU's name.
    pub cpu: String,
    /// CPUs this process may use.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Of the pods.
    pub congestion_control: String,
}

/// Everything that a bench has found so far.
#[derive(Debug)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// When it began, UTC.
    pub date: String,
    pub(super) options: Options,
    pub(super) outcomes: Vec<Outcome>,
}

/// One value with what is to be said of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shown {
    pub(super) spread: Spread,
    /// The median of the ratios to the reference in the same rounds; none for the reference itself.
    pub(super) ratio: Option<f64>,
}

impl Report {
    pub(super) fn begin(options: Options, machine: Machine) -> Self {
        let date = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
        Self { machine, date, options, outcomes: Vec::new() }
    }

    /// Whether something that could have been taken is missing.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.outcomes.iter().flat_map(|outcome| &outcome.taken).any(|taken| matches!(taken.missing, Some(Missing::Failed(_))))
    }

    /// Who ratios are to, among those of whom this figure can be taken: as asked; else the best floor, the first peer, no proxy.
    pub(super) fn reference(&self, figure: Figure) -> Option<&str> {
        let can = self.options.contestants.iter().filter(|contestant| figure.does_not_apply(&contestant.kind).is_none());
        let rank = |kind: &Kind| match kind {
            Kind::Floor(super::options::Floor::C3) => 0,
            Kind::Floor(_) => 1,
            Kind::Peer { .. } => 2,
            Kind::Direct => 3,
            Kind::Culvert => 4,
        };
        match &self.options.reference {
            Some(asked) => can.map(|contestant| contestant.name.as_str()).find(|name| name == asked),
            None => can.min_by_key(|contestant| rank(&contestant.kind)).map(|contestant| contestant.name.as_str()),
        }
    }

    /// A value of an outcome's contestant.
    pub(super) fn shown(&self, outcome: &Outcome, taken: &Taken, quantity: Quantity) -> Option<Shown> {
        let values = taken.values.get(&quantity)?;
        let reference = self.reference(outcome.figure).filter(|name| *name != taken.contestant);
        let other =
            reference.and_then(|name| outcome.taken.iter().find(|other| other.contestant == name)).and_then(|other| other.values.get(&quantity));
        Some(Shown { spread: Spread::of(values)?, ratio: other.and_then(|other| paired_ratio(values, other)) })
    }
}

impl Outcome {
    /// The quantities that somebody has, in their order.
    pub(super) fn quantities(&self) -> Vec<Quantity> {
        let mut all: Vec<Quantity> = self.taken.iter().flat_map(|taken| taken.values.keys().copied()).collect();
        all.sort();
        all.dedup();
        all
    }
}

impl Machine {
    /// This one.
    pub(super) fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let found =
                text.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned()));
            found.unwrap_or_default()
        };
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = ["model name", "Model", "Hardware", "CPU part"].iter().map(|name| field(&cpuinfo, name)).find(|value| !value.is_empty());
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        Self {
            cpu: cpu.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory: memory.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) * 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            congestion_control: String::new(),
        }
    }
}

fn rounds(count: u32) -> String {
    format!("{count} round{}", if count == 1 { "" } else { "s" })
}

/// Three significant digits, without an exponent.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    let decimals = match size {
        size if size >= 99.95 || size == 0.0 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.9995 => 2,
        size if size >= 0.09995 => 3,
        _ => 4,
    };
    let plain = format!("{value:.decimals$}");
    if size < 999.5 { plain } else { grouped(&plain) }
}

/// 1234567 as 1,234,567.
fn grouped(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |rest| ("-", rest));
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    format!("{sign}{out}")
}

#[cfg(test)]
pub(super) mod tests;
