//! The delta xDS client: the mesh as the control plane tells it (reference, dataplane §5).
//!
//! What it knows stays when the control plane goes: known workloads are served on, and a stream that comes back is told what we have, so that
//! only changes are sent. A resource that is not understood is refused by its name and the rest applied; if it is a policy, it denies all of
//! its targets. Nothing is published before both workloads and policies were heard of for the first time, so that there is no world without its policies.
//!
//! Better than the reference: readiness does not wait for a push without any refusal (they are counted and logged instead), reconnects are
//! spread by jitter, a stream that only ever ends is not reopened in a hurry, names asked on demand match aliases and time out.
//!
//! What a mesh of 100,000 workloads (of 15,000 kinds) and 5,000 services costs, by `cargo bench --bench xds` on two cores of a Sapphire Rapids
//! virtual machine, TLS and HTTP/2 included: the first push, about 45 MB, 0.30 s of CPU (before pushes were read where they lie and indexes
//! filled in bulk: 0.42 to 0.53 s); after it 46 MB resident more than before it (79 MB, of which 12 MB came back within another 10 s), the peak
//! 105 to 112 MB (152 MB). On a day on which other tenants of the machine make that push
//! cost 0.5 to 0.7 s, 100 changes a second cost 0.8 to 0.9 % of a core, with 250 pods that wait for theirs (2.8 to 3.1 % before changes that come within
//! 75 ms were read and published together, see `grpc::Coalescing`; with 50 ms 1.0 %, and 0.75 % against 1.9 % on a quieter hour): what a change costs
//! alone is the way through the kernel, TLS and HTTP/2 with nothing in the caches, not the few µs in which it is made and published (`cargo bench
//! --bench lookup`). Look-ups meanwhile: p99 10 to 20 µs, the longest of 9,200 usually 0.1 to 0.2 ms.

mod apply;
mod demand;
mod node;
mod policy;
mod reader;
mod rows;
mod session;
mod stats;

use std::time::Duration;

use tokio::sync::watch;

pub(crate) use demand::Demand;
pub use demand::Unanswered;
pub use node::Identity;
pub use stats::Stats;

use super::{Mesh, Publisher};
use crate::grpc::Dialer;
use crate::lifecycle::{Backoff, Supervisor};
use crate::model::Text;
use crate::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use apply::Applier;
use session::Client;

/// How the control plane is asked.
#[derive(Debug)]
pub struct Config {
    /// How it is reached.
    pub dialer: Dialer,
    /// Who we are.
    pub identity: Identity,
    /// Asks only for what is looked up (`XDS_ON_DEMAND`); nobody waits longer than this for an answer. Default: everything is sent.
    pub on_demand: Option<Duration>,
    /// Delays between attempts, drawn between zero and a bound that doubles. Default 10 ms to 15 s (reference, dataplane §5.7).
    pub backoff: Backoff,
    /// Where it is counted.
    pub stats: Stats,
    /// Told if the client ends while somebody still reads the mesh.
    pub supervisor: Supervisor,
}

/// Attempts as the reference makes them (dataplane §5.7), but with jitter.
const DEFAULT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(15));

impl Config {
    /// The defaults, for a control plane.
    #[must_use]
    pub fn new(dialer: Dialer, identity: Identity) -> Self {
        Self { dialer, identity, on_demand: None, backoff: DEFAULT_BACKOFF, stats: Stats::default(), supervisor: Supervisor::new() }
    }
}

/// The types that are subscribed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Address,
    Authorization,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    fn type_url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
        }
    }

    fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

/// Starts the client in a supervised task that ends with the last [`Mesh`] handle. The mesh is empty until the receiver shows `true`: then the
/// first workloads (unless they are asked on demand) and policies are there.
#[must_use]
pub fn start(config: Config) -> (Mesh, watch::Receiver<bool>) {
    let node = Some(config.identity.node.as_str()).filter(|node| !node.is_empty()).map(Text::from);
    let (publisher, mesh) = Publisher::new(node);
    let demand = config.on_demand.map(Demand::new);
    let first = if demand.is_some() { vec![Kind::Authorization] } else { Kind::ALL.to_vec() };
    let (synced, ready) = watch::channel(false);
    let supervisor = config.supervisor.clone();
    let client = Client::new(config, Applier::new(publisher, first), demand.clone(), synced);
    supervisor.supervise("xDS", client.run());
    (mesh.on_demand(demand), ready)
}

#[cfg(test)]
mod tests;
