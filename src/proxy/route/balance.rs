//! The choice of an endpoint (reference, dataplane §3.4).

use std::sync::Arc;

use rand::Rng;
use rand::seq::IndexedRandom;

use crate::model::{LoadBalancing, LoadBalancingMode, Scope, Service, Snapshot, Workload};

/// What an endpoint is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// To be called itself.
    Workload,
    /// To be the way to another network.
    NetworkGateway,
    /// To be a waypoint: captured ones take HBONE whatever ports their service has.
    Waypoint,
}

/// Which endpoint is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) service: &'a Service,
    /// The service port.
    pub(super) port: u16,
    pub(super) kind: Kind,
}

/// Chooses an endpoint of a service for a service port, and its target port: of the endpoints that can take the
/// connection, those that are nearest by the service's preferences, weighted by capacity. `None` if the service does not
/// have the port, or nobody can take it.
pub(super) fn choose(snapshot: &Snapshot, source: &Workload, wanted: Wanted<'_>, rng: &mut impl Rng) -> Option<(Arc<Workload>, u16)> {
    let Wanted { service, port, kind } = wanted;
    let service_target = service.ports.target(port);
    if service_target.is_none() && kind != Kind::Waypoint {
        return None;
    }
    let preferences = service.load_balancing.as_ref().filter(|balancing| prefers(balancing.mode));
    let candidates = snapshot.endpoints_of(service).filter_map(|(workload, ports)| {
        // A target of 0 is a named port: the endpoint itself says where it is.
        let mapped = [ports.target(port), service_target].into_iter().flatten().find(|target| *target != 0);
        let target = match (mapped, service_target, workload.profile.application_tunnel) {
            // A captured waypoint takes HBONE on the port that it is asked for, whether its service lists it or not.
            (mapped, None, tunnel) => tunnel.and_then(|tunnel| mapped.or_else(|| tunnel.port.map(|_| port)))?,
            (Some(target), ..) => target,
            (None, Some(_), tunnel) => tunnel.filter(|tunnel| kind == Kind::Waypoint && tunnel.port.is_some()).map(|_| port)?,
        };
        let rank = preferences.map_or(Some(0), |balancing| rank(balancing, source, workload))?;
        reachable(source, workload).then_some((rank, workload, target))
    });
    let mut candidates: Vec<_> = candidates.collect();
    let nearest = candidates.iter().map(|(rank, ..)| *rank).max()?;
    candidates.retain(|(rank, ..)| *rank == nearest);
    // An error is a sum of 0: nobody among the nearest has any capacity.
    let (_, workload, target) = candidates.choose_weighted(rng, |(_, workload, _)| u64::from(workload.capacity)).ok()?;
    Some((Arc::clone(workload), *target))
}

fn prefers(mode: LoadBalancingMode) -> bool {
    matches!(mode, LoadBalancingMode::Strict | LoadBalancingMode::Failover)
}

/// Whether there is a way to this endpoint at all: an address, a name, or the gateway of its own network.
fn reachable(source: &Workload, endpoint: &Workload) -> bool {
    let remote = endpoint.profile.network != source.profile.network && endpoint.profile.network_gateway.is_some();
    !endpoint.addresses.is_empty() || !endpoint.hostname.is_empty() || remote
}

/// How many preferences an endpoint shares with the source, up to the first that it does not; `None` if the mode is strict
/// and it lacks one. A network that comes first neither ends the comparison nor can be outweighed: every endpoint of the
/// own network is nearer than any other (reference, dataplane §3.4).
fn rank(balancing: &LoadBalancing, source: &Workload, endpoint: &Workload) -> Option<usize> {
    let scopes = &balancing.routing_preference;
    let by_network = scopes.first() == Some(&Scope::Network);
    let same_network = shares(Scope::Network, source, endpoint);
    let mut matched = 0;
    for (position, scope) in scopes.iter().enumerate() {
        if shares(*scope, source, endpoint) {
            matched += 1;
        } else if !(by_network && position == 0) {
            break;
        }
    }
    if balancing.mode == LoadBalancingMode::Strict && matched != scopes.len() {
        return None;
    }
    Some(if by_network && same_network { matched + scopes.len() - 1 } else { matched })
}

fn shares(scope: Scope, source: &Workload, endpoint: &Workload) -> bool {
    let (ours, theirs) = (&source.profile, &endpoint.profile);
    match scope {
        Scope::Region => ours.locality.region == theirs.locality.region,
        Scope::Zone => ours.locality.zone == theirs.locality.zone,
        Scope::Subzone => ours.locality.subzone == theirs.locality.subzone,
        Scope::Node => source.node == endpoint.node,
        Scope::Cluster => ours.cluster_id == theirs.cluster_id,
        Scope::Network => ours.network == theirs.network,
    }
}

#[cfg(test)]
mod tests;
