//! The metrics of DNS (reference, dataplane §9.5).

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::rr::RecordType;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::Transport;
use crate::model::{Text, Workload};

/// Label sets that are kept apart; what comes later is counted as `overflow`. Pods choose the types that they ask for, and come and go.
const MOST_LABEL_SETS: usize = 1000;
/// Bounds of the histogram, seconds.
const BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Labels {
    request_query_type: String,
    request_protocol: &'static str,
    source_canonical_service: String,
    source_canonical_revision: String,
}

/// The four families.
#[derive(Debug)]
pub(super) struct DnsMetrics {
    known: Mutex<HashSet<Labels>>,
    requests: Family<Labels, Counter>,
    upstream_requests: Family<Labels, Counter>,
    upstream_failures: Family<Labels, Counter>,
    upstream_duration: Family<Labels, Histogram, fn() -> Histogram>,
}

impl DnsMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            known: Mutex::default(),
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            upstream_duration: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
        };
        registry.register("istio_dns_requests", "Total number of DNS requests (unstable)", metrics.requests.clone());
        registry.register("istio_dns_upstream_requests", "Total number of DNS requests passed on (unstable)", metrics.upstream_requests.clone());
        registry.register(
            "istio_dns_upstream_failures",
            "Total number of DNS requests passed on that got no answer (unstable)",
            metrics.upstream_failures.clone(),
        );
        let help = "Time until a DNS request that was passed on got an answer, or was given up (unstable)";
        registry.register_with_unit("istio_dns_upstream_request_duration", help, Unit::Seconds, metrics.upstream_duration.clone());
        metrics
    }

    /// The labels of a question.
    pub(super) fn labels(&self, kind: RecordType, transport: Transport, client: Option<&Workload>) -> Labels {
        let known = |text: Option<&Text>| text.filter(|text| !text.is_empty()).map_or_else(|| "unknown".to_owned(), |text| text.to_string());
        let profile = client.map(|workload| &workload.profile);
        let request_query_type = match kind {
            RecordType::Unknown(_) => "unknown".to_owned(),
            kind => kind.to_string().to_ascii_lowercase(),
        };
        let labels = Labels {
            request_query_type,
            request_protocol: transport.as_str(),
            source_canonical_service: known(profile.map(|profile| &profile.canonical_name)),
            source_canonical_revision: known(profile.map(|profile| &profile.canonical_revision)),
        };
        let mut sets = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if sets.contains(&labels) {
            return labels;
        }
        if sets.len() >= MOST_LABEL_SETS {
            let overflow = || "overflow".to_owned();
            return Labels { request_query_type: overflow(), source_canonical_service: overflow(), source_canonical_revision: overflow(), ..labels };
        }
        sets.insert(labels.clone());
        labels
    }

    pub(super) fn asked(&self, labels: &Labels) {
        self.requests.get_or_create(labels).inc();
    }

    pub(super) fn passed_on(&self, labels: &Labels) {
        self.upstream_requests.get_or_create(labels).inc();
    }

    pub(super) fn upstream_done(&self, labels: &Labels, answered: bool, took: Duration) {
        if !answered {
            self.upstream_failures.get_or_create(labels).inc();
        }
        self.upstream_duration.get_or_create(labels).observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn client(profile: crate::model::Profile) -> Workload {
        Workload {
            uid: "w".into(),
            name: "w".into(),
            addresses: Default::default(),
            node: "n".into(),
            hostname: "".into(),
            status: crate::model::HealthStatus::Healthy,
            capacity: 1,
            profile: std::sync::Arc::new(profile),
        }
    }

    #[test]
    fn the_families_have_the_names_labels_and_bounds_of_the_reference() {
        let mut registry = Registry::default();
        let metrics = DnsMetrics::register(&mut registry);
        let profile = crate::model::Profile { canonical_name: "web".into(), canonical_revision: "v1".into(), ..crate::model::Profile::default() };
        let labels = metrics.labels(RecordType::AAAA, Transport::Udp, Some(&client(profile)));
        metrics.asked(&labels);
        metrics.passed_on(&labels);
        metrics.upstream_done(&labels, false, Duration::from_millis(40));
        metrics.upstream_done(&labels, true, Duration::from_micros(700));
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
        let set = r#"request_query_type="aaaa",request_protocol="udp",source_canonical_service="web",source_canonical_revision="v1""#;
        for family in ["requests", "upstream_requests", "upstream_failures"] {
            assert!(page.contains(&format!("\nistio_dns_{family}_total{{{set}}} 1\n")), "{family}\n{page}");
        }
        for (bound, count) in [("0.0005", 0), ("0.001", 1), ("0.01", 1), ("0.1", 2), ("1.0", 2), ("5.0", 2), ("+Inf", 2)] {
            let line = format!("\nistio_dns_upstream_request_duration_seconds_bucket{{le=\"{bound}\",{set}}} {count}\n");
            assert!(page.contains(&line), "{line} is not in\n{page}");
        }
        assert_eq!(page.matches("(unstable)").count(), 4);
    }

    #[test]
    fn invented_types_and_many_label_sets_take_no_more_series() {
        let metrics = DnsMetrics::register(&mut Registry::default());
        for kind in 1000..2000 {
            assert_eq!(metrics.labels(RecordType::Unknown(kind), Transport::Udp, None).request_query_type, "unknown");
        }
        let workload = |number: usize| {
            client(crate::model::Profile { canonical_name: format!("app-{number}").as_str().into(), ..crate::model::Profile::default() })
        };
        let services = (0..2 * MOST_LABEL_SETS).map(|number| metrics.labels(RecordType::A, Transport::Tcp, Some(&workload(number))));
        let distinct: HashSet<Labels> = services.collect();
        assert_eq!(distinct.len(), MOST_LABEL_SETS, "one of them is the overflow, and one is of unknown type");
        assert!(distinct.iter().any(|labels| labels.source_canonical_service == "overflow" && labels.request_protocol == "tcp"));
    }
}
