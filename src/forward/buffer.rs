//! How much to read at once, and the buffers to read into: lent by a pool of each thread while there are bytes to hold, and only then.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use super::shelf::Shelf;

/// Smallest read, in bytes: one request or one small record.
pub const MIN_READ: usize = 16 * 1024;
/// Largest read, in bytes: beyond this a larger read no longer saves system calls worth having.
pub const MAX_READ: usize = 256 * 1024;

/// Buffers of one size that a thread keeps for the next reader, in bytes; what comes back beyond that is freed.
const KEPT_BYTES: usize = 1024 * 1024;
/// 16, 32, 64, 128 and 256 KiB.
const SIZES: usize = (MAX_READ / MIN_READ).ilog2() as usize + 1;

/// The size of the next read: doubles when a read filled it, halves when a read used less than a quarter, so that a connection that was
/// once busy does not keep asking for large buffers.
#[derive(Debug, Clone, Copy)]
pub struct ReadSize(usize);

impl Default for ReadSize {
    fn default() -> Self {
        Self(MIN_READ)
    }
}

impl ReadSize {
    /// Bytes to ask for.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.0
    }

    /// Learns from what the last read brought.
    pub fn learn(&mut self, read: usize) {
        if read >= self.0 {
            self.0 = (self.0 * 2).min(MAX_READ);
        } else if read < self.0 / 4 {
            self.0 = (self.0 / 2).max(MIN_READ);
        }
    }
}

/// A buffer on loan. Its bytes are whatever the last borrower left. Dropping it gives it to the shelf of the thread that drops it.
#[derive(Debug)]
pub(super) struct Buffer(Vec<u8>);

thread_local! {
    static SHELVES: [Shelf<Vec<u8>>; SIZES] = std::array::from_fn(|place| Shelf::new(KEPT_BYTES / (MIN_READ << place)));
    /// Loans made here minus loans returned here; negative when others' loans came back here.
    static LENT: Cell<isize> = const { Cell::new(0) };
}

impl Buffer {
    /// Borrows a buffer of `size`, which is rounded up to a power of two from [`MIN_READ`] to [`MAX_READ`].
    pub(super) fn lend(size: usize) -> Self {
        let size = size.clamp(MIN_READ, MAX_READ).next_power_of_two();
        LENT.set(LENT.get() + 1);
        // A thread that is ending has none.
        let idle = SHELVES.try_with(|shelves| shelves[place(size)].take()).ok().flatten();
        Self(idle.unwrap_or_else(|| vec![0; size]))
    }

    /// Buffers on loan from this thread's shelves, for tests and for whoever looks for a leak: none while no byte is held.
    #[cfg(test)]
    pub(super) fn lent() -> isize {
        LENT.get()
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        LENT.set(LENT.get() - 1);
        // A thread that is ending keeps nothing any more.
        let _ = SHELVES.try_with(|shelves| shelves[place(buffer.len())].give(buffer));
    }
}

fn place(size: usize) -> usize {
    (size / MIN_READ).ilog2() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_size_grows_when_filled_and_shrinks_when_idle() {
        let mut size = ReadSize::default();
        for _ in 0..10 {
            size.learn(size.bytes());
        }
        assert_eq!(size.bytes(), MAX_READ);
        size.learn(MAX_READ / 2);
        assert_eq!(size.bytes(), MAX_READ);
        for _ in 0..10 {
            size.learn(100);
        }
        assert_eq!(size.bytes(), MIN_READ);
    }

    #[test]
    fn a_returned_buffer_is_lent_again() {
        let mut first = Buffer::lend(1);
        assert_eq!((first.len(), Buffer::lent()), (MIN_READ, 1));
        first[0] = 7;
        drop(first);
        assert_eq!(Buffer::lent(), 0);
        assert_eq!(Buffer::lend(MIN_READ)[0], 7);
        assert_eq!(Buffer::lend(MIN_READ + 1).len(), 2 * MIN_READ);
        assert_eq!(Buffer::lend(usize::MAX / 4).len(), MAX_READ);
    }

    #[test]
    fn the_pool_of_a_thread_is_bounded() {
        let many: Vec<Buffer> = (0..100).map(|_| Buffer::lend(MAX_READ)).collect();
        drop(many);
        assert_eq!(SHELVES.with(|shelves| shelves[place(MAX_READ)].len()), KEPT_BYTES / MAX_READ);
    }
}
