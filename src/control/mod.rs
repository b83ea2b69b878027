//! The control plane: what a mesh consists of, told to node proxies over delta xDS, and certificates for their workloads (design §8; reference,
//! node-and-control §B.4 and §B.9).
//! This room never takes a decision about a connection, writes nothing, answers nobody without a token, and lets no client hold up or outweigh
//! the others.
//! Main types: [`start`] (a running control plane from its parts), [`Tokens`] (who may call), [`Signer`] (what signs), [`Stats`].
//!
//! It reads the mesh through `discovery`, beyond the map of design §2: the file source there already follows, checks and compares, and the
//! control plane tells others exactly what a proxy with that file would believe.
//!
//! A file of 100,000 workloads and 5,000 services (39 MB of YAML) takes 6.2 s of CPU to load, nearly all of it YAML, and leaves 188 MB resident,
//! with everything encoded (peak 289 MB). The first push to a client then takes 0.07 s of CPU. One changed workload in the file: 5 s to read it again,
//! of which 0.3 s to find what changed, and one resource sent (`culvert control` and one client, two cores of a Sapphire Rapids virtual machine).

mod authority;
mod catalog;
mod encode;
mod lookup;
mod message;
mod publish;
mod server;
mod serving;
mod session;
mod signer;
mod stats;
mod subscription;
mod tokens;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use crate::discovery::Mesh;
use crate::identity::IdentityError;
use crate::lifecycle::drain::DrainWatcher;
use crate::lifecycle::{Clock, Supervisor};

pub use publish::Debounce;
pub use signer::Signer;
pub use stats::{Stats, StatsCollector};
pub use tokens::Tokens;

/// Settings of this room.
#[derive(Debug, Clone)]
pub struct Config {
    /// How changes are gathered before they are told.
    pub debounce: Debounce,
    /// Certificates.
    pub ca: CaConfig,
    /// Host names and addresses by which clients know this server. Default: those of the reference's control plane, and this machine's.
    pub server_names: Vec<String>,
    /// Connections at once. Default 4096: more nodes want more replicas.
    pub connections: usize,
    /// Connections at once that have shown no token yet, in total and from one address. Default 512 and 64.
    pub strangers: (usize, usize),
    /// A stream ends after this long ±10 %, so that clients spread over replicas again. Default 30 min (reference, node-and-control §B.4).
    pub longest_stream: Duration,
    /// How often a stream's token is looked up again: a stream whose token was taken out of the file ends. Default 10 s.
    pub token_check: Duration,
    /// How often the CA's files are looked at. Default 1 s.
    pub ca_check: Duration,
    /// Bytes of one request: a client of 100,000 workloads that reconnects sends 7 MiB. Default 64 MiB.
    pub largest_request: usize,
    /// Memory for large requests of all clients together. Default 256 MiB.
    pub room: usize,
}

impl Default for Config {
    fn default() -> Self {
        let names = ["istiod.istio-system.svc", "istiod.istio-system", "istio-pilot.istio-system.svc", "localhost", "127.0.0.1", "::1"];
        Self {
            debounce: Debounce::default(),
            ca: CaConfig::default(),
            server_names: names.map(str::to_owned).to_vec(),
            connections: 4096,
            strangers: (512, 64),
            longest_stream: Duration::from_secs(30 * 60),
            token_check: Duration::from_secs(10),
            ca_check: Duration::from_secs(1),
            largest_request: 64 << 20,
            room: 256 << 20,
        }
    }
}

/// Settings of the certificate service.
#[derive(Debug, Clone, Copy)]
pub struct CaConfig {
    /// Lifetime of a certificate when none is asked for. Default 24 h.
    pub default_ttl: Duration,
    /// The longest that may be asked for. Default 90 d (reference, node-and-control §B.9).
    pub longest_ttl: Duration,
    /// Requests per second of one node. Default 100.
    pub per_second: u32,
    /// Requests of one node at once. Default 500: a node that starts has up to 250 identities, and may start twice.
    pub burst: u32,
}

impl Default for CaConfig {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 60 * 60);
        Self { default_ttl: day, longest_ttl: day * 90, per_second: 100, burst: 500 }
    }
}

/// Why there is no control plane.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The token file cannot be used.
    #[error("the token file {}: {problem}", path.display())]
    Tokens {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The server has no certificate of its own.
    #[error("the control plane's own certificate: {0}")]
    Certificate(#[from] IdentityError),
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(String),
}

/// What a control plane is made of.
#[derive(Debug)]
pub struct Parts {
    /// What it tells.
    pub mesh: Mesh,
    /// What signs.
    pub issuer: Arc<Signer>,
    /// Who may call.
    pub tokens: Tokens,
    /// Where it counts.
    pub stats: Arc<Stats>,
    /// The time certificates are judged by.
    pub clock: Clock,
}

/// Serves on `listener` until the drain begins. Its tasks are supervised; connections hold the drain until their calls have ended.
///
/// # Errors
/// When the CA cannot sign the server's own certificate.
pub fn start(config: Config, parts: Parts, listener: TcpListener, supervisor: &Supervisor, drain: &DrainWatcher) -> Result<(), Error> {
    let Parts { mesh, issuer, tokens, stats, clock } = parts;
    let serving = serving::Serving::new(issuer.clone(), config.server_names.clone(), clock)?;
    let tls = server::tls(Arc::new(serving))?;
    // Subscribed first: a world that comes in between is followed, not missed.
    let worlds = mesh.subscribe();
    let sender = publish::first(&worlds.borrow(), &stats);
    let catalogs = sender.subscribe();
    let debounce = config.debounce;
    supervisor.supervise("catalogs", {
        let stats = stats.clone();
        async move {
            // The handle keeps the source going.
            let _mesh = mesh;
            publish::follow(worlds, sender, debounce, stats).await;
        }
    });
    supervisor.supervise("CA files", {
        let (following, mut drain) = (issuer.clone().follow(config.ca_check, stats.clone()), drain.clone());
        async move {
            tokio::select! {
                _ = drain.signaled() => {}
                () = following => {}
            }
        }
    });
    let authority = authority::Authority::new(config.ca, issuer, catalogs.clone(), stats.clone());
    let room = message::Room::new(config.room);
    let server = Arc::new(server::Server { config, tokens: Arc::new(tokens), authority, catalogs, stats, room });
    supervisor.supervise("clients", server.run(listener, tls, drain.clone()));
    Ok(())
}
