//! What a connection must know before it is routed, where the mesh is asked on demand (reference, dataplane §3.8). A look-up that the control plane
//! did not answer is an error: an address that nobody has said anything about is not an address outside the mesh.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;

use super::route::RouteConfig;
use crate::discovery::xds::Unanswered;
use crate::discovery::{LocalName, Mesh};
use crate::model::{Located, NamespacedHostname, Snapshot, Workload};

/// Makes sure that the world has what the destination of a connection of `pod`, which is `source`, names, and the gateways on the way. Returns at once
/// if the mesh is told as a whole.
pub(super) async fn prepare(
    mesh: &Mesh,
    config: &RouteConfig,
    (pod, source): (&LocalName, &Workload),
    destination: SocketAddr,
) -> Result<(), Unanswered> {
    if !mesh.is_on_demand() {
        return Ok(());
    }
    let networks = [&config.network, &source.profile.network];
    for network in networks {
        mesh.know_address(pod, network, destination.ip()).await?;
    }
    let world = mesh.current();
    for network in networks {
        let located = world.snapshot.locate(network, destination.ip(), Some(&source.profile.namespace));
        for gateway in located.iter().flat_map(|located| gateways(&world.snapshot, located, source)) {
            mesh.know_gateway(pod, &gateway.destination).await?;
        }
    }
    Ok(())
}

/// Asks for a pod what services are, all at once and for no longer than `patience`. What is not answered then stays unknown; an answer that comes later is
/// kept all the same. Says whether all were answered.
pub(super) async fn prepare_names(mesh: &Mesh, pod: &LocalName, names: &[NamespacedHostname], patience: Duration) -> bool {
    let all = join_all(names.iter().map(|name| mesh.know_service(pod, name)));
    tokio::time::timeout(patience, all).await.is_ok_and(|answers| answers.iter().all(Result::is_ok))
}

/// The waypoints of a destination, and the network gateways of what is behind it on other networks.
fn gateways(snapshot: &Snapshot, located: &Located, source: &Workload) -> Vec<crate::model::GatewayAddress> {
    match located {
        Located::Workload(workload) => workload.profile.waypoint.iter().chain(beyond(workload, source)).cloned().collect(),
        Located::Service(service) => {
            let weighted = service.weighted_waypoints.iter().map(|weighted| &weighted.destination);
            let mut gateways: Vec<_> = weighted.chain(&service.waypoint).cloned().collect();
            for (workload, _) in snapshot.endpoints_of(service) {
                let further: Vec<_> = beyond(workload, source).filter(|gateway| !gateways.contains(gateway)).cloned().collect();
                gateways.extend(further);
            }
            gateways
        }
    }
}

fn beyond<'a>(workload: &'a Workload, source: &Workload) -> impl Iterator<Item = &'a crate::model::GatewayAddress> {
    workload.profile.network_gateway.iter().filter(|_| workload.profile.network != source.profile.network)
}

#[cfg(test)]
mod tests;
