//! What one client wants of one type and what it has: pure bookkeeping, from requests and catalogs to what is to be sent next.
//!
//! The invariant, which `tests/control.rs` holds against any schedule: whatever was sent, applied in order, makes the client's view equal to
//! [`Subscription::sent`], and after an update that is the current content of everything the client wants. For a wildcard client `sent` is a
//! clone of the catalog's set and costs nothing of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::catalog::{Catalog, Change, Entry, Kind, Set};
use super::lookup::{self, Found};
use crate::model::Text;
use crate::wire::xds::{DeltaDiscoveryRequest, WILDCARD};

/// Names that one client may subscribe to.
pub(super) const MOST_NAMES: usize = 65_536;

/// A longer name names nothing.
const LONGEST_NAME: usize = 1024;

/// Why a client's stream ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("more than {MOST_NAMES} names are subscribed")]
    TooManyNames,
    #[error("a resource name is longer than {LONGEST_NAME} bytes")]
    LongName,
}

/// What goes out in one response.
#[derive(Debug, Clone)]
pub(super) struct Push {
    pub(super) kind: Kind,
    pub(super) upserts: Upserts,
    pub(super) removed: Vec<String>,
}

#[derive(Debug, Clone)]
pub(super) enum Upserts {
    /// A whole set.
    All(Set),
    Some(Vec<Item>),
}

/// A resource, and the names it was asked for by that it does not have itself (an address within its range).
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) entry: Arc<Entry>,
    pub(super) aliases: Vec<String>,
}

impl From<&Arc<Entry>> for Item {
    fn from(entry: &Arc<Entry>) -> Self {
        Self { entry: entry.clone(), aliases: Vec::new() }
    }
}

/// Which half of an update: policies come before the workloads that name them, and go after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Upserts,
    Everything,
}

/// One client's subscription to one type.
#[derive(Debug)]
pub(super) struct Subscription {
    kind: Kind,
    /// The client's node, if it said so.
    node: Option<Text>,
    wildcard: bool,
    /// Names that it asked for, whether or not there is such a thing.
    requested: BTreeSet<Text>,
    sent: Set,
    /// The epoch of the catalog that `sent` was last made equal to.
    epoch: Option<u64>,
}

impl Subscription {
    /// The first request of a type, and what answers it: always something, because clients wait for it.
    pub(super) fn first(kind: Kind, node: Option<Text>, request: &DeltaDiscoveryRequest, catalog: &Catalog) -> Result<(Self, Push), Refused> {
        let subscribes = &request.resource_names_subscribe;
        let has = |names: &[String]| names.iter().any(|name| name == WILDCARD);
        let wildcard = (subscribes.is_empty() || has(subscribes)) && !has(&request.resource_names_unsubscribe);
        let mut own = Self { kind, node, wildcard, requested: BTreeSet::new(), sent: Set::default(), epoch: None };
        own.note(subscribes, &request.resource_names_unsubscribe)?;
        let listed = &request.initial_resource_versions;
        let push = if wildcard { own.resume_all(listed, catalog) } else { own.resume_some(listed, request, catalog)? };
        Ok((own, push))
    }

    /// A later request, and what answers it, if it asks for anything.
    pub(super) fn request(&mut self, request: &DeltaDiscoveryRequest, catalog: &Catalog) -> Result<Option<Push>, Refused> {
        let (subscribes, unsubscribes) = (&request.resource_names_subscribe, &request.resource_names_unsubscribe);
        if subscribes.is_empty() && unsubscribes.is_empty() {
            return Ok(None);
        }
        self.note(subscribes, unsubscribes)?;
        let has = |names: &[String]| names.iter().any(|name| name == WILDCARD);
        if has(unsubscribes) && self.wildcard {
            // It keeps what it asks for by name, and drops the rest.
            (self.wildcard, self.sent) = (false, Set::default());
        } else if has(subscribes) {
            self.wildcard = true;
        }
        self.forget(unsubscribes, catalog);
        self.epoch = None;
        if subscribes.iter().all(|name| unsubscribes.contains(name)) {
            return Ok(None);
        }
        // Before the answer: what it brings up to date need not be sent again.
        let mut push = self.update(catalog, Part::Everything).unwrap_or_else(|| self.empty());
        self.answer(subscribes, catalog, &mut push);
        Ok(Some(push))
    }

    /// What changed since the last update, if anything did that concerns this client.
    pub(super) fn update(&mut self, catalog: &Catalog, part: Part) -> Option<Push> {
        if self.epoch == Some(catalog.epoch) {
            return None;
        }
        let current = catalog.set(self.kind);
        let mut push = self.empty();
        if self.wildcard && self.sent.entries.is_empty() {
            push.upserts = Upserts::All(current.clone());
            self.sent = current.clone();
        } else {
            let wanted = if self.wildcard { None } else { Some(self.wanted(catalog)) };
            let target = wanted.as_ref().unwrap_or(current);
            let (mut upserts, mut removed) = (Vec::new(), Vec::new());
            for change in self.sent.changes(target) {
                match change {
                    Change::Upsert(entry) => upserts.push(Item::from(entry)),
                    Change::Remove(name) => removed.push(name.as_str().to_owned()),
                }
            }
            if part == Part::Upserts && !removed.is_empty() {
                for item in &upserts {
                    self.sent.insert(item.entry.clone());
                }
                removed.clear();
            } else {
                self.sent = target.clone();
            }
            (push.upserts, push.removed) = (Upserts::Some(upserts), removed);
        }
        if part == Part::Everything {
            self.epoch = Some(catalog.epoch);
        }
        (!push.is_empty()).then_some(push)
    }

    /// What the client has.
    #[cfg(test)]
    pub(super) fn sent(&self) -> &Set {
        &self.sent
    }

    /// A wildcard client that kept something from an earlier stream.
    fn resume_all(&mut self, listed: &BTreeMap<String, String>, catalog: &Catalog) -> Push {
        let current = catalog.set(self.kind);
        let mut push = self.empty();
        push.removed = listed.keys().filter(|name| current.get(name).is_none()).cloned().collect();
        push.upserts = if listed.is_empty() {
            Upserts::All(current.clone())
        } else {
            let differs = |entry: &&Arc<Entry>| listed.get(entry.name.as_str()) != Some(&entry.version);
            Upserts::Some(current.entries.values().filter(differs).map(Item::from).collect())
        };
        self.sent = current.clone();
        self.epoch = Some(catalog.epoch);
        push
    }

    /// A client on demand that may have kept something. Services that it has count as asked for, so that it hears of new endpoints; workloads are
    /// kept up to date, but bring nothing else, or what it has would grow with every reconnect.
    fn resume_some(&mut self, listed: &BTreeMap<String, String>, request: &DeltaDiscoveryRequest, catalog: &Catalog) -> Result<Push, Refused> {
        let mut answered: Vec<String> = request.resource_names_subscribe.clone();
        let mut gone = Vec::new();
        for (name, version) in listed {
            let Some(entry) = catalog.set(self.kind).get(name) else {
                // A name that it waits for, or something that no longer is.
                self.ask(name)?;
                let known = self.kind == Kind::Address && !lookup::named(catalog, name).is_empty();
                if known {
                    answered.push(name.clone())
                } else {
                    gone.push(name.clone())
                }
                continue;
            };
            if !matches!(entry.row, super::catalog::Row::Workload(_)) {
                self.ask(name)?;
            }
            // What it has in another version is changed like everything else: put there as what it never had.
            if *version == entry.version {
                self.sent.insert(entry.clone());
            } else {
                answered.push(name.clone());
            }
        }
        let mut push = self.update(catalog, Part::Everything).unwrap_or_else(|| self.empty());
        self.answer(&answered, catalog, &mut push);
        push.removed.extend(gone);
        push.removed.sort();
        push.removed.dedup();
        Ok(push)
    }

    /// Makes sure that every one of these names is answered, with the resource or as removed.
    fn answer(&mut self, names: &[String], catalog: &Catalog, push: &mut Push) {
        let mut removed: BTreeSet<String> = std::mem::take(&mut push.removed).into_iter().collect();
        let mut whole = Vec::new();
        // What is within a whole set is answered; its names only have to be known.
        let items = if let Upserts::Some(items) = &mut push.upserts { items } else { &mut whole };
        let mut there: BTreeMap<Text, usize> = items.iter().enumerate().map(|(index, item)| (item.entry.name.clone(), index)).collect();
        for name in names.iter().filter(|name| *name != WILDCARD) {
            let found = match self.kind {
                Kind::Address => lookup::named(catalog, name),
                Kind::Authorization => catalog.policies.get(name).cloned().into_iter().collect(),
            };
            if found.is_empty() {
                removed.insert(name.clone());
            }
            for entry in found {
                let index = *there.entry(entry.name.clone()).or_insert_with(|| {
                    items.push(Item::from(&entry));
                    items.len() - 1
                });
                self.sent.insert(entry.clone());
                let knows = entry.name == name.as_str() || entry.row.aliases().contains(name);
                if let Some(item) = items.get_mut(index).filter(|_| !knows) {
                    item.aliases.push(name.clone());
                }
            }
        }
        push.removed = removed.into_iter().collect();
    }

    /// What a client on demand should have: what it asked for with what belongs to it, its node's workloads, and whatever else it has that still
    /// exists. Something that merely no longer belongs to what it asked for is not gone, and must not be called so.
    fn wanted(&self, catalog: &Catalog) -> Set {
        let current = catalog.set(self.kind);
        let mut wanted = self.sent.clone();
        for (name, known) in &self.sent.entries {
            match current.get(name) {
                None => wanted.remove(name),
                Some(entry) if entry != known => wanted.insert(entry.clone()),
                Some(_) => {}
            }
        }
        let mut found = Found::new();
        for name in &self.requested {
            match self.kind {
                Kind::Address => lookup::named(catalog, name).iter().for_each(|entry| lookup::add(catalog, entry, &mut found)),
                Kind::Authorization => found.extend(current.get(name).map(|entry| (name.clone(), entry.clone()))),
            }
        }
        if let (Kind::Address, Some(node)) = (self.kind, &self.node) {
            lookup::add_node(catalog, node, &mut found);
        }
        for (name, entry) in found {
            if wanted.get(&name).is_none_or(|known| known != &entry) {
                wanted.insert(entry);
            }
        }
        wanted
    }

    fn note(&mut self, subscribes: &[String], unsubscribes: &[String]) -> Result<(), Refused> {
        for name in subscribes.iter().filter(|name| *name != WILDCARD) {
            self.ask(name)?;
        }
        for name in unsubscribes {
            self.requested.remove(name.as_str());
        }
        Ok(())
    }

    fn ask(&mut self, name: &str) -> Result<(), Refused> {
        if name.len() > LONGEST_NAME {
            return Err(Refused::LongName);
        }
        self.requested.insert(name.into());
        if self.requested.len() > MOST_NAMES { Err(Refused::TooManyNames) } else { Ok(()) }
    }

    /// A client on demand that no longer wants a name drops what it means; what belongs to it is kept up to date until it goes away.
    fn forget(&mut self, names: &[String], catalog: &Catalog) {
        if self.wildcard {
            return;
        }
        for name in names {
            self.sent.remove(name);
            if self.kind == Kind::Address {
                lookup::named(catalog, name).iter().for_each(|entry| self.sent.remove(&entry.name));
            }
        }
    }

    fn empty(&self) -> Push {
        Push { kind: self.kind, upserts: Upserts::Some(Vec::new()), removed: Vec::new() }
    }
}

impl Push {
    pub(super) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.len() == 0
    }

    /// Number of resources.
    pub(super) fn len(&self) -> usize {
        match &self.upserts {
            Upserts::All(set) => set.entries.len(),
            Upserts::Some(items) => items.len(),
        }
    }
}

#[cfg(test)]
mod tests;
