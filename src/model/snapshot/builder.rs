//! Edits: the next snapshot from the last one.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::index::grouped;
use super::intern::Adopted;
use super::{Snapshot, Tables, bits};
use crate::model::{NetworkMode, Profile, Service, Text, Workload, canonical};

/// Makes the next [`Snapshot`] from the last one, sharing all that did not change: an insert or a removal costs
/// microseconds, whatever the size of the mesh. What a snapshot answers depends only on the rows that it holds, never on
/// the order in which they came.
#[derive(Debug, Clone, Default)]
pub struct SnapshotBuilder {
    tables: Tables,
    adopted: Adopted,
}

impl Snapshot {
    /// Continues from this snapshot.
    #[must_use]
    pub fn edit(&self) -> SnapshotBuilder {
        SnapshotBuilder { tables: Tables::clone(&self.0), adopted: Adopted::default() }
    }
}

impl SnapshotBuilder {
    /// Restricts [`Snapshot::local_workload`] to workloads of this node; without it every workload counts as local.
    #[must_use]
    pub fn local_node(mut self, node: Text) -> Self {
        self.tables.local_node = Some(node);
        self.tables.local = super::Index::default();
        let rows: Vec<_> = self.tables.workloads.iter().cloned().collect();
        for workload in rows {
            self.tables.link_local(&workload);
        }
        self
    }

    /// Adds or replaces a workload by its uid. Workloads that come with one and the same profile are cheaper than those with equal ones.
    pub fn insert_workload(&mut self, workload: Workload) {
        self.put_workload(workload);
    }

    /// [`SnapshotBuilder::insert_workload`]; says whether it made a difference.
    pub fn put_workload(&mut self, mut workload: Workload) -> bool {
        normalise(&mut workload);
        let known = self.tables.workload(&workload.uid).cloned();
        if known.as_deref() == Some(&workload) {
            return false;
        }
        match known {
            // The usual change, of health or capacity: all keys and shared parts stay, the row takes the place of the old one.
            Some(known) if same_keys(&known, &workload) => {
                let (node, hostname, profile) = (known.node.clone(), known.hostname.clone(), known.profile.clone());
                workload = Workload { node, hostname, profile, ..workload };
            }
            // First adopt, then release: what both rows share is not forgotten in between.
            Some(known) => {
                self.tables.interner.adopt_workload(&mut workload, &mut self.adopted);
                self.tables.unlink_workload(&known);
            }
            None => self.tables.interner.adopt_workload(&mut workload, &mut self.adopted),
        }
        self.tables.link_workload(&Arc::new(workload));
        true
    }

    /// Adds or replaces a service by its key.
    pub fn insert_service(&mut self, service: Service) {
        self.put_service(service);
    }

    /// [`SnapshotBuilder::insert_service`]; says whether it made a difference.
    pub fn put_service(&mut self, mut service: Service) -> bool {
        service.vips.iter_mut().for_each(|vip| vip.ip = canonical(vip.ip));
        service.cidr_vips.iter_mut().for_each(|(_, prefix)| *prefix = prefix.trunc());
        let known = self.tables.service(&service.namespace, &service.hostname).cloned();
        if known.as_deref() == Some(&service) {
            return false;
        }
        self.tables.interner.adopt_service(&mut service);
        if let Some(known) = known {
            self.tables.unlink_service(&known);
        }
        self.tables.link_service(&Arc::new(service));
        true
    }

    /// Removes a workload by uid, or a service by `namespace/hostname`; says whether anything was removed (reference,
    /// dataplane §5.2). A service takes no workload with it: workloads that still name it wait for its return.
    pub fn remove(&mut self, name: &str) -> bool {
        if let Some(workload) = self.tables.workload(name).cloned() {
            self.tables.unlink_workload(&workload);
            return true;
        }
        let Some((namespace, hostname)) = name.split_once('/').filter(|(_, hostname)| !hostname.contains('/')) else { return false };
        let Some(service) = self.tables.service(namespace, hostname).cloned() else { return false };
        self.tables.unlink_service(&service);
        true
    }

    /// The finished snapshot.
    #[must_use]
    pub fn build(self) -> Snapshot {
        Snapshot(Arc::new(self.tables))
    }
}

/// Whether two rows of one uid are found in the same ways and share the same words.
fn same_keys(left: &Workload, right: &Workload) -> bool {
    let (ours, theirs) = ((&left.name, &left.node, &left.hostname), (&right.name, &right.node, &right.hostname));
    ours == theirs && left.addresses == right.addresses && left.profile == right.profile
}

/// One form for equal rows: canonical addresses, each once, and services in order (they arrive as a map).
fn normalise(workload: &mut Workload) {
    let addresses = &mut workload.addresses;
    addresses.iter_mut().for_each(|ip| *ip = canonical(*ip));
    for index in (1..addresses.len()).rev() {
        if addresses.get(..index).zip(addresses.get(index)).is_some_and(|(earlier, ip)| earlier.contains(ip)) {
            addresses.remove(index);
        }
    }
    addresses.shrink_to_fit();
    let profile: &Profile = &workload.profile;
    if !profile.services.is_sorted_by(|(left, _), (right, _)| left < right) {
        let services = &mut Arc::make_mut(&mut workload.profile).services;
        services.sort_by(|(left, _), (right, _)| left.cmp(right));
        services.dedup_by(|(later, _), (earlier, _)| later == earlier);
    }
}

impl Tables {
    fn link_workload(&mut self, workload: &Arc<Workload>) {
        let (uid, profile) = (&workload.uid, &workload.profile);
        let same = |known: &Arc<Workload>| known.uid == *uid;
        self.workloads.put(self.hash(uid), workload.clone(), same);
        if profile.network_mode != NetworkMode::HostNetwork {
            for ip in &workload.addresses {
                self.by_address.put(self.hash_address(&profile.network, bits(*ip)), workload.clone(), same);
            }
        }
        if !workload.hostname.is_empty() {
            self.by_hostname.put(self.hash_pair(&profile.namespace, &workload.hostname), workload.clone(), same);
        }
        for (service, _) in &profile.services {
            let key = grouped(self.hash_pair(&service.namespace, &service.hostname), self.hash(uid));
            self.members.put(key, workload.clone(), same);
        }
        self.link_local(workload);
    }

    fn link_local(&mut self, workload: &Arc<Workload>) {
        if self.local_node.as_ref().is_none_or(|node| *node == workload.node) {
            let key = self.hash_pair(&workload.profile.namespace, &workload.name);
            self.local.put(key, workload.clone(), |known| known.uid == workload.uid);
        }
    }

    fn unlink_workload(&mut self, workload: &Arc<Workload>) {
        let (uid, profile) = (&workload.uid, &workload.profile);
        let same = |known: &Arc<Workload>| known.uid == *uid;
        self.workloads.take(self.hash(uid), same);
        if profile.network_mode != NetworkMode::HostNetwork {
            for ip in &workload.addresses {
                self.by_address.take(self.hash_address(&profile.network, bits(*ip)), same);
            }
        }
        if !workload.hostname.is_empty() {
            self.by_hostname.take(self.hash_pair(&profile.namespace, &workload.hostname), same);
        }
        for (service, _) in &profile.services {
            let key = grouped(self.hash_pair(&service.namespace, &service.hostname), self.hash(uid));
            self.members.take(key, same);
        }
        self.local.take(self.hash_pair(&profile.namespace, &workload.name), same);
        self.interner.release_workload(workload);
    }

    fn link_service(&mut self, service: &Arc<Service>) {
        let same = |known: &Arc<Service>| known.namespace == service.namespace && known.hostname == service.hostname;
        self.services.put(self.hash_pair(&service.namespace, &service.hostname), service.clone(), same);
        self.service_hosts.put(self.hash(&service.hostname), service.clone(), same);
        for vip in &service.vips {
            self.vips.put(self.hash_address(&vip.network, bits(vip.ip)), service.clone(), same);
        }
        for (network, prefix) in &service.cidr_vips {
            self.ranges.put(self.hash_prefix(network, *prefix), service.clone(), same);
            *self.range_lengths.entry(shape(*prefix)).or_default() += 1;
        }
    }

    fn unlink_service(&mut self, service: &Arc<Service>) {
        let same = |known: &Arc<Service>| known.namespace == service.namespace && known.hostname == service.hostname;
        self.services.take(self.hash_pair(&service.namespace, &service.hostname), same);
        self.service_hosts.take(self.hash(&service.hostname), same);
        for vip in &service.vips {
            self.vips.take(self.hash_address(&vip.network, bits(vip.ip)), same);
        }
        for (network, prefix) in &service.cidr_vips {
            self.ranges.take(self.hash_prefix(network, *prefix), same);
            if let Some(count) = self.range_lengths.get_mut(&shape(*prefix)) {
                *count -= 1;
                if *count == 0 {
                    self.range_lengths.remove(&shape(*prefix));
                }
            }
        }
        self.interner.release_service(service);
    }
}

/// Family and length of a prefix.
fn shape(prefix: IpNet) -> (bool, u8) {
    (matches!(prefix.addr(), IpAddr::V6(_)), prefix.prefix_len())
}
