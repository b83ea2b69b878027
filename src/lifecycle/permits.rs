//! How many there may be at a time, in total and per key.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// The limits of a [`Permits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PermitLimits {
    /// At most this many in total.
    pub total: usize,
    /// At most this many per key.
    pub per_key: usize,
}

/// Counts what is held, in total and per key: unauthenticated connections per source address, pending dials per peer. Over the limit
/// [`acquire`](Self::acquire) is refused and [`wait`](Self::wait) waits for its turn. A key of which nothing is held is forgotten, so
/// memory is bounded by the total and by who waits.
///
/// All clones are one.
#[derive(Debug)]
pub struct Permits<K: Eq + Hash + Clone>(Arc<Shared<K>>);

#[derive(Debug)]
struct Shared<K: Eq + Hash + Clone> {
    limits: PermitLimits,
    held: Mutex<Held<K>>,
}

#[derive(Debug)]
struct Held<K: Eq + Hash + Clone> {
    total: usize,
    per_key: HashMap<K, Share<K>>,
}

/// What one key holds, and who waits for it to hold less, first come first served. Somebody waits only while all is held.
#[derive(Debug)]
struct Share<K: Eq + Hash + Clone> {
    held: usize,
    waiting: VecDeque<oneshot::Sender<Permit<K>>>,
}

/// Those who may wait for one key; whoever gave up does not count.
const MOST_WAITING: usize = 4096;

/// One of the permitted; gives its place back when dropped, to the first who waits for the same key.
#[derive(Debug)]
#[must_use = "a permit that is dropped permits nothing"]
pub struct Permit<K: Eq + Hash + Clone> {
    shared: Arc<Shared<K>>,
    key: K,
    /// It was given to nobody, because nobody waits for it any more; its place is still taken.
    void: bool,
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

impl<K: Eq + Hash + Clone> Clone for Permits<K> {
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
        self.0.acquire(&mut self.0.held(), key)
    }

    /// Takes one for `key`, as soon as its share is not used up any more. Those who wait get theirs in the order in which they came, and may
    /// give up at any time.
    ///
    /// # Errors
    /// When the total is used up, more than 4096 wait for the same key, or the turn has not come within `patience`.
    pub async fn wait(&self, key: K, patience: Duration) -> Result<Permit<K>, PermitRefused> {
        let turn = {
            let mut held = self.0.held();
            match self.0.acquire(&mut held, key.clone()) {
                Err(PermitRefused::PerKey(limit)) => {
                    let Some(share) = held.per_key.get_mut(&key) else { return Err(PermitRefused::PerKey(limit)) };
                    if share.waiting.len() >= MOST_WAITING {
                        share.waiting.retain(|waiting| !waiting.is_closed());
                    }
                    if share.waiting.len() >= MOST_WAITING {
                        return Err(PermitRefused::PerKey(limit));
                    }
                    let (give, turn) = oneshot::channel();
                    share.waiting.push_back(give);
                    turn
                }
                outcome => return outcome,
            }
        };
        match tokio::time::timeout(patience, turn).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(PermitRefused::PerKey(self.0.limits.per_key)),
        }
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

impl<K: Eq + Hash + Clone> Shared<K> {
    fn held(&self) -> MutexGuard<'_, Held<K>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone> Shared<K> {
    fn acquire(self: &Arc<Self>, held: &mut Held<K>, key: K) -> Result<Permit<K>, PermitRefused> {
        let of_key = held.per_key.get(&key).map_or(0, |share| share.held);
        if of_key >= self.limits.per_key {
            return Err(PermitRefused::PerKey(self.limits.per_key));
        }
        if held.total >= self.limits.total {
            return Err(PermitRefused::Total(self.limits.total));
        }
        held.total += 1;
        held.per_key.entry(key.clone()).or_insert_with(|| Share { held: 0, waiting: VecDeque::new() }).held += 1;
        Ok(Permit { shared: Arc::clone(self), key, void: false })
    }

    /// Takes a place back, unless somebody waits for it.
    fn next_waiting(&self, key: &K) -> Option<oneshot::Sender<Permit<K>>> {
        let mut held = self.held();
        let share = held.per_key.get_mut(key)?;
        if let Some(next) = share.waiting.pop_front() {
            return Some(next);
        }
        share.held = share.held.saturating_sub(1);
        if share.held == 0 {
            held.per_key.remove(key);
        }
        held.total = held.total.saturating_sub(1);
        None
    }
}

impl<K: Eq + Hash + Clone> Permit<K> {
    /// Whom it was given to.
    pub fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Eq + Hash + Clone> Drop for Permit<K> {
    fn drop(&mut self) {
        // The lock is not held while a permit is handed over: whoever does not want it any more drops it, which takes the lock.
        while !self.void
            && let Some(next) = self.shared.next_waiting(&self.key)
        {
            match next.send(Self { shared: Arc::clone(&self.shared), key: self.key.clone(), void: false }) {
                Ok(()) => return,
                Err(mut unwanted) => unwanted.void = true,
            }
        }
    }
}

#[cfg(test)]
mod tests;
