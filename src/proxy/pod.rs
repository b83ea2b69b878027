//! The proxy of one pod: three listeners, a pool of tunnels, and the policy of the pod's workload.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::accept::accept_loop;
use super::connections::ConnectionTable;
use super::guard::{Derivation, Guard};
use super::session::Error;
use super::sockets::PodSockets;
use super::{Node, inbound, outbound, plaintext};
use crate::discovery::LocalName;
use crate::hbone::Pool;
use crate::identity::Credential;
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::model::{SpiffeId, Workload};
use crate::telemetry::{EarlyRefusal, Reporter};

/// The shortest time between two looks at what is half-closed.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// One pod's proxy. Lives as long as one of its connections does.
pub struct PodProxy {
    pub(super) node: Arc<Node>,
    pub(super) name: LocalName,
    pub(super) sockets: PodSockets,
    pub(super) pool: Arc<Pool>,
    pub(super) guard: Guard,
    pub(super) connections: Arc<ConnectionTable>,
    _derivation: Derivation,
    /// Ends when dropped.
    _upkeep: JoinSet<()>,
    /// The process does not end before the last connection has been recorded.
    _process: DrainWatcher,
}

impl PodProxy {
    /// A proxy for the pod called `name`, whose connections go out of `sockets`. It holds `process`, the watcher of the process's own drain, until
    /// its last connection has ended; its listeners are drained by watchers of their own.
    #[must_use]
    pub fn new(node: Arc<Node>, name: LocalName, sockets: PodSockets, process: DrainWatcher) -> Arc<Self> {
        let connections = Arc::<ConnectionTable>::default();
        let (guard, derivation) = Guard::derive(&node.mesh, name.clone(), connections.clone());
        let pool = Arc::new(Pool::new(node.hbone.clone(), Arc::new(sockets.clone())));
        let mut upkeep = JoinSet::new();
        node.departures.release_from(&pool);
        upkeep.spawn(reap_half_closed(connections.clone(), node.config.half_closed));
        Arc::new(Self { node, name, sockets, pool, guard, connections, _derivation: derivation, _upkeep: upkeep, _process: process })
    }

    /// The live connections, for `config_dump`.
    #[must_use]
    pub fn connections(&self) -> &Arc<ConnectionTable> {
        &self.connections
    }

    /// The pod's workload as the mesh knows it now; waits for it as configured (reference, dataplane §3.3 step 1).
    pub(super) async fn local_workload(&self) -> Result<Arc<Workload>, Error> {
        let found = self.node.mesh.wait_for_local(&self.name, self.node.config.workload_timeout).await;
        found.ok_or_else(|| Error::LocalWorkloadUnknown(self.name.to_string()))
    }

    /// The pod's certificate; a connection waits for it as long as for the workload (reference, dataplane §12.1, 22).
    pub(super) async fn credential(&self, identity: &SpiffeId) -> Result<Arc<Credential>, Error> {
        Ok(self.node.credentials.fetch_within(self.node.config.workload_timeout, identity).await?)
    }

    /// Records a connection that was refused before anything was known about it.
    pub(super) fn refuse(&self, reporter: Reporter, source: SocketAddr, destination: Option<SocketAddr>, error: &Error) {
        let unknown = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        self.node.telemetry.refused_early(&EarlyRefusal {
            direction: reporter,
            source,
            destination: destination.unwrap_or(unknown),
            reason: error.refusal_reason(),
            error: error.to_string(),
        });
    }

    /// Serves 15001 until a drain begins.
    pub fn serve_outbound(self: &Arc<Self>, listener: TcpListener, drain: DrainWatcher) {
        let pod = self.clone();
        self.serve(listener, drain, move |socket, client, drain| {
            tokio::spawn(outbound::serve(pod.clone(), socket, client, drain));
        });
    }

    /// Serves 15006 until a drain begins.
    pub fn serve_plaintext(self: &Arc<Self>, listener: TcpListener, drain: DrainWatcher) {
        let pod = self.clone();
        self.serve(listener, drain, move |socket, client, drain| {
            tokio::spawn(plaintext::serve(pod.clone(), socket, client, drain));
        });
    }

    /// Serves 15008 until a drain begins.
    pub fn serve_hbone(self: &Arc<Self>, listener: TcpListener, drain: DrainWatcher) {
        let pod = self.clone();
        self.serve(listener, drain, move |socket, client, drain| {
            tokio::spawn(inbound::serve(pod.clone(), socket, client, drain));
        });
    }

    /// Accepts on `listener` until a drain begins.
    pub(super) fn serve(
        self: &Arc<Self>,
        listener: TcpListener,
        drain: DrainWatcher,
        on_connection: impl Fn(tokio::net::TcpStream, SocketAddr, DrainWatcher) + Send + 'static,
    ) {
        let (mut observer, connections) = (drain.observer(), self.connections.clone());
        tokio::spawn(async move {
            observer.forced().await;
            connections.wake_all();
        });
        let pod = self.clone();
        tokio::spawn(async move {
            let handed = drain.clone();
            accept_loop(listener, drain.clone(), move |socket, client| on_connection(socket, client, handed.clone())).await;
            if drain.mode() == Some(DrainMode::Immediate) {
                // The pod is gone: nobody can be told, and its tunnels must not outlive it.
                pod.pool.abort();
            }
        });
    }
}

/// Ends connections whose application neither closes nor says anything after the other side has finished: nothing else would (craft-and-trust F8).
async fn reap_half_closed(connections: Arc<ConnectionTable>, limit: Duration) {
    // What is still at a look may have been so for the whole time since the one before: the last fifth is for that.
    let pause = (limit / 5).max(SHORTEST_PAUSE);
    loop {
        sleep(pause).await;
        connections.reap(limit.saturating_sub(pause));
    }
}
