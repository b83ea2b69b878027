//! What a thread keeps for the next who needs it, and how that goes back to the allocator when nobody does.
//!
//! A shelf belongs to one thread, whose takes and gives meet no other thread. Only [`trim`], once a second, visits the shelves of all threads:
//! a thread that has become idle does not run, and would keep for ever what its last burst needed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How often [`trim`] is to be called: what was not needed between two calls is freed by the second.
pub const TRIM_INTERVAL: Duration = Duration::from_secs(1);

static SHELVES: Mutex<Vec<Weak<dyn Trim>>> = Mutex::new(Vec::new());

/// Frees what no thread has needed since the call before.
pub fn trim() {
    let mut shelves = lock(&SHELVES);
    shelves.retain(|shelf| {
        shelf.upgrade().is_some_and(|shelf| {
            shelf.trim();
            true
        })
    });
}

trait Trim: Send + Sync {
    fn trim(&self);
}

/// Things that one thread keeps for the next who needs one.
pub(crate) struct Shelf<T: Send + 'static>(Arc<Mutex<Kept<T>>>);

struct Kept<T> {
    things: Vec<T>,
    limit: usize,
    /// The fewest that lay here since the last trim: so many were not needed.
    unneeded: usize,
}

impl<T: Send + 'static> Shelf<T> {
    /// An empty one that keeps so many at most.
    pub(crate) fn new(limit: usize) -> Self {
        let kept = Arc::new(Mutex::new(Kept { things: Vec::new(), limit, unneeded: 0 }));
        let shelf: Arc<dyn Trim> = kept.clone();
        lock(&SHELVES).push(Arc::downgrade(&shelf));
        Self(kept)
    }

    /// What was given last, if anything is left.
    pub(crate) fn take(&self) -> Option<T> {
        let mut kept = lock(&self.0);
        let thing = kept.things.pop();
        kept.unneeded = kept.unneeded.min(kept.things.len());
        thing
    }

    /// Keeps it, or drops it when there is enough.
    pub(crate) fn give(&self, thing: T) {
        let mut kept = lock(&self.0);
        if kept.things.len() < kept.limit {
            kept.things.push(thing);
        }
    }

    /// How many lie here.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.0).things.len()
    }
}

impl<T: Send> Trim for Mutex<Kept<T>> {
    fn trim(&self) {
        let unneeded = {
            let mut kept = lock(self);
            let keep = kept.things.len().saturating_sub(kept.unneeded);
            let unneeded = kept.things.split_off(keep);
            kept.unneeded = keep;
            unneeded
        };
        // Freed when the shelf's thread can have it again.
        drop(unneeded);
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds the lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_needed_between_two_trims_is_dropped_and_the_rest_is_kept() {
        let shelf = Shelf::new(3);
        for number in 0..4 {
            shelf.give(number);
        }
        assert_eq!(shelf.len(), 3);
        // Of the shelf alone: the other tests' must not trim it between.
        shelf.0.trim();
        let (one, two) = (shelf.take(), shelf.take());
        assert_eq!((one, two), (Some(2), Some(1)));
        one.into_iter().chain(two).for_each(|number| shelf.give(number));
        shelf.0.trim();
        assert_eq!(shelf.len(), 2);
        shelf.0.trim();
        assert_eq!(shelf.len(), 0);
        assert_eq!(shelf.take(), None);
    }

    #[test]
    fn a_thread_that_has_ended_leaves_nothing() {
        let thing = Arc::new(());
        let given = thing.clone();
        let thread = std::thread::spawn(move || {
            thread_local!(static SHELF: Shelf<Arc<()>> = Shelf::new(1));
            SHELF.with(|shelf| shelf.give(given));
        });
        assert!(thread.join().is_ok());
        assert_eq!(Arc::strong_count(&thing), 1);
        trim();
    }
}
