//! Buffers for bytes on the move. An idle connection owns none: a slab is taken when a socket is ready and given back when it is empty.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Octets of a slab: sixteen full records and room for control frames beside them.
pub const SLAB: usize = 17 * 16_406;
/// Slabs that a thread keeps for the next who needs one: 16 × 272 KiB. More are given back to the allocator.
const KEPT: usize = 16;

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer from the pool of this thread; goes back to the pool of the thread that drops it.
pub struct Slab(Box<[u8]>);

impl Slab {
    /// Takes one. Its content is what somebody left there.
    #[must_use]
    pub fn take() -> Self {
        let kept = POOL.with_borrow_mut(Vec::pop);
        Self(kept.unwrap_or_else(|| vec![0; SLAB].into_boxed_slice()))
    }

    /// How many this thread keeps.
    #[must_use]
    pub fn kept() -> usize {
        POOL.with_borrow(Vec::len)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let slab = std::mem::take(&mut self.0);
        // A thread that is ending has no pool any more.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < KEPT {
                pool.push(slab);
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
