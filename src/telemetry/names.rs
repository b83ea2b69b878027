//! On-demand DNS: for which workloads which host names of the mesh were needed (reference, dataplane §10.4).

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::labels::NameLabels;
use crate::model::{Text, Workload};

/// Label sets that are kept apart; what comes later is counted as `overflow`. The mesh names both, but pods come and go.
const MOST_LABEL_SETS: usize = 1000;

/// The counter and the label sets that it has.
pub(super) struct NameUses {
    known: Mutex<HashSet<NameLabels>>,
    family: Family<NameLabels, Counter>,
}

impl NameUses {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let family = Family::<NameLabels, Counter>::default();
        registry.register("istio_on_demand_dns", "Connections that needed the address of a host name of the mesh (unstable)", family.clone());
        Self { known: Mutex::default(), family }
    }

    pub(super) fn count(&self, source: &Workload, hostname: &Text) {
        let labels = NameLabels::of(source, hostname);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = known.contains(&labels) || known.len() < MOST_LABEL_SETS && known.insert(labels.clone());
        drop(known);
        self.family.get_or_create(&if fits { labels } else { NameLabels::overflow() }).inc();
    }
}
