//! Certificates of local workloads are fetched before the first connection needs them, and forgotten with the last pod (reference,
//! dataplane §7.3).

use std::collections::HashSet;

use crate::discovery::Mesh;
use crate::identity::Credentials;
use crate::model::{SpiffeId, TunnelProtocol};

/// Without the name of the node every workload counts as one of this node. That is right for a machine of its own, and not for a mesh: beyond so
/// many workloads nothing is fetched ahead then, and nothing forgotten.
const UNNAMED: usize = 1024;

/// Follows the mesh for ever, also one that can no longer change. Only workloads of this node that take HBONE count.
pub async fn prefetch_certificates(mesh: Mesh, credentials: Credentials) {
    let mut worlds = mesh.subscribe_local();
    let mut known = HashSet::new();
    loop {
        let world = worlds.borrow_and_update().clone();
        if world.snapshot.local_node().is_some() || world.snapshot.workload_count() <= UNNAMED {
            let wanted = local_identities(&world);
            for identity in wanted.difference(&known) {
                credentials.prefetch(identity.clone());
            }
            for identity in known.difference(&wanted) {
                credentials.forget(identity);
            }
            known = wanted;
        }
        drop(world);
        if worlds.changed().await.is_err() {
            // A mesh that is given as text has no publisher: what it says stays.
            return std::future::pending().await;
        }
    }
}

fn local_identities(world: &crate::discovery::World) -> HashSet<SpiffeId> {
    world
        .snapshot
        .local_workloads()
        .filter(|workload| workload.profile.protocol == TunnelProtocol::Hbone || workload.profile.native_tunnel)
        .filter_map(|workload| workload.identity().ok())
        .collect()
}
