//! One allocation for every repeated text and profile, forgotten with its last user.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::index::Index;
use crate::model::service::GatewayDestination;
use crate::model::{GatewayAddress, Profile, Service, Text, Workload};

/// The texts and profiles in use, with the number of their users. Counted, not weak, so that it is as persistent as the
/// rows: an older snapshot keeps its own.
#[derive(Clone, Default)]
pub(super) struct Interner {
    seed: RandomState,
    words: Index<Counted<Text>>,
    profiles: Index<Counted<Arc<Profile>>>,
}

#[derive(Clone)]
struct Counted<T> {
    item: T,
    users: u32,
}

/// Which shared profile stands for a profile that several workloads came with, so that it is hashed and compared once. The key is its address;
/// it is kept, so that no other can have that.
#[derive(Debug, Clone, Default)]
pub(super) struct Adopted(HashMap<usize, (Arc<Profile>, Arc<Profile>, u64), RandomState>);

impl Interner {
    /// Replaces the repeated parts of a workload by the shared ones.
    pub(super) fn adopt_workload(&mut self, workload: &mut Workload, adopted: &mut Adopted) {
        self.adopt_word(&mut workload.node);
        self.adopt_word(&mut workload.hostname);
        let profile = &mut workload.profile;
        let address = Arc::as_ptr(profile).addr();
        if let Some((_, shared, key)) = adopted.0.get(&address)
            && let Some(known) = self.profiles.row_mut(*key, |known| Arc::ptr_eq(&known.item, shared))
        {
            known.users += 1;
            *profile = known.item.clone();
            return;
        }
        // Only a profile that others have too will be met again.
        let given = (Arc::strong_count(profile) > 1).then(|| profile.clone());
        let key = self.adopt_profile(profile);
        if let Some(given) = given {
            adopted.0.insert(address, (given, profile.clone(), key));
        }
    }

    /// Says under which key it is kept.
    fn adopt_profile(&mut self, profile: &mut Arc<Profile>) -> u64 {
        let key = self.seed.hash_one(&**profile);
        if let Some(known) = self.profiles.row_mut(key, |known| known.item == *profile) {
            known.users += 1;
            *profile = known.item.clone();
            return key;
        }
        let mut own = Profile::clone(profile);
        each_word_of_profile(&mut own, &mut |word| self.adopt_word(word));
        *profile = Arc::new(own);
        self.profiles.put(key, Counted { item: profile.clone(), users: 1 }, |_| false);
        key
    }

    /// The counterpart of [`Interner::adopt_workload`].
    pub(super) fn release_workload(&mut self, workload: &Workload) {
        self.release_word(&workload.node);
        self.release_word(&workload.hostname);
        let key = self.seed.hash_one(&*workload.profile);
        if release(&mut self.profiles, key, |known| *known == workload.profile) {
            // A copy of reference counts, once per profile's life: one list of the words of a profile serves both ways.
            let mut own = Profile::clone(&workload.profile);
            each_word_of_profile(&mut own, &mut |word| self.release_word(word));
        }
    }

    /// Replaces the repeated parts of a service by the shared ones.
    pub(super) fn adopt_service(&mut self, service: &mut Service) {
        each_word_of_service(service, &mut |word| self.adopt_word(word));
    }

    /// The counterpart of [`Interner::adopt_service`].
    pub(super) fn release_service(&mut self, service: &Service) {
        let mut own = Service::clone(service);
        each_word_of_service(&mut own, &mut |word| self.release_word(word));
    }

    /// Texts and profiles known now.
    #[cfg(test)]
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.words.iter().count(), self.profiles.iter().count())
    }

    fn adopt_word(&mut self, word: &mut Text) {
        let key = self.seed.hash_one(word.as_str());
        if let Some(known) = self.words.row_mut(key, |known| known.item == *word) {
            known.users += 1;
            *word = known.item.clone();
        } else {
            self.words.put(key, Counted { item: word.clone(), users: 1 }, |_| false);
        }
    }

    fn release_word(&mut self, word: &Text) {
        let key = self.seed.hash_one(word.as_str());
        release(&mut self.words, key, |known| known == word);
    }
}

/// Takes one user away; says whether it was the last, in which case the item is forgotten.
fn release<T: Clone>(items: &mut Index<Counted<T>>, key: u64, same: impl Fn(&T) -> bool) -> bool {
    match items.row_mut(key, |known| same(&known.item)) {
        Some(known) if known.users > 1 => {
            known.users -= 1;
            false
        }
        Some(_) => items.take(key, |known| same(&known.item)).is_some(),
        None => false,
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
