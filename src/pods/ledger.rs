//! The rules of ZDS without sockets (reference, dataplane §8.3): which pods run, which wait to be tried again, and which ones the
//! snapshot has named so far.

use std::collections::{BTreeMap, HashSet};
use std::io;

use super::Pod;
use super::request::{Refusal, Request};
use crate::sys::netns::NetNs;

/// Starts pods. In production: open the listeners and call the runner.
pub(super) trait Start {
    /// What a running pod is; dropping it stops the pod at once.
    type Running;

    /// Starts the pod, or says why it cannot be served now.
    fn start(&mut self, pod: &Pod, netns: &NetNs) -> io::Result<Self::Running>;
}

/// A pod and its namespace, which stays open as long as this does.
#[derive(Debug)]
pub(super) struct Served<R> {
    pub(super) pod: Pod,
    netns: NetNs,
    pub(super) running: R,
}

/// A pod that could not be served yet.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) pod: Pod,
    netns: NetNs,
    /// Why not.
    pub(super) reason: String,
}

#[derive(Debug)]
enum Snapshot {
    /// Pods that Add and Keep have named on this connection.
    Collecting(HashSet<String>),
    Complete,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger<S: Start> {
    starter: S,
    running: BTreeMap<String, Served<S::Running>>,
    waiting: BTreeMap<String, Waiting>,
    snapshot: Snapshot,
    started: u64,
    stopped: u64,
}

impl<S: Start> Ledger<S> {
    pub(super) fn new(starter: S) -> Self {
        Self { starter, running: BTreeMap::new(), waiting: BTreeMap::new(), snapshot: Snapshot::Collecting(HashSet::new()), started: 0, stopped: 0 }
    }

    /// Does what the agent asks; the answer is what to acknowledge.
    pub(super) fn apply(&mut self, request: Request) -> Result<(), Refusal> {
        match request {
            Request::Add(pod, netns) => {
                if let Snapshot::Collecting(named) = &mut self.snapshot {
                    named.insert(pod.uid.clone());
                }
                self.add(pod, netns).map_err(Refusal::Pending)
            }
            Request::Keep(uid) => match &mut self.snapshot {
                Snapshot::Collecting(named) => {
                    named.insert(uid);
                    Ok(())
                }
                Snapshot::Complete => Err(Refusal::Fatal(format!("Keep of pod {uid} after the snapshot"))),
            },
            Request::Del(uid) => {
                self.waiting.remove(&uid);
                match &mut self.snapshot {
                    // What runs is stopped when the snapshot is complete and does not name it: until then an Add may still follow.
                    Snapshot::Collecting(named) => drop(named.remove(&uid)),
                    Snapshot::Complete => self.stop(&uid),
                }
                Ok(())
            }
            Request::SnapshotSent => match std::mem::replace(&mut self.snapshot, Snapshot::Complete) {
                Snapshot::Collecting(named) => {
                    let gone: Vec<String> = self.running.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
                    gone.iter().for_each(|uid| self.stop(uid));
                    Ok(())
                }
                Snapshot::Complete => Err(Refusal::Fatal("a second SnapshotSent on one connection".into())),
            },
        }
    }

    /// Tries every waiting pod again. True if that changed anything.
    pub(super) fn retry(&mut self) -> bool {
        let again = std::mem::take(&mut self.waiting);
        let before = again.len();
        for Waiting { pod, netns, .. } in again.into_values() {
            // A failure puts it back with the new reason.
            let _ = self.add(pod, netns);
        }
        self.waiting.len() != before
    }

    /// The agent is gone: what runs goes on, the rest is forgotten, because the next connection tells everything anew.
    pub(super) fn disconnected(&mut self) {
        self.snapshot = Snapshot::Collecting(HashSet::new());
        self.waiting.clear();
    }

    /// A complete snapshot, and every pod of it is served.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.snapshot, Snapshot::Complete) && self.waiting.is_empty()
    }

    pub(super) fn has_snapshot(&self) -> bool {
        matches!(self.snapshot, Snapshot::Complete)
    }

    pub(super) fn running(&self) -> &BTreeMap<String, Served<S::Running>> {
        &self.running
    }

    pub(super) fn waiting(&self) -> &BTreeMap<String, Waiting> {
        &self.waiting
    }

    /// Pods started and stopped since the beginning.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.started, self.stopped)
    }

    /// Hands out everything that runs, for a drain.
    pub(super) fn take_running(&mut self) -> Vec<S::Running> {
        let all = std::mem::take(&mut self.running);
        self.stopped += all.len() as u64;
        all.into_values().map(|served| served.running).collect()
    }

    fn add(&mut self, pod: Pod, netns: NetNs) -> Result<(), String> {
        self.waiting.remove(&pod.uid);
        match self.running.get(&pod.uid) {
            Some(served) if served.netns == netns => return Ok(()),
            // The pod came back in another namespace: what serves the old one goes first.
            Some(_) => self.stop(&pod.uid),
            None => {}
        }
        match self.starter.start(&pod, &netns) {
            Ok(running) => {
                self.started += 1;
                self.running.insert(pod.uid.clone(), Served { pod, netns, running });
                Ok(())
            }
            Err(error) => {
                let reason = format!("cannot serve pod {}/{} ({}): {error}", pod.namespace, pod.name, pod.uid);
                self.waiting.insert(pod.uid.clone(), Waiting { pod, netns, reason: reason.clone() });
                Err(reason)
            }
        }
    }

    fn stop(&mut self, uid: &str) {
        if self.running.remove(uid).is_some() {
            self.stopped += 1;
        }
    }
}

#[cfg(test)]
mod tests;
