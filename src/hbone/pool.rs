//! The pool of tunnels that one pod has open (reference, dataplane §2.7).
//!
//! For one key only one dial is under way; everybody else waits for it and shares its tunnel, or its error. A tunnel serves at most
//! [`Config::pool_max_streams`] streams at once and takes new ones again when old ones end (the reference drops a full one for good).

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::dial::{ClientTunnel, OpenError, StreamSlot, handshake};
use super::{Config, ConnectRequest, ConnectResponse, Error, TunnelStream};
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
}

struct Shared {
    config: Arc<Config>,
    dialer: Arc<dyn Dialer>,
    entries: Mutex<HashMap<PoolKey, Entry>>,
}

#[derive(Default)]
struct Entry {
    tunnels: Vec<Arc<ClientTunnel>>,
    dialing: Option<watch::Receiver<Dialed>>,
}

/// What became of a dial.
type Dialed = Option<Result<(), Arc<Error>>>;

/// How often an open is tried again when the tunnel it got turned out to be closed.
const ATTEMPTS: usize = 3;

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(config: Arc<Config>, dialer: Arc<dyn Dialer>) -> Self {
        let shared = Arc::new(Shared { config, dialer, entries: Mutex::default() });
        tokio::spawn(release_unused(Arc::downgrade(&shared)));
        Self { shared }
    }

    /// Opens a stream to `request`'s authority on a pooled or new tunnel; waits for the answer.
    pub async fn open(
        &self,
        key: &PoolKey,
        credential: &Arc<Credential>,
        request: &ConnectRequest,
    ) -> Result<(TunnelStream, ConnectResponse, SpiffeId), Arc<Error>> {
        let mut last = Arc::new(Error::Draining);
        for _ in 0..ATTEMPTS {
            let (tunnel, slot) = self.checkout(key, credential).await?;
            match tunnel.open(slot, request).await {
                Ok((stream, response)) => return Ok((stream, response, tunnel.peer().clone())),
                Err(OpenError::Failed(error)) => return Err(Arc::new(error)),
                Err(OpenError::Unusable(error)) => last = Arc::new(error),
            }
        }
        Err(last)
    }

    /// A tunnel with a free place; dials one if there is none.
    async fn checkout(&self, key: &PoolKey, credential: &Arc<Credential>) -> Result<(Arc<ClientTunnel>, StreamSlot), Arc<Error>> {
        loop {
            let mut waiting = {
                let mut entries = self.shared.entries();
                let entry = entries.entry(key.clone()).or_default();
                entry.tunnels.retain(|tunnel| !tunnel.is_closed());
                if let Some(found) = entry.tunnels.iter().find_map(|tunnel| tunnel.reserve().map(|slot| (tunnel.clone(), slot))) {
                    return Ok(found);
                }
                match &entry.dialing {
                    Some(dialing) => dialing.clone(),
                    None => {
                        let (done, dialing) = watch::channel(None);
                        entry.dialing = Some(dialing.clone());
                        // A task of its own: the connection that asked for the tunnel may go away while others wait for it.
                        tokio::spawn(self.shared.clone().dial(key.clone(), credential.clone(), done));
                        dialing
                    }
                }
            };
            match waiting.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
                Ok(Some(Err(error))) => return Err(error),
                Ok(_) => {}
                Err(_) => return Err(Arc::new(Error::Draining)),
            }
        }
    }

    /// Drops every tunnel that `keep` does not want; open streams keep theirs.
    pub fn retain(&self, keep: impl Fn(&PoolKey) -> bool) {
        self.shared.entries().retain(|key, entry| keep(key) || entry.dialing.is_some());
    }

    /// Breaks all tunnels and their streams at once.
    pub fn abort(&self) {
        for (_, entry) in self.shared.entries().drain() {
            for tunnel in entry.tunnels {
                tunnel.abort();
            }
        }
    }

    /// How many tunnels are pooled.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.entries().values().map(|entry| entry.tunnels.iter().filter(|tunnel| !tunnel.is_closed()).count()).sum()
    }

    /// Whether no tunnel is pooled.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, HashMap<PoolKey, Entry>> {
        // Nothing panics while it holds the lock; a poisoned map is still whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn dial(self: Arc<Self>, key: PoolKey, credential: Arc<Credential>, done: watch::Sender<Dialed>) {
        let outcome = self.connect(&key, &credential).await;
        let mut entries = self.entries();
        let told = match outcome {
            Ok(tunnel) => {
                let entry = entries.entry(key).or_default();
                entry.dialing = None;
                entry.tunnels.push(Arc::new(tunnel));
                Ok(())
            }
            Err(error) => {
                if let Some(entry) = entries.get_mut(&key) {
                    entry.dialing = None;
                    if entry.tunnels.is_empty() {
                        entries.remove(&key);
                    }
                }
                Err(Arc::new(error))
            }
        };
        drop(entries);
        // Nobody may be waiting any more.
        let _ = done.send(Some(told));
    }

    async fn connect(&self, key: &PoolKey, credential: &Credential) -> Result<ClientTunnel, Error> {
        let socket = self.dialer.dial(key.next_hop).await.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => Error::ConnectTimeout(key.next_hop),
            _ => Error::Connect(error),
        })?;
        handshake(socket, credential, &key.expected, &self.config).await
    }
}

/// Lets go of tunnels that nobody used for a while; ends with the pool.
async fn release_unused(pool: std::sync::Weak<Shared>) {
    loop {
        let Some(limit) = pool.upgrade().map(|shared| shared.config.pool_unused_release) else { return };
        tokio::time::sleep(limit / 4).await;
        let Some(shared) = pool.upgrade() else { return };
        shared.entries().retain(|_, entry| {
            entry.tunnels.retain(|tunnel| !tunnel.is_closed() && tunnel.idle_for().is_none_or(|idle| idle < limit));
            !entry.tunnels.is_empty() || entry.dialing.is_some()
        });
    }
}
