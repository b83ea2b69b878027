//! One push into the world: which resources it brings, which of them are refused, and what is held afterwards (reference, dataplane §5.5, 5.6).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::reader::Reader;
use super::rows::{Row, shown};
use super::{Kind, policy};
use crate::discovery::{Draft, Edit, Publisher};
use crate::model::Text;
use crate::policy::Validity;
use crate::wire::google::{Any, Status};
use crate::wire::xds::{DeltaDiscoveryResponse, Resource};

/// A larger resource is refused: an object of Kubernetes cannot be so large.
const MAX_RESOURCE: usize = 2 << 20;
/// So many refusals are told to the server by name.
const TOLD: usize = 20;

/// What the server has told us, by the names of its resources: what we say that we have when a stream begins.
#[derive(Debug)]
pub(super) struct Applier {
    publisher: Publisher,
    /// Until every kind in `first` was heard of, what is to be published waits here: a world whose policies are not known yet would permit.
    waiting: Option<Draft>,
    first: Vec<Kind>,
    addresses: HashMap<Text, Held, foldhash::fast::RandomState>,
    policies: HashMap<Text, Version, foldhash::fast::RandomState>,
}

/// An address that is in the world.
#[derive(Debug, Clone)]
struct Held {
    version: Version,
    /// What it is known by there, if that is not the name of the resource.
    key: Option<Box<Text>>,
}

/// The version of a resource. istiod's are 16 hexadecimal digits, of which there may be 100,000.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Version {
    Hexadecimal(u64),
    Other(Box<str>),
}

impl Version {
    fn of(text: &str) -> Self {
        let digits = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match u64::from_str_radix(text, 16) {
            Ok(number) if digits => Self::Hexadecimal(number),
            _ => Self::Other(text.into()),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Hexadecimal(number) => format!("{number:016x}"),
            Self::Other(text) => text.to_string(),
        }
    }
}

/// What became of one push.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// What was refused, and why.
    pub(super) refused: Vec<(String, String)>,
    /// How many more were.
    pub(super) refused_more: usize,
    /// Whether a new world was published.
    pub(super) changed: bool,
    /// Bytes of the resources.
    pub(super) bytes: usize,
    /// Names that the push has something for: those of its resources and their aliases.
    pub(super) found: Vec<String>,
    /// Names that the push says there is nothing for.
    pub(super) gone: Vec<String>,
}

impl Applied {
    fn refuse(&mut self, name: &str, reason: String) {
        if self.refused.len() < TOLD {
            self.refused.push((shown(name), reason));
        } else {
            self.refused_more += 1;
        }
    }

    /// How many resources were refused.
    pub(super) fn refusals(&self) -> usize {
        self.refused.len() + self.refused_more
    }

    /// The refusals as the server is told of them; `None` if there are none.
    pub(super) fn error_detail(&self) -> Option<Status> {
        let named = self.refused.iter().map(|(name, reason)| format!("{name}: {reason}"));
        let more = (self.refused_more > 0).then(|| format!("and {} more", self.refused_more));
        let message = named.chain(more).collect::<Vec<_>>().join("; ");
        (!message.is_empty()).then_some(Status { code: 0, message })
    }
}

impl Applier {
    /// Publishes nothing until each kind of `first` has had its first push.
    pub(super) fn new(publisher: Publisher, first: Vec<Kind>) -> Self {
        Self { publisher, waiting: None, first, addresses: HashMap::default(), policies: HashMap::default() }
    }

    /// Whether everything that must be heard of before the first world was.
    pub(super) fn is_synced(&self) -> bool {
        self.first.is_empty()
    }

    pub(super) fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// Every resource that is held, with its version: `initial_resource_versions` of a new stream.
    pub(super) fn held(&self, kind: Kind) -> impl Iterator<Item = (String, String)> + '_ {
        let addresses = self.addresses.iter().map(|(name, held)| (name, &held.version));
        let (addresses, policies) = match kind {
            Kind::Address => (Some(addresses), None),
            Kind::Authorization => (None, Some(self.policies.iter())),
        };
        addresses.into_iter().flatten().chain(policies.into_iter().flatten()).map(|(name, version)| (name.to_string(), version.text()))
    }

    /// Applies a push as one world. `whole` says that what is held and not in it is gone: the server was not told what we have. `asked` says
    /// whether anybody waits for names.
    pub(super) fn apply(&mut self, kind: Kind, mut push: DeltaDiscoveryResponse, whole: bool, asked: bool) -> Applied {
        let mut applied = Applied::default();
        if whole {
            let there: HashSet<&str> = push.resources.iter().map(|resource| resource.name.as_str()).collect();
            let gone: Vec<String> = self.held(kind).map(|(name, _)| name).filter(|name| !there.contains(name.as_str())).collect();
            push.removed_resources.extend(gone);
        }
        applied.bytes = push.resources.iter().filter_map(|resource| resource.resource.as_ref()).map(|any| any.value.len()).sum();
        if asked {
            let named = push.resources.iter().flat_map(|resource| resource.aliases.iter().chain([&resource.name]));
            (applied.found, applied.gone) = (named.cloned().collect(), push.removed_resources.clone());
        }
        let mut draft = self.waiting.take().unwrap_or_else(|| self.publisher.draft());
        // Removals first: what is both removed and there is there.
        match kind {
            Kind::Address => self.remove_addresses(push.removed_resources, &mut draft),
            Kind::Authorization => {
                for name in push.removed_resources {
                    self.policies.remove(name.as_str());
                    draft.apply(Edit::RemovePolicy(policy::key(&name)));
                }
            }
        }
        let mut seen: HashSet<&str, foldhash::fast::RandomState> = HashSet::default();
        seen.reserve(push.resources.len());
        if kind == Kind::Address && self.addresses.is_empty() {
            self.addresses.reserve(push.resources.len());
        }
        let mut reader = Reader::default();
        for resource in &push.resources {
            let again = !seen.insert(resource.name.as_str());
            match kind {
                Kind::Address => self.add_address(resource, again, (&mut reader, &mut draft), &mut applied),
                Kind::Authorization => self.add_policy(resource, again, &mut draft, &mut applied),
            }
        }
        self.first.retain(|missing| *missing != kind);
        if self.first.is_empty() {
            applied.changed = self.publisher.publish_draft(draft);
        } else {
            self.waiting = Some(draft);
        }
        applied
    }

    fn remove_addresses(&mut self, names: Vec<String>, draft: &mut Draft) {
        for name in names {
            let key = self.addresses.remove(name.as_str()).and_then(|held| held.key);
            draft.apply(Edit::Remove(key.map_or_else(|| name.into(), |key| *key)));
        }
    }

    fn add_address(&mut self, from: &Resource, again: bool, (reader, draft): (&mut Reader, &mut Draft), applied: &mut Applied) {
        match content(from, Kind::Address, again).and_then(|any| reader.row(&any.value)) {
            Err(reason) => applied.refuse(&from.name, reason),
            Ok(mut row) => {
                let key = row.key();
                let other = (key != *from.name).then(|| Box::new(key.clone()));
                let version = Version::of(&from.version);
                match self.addresses.entry(if other.is_none() { key } else { from.name.as_str().into() }) {
                    Entry::Occupied(mut known) => {
                        // What the resource was before under another key goes.
                        if let Some(old) = known.get().key.clone().filter(|old| other.as_ref() != Some(old)) {
                            draft.apply(Edit::Remove(*old));
                        }
                        if let (Row::Workload(workload), None) = (&mut row, &other) {
                            // One memory for the name in the row and here.
                            workload.uid = known.key().clone();
                        }
                        known.insert(Held { version, key: other });
                    }
                    Entry::Vacant(place) => drop(place.insert(Held { version, key: other })),
                }
                draft.apply(match row {
                    Row::Workload(workload) => Edit::Workload(workload),
                    Row::Service(service) => Edit::Service(service),
                });
            }
        }
    }

    fn add_policy(&mut self, from: &Resource, again: bool, draft: &mut Draft, applied: &mut Applied) {
        let policy = match content(from, Kind::Authorization, again) {
            Ok(any) => policy::policy(&from.name, &any.value),
            Err(reason) => policy::refused(&from.name, from.resource.as_ref(), reason),
        };
        let version = match &policy.validity {
            Validity::Valid => Version::of(&from.version),
            Validity::Invalid(reason) => {
                applied.refuse(&from.name, format!("{reason} (it denies all of its targets)"));
                // Held, so that we hear of its removal; without a version, so that it is sent again.
                Version::of("")
            }
        };
        self.policies.insert(from.name.as_str().into(), version);
        draft.apply(Edit::Policy(policy));
    }
}

/// What a resource holds, if it can be looked at.
fn content(resource: &Resource, kind: Kind, again: bool) -> Result<&Any, String> {
    let any = resource.resource.as_ref().ok_or_else(|| "it has no content".to_owned())?;
    if again {
        return Err("it is in one push twice".to_owned());
    }
    if any.value.len() + resource.name.len() > MAX_RESOURCE {
        return Err(format!("it has {} bytes, more than {MAX_RESOURCE}", any.value.len() + resource.name.len()));
    }
    if any.type_url != kind.type_url() {
        return Err(format!("it is of type {}", shown(&any.type_url)));
    }
    Ok(any)
}

#[cfg(test)]
mod tests;
