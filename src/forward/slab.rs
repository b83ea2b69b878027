//! Buffers for bytes on the move. An idle connection owns none: a slab is taken when a socket is ready and given back when it is empty.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

/// Octets of a slab: sixteen full records and room for control frames beside them.
pub const SLAB: usize = 17 * 16_406;
/// Slabs that a thread keeps for the next who needs one: 4 × 272 KiB. A tunnel at work holds two. More are given back to the allocator.
const KEPT: usize = 4;

/// A slab that nobody needed for so long is given back to the allocator.
const UNUSED: Duration = Duration::from_secs(5);

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { slabs: Vec::new(), unused: 0, trimmed: None }) };
}

struct Pool {
    slabs: Vec<Box<[u8]>>,
    /// The fewest that lay here since the last trim: so many were not needed.
    unused: usize,
    trimmed: Option<Instant>,
}

/// Gives slabs back that this thread has not needed for five seconds. Call it now and then from every thread that uses them.
pub fn trim(now: Instant) {
    let unneeded = POOL.with_borrow_mut(|pool| {
        if pool.trimmed.is_some_and(|last| now.saturating_duration_since(last) < UNUSED) {
            return Vec::new();
        }
        let keep = pool.slabs.len() - pool.unused.min(pool.slabs.len());
        let unneeded = pool.slabs.split_off(keep);
        (pool.unused, pool.trimmed) = (pool.slabs.len(), Some(now));
        unneeded
    });
    drop(unneeded);
}

/// A buffer from the pool of this thread; goes back to the pool of the thread that drops it.
pub struct Slab(Box<[u8]>);

impl Slab {
    /// Takes one. Its content is what somebody left there.
    #[must_use]
    pub fn take() -> Self {
        let kept = POOL.with_borrow_mut(|pool| {
            let kept = pool.slabs.pop();
            pool.unused = pool.unused.min(pool.slabs.len());
            kept
        });
        Self(kept.unwrap_or_else(|| vec![0; SLAB].into_boxed_slice()))
    }

    /// How many this thread keeps.
    #[must_use]
    pub fn kept() -> usize {
        POOL.with_borrow(|pool| pool.slabs.len())
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let slab = std::mem::take(&mut self.0);
        // A thread that is ending has no pool any more.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.slabs.len() < KEPT {
                pool.slabs.push(slab);
            }
        });
    }
}

impl Deref for Slab {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Slab {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl std::fmt::Debug for Slab {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Slab")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_needed_between_two_trims_is_given_back_and_the_rest_is_kept() {
        std::thread::spawn(|| {
            let start = Instant::now();
            drop((Slab::take(), Slab::take(), Slab::take()));
            trim(start);
            // One was needed since.
            drop(Slab::take());
            trim(start + UNUSED / 2);
            assert_eq!(Slab::kept(), 3);
            trim(start + UNUSED);
            assert_eq!(Slab::kept(), 1);
            trim(start + UNUSED * 2);
            assert_eq!(Slab::kept(), 0);
        })
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}
