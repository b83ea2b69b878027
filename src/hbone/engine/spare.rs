//! Memory for backlogs that come and go: an application that is a little slower than its tunnel would otherwise cost allocations all the time.

use crate::forward::shelf::Shelf;

/// Buffers that a thread keeps, and how large each may be, octets.
const KEPT: usize = 4;
const LARGEST: usize = 1 << 20;

thread_local! {
    static SPARE: Shelf<Vec<u8>> = Shelf::new(KEPT);
}

/// An empty buffer, with memory if there is any to spare.
pub(super) fn take() -> Vec<u8> {
    // A thread that is ending has none.
    SPARE.try_with(Shelf::take).ok().flatten().unwrap_or_default()
}

/// Keeps a buffer for the next who needs one, or frees it.
pub(super) fn give(mut buffer: Vec<u8>) {
    if buffer.capacity() == 0 || buffer.capacity() > LARGEST {
        return;
    }
    buffer.clear();
    let _ = SPARE.try_with(|spare| spare.give(buffer));
}
