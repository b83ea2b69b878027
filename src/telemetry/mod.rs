//! What happened: metrics with the names and labels of the reference (dataplane §10.4), the access log (§10.5), and the process's
//! log with its bounded, never blocking writer.
//! This room never decides anything, never waits for a reader on the data path, and never lets a peer choose how much memory,
//! how many metric series or how many log lines it takes.
//! Main types: [`Telemetry`], [`OpenConnection`], [`Meter`], [`RateLimit`], [`logging::LogHandle`].

mod access;
mod connection;
mod facts;
mod labels;
pub mod logging;
mod names;
mod process;
mod rate_limit;
mod refusal;
mod series;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

pub use connection::OpenConnection;
pub use facts::{ConnectionEnd, ConnectionFacts, PeerFacts, Reporter, ResponseFlag};
pub(crate) use rate_limit::limited;
pub use rate_limit::{RateLimit, report_suppressed};
pub use refusal::{EarlyRefusal, RefusalReason};
pub use series::Meter;

use crate::model::{Text, Workload};
use names::NameUses;
use refusal::Refusals;
use series::SeriesTable;

/// What can go wrong while somebody looks at what happened.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A log filter that cannot be read.
    #[error("invalid log filter {entry:?}: {reason}; write a level (error, warn, info, debug, trace, off) or scope=level, separated by commas")]
    Filter {
        /// The offending entry, shortened.
        entry: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The log was set up twice in one process.
    #[error("the log is already set up in this process")]
    LogAlreadySetUp,
    /// The writer thread of the log could not be started.
    #[error("cannot start the thread that writes the log: {0}")]
    LogThread(std::io::Error),
    /// A collector refused to print itself.
    #[error("the metrics page could not be written: a collector failed")]
    MetricsPage,
}

/// Settings of [`Telemetry`].
#[derive(Debug, Clone)]
pub struct TelemetryConfig {
    /// `tag` of `istio_build`: the mesh version (ISTIO_META_ISTIO_VERSION), "unknown" when not told.
    pub tag: String,
    /// `component` of `istio_build`. Default `ztunnel`: dashboards and Istio's own tooling look for this name.
    pub component: &'static str,
    /// Most lines of the five traffic families; further label sets are counted in one series whose labels say `overflow`.
    /// Default 10,000 (reference, craft-and-trust A13).
    pub series_budget: usize,
    /// Most bytes of these lines on the metrics page. Default 16 MiB. A line with every label is about 900 bytes, so 10,000 usual
    /// ones take 9 MB; the 5 MiB that A13 proposes beside 10,000 series would halve the number of series, and the number is what a
    /// scraper's memory depends on. This bound only stops peers who claim long names.
    pub page_budget: usize,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { tag: "unknown".into(), component: "ztunnel", series_budget: 10_000, page_budget: 16 * 1024 * 1024 }
    }
}

/// The handle that the other rooms hold; a clone is a reference count.
#[derive(Clone)]
pub struct Telemetry {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Mutex<Registry>,
    series: Arc<SeriesTable>,
    sockets: Family<ReporterLabel, Gauge>,
    refusals: Refusals,
    lost_sources: Counter,
    names: NameUses,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabel {
    reporter: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    component: &'static str,
    tag: String,
}

impl Telemetry {
    /// A fresh registry with the families of this room. One per process, except in tests.
    #[must_use]
    pub fn new(config: TelemetryConfig) -> Self {
        let mut registry = Registry::default();
        let build = Family::<BuildLabels, Gauge>::default();
        build.get_or_create(&BuildLabels { component: config.component, tag: config.tag.clone() }).set(1);
        registry.register("istio_build", "Component build information", build);
        let sockets = Family::<ReporterLabel, Gauge>::default();
        registry.register("istio_tcp_sockets_open", "Accepted TCP sockets that are open now (unstable)", sockets.clone());
        let refusals = Refusals::register(&mut registry);
        let lost_sources = Counter::default();
        let help = "Connections to applications that do not show their client's address, because the kernel refused it";
        registry.register("culvert_source_addresses_lost", help, lost_sources.clone());
        let names = NameUses::register(&mut registry);
        let series = Arc::new(SeriesTable::new(&config));
        registry.register_collector(Box::new(Arc::clone(&series)));
        registry.register_collector(Box::new(process::ProcessCollector));
        registry.register_collector(Box::new(logging::LogCollector));
        Self { inner: Arc::new(Inner { registry: Mutex::new(registry), series, sockets, refusals, lost_sources, names }) }
    }

    /// Counts a connection as opened and logs it at debug. From here on it is closed exactly once, whatever happens to its task.
    pub fn opened(&self, facts: ConnectionFacts) -> OpenConnection {
        OpenConnection::open(Arc::clone(&self.inner.series), facts)
    }

    /// A connection that was refused before its context was known: one WARN line (at most 10 a second per reason) and a counter.
    pub fn refused_early(&self, refusal: &EarlyRefusal) {
        self.inner.refusals.record(refusal);
    }

    /// An application was reached, but does not see the address of its client.
    pub fn source_lost(&self) {
        self.inner.lost_sources.inc();
    }

    /// A connection of `source` needed the address of a host name of the mesh, remembered or not.
    pub fn name_used(&self, source: &Workload, hostname: &Text) {
        self.inner.names.count(source, hostname);
    }

    /// An accepted socket; counted in `istio_tcp_sockets_open` until the guard is dropped.
    pub fn socket_opened(&self, reporter: Reporter) -> SocketGuard {
        let gauge = self.inner.sockets.get_or_create_owned(&ReporterLabel { reporter: reporter.as_str() });
        gauge.inc();
        SocketGuard { gauge }
    }

    /// Lets another room register its own families. Takes a lock that a scrape also takes: at start only.
    pub fn registry<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.inner.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Publishes the `tokio_*` families of a runtime (the data plane's). Call once.
    pub fn watch_runtime(&self, runtime: &tokio::runtime::Handle) {
        let collector = process::RuntimeCollector::new(runtime);
        self.registry(|registry| registry.register_collector(Box::new(collector)));
    }

    /// The whole metrics page, OpenMetrics text. Takes milliseconds with a full series budget: not for a data-plane thread.
    pub fn metrics_page(&self) -> Result<String, TelemetryError> {
        let mut page = String::with_capacity(16 * 1024);
        self.registry(|registry| prometheus_client::encoding::text::encode(&mut page, registry)).map_err(|_| TelemetryError::MetricsPage)?;
        Ok(page)
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new(TelemetryConfig::default())
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

/// An accepted socket in `istio_tcp_sockets_open`; dropping it takes it out.
#[must_use = "the socket counts as closed as soon as the guard is dropped"]
#[derive(Debug)]
pub struct SocketGuard {
    gauge: Gauge,
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

#[cfg(test)]
mod tests;
