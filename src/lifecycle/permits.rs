//! How many there may be at a time, in total and per key.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The limits of a [`Permits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PermitLimits {
    /// At most this many in total.
    pub total: usize,
    /// At most this many per key.
    pub per_key: usize,
}

/// Counts what is held, in total and per key: unauthenticated connections per source address, pending dials per peer. It never
/// waits; over the limit is refused. A key of which nothing is held is forgotten, so memory is bounded by the total.
///
/// All clones are one.
#[derive(Debug)]
pub struct Permits<K>(Arc<Shared<K>>);

#[derive(Debug)]
struct Shared<K> {
    limits: PermitLimits,
    held: Mutex<Held<K>>,
}

#[derive(Debug)]
struct Held<K> {
    total: usize,
    per_key: HashMap<K, usize>,
}

/// One of the permitted; gives its place back when dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped permits nothing"]
pub struct Permit<K: Eq + Hash> {
    shared: Arc<Shared<K>>,
    key: K,
}

/// Why there is no permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PermitRefused {
    /// The total is used up.
    #[error("the limit of {0} in total is reached")]
    Total(usize),
    /// The share of this key is used up.
    #[error("the limit of {0} for one peer is reached")]
    PerKey(usize),
}

impl<K> Clone for Permits<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K: Eq + Hash + Clone> Permits<K> {
    /// Nothing held.
    #[must_use]
    pub fn new(limits: PermitLimits) -> Self {
        Self(Arc::new(Shared { limits, held: Mutex::new(Held { total: 0, per_key: HashMap::new() }) }))
    }

    /// Takes one for `key`, or says which limit is reached. The share of the key is looked at first, because it names a culprit.
    pub fn acquire(&self, key: K) -> Result<Permit<K>, PermitRefused> {
        let limits = self.0.limits;
        let mut held = self.0.held();
        let of_key = held.per_key.get(&key).copied().unwrap_or(0);
        if of_key >= limits.per_key {
            return Err(PermitRefused::PerKey(limits.per_key));
        }
        if held.total >= limits.total {
            return Err(PermitRefused::Total(limits.total));
        }
        held.total += 1;
        held.per_key.insert(key.clone(), of_key + 1);
        Ok(Permit { shared: Arc::clone(&self.0), key })
    }

    /// How many are held in total.
    #[must_use]
    pub fn held(&self) -> usize {
        self.0.held().total
    }

    /// How many keys hold at least one.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.0.held().per_key.len()
    }
}

impl<K> Shared<K> {
    fn held(&self) -> MutexGuard<'_, Held<K>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Permit<K> {
    /// Whom it was given to.
    pub fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Eq + Hash> Drop for Permit<K> {
    fn drop(&mut self) {
        let mut held = self.shared.held();
        held.total = held.total.saturating_sub(1);
        let Some(of_key) = held.per_key.get_mut(&self.key) else { return };
        *of_key = of_key.saturating_sub(1);
        if *of_key == 0 {
            held.per_key.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests;
