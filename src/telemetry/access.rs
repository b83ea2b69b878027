//! The access log (reference, dataplane §10.5): target `access`, the fields and their order.
//!
//! Names and addresses come from the control plane and from peers; the log's formatter escapes them and bounds the line
//! ([`super::logging`]). We add `policy`, the deciding policy, after the reference's last field.

use std::time::Duration;

use super::facts::{ConnectionEnd, ConnectionFacts, PeerFacts, Reporter, ResponseFlag};

/// The names of one end that the log shows.
struct Shown<'a> {
    workload: Option<&'a str>,
    namespace: Option<&'a str>,
    identity: Option<&'a str>,
    cluster: Option<&'a str>,
}

fn known(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

impl<'a> Shown<'a> {
    /// The pod's name, else its canonical service; identities only of mutual TLS.
    fn of(peer: &'a PeerFacts, mutual_tls: bool) -> Self {
        let identity = peer.identity.as_ref().filter(|_| mutual_tls).map(|identity| identity.uri().as_str());
        if let Some(workload) = &peer.workload {
            let profile = &workload.profile;
            let workload = known(&workload.name).or_else(|| known(&profile.canonical_name));
            return Self { workload, namespace: known(&profile.namespace), identity, cluster: known(&profile.cluster_id) };
        }
        let Some(baggage) = &peer.baggage else {
            return Self { workload: None, namespace: None, identity, cluster: None };
        };
        Self {
            workload: baggage.service_name.as_deref().or(baggage.workload_name.as_deref()),
            namespace: baggage.namespace.as_deref(),
            identity,
            cluster: baggage.cluster_id.as_deref(),
        }
    }
}

/// Emits one event with the fields that every line of a known connection has, followed by the given ones.
macro_rules! access_line {
    ($level:ident, $facts:ident, $message:literal $(, $($more:tt)*)?) => {
        if tracing::enabled!(target: "access", tracing::Level::$level) {
            let source = Shown::of(&$facts.source, $facts.mutual_tls);
            let destination = Shown::of(&$facts.destination, $facts.mutual_tls);
            tracing::event!(
                target: "access",
                tracing::Level::$level,
                src.addr = %$facts.source.address,
                src.workload = source.workload,
                src.namespace = source.namespace,
                src.identity = source.identity,
                src.cluster = source.cluster,
                dst.addr = %$facts.destination.address,
                dst.hbone_addr = $facts.hbone_target.as_ref().map(tracing::field::display),
                dst.service = $facts.service.as_ref().and_then(|service| known(&service.hostname)),
                dst.workload = destination.workload,
                dst.namespace = destination.namespace,
                dst.identity = destination.identity,
                dst.cluster = destination.cluster,
                direction = $facts.reporter.direction(),
                $($($more)*,)?
                $message
            );
        }
    };
}

pub(super) fn opened(facts: &ConnectionFacts) {
    access_line!(DEBUG, facts, "connection opened");
}

/// `received` and `sent` as the metrics count them (client to server, server to client); the log turns them so that "sent" is
/// what this proxy's own pod sent.
pub(super) fn complete(facts: &ConnectionFacts, (received, sent): (u64, u64), duration: Duration, end: &ConnectionEnd) {
    let (bytes_sent, bytes_recv) = match facts.reporter {
        Reporter::Source => (received, sent),
        Reporter::Destination => (sent, received),
    };
    let duration = format!("{}ms", duration.as_millis());
    let policy = end.policy.as_deref();
    let error = match (&end.error, end.flag) {
        (Some(error), _) => Some(error.as_str()),
        (None, ResponseFlag::Ok) => None,
        (None, flag) => Some(flag.as_str()),
    };
    match error {
        None => access_line!(INFO, facts, "connection complete", bytes_sent, bytes_recv, duration, policy),
        Some(error) => access_line!(ERROR, facts, "connection complete", bytes_sent, bytes_recv, duration, error, policy),
    }
}
