//! The inbound side: whether a CONNECT request is for this pod, where in the pod it goes, and which service it was meant for
//! (reference, dataplane §2.3, 4.3, 4.4).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{Entry, RouteConfig, RouteError, gateway, refuse_recursion};
use crate::model::{ApplicationProtocol, Authority, Located, NamespacedHostname, PortMap, Service, Snapshot, Workload, canonical, canonical_socket};

/// A CONNECT request that is for this pod. Made only by [`validate`].
#[derive(Debug, Clone, Copy)]
pub struct Validated<'a> {
    snapshot: &'a Snapshot,
    config: &'a RouteConfig,
    workload: &'a Workload,
    authority: &'a Authority,
    pod: IpAddr,
}

/// Where in the pod a connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// What authorization is asked about: the address that the peer connected to, and the port.
    pub address: SocketAddr,
    /// What the client wanted to reach, if the application shall be told by a PROXY header.
    pub announce: Option<SocketAddr>,
}

/// Checks that the authority of a CONNECT is for this pod: the address that the peer connected to (`local`), or a host name, or the address of a
/// service or workload whose waypoint this pod is. A workload with an application tunnel takes any address: it is a waypoint that sees the
/// original one. Unlike the reference, weighted waypoints count too. An error is answered with 400.
pub fn validate<'a>(
    snapshot: &'a Snapshot,
    config: &'a RouteConfig,
    workload: &'a Workload,
    authority: &'a Authority,
    local: SocketAddr,
) -> Result<Validated<'a>, RouteError> {
    let pod = canonical(local.ip());
    let validated = Validated { snapshot, config, workload, authority, pod };
    match authority {
        Authority::Address(requested) => {
            let requested = canonical(requested.ip());
            let ours = requested == pod || workload.profile.application_tunnel.is_some() || validated.is_waypoint_of(requested);
            if ours { Ok(validated) } else { Err(RouteError::IpMismatch { connected: pod, requested }) }
        }
        Authority::Host(..) => Ok(validated),
    }
}

impl Validated<'_> {
    /// Whether this pod is the waypoint of whatever has an address.
    fn is_waypoint_of(&self, address: IpAddr) -> bool {
        match self.snapshot.locate(&self.config.network, address, None) {
            Some(Located::Workload(behind)) => {
                behind.profile.waypoint.as_ref().is_some_and(|waypoint| gateway::is_instance(self.snapshot, waypoint, self.workload))
            }
            Some(Located::Service(behind)) => gateway::is_waypoint_of(self.snapshot, &behind, self.workload),
            None => false,
        }
    }

    /// Where in the pod the connection goes. The address is always the one that the peer connected to. An error is answered with 503.
    pub fn resolve(&self) -> Result<Target, RouteError> {
        let tunnel = self.workload.profile.application_tunnel;
        let moved = tunnel.and_then(|tunnel| tunnel.port);
        let announces = tunnel.is_some_and(|tunnel| tunnel.protocol == ApplicationProtocol::Proxy);
        let (port, announce) = match self.authority {
            Authority::Address(requested) => (requested.port(), announces.then(|| canonical_socket((*requested).into()))),
            Authority::Host(hostname, port) => {
                let namespace = Some(self.workload.profile.namespace.as_str());
                let service = self.snapshot.service_by_hostname(hostname, namespace).ok_or_else(|| RouteError::NoService(hostname.clone()))?;
                let own = self.workload.service_ports(&service.key()).and_then(|ports| mapped(ports, *port));
                // Where the port is replaced, that of a service which this pod does not back need not lead anywhere on it.
                let replaced = || moved.and_then(|_| service.ports.target(*port)).map(|_| *port);
                let target = own.or_else(|| mapped(&service.ports, *port)).or_else(replaced);
                let target = target.ok_or_else(|| RouteError::ServicePort { hostname: hostname.clone(), port: *port })?;
                let announce = if announces { Some(self.address_of(&service, *port)?) } else { None };
                (target, announce)
            }
        };
        refuse_recursion(Entry::Hbone, SocketAddr::new(self.pod, port), self.config)?;
        Ok(Target { address: SocketAddr::new(self.pod, moved.unwrap_or(port)), announce })
    }

    /// The address of a service that its clients see: on this network, and IPv4, if it can be had.
    fn address_of(&self, service: &Service, port: u16) -> Result<SocketAddr, RouteError> {
        let best = service.vips.iter().max_by_key(|vip| (vip.network == self.config.network, vip.ip.is_ipv4()));
        best.map(|vip| SocketAddr::new(vip.ip, port)).ok_or_else(|| RouteError::NoAddress(service.key().to_string()))
    }
}

/// The host name in the value of a `forwarded` header, if it has one.
#[must_use]
pub fn forwarded_host(value: &[u8]) -> Option<&str> {
    let value = std::str::from_utf8(value).ok().filter(|value| value.is_ascii())?;
    let host = value.split(';').find_map(|part| part.trim().strip_prefix("host="))?;
    Some(host.trim_matches('"')).filter(|host| !host.is_empty())
}

/// The service that an inbound connection was meant for, to name it in telemetry only: the one that the client named
/// (`hint`: a forwarded host or the host of the authority) if this workload backs it, else the first with this target port.
#[must_use]
pub fn intended_service(snapshot: &Snapshot, workload: &Workload, hint: Option<&str>, target_port: u16) -> Option<Arc<Service>> {
    let backed = &workload.profile.services;
    let known = |(key, _): &(NamespacedHostname, PortMap)| snapshot.service(key);
    let named = hint.and_then(|hint| backed.iter().filter(|(key, _)| key.hostname == *hint).find_map(known));
    let serves = |(key, ports): &(NamespacedHostname, PortMap)| {
        let service = snapshot.service(key)?;
        let own = ports.iter().any(|(port, target)| (if target == 0 { service.ports.target(port) } else { Some(target) }) == Some(target_port));
        let inherited = || service.ports.iter().any(|(port, target)| target == target_port && ports.target(port).is_none());
        (own || inherited()).then_some(service)
    };
    named.or_else(|| backed.iter().find_map(serves))
}

fn mapped(ports: &PortMap, port: u16) -> Option<u16> {
    ports.target(port).filter(|target| *target != 0)
}

#[cfg(test)]
mod tests;
