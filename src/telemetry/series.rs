//! The five traffic families and their series budget.
//!
//! Why not a `Family<Labels, Counter>`: it has no bound, so a peer who invents names takes memory without end (reference,
//! craft-and-trust A13), and its byte counters are one cache line for all connections of a label set. Here every connection counts
//! in a [`Meter`] of its own; a scrape adds up what the live ones show and what the closed ones left behind. So a chunk costs one
//! uncontended atomic addition, a scrape is exact to the moment, and nothing has to be swept.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::TelemetryConfig;
use super::facts::{Reporter, ResponseFlag};
use super::labels::{Flagged, Labels};

/// Lines of a label set as long as nothing failed: opened, received, sent, closed.
const LINES: usize = 4;
/// Lines that each further response flag adds: closed, failed.
const FLAG_LINES: usize = 2;
/// A label set without a connection for this long makes room when the budget is used up. Prometheus then sees the series end,
/// and start again from zero should it come back.
const IDLE: Duration = Duration::from_secs(600);
/// Looking for idle sets costs a walk over all of them, so it happens at most this often.
const RETIRE_EVERY: Duration = Duration::from_secs(10);

/// Bytes of one connection. Both counters are written by whoever moves its bytes, and read by scrapes and the access log.
#[derive(Debug, Default)]
pub struct Meter {
    received: AtomicU64,
    sent: AtomicU64,
    half_closed: AtomicBool,
}

impl Meter {
    /// Notes that one direction has ended, and the other not yet.
    pub fn half_close(&self) {
        self.half_closed.store(true, Ordering::Relaxed);
    }

    /// Whether one direction has ended.
    #[must_use]
    pub fn is_half_closed(&self) -> bool {
        self.half_closed.load(Ordering::Relaxed)
    }

    /// Counts bytes that went from client to server.
    #[inline]
    pub fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that went from server to client.
    #[inline]
    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes so far: (client to server, server to client).
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.received.load(Ordering::Relaxed), self.sent.load(Ordering::Relaxed))
    }
}

/// A live connection's meter, as the key of what is known about it: itself and no other, whatever they show.
#[derive(Debug)]
struct Watched(Arc<Meter>);

impl PartialEq for Watched {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Watched {}

impl Hash for Watched {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

fn shown(before: Option<&(u64, u64)>) -> (u64, u64) {
    before.copied().unwrap_or_default()
}

/// One label set.
#[derive(Debug)]
pub(super) struct Series {
    labels: Labels,
    number: u64,
    line_length: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What closed connections left, and all opens and ends.
    counts: Counts,
    /// Meters of live connections, with the bytes that they had shown to another label set before (received, sent).
    live: HashMap<Watched, Option<Box<(u64, u64)>>>,
    /// Connections opened here that have not ended, wherever their meter is now.
    open: u64,
    lines: usize,
    used: Instant,
}

#[derive(Debug, Clone, Default)]
struct Counts {
    opened: u64,
    received: u64,
    sent: u64,
    ended: [u64; ResponseFlag::ALL.len()],
}

impl Series {
    fn new(labels: Labels, number: u64, lines: usize) -> Self {
        let state = State { counts: Counts::default(), live: HashMap::new(), open: 0, lines, used: Instant::now() };
        Self { line_length: labels.line_length(), labels, number, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counts as of now, with what live meters show.
    fn counts(&self) -> Counts {
        let state = self.state();
        let mut counts = state.counts.clone();
        for (meter, before) in &state.live {
            let (received, sent) = meter.0.totals();
            let (received_before, sent_before) = shown(before.as_deref());
            counts.received += received.saturating_sub(received_before);
            counts.sent += sent.saturating_sub(sent_before);
        }
        counts
    }
}

impl State {
    /// Takes a live meter out; its bytes stay. Returns what it showed.
    fn settle(&mut self, meter: &Arc<Meter>) -> Option<(u64, u64)> {
        let before = self.live.remove(&Watched(Arc::clone(meter)))?;
        let (received, sent) = meter.totals();
        let (received_before, sent_before) = shown(before.as_deref());
        self.counts.received += received.saturating_sub(received_before);
        self.counts.sent += sent.saturating_sub(sent_before);
        Some((received, sent))
    }
}

/// All label sets.
#[derive(Debug)]
pub(super) struct SeriesTable {
    sets: RwLock<HashMap<Labels, Arc<Series>>>,
    overflow: [Arc<Series>; 2],
    budget: Mutex<Budget>,
    numbers: AtomicU64,
    overflowed: AtomicU64,
}

#[derive(Debug)]
struct Budget {
    lines: usize,
    bytes: usize,
    max_lines: usize,
    max_bytes: usize,
    retired: Option<Instant>,
}

impl Budget {
    fn charge(&mut self, lines: usize, line_length: usize) -> bool {
        let (more_lines, more_bytes) = (self.lines + lines, self.bytes + lines * line_length);
        let fits = more_lines <= self.max_lines && more_bytes <= self.max_bytes;
        if fits {
            (self.lines, self.bytes) = (more_lines, more_bytes);
        }
        fits
    }
}

impl SeriesTable {
    pub(super) fn new(config: &TelemetryConfig) -> Self {
        let overflow = |reporter, number| Arc::new(Series::new(Labels::overflow(reporter), number, usize::MAX));
        Self {
            sets: RwLock::default(),
            overflow: [overflow(Reporter::Source, 0), overflow(Reporter::Destination, 1)],
            budget: Mutex::new(Budget { lines: 0, bytes: 0, max_lines: config.series_budget, max_bytes: config.page_budget, retired: None }),
            numbers: AtomicU64::new(2),
            overflowed: AtomicU64::new(0),
        }
    }

    fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an opened connection and starts to watch its meter.
    pub(super) fn open(&self, labels: Labels, reporter: Reporter, meter: &Arc<Meter>) -> Arc<Series> {
        self.with_series(labels, reporter, |state| {
            state.counts.opened += 1;
            state.open += 1;
            state.live.insert(Watched(Arc::clone(meter)), None);
        })
    }

    /// Lets further bytes of a connection count for other labels; what it moved so far stays where it is.
    pub(super) fn relabel(&self, from: &Arc<Series>, meter: &Arc<Meter>, labels: Labels, reporter: Reporter) -> Arc<Series> {
        if from.labels == labels {
            return Arc::clone(from);
        }
        let settled = from.state().settle(meter);
        self.with_series(labels, reporter, |state| {
            if let Some(shown) = settled {
                state.live.insert(Watched(Arc::clone(meter)), Some(Box::new(shown)));
            }
        })
    }

    /// Counts the end of a connection: under the labels that it was opened with, so that opened and closed pair per label set.
    pub(super) fn close(&self, opened: &Arc<Series>, metered: &Arc<Series>, meter: &Arc<Meter>, flag: ResponseFlag) -> (u64, u64) {
        let totals = metered.state().settle(meter).unwrap_or_default();
        let place = flag as usize;
        let mut state = opened.state();
        state.open = state.open.saturating_sub(1);
        state.used = Instant::now();
        let first = flag != ResponseFlag::Ok && state.counts.ended.get(place) == Some(&0) && state.lines != usize::MAX;
        if first {
            if self.budget().charge(FLAG_LINES, opened.line_length) {
                state.lines += FLAG_LINES;
            } else {
                drop(state);
                self.overflowed.fetch_add(1, Ordering::Relaxed);
                state = self.overflow(opened.labels.reporter()).state();
            }
        }
        if let Some(count) = state.counts.ended.get_mut(place) {
            *count += 1;
        }
        totals
    }

    fn overflow(&self, reporter: Reporter) -> &Arc<Series> {
        let [source, destination] = &self.overflow;
        match reporter {
            Reporter::Source => source,
            Reporter::Destination => destination,
        }
    }

    /// Runs `change` on the series of a label set while the table cannot retire it. Lock order: table, series, budget.
    fn with_series(&self, labels: Labels, reporter: Reporter, change: impl FnOnce(&mut State)) -> Arc<Series> {
        let apply = |series: &Arc<Series>, change: &mut dyn FnMut(&mut State)| {
            let mut state = series.state();
            state.used = Instant::now();
            change(&mut state);
            Arc::clone(series)
        };
        let mut change = Some(change);
        let mut change = |state: &mut State| {
            if let Some(change) = change.take() {
                change(state);
            }
        };
        if let Some(series) = self.sets.read().unwrap_or_else(PoisonError::into_inner).get(&labels) {
            return apply(series, &mut change);
        }
        let mut sets = self.sets.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = sets.get(&labels) {
            return apply(series, &mut change);
        }
        let line_length = labels.line_length();
        let fits = self.budget().charge(LINES, line_length) || (self.retire_idle(&mut sets) && self.budget().charge(LINES, line_length));
        if !fits {
            drop(sets);
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return apply(self.overflow(reporter), &mut change);
        }
        let series = Arc::new(Series::new(labels.clone(), self.numbers.fetch_add(1, Ordering::Relaxed), LINES));
        let series = apply(&series, &mut change);
        sets.insert(labels, Arc::clone(&series));
        series
    }

    /// Drops label sets that nobody uses, so that a flood of invented names does not take the budget for ever.
    fn retire_idle(&self, sets: &mut HashMap<Labels, Arc<Series>>) -> bool {
        let now = Instant::now();
        {
            let mut budget = self.budget();
            if budget.retired.is_some_and(|last| now.duration_since(last) < RETIRE_EVERY) {
                return false;
            }
            budget.retired = Some(now);
        }
        let (mut lines, mut bytes) = (0, 0);
        sets.retain(|_, series| {
            let state = series.state();
            let idle = state.open == 0 && state.live.is_empty() && now.duration_since(state.used) >= IDLE;
            if idle {
                lines += state.lines;
                bytes += state.lines * series.line_length;
            }
            !idle
        });
        let mut budget = self.budget();
        budget.lines = budget.lines.saturating_sub(lines);
        budget.bytes = budget.bytes.saturating_sub(bytes);
        lines > 0
    }

    /// Connections and ends whose labels were folded into the overflow series.
    #[cfg(test)]
    pub(super) fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Makes every label set look unused for `age`, and allows the next walk at once.
    #[cfg(test)]
    pub(super) fn age(&self, age: Duration) {
        for series in self.sets.read().unwrap_or_else(PoisonError::into_inner).values() {
            let mut state = series.state();
            state.used = state.used.checked_sub(age).unwrap_or(state.used);
        }
        self.budget().retired = None;
    }
}

impl Collector for SeriesTable {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let mut rows: Vec<Arc<Series>> = self.sets.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        rows.sort_unstable_by_key(|series| series.number);
        let rows: Vec<(Arc<Series>, Counts)> =
            self.overflow.iter().cloned().chain(rows).map(|series| (Arc::clone(&series), series.counts())).collect();
        let ok = [ResponseFlag::Ok].as_slice();
        let all = ResponseFlag::ALL.as_slice();
        let failures = all.get(1..).unwrap_or_default();
        type Read = fn(&Counts, ResponseFlag) -> u64;
        let ended: Read = |counts, flag| counts.ended.get(flag as usize).copied().unwrap_or(0);
        let families: [(&str, &str, &[ResponseFlag], Read); 5] = [
            ("istio_tcp_connections_opened", "The total number of TCP connections opened", ok, |counts, _| counts.opened),
            ("istio_tcp_connections_closed", "The total number of TCP connections closed", all, ended),
            ("istio_tcp_connections_failed", "The total number of TCP connections that ended with a failure (unstable)", failures, ended),
            ("istio_tcp_received_bytes", "The total bytes from client to server", ok, |counts, _| counts.received),
            ("istio_tcp_sent_bytes", "The total bytes from server to client", ok, |counts, _| counts.sent),
        ];
        for (name, help, flags, read) in families {
            // Families without a single series are left out whole, heading included. Opened connections always show their bytes.
            let shown = |counts: &Counts, flag: ResponseFlag| read(counts, flag) > 0 || (flags.len() == 1 && counts.opened > 0);
            let mut lines = rows.iter().flat_map(|(series, counts)| flags.iter().map(move |flag| (series, counts, *flag)));
            let mut next = lines.by_ref().find(|(_, counts, flag)| shown(counts, *flag));
            if next.is_none() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            while let Some((series, counts, flag)) = next {
                let value = read(counts, flag);
                family.encode_family(&Flagged(&series.labels, flag))?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
                next = lines.by_ref().find(|(_, counts, flag)| shown(counts, *flag));
            }
        }
        let mut gauge = encoder.encode_descriptor("culvert_traffic_label_sets", "Label sets of the traffic metrics", None, MetricType::Gauge)?;
        gauge.encode_gauge(&u64::try_from(rows.len().saturating_sub(self.overflow.len())).unwrap_or(u64::MAX))?;
        let mut counter = encoder.encode_descriptor(
            "culvert_traffic_series_overflow",
            "Connections counted in the overflow series because the series budget was used up",
            None,
            MetricType::Counter,
        )?;
        counter.encode_counter::<NoLabelSet, _, u64>(&self.overflowed.load(Ordering::Relaxed), None)
    }
}
