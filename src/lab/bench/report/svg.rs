//! A chart: one panel for each of the figures that matter most, one bar for each contestant. No script, no font and no colour that needs a
//! light or a dark page.

use std::fmt::Write as _;

use super::{Report, number};
use crate::lab::bench::figure::{Figure, Quantity};
use crate::lab::bench::options::Kind;

/// Panels in reading order; those that were not measured are left out.
const PANELS: [(Figure, Quantity, &str); 8] = [
    (Figure::Bulk { streams: 1, up: true }, Quantity::CpuSecondsPerGb, "CPU seconds per GB, client → server"),
    (Figure::Bulk { streams: 1, up: false }, Quantity::CpuSecondsPerGb, "CPU seconds per GB, server → client"),
    (Figure::Requests { connections: 1 }, Quantity::CpuSecondsPer1000, "CPU seconds per 1,000 requests, 1 connection"),
    (Figure::Requests { connections: 32 }, Quantity::CpuSecondsPer1000, "CPU seconds per 1,000 requests, 32 connections"),
    (Figure::Connections, Quantity::CpuSecondsPer1000, "CPU seconds per 1,000 new connections"),
    (Figure::Requests { connections: 1 }, Quantity::P50Microseconds, "request, median, µs"),
    (Figure::PassthroughBulk { up: true }, Quantity::CpuSecondsPerGb, "passthrough, CPU seconds per GB"),
    (Figure::MemoryStreams, Quantity::IdleBytesClientSide, "memory per idle stream, bytes, client's side"),
];
const COLUMNS: usize = 2;
const PANEL_WIDTH: usize = 420;
const BAR: usize = 18;
const GAP: usize = 7;
const NAME_WIDTH: usize = 96;
const VALUE_WIDTH: usize = 76;
/// Readable on white and on near-black alike.
const INK: &str = "#7d8590";

struct Panel<'a> {
    title: &'a str,
    /// Name, median, colour.
    bars: Vec<(&'a str, f64, &'static str)>,
}

impl Report {
    /// The chart; lower is better in every panel.
    #[must_use]
    pub fn svg(&self) -> String {
        let panels: Vec<Panel<'_>> = PANELS.iter().filter_map(|(figure, quantity, title)| self.panel(*figure, *quantity, title)).collect();
        let bars = panels.iter().map(|panel| panel.bars.len()).max().unwrap_or(0);
        let (panel_height, width) = (40 + bars * (BAR + GAP), COLUMNS * PANEL_WIDTH + 20);
        let height = 60 + panels.len().div_ceil(COLUMNS) * panel_height;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\" \
             font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"{INK}\">\n<title>culvert lab bench: lower is better</title>\n"
        );
        for (index, panel) in panels.iter().enumerate() {
            let (left, top) = (10 + index % COLUMNS * PANEL_WIDTH, 10 + index / COLUMNS * panel_height);
            draw(&mut out, panel, (left, top));
        }
        let machine = &self.machine;
        let date = self.date.split('T').next().unwrap_or_default();
        let below = format!(
            "Lower is better. {}, {} CPUs, Linux {}, {date}. Medians of one run; CPU of both proxies.",
            machine.cpu, machine.cpus, machine.kernel
        );
        let _ = writeln!(out, "<text x=\"10\" y=\"{}\" font-size=\"11\">{}</text>\n</svg>", height - 14, escaped(&below));
        out
    }

    fn panel<'a>(&'a self, figure: Figure, quantity: Quantity, title: &'a str) -> Option<Panel<'a>> {
        let outcome = self.outcomes.iter().find(|outcome| outcome.figure == figure)?;
        let kind = |name: &str| self.options.contestants.iter().find(|contestant| contestant.name == name).map(|contestant| &contestant.kind);
        let bars: Vec<_> = outcome
            .taken
            .iter()
            .filter_map(|taken| {
                let colour = match kind(&taken.contestant)? {
                    Kind::Culvert => "#2f81f7",
                    Kind::Peer { .. } => "#d4843e",
                    Kind::Floor(_) => "#8b949e",
                    Kind::Direct => "#6e9e78",
                };
                Some((taken.contestant.as_str(), self.shown(outcome, taken, quantity)?.spread.median.max(0.0), colour))
            })
            .collect();
        if bars.is_empty() { None } else { Some(Panel { title, bars }) }
    }
}

#[allow(clippy::cast_precision_loss)] // Pixels.
fn draw(out: &mut String, panel: &Panel<'_>, (left, top): (usize, usize)) {
    let _ = writeln!(out, "<text x=\"{left}\" y=\"{}\" font-weight=\"600\">{}</text>", top + 14, escaped(panel.title));
    let longest = panel.bars.iter().map(|bar| bar.1).fold(f64::MIN_POSITIVE, f64::max);
    let room = (PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH) as f64;
    for (index, (name, value, colour)) in panel.bars.iter().enumerate() {
        let y = top + 26 + index * (BAR + GAP);
        let (start, length) = (left + NAME_WIDTH, (value / longest * room).max(1.0));
        let middle = y + BAR - 5;
        let _ = writeln!(out, "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>", start - 8, escaped(&short(name)));
        let _ = writeln!(out, "<rect x=\"{start}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{colour}\"/>");
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{middle}\">{}</text>", start as f64 + length + 6.0, number(*value));
    }
}

/// As much of a name as there is room for.
fn short(name: &str) -> String {
    if name.chars().count() <= 14 { name.to_owned() } else { name.chars().take(13).chain(['…']).collect() }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
