//! From the messages of WDS to rows (reference, dataplane §5.1). A resource with anything in it that we cannot mean is refused as a whole,
//! and the reason names the field.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::model::{
    ApplicationProtocol, ApplicationTunnel, GatewayAddress, GatewayDestination, HealthPolicy, HealthStatus, IpFamilies, LoadBalancing,
    LoadBalancingMode, Locality, NamespacedHostname, NetworkAddress, NetworkMode, PortMap, Profile, Scope, Service, Text, TunnelProtocol, Visibility,
    WeightedWaypoint, Workload, WorkloadKind, canonical,
};
use crate::wire::workload as wire;

/// The port on which gateways and waypoints take HBONE when a message names none.
const HBONE_PORT: u16 = 15008;

/// One row of either kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Row {
    Workload(Workload),
    Service(Service),
}

impl Row {
    /// What the row is known by: uid, or `namespace/hostname`.
    pub(super) fn key(&self) -> Text {
        match self {
            Self::Workload(workload) => workload.uid.clone(),
            Self::Service(service) => service.key().to_string().into(),
        }
    }
}

/// The words of one push: those that repeat are allocated once.
#[derive(Debug, Default)]
pub(super) struct Words(HashSet<Text, foldhash::fast::RandomState>);

impl Words {
    pub(super) fn get(&mut self, word: &str) -> Text {
        if let Some(known) = self.0.get(word) {
            return known.clone();
        }
        let text = Text::from(word);
        self.0.insert(text.clone());
        text
    }

    fn or(&mut self, word: &str, default: &str) -> Text {
        self.get(if word.is_empty() { default } else { word })
    }
}

/// What a workload shares with its replicas. The fields that are its own are not looked at.
pub(super) fn read_profile(from: wire::Workload, words: &mut Words) -> Result<Profile, String> {
    let mut services = Vec::with_capacity(from.services.len());
    for (key, ports) in &from.services {
        let (namespace, hostname) = key.split_once('/').ok_or_else(|| format!("services: {:?} is not namespace/hostname", shown(key)))?;
        let key = NamespacedHostname { namespace: words.get(namespace), hostname: words.get(hostname) };
        services.push((key, port_map(&ports.ports).map_err(|reason| within("services", reason))?));
    }
    // In the order in which a snapshot keeps them: equal rows look alike.
    services.sort_by(|(left, _), (right, _)| left.cmp(right));
    let locality = from.locality.unwrap_or_default();
    Ok(Profile {
        namespace: words.get(&from.namespace),
        network: words.get(&from.network),
        protocol: tunnel_protocol(from.tunnel_protocol)?,
        trust_domain: words.or(&from.trust_domain, "cluster.local"),
        service_account: words.or(&from.service_account, "default"),
        waypoint: optional_gateway("waypoint", from.waypoint.as_ref(), words)?,
        network_gateway: optional_gateway("network_gateway", from.network_gateway.as_ref(), words)?,
        canonical_name: words.get(&from.canonical_name),
        canonical_revision: words.get(&from.canonical_revision),
        kind: workload_kind(from.workload_type),
        workload_name: words.get(&from.workload_name),
        native_tunnel: from.native_tunnel,
        authorization_policies: from.authorization_policies.iter().map(|name| words.get(name)).collect(),
        cluster_id: words.or(&from.cluster_id, "Kubernetes"),
        services,
        application_tunnel: from.application_tunnel.map(application_tunnel).transpose()?,
        locality: Locality { region: words.get(&locality.region), zone: words.get(&locality.zone), subzone: words.get(&locality.subzone) },
        network_mode: match known("network_mode", wire::NetworkMode::try_from(from.network_mode))? {
            wire::NetworkMode::Standard => NetworkMode::Standard,
            wire::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
        },
        identity: crate::model::KnownIdentity::default(),
    })
}

pub(super) fn status(number: i32) -> Result<HealthStatus, String> {
    match known("status", wire::WorkloadStatus::try_from(number))? {
        wire::WorkloadStatus::Healthy => Ok(HealthStatus::Healthy),
        wire::WorkloadStatus::Unhealthy => Ok(HealthStatus::Unhealthy),
    }
}

pub(super) fn read_service(from: wire::Service, words: &mut Words) -> Result<Service, String> {
    for (field, text) in [("namespace", &from.namespace), ("hostname", &from.hostname)] {
        if text.is_empty() || text.contains('/') {
            return Err(format!("{field} is {:?}, not a name without '/'", shown(text)));
        }
    }
    let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
    for vip in &from.addresses {
        let ip = address(&vip.address).map_err(|reason| within("addresses", reason))?;
        let network = words.get(&vip.network);
        match prefix(vip, ip)? {
            None => vips.push(NetworkAddress { network, ip }),
            Some(range) => cidr_vips.push((network, range)),
        }
    }
    let weighted = from.weighted_waypoints.iter().map(|waypoint| {
        let destination = optional_gateway("weighted_waypoints", waypoint.destination.as_ref(), words)?;
        let destination = destination.ok_or_else(|| "weighted_waypoints: no destination".to_owned())?;
        Ok(WeightedWaypoint { destination, weight: waypoint.weight })
    });
    let weighted_waypoints = weighted.collect::<Result<_, String>>()?;
    Ok(Service {
        name: words.get(&from.name),
        namespace: words.get(&from.namespace),
        hostname: words.get(&from.hostname),
        vips,
        cidr_vips,
        ports: port_map(&from.ports).map_err(|reason| within("ports", reason))?,
        subject_alt_names: from.subject_alt_names.iter().map(|name| words.get(name)).collect(),
        waypoint: optional_gateway("waypoint", from.waypoint.as_ref(), words)?,
        weighted_waypoints,
        load_balancing: from.load_balancing.as_ref().map(load_balancing).transpose()?,
        ip_families: match known("ip_families", wire::IpFamilies::try_from(from.ip_families))? {
            wire::IpFamilies::Automatic => None,
            wire::IpFamilies::Ipv4Only => Some(IpFamilies::Ipv4),
            wire::IpFamilies::Ipv6Only => Some(IpFamilies::Ipv6),
            wire::IpFamilies::Dual => Some(IpFamilies::Dual),
        },
        canonical: from.canonical,
        // A number that is not known is public, as in the reference: it says who sees the service, not who may use it.
        visibility: match wire::Visibility::try_from(from.visibility) {
            Ok(wire::Visibility::Namespace) => Visibility::Namespace,
            Ok(wire::Visibility::Public) | Err(_) => Visibility::Public,
        },
    })
}

/// The canonical form of 4 or 16 bytes.
pub(super) fn address(bytes: &[u8]) -> Result<IpAddr, String> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(|octets| IpAddr::V4(Ipv4Addr::from(octets)));
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(|octets| canonical(IpAddr::V6(Ipv6Addr::from(octets))));
    v4().or_else(v6).ok_or_else(|| format!("an address has {} bytes, not 4 or 16", bytes.len()))
}

/// The range that an address with a length stands for; `None` if it is one address.
fn prefix(vip: &wire::NetworkAddress, ip: IpAddr) -> Result<Option<IpNet>, String> {
    // The prefix of a mapped address counts the 96 bits before it.
    let mapped = if vip.address.len() == 16 && ip.is_ipv4() { 96 } else { 0 };
    let Some(length) = vip.length else { return Ok(None) };
    let wrong = || format!("addresses: {length} is not a prefix length of {ip}");
    let bits = length.checked_sub(mapped).and_then(|bits| u8::try_from(bits).ok()).ok_or_else(wrong)?;
    let range = IpNet::new(ip, bits).map_err(|_| wrong())?;
    Ok((bits < range.max_prefix_len()).then(|| range.trunc()))
}

fn port(number: u32) -> Result<u16, String> {
    u16::try_from(number).map_err(|_| format!("{number} is not a port"))
}

fn port_map(ports: &[wire::Port]) -> Result<PortMap, String> {
    ports
        .iter()
        .map(|pair| match port(pair.service_port)? {
            0 => Err("0 is not a service port".to_owned()),
            service => Ok((service, port(pair.target_port)?)),
        })
        .collect()
}

fn optional_gateway(field: &str, from: Option<&wire::GatewayAddress>, words: &mut Words) -> Result<Option<GatewayAddress>, String> {
    from.map(|from| gateway(from, words)).transpose().map_err(|reason| within(field, reason))
}

fn gateway(from: &wire::GatewayAddress, words: &mut Words) -> Result<GatewayAddress, String> {
    let destination = match &from.destination {
        Some(wire::Destination::Hostname(name)) if name.hostname.is_empty() => return Err("its host name is empty".to_owned()),
        Some(wire::Destination::Hostname(name)) => {
            GatewayDestination::Hostname(NamespacedHostname { namespace: words.get(&name.namespace), hostname: words.get(&name.hostname) })
        }
        Some(wire::Destination::Address(at)) => {
            GatewayDestination::Address(NetworkAddress { network: words.get(&at.network), ip: address(&at.address)? })
        }
        None => return Err("it has no destination".to_owned()),
    };
    let hbone_port = match port(from.hbone_mtls_port)? {
        0 => HBONE_PORT,
        port => port,
    };
    Ok(GatewayAddress { destination, hbone_port })
}

fn application_tunnel(from: wire::ApplicationTunnel) -> Result<ApplicationTunnel, String> {
    let protocol = match known("application_tunnel.protocol", wire::ApplicationProtocol::try_from(from.protocol))? {
        wire::ApplicationProtocol::None => ApplicationProtocol::None,
        wire::ApplicationProtocol::Proxy => ApplicationProtocol::Proxy,
    };
    let port = port(from.port).map_err(|reason| within("application_tunnel", reason))?;
    Ok(ApplicationTunnel { protocol, port: (port != 0).then_some(port) })
}

fn load_balancing(from: &wire::LoadBalancing) -> Result<LoadBalancing, String> {
    let scope = |number: &i32| match known("load_balancing.routing_preference", wire::Scope::try_from(*number))? {
        wire::Scope::Unspecified => Err("load_balancing.routing_preference: a scope that is not specified".to_owned()),
        wire::Scope::Region => Ok(Scope::Region),
        wire::Scope::Zone => Ok(Scope::Zone),
        wire::Scope::Subzone => Ok(Scope::Subzone),
        wire::Scope::Node => Ok(Scope::Node),
        wire::Scope::Cluster => Ok(Scope::Cluster),
        wire::Scope::Network => Ok(Scope::Network),
    };
    Ok(LoadBalancing {
        routing_preference: from.routing_preference.iter().map(scope).collect::<Result<_, String>>()?,
        mode: match known("load_balancing.mode", wire::Mode::try_from(from.mode))? {
            wire::Mode::Unspecified => LoadBalancingMode::Standard,
            wire::Mode::Strict => LoadBalancingMode::Strict,
            wire::Mode::Failover => LoadBalancingMode::Failover,
            wire::Mode::Passthrough => LoadBalancingMode::Passthrough,
        },
        health_policy: match known("load_balancing.health_policy", wire::HealthPolicy::try_from(from.health_policy))? {
            wire::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            wire::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    })
}

fn tunnel_protocol(number: i32) -> Result<TunnelProtocol, String> {
    match known("tunnel_protocol", wire::TunnelProtocol::try_from(number))? {
        wire::TunnelProtocol::Hbone => Ok(TunnelProtocol::Hbone),
        wire::TunnelProtocol::None => Ok(TunnelProtocol::None),
        wire::TunnelProtocol::LegacyIstioMtls => Err("tunnel_protocol LEGACY_ISTIO_MTLS is not spoken by node proxies".to_owned()),
    }
}

fn workload_kind(number: i32) -> WorkloadKind {
    match wire::WorkloadType::try_from(number) {
        Ok(wire::WorkloadType::Cronjob) => WorkloadKind::CronJob,
        Ok(wire::WorkloadType::Pod) => WorkloadKind::Pod,
        Ok(wire::WorkloadType::Job) => WorkloadKind::Job,
        Ok(wire::WorkloadType::Deployment) | Err(_) => WorkloadKind::Deployment,
    }
}

/// A number that the enumeration has.
pub(super) fn known<T>(field: &str, read: Result<T, prost::UnknownEnumValue>) -> Result<T, String> {
    read.map_err(|prost::UnknownEnumValue(number)| format!("{field} has the unknown value {number}"))
}

pub(super) fn within(field: &str, reason: impl std::fmt::Display) -> String {
    format!("{field}: {reason}")
}

/// The beginning of a text that somebody else chose.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests;
