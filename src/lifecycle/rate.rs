//! How often something may happen.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A token bucket: `per_second` on average, up to `burst` at once. Time is monotonic.
#[derive(Debug)]
pub struct RateBudget {
    rate: Rate,
    bucket: Mutex<Bucket>,
}

/// Too often; it would be permitted again after this long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the rate limit is reached, retry in {retry_after:?}")]
pub struct RateExceeded {
    /// When the next one would be permitted, if nobody else takes it.
    pub retry_after: Duration,
}

/// A token takes `interval` to come back. A bucket is described by one moment, the one when it will be full: n tokens are gone as
/// long as that lies n intervals ahead ("generic cell rate algorithm"). No fractions, nothing that drifts.
#[derive(Debug, Clone, Copy)]
struct Rate {
    interval: Duration,
    burst: u32,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    full_at: Instant,
}

impl Rate {
    /// Zero of either means one: a budget that never permits anything is not a rate.
    fn new(per_second: u32, burst: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self { interval: interval.max(Duration::from_nanos(1)), burst: burst.max(1) }
    }
}

impl Bucket {
    fn take(&mut self, rate: Rate, now: Instant) -> Result<(), RateExceeded> {
        let full_at = self.full_at.max(now) + rate.interval;
        let over = full_at.saturating_duration_since(now).saturating_sub(rate.interval * rate.burst);
        if !over.is_zero() {
            return Err(RateExceeded { retry_after: over });
        }
        self.full_at = full_at;
        Ok(())
    }
}

impl RateBudget {
    /// A full bucket.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self { rate: Rate::new(per_second, burst), bucket: Mutex::new(Bucket { full_at: Instant::now() }) }
    }

    /// Takes one if there is one.
    pub fn take(&self) -> Result<(), RateExceeded> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(self.rate, Instant::now())
    }
}

/// A [`RateBudget`] per key, such as dials per peer. A full bucket is the same as none and is forgotten; at most `max_keys` are
/// remembered, and while so many are in use a new key is refused.
#[derive(Debug)]
pub struct RateBudgets<K> {
    rate: Rate,
    max_keys: usize,
    buckets: Mutex<Buckets<K>>,
}

#[derive(Debug)]
struct Buckets<K> {
    by_key: HashMap<K, Bucket>,
    /// When to look for full ones again, by number of keys; twice as many as were left the last time.
    sweep_at: usize,
    /// Not before this moment.
    next_sweep: Instant,
}

impl<K: Eq + Hash> RateBudgets<K> {
    /// Below this many keys nobody looks for full buckets.
    const SWEEP: usize = 64;

    /// Full buckets for everybody.
    #[must_use]
    pub fn new(per_second: u32, burst: u32, max_keys: usize) -> Self {
        let buckets = Buckets { by_key: HashMap::new(), sweep_at: Self::SWEEP.min(max_keys), next_sweep: Instant::now() };
        Self { rate: Rate::new(per_second, burst), max_keys, buckets: Mutex::new(buckets) }
    }

    /// Takes one of `key` if there is one.
    pub fn take(&self, key: K) -> Result<(), RateExceeded> {
        let now = Instant::now();
        let mut buckets = self.locked();
        if let Some(bucket) = buckets.by_key.get_mut(&key) {
            return bucket.take(self.rate, now);
        }
        if buckets.by_key.len() >= buckets.sweep_at {
            buckets.sweep(now, self.rate, self.max_keys);
        }
        if buckets.by_key.len() >= self.max_keys {
            return Err(RateExceeded { retry_after: buckets.next_sweep.saturating_duration_since(now) });
        }
        let mut bucket = Bucket { full_at: now };
        bucket.take(self.rate, now)?;
        buckets.by_key.insert(key, bucket);
        Ok(())
    }

    /// Whether [`take`](Self::take) would give `key` one now. Takes nothing: for what is to be counted only once its outcome is known.
    pub fn check(&self, key: &K) -> Result<(), RateExceeded> {
        let now = Instant::now();
        // A copy of the bucket pays; one that is not remembered is full.
        self.locked().by_key.get(key).copied().map_or(Ok(()), |mut bucket| bucket.take(self.rate, now))
    }

    /// How many keys are remembered.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.locked().by_key.len()
    }

    fn locked(&self) -> MutexGuard<'_, Buckets<K>> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Buckets<K> {
    /// Forgets full buckets. An attacker with many keys must not make this run for each of them in vain: it runs when the number
    /// of keys has doubled or the table is at its limit, and at most once in the time that a token takes to come back.
    fn sweep(&mut self, now: Instant, rate: Rate, max_keys: usize) {
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = now + rate.interval;
        self.by_key.retain(|_, bucket| bucket.full_at > now);
        self.sweep_at = (self.by_key.len() * 2).max(RateBudgets::<K>::SWEEP).min(max_keys);
    }
}

#[cfg(test)]
mod tests;
