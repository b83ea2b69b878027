//! The agent's end of ZDS: tells every proxy of the node which pods to serve (reference, node-and-control A.8 and dataplane §8).
//!
//! Per connection: Hello from the proxy, then every known pod (Add with its namespace, or Keep while the agent does not have it),
//! then SnapshotSent; each packet is acknowledged before the next goes out, within 5 s. Afterwards an Add goes only to the newest
//! connection, because during an upgrade the older proxy is on its way out, and a Del to all of them. When the newest proxy goes
//! first, the one before it is told what it has missed.
//!
//! A proxy stops serving whatever a snapshot does not name. That is why the pods known at start are an argument of
//! [`ZdsServer::bind`]: an agent that restarts and listens before it has looked around would take every pod of its node out of the mesh.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::Pod;
use crate::lifecycle::AcceptBackoff;
use crate::sys::netns::NetNs;
use crate::sys::seqpacket::{SeqPacket, SeqPacketListener};
use crate::wire::zds::{Answer, DelWorkload, KeepWorkload, MAX_PACKET, Payload, SnapshotSent, WorkloadRequest, WorkloadResponse, ZdsHello};

/// How long a proxy may take for its Hello, and for each acknowledgement.
const DEADLINE: Duration = Duration::from_secs(5);
/// Time between two accepted connections: at most five a second, so that a proxy that fails again and again costs little.
const ACCEPT_PACE: Duration = Duration::from_millis(200);
/// Orders that may wait for one proxy. One that is further behind is hung up on; when it calls again it is told everything.
const QUEUE: usize = 100;

/// Why a proxy did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ZdsError {
    /// The socket cannot be made.
    #[error("cannot listen for proxies at {}: {source}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The proxy's own words. It tries again by itself.
    #[error("the proxy cannot serve the pod yet: {0}")]
    Refused(String),
    /// The proxy is gone, silent, or broke the protocol. The pod stays known and is told to the next connection.
    #[error("the connection to the proxy was lost before it acknowledged; the next one will be told")]
    Lost,
}

/// What became of an Add.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// A proxy serves the pod.
    Acknowledged,
    /// No proxy is connected; the next one will be told. Until then nobody serves the pod.
    Remembered,
}

/// Serves proxies until it is dropped; then it hangs up on them and removes its socket. Proxies go on serving their pods without it.
#[derive(Debug)]
pub struct ZdsServer {
    shared: Arc<Shared>,
    connected: watch::Receiver<usize>,
    accepting: AbortHandle,
    file: SocketFile,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    connected: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct State {
    /// By uid. `None` is a namespace that the agent does not have at present.
    pods: BTreeMap<String, (Pod, Option<NetNs>)>,
    /// In the order they connected; the newest is last.
    proxies: Vec<Proxy>,
    next_id: u64,
}

#[derive(Debug)]
struct Proxy {
    id: u64,
    orders: mpsc::Sender<Order>,
    /// Uids that were told to this connection.
    told: HashSet<String>,
}

/// One request on its way to one proxy.
#[derive(Debug)]
struct Order {
    payload: Payload,
    netns: Option<NetNs>,
    answer: Option<oneshot::Sender<Result<(), ZdsError>>>,
}

impl ZdsServer {
    /// Listens at `path` (a stale socket there is replaced) and serves proxies on the present tokio runtime. `known` is every pod
    /// that is part of the mesh already, with its namespace or with `None` where that has to be found yet.
    ///
    /// # Errors
    /// [`ZdsError::Listen`].
    pub fn bind(path: &Path, known: impl IntoIterator<Item = (Pod, Option<NetNs>)>) -> Result<Self, ZdsError> {
        let failed = |source| ZdsError::Listen { path: path.to_path_buf(), source };
        let listener = SeqPacketListener::bind(path).map_err(failed)?;
        let file = SocketFile::of(path).map_err(failed)?;
        let pods = known.into_iter().map(|(pod, netns)| (pod.uid.clone(), (pod, netns))).collect();
        let (sender, connected) = watch::channel(0);
        let shared = Arc::new(Shared { state: Mutex::new(State { pods, ..State::default() }), connected: sender });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared))).abort_handle();
        Ok(Self { shared, connected, accepting, file })
    }

    /// Makes a pod known (or known with another namespace), tells the newest proxy and waits for its answer. After
    /// [`Delivery::Acknowledged`] the listeners exist and the pod's rules may be installed.
    ///
    /// # Errors
    /// [`ZdsError::Refused`] and [`ZdsError::Lost`]; the pod stays known in both cases.
    pub async fn add(&self, pod: Pod, netns: NetNs) -> Result<Delivery, ZdsError> {
        let answer = {
            let mut state = self.shared.lock();
            state.pods.insert(pod.uid.clone(), (pod.clone(), Some(netns.clone())));
            let (sender, answer) = oneshot::channel();
            if !state.tell_newest(pod, netns, Some(sender)) {
                return Ok(Delivery::Remembered);
            }
            answer
        };
        answer.await.unwrap_or(Err(ZdsError::Lost)).map(|()| Delivery::Acknowledged)
    }

    /// Forgets a pod and tells every proxy to stop serving it; waits for their answers. A proxy that is lost meanwhile is no
    /// error: the next snapshot does not name the pod.
    ///
    /// # Errors
    /// [`ZdsError::Refused`] with the words of the first proxy that refused.
    pub async fn remove(&self, uid: &str) -> Result<(), ZdsError> {
        let answers = {
            let mut state = self.shared.lock();
            state.pods.remove(uid);
            state.tell_all_gone(uid)
        };
        let mut outcome = Ok(());
        for answer in answers {
            if let Ok(Err(refused @ ZdsError::Refused(_))) = answer.await {
                outcome = outcome.and(Err(refused));
            }
        }
        outcome
    }

    /// How many proxies have acknowledged their snapshot and are still connected. Two is normal during an upgrade.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<usize> {
        self.connected.clone()
    }
}

impl Drop for ZdsServer {
    fn drop(&mut self) {
        self.accepting.abort();
        self.file.remove();
    }
}

/// The socket's file, told apart from one that a successor may have put in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let file = std::fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_path_buf(), id: (file.dev(), file.ino()) })
    }

    fn remove(&self) {
        if Self::of(&self.path).is_ok_and(|found| found.id == self.id)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            warn!(path = %self.path.display(), "cannot remove the socket: {error}");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave these maps half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A proxy has said Hello: what to tell it at once, and where later orders come from. One step, so that no change falls between.
    fn join(&self) -> (u64, Vec<Order>, mpsc::Receiver<Order>) {
        let mut state = self.lock();
        let (orders, receiver) = mpsc::channel(QUEUE);
        let id = state.next_id;
        state.next_id += 1;
        let told = state.pods.keys().cloned().collect();
        state.proxies.push(Proxy { id, orders, told });
        let replay = state.pods.values().map(|(pod, netns)| {
            let payload = match netns {
                Some(_) => Payload::Add(pod.clone().into()),
                None => Payload::Keep(KeepWorkload { uid: pod.uid.clone() }),
            };
            Order { payload, netns: netns.clone(), answer: None }
        });
        let snapshot_sent = Order { payload: Payload::SnapshotSent(SnapshotSent {}), netns: None, answer: None };
        let replay = replay.chain([snapshot_sent]).collect();
        (id, replay, receiver)
    }

    /// A proxy is gone. If it was the newest, the one before it hears what it has missed.
    fn leave(&self, id: u64) {
        let mut state = self.lock();
        state.proxies.retain(|proxy| proxy.id != id);
        let Some(newest) = state.proxies.last() else { return };
        let missed: Vec<_> = state.pods.values().filter(|(pod, _)| !newest.told.contains(&pod.uid)).cloned().collect();
        for (pod, netns) in missed {
            if let Some(netns) = netns {
                state.tell_newest(pod, netns, None);
            }
        }
    }
}

impl State {
    /// False when there is nobody to tell. A proxy that is too far behind, or has just gone, is forgotten and the one before it told.
    fn tell_newest(&mut self, pod: Pod, netns: NetNs, mut answer: Option<oneshot::Sender<Result<(), ZdsError>>>) -> bool {
        while let Some(newest) = self.proxies.last_mut() {
            let uid = pod.uid.clone();
            let order = Order { payload: Payload::Add(pod.clone().into()), netns: Some(netns.clone()), answer: answer.take() };
            match newest.orders.try_send(order) {
                Ok(()) => {
                    newest.told.insert(uid);
                    return true;
                }
                Err(refused) => answer = refused.into_inner().answer,
            }
            // Without its sender the task of that connection ends, and with it the connection.
            self.proxies.pop();
        }
        false
    }

    fn tell_all_gone(&mut self, uid: &str) -> Vec<oneshot::Receiver<Result<(), ZdsError>>> {
        let mut answers = Vec::new();
        self.proxies.retain_mut(|proxy| {
            proxy.told.remove(uid);
            let (sender, answer) = oneshot::channel();
            let order = Order { payload: Payload::Del(DelWorkload { uid: uid.to_owned() }), netns: None, answer: Some(sender) };
            let taken = proxy.orders.try_send(order).is_ok();
            answers.extend(taken.then_some(answer));
            taken
        });
        answers
    }
}

async fn accept(listener: SeqPacketListener, shared: Arc<Shared>) {
    // Dropped with this task, and with it every connection.
    let mut connections = JoinSet::new();
    let mut backoff = AcceptBackoff::new();
    loop {
        match listener.accept().await {
            Ok(proxy) => {
                backoff.succeeded();
                connections.spawn(attend(proxy, Arc::clone(&shared)));
                while connections.try_join_next().is_some() {}
                tokio::time::sleep(ACCEPT_PACE).await;
            }
            Err(error) => {
                warn!("cannot accept a proxy: {error}");
                tokio::time::sleep(backoff.failed(&error)).await;
            }
        }
    }
}

async fn attend(proxy: SeqPacket, shared: Arc<Shared>) {
    if let Err(reason) = hello(&proxy).await {
        warn!("a proxy connected and did not say hello: {reason}");
        return;
    }
    let (id, replay, orders) = shared.join();
    let membership = Membership { shared: &shared, id, counted: false };
    info!(proxy = id, pods = replay.len() - 1, "a proxy connected");
    let reason = serve(&proxy, replay, orders, membership).await;
    info!(proxy = id, "a proxy is gone: {reason}");
}

/// A connection's place among the proxies, given up in whatever way its task ends.
struct Membership<'a> {
    shared: &'a Shared,
    id: u64,
    counted: bool,
}

impl Membership<'_> {
    fn ready(&mut self) {
        self.counted = true;
        self.shared.connected.send_modify(|count| *count += 1);
    }
}

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        self.shared.leave(self.id);
        if self.counted {
            self.shared.connected.send_modify(|count| *count -= 1);
        }
    }
}

/// Why a connection ended, for the log.
type Reason = String;

async fn hello(proxy: &SeqPacket) -> Result<(), Reason> {
    let mut buffer = [0; MAX_PACKET];
    let packet = receive(proxy, &mut buffer).await?;
    let hello = ZdsHello::decode(packet).map_err(|error| format!("its first packet does not decode: {error}"))?;
    // A later version begins like this one, or it would have another socket.
    debug!(version = hello.version, "hello");
    Ok(())
}

async fn serve(proxy: &SeqPacket, replay: Vec<Order>, mut orders: mpsc::Receiver<Order>, mut membership: Membership<'_>) -> Reason {
    for order in replay {
        if let Err(reason) = carry_out(proxy, order).await {
            return reason;
        }
    }
    membership.ready();
    loop {
        let mut buffer = [0; MAX_PACKET];
        tokio::select! {
            order = orders.recv() => {
                let Some(order) = order else { return format!("it is more than {QUEUE} orders behind") };
                if let Err(reason) = carry_out(proxy, order).await {
                    return reason;
                }
            }
            // Its end is seen at once; the reference looks every 5 s.
            unasked = proxy.receive(&mut buffer) => return match unasked {
                Ok(None) => "it hung up".into(),
                Ok(Some(_)) => "it sent a packet that nobody asked for".into(),
                Err(error) => error.to_string(),
            },
        }
    }
}

/// Sends one request, waits for its acknowledgement and passes it on. An error ends the connection: it is out of step.
async fn carry_out(proxy: &SeqPacket, order: Order) -> Result<(), Reason> {
    let Order { payload, netns, answer } = order;
    let request = WorkloadRequest::from(payload);
    let bytes = request.encode_to_vec();
    if bytes.len() > MAX_PACKET {
        // Names this long do not exist in Kubernetes. The connection is fine; this pod cannot be told.
        let reason = format!("its description takes {} bytes, {MAX_PACKET} fit into a packet", bytes.len());
        warn!("a pod cannot be told to the proxy: {reason}");
        tell(answer, Err(ZdsError::Refused(reason)));
        return Ok(());
    }
    let fds: Vec<_> = netns.iter().map(AsFd::as_fd).collect();
    timeout(DEADLINE, proxy.send(&bytes, &fds)).await.map_err(|_| "it does not read".to_owned())?.map_err(|error| error.to_string())?;
    let mut buffer = [0; MAX_PACKET];
    let response = WorkloadResponse::decode(receive(proxy, &mut buffer).await?).map_err(|error| format!("its answer does not decode: {error}"))?;
    let Some(Answer::Ack(ack)) = response.payload else { return Err("its answer is not an acknowledgement".into()) };
    if ack.error.is_empty() {
        tell(answer, Ok(()));
    } else {
        warn!(request = ?request.payload, "the proxy refused: {}", ack.error);
        tell(answer, Err(ZdsError::Refused(ack.error)));
    }
    Ok(())
}

fn tell(answer: Option<oneshot::Sender<Result<(), ZdsError>>>, outcome: Result<(), ZdsError>) {
    if let Some(answer) = answer {
        // Whoever asked may have stopped waiting.
        let _ = answer.send(outcome);
    }
}

async fn receive<'a>(proxy: &SeqPacket, buffer: &'a mut [u8]) -> Result<&'a [u8], Reason> {
    let packet = timeout(DEADLINE, proxy.receive(buffer)).await.map_err(|_| format!("no packet within {DEADLINE:?}"))?;
    match packet.map_err(|error| error.to_string())? {
        None => Err("it hung up".into()),
        Some(packet) if packet.truncated || !packet.fds.is_empty() => Err("its packet is too long, or carries descriptors".into()),
        Some(packet) => Ok(buffer.get(..packet.len).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests;
