//! Memory for backlogs that come and go: an application that is a little slower than its tunnel would otherwise cost allocations all the time.

use std::cell::RefCell;

/// Buffers that a thread keeps, and how large each may be, octets.
const KEPT: usize = 4;
const LARGEST: usize = 1 << 20;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer, with memory if there is any to spare.
pub(super) fn take() -> Vec<u8> {
    // A thread that is ending has none.
    SPARE.try_with(|spare| spare.borrow_mut().pop()).ok().flatten().unwrap_or_default()
}

/// Frees what is kept. Call it now and then: a burst may be long over.
pub(super) fn clear() {
    let _ = SPARE.try_with(|spare| spare.borrow_mut().clear());
}

/// Keeps a buffer for the next who needs one, or frees it.
pub(super) fn give(mut buffer: Vec<u8>) {
    if buffer.capacity() == 0 || buffer.capacity() > LARGEST {
        return;
    }
    buffer.clear();
    let _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < KEPT {
            spare.push(buffer);
        }
    });
}
