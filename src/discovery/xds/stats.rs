//! What the client counts (reference, dataplane §10.4).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::Kind;

/// Counters of one client; clones are one.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    terminations: Family<ReasonLabel, Counter>,
    messages: Family<UrlLabel, Counter>,
    bytes: Family<UrlLabel, Counter>,
    refused: Family<UrlLabel, Counter>,
    /// Since when what we know grows old; `None` while a stream is up.
    stale: Arc<Mutex<Stale>>,
}

/// Whether the world is kept up to date.
#[derive(Debug)]
enum Stale {
    Fresh,
    Since(Instant),
}

impl Default for Stale {
    fn default() -> Self {
        Self::Since(Instant::now())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UrlLabel {
    url: &'static str,
}

impl Stats {
    /// Shows the counters on a metrics page.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "istio_xds_connection_terminations",
            "The total number of completed connections to xds server (unstable)",
            self.terminations.clone(),
        );
        registry.register("istio_xds_message", "Total number of messages received (unstable)", self.messages.clone());
        registry.register("istio_xds_message_bytes", "Total number of bytes received (unstable)", self.bytes.clone());
        registry.register("culvert_xds_refused_resources", "Resources that were refused (unstable)", self.refused.clone());
        registry.register_collector(Box::new(StaleAge(self.stale.clone())));
    }

    pub(super) fn terminated(&self, reason: &'static str) {
        self.terminations.get_or_create_owned(&ReasonLabel { reason }).inc();
    }

    /// A push; `None` is a kind that nobody asked for.
    pub(super) fn push(&self, kind: Option<Kind>, bytes: usize, refused: usize) {
        let label = UrlLabel { url: kind.map_or("other", Kind::type_url) };
        self.messages.get_or_create_owned(&label).inc();
        self.bytes.get_or_create_owned(&label).inc_by(bytes as u64);
        if refused > 0 {
            self.refused.get_or_create_owned(&label).inc_by(refused as u64);
        }
    }

    /// A stream is up, or no longer.
    pub(super) fn streaming(&self, up: bool) {
        let mut stale = self.stale.lock().unwrap_or_else(PoisonError::into_inner);
        *stale = match (&*stale, up) {
            (_, true) => Stale::Fresh,
            (Stale::Fresh, false) => Stale::default(),
            (Stale::Since(since), false) => Stale::Since(*since),
        };
    }
}

#[derive(Debug)]
struct StaleAge(Arc<Mutex<Stale>>);

impl Collector for StaleAge {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let age = match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Stale::Fresh => 0.0,
            Stale::Since(since) => since.elapsed().as_secs_f64(),
        };
        let gauge = ConstGauge::new(age);
        let help = "For how long there has been no stream from the control plane; 0 while there is one (unstable)";
        let encoder = encoder.encode_descriptor("culvert_xds_stale_seconds", help, None, gauge.metric_type())?;
        gauge.encode(encoder)
    }
}
