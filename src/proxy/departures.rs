//! Tunnels to workloads that left the mesh are let go of at once, rather than when they were unused for minutes (design §9), for their address may be
//! another's by then. Streams that are open finish.
//!
//! One task looks through the pools of all pods: to wake each pod of a large node for every change of a large mesh costs more than the look.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::discovery::Mesh;
use crate::hbone::Pool;

/// How often the pools are looked through at most, while workloads leave without end.
const PAUSE: Duration = Duration::from_secs(1);

type Pools = Mutex<Vec<Weak<Pool>>>;

/// The pools of a node that hear of departures.
pub struct Departures {
    pools: Arc<Pools>,
    /// Ends when dropped.
    _following: JoinSet<()>,
}

impl Departures {
    /// Follows a mesh as long as it can change. Must be called within a runtime.
    #[must_use]
    pub fn follow(mesh: &Mesh) -> Self {
        let (pools, mut following) = (Arc::<Pools>::default(), JoinSet::new());
        following.spawn(release(mesh.clone(), pools.clone()));
        Self { pools, _following: following }
    }

    /// From now on the pool keeps no tunnels to who left. It is forgotten when it is gone.
    pub(super) fn release_from(&self, pool: &Arc<Pool>) {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(pool));
    }
}

async fn release(mesh: Mesh, pools: Arc<Pools>) {
    let mut departures = mesh.subscribe_departures();
    while departures.changed().await.is_ok() {
        departures.borrow_and_update();
        look_through(&mesh, &pools);
        sleep(PAUSE).await;
        // A connection that was routed by the world before may have dialled meanwhile.
        look_through(&mesh, &pools);
    }
}

fn look_through(mesh: &Mesh, pools: &Pools) {
    let pools: Vec<_> = pools.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect();
    let world = mesh.current();
    for pool in pools {
        pool.retain(|key| world.snapshot.workload(&key.destination).is_some());
    }
}
