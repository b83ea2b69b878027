//! Counts of certificates and of requests for them. The reference has none (dataplane §10.4); without them a CA that refuses is seen only in logs.

use std::fmt;
use std::time::SystemTime;

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::{MetricType, TypedMetric};

use super::error::IdentityError;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// How requests to the issuer ended, by outcome: `issued`, or the [reason](IdentityError::reason) of the failure.
#[derive(Debug, Default)]
pub(super) struct Requests(Family<OutcomeLabel, Counter>);

impl Requests {
    pub(super) fn count(&self, failure: Option<&IdentityError>) {
        let outcome = failure.map_or("issued", IdentityError::reason);
        self.0.get_or_create(&OutcomeLabel { outcome }).inc();
    }
}

/// How many identities are in each state, as the configuration dump names them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Census {
    pub(super) initializing: i64,
    pub(super) available: i64,
    pub(super) unavailable: i64,
    /// When the first available certificate expires.
    pub(super) first_expiry: Option<SystemTime>,
}

/// Writes the families of this room.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, requests: &Requests, (census, now): (Census, SystemTime)) -> fmt::Result {
    let help = "Requests for workload certificates, by how they ended";
    requests.0.encode(encoder.encode_descriptor("culvert_certificate_requests", help, None, MetricType::Counter)?)?;
    let states = Family::<StateLabel, Gauge>::default();
    for (state, count) in [("available", census.available), ("initializing", census.initializing), ("unavailable", census.unavailable)] {
        states.get_or_create(&StateLabel { state }).set(count);
    }
    let help = "Identities by the state of their certificate";
    states.encode(encoder.encode_descriptor("culvert_certificates", help, None, Family::<StateLabel, Gauge>::TYPE)?)?;
    if let Some(left) = census.first_expiry.map(|at| at.duration_since(now).unwrap_or_default()) {
        let gauge = ConstGauge::new(i64::try_from(left.as_secs()).unwrap_or(i64::MAX));
        let help = "Time until the first certificate in use expires, in seconds; renewal is at half life, so a small value means that it fails";
        let encoder: MetricEncoder<'_> = encoder.encode_descriptor("culvert_certificate_first_expiry_seconds", help, None, gauge.metric_type())?;
        gauge.encode(encoder)?;
    }
    Ok(())
}
