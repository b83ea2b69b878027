//! Policy on connections, new and live. For every pod the compiled policy of its workload is derived from the snapshot, once per change; every
//! connection selects on the result, so that a change of a policy, of the workload or of what names it reaches live connections at once
//! (the reference re-checks only on policy changes, with the workload as it was when the connection began). A new connection is never decided
//! about by an older world than the one that is published: it derives for itself if the pod's task has not come to it yet.

use std::future::{Future, pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep, timeout_at};

use super::connections::ConnectionTable;
use crate::discovery::{LocalName, Mesh, World};
use crate::model::Workload;
use crate::policy::{CompiledPolicy, Denial, DenialReason, Facts, Permitted};

/// How long a policy that the workload names but that has not arrived is waited for: by a new connection before it is refused, by a live one,
/// which a known policy permitted, before it is cut. Policies and workloads come in separate messages, in either order.
const UNKNOWN_POLICY_WAIT: Duration = Duration::from_secs(1);

/// The policy of one destination workload as it changes.
#[derive(Clone)]
pub(super) struct Guard(Arc<Source>);

struct Source {
    mesh: Mesh,
    name: LocalName,
    state: watch::Sender<State>,
    /// Whoever has to look again when it changes.
    connections: Arc<ConnectionTable>,
}

/// What one world says about the workload.
#[derive(Default)]
struct State {
    /// [`World::local_epoch`].
    epoch: u64,
    /// `None` until the workload is known for the first time.
    applied: Option<Applied>,
}

#[derive(Clone)]
struct Applied {
    /// The workload as it was last known.
    workload: Arc<Workload>,
    /// Whether it still is.
    present: bool,
    policy: CompiledPolicy,
}

/// Keeps the derivation going; dropping it ends the task.
pub(super) struct Derivation(tokio::task::JoinHandle<()>);

impl Drop for Derivation {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Applied {
    /// A workload that vanished keeps its names, so that policies still reach the connections that it still has.
    fn derive(world: &World, name: &LocalName, last: Option<Arc<Workload>>) -> Option<Self> {
        let found = world.snapshot.local_workload(&name.name, &name.namespace, &name.service_account);
        let present = found.is_some();
        let workload = found.or(last)?;
        let policy = world.policies.compile(&workload.profile.namespace, &workload.profile.authorization_policies);
        Some(Self { workload, present, policy })
    }

    fn differs(&self, other: Option<&Self>) -> bool {
        other.is_none_or(|other| self.present != other.present || self.policy != other.policy)
    }
}

impl Source {
    /// Brings the state up to the current world.
    fn catch_up(&self) {
        let world = self.mesh.current();
        let last = {
            let state = self.state.borrow();
            if state.epoch >= world.local_epoch {
                return;
            }
            state.applied.as_ref().map(|applied| applied.workload.clone())
        };
        let next = Applied::derive(&world, &self.name, last);
        let changed = self.state.send_if_modified(|state| {
            // Somebody else may have been here with a later world.
            if state.epoch >= world.local_epoch {
                return false;
            }
            state.epoch = world.local_epoch;
            let changed = next.as_ref().is_some_and(|next| next.differs(state.applied.as_ref()));
            state.applied = next;
            changed
        });
        if changed {
            self.connections.wake_all();
        }
    }
}

impl Guard {
    /// Starts to derive the policy of the pod called `name`, which binds `connections`.
    pub(super) fn derive(mesh: &Mesh, name: LocalName, connections: Arc<ConnectionTable>) -> (Self, Derivation) {
        // Before the first look, so that no world falls between.
        let mut worlds = mesh.subscribe_local();
        let guard = Self(Arc::new(Source { mesh: mesh.clone(), name, state: watch::Sender::new(State::default()), connections }));
        guard.0.catch_up();
        let source = guard.0.clone();
        let task = tokio::spawn(async move {
            while worlds.changed().await.is_ok() {
                source.catch_up();
            }
        });
        (guard, Derivation(task))
    }

    /// Decides about a new connection; `None` when the pod's workload is not known. The watcher in the result was taken before the decision,
    /// so no change can fall between.
    pub(super) async fn permit(&self, facts: Facts) -> Option<Result<(Permitted, LiveGuard), Denial>> {
        let deadline = Instant::now() + UNKNOWN_POLICY_WAIT;
        let mut watcher = self.0.state.subscribe();
        loop {
            self.0.catch_up();
            let applied = watcher.borrow_and_update().applied.clone().filter(|applied| applied.present);
            let denial = match applied.map(|applied| applied.policy.permit(&facts)) {
                Some(Ok(permitted)) => return Some(Ok((permitted, LiveGuard { watcher, doubt: None }))),
                Some(Err(denial)) if !is_unknown(&denial) => return Some(Err(denial)),
                undecided => undecided.and_then(Result::err),
            };
            if !matches!(timeout_at(deadline, watcher.changed()).await, Ok(Ok(()))) {
                return denial.map(Err);
            }
        }
    }
}

/// Watches over one live connection, whose task the pod's [`ConnectionTable`] wakes when policy has changed.
pub(super) struct LiveGuard {
    watcher: watch::Receiver<State>,
    /// A policy that is waited for, and until when.
    doubt: Option<Box<Doubt>>,
}

struct Doubt {
    over: Pin<Box<Sleep>>,
    denial: Denial,
}

impl LiveGuard {
    /// Resolves when the connection is no longer permitted: for one that is not in the table's care yet. May be dropped and asked again.
    pub(super) async fn denied(&mut self, facts: &Facts) -> Denial {
        loop {
            let mut change = self.watcher.clone();
            tokio::select! {
                biased;
                denial = poll_fn(|context| self.poll_denied(context, || facts.clone())) => return denial,
                changed = change.changed() => if changed.is_err() {
                    // The pod's proxy is going away, and its drain ends the connection.
                    pending::<()>().await;
                }
            }
        }
    }

    /// Ready when the connection is no longer permitted. Pending, the task of `context` is woken by the pod's [`ConnectionTable`], and at the end
    /// of a doubt. `facts` are those that the connection was permitted for: asked for only after a change, so that no idle connection keeps them twice.
    pub(super) fn poll_denied(&mut self, context: &mut Context<'_>, facts: impl FnOnce() -> Facts) -> Poll<Denial> {
        // An error means that the pod's proxy is going away, and its drain ends the connection.
        if self.watcher.has_changed().unwrap_or(false) {
            let applied = self.watcher.borrow_and_update().applied.clone();
            if let Some(applied) = applied {
                match applied.policy.recheck(&facts()) {
                    Ok(()) => self.doubt = None,
                    Err(denial) if !is_unknown(&denial) => return Poll::Ready(denial),
                    // A policy that went together with its workload is no reason to cut what it permitted.
                    Err(_) if !applied.present => self.doubt = None,
                    Err(denial) => {
                        let over = self.doubt.take().map_or_else(|| Box::pin(sleep(UNKNOWN_POLICY_WAIT)), |doubt| doubt.over);
                        self.doubt = Some(Box::new(Doubt { over, denial }));
                    }
                }
            }
        }
        match &mut self.doubt {
            Some(doubt) => doubt.over.as_mut().poll(context).map(|()| doubt.denial.clone()),
            None => Poll::Pending,
        }
    }
}

fn is_unknown(denial: &Denial) -> bool {
    matches!(denial.reason(), DenialReason::Unknown { .. })
}

#[cfg(test)]
mod tests;
