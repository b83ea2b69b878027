//! The immutable snapshot of the mesh and its look-ups.
//!
//! Rows are numbered and kept in a persistent vector (see `table`); every way to find them is a persistent tree from hashes to numbers (see
//! `index`). A reader holds a pointer and never locks, an edit copies the few nodes on its path.
//!
//! 100,000 workloads and 10,000 services ask the allocator for 301 bytes a workload, everything included (`tests/mesh_memory.rs`); a workload's own
//! row is 96 bytes, its uid and name together about 70.

mod builder;
mod index;
mod intern;
mod table;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use imbl::OrdMap;
use ipnet::IpNet;

pub use self::builder::SnapshotBuilder;
use self::index::Index;
use self::intern::Interner;
use self::table::{Id, Table};
use super::{HealthStatus, NamespacedHostname, PortMap, Service, Text, TunnelProtocol, Visibility, Workload, canonical};

/// Everything known about workloads and services at one moment. Cheap to clone; never changes.
#[derive(Clone, Default)]
pub struct Snapshot(Arc<Tables>);

/// What an address names.
#[derive(Debug, Clone)]
pub enum Located {
    /// A workload.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
}

/// The rows and the ways to them. Keys are seeded hashes, so every reader compares the row that it finds.
#[derive(Clone, Default)]
struct Tables {
    seed: RandomState,
    local_node: Option<Text>,
    workloads: Table<Arc<Workload>>,
    /// By uid.
    by_uid: Index,
    /// By network and address, without host-network workloads.
    by_address: Index,
    /// By namespace and host name, where there is one.
    by_hostname: Index,
    /// Workloads of the local node by namespace and name; not kept if every workload is one.
    local: Index,
    /// Workloads by (service key, uid), whether or not the service is known: staging needs no second table.
    members: Index,
    services: Table<Arc<Service>>,
    /// By namespace and host name.
    by_key: Index,
    /// By host name, one per namespace.
    service_hosts: Index,
    /// By network and exact address.
    vips: Index,
    /// By network and prefix.
    ranges: Index,
    /// Which prefix lengths occur in `ranges` (IPv6?, length), and how often.
    range_lengths: OrdMap<(bool, u8), u32>,
    interner: Interner,
}

impl Snapshot {
    /// A workload by its uid.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<Arc<Workload>> {
        self.0.workload(uid).map(|(_, workload)| workload.clone())
    }

    /// The workload that owns an address. Addresses may overlap; a pod that takes HBONE wins over a pod, over another that
    /// takes HBONE, over the rest (reference, dataplane §3.1), then the lowest uid.
    #[must_use]
    pub fn workload_by_address(&self, network: &str, ip: IpAddr) -> Option<Arc<Workload>> {
        let wanted = bits(ip);
        let rows = self.0.workloads_of(self.0.by_address.rows(self.0.hash_address(network, wanted)));
        let claims = |workload: &Workload| workload.addresses.iter().any(|own| bits(*own) == wanted);
        let owners = rows.filter(|workload| claims(workload) && same(&workload.profile.network, network));
        owners.reduce(|best, other| if address_rank(other) > address_rank(best) { other } else { best }).cloned()
    }

    /// The workload of a pod: (name, namespace, service account) on the local node.
    #[must_use]
    pub fn local_workload(&self, name: &str, namespace: &str, service_account: &str) -> Option<Arc<Workload>> {
        let rows = self.0.workloads_of(self.0.local.rows(self.0.hash_pair(namespace, name)));
        let ours = |workload: &&Arc<Workload>| {
            let profile = &workload.profile;
            workload.name == *name && profile.namespace == *namespace && profile.service_account == *service_account
        };
        rows.filter(ours).min_by_key(|workload| &workload.uid).cloned()
    }

    /// All workloads of the local node, in no order.
    pub fn local_workloads(&self) -> impl Iterator<Item = &Arc<Workload>> + '_ {
        self.0.workloads_of(self.0.local.iter())
    }

    /// The local node, if its name is known.
    #[must_use]
    pub fn local_node(&self) -> Option<&Text> {
        self.0.local_node.as_ref()
    }

    /// How many workloads there are.
    #[must_use]
    pub fn workload_count(&self) -> usize {
        self.0.workloads.len()
    }

    /// A service by its key.
    #[must_use]
    pub fn service(&self, key: &NamespacedHostname) -> Option<Arc<Service>> {
        self.0.service(&key.namespace, &key.hostname).map(|(_, service)| service.clone())
    }

    /// The best service of a virtual address for a client namespace (reference, dataplane §3.2): of those with exactly this
    /// address that the client may see, else of those with a range that contains it. Where the reference takes whichever
    /// it saw first, the first name in order wins, so that all proxies agree.
    #[must_use]
    pub fn service_by_address(&self, network: &str, ip: IpAddr, client_namespace: Option<&str>) -> Option<Arc<Service>> {
        let wanted = bits(ip);
        let exact = self.0.services_of(self.0.vips.rows(self.0.hash_address(network, wanted)));
        let exact = exact.filter(|service| service.vips.iter().any(|vip| bits(vip.ip) == wanted && same(&vip.network, network)));
        if let Some(service) = best(exact.map(|service| (0, service)), client_namespace) {
            return Some(service);
        }
        if self.0.ranges.is_empty() {
            return None;
        }
        let ip = canonical(ip);
        let lengths = self.0.range_lengths.keys().filter(|(v6, _)| *v6 == ip.is_ipv6());
        let prefixes = lengths.filter_map(|(_, length)| IpNet::new(ip, *length).ok()).map(|prefix| prefix.trunc());
        let containing = prefixes.flat_map(|prefix| {
            let rows = self.0.services_of(self.0.ranges.rows(self.0.hash_prefix(network, prefix)));
            rows.filter(move |service| service.cidr_vips.iter().any(|(on, range)| *range == prefix && *on == *network))
                .map(move |service| (prefix.prefix_len(), service))
        });
        best(containing, client_namespace)
    }

    /// Every service that an address may mean to some client: those with exactly this address, then those with a range that contains it.
    #[must_use]
    pub fn services_by_address(&self, network: &str, ip: IpAddr) -> Vec<Arc<Service>> {
        let (wanted, ip) = (bits(ip), canonical(ip));
        let exact = self.0.services_of(self.0.vips.rows(self.0.hash_address(network, wanted)));
        let exact = exact.filter(|service| service.vips.iter().any(|vip| bits(vip.ip) == wanted && same(&vip.network, network)));
        let mut found: Vec<Arc<Service>> = exact.cloned().collect();
        for (_, length) in self.0.range_lengths.keys().filter(|(v6, _)| *v6 == ip.is_ipv6()) {
            let Ok(prefix) = IpNet::new(ip, *length).map(|prefix| prefix.trunc()) else { continue };
            let rows = self.0.services_of(self.0.ranges.rows(self.0.hash_prefix(network, prefix)));
            found.extend(rows.filter(|service| service.cidr_vips.iter().any(|(on, range)| *range == prefix && *on == *network)).cloned());
        }
        found
    }

    /// The best service of a host name for a client namespace, by the rules of [`Snapshot::service_by_address`].
    #[must_use]
    pub fn service_by_hostname(&self, hostname: &str, client_namespace: Option<&str>) -> Option<Arc<Service>> {
        best(self.services_by_hostname(hostname).map(|service| (0, service)), client_namespace)
    }

    /// Every service of a host name, at most one per namespace, in no order.
    pub fn services_by_hostname<'a>(&'a self, hostname: &'a str) -> impl Iterator<Item = &'a Arc<Service>> {
        self.0.services_of(self.0.service_hosts.rows(self.0.hash(hostname))).filter(move |service| service.hostname == *hostname)
    }

    /// A workload by namespace and host name.
    #[must_use]
    pub fn workload_by_hostname(&self, key: &NamespacedHostname) -> Option<Arc<Workload>> {
        let rows = self.0.workloads_of(self.0.by_hostname.rows(self.0.hash_pair(&key.namespace, &key.hostname)));
        let named = |workload: &&Arc<Workload>| workload.hostname == key.hostname && workload.profile.namespace == key.namespace;
        rows.filter(named).min_by_key(|workload| &workload.uid).cloned()
    }

    /// Step 2 of routing: a workload by address first, else the best service.
    #[must_use]
    pub fn locate(&self, network: &str, ip: IpAddr, client_namespace: Option<&str>) -> Option<Located> {
        let workload = self.workload_by_address(network, ip).map(Located::Workload);
        workload.or_else(|| self.service_by_address(network, ip, client_namespace).map(Located::Service))
    }

    /// The endpoints of a service by its key, filtered by its health policy; none while the service is not known.
    pub fn endpoints<'a>(&'a self, key: &NamespacedHostname) -> impl Iterator<Item = (&'a Arc<Workload>, &'a PortMap)> + use<'a> {
        let service = self.0.service(&key.namespace, &key.hostname);
        service.into_iter().flat_map(|(_, service)| self.endpoints_of(service))
    }

    /// The endpoints of a service, filtered by its health policy, each with its own service port to target port.
    pub fn endpoints_of<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = (&'a Arc<Workload>, &'a PortMap)> + use<'a> {
        let all = service.allows_unhealthy();
        let key = self.0.hash_pair(&service.namespace, &service.hostname);
        self.0.workloads_of(self.0.members.under(key)).filter_map(move |workload| {
            let backed = |(key, _): &&(NamespacedHostname, PortMap)| key.hostname == service.hostname && key.namespace == service.namespace;
            let (_, ports) = workload.profile.services.iter().find(backed)?;
            (all || workload.status == HealthStatus::Healthy).then_some((workload, ports))
        })
    }

    /// The workloads that wait for a service that is not known (yet), by its key; for the config dump. Walks everything.
    #[must_use]
    pub fn staged(&self) -> BTreeMap<&NamespacedHostname, Vec<(&Arc<Workload>, &PortMap)>> {
        let mut staged = BTreeMap::<_, Vec<_>>::new();
        for workload in self.workloads() {
            for (key, ports) in &workload.profile.services {
                if self.0.service(&key.namespace, &key.hostname).is_none() {
                    staged.entry(key).or_default().push((workload, ports));
                }
            }
        }
        staged
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> + '_ {
        self.0.workloads.iter()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> + '_ {
        self.0.services.iter()
    }
}

impl Tables {
    fn workload(&self, uid: &str) -> Option<(Id, &Arc<Workload>)> {
        let mut rows = self.by_uid.rows(self.hash(uid)).filter_map(|id| Some((id, self.workloads.get(id)?)));
        rows.find(|(_, workload)| workload.uid == *uid)
    }

    fn service(&self, namespace: &str, hostname: &str) -> Option<(Id, &Arc<Service>)> {
        let mut rows = self.by_key.rows(self.hash_pair(namespace, hostname)).filter_map(|id| Some((id, self.services.get(id)?)));
        rows.find(|(_, service)| service.namespace == *namespace && service.hostname == *hostname)
    }

    fn workloads_of(&self, ids: impl Iterator<Item = Id>) -> impl Iterator<Item = &Arc<Workload>> {
        ids.filter_map(|id| self.workloads.get(id))
    }

    fn services_of(&self, ids: impl Iterator<Item = Id>) -> impl Iterator<Item = &Arc<Service>> {
        ids.filter_map(|id| self.services.get(id))
    }

    fn hash(&self, word: &str) -> u64 {
        self.seed.hash_one(word)
    }

    fn hash_pair(&self, namespace: &str, name: &str) -> u64 {
        self.seed.hash_one((namespace, name))
    }

    fn hash_address(&self, network: &str, address: u128) -> u64 {
        self.seed.hash_one((network, address))
    }

    fn hash_prefix(&self, network: &str, prefix: IpNet) -> u64 {
        self.seed.hash_one((network, bits(prefix.addr()), prefix.prefix_len()))
    }
}

/// Whether two names of networks are the same; most have none, and to compare nothing with nothing is a call that costs a tenth of a look-up.
fn same(left: &str, right: &str) -> bool {
    left.len() == right.len() && (left.is_empty() || left == right)
}

/// One integer for an address of either family, the same for an IPv4 address and its mapped form: canonical by itself, and
/// cheaper to hash and compare than 17 bytes.
fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Who owns an address that several claim: the greatest.
fn address_rank(workload: &Workload) -> (u8, Reverse<&Text>) {
    let kind = match (workload.uid.contains("//Pod/"), workload.profile.protocol) {
        (true, TunnelProtocol::Hbone) => 3,
        (true, TunnelProtocol::None) => 2,
        (false, TunnelProtocol::Hbone) => 1,
        (false, TunnelProtocol::None) => 0,
    };
    (kind, Reverse(&workload.uid))
}

/// The best of services that share a name or address, each with the length of its prefix.
fn best<'a>(candidates: impl Iterator<Item = (u8, &'a Arc<Service>)>, client_namespace: Option<&str>) -> Option<Arc<Service>> {
    let at_home = |service: &Service| client_namespace.is_some_and(|namespace| service.namespace == *namespace);
    let visible = |service: &Service| client_namespace.is_none() || service.visibility == Visibility::Public || at_home(service);
    let visible = candidates.filter(|(_, service)| visible(service));
    let rank = |(length, service): (u8, &'a Arc<Service>)| {
        let name = Reverse((&service.namespace, &service.hostname));
        (at_home(service), length, service.canonical, name)
    };
    // Not `max_by_key`: to carry the rank along costs twice the rest of the look-up (reads of what was just written in parts).
    visible.reduce(|best, other| if rank(other) > rank(best) { other } else { best }).map(|(_, service)| service.clone())
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, formatter)
    }
}

impl fmt::Debug for Tables {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (workloads, services) = (self.workloads.len(), self.services.len());
        formatter.debug_struct("Snapshot").field("workloads", &workloads).field("services", &services).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
