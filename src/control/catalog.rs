//! Every resource that clients can be told of, encoded once and shared by all of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};
use prost::Message;

use super::encode;
use crate::discovery::World;
use crate::model::{Service, Snapshot, Text, Workload};
use crate::policy::Authorization;
use crate::wire::google::Any;
use crate::wire::workload::{Address, AddressType};
use crate::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};

/// A larger object is not sent: it would take every client's memory, and no real one comes near.
const LARGEST: usize = 16 << 20;

/// What a type's resources are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Authorization policies.
    Authorization,
    /// Workloads and services.
    Address,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Authorization, Self::Address];

    pub(super) fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    pub(super) fn type_url(self) -> &'static str {
        match self {
            Self::Authorization => AUTHORIZATION_TYPE,
            Self::Address => ADDRESS_TYPE,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Authorization => "authorization",
            Self::Address => "address",
        }
    }
}

/// The row that a resource was made of.
#[derive(Debug, Clone)]
pub(super) enum Row {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(Arc<Authorization>),
}

impl Row {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Workload(own), Self::Workload(other)) => Arc::ptr_eq(own, other),
            (Self::Service(own), Self::Service(other)) => Arc::ptr_eq(own, other),
            (Self::Policy(own), Self::Policy(other)) => Arc::ptr_eq(own, other),
            _ => false,
        }
    }

    /// Other names by which it can be asked for: `<network>/<address>`, and `<network>/<address>/<length>` for ranges.
    pub(super) fn aliases(&self) -> Vec<String> {
        match self {
            Self::Policy(_) => Vec::new(),
            Self::Workload(workload) if workload.profile.network_mode == crate::model::NetworkMode::HostNetwork => Vec::new(),
            Self::Workload(workload) => workload.addresses.iter().map(|ip| format!("{}/{ip}", workload.profile.network)).collect(),
            Self::Service(service) => {
                let exact = service.vips.iter().map(ToString::to_string);
                exact.chain(service.cidr_vips.iter().map(|(network, range)| format!("{network}/{range}"))).collect()
            }
        }
    }
}

/// One resource as it goes over the wire. Equal versions have equal content.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Text,
    /// 16 hexadecimal digits of the content's hash: the same in every process, so that a client that reconnects to another replica, or to this one
    /// after a restart, hears of what changed and of nothing else.
    pub(super) version: String,
    /// The encoded `Resource`, without tag and length.
    pub(super) body: Bytes,
    pub(super) row: Row,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version
    }
}

impl Entry {
    fn new(name: Text, row: Row) -> Result<Self, usize> {
        let (kind, content) = match &row {
            Row::Workload(workload) => (Kind::Address, address(AddressType::Workload(encode::workload(workload)))),
            Row::Service(service) => (Kind::Address, address(AddressType::Service(encode::service(service)))),
            Row::Policy(policy) => (Kind::Authorization, encode::authorization(policy).encode_to_vec()),
        };
        if content.len() > LARGEST {
            return Err(content.len());
        }
        let hash = digest(&SHA256, &content);
        let version = hash.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
        let resource = Resource {
            version: version.clone(),
            resource: Some(Any { type_url: kind.type_url().to_owned(), value: content.into() }),
            name: name.as_str().to_owned(),
            aliases: row.aliases(),
        };
        Ok(Self { name, version, body: resource.encode_to_vec().into(), row })
    }
}

fn address(kind: AddressType) -> Vec<u8> {
    Address { r#type: Some(kind) }.encode_to_vec()
}

/// All resources of a type by name. A clone shares what did not change, so whoever keeps an old one keeps little.
#[derive(Debug, Clone, Default)]
pub(super) struct Set {
    pub(super) entries: OrdMap<Text, Arc<Entry>>,
    /// Sum of the lengths of all bodies.
    pub(super) bytes: usize,
}

impl Set {
    pub(super) fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.get(name)
    }

    /// Differences of another set from this one.
    pub(super) fn changes<'a>(&'a self, newer: &'a Self) -> impl Iterator<Item = Change<'a>> {
        self.entries.diff(&newer.entries).map(|item| match item {
            DiffItem::Add(_, entry) | DiffItem::Update { new: (_, entry), .. } => Change::Upsert(entry),
            DiffItem::Remove(name, _) => Change::Remove(name),
        })
    }

    pub(super) fn insert(&mut self, entry: Arc<Entry>) {
        self.bytes += entry.body.len();
        if let Some(old) = self.entries.insert(entry.name.clone(), entry) {
            self.bytes -= old.body.len();
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        if let Some(old) = self.entries.remove(name) {
            self.bytes -= old.body.len();
        }
    }

    /// Makes one entry what its row says. Says whether it did; what cannot be sent is an error and keeps what was there.
    fn put(&mut self, name: &Text, row: Row, stand_in: impl FnOnce(usize) -> Option<Row>) -> bool {
        let old = self.entries.get(name);
        if old.is_some_and(|old| old.row.is(&row)) {
            return false;
        }
        let entry = Entry::new(name.clone(), row).or_else(|length| {
            tracing::error!(name = name.as_str(), length, "the object is not sent: it is larger than {LARGEST} bytes");
            stand_in(length).map_or(Err(length), |row| Entry::new(name.clone(), row))
        });
        match entry {
            // A row that only looks new (an edit that was taken back): the old entry stays, and with it what others share.
            Ok(entry) if old.is_some_and(|old| **old == entry) => false,
            Ok(entry) => {
                self.insert(Arc::new(entry));
                true
            }
            Err(_) => {
                let known = old.is_some();
                self.remove(name);
                known
            }
        }
    }
}

/// One difference between two sets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change<'a> {
    Upsert(&'a Arc<Entry>),
    Remove(&'a Text),
}

/// Everything at one moment. Never changes.
#[derive(Debug, Clone, Default)]
pub(super) struct Catalog {
    /// Counts the catalogs of a process, from 1 for the first that was published.
    pub(super) epoch: u64,
    pub(super) addresses: Set,
    pub(super) policies: Set,
    /// For look-ups by address and host name.
    pub(super) snapshot: Snapshot,
    /// Uids by node.
    pub(super) nodes: OrdMap<Text, OrdSet<Text>>,
}

impl Catalog {
    pub(super) fn set(&self, kind: Kind) -> &Set {
        match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.policies,
        }
    }

    /// The catalog of a world; shares everything with this one that did not change. `None` if nothing did.
    pub(super) fn next(&self, world: &World) -> Option<Self> {
        let mut next = Self { epoch: self.epoch + 1, snapshot: world.snapshot.clone(), ..self.clone() };
        let mut changed = false;
        for name in self.addresses.entries.keys().filter(|name| !names_something(&world.snapshot, name)) {
            next.addresses.remove(name);
            changed = true;
        }
        for service in world.snapshot.services() {
            changed |= next.addresses.put(&service.key().to_string().into(), Row::Service(service.clone()), |_| None);
        }
        let mut nodes: BTreeMap<Text, OrdSet<Text>> = BTreeMap::new();
        for workload in world.snapshot.workloads() {
            changed |= next.addresses.put(&workload.uid, Row::Workload(workload.clone()), |_| None);
            if !workload.node.is_empty() {
                nodes.entry(workload.node.clone()).or_default().insert(workload.uid.clone());
            }
        }
        next.nodes = nodes.into_iter().collect();
        for name in self.policies.entries.keys().filter(|name| world.policies.get(name).is_none()) {
            next.policies.remove(name);
            changed = true;
        }
        for policy in world.policies.iter() {
            // Left out, it would leave open what it closes.
            let deny = |length: usize| {
                let reason = format!("it has {length} bytes, too many to be sent");
                let invalid = Authorization::invalid(policy.name.clone(), policy.namespace.clone(), policy.scope, policy.action, reason);
                Some(Row::Policy(Arc::new(invalid)))
            };
            changed |= next.policies.put(&policy.key(), Row::Policy(policy.clone()), deny);
        }
        changed.then_some(next)
    }
}

fn names_something(snapshot: &Snapshot, name: &Text) -> bool {
    snapshot.workload(name).is_some() || service_of(snapshot, name).is_some()
}

/// A service by its resource name, `<namespace>/<host name>`.
pub(super) fn service_of(snapshot: &Snapshot, name: &str) -> Option<Arc<Service>> {
    let (namespace, hostname) = name.split_once('/').filter(|(_, hostname)| !hostname.contains('/'))?;
    snapshot.service(&crate::model::NamespacedHostname { namespace: namespace.into(), hostname: hostname.into() })
}
