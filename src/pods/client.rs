//! The conversation with the node agent.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::ledger::{Ledger, Start};
use super::request::{Refusal, Request};
use super::{Config, Pod, PodRunner, PodsError, PodsView, RunningPod, open_listeners};
use crate::lifecycle::Backoff;
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::sys::netns::NetNs;
use crate::sys::seqpacket::{Packet, SeqPacket};
use crate::wire::zds::{MAX_PACKET, Version, WorkloadResponse, ZdsHello};

/// First and longest pause before the agent is called again (reference, dataplane §8.3).
const RECONNECT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(15));

/// Serves the pods that the node agent names.
pub struct Client {
    config: Config,
    ledger: Ledger<InPod>,
    view: PodsView,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Client").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Opens a pod's listeners and hands them to the runner.
struct InPod {
    config: Config,
    runner: Arc<dyn PodRunner>,
}

impl Start for InPod {
    type Running = RunningPod;

    fn start(&mut self, pod: &Pod, netns: &NetNs) -> io::Result<RunningPod> {
        let listeners = open_listeners(netns, &self.config)?;
        info!(uid = pod.uid, name = pod.name, namespace = pod.namespace, "serving pod");
        Ok(self.runner.start(pod.clone(), listeners))
    }
}

/// How a connection to the agent ended.
enum End {
    Disconnected(String),
    Fatal(String),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Disconnected(error.to_string())
    }
}

impl Client {
    /// A client that has not called yet, and the window on its pods.
    #[must_use]
    pub fn new(config: Config, runner: Arc<dyn PodRunner>) -> (Self, PodsView) {
        let view = PodsView::new();
        let starter = InPod { config: config.clone(), runner };
        (Self { config, ledger: Ledger::new(starter), view: view.clone() }, view)
    }

    /// Talks to the agent until `drain` says stop, then drains every pod and returns. Pods are started on the calling runtime.
    ///
    /// Without an agent nothing is lost: pods go on, and the agent is called again after 10 ms, doubled up to 15 s. The pause
    /// starts anew only after a complete snapshot, so that an agent which drops us each time is not called in a tight loop.
    ///
    /// # Errors
    /// [`PodsError::Protocol`]: the process must exit with code 1. The pods have been stopped.
    pub async fn run(mut self, mut drain: DrainWatcher) -> Result<(), PodsError> {
        let mode = tokio::select! {
            mode = drain.signaled() => mode,
            reason = self.talk() => {
                error!(socket = %self.config.socket.display(), reason, "the node agent broke the protocol");
                return Err(PodsError::Protocol { socket: self.config.socket.clone(), reason });
            }
        };
        self.ledger.disconnected();
        self.drain(mode).await;
        Ok(())
    }

    async fn drain(&mut self, mode: DrainMode) {
        let deadline = self.config.drain_deadline;
        let drains: Vec<_> = self.ledger.take_running().into_iter().map(|pod| tokio::spawn(pod.trigger.start(mode, deadline))).collect();
        self.view.show(&self.ledger);
        for drained in drains {
            if !drained.await.unwrap_or(true) {
                warn!(?deadline, "connections of a pod were cut at the end of the drain");
            }
        }
    }

    /// Ends only with the reason for which the process must end.
    async fn talk(&mut self) -> String {
        let mut backoff = Backoff::new(RECONNECT.0, RECONNECT.1);
        loop {
            let end = self.converse(&mut backoff).await;
            self.ledger.disconnected();
            self.view.show(&self.ledger);
            match end {
                End::Fatal(reason) => return reason,
                End::Disconnected(reason) => {
                    let pause = backoff.next_delay();
                    warn!(socket = %self.config.socket.display(), ?pause, "no connection to the node agent, pods go on: {reason}");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn converse(&mut self, backoff: &mut Backoff) -> End {
        match self.exchange(backoff).await {
            Ok(()) => End::Disconnected("the agent closed the connection".into()),
            Err(end) => end,
        }
    }

    /// One connection, from Hello to its end.
    async fn exchange(&mut self, backoff: &mut Backoff) -> Result<(), End> {
        let agent = SeqPacket::connect(&self.config.socket)?;
        agent.send(&ZdsHello { version: Version::V1 as i32 }.encode_to_vec(), &[]).await?;
        debug!("connected to the node agent");
        let mut buffer = [0; MAX_PACKET];
        let mut retry_at = None;
        loop {
            let packet = tokio::select! {
                packet = agent.receive(&mut buffer) => packet?,
                () = sleep_until(retry_at) => {
                    if self.ledger.retry() {
                        self.view.show(&self.ledger);
                    }
                    retry_at = self.next_retry(None);
                    continue;
                }
            };
            let Some(Packet { len, truncated, fds }) = packet else { return Ok(()) };
            let bytes = buffer.get(..len).unwrap_or_default();
            let outcome = Request::decode(bytes, truncated, fds).and_then(|request| self.ledger.apply(request));
            if self.ledger.has_snapshot() {
                backoff.reset();
            }
            self.view.show(&self.ledger);
            retry_at = self.next_retry(retry_at);
            let said = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
            let told = agent.send(&WorkloadResponse::ack(&said).encode_to_vec(), &[]).await;
            match outcome {
                Ok(()) => {}
                Err(Refusal::Pending(reason)) => warn!("{reason}; trying again every {:?}", self.config.retry),
                Err(Refusal::Malformed(reason)) => return Err(End::Disconnected(reason)),
                Err(Refusal::Fatal(reason)) => return Err(End::Fatal(reason)),
            }
            told?;
        }
    }

    /// The time already set stays while something waits.
    fn next_retry(&self, set: Option<Instant>) -> Option<Instant> {
        if self.ledger.waiting().is_empty() { None } else { set.or_else(|| Some(Instant::now() + self.config.retry)) }
    }
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
