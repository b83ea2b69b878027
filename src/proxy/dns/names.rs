//! What a name means to a pod: a pure function of the snapshot (reference, dataplane §9.2 and 9.3).

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{NamespacedHostname, Service, Snapshot, Text, Visibility};

/// Most addresses of one answer: more than any client uses, and they always fit into a message of 64 KiB. Only headless services have that many.
pub(super) const MOST_ADDRESSES: usize = 1000;

/// Most names that one question is worth asking the control plane for. Real ones need two or three.
const MOST_UNKNOWN: usize = 8;

/// Who asks, and what the settings say.
#[derive(Debug, Clone)]
pub(super) struct Scope<'a> {
    /// Namespace of the client's workload.
    pub(super) namespace: &'a str,
    /// Network of the client's workload: addresses of other networks are not ours to give.
    pub(super) network: &'a str,
    /// Domains that resolvers append to names before they ask, in order, lower case, without a final dot.
    pub(super) search: &'a [String],
    /// `CLUSTER_DOMAIN`, lower case.
    pub(super) cluster_domain: &'a str,
    /// `PREFERED_SERVICE_NAMESPACE`: wins ties that nothing else decides.
    pub(super) preferred_namespace: Option<&'a str>,
}

/// Kind of address that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// A.
    Ipv4,
    /// AAAA.
    Ipv6,
}

impl Family {
    fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }
}

/// What a name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The service.
    pub(super) service: Arc<Service>,
    /// The host name that matched, which may be a wildcard.
    pub(super) hostname: String,
    /// How many labels of the name are the canonical name, if the rest is a search domain that some resolver appended: the answer is then a CNAME
    /// to it, and addresses of it.
    pub(super) canonical_labels: Option<usize>,
}

/// The service of a name, which must be lower case and without a final dot. `None` if it is no name of the mesh, or of a service that the client may
/// not see.
pub(super) fn find(snapshot: &Snapshot, scope: &Scope<'_>, name: &str) -> Option<Found> {
    let mut wildcard = String::new();
    for (alias, labels) in aliases(scope, name) {
        if let Some(service) = pick(snapshot, scope, &alias) {
            let canonical_labels = labels.filter(|_| !alias.starts_with("*."));
            return Some(Found { service, hostname: alias, canonical_labels });
        }
        for rest in parents(&alias) {
            wildcard.clear();
            wildcard.push('*');
            wildcard.push_str(rest);
            if let Some(service) = pick(snapshot, scope, &wildcard) {
                return Some(Found { service, hostname: wildcard, canonical_labels: None });
            }
        }
    }
    None
}

/// What is not known of the services that [`find`] would look at before it comes to one that is known, in that order: where services are told on
/// demand, these must be asked for first. A host name outside of the cluster's domain says nothing about its namespace; it is looked for in the
/// client's and the preferred one.
pub(super) fn unknown(snapshot: &Snapshot, scope: &Scope<'_>, name: &str) -> Vec<NamespacedHostname> {
    let mut unknown = Vec::new();
    for (alias, _) in aliases(scope, name) {
        let wildcards = parents(&alias).map(|rest| format!("*{rest}"));
        for hostname in std::iter::once(alias.clone()).chain(wildcards) {
            for namespace in namespaces(scope, &hostname) {
                let key = NamespacedHostname { namespace: namespace.into(), hostname: hostname.as_str().into() };
                if snapshot.service(&key).is_none() && !unknown.contains(&key) {
                    unknown.push(key);
                }
            }
            if unknown.len() >= MOST_UNKNOWN || pick(snapshot, scope, &hostname).is_some() {
                unknown.truncate(MOST_UNKNOWN);
                return unknown;
            }
        }
    }
    unknown
}

/// Where a service of this host name may be.
fn namespaces<'a>(scope: &Scope<'a>, hostname: &'a str) -> Vec<&'a str> {
    let domain = scope.cluster_domain;
    if let Some(inside) = hostname.strip_suffix(domain).filter(|rest| rest.is_empty() || rest.ends_with('.')) {
        // `service.namespace.svc.domain`, and nothing else.
        let parts = inside.strip_suffix(".svc.").and_then(|rest| rest.split_once('.'));
        return parts
            .filter(|(service, namespace)| *service != "*" && !namespace.contains('.'))
            .map(|(_, namespace)| namespace)
            .into_iter()
            .collect();
    }
    // The cluster's short form, and wildcards over what nobody owns.
    if hostname.ends_with(".svc") || hostname.strip_prefix("*.").is_some_and(|rest| !rest.contains('.')) {
        return Vec::new();
    }
    let preferred = scope.preferred_namespace.filter(|preferred| *preferred != scope.namespace);
    std::iter::once(scope.namespace).chain(preferred).collect()
}

/// What is left of a name, with the dot, when labels are taken off, the longest first: `.b.c` and `.c` of `a.b.c`.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(|(dot, _)| &name[dot..])
}

/// The addresses of a service that a client may use, in no order, each once. None if its family is not the service's or there are none on the
/// client's network.
pub(super) fn addresses(snapshot: &Snapshot, scope: &Scope<'_>, service: &Service, family: Family) -> Vec<IpAddr> {
    let wanted = |ip: &IpAddr| Family::of(*ip) == family;
    let permitted = |ip: &IpAddr| service.ip_families.is_none_or(|families| families.permits(*ip));
    let mut found: Vec<IpAddr> = if service.vips.is_empty() {
        // The reference gives the addresses of all networks; one of another network leads to nobody, or to somebody else.
        let near = snapshot.endpoints_of(service).filter(|(workload, _)| workload.profile.network == *scope.network);
        near.filter_map(|(workload, _)| workload.addresses.iter().map(IpAddr::to_canonical).find(wanted)).collect()
    } else {
        let near = service.vips.iter().filter(|vip| vip.network == *scope.network);
        near.map(|vip| vip.ip.to_canonical()).filter(wanted).collect()
    };
    found.retain(permitted);
    found.sort_unstable();
    found.dedup();
    found
}

/// The names under which a name is looked up, in order and each once, with the number of labels that are left of the name where a search domain was
/// taken off.
fn aliases(scope: &Scope<'_>, name: &str) -> Vec<(String, Option<usize>)> {
    let mut aliases: Vec<(String, Option<usize>)> = Vec::with_capacity(8);
    if name.is_empty() {
        return aliases;
    }
    let mut add = |alias: String, labels: Option<usize>| {
        if !aliases.iter().any(|(known, _)| *known == alias) {
            aliases.push((alias, labels));
        }
    };
    add(name.to_owned(), None);
    expansions(scope, name).into_iter().for_each(|alias| add(alias, None));
    for domain in scope.search {
        let rest = name.strip_suffix(domain.as_str()).and_then(|rest| rest.strip_suffix('.'));
        let Some(rest) = rest.filter(|rest| !rest.is_empty() && !domain.is_empty()) else { continue };
        let labels = Some(rest.split('.').count());
        add(rest.to_owned(), labels);
        expansions(scope, rest).into_iter().for_each(|alias| add(alias, labels));
    }
    aliases
}

/// What a short name of Kubernetes may stand for.
fn expansions(scope: &Scope<'_>, name: &str) -> Vec<String> {
    let (namespace, domain) = (scope.namespace, scope.cluster_domain);
    let is_svc = name.ends_with(".svc");
    match (name.split('.').count(), is_svc) {
        (1, _) => vec![format!("{name}.{namespace}.svc.{domain}")],
        (2, _) => vec![format!("{name}.svc.{domain}"), format!("{name}.{namespace}.svc.{domain}")],
        (3, true) => vec![format!("{name}.{domain}"), format!("{name}.svc.{domain}")],
        (3, false) => vec![format!("{name}.svc.{domain}")],
        (4, true) => vec![format!("{name}.{domain}")],
        _ => Vec::new(),
    }
}

/// The best service of exactly this host name (reference, dataplane §3.2), among those that have an answer to give.
fn pick(snapshot: &Snapshot, scope: &Scope<'_>, hostname: &str) -> Option<Arc<Service>> {
    let at_home = |service: &Service| service.namespace == *scope.namespace;
    let visible = |service: &Service| service.visibility == Visibility::Public || at_home(service);
    let preferred = |service: &Service| scope.preferred_namespace.is_some_and(|namespace| service.namespace == *namespace);
    let rank = |service: &Arc<Service>| (at_home(service), service.canonical, preferred(service), Reverse(service.namespace.clone()));
    let candidates = snapshot.services_by_hostname(hostname).filter(|service| visible(service) && has_answer(scope, service));
    candidates.max_by_key(|service| rank(service)).cloned()
}

/// Services without an exact address of their own are left to other resolvers, except the headless ones of Kubernetes.
fn has_answer(scope: &Scope<'_>, service: &Service) -> bool {
    !service.vips.is_empty() || is_of_cluster(&service.hostname, scope.cluster_domain)
}

fn is_of_cluster(hostname: &Text, domain: &str) -> bool {
    hostname.strip_suffix(domain).is_some_and(|rest| rest.ends_with(".svc."))
}

#[cfg(test)]
mod tests;
