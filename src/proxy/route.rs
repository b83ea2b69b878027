//! Where one connection goes: pure functions of a snapshot, the settings and what the connection shows (reference,
//! dataplane §3.3–3.7 outbound, §4.3–4.4 inbound). They open nothing, wait for nothing and count nothing.
//!
//! The order of the steps is the reference's. What it sends on in plain text by design, an address that names nothing, is a
//! [`Route::Passthrough`]; everything that is known and cannot be reached the way it asks for is a [`RouteError`].

mod balance;
pub mod inbound;
mod pick;

use std::net::SocketAddr;
use std::sync::Arc;

use rand::Rng;

use crate::model::{
    Authority, GatewayAddress, GatewayDestination, LoadBalancingMode, Located, Service, Snapshot, SpiffeError, SpiffeId, Text, TunnelProtocol,
    Workload, canonical_socket,
};

/// Port that takes captured outbound connections.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port that takes captured inbound connections in plain text.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Port that takes HBONE.
pub const HBONE_PORT: u16 = 15008;
/// Port that takes SOCKS5, where it is enabled.
pub const SOCKS_PORT: u16 = 15080;

/// What the routing decision needs to know about this proxy.
#[derive(Debug, Clone, Default)]
pub struct RouteConfig {
    /// Name of the proxy's own network (`NETWORK`); "" is the default network.
    pub network: Text,
    /// Whether port 15080 is the proxy's own too (reference, dataplane §1.7). Off by default.
    pub socks: bool,
}

/// Where an outbound connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// On to its original destination in plain TCP: nothing in the mesh has this address, or its service asks for it.
    Passthrough {
        /// The original destination.
        destination: SocketAddr,
        /// The service, if its load-balancing mode is what sends the connection on.
        service: Option<Arc<Service>>,
    },
    /// To a workload in plain TCP.
    Tcp {
        /// The workload.
        workload: Arc<Workload>,
        /// The service through which it was chosen.
        service: Option<Arc<Service>>,
        /// Its address and target port.
        address: SocketAddr,
    },
    /// To a workload through an HBONE tunnel.
    Hbone {
        /// The workload at the far end of the tunnel.
        workload: Arc<Workload>,
        /// The service through which it was chosen.
        service: Option<Arc<Service>>,
        /// Where the tunnel is dialled.
        next_hop: SocketAddr,
        /// What the CONNECT request asks for.
        authority: Authority,
        /// Who may answer: the workload, or any further name of the service. Never empty.
        expected: Vec<SpiffeId>,
    },
}

/// Why a connection has nowhere to go. It is closed; it never goes on in plain text instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// A workload calls a port of its own proxy.
    #[error("recursive call: {0} is a port of this proxy")]
    RecursiveCall(SocketAddr),
    /// The service is known, and none of its endpoints can take the connection.
    #[error("no healthy upstream: {0}")]
    NoHealthyUpstream(SocketAddr),
    /// The chosen workload has no address for this connection.
    #[error("no valid destination for workload: {0} has no address that fits")]
    NoValidDestination(Text),
    /// The chosen workload takes HBONE and its SPIFFE name is malformed, so nobody could be verified.
    #[error("no valid destination for workload: {workload}: {reason}")]
    NoIdentity {
        /// The workload's uid.
        workload: Text,
        /// What is wrong with its name.
        reason: SpiffeError,
    },
    /// The chosen workload is known by a host name only.
    #[error("DNS resolution produced no addresses: {hostname} of {workload} cannot be resolved on demand yet")]
    NeedsDns {
        /// The workload's uid.
        workload: Text,
        /// The name to resolve.
        hostname: Text,
    },
    /// The destination asks for a waypoint.
    #[error("unknown waypoint: waypoint {waypoint} of {owner} cannot be used yet")]
    Waypoint {
        /// The service (`namespace/hostname`) or workload (uid) that asks.
        owner: String,
        /// The waypoint's address or host name.
        waypoint: String,
    },
    /// The chosen workload is on another network than its client.
    #[error("unknown network gateway: {workload} is on network {network:?}, which cannot be reached yet")]
    OtherNetwork {
        /// The workload's uid.
        workload: Text,
        /// Its network.
        network: Text,
    },
    /// A CONNECT asks for an address that is not the one it was sent to.
    #[error("ip mismatch: {connected} != {requested}")]
    IpMismatch {
        /// The address the peer connected to.
        connected: std::net::IpAddr,
        /// The address in the authority.
        requested: std::net::IpAddr,
    },
    /// A CONNECT names a service that is not known, or not visible here.
    #[error("no service for hostname: {0}")]
    NoService(Text),
    /// A CONNECT names a service port that leads nowhere on this workload.
    #[error("service port unresolvable: port {port} of {hostname} has no target on this workload")]
    ServicePort {
        /// The service's host name.
        hostname: Text,
        /// The service port.
        port: u16,
    },
    /// The workload wants to be told the original target by a PROXY header.
    #[error("unsupported feature: the PROXY header that {0} asks for cannot be sent yet")]
    ProxyHeader(Text),
}

/// The three ways into the proxy, which differ in what counts as a call to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Captured outbound traffic: only loopback destinations can be this proxy.
    Outbound,
    /// Captured inbound plain text: any destination is this pod.
    Plaintext,
    /// A CONNECT request: any target is this pod.
    Hbone,
}

/// Refuses a connection by which the proxy would call itself (reference, dataplane §1.7).
pub fn refuse_recursion(entry: Entry, target: SocketAddr, config: &RouteConfig) -> Result<(), RouteError> {
    let target = canonical_socket(target);
    let port = target.port();
    let own = matches!(port, OUTBOUND_PORT | PLAINTEXT_PORT | HBONE_PORT) || (config.socks && port == SOCKS_PORT);
    // The kernel takes the unspecified address for loopback.
    let here = entry != Entry::Outbound || target.ip().is_loopback() || target.ip().is_unspecified();
    if own && here { Err(RouteError::RecursiveCall(target)) } else { Ok(()) }
}

/// Decides where a connection of `source` to `destination` goes (reference, dataplane §3.3). Takes a few look-ups, plus a
/// walk over the endpoints of the service; each call makes its own choice among them with `rng`.
pub fn outbound(
    snapshot: &Snapshot,
    config: &RouteConfig,
    source: &Workload,
    destination: SocketAddr,
    rng: &mut impl Rng,
) -> Result<Route, RouteError> {
    let destination = canonical_socket(destination);
    refuse_recursion(Entry::Outbound, destination, config)?;
    let client = Some(source.profile.namespace.as_str());
    let located = snapshot.locate(&config.network, destination.ip(), client);
    if let Some(Located::Service(intended)) = &located {
        refuse_service_waypoint(intended)?;
    }
    match snapshot.service_by_address(&source.profile.network, destination.ip(), client) {
        Some(service) => {
            // Seen only from the client's network, it was not looked at above; as an address of a workload it is one.
            if located.is_none() {
                refuse_service_waypoint(&service)?;
            }
            to_service(snapshot, source, service, destination, rng)
        }
        None => match located {
            Some(Located::Service(intended)) if intended.mode() != LoadBalancingMode::Passthrough => Err(RouteError::NoHealthyUpstream(destination)),
            _ => to_address(snapshot, source, destination),
        },
    }
}

/// A connection to an address of a service. Fails where the reference goes on in plain text: an address that is a service's
/// and a workload's, when the service has no endpoint.
fn to_service(
    snapshot: &Snapshot,
    source: &Workload,
    service: Arc<Service>,
    destination: SocketAddr,
    rng: &mut impl Rng,
) -> Result<Route, RouteError> {
    if service.mode() == LoadBalancingMode::Passthrough {
        return Ok(Route::Passthrough { destination, service: Some(service) });
    }
    let chosen = balance::choose(snapshot, &service, source, destination.port(), rng);
    let (workload, port) = chosen.ok_or(RouteError::NoHealthyUpstream(destination))?;
    if workload.profile.network != source.profile.network {
        return Err(RouteError::OtherNetwork { workload: workload.uid.clone(), network: workload.profile.network.clone() });
    }
    let ip = pick::address(&workload, Some(&service), destination.ip())?;
    connect(workload, Some(service), SocketAddr::new(ip, port))
}

/// A connection to an address that is no service's.
fn to_address(snapshot: &Snapshot, source: &Workload, destination: SocketAddr) -> Result<Route, RouteError> {
    let Some(workload) = snapshot.workload_by_address(&source.profile.network, destination.ip()) else {
        return Ok(Route::Passthrough { destination, service: None });
    };
    if let Some(waypoint) = &workload.profile.waypoint {
        return Err(RouteError::Waypoint { owner: workload.uid.to_string(), waypoint: describe(waypoint) });
    }
    connect(workload, None, destination)
}

/// The last step: by tunnel or not, as the workload takes it.
fn connect(workload: Arc<Workload>, service: Option<Arc<Service>>, address: SocketAddr) -> Result<Route, RouteError> {
    match workload.profile.protocol {
        TunnelProtocol::None => Ok(Route::Tcp { workload, service, address }),
        TunnelProtocol::Hbone => {
            let expected = expected_identities(&workload, service.as_deref())?;
            let next_hop = SocketAddr::new(address.ip(), HBONE_PORT);
            Ok(Route::Hbone { workload, service, next_hop, authority: Authority::Address(address), expected })
        }
    }
}

/// Who may answer for a workload: itself, and the further names of the service that are SPIFFE names of workloads.
fn expected_identities(workload: &Workload, service: Option<&Service>) -> Result<Vec<SpiffeId>, RouteError> {
    let identity = workload.identity().map_err(|reason| RouteError::NoIdentity { workload: workload.uid.clone(), reason })?;
    let mut expected = vec![identity];
    for name in service.map_or(&[][..], |service| &service.subject_alt_names) {
        if let Ok(further) = name.parse::<SpiffeId>()
            && !expected.contains(&further)
        {
            expected.push(further);
        }
    }
    Ok(expected)
}

/// Waypoints cannot be resolved yet, so a service that asks for one, at whatever weight, is out of reach.
fn refuse_service_waypoint(service: &Service) -> Result<(), RouteError> {
    let weighted = service.weighted_waypoints.iter().map(|weighted| &weighted.destination);
    match weighted.chain(&service.waypoint).next() {
        None => Ok(()),
        Some(waypoint) => Err(RouteError::Waypoint { owner: service.key().to_string(), waypoint: describe(waypoint) }),
    }
}

fn describe(gateway: &GatewayAddress) -> String {
    match &gateway.destination {
        GatewayDestination::Address(address) => format!("{address}:{}", gateway.hbone_port),
        GatewayDestination::Hostname(key) => format!("{key}:{}", gateway.hbone_port),
    }
}

#[cfg(test)]
mod tests;
