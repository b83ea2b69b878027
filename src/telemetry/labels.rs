//! The label set of the traffic metrics (reference, dataplane §10.4), complete and in its order.

use std::fmt::Write;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use super::facts::{ConnectionFacts, PeerFacts, Reporter, ResponseFlag};
use crate::model::{Baggage, Text, Workload};

/// Longest label value in bytes; longer ones are cut. A Kubernetes name has at most 253 bytes, a SPIFFE ID of such names 590.
const MAX_VALUE: usize = 600;

/// `None` prints as `unknown`.
type Value = Option<Text>;

/// Everything but the response flag.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Labels {
    reporter: Reporter,
    source: Side,
    service: Value,
    service_namespace: Value,
    service_name: Value,
    destination: Side,
    mutual_tls: bool,
    /// Present when any workload is known: source region, source zone, destination region, destination zone.
    locality: Option<[Value; 4]>,
    overflow: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Side {
    workload: Value,
    canonical_service: Value,
    canonical_revision: Value,
    namespace: Value,
    principal: Value,
    app: Value,
    version: Value,
    cluster: Value,
}

fn known(text: &Text) -> Value {
    if text.is_empty() {
        return None;
    }
    if text.len() <= MAX_VALUE {
        return Some(text.clone());
    }
    let end = (0..=MAX_VALUE).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).map(Text::from)
}

impl Side {
    fn of(peer: &PeerFacts, principal: Value) -> Self {
        let mut side = match (&peer.workload, &peer.baggage) {
            (Some(workload), _) => Self::of_workload(workload),
            (None, Some(baggage)) => Self::of_baggage(baggage),
            (None, None) => Self::default(),
        };
        side.principal = principal;
        side
    }

    fn of_workload(workload: &Workload) -> Self {
        let profile = &workload.profile;
        Self {
            workload: known(&profile.workload_name),
            canonical_service: known(&profile.canonical_name),
            canonical_revision: known(&profile.canonical_revision),
            namespace: known(&profile.namespace),
            principal: None,
            app: known(&profile.canonical_name),
            version: known(&profile.canonical_revision),
            cluster: known(&profile.cluster_id),
        }
    }

    fn of_baggage(baggage: &Baggage) -> Self {
        let known = |value: &Value| value.as_ref().and_then(known);
        Self {
            workload: known(&baggage.workload_name),
            canonical_service: known(&baggage.service_name),
            canonical_revision: known(&baggage.revision),
            namespace: known(&baggage.namespace),
            principal: None,
            app: known(&baggage.workload_name),
            version: known(&baggage.revision),
            cluster: known(&baggage.cluster_id),
        }
    }

    fn values(&self) -> [(&'static str, &Value); 8] {
        [
            ("workload", &self.workload),
            ("canonical_service", &self.canonical_service),
            ("canonical_revision", &self.canonical_revision),
            ("workload_namespace", &self.namespace),
            ("principal", &self.principal),
            ("app", &self.app),
            ("version", &self.version),
            ("cluster", &self.cluster),
        ]
    }
}

fn place(peer: &PeerFacts) -> [Value; 2] {
    match (&peer.workload, &peer.baggage) {
        (Some(workload), _) => [known(&workload.profile.locality.region), known(&workload.profile.locality.zone)],
        (None, Some(baggage)) => [baggage.region.as_ref().and_then(known), baggage.zone.as_ref().and_then(known)],
        (None, None) => [None, None],
    }
}

/// A workload of this node, and a host name that it needed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct NameLabels {
    source: Side,
    hostname: Value,
}

impl NameLabels {
    pub(super) fn of(source: &Workload, hostname: &Text) -> Self {
        Self { source: Side::of_workload(source), hostname: known(hostname) }
    }

    /// The one set that takes what is over the limit.
    pub(super) fn overflow() -> Self {
        let overflow = || Some(Text::from("overflow"));
        Self { source: Side { workload: overflow(), ..Side::default() }, hostname: overflow() }
    }
}

impl EncodeLabelSet for NameLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (name, value) in self.source.values() {
            (format!("source_{name}").as_str(), value.as_deref().unwrap_or("unknown")).encode(encoder.encode_label())?;
        }
        ("hostname", self.hostname.as_deref().unwrap_or("unknown")).encode(encoder.encode_label())
    }
}

impl Labels {
    pub(super) fn of(facts: &ConnectionFacts) -> Self {
        // A source is only who a certificate says; the destination of plain TCP is who it ought to be.
        let source_principal = facts.source.identity.as_ref().filter(|_| facts.mutual_tls).map(|identity| identity.uri().clone());
        let destination_identity = facts.destination.identity.clone();
        let destination_identity = destination_identity.or_else(|| facts.destination.workload.as_ref().and_then(|workload| workload.identity().ok()));
        let destination_principal = destination_identity.map(|identity| identity.uri().clone());
        let any_workload = facts.source.workload.is_some() || facts.destination.workload.is_some();
        let [source_region, source_zone] = place(&facts.source);
        let [destination_region, destination_zone] = place(&facts.destination);
        Self {
            reporter: facts.reporter,
            source: Side::of(&facts.source, source_principal.as_ref().and_then(known)),
            service: facts.service.as_ref().and_then(|service| known(&service.hostname)),
            service_namespace: facts.service.as_ref().and_then(|service| known(&service.namespace)),
            service_name: facts.service.as_ref().and_then(|service| known(&service.name)),
            destination: Side::of(&facts.destination, destination_principal.as_ref().and_then(known)),
            mutual_tls: facts.mutual_tls,
            locality: any_workload.then_some([source_region, source_zone, destination_region, destination_zone]),
            overflow: false,
        }
    }

    /// The one set that takes what is over the budget; its names say `overflow`, which is no Kubernetes object's doing.
    pub(super) fn overflow(reporter: Reporter) -> Self {
        let side = Side::default();
        Self {
            reporter,
            source: side.clone(),
            service: None,
            service_namespace: None,
            service_name: None,
            destination: side,
            mutual_tls: false,
            locality: None,
            overflow: true,
        }
    }

    pub(super) fn reporter(&self) -> Reporter {
        self.reporter
    }

    /// Bytes of one line of the metrics page, give or take the escaping of rare characters.
    pub(super) fn line_length(&self) -> usize {
        /// Names of all labels with `="",` and of the longest family, the longest flag, and a number of 20 digits.
        const NAMES: usize = 860;
        let side = |side: &Side| side.values().iter().map(|(_, value)| self.show(value).len()).sum::<usize>();
        let service = [&self.service, &self.service_namespace, &self.service_name].iter().map(|value| self.show(value).len()).sum::<usize>();
        let locality = self.locality.iter().flatten().map(|value| self.show(value).len()).sum::<usize>();
        NAMES + side(&self.source) + side(&self.destination) + service + locality
    }

    fn show<'a>(&self, value: &'a Value) -> &'a str {
        value.as_deref().unwrap_or(if self.overflow { "overflow" } else { "unknown" })
    }
}

/// A label set with its response flag, ready to print.
pub(super) struct Flagged<'a>(pub(super) &'a Labels, pub(super) ResponseFlag);

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
        let labels = self.0;
        // The key is written in two pieces, so that no name is allocated per line.
        let mut label = |prefix: &str, name: &str, value: &str| {
            let mut encoder = encoder.encode_label();
            let mut key = encoder.encode_label_key()?;
            key.write_str(prefix)?;
            key.write_str(name)?;
            let mut shown = key.encode_label_value()?;
            shown.write_str(value)?;
            shown.finish()
        };
        label("", "reporter", labels.reporter.as_str())?;
        for (name, value) in labels.source.values() {
            label("source_", name, labels.show(value))?;
        }
        label("", "destination_service", labels.show(&labels.service))?;
        label("", "destination_service_namespace", labels.show(&labels.service_namespace))?;
        label("", "destination_service_name", labels.show(&labels.service_name))?;
        for (name, value) in labels.destination.values() {
            label("destination_", name, labels.show(value))?;
        }
        label("", "request_protocol", "tcp")?;
        label("", "response_flags", self.1.as_str())?;
        label("", "connection_security_policy", if labels.mutual_tls { "mutual_tls" } else { "unknown" })?;
        if let Some(places) = &labels.locality {
            for (name, value) in ["source_region", "source_zone", "destination_region", "destination_zone"].into_iter().zip(places) {
                label("", name, labels.show(value))?;
            }
        }
        Ok(())
    }
}
