//! What others may see of the pods: readiness, counts, and the section of the config dump.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::ledger::{Ledger, Start};
use super::{Connections, Pod, RunningPod};

/// Counts for `workload_manager_*` (reference, dataplane §10.4), set by the client, read by whoever exports them.
#[derive(Debug, Default)]
pub struct PodStats {
    /// `workload_manager_active_proxy_count`, a gauge.
    pub active: AtomicU64,
    /// `workload_manager_pending_proxy_count`, a gauge.
    pub pending: AtomicU64,
    /// `workload_manager_proxies_started_total`.
    pub started: AtomicU64,
    /// `workload_manager_proxies_stopped_total`.
    pub stopped: AtomicU64,
}

enum Phase {
    /// Waits to be tried again, and why.
    Pending(String),
    Up(Connections),
}

struct Seen {
    pod: Pod,
    phase: Phase,
}

struct Shared {
    stats: PodStats,
    pods: Mutex<BTreeMap<String, Seen>>,
    ready: watch::Sender<bool>,
}

/// A window on the pods; clones look at the same ones.
#[derive(Clone)]
pub struct PodsView {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for PodsView {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("PodsView").field("stats", &self.shared.stats).finish_non_exhaustive()
    }
}

impl PodsView {
    pub(super) fn new() -> Self {
        Self { shared: Arc::new(Shared { stats: PodStats::default(), pods: Mutex::default(), ready: watch::Sender::new(false) }) }
    }

    /// True while a complete snapshot is served with nothing pending; false again as soon as the agent is gone.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.shared.ready.subscribe()
    }

    /// The live counts.
    #[must_use]
    pub fn stats(&self) -> &PodStats {
        &self.shared.stats
    }

    /// `workloadState` of the config dump (reference, dataplane §8.4, §10.2); a pending pod also says why, in `error`.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        let pods = self.shared.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = |seen: &Seen| {
            let Pod { name, namespace, service_account, .. } = &seen.pod;
            let info = serde_json::json!({ "name": name, "namespace": namespace, "serviceAccount": service_account });
            match &seen.phase {
                Phase::Pending(error) => serde_json::json!({ "state": "Pending", "error": error, "info": info }),
                Phase::Up(connections) => serde_json::json!({ "state": "Up", "connections": connections(), "info": info }),
            }
        };
        pods.iter().map(|(uid, seen)| (uid.clone(), entry(seen))).collect()
    }

    /// Shows the present state of the ledger.
    pub(super) fn show<S: Start<Running = RunningPod>>(&self, ledger: &Ledger<S>) {
        let up = ledger
            .running()
            .iter()
            .map(|(uid, served)| (uid.clone(), Seen { pod: served.pod.clone(), phase: Phase::Up(Arc::clone(&served.running.connections)) }));
        let pending = ledger
            .waiting()
            .iter()
            .map(|(uid, waiting)| (uid.clone(), Seen { pod: waiting.pod.clone(), phase: Phase::Pending(waiting.reason.clone()) }));
        let seen = up.chain(pending).collect();
        *self.shared.pods.lock().unwrap_or_else(PoisonError::into_inner) = seen;
        let (started, stopped) = ledger.totals();
        let stats = &self.shared.stats;
        let counts = [
            (&stats.active, ledger.running().len() as u64),
            (&stats.pending, ledger.waiting().len() as u64),
            (&stats.started, started),
            (&stats.stopped, stopped),
        ];
        for (count, now) in counts {
            count.store(now, Ordering::Relaxed);
        }
        self.shared.ready.send_if_modified(|ready| std::mem::replace(ready, ledger.is_ready()) != ledger.is_ready());
    }
}
