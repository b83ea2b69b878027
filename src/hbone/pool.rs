//! The pool of tunnels that one pod has open (reference, dataplane §2.7).
//!
//! For one key only one dial is under way; everybody else waits for it and shares its tunnel, or its error. A tunnel serves at most
//! [`Config::pool_max_streams`](super::Config::pool_max_streams) streams at once and takes new ones again when old ones end (the reference
//! drops a full one for good). One whose peer gives no credit, because streams of it are not read, takes none either until it does.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::dial::{ClientTunnel, OpenError, StreamSlot, Way, handshake, take_up};
use super::{ConnectRequest, ConnectResponse, Endpoint, Error, Frozen, MovedStream, Mover, TunnelStream};
use crate::identity::Credential;
use crate::model::{SpiffeId, Text};

/// Opens TCP connections where the pod's would come from.
pub trait Dialer: Send + Sync + 'static {
    /// Connects within the connect timeout; a timeout is reported as [`io::ErrorKind::TimedOut`].
    fn dial(&self, target: SocketAddr) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send + '_>>;
}

/// What must be equal for two connections to share a tunnel. The destination's uid and the generation of our certificate are part of it, so
/// that a tunnel is never reused for another pod that got the same address, nor after our certificate was renewed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Our identity.
    pub source: SpiffeId,
    /// Address of the client.
    pub source_ip: IpAddr,
    /// Who may answer.
    pub expected: Vec<SpiffeId>,
    /// Where the tunnel goes.
    pub next_hop: SocketAddr,
    /// The workload that is to answer.
    pub destination: Text,
    /// Generation of our credential.
    pub generation: u64,
}

/// The tunnels of one pod. Dropping the pool stops the dials; streams that are open keep their tunnels.
pub struct Pool {
    shared: Arc<Shared>,
    /// Dropped with the pool, or told something by [`Pool::abort`]: both end the pool's tasks.
    stop: watch::Sender<()>,
}

struct Shared {
    endpoint: Arc<Endpoint>,
    dialer: Arc<dyn Dialer>,
    tunnels: Mutex<Tunnels>,
}

#[derive(Default)]
struct Tunnels {
    by_key: HashMap<PoolKey, Entry>,
    dials: u64,
    /// After [`Pool::abort`].
    aborted: bool,
}

#[derive(Default)]
struct Entry {
    tunnels: Vec<Arc<ClientTunnel>>,
    dialing: Option<Dialing>,
}

/// A dial under way. The number tells it from a later one for the same key.
struct Dialing {
    number: u64,
    outcome: watch::Receiver<Dialed>,
}

/// What became of a dial.
type Dialed = Option<Result<Arc<ClientTunnel>, Arc<Error>>>;

/// A place on a tunnel.
struct Checkout {
    tunnel: Arc<ClientTunnel>,
    slot: StreamSlot,
    /// It was dialled for us.
    fresh: bool,
}

/// How many newly dialled tunnels may turn out to be closed before an open is given up: a server that refuses us learns who we are only after our
/// side of the handshake is done, so that the refusal comes on a tunnel that was already there.
const ATTEMPTS: usize = 3;

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(endpoint: Arc<Endpoint>, dialer: Arc<dyn Dialer>) -> Self {
        let shared = Arc::new(Shared { endpoint, dialer, tunnels: Mutex::default() });
        let (stop, stopped) = watch::channel(());
        tokio::spawn(release_unused(Arc::downgrade(&shared), stopped));
        Self { shared, stop }
    }

    /// Opens a stream to `request`'s authority on a pooled or new tunnel; waits for the answer. Dropping the future gives the stream up and
    /// its place back; a dial that it began goes on for whoever else waits for it.
    ///
    /// # Errors
    /// Shared by all who waited for the same dial. [`Error::Draining`] after [`Pool::abort`].
    pub async fn open(
        &self,
        key: &PoolKey,
        credential: &Arc<Credential>,
        request: &ConnectRequest,
    ) -> Result<(TunnelStream, ConnectResponse, SpiffeId), Arc<Error>> {
        let mut lost = 0;
        loop {
            let Checkout { tunnel, slot, fresh } = self.checkout(key, credential, &mut lost).await?;
            match tunnel.open(slot, request).await {
                Ok((stream, response)) => return Ok((stream, response, tunnel.peer().clone())),
                Err(OpenError::Failed(error)) => return Err(Arc::new(error)),
                // The tunnel counts as closed from now on, so that this ends at the latest with a new one.
                Err(OpenError::Unusable(_)) if !fresh => {}
                Err(OpenError::Unusable(error)) => {
                    lost += 1;
                    if lost == ATTEMPTS {
                        return Err(Arc::new(error));
                    }
                }
            }
        }
    }

    pub(super) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.shared.endpoint
    }

    /// A tunnel with a free place; dials one if there is none. Adds to `lost` what was dialled meanwhile and closed before it could be used.
    async fn checkout(&self, key: &PoolKey, credential: &Arc<Credential>, lost: &mut usize) -> Result<Checkout, Arc<Error>> {
        let mut fresh = false;
        loop {
            let mut outcome = {
                let mut tunnels = self.shared.tunnels();
                if tunnels.aborted {
                    return Err(Arc::new(Error::Draining));
                }
                let Tunnels { by_key, dials, .. } = &mut *tunnels;
                let entry = by_key.entry(key.clone()).or_default();
                entry.tunnels.retain(|tunnel| !tunnel.is_closed() && !tunnel.is_spent());
                if let Some((tunnel, slot)) = entry.tunnels.iter().find_map(|tunnel| tunnel.reserve().map(|slot| (tunnel.clone(), slot))) {
                    return Ok(Checkout { tunnel, slot, fresh });
                }
                match &entry.dialing {
                    // One whose task is gone without a word would be waited for in vain.
                    Some(dialing) if dialing.outcome.has_changed().is_ok() => dialing.outcome.clone(),
                    _ => {
                        let (done, outcome) = watch::channel(None);
                        *dials += 1;
                        entry.dialing = Some(Dialing { number: *dials, outcome: outcome.clone() });
                        // A task of its own: the connection that asked for the tunnel may go away while others wait for it.
                        let dial = self.shared.clone().dial(key.clone(), credential.clone(), *dials);
                        tokio::spawn(unless_stopped(self.stop.subscribe(), async move {
                            // Nobody may be waiting any more.
                            let _ = done.send(Some(dial.await));
                        }));
                        outcome
                    }
                }
            };
            fresh = true;
            match outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
                Ok(Some(Err(error))) => return Err(error),
                Ok(Some(Ok(tunnel))) if tunnel.is_closed() => {
                    *lost += 1;
                    if *lost == ATTEMPTS {
                        return Err(Arc::new(tunnel.loss()));
                    }
                }
                Ok(_) => {}
                Err(_) => return Err(Arc::new(Error::Draining)),
            }
        }
    }

    /// Drops every tunnel that `keep` does not want; open streams keep theirs. Dials for what is no longer wanted end in vain.
    pub fn retain(&self, keep: impl Fn(&PoolKey) -> bool) {
        self.shared.tunnels().by_key.retain(|key, _| keep(key));
    }

    /// Breaks all tunnels and their streams at once, for good: every later open fails.
    pub fn abort(&self) {
        let entries = {
            let mut tunnels = self.shared.tunnels();
            tunnels.aborted = true;
            std::mem::take(&mut tunnels.by_key)
        };
        self.stop.send_replace(());
        for tunnel in entries.into_values().flat_map(|entry| entry.tunnels) {
            tunnel.abort();
        }
    }

    /// Everything that is pooled and can be frozen. (A tunnel that the pool has let go of while its last streams finish is not among them.)
    #[must_use]
    pub fn movers(&self) -> Vec<(PoolKey, Mover)> {
        let tunnels = self.shared.tunnels();
        let live = tunnels.by_key.iter().flat_map(|(key, entry)| entry.tunnels.iter().map(move |tunnel| (key, tunnel)));
        live.filter(|(_, tunnel)| !tunnel.is_closed()).map(|(key, tunnel)| (key.clone(), tunnel.mover())).collect()
    }

    /// Takes a frozen tunnel up and pools it, unless it takes no new streams any more. It goes on at once; its streams as soon as each is given
    /// its task. Its peer is watched for by the revocation lists of `credential`, that of `key`. Must be called within a runtime.
    ///
    /// # Errors
    /// When it is not of the dialling side, its peer is not one that `key` expects, or its sockets cannot be registered; [`Error::Draining`]
    /// after [`Pool::abort`]. Its connections are reset.
    pub fn take_up(&self, key: PoolKey, credential: &Credential, frozen: Frozen) -> Result<Vec<MovedStream>, Error> {
        if !key.expected.contains(frozen.peer()) {
            return Err(Error::Tunnel(format!("the tunnel's peer {} is not expected", frozen.peer())));
        }
        let mut tunnels = self.shared.tunnels();
        if tunnels.aborted {
            return Err(Error::Draining);
        }
        let (tunnel, streams) = take_up(frozen, credential, &self.shared.endpoint)?;
        if !tunnel.is_closed() {
            tunnels.by_key.entry(key).or_default().tunnels.push(Arc::new(tunnel));
        }
        Ok(streams)
    }

    /// How many tunnels are pooled.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.tunnels().by_key.values().map(|entry| entry.tunnels.iter().filter(|tunnel| !tunnel.is_closed()).count()).sum()
    }

    /// Whether no tunnel is pooled.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Ends with the pool.
async fn unless_stopped(mut stopped: watch::Receiver<()>, task: impl Future<Output = ()>) {
    tokio::select! {
        // An error means that the pool was dropped.
        _ = stopped.changed() => {}
        () = Box::pin(task) => {}
    }
}

impl Shared {
    fn tunnels(&self) -> MutexGuard<'_, Tunnels> {
        // Nothing panics while it holds the lock; a poisoned map is still whole.
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials and pools the result, unless nobody wants it any more.
    async fn dial(self: Arc<Self>, key: PoolKey, credential: Arc<Credential>, number: u64) -> Result<Arc<ClientTunnel>, Arc<Error>> {
        let outcome = self.connect(&key, &credential).await;
        let mut tunnels = self.tunnels();
        let wanted = tunnels.by_key.get_mut(&key).filter(|entry| entry.dialing.as_ref().is_some_and(|dialing| dialing.number == number));
        let Some(entry) = wanted else { return Err(Arc::new(Error::Draining)) };
        entry.dialing = None;
        match outcome {
            Ok(tunnel) => {
                let tunnel = Arc::new(tunnel);
                entry.tunnels.push(tunnel.clone());
                Ok(tunnel)
            }
            Err(error) => {
                if entry.tunnels.is_empty() {
                    tunnels.by_key.remove(&key);
                }
                Err(Arc::new(error))
            }
        }
    }

    async fn connect(&self, key: &PoolKey, credential: &Credential) -> Result<ClientTunnel, Error> {
        let socket = self.dialer.dial(key.next_hop).await.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => Error::ConnectTimeout(key.next_hop),
            _ => Error::Connect(error),
        })?;
        let way = Way { socket, address: key.next_hop, outer: None };
        handshake(way, credential, &key.expected, &self.endpoint).await
    }
}

/// Lets go of tunnels that nobody used for a while; ends with the pool.
async fn release_unused(pool: Weak<Shared>, mut stopped: watch::Receiver<()>) {
    loop {
        let Some(limit) = pool.upgrade().map(|shared| shared.endpoint.config.pool_unused_release) else { return };
        tokio::select! {
            _ = stopped.changed() => return,
            () = tokio::time::sleep(limit / 4) => {}
        }
        let Some(shared) = pool.upgrade() else { return };
        // Places are taken under the same lock, so that no tunnel goes that somebody has just begun to use.
        shared.tunnels().by_key.retain(|_, entry| {
            entry.tunnels.retain(|tunnel| !tunnel.is_closed() && tunnel.idle_for().is_none_or(|idle| idle < limit));
            !entry.tunnels.is_empty() || entry.dialing.is_some()
        });
    }
}
