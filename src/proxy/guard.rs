//! Policy on connections, new and live. One task per pod derives the compiled policy of its workload from the snapshot; every connection
//! selects on the result, so that a change of a policy, of the workload or of what names it reaches live connections at once
//! (the reference re-checks only on policy changes, with the workload as it was when the connection began).

use std::time::Duration;

use tokio::sync::watch;

use crate::discovery::{LocalName, Mesh};
use crate::policy::{CompiledPolicy, Denial, DenialReason, Facts, Permitted};

/// How long a new connection waits for a policy that its workload names but that has not arrived.
const UNKNOWN_POLICY_WAIT: Duration = Duration::from_secs(1);

/// The policy of one destination workload as it changes; `None` until the workload is known.
#[derive(Clone)]
pub(super) struct Guard(watch::Receiver<Option<CompiledPolicy>>);

/// Keeps the derivation going; dropping it ends the task.
pub(super) struct Derivation(tokio::task::JoinHandle<()>);

impl Drop for Derivation {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Guard {
    /// Starts to derive the policy of the pod called `name`.
    pub(super) fn derive(mesh: &Mesh, name: LocalName) -> (Self, Derivation) {
        let mut worlds = mesh.subscribe();
        let first = compile(&worlds.borrow_and_update(), &name);
        let (publish, guard) = watch::channel(first);
        let task = tokio::spawn(async move {
            while worlds.changed().await.is_ok() {
                let next = compile(&worlds.borrow_and_update(), &name);
                publish.send_if_modified(|current| {
                    // A workload that vanished keeps its last policy for the connections that it still has.
                    let changed = next.is_some() && *current != next;
                    if changed {
                        *current = next;
                    }
                    changed
                });
            }
        });
        (Self(guard), Derivation(task))
    }

    /// Decides about a new connection; `None` when the pod's workload was never known. The watcher in the result was taken before the decision,
    /// so no change can fall between.
    pub(super) async fn permit(&self, facts: Facts) -> Option<Result<(Permitted, LiveGuard), Denial>> {
        let deadline = tokio::time::Instant::now() + UNKNOWN_POLICY_WAIT;
        let mut watcher = self.0.clone();
        loop {
            let decision = watcher.borrow_and_update().as_ref().map(|policy| policy.permit(&facts));
            let denial = match decision {
                Some(Ok(permitted)) => return Some(Ok((permitted, LiveGuard { watcher, facts }))),
                Some(Err(denial)) if !matches!(denial.reason(), DenialReason::Unknown { .. }) => return Some(Err(denial)),
                undecided => undecided.and_then(Result::err),
            };
            if !matches!(tokio::time::timeout_at(deadline, watcher.changed()).await, Ok(Ok(()))) {
                return denial.map(Err);
            }
        }
    }
}

/// Watches over one live connection.
pub(super) struct LiveGuard {
    watcher: watch::Receiver<Option<CompiledPolicy>>,
    facts: Facts,
}

impl LiveGuard {
    /// Resolves when the connection is no longer permitted.
    pub(super) async fn denied(&mut self) -> Denial {
        loop {
            if self.watcher.changed().await.is_err() {
                // The pod's proxy is going away, and its drain ends the connection.
                std::future::pending::<()>().await;
            }
            let decision = self.watcher.borrow_and_update().as_ref().map(|policy| policy.recheck(&self.facts));
            if let Some(Err(denial)) = decision {
                return denial;
            }
        }
    }
}

fn compile(world: &crate::discovery::World, name: &LocalName) -> Option<CompiledPolicy> {
    let workload = world.snapshot.local_workload(&name.name, &name.namespace, &name.service_account)?;
    Some(world.policies.compile(&workload.profile.namespace, &workload.profile.authorization_policies))
}
