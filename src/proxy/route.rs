//! Where one connection goes: pure functions of a snapshot, the settings and what the connection shows (reference,
//! dataplane §3.3–3.7 outbound, §4.3–4.4 inbound). They open nothing, wait for nothing and count nothing.
//!
//! The order of the steps is the reference's. What it sends on in plain text by design, an address that names nothing, is a
//! [`Route::Passthrough`]; everything that is known and cannot be reached the way it asks for is a [`RouteError`].

mod balance;
mod gateway;
pub mod inbound;
mod pick;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use balance::{Kind, Wanted};
pub use gateway::Missing;

use crate::model::{
    Authority, LoadBalancingMode, Located, Service, Snapshot, SpiffeError, SpiffeId, Text, TunnelProtocol, Workload, canonical_socket,
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
    /// Addresses of host names by which alone workloads are known, as far as they were resolved for this connection.
    pub resolved: Vec<(Text, IpAddr)>,
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
        /// The workload at the far end of the tunnel: the destination itself or a waypoint of it.
        workload: Arc<Workload>,
        /// The service that the client meant.
        service: Option<Arc<Service>>,
        /// Where the tunnel is dialled.
        next_hop: SocketAddr,
        /// What the CONNECT request asks for.
        authority: Authority,
        /// Who may answer: the workload, or any further name of the service through which it was chosen. Never empty.
        expected: Vec<SpiffeId>,
        /// Whether the workload is a waypoint and not the destination itself.
        waypoint: bool,
    },
    /// To a workload of another network: through a tunnel to the gateway of that network, and a second tunnel within the first.
    Beyond {
        /// The gateway, at the far end of the outer tunnel.
        gateway: Arc<Workload>,
        /// The service that the client meant.
        service: Arc<Service>,
        /// Where the outer tunnel is dialled.
        next_hop: SocketAddr,
        /// What both CONNECT requests ask for: the service's host name and port.
        authority: Authority,
        /// Who may be the gateway. Never empty.
        gateway_expected: Vec<SpiffeId>,
        /// Who may answer behind it: a SPIFFE name of the service that the workload (or waypoint) was chosen for. Never empty.
        expected: Vec<SpiffeId>,
        /// Whether a waypoint answers there.
        waypoint: bool,
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
    /// The chosen workload is known by a host name only, which is none of [`RouteConfig::resolved`].
    #[error("DNS resolution produced no addresses: {hostname} of {workload} was not resolved")]
    NeedsDns {
        /// The workload's uid.
        workload: Text,
        /// The name to resolve.
        hostname: Text,
    },
    /// The destination asks for a waypoint that cannot be found. It is never passed by.
    #[error("unknown waypoint: waypoint {waypoint} of {owner} {missing}")]
    Waypoint {
        /// The service (`namespace/hostname`) or workload (uid) that asks.
        owner: String,
        /// The waypoint's address or host name.
        waypoint: String,
        /// What is wrong with it.
        missing: Missing,
    },
    /// The service (`namespace/hostname`) asks for one of several waypoints, and none of them may take a connection.
    #[error("unknown waypoint: all weighted waypoints of {0} have weight 0")]
    NoWaypoint(String),
    /// The waypoint of a workload that is called by its address is on another network, which only services are reached on.
    #[error("unknown waypoint: waypoint {waypoint} of {owner} is on network {network:?}, where only services are reached")]
    WaypointElsewhere {
        /// The workload's uid.
        owner: Text,
        /// The uid of the waypoint's instance.
        waypoint: Text,
        /// Its network.
        network: Text,
    },
    /// The chosen workload is on another network than its client, and nothing is said about how to get there.
    #[error("no valid destination for workload: {workload} is on network {network:?} and has no network gateway")]
    OtherNetwork {
        /// The workload's uid.
        workload: Text,
        /// Its network.
        network: Text,
    },
    /// The gateway of the chosen workload's network cannot be found.
    #[error("unknown network gateway: gateway {gateway} of {workload} {missing}")]
    NetworkGateway {
        /// The workload's uid.
        workload: Text,
        /// The gateway's address or host name.
        gateway: String,
        /// What is wrong with it.
        missing: Missing,
    },
    /// Behind a network gateway only the names of the service tell who may answer, and there are none.
    #[error(
        "no valid destination for workload: nothing says who may answer for {workload} behind its network gateway (subject alternative names of {service})"
    )]
    NobodyBeyond {
        /// The workload's uid.
        workload: Text,
        /// The service (`namespace/hostname`) whose names are missing, or "no service".
        service: String,
    },
    /// A CONNECT asks for an address that is not the one it was sent to.
    #[error("ip mismatch: {connected} != {requested}")]
    IpMismatch {
        /// The address the peer connected to.
        connected: IpAddr,
        /// The address in the authority.
        requested: IpAddr,
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
    /// The application is to be told the original destination, and a service (`namespace/hostname`) without an address has none.
    #[error("no address to put into the PROXY header: {0} has no virtual address")]
    NoAddress(String),
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

/// Whether this proxy may have a listener on the port, on one of the pod's addresses or on loopback (reference, dataplane §1.7).
pub fn is_own_port(port: u16, config: &RouteConfig) -> bool {
    matches!(port, OUTBOUND_PORT | PLAINTEXT_PORT | HBONE_PORT) || (config.socks && port == SOCKS_PORT)
}

/// Refuses a connection by which the proxy would call itself (reference, dataplane §1.7).
pub fn refuse_recursion(entry: Entry, target: SocketAddr, config: &RouteConfig) -> Result<(), RouteError> {
    let target = canonical_socket(target);
    // The kernel takes the unspecified address for loopback.
    let here = entry != Entry::Outbound || target.ip().is_loopback() || target.ip().is_unspecified();
    if here && is_own_port(target.port(), config) { Err(RouteError::RecursiveCall(target)) } else { Ok(()) }
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
    let call = Call { snapshot, source, destination, resolved: &config.resolved };
    let client = Some(source.profile.namespace.as_str());
    let located = snapshot.locate(&config.network, destination.ip(), client);
    if let Some(Located::Service(intended)) = &located
        && let Some(route) = call.through_waypoint(intended, rng)?
    {
        return Ok(route);
    }
    match snapshot.service_by_address(&source.profile.network, destination.ip(), client) {
        Some(service) => {
            // Seen only from the client's network, it was not looked at above; as an address of a workload it is one.
            if located.is_none()
                && let Some(route) = call.through_waypoint(&service, rng)?
            {
                return Ok(route);
            }
            call.to_service(service, matches!(located, Some(Located::Workload(_))), rng)
        }
        None => match located {
            Some(Located::Service(intended)) if intended.mode() != LoadBalancingMode::Passthrough => Err(RouteError::NoHealthyUpstream(destination)),
            _ => call.to_address(rng),
        },
    }
}

/// One connection that is to go somewhere.
struct Call<'a> {
    snapshot: &'a Snapshot,
    source: &'a Workload,
    destination: SocketAddr,
    resolved: &'a [(Text, IpAddr)],
}

impl Call<'_> {
    /// By the waypoint of a service, if it has one. The waypoint chooses the endpoint, so it is told what was asked for.
    fn through_waypoint(&self, service: &Arc<Service>, rng: &mut impl Rng) -> Result<Option<Route>, RouteError> {
        let Some(waypoint) = gateway::waypoint_of(service, rng)? else { return Ok(None) };
        let chosen = gateway::choose(self.snapshot, (waypoint, Kind::Waypoint), self.source, rng);
        let instance =
            chosen.map_err(|missing| RouteError::Waypoint { owner: service.key().to_string(), waypoint: gateway::describe(waypoint), missing })?;
        if instance.workload.profile.network != self.source.profile.network {
            return self.beyond(&instance.workload, instance.service.as_deref(), service, rng).map(Some);
        }
        self.to_waypoint(instance, Some(service.clone())).map(Some)
    }

    /// By the waypoint of a workload that was addressed itself, if it has one. A waypoint's own connections are past the waypoint.
    fn through_waypoint_of(&self, workload: &Workload, rng: &mut impl Rng) -> Result<Option<Route>, RouteError> {
        let Some(waypoint) = &workload.profile.waypoint else { return Ok(None) };
        if gateway::is_instance(self.snapshot, waypoint, self.source) {
            return Ok(None);
        }
        let chosen = gateway::choose(self.snapshot, (waypoint, Kind::Waypoint), self.source, rng);
        let instance =
            chosen.map_err(|missing| RouteError::Waypoint { owner: workload.uid.to_string(), waypoint: gateway::describe(waypoint), missing })?;
        let network = &instance.workload.profile.network;
        if *network != self.source.profile.network {
            let (owner, network) = (workload.uid.clone(), network.clone());
            return Err(RouteError::WaypointElsewhere { owner, waypoint: instance.workload.uid.clone(), network });
        }
        self.to_waypoint(instance, None).map(Some)
    }

    fn to_waypoint(&self, instance: gateway::Instance, service: Option<Arc<Service>>) -> Result<Route, RouteError> {
        let next_hop = instance.address(self.destination, self.resolved)?;
        let expected = expected_identities(&instance.workload, instance.service.as_deref())?;
        Ok(Route::Hbone {
            workload: instance.workload,
            service,
            next_hop,
            authority: Authority::Address(self.destination.into()),
            expected,
            waypoint: true,
        })
    }

    /// To an address of a service; `own` if it is an address of a workload as well, which decides about waypoints. Fails where the reference goes
    /// on in plain text: an address that is a service's and a workload's, when the service has no endpoint.
    fn to_service(&self, service: Arc<Service>, own: bool, rng: &mut impl Rng) -> Result<Route, RouteError> {
        if service.mode() == LoadBalancingMode::Passthrough {
            return Ok(Route::Passthrough { destination: self.destination, service: Some(service) });
        }
        let wanted = Wanted { service: &service, port: self.destination.port(), kind: Kind::Workload };
        let (workload, port) = balance::choose(self.snapshot, self.source, wanted, rng).ok_or(RouteError::NoHealthyUpstream(self.destination))?;
        if workload.profile.network != self.source.profile.network {
            return self.beyond(&workload, Some(&service), &service, rng);
        }
        if own && let Some(route) = self.through_waypoint_of(&workload, rng)? {
            return Ok(route);
        }
        let ip = pick::address(&workload, Some(&service), self.destination.ip(), self.resolved)?;
        connect(workload, Some(service), SocketAddr::new(ip, port))
    }

    /// To an address that is no service's.
    fn to_address(&self, rng: &mut impl Rng) -> Result<Route, RouteError> {
        let Some(workload) = self.snapshot.workload_by_address(&self.source.profile.network, self.destination.ip()) else {
            return Ok(Route::Passthrough { destination: self.destination, service: None });
        };
        match self.through_waypoint_of(&workload, rng)? {
            Some(route) => Ok(route),
            None => connect(workload, None, self.destination),
        }
    }

    /// To a workload or waypoint of another network, by the gateway of that network. `own` is the service through which it was chosen: for a
    /// waypoint the waypoint's, else the one that was asked for.
    fn beyond(&self, workload: &Workload, own: Option<&Service>, service: &Arc<Service>, rng: &mut impl Rng) -> Result<Route, RouteError> {
        let uid = || workload.uid.clone();
        let no_gateway = || RouteError::OtherNetwork { workload: uid(), network: workload.profile.network.clone() };
        let address = workload.profile.network_gateway.as_ref().ok_or_else(no_gateway)?;
        let chosen = gateway::choose(self.snapshot, (address, Kind::NetworkGateway), self.source, rng);
        let instance = chosen.map_err(|missing| RouteError::NetworkGateway { workload: uid(), gateway: gateway::describe(address), missing })?;
        let expected = own.map(further_identities).unwrap_or_default();
        if expected.is_empty() {
            let service = own.map_or_else(|| "no service".to_owned(), |own| own.key().to_string());
            return Err(RouteError::NobodyBeyond { workload: uid(), service });
        }
        Ok(Route::Beyond {
            next_hop: instance.address(self.destination, self.resolved)?,
            gateway_expected: expected_identities(&instance.workload, instance.service.as_deref())?,
            gateway: instance.workload,
            authority: Authority::Host(service.hostname.clone(), self.destination.port()),
            service: service.clone(),
            waypoint: own.is_some_and(|own| own.key() != service.key()),
            expected,
        })
    }
}

/// The last step: by tunnel or not, as the workload takes it.
fn connect(workload: Arc<Workload>, service: Option<Arc<Service>>, address: SocketAddr) -> Result<Route, RouteError> {
    match workload.profile.protocol {
        TunnelProtocol::None => Ok(Route::Tcp { workload, service, address }),
        TunnelProtocol::Hbone => {
            let expected = expected_identities(&workload, service.as_deref())?;
            let next_hop = SocketAddr::new(address.ip(), HBONE_PORT);
            Ok(Route::Hbone { workload, service, next_hop, authority: Authority::Address(address.into()), expected, waypoint: false })
        }
    }
}

/// Who may answer for a workload: itself, and the further names of the service.
fn expected_identities(workload: &Workload, service: Option<&Service>) -> Result<Vec<SpiffeId>, RouteError> {
    let identity = workload.identity().map_err(|reason| RouteError::NoIdentity { workload: workload.uid.clone(), reason })?;
    let mut expected = vec![identity];
    for further in service.map(further_identities).unwrap_or_default() {
        if !expected.contains(&further) {
            expected.push(further);
        }
    }
    Ok(expected)
}

/// The further names of a service that are SPIFFE names of workloads.
fn further_identities(service: &Service) -> Vec<SpiffeId> {
    let mut identities = Vec::new();
    for name in &service.subject_alt_names {
        if let Ok(further) = name.parse::<SpiffeId>()
            && !identities.contains(&further)
        {
            identities.push(further);
        }
    }
    identities
}

#[cfg(test)]
mod tests;
