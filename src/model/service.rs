//! Services as WDS describes them (reference, dataplane §5.1).

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{NetworkAddress, Text};

/// One service: a host name in a namespace, the addresses that lead to it, and how to choose an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// Kubernetes name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Fully qualified host name; may be a wildcard `*.x`.
    pub hostname: Text,
    /// Exact virtual addresses.
    pub vips: Vec<NetworkAddress>,
    /// Address ranges (network, prefix).
    pub cidr_vips: Vec<(Text, IpNet)>,
    /// Service port to target port; 0 means a named port that each endpoint maps itself.
    pub ports: PortMap,
    /// Further SPIFFE names that endpoints may present.
    pub subject_alt_names: Vec<Text>,
    /// Service waypoint.
    pub waypoint: Option<GatewayAddress>,
    /// Weighted waypoints; override [`Service::waypoint`] when at least one has a weight.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// Load balancing, absent for plain weighted choice.
    pub load_balancing: Option<LoadBalancing>,
    /// Address families that clients may use.
    pub ip_families: Option<IpFamilies>,
    /// Wins ties between services of one host name or address.
    pub canonical: bool,
    /// Who may see it.
    pub visibility: Visibility,
}

impl Service {
    /// `namespace/hostname`.
    #[must_use]
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }

    /// The load-balancing mode, `Standard` when none is set.
    #[must_use]
    pub fn mode(&self) -> LoadBalancingMode {
        self.load_balancing.as_ref().map_or(LoadBalancingMode::Standard, |balancing| balancing.mode)
    }

    /// Whether endpoints that are not healthy are kept (reference, dataplane §3.1).
    #[must_use]
    pub fn allows_unhealthy(&self) -> bool {
        self.load_balancing.as_ref().is_some_and(|balancing| balancing.health_policy == HealthPolicy::AllowAll)
    }
}

/// Service port to target port, a few entries kept sorted by service port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct PortMap(Box<[(u16, u16)]>);

impl PortMap {
    /// The target port of a service port; `Some(0)` is a named port.
    #[must_use]
    pub fn target(&self, service_port: u16) -> Option<u16> {
        self.0.binary_search_by_key(&service_port, |(port, _)| *port).ok().and_then(|index| self.0.get(index)).map(|(_, target)| *target)
    }

    /// All pairs, by service port.
    pub fn iter(&self) -> impl Iterator<Item = (u16, u16)> + '_ {
        self.0.iter().copied()
    }

    /// Whether there is no port at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(u16, u16)> for PortMap {
    /// The last pair of a service port wins.
    fn from_iter<I: IntoIterator<Item = (u16, u16)>>(pairs: I) -> Self {
        let map: std::collections::BTreeMap<u16, u16> = pairs.into_iter().collect();
        Self(map.into_iter().collect())
    }
}

/// A host name in a namespace: the key of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    /// Namespace.
    pub namespace: Text,
    /// Host name.
    pub hostname: Text,
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.namespace, self.hostname)
    }
}

/// Where a waypoint or a network gateway is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Address or host name.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    pub hbone_port: u16,
}

/// The two ways to name a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// By address.
    Address(NetworkAddress),
    /// By host name.
    Hostname(NamespacedHostname),
}

/// One of several waypoints of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub destination: GatewayAddress,
    /// Its share of connections: weight / sum of weights.
    pub weight: u32,
}

/// How endpoints are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadBalancing {
    /// Scopes in order of preference.
    pub routing_preference: Vec<Scope>,
    /// What preferences mean.
    pub mode: LoadBalancingMode,
    /// Which endpoints count.
    pub health_policy: HealthPolicy,
}

/// A scope that source and endpoint may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

/// Meaning of the routing preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LoadBalancingMode {
    /// All endpoints are equal.
    #[default]
    Standard,
    /// Only endpoints that match every scope.
    Strict,
    /// The endpoints that match the most scopes in order.
    Failover,
    /// No choice at all: the original destination.
    Passthrough,
}

/// Which endpoints may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HealthPolicy {
    /// Healthy ones.
    #[default]
    OnlyHealthy,
    /// All of them.
    AllowAll,
}

/// Address families a service may be used with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpFamilies {
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether an address is of a permitted family.
    #[must_use]
    pub fn permits(self, ip: IpAddr) -> bool {
        match self {
            Self::Ipv4 => ip.is_ipv4(),
            Self::Ipv6 => ip.is_ipv6(),
            Self::Dual => true,
        }
    }
}

/// Who may see a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Clients of its own namespace.
    Namespace,
}
