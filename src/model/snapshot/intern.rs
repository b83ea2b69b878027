//! One allocation for every repeated text and profile, forgotten with its last user.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::index::Index;
use super::table::{Id, Table};
use crate::model::service::GatewayDestination;
use crate::model::{GatewayAddress, Profile, Service, Text, Workload};

/// The texts and profiles in use, with the number of their users. Counted, not weak, so that it is as persistent as the
/// rows: an older snapshot keeps its own.
#[derive(Clone, Default)]
pub(super) struct Interner {
    seed: RandomState,
    words: Pool<Text>,
    profiles: Pool<Arc<Profile>>,
}

/// Items of one kind, each once, by their hashes.
#[derive(Clone)]
struct Pool<T> {
    items: Table<Counted<T>>,
    keys: Index,
}

#[derive(Clone)]
struct Counted<T> {
    item: T,
    users: u32,
}

/// What stands for the words and profiles that several rows of a draft came with, so that each is hashed, compared and counted once.
#[derive(Clone, Default)]
pub(super) struct Adopted {
    words: Met<Text>,
    profiles: Met<Arc<Profile>>,
}

/// By the address of what was given; it is kept, so that nothing else can have that.
type Met<T> = HashMap<usize, Stand<T>, RandomState>;

#[derive(Clone)]
struct Stand<T> {
    #[allow(dead_code, reason = "it keeps its address")]
    given: T,
    shared: T,
    id: Id,
    /// Users that the pool does not know of yet.
    users: u32,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { items: Table::default(), keys: Index::default() }
    }
}

impl<T: Clone> Pool<T> {
    /// The item that is the same as this one, and now has so many more users.
    fn adopt(&mut self, key: u64, users: u32, same: impl Fn(&T) -> bool) -> Option<(Id, T)> {
        let id = self.find(key, same)?;
        self.items.get_mut(id).map(|known| {
            known.users += users;
            (id, known.item.clone())
        })
    }

    fn add(&mut self, key: u64, users: u32, item: T) -> Id {
        let id = self.items.put(Counted { item, users });
        self.keys.put(key, id);
        id
    }

    /// Takes one user away; says whether it was the last, in which case the item is forgotten.
    fn release(&mut self, key: u64, same: impl Fn(&T) -> bool) -> bool {
        let Some(id) = self.find(key, same) else { return false };
        if let Some(known) = self.items.get_mut(id).filter(|known| known.users > 1) {
            known.users -= 1;
            return false;
        }
        self.items.take(id);
        self.keys.take(key, id)
    }

    fn find(&self, key: u64, same: impl Fn(&T) -> bool) -> Option<Id> {
        self.keys.rows(key).find(|id| self.items.get(*id).is_some_and(|known| same(&known.item)))
    }

    fn settle(&mut self, met: &mut Met<T>) {
        for stand in met.values_mut().filter(|stand| stand.users > 0) {
            if let Some(known) = self.items.get_mut(stand.id) {
                known.users += std::mem::take(&mut stand.users);
            }
        }
    }
}

impl Interner {
    /// Replaces the repeated parts of a workload by the shared ones.
    pub(super) fn adopt_workload(&mut self, workload: &mut Workload, adopted: &mut Adopted) {
        self.adopt_word(&mut workload.node, &mut adopted.words);
        self.adopt_word(&mut workload.hostname, &mut adopted.words);
        let profile = &mut workload.profile;
        let address = Arc::as_ptr(profile).addr();
        if let Some(stand) = adopted.profiles.get_mut(&address) {
            stand.users += 1;
            *profile = stand.shared.clone();
            return;
        }
        // Only what others have too will be met again.
        let given = (Arc::strong_count(profile) > 1).then(|| profile.clone());
        let users = u32::from(given.is_none());
        let id = self.adopt_profile(profile, users, &mut adopted.words);
        if let Some(given) = given {
            adopted.profiles.insert(address, Stand { given, shared: profile.clone(), id, users: 1 });
        }
    }

    fn adopt_profile(&mut self, profile: &mut Arc<Profile>, users: u32, words: &mut Met<Text>) -> Id {
        let key = self.seed.hash_one(&**profile);
        if let Some((id, shared)) = self.profiles.adopt(key, users, |known| *known == *profile) {
            *profile = shared;
            return id;
        }
        let mut own = Profile::clone(profile);
        each_word_of_profile(&mut own, &mut |word| self.adopt_word(word, words));
        *profile = Arc::new(own);
        self.profiles.add(key, users, profile.clone())
    }

    /// The counterpart of [`Interner::adopt_workload`].
    pub(super) fn release_workload(&mut self, workload: &Workload, adopted: &mut Adopted) {
        self.forget(adopted);
        self.release_word(&workload.node);
        self.release_word(&workload.hostname);
        let key = self.seed.hash_one(&*workload.profile);
        if self.profiles.release(key, |known| *known == workload.profile) {
            // A copy of reference counts, once per profile's life: one list of the words of a profile serves both ways.
            let mut own = Profile::clone(&workload.profile);
            each_word_of_profile(&mut own, &mut |word| self.release_word(word));
        }
    }

    /// Replaces the repeated parts of a service by the shared ones.
    pub(super) fn adopt_service(&mut self, service: &mut Service, adopted: &mut Adopted) {
        each_word_of_service(service, &mut |word| self.adopt_word(word, &mut adopted.words));
    }

    /// The counterpart of [`Interner::adopt_service`].
    pub(super) fn release_service(&mut self, service: &Service, adopted: &mut Adopted) {
        self.forget(adopted);
        let mut own = Service::clone(service);
        each_word_of_service(&mut own, &mut |word| self.release_word(word));
    }

    /// Counts every user.
    pub(super) fn settle(&mut self, adopted: &mut Adopted) {
        self.words.settle(&mut adopted.words);
        self.profiles.settle(&mut adopted.profiles);
    }

    /// Before anything may leave, so that nobody stands for what is no longer there.
    fn forget(&mut self, adopted: &mut Adopted) {
        self.settle(adopted);
        adopted.words.clear();
        adopted.profiles.clear();
    }

    /// Texts and profiles known now.
    #[cfg(test)]
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.words.items.len(), self.profiles.items.len())
    }

    fn adopt_word(&mut self, word: &mut Text, met: &mut Met<Text>) {
        if word.is_empty() {
            // Takes no memory.
            return;
        }
        let address = word.as_ptr().addr();
        if let Some(stand) = met.get_mut(&address) {
            stand.users += 1;
            *word = stand.shared.clone();
            return;
        }
        let key = self.seed.hash_one(word.as_str());
        let given = word.is_shared().then(|| word.clone());
        let users = u32::from(given.is_none());
        let id = match self.words.adopt(key, users, |known| *known == *word) {
            Some((id, shared)) => {
                *word = shared;
                id
            }
            None => self.words.add(key, users, word.clone()),
        };
        if let Some(given) = given {
            met.insert(address, Stand { given, shared: word.clone(), id, users: 1 });
        }
    }

    fn release_word(&mut self, word: &Text) {
        if !word.is_empty() {
            let key = self.seed.hash_one(word.as_str());
            self.words.release(key, |known| known == word);
        }
    }
}

fn each_word_of_profile(profile: &mut Profile, visit: &mut impl FnMut(&mut Text)) {
    visit(&mut profile.namespace);
    visit(&mut profile.network);
    visit(&mut profile.trust_domain);
    visit(&mut profile.service_account);
    visit(&mut profile.canonical_name);
    visit(&mut profile.canonical_revision);
    visit(&mut profile.workload_name);
    visit(&mut profile.cluster_id);
    visit(&mut profile.locality.region);
    visit(&mut profile.locality.zone);
    visit(&mut profile.locality.subzone);
    profile.authorization_policies.iter_mut().for_each(&mut *visit);
    for (service, _) in &mut profile.services {
        visit(&mut service.namespace);
        visit(&mut service.hostname);
    }
    profile.waypoint.iter_mut().chain(&mut profile.network_gateway).for_each(|gateway| each_word_of_gateway(gateway, visit));
}

fn each_word_of_service(service: &mut Service, visit: &mut impl FnMut(&mut Text)) {
    visit(&mut service.name);
    visit(&mut service.namespace);
    visit(&mut service.hostname);
    service.vips.iter_mut().for_each(|vip| visit(&mut vip.network));
    service.cidr_vips.iter_mut().for_each(|(network, _)| visit(network));
    service.subject_alt_names.iter_mut().for_each(&mut *visit);
    service.waypoint.iter_mut().for_each(|gateway| each_word_of_gateway(gateway, visit));
    service.weighted_waypoints.iter_mut().for_each(|weighted| each_word_of_gateway(&mut weighted.destination, visit));
}

fn each_word_of_gateway(gateway: &mut GatewayAddress, visit: &mut impl FnMut(&mut Text)) {
    match &mut gateway.destination {
        GatewayDestination::Address(address) => visit(&mut address.network),
        GatewayDestination::Hostname(key) => {
            visit(&mut key.namespace);
            visit(&mut key.hostname);
        }
    }
}
