//! What this room counts, for the metrics page.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::catalog::{Catalog, Kind};

/// Counters of one control plane.
#[derive(Debug, Default)]
pub struct Stats {
    kinds: [OfKind; 2],
    connections: AtomicI64,
    stale: AtomicU64,
    unauthenticated: AtomicU64,
    issued: AtomicU64,
    not_issued: AtomicU64,
    ca_loads: AtomicU64,
    ca_failures: AtomicU64,
    epoch: AtomicU64,
}

#[derive(Debug, Default)]
struct OfKind {
    clients: AtomicI64,
    resources: AtomicI64,
    pushes: AtomicU64,
    sent: AtomicU64,
    removed: AtomicU64,
    acks: AtomicU64,
    nacks: AtomicU64,
}

/// Name, help and where the value is.
type Family<T> = (&'static str, &'static str, fn(&OfKind) -> &T);

/// Counted until it is dropped.
#[derive(Debug)]
pub(super) struct Held {
    stats: Arc<Stats>,
    of: Option<Kind>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.stats.gauge(self.of).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stats {
    fn of(&self, kind: Kind) -> &OfKind {
        match kind {
            Kind::Authorization => &self.kinds[0],
            Kind::Address => &self.kinds[1],
        }
    }

    fn gauge(&self, of: Option<Kind>) -> &AtomicI64 {
        of.map_or(&self.connections, |kind| &self.of(kind).clients)
    }

    pub(super) fn connected(self: &Arc<Self>) -> Held {
        self.hold(None)
    }

    pub(super) fn subscribed(self: &Arc<Self>, kind: Kind) -> Held {
        self.hold(Some(kind))
    }

    fn hold(self: &Arc<Self>, of: Option<Kind>) -> Held {
        self.gauge(of).fetch_add(1, Ordering::Relaxed);
        Held { stats: self.clone(), of }
    }

    pub(super) fn published(&self, catalog: &Catalog) {
        self.epoch.store(catalog.epoch, Ordering::Relaxed);
        for kind in Kind::ALL {
            self.of(kind).resources.store(i64::try_from(catalog.set(kind).entries.len()).unwrap_or(i64::MAX), Ordering::Relaxed);
        }
    }

    pub(super) fn pushed(&self, kind: Kind, resources: usize, removed: usize) {
        let of = self.of(kind);
        of.pushes.fetch_add(1, Ordering::Relaxed);
        of.sent.fetch_add(resources as u64, Ordering::Relaxed);
        of.removed.fetch_add(removed as u64, Ordering::Relaxed);
    }

    pub(super) fn acknowledged(&self, kind: Kind) {
        self.of(kind).acks.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn refused(&self, kind: Kind) {
        self.of(kind).nacks.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn stale(&self) {
        self.stale.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn unauthenticated(&self) {
        self.unauthenticated.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn certificate(&self, issued: bool) {
        if issued { &self.issued } else { &self.not_issued }.fetch_add(1, Ordering::Relaxed);
    }

    /// How often another CA was loaded, and refused.
    #[cfg(test)]
    pub(super) fn ca_loads(&self) -> (u64, u64) {
        (self.ca_loads.load(Ordering::Relaxed), self.ca_failures.load(Ordering::Relaxed))
    }

    pub(super) fn ca_loaded(&self, usable: bool) {
        if usable { &self.ca_loads } else { &self.ca_failures }.fetch_add(1, Ordering::Relaxed);
    }
}

/// Stats as a collector of a registry.
#[derive(Debug)]
pub struct StatsCollector(pub Arc<Stats>);

impl Collector for StatsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stats = &*self.0;
        for (name, help, value) in [
            ("culvert_control_stale_answers", "Answers of clients to no response of this stream", &stats.stale),
            ("culvert_control_unauthenticated", "Calls without a valid token", &stats.unauthenticated),
            ("culvert_control_certificates_issued", "Certificates signed", &stats.issued),
            ("culvert_control_certificates_refused", "Certificate requests refused", &stats.not_issued),
            ("culvert_control_ca_loads", "Times that the CA's files had changed and were loaded again", &stats.ca_loads),
            ("culvert_control_ca_failures", "Times that they had changed and were refused", &stats.ca_failures),
        ] {
            let counter = ConstCounter::new(value.load(Ordering::Relaxed));
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let epoch = i64::try_from(stats.epoch.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
        for (name, help, value) in [
            ("culvert_control_connections", "Connections of clients", stats.connections.load(Ordering::Relaxed)),
            ("culvert_control_epoch", "Changes of the mesh that were published since the start", epoch),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counters: [Family<AtomicU64>; 5] = [
            ("culvert_control_pushes", "Responses sent to clients", |of| &of.pushes),
            ("culvert_control_resources_sent", "Resources in them", |of| &of.sent),
            ("culvert_control_resources_removed", "Removed names in them", |of| &of.removed),
            ("culvert_control_acks", "Responses that clients accepted", |of| &of.acks),
            ("culvert_control_nacks", "Responses in which clients refused something", |of| &of.nacks),
        ];
        for (name, help, get) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for kind in Kind::ALL {
                let counter = ConstCounter::new(get(self.0.of(kind)).load(Ordering::Relaxed));
                counter.encode(family.encode_family(&[("type", kind.name())])?)?;
            }
        }
        let gauges: [Family<AtomicI64>; 2] = [
            ("culvert_control_clients", "Streams subscribed", |of| &of.clients),
            ("culvert_control_resources", "Resources served", |of| &of.resources),
        ];
        for (name, help, get) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for kind in Kind::ALL {
                let gauge = ConstGauge::new(get(self.0.of(kind)).load(Ordering::Relaxed));
                gauge.encode(family.encode_family(&[("type", kind.name())])?)?;
            }
        }
        Ok(())
    }
}
