//! Waypoints and network gateways: which instance of one serves a connection, and which workloads are instances of one (reference, dataplane §2.8,
//! §3.5, §4.3).
//!
//! A gateway is named by the control plane, so it is looked up without regard to who asks: namespace and visibility of services play no part.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;
use rand::seq::IndexedRandom;

use super::balance::{self, Kind, Wanted};
use super::{RouteError, pick};
use crate::model::{GatewayAddress, GatewayDestination, LoadBalancingMode, Service, Snapshot, Text, Workload};

/// The instance of a gateway that was chosen for a connection.
pub(super) struct Instance {
    pub(super) workload: Arc<Workload>,
    /// The gateway's service, if it is named by one.
    pub(super) service: Option<Arc<Service>>,
    port: u16,
    gateway: GatewayAddress,
}

/// Why a gateway has no instance for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Nothing has this address or name.
    Unknown,
    /// The service is known, and none of its endpoints takes HBONE on this port.
    NoEndpoint,
}

impl fmt::Display for Missing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Unknown => "is neither a service nor a workload that is known here",
            Self::NoEndpoint => "is a service without an endpoint that could take it",
        })
    }
}

/// What a gateway's name or address stands for.
enum Named {
    Service(Arc<Service>),
    Workload(Arc<Workload>),
}

/// Services come first, as for other destinations.
fn look_up(snapshot: &Snapshot, gateway: &GatewayAddress) -> Option<Named> {
    let (service, workload) = match &gateway.destination {
        GatewayDestination::Address(address) => {
            (snapshot.service_by_address(&address.network, address.ip, None), snapshot.workload_by_address(&address.network, address.ip))
        }
        GatewayDestination::Hostname(key) => (snapshot.service(key), snapshot.workload_by_hostname(key)),
    };
    service.map(Named::Service).or_else(|| workload.map(Named::Workload))
}

/// Chooses an instance of a gateway for one connection of `source`.
pub(super) fn choose(
    snapshot: &Snapshot,
    (gateway, kind): (&GatewayAddress, Kind),
    source: &Workload,
    rng: &mut impl Rng,
) -> Result<Instance, Missing> {
    let port = gateway.hbone_port;
    let gateway = gateway.clone();
    match look_up(snapshot, &gateway).ok_or(Missing::Unknown)? {
        Named::Workload(workload) => Ok(Instance { workload, service: None, port, gateway }),
        // "The original destination" is no gateway.
        Named::Service(service) if service.mode() == LoadBalancingMode::Passthrough => Err(Missing::NoEndpoint),
        Named::Service(service) => {
            let wanted = Wanted { service: &service, port, kind };
            let (workload, port) = balance::choose(snapshot, source, wanted, rng).ok_or(Missing::NoEndpoint)?;
            Ok(Instance { workload, service: Some(service), port, gateway })
        }
    }
}

impl Instance {
    /// Where it is dialled, for a connection that was sent to `original`.
    pub(super) fn address(&self, original: SocketAddr, resolved: &[(Text, IpAddr)]) -> Result<SocketAddr, RouteError> {
        let family_of = match &self.gateway.destination {
            GatewayDestination::Address(address) => address.ip,
            GatewayDestination::Hostname(_) => original.ip(),
        };
        pick::address(&self.workload, self.service.as_deref(), family_of, resolved).map(|ip| SocketAddr::new(ip, self.port))
    }
}

/// Whether a workload is an instance of a gateway, in good health or not.
pub(super) fn is_instance(snapshot: &Snapshot, gateway: &GatewayAddress, workload: &Workload) -> bool {
    match look_up(snapshot, gateway) {
        Some(Named::Service(service)) => workload.service_ports(&service.key()).is_some(),
        Some(Named::Workload(named)) => named.uid == workload.uid,
        None => false,
    }
}

/// The waypoint of a service for one connection: one of the weighted ones, else the only one. `Err` if it names several and none has a weight.
pub(super) fn waypoint_of<'a>(service: &'a Service, rng: &mut impl Rng) -> Result<Option<&'a GatewayAddress>, RouteError> {
    let weighted = service.weighted_waypoints.choose_weighted(rng, |waypoint| u64::from(waypoint.weight));
    match weighted {
        Ok(waypoint) => Ok(Some(&waypoint.destination)),
        Err(_) if service.waypoint.is_none() && !service.weighted_waypoints.is_empty() => Err(RouteError::NoWaypoint(service.key().to_string())),
        Err(_) => Ok(service.waypoint.as_ref()),
    }
}

/// Whether a workload is an instance of a waypoint of a service.
pub(super) fn is_waypoint_of(snapshot: &Snapshot, service: &Service, workload: &Workload) -> bool {
    let weighted = service.weighted_waypoints.iter().map(|weighted| &weighted.destination);
    weighted.chain(&service.waypoint).any(|waypoint| is_instance(snapshot, waypoint, workload))
}

/// A gateway as people name it.
pub(super) fn describe(gateway: &GatewayAddress) -> String {
    match &gateway.destination {
        GatewayDestination::Address(address) => format!("{address}:{}", gateway.hbone_port),
        GatewayDestination::Hostname(key) => format!("{key}:{}", gateway.hbone_port),
    }
}
