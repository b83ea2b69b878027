//! Edits: the next snapshot from the last one.

use std::collections::HashMap;
use std::fmt;
use std::mem::take;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use ipnet::IpNet;

use super::index::{Index, Slot, grouped};
use super::intern::Adopted;
use super::table::Id;
use super::{Snapshot, Tables, bits};
use crate::model::{Ending, NetworkMode, Profile, Service, Text, Workload, canonical};

/// Makes the next [`Snapshot`] from the last one, sharing all that did not change: an insert or a removal costs
/// microseconds, whatever the size of the mesh. What a snapshot answers depends only on the rows that it holds, never on
/// the order in which they came.
#[derive(Clone, Default)]
pub struct SnapshotBuilder {
    tables: Tables,
    adopted: Adopted,
    /// What is not in the indexes yet: a large push writes each leaf of them once.
    pending: [Vec<Slot>; WAYS],
    /// The same of uids, by their hashes.
    fresh: HashMap<u64, Id, RandomState>,
    local_changed: bool,
    departed: bool,
}

/// The ways to find a workload beside its uid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Address,
    Hostname,
    Member,
    Local,
}

const WAYS: usize = 4;

impl Snapshot {
    /// Continues from this snapshot.
    #[must_use]
    pub fn edit(&self) -> SnapshotBuilder {
        SnapshotBuilder { tables: Tables::clone(&self.0), ..SnapshotBuilder::default() }
    }
}

impl SnapshotBuilder {
    /// Restricts [`Snapshot::local_workload`] to workloads of this node; without it every workload counts as local.
    #[must_use]
    pub fn local_node(mut self, node: Text) -> Self {
        self.settle();
        self.tables.local_node = Some(node);
        self.tables.local = Index::default();
        let local = |workload: &&Arc<Workload>| self.tables.is_local(workload);
        let rows: Vec<_> = self.tables.workloads.iter().filter(local).cloned().collect();
        for workload in rows {
            if let Some((id, _)) = self.tables.workload(&workload.uid) {
                self.tables.local.put(self.tables.hash_pair(&workload.profile.namespace, &workload.name), id);
            }
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
        let uid = self.tables.hash(&workload.uid);
        if self.fresh.contains_key(&uid) {
            self.settle();
        }
        let known = self.tables.workload(&workload.uid).map(|(id, known)| (id, known.clone()));
        let Some((id, known)) = known else {
            self.tables.interner.adopt_workload(&mut workload, &mut self.adopted);
            self.note(&workload);
            let workload = Arc::new(workload);
            let id = self.tables.workloads.put(workload.clone());
            self.fresh.insert(uid, id);
            self.tables.keys(&workload, uid, |way, key| self.pending[way as usize].push(Slot::new(key, id)));
            return true;
        };
        if *known == workload {
            return false;
        }
        self.note(&known);
        self.note(&workload);
        // The usual change, of health or capacity: all keys and shared parts stay.
        if same_keys(&known, &workload) {
            let Workload { uid, name, node, hostname, profile, .. } = Workload::clone(&known);
            workload = Workload { uid, name, node, hostname, profile, ..workload };
        } else {
            // First adopt, then release: what both rows share is not forgotten in between.
            self.tables.interner.adopt_workload(&mut workload, &mut self.adopted);
            self.tables.interner.release_workload(&known, &mut self.adopted);
            self.settle();
            let (mut old, mut new) = (Vec::new(), Vec::new());
            self.tables.keys(&known, uid, |way, key| old.push((way, key)));
            self.tables.keys(&workload, uid, |way, key| new.push((way, key)));
            for (way, key) in old.iter().filter(|key| !new.contains(key)) {
                self.tables.way(*way).take(*key, id);
            }
            for (way, key) in new.iter().filter(|key| !old.contains(key)) {
                self.tables.way(*way).put(*key, id);
            }
        }
        self.tables.workloads.set(id, Arc::new(workload));
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
        let known = self.tables.service(&service.namespace, &service.hostname).map(|(id, known)| (id, known.clone()));
        if known.as_ref().is_some_and(|(_, known)| **known == service) {
            return false;
        }
        self.tables.interner.adopt_service(&mut service, &mut self.adopted);
        if let Some((id, known)) = known {
            self.tables.unlink_service(id, &known);
            self.tables.interner.release_service(&known, &mut self.adopted);
        }
        self.tables.link_service(Arc::new(service));
        true
    }

    /// Removes a workload by uid, or a service by `namespace/hostname`; says whether anything was removed (reference,
    /// dataplane §5.2). A service takes no workload with it: workloads that still name it wait for its return.
    pub fn remove(&mut self, name: &str) -> bool {
        self.settle();
        if let Some((id, workload)) = self.tables.workload(name).map(|(id, workload)| (id, workload.clone())) {
            self.note(&workload);
            self.departed = true;
            let (uid, mut keys) = (self.tables.hash(&workload.uid), Vec::new());
            self.tables.keys(&workload, uid, |way, key| keys.push((way, key)));
            for (way, key) in keys {
                self.tables.way(way).take(key, id);
            }
            self.tables.by_uid.take(uid, id);
            self.tables.workloads.take(id);
            self.tables.interner.release_workload(&workload, &mut self.adopted);
            return true;
        }
        let Some((namespace, hostname)) = name.split_once('/').filter(|(_, hostname)| !hostname.contains('/')) else { return false };
        let Some((id, service)) = self.tables.service(namespace, hostname).map(|(id, service)| (id, service.clone())) else { return false };
        self.tables.unlink_service(id, &service);
        self.tables.interner.release_service(&service, &mut self.adopted);
        true
    }

    /// Whether anything changed about the workloads of the local node.
    #[must_use]
    pub fn local_changed(&self) -> bool {
        self.local_changed
    }

    /// Whether any workload was removed.
    #[must_use]
    pub fn departed(&self) -> bool {
        self.departed
    }

    /// The finished snapshot.
    #[must_use]
    pub fn build(mut self) -> Snapshot {
        self.settle();
        self.tables.interner.settle(&mut self.adopted);
        Snapshot(Arc::new(self.tables))
    }

    /// A row that comes or goes.
    fn note(&mut self, workload: &Workload) {
        self.local_changed |= self.tables.is_local(workload);
    }

    /// Brings the indexes up to date.
    fn settle(&mut self) {
        if self.fresh.is_empty() {
            return;
        }
        self.tables.by_uid.extend(self.fresh.drain().map(|(key, id)| Slot::new(key, id)).collect());
        for way in [Way::Address, Way::Hostname, Way::Member, Way::Local] {
            let slots = take(&mut self.pending[way as usize]);
            self.tables.way(way).extend(slots);
        }
    }
}

impl fmt::Debug for SnapshotBuilder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.tables, formatter)
    }
}

/// Whether two rows of one uid are found in the same ways and share the same words.
fn same_keys(left: &Workload, right: &Workload) -> bool {
    let (ours, theirs) = ((&left.name, &left.node, &left.hostname), (&right.name, &right.node, &right.hostname));
    ours == theirs && left.addresses == right.addresses && left.profile == right.profile
}

/// One form for equal rows: canonical addresses, each once, and services in order (they arrive as a map).
fn normalise(workload: &mut Workload) {
    workload.addresses = take(&mut workload.addresses).into_canonical();
    workload.name = Ending::of(&workload.uid, &workload.name);
    let profile: &Profile = &workload.profile;
    if !profile.services.is_sorted_by(|(left, _), (right, _)| left < right) {
        let services = &mut Arc::make_mut(&mut workload.profile).services;
        services.sort_by(|(left, _), (right, _)| left.cmp(right));
        services.dedup_by(|(later, _), (earlier, _)| later == earlier);
    }
}

impl Tables {
    /// All keys under which a workload is found beside that of its uid, whose hash is `uid`.
    fn keys(&self, workload: &Workload, uid: u64, mut visit: impl FnMut(Way, u64)) {
        let profile = &workload.profile;
        if profile.network_mode != NetworkMode::HostNetwork {
            workload.addresses.iter().for_each(|ip| visit(Way::Address, self.hash_address(&profile.network, bits(*ip))));
        }
        if !workload.hostname.is_empty() {
            visit(Way::Hostname, self.hash_pair(&profile.namespace, &workload.hostname));
        }
        profile.services.iter().for_each(|(key, _)| visit(Way::Member, grouped(self.hash_pair(&key.namespace, &key.hostname), uid)));
        if self.is_local(workload) {
            visit(Way::Local, self.hash_pair(&profile.namespace, &workload.name));
        }
    }

    fn way(&mut self, way: Way) -> &mut Index {
        match way {
            Way::Address => &mut self.by_address,
            Way::Hostname => &mut self.by_hostname,
            Way::Member => &mut self.members,
            Way::Local => &mut self.local,
        }
    }

    fn is_local(&self, workload: &Workload) -> bool {
        self.local_node.as_ref().is_none_or(|node| *node == workload.node)
    }

    fn link_service(&mut self, service: Arc<Service>) {
        let id = self.services.put(service.clone());
        self.by_key.put(self.hash_pair(&service.namespace, &service.hostname), id);
        self.service_hosts.put(self.hash(&service.hostname), id);
        for vip in &service.vips {
            self.vips.put(self.hash_address(&vip.network, bits(vip.ip)), id);
        }
        for (network, prefix) in &service.cidr_vips {
            self.ranges.put(self.hash_prefix(network, *prefix), id);
            *self.range_lengths.entry(shape(*prefix)).or_default() += 1;
        }
    }

    fn unlink_service(&mut self, id: Id, service: &Service) {
        self.services.take(id);
        self.by_key.take(self.hash_pair(&service.namespace, &service.hostname), id);
        self.service_hosts.take(self.hash(&service.hostname), id);
        for vip in &service.vips {
            self.vips.take(self.hash_address(&vip.network, bits(vip.ip)), id);
        }
        for (network, prefix) in &service.cidr_vips {
            self.ranges.take(self.hash_prefix(network, *prefix), id);
            if let Some(count) = self.range_lengths.get_mut(&shape(*prefix)) {
                *count -= 1;
                if *count == 0 {
                    self.range_lengths.remove(&shape(*prefix));
                }
            }
        }
    }
}

/// Family and length of a prefix.
fn shape(prefix: IpNet) -> (bool, u8) {
    (matches!(prefix.addr(), IpAddr::V6(_)), prefix.prefix_len())
}
