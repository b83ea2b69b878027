//! Which address of a workload to use (reference, dataplane §3.6).

use std::net::IpAddr;

use super::RouteError;
use crate::model::{Service, Text, Workload};

/// The address of a workload for a connection that was sent to `original`: that very address if it is the workload's, else
/// one that the service permits, of the same family if there is one. A workload that has none, but a host name, has the one that was resolved for it.
pub(super) fn address(workload: &Workload, service: Option<&Service>, original: IpAddr, resolved: &[(Text, IpAddr)]) -> Result<IpAddr, RouteError> {
    if workload.addresses.contains(&original) {
        return Ok(original);
    }
    let families = service.and_then(|service| service.ip_families);
    let permitted = || workload.addresses.iter().filter(|ip| families.is_none_or(|families| families.permits(**ip)));
    let same_family = permitted().find(|ip| ip.is_ipv4() == original.is_ipv4());
    match same_family.or_else(|| permitted().next()) {
        Some(ip) => Ok(*ip),
        None if workload.hostname.is_empty() => Err(RouteError::NoValidDestination(workload.uid.clone())),
        None => {
            let named = resolved.iter().find(|(name, _)| *name == workload.hostname);
            let needed = || RouteError::NeedsDns { workload: workload.uid.clone(), hostname: workload.hostname.clone() };
            named.map(|(_, ip)| *ip).ok_or_else(needed)
        }
    }
}

#[cfg(test)]
mod tests;
