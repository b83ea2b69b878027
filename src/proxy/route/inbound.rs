//! The inbound side: whether a CONNECT request is for this pod, where in the pod it goes, and which service it was meant for
//! (reference, dataplane §2.3, 4.3, 4.4).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{Entry, RouteConfig, RouteError, refuse_recursion};
use crate::model::{ApplicationProtocol, Authority, NamespacedHostname, PortMap, Service, Snapshot, Workload, canonical};

/// A CONNECT request that is for this pod. Made only by [`validate`].
#[derive(Debug, Clone, Copy)]
pub struct Validated<'a> {
    workload: &'a Workload,
    authority: &'a Authority,
    pod: IpAddr,
}

/// Checks that the authority of a CONNECT is this pod: the address that the peer connected to (`local`), or a host name. A
/// workload with an application tunnel takes any address, because it is told the original one. An address whose
/// waypoint is this workload is not accepted yet. An error is answered with 400.
pub fn validate<'a>(workload: &'a Workload, authority: &'a Authority, local: SocketAddr) -> Result<Validated<'a>, RouteError> {
    let pod = canonical(local.ip());
    match authority {
        Authority::Address(requested) if canonical(requested.ip()) != pod && workload.profile.application_tunnel.is_none() => {
            Err(RouteError::IpMismatch { connected: pod, requested: canonical(requested.ip()) })
        }
        _ => Ok(Validated { workload, authority, pod }),
    }
}

impl Validated<'_> {
    /// Where in the pod the connection goes: what authorization is asked about and what is dialled. The address is always the
    /// one that the peer connected to. An error is answered with 503.
    pub fn resolve(&self, snapshot: &Snapshot, config: &RouteConfig) -> Result<SocketAddr, RouteError> {
        let port = match self.authority {
            Authority::Address(requested) => requested.port(),
            Authority::Host(hostname, port) => {
                let namespace = Some(self.workload.profile.namespace.as_str());
                let service = snapshot.service_by_hostname(hostname, namespace).ok_or_else(|| RouteError::NoService(hostname.clone()))?;
                let own = self.workload.service_ports(&service.key()).and_then(|ports| mapped(ports, *port));
                let target = own.or_else(|| mapped(&service.ports, *port));
                target.ok_or_else(|| RouteError::ServicePort { hostname: hostname.clone(), port: *port })?
            }
        };
        refuse_recursion(Entry::Hbone, SocketAddr::new(self.pod, port), config)?;
        match self.workload.profile.application_tunnel {
            Some(tunnel) if tunnel.protocol == ApplicationProtocol::Proxy => Err(RouteError::ProxyHeader(self.workload.uid.clone())),
            tunnel => Ok(SocketAddr::new(self.pod, tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port))),
        }
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
