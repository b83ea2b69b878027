//! Buffers for bytes on the move. An idle connection owns none: a slab is taken when a socket is ready and given back when it is empty.

use std::ops::{Deref, DerefMut};

use super::shelf::Shelf;

/// Octets of a slab: sixteen full records and room for control frames beside them.
pub const SLAB: usize = 17 * 16_406;
/// Slabs that a thread keeps for the next who needs one: 4 × 272 KiB. A tunnel at work holds two. More are given back to the allocator.
const KEPT: usize = 4;

thread_local! {
    static SHELF: Shelf<Box<[u8]>> = Shelf::new(KEPT);
}

/// A buffer from the shelf of this thread; goes back to the shelf of the thread that drops it.
pub struct Slab(Box<[u8]>);

impl Slab {
    /// Takes one. Its content is what somebody left there.
    #[must_use]
    pub fn take() -> Self {
        let kept = SHELF.try_with(Shelf::take).ok().flatten();
        Self(kept.unwrap_or_else(|| vec![0; SLAB].into_boxed_slice()))
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let slab = std::mem::take(&mut self.0);
        // A thread that is ending keeps nothing any more.
        let _ = SHELF.try_with(|shelf| shelf.give(slab));
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
