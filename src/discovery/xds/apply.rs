//! One push into the world: which resources it brings, which of them are refused, and what is held afterwards (reference, dataplane §5.5, 5.6).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::reader::Reader;
use super::rows::{Row, shown};
use super::{Kind, policy};
use crate::discovery::{Draft, Edit, Publisher};
use crate::model::Text;
use crate::policy::Validity;
use crate::wire::google::Status;
use crate::wire::xds::{EncodedPush, ResourceView};

/// A larger resource is refused: an object of Kubernetes cannot be so large.
const MAX_RESOURCE: usize = 2 << 20;
/// So many refusals are told to the server by name.
const TOLD: usize = 20;

/// What the server has told us, by the names of its resources: what we say that we have when a stream begins.
#[derive(Debug)]
pub(super) struct Applier {
    publisher: Publisher,
    /// What is published next. It waits until every kind in `first` was heard of: a world whose policies are not known yet would permit.
    drawn: Option<Draft>,
    first: Vec<Kind>,
    addresses: HashMap<Text, Held, foldhash::fast::RandomState>,
    policies: HashMap<Text, Held, foldhash::fast::RandomState>,
    /// Counts the pushes.
    pushes: u32,
}

/// A resource that is in the world. There may be 100,000, so each has 16 bytes.
#[derive(Debug, Clone)]
enum Held {
    /// An address known there by the name of the resource, with a version as istiod makes them.
    Usual {
        /// The push that told of it last.
        push: u32,
        version: u64,
    },
    Other {
        push: u32,
        other: Box<Other>,
    },
}

#[derive(Debug, Clone)]
struct Other {
    version: Version,
    /// What it is known by, if that is not the name of the resource.
    key: Option<Text>,
}

impl Held {
    fn new(push: u32, version: Version, key: Option<Text>) -> Self {
        match (version, key) {
            (Version::Hexadecimal(version), None) => Self::Usual { push, version },
            (version, key) => Self::Other { push, other: Box::new(Other { version, key }) },
        }
    }

    fn version(&self) -> String {
        match self {
            Self::Usual { version, .. } => Version::Hexadecimal(*version).text(),
            Self::Other { other, .. } => other.version.text(),
        }
    }

    fn key(&self) -> Option<&Text> {
        match self {
            Self::Usual { .. } => None,
            Self::Other { other, .. } => other.key.as_ref(),
        }
    }

    fn push(&mut self) -> &mut u32 {
        match self {
            Self::Usual { push, .. } | Self::Other { push, .. } => push,
        }
    }
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
        Self { publisher, drawn: None, first, addresses: HashMap::default(), policies: HashMap::default(), pushes: 0 }
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
        let held = match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.policies,
        };
        held.iter().map(|(name, held)| (name.to_string(), held.version()))
    }

    /// Publishes what was drawn as one world, unless a kind was not heard of yet; says whether it did.
    pub(super) fn publish(&mut self) -> bool {
        let drawn = if self.is_synced() { self.drawn.take() } else { None };
        drawn.is_some_and(|drawn| self.publisher.publish_draft(drawn))
    }

    /// Whether [`Applier::publish`] may take some time.
    pub(super) fn is_slow(&self) -> bool {
        self.is_synced() && self.drawn.as_ref().is_some_and(Draft::is_slow)
    }

    /// Applies a push to the world that is published next. `whole` says that what is held and not in it is gone: the server was not told what we have. `asked` says
    /// whether anybody waits for names.
    ///
    /// # Errors
    /// When it is none: a policy cannot be read so far that its name is known. Nothing is applied then.
    pub(super) fn draw(&mut self, kind: Kind, push: EncodedPush, whole: bool, asked: bool) -> Result<Applied, String> {
        let mut applied = Applied::default();
        if kind == Kind::Authorization {
            push.resources.iter().try_for_each(|encoded| ResourceView::read(encoded).map(drop))?;
        }
        self.pushes = self.pushes.wrapping_add(1);
        let mut draft = self.drawn.take().unwrap_or_else(|| self.publisher.draft());
        let mut gone = push.removed_resources;
        if whole {
            let there: HashSet<&str> = push.resources.iter().filter_map(|encoded| Some(ResourceView::read(encoded).ok()?.name)).collect();
            gone.extend(self.held(kind).map(|(name, _)| name).filter(|name| !there.contains(name.as_str())));
        }
        if asked {
            applied.gone.clone_from(&gone);
        }
        // Removals first: what is both removed and there is there.
        self.remove(kind, gone, &mut draft);
        if kind == Kind::Address && self.addresses.is_empty() {
            self.addresses.reserve(push.resources.len());
        }
        let mut reader = Reader::default();
        // Each is dropped when it was read, and the memory of the message with the last of them.
        for encoded in push.resources {
            let view = match ResourceView::read(&encoded) {
                Ok(view) => view,
                Err(error) => {
                    applied.refuse("a resource", format!("cannot be read: {error}"));
                    continue;
                }
            };
            applied.bytes += view.content.map_or(0, |(_, value)| value.len());
            if asked {
                applied.found.extend(view.aliases.iter().chain([&view.name]).map(|name| (*name).to_owned()));
            }
            match kind {
                Kind::Address => self.add_address(&view, (&mut reader, &mut draft), &mut applied),
                Kind::Authorization => self.add_policy(&view, &mut draft, &mut applied),
            }
        }
        self.first.retain(|missing| *missing != kind);
        self.drawn = Some(draft);
        Ok(applied)
    }

    fn remove(&mut self, kind: Kind, names: Vec<String>, draft: &mut Draft) {
        for name in names {
            draft.apply(match kind {
                Kind::Address => {
                    let known = self.addresses.remove(name.as_str());
                    Edit::Remove(known.and_then(|held| held.key().cloned()).unwrap_or_else(|| name.into()))
                }
                Kind::Authorization => {
                    self.policies.remove(name.as_str());
                    Edit::RemovePolicy(policy::key(&name))
                }
            });
        }
    }

    fn add_address(&mut self, from: &ResourceView<'_>, (reader, draft): (&mut Reader, &mut Draft), applied: &mut Applied) {
        let now = self.pushes;
        let known = self.addresses.get_mut(from.name);
        let again = known.is_some_and(|held| std::mem::replace(held.push(), now) == now);
        match content(from, Kind::Address, again).and_then(|value| reader.row(value)) {
            Err(reason) => applied.refuse(from.name, reason),
            Ok(mut row) => {
                let key = row.key();
                let other = (key != *from.name).then(|| key.clone());
                let held = Held::new(now, Version::of(from.version), other.clone());
                match self.addresses.entry(if other.is_none() { key } else { from.name.into() }) {
                    Entry::Occupied(mut known) => {
                        // What the resource was before under another key goes.
                        if let Some(old) = known.get().key().filter(|old| other.as_ref() != Some(*old)) {
                            draft.apply(Edit::Remove(old.clone()));
                        }
                        if let (Row::Workload(workload), None) = (&mut row, &other) {
                            // One memory for the name in the row and here.
                            workload.uid = known.key().clone();
                        }
                        known.insert(held);
                    }
                    Entry::Vacant(place) => drop(place.insert(held)),
                }
                draft.apply(match row {
                    Row::Workload(workload) => Edit::Workload(workload),
                    Row::Service(service) => Edit::Service(service),
                });
            }
        }
    }

    fn add_policy(&mut self, from: &ResourceView<'_>, draft: &mut Draft, applied: &mut Applied) {
        let now = self.pushes;
        let again = self.policies.get_mut(from.name).is_some_and(|held| *held.push() == now);
        let policy = match content(from, Kind::Authorization, again) {
            Ok(value) => policy::policy(from.name, value),
            Err(reason) => policy::refused(from.name, from.content, reason),
        };
        let version = match &policy.validity {
            Validity::Valid => Version::of(from.version),
            Validity::Invalid(reason) => {
                applied.refuse(from.name, format!("{reason} (it denies all of its targets)"));
                // Held, so that we hear of its removal; without a version, so that it is sent again.
                Version::of("")
            }
        };
        self.policies.insert(from.name.into(), Held::new(now, version, None));
        draft.apply(Edit::Policy(policy));
    }
}

/// What a resource holds, if it can be looked at.
fn content<'a>(resource: &ResourceView<'a>, kind: Kind, again: bool) -> Result<&'a [u8], String> {
    let (type_url, value) = resource.content.ok_or_else(|| "it has no content".to_owned())?;
    if again {
        return Err("it is in one push twice".to_owned());
    }
    if value.len() + resource.name.len() > MAX_RESOURCE {
        return Err(format!("it has {} bytes, more than {MAX_RESOURCE}", value.len() + resource.name.len()));
    }
    if type_url != kind.type_url() {
        return Err(format!("it is of type {}", shown(type_url)));
    }
    Ok(value)
}

#[cfg(test)]
mod tests;
