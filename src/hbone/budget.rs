//! How much a peer may send before the application has taken it: receive windows within a budget of the node.
//!
//! A credit that was given cannot be taken back (HTTP/2 has no way to shrink a connection window), so what counts is what peers were promised,
//! not what they use. Every tunnel may have [`FLOOR`] uncounted, so that none can starve; what it has beyond that comes out of the budget.
//! A tunnel grows when it is limited by its window and shrinks, as fast as its peer uses the promise up, when others need the credit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Window of a tunnel that the budget has nothing for, bytes. With 4 peers' tunnels for each of 64 peers that is another 64 MiB at worst.
const FLOOR: u32 = 256 << 10;
/// Window of a new tunnel while the node is quiet, bytes; also the least to which a tunnel shrinks.
const START: u32 = 1 << 20;
/// Window of a new tunnel that we have opened while most of the budget is free, bytes: servers may have much to say at once, and there are some that drop
/// what our window does not take when they hang up (Envoy). A stream of it begins with a quarter of this.
const START_OPENED: u32 = 4 << 20;
/// Smallest receive window of a stream, bytes: that of a fresh HTTP/2 connection.
const MIN_STREAM: u32 = 65_535;
/// A stream window's worth within this time means that the window and not the sender is the limit, for round trips up to it.
const MEASURE: Duration = Duration::from_millis(250);
/// A tunnel shrinks by one step in this time.
const SHRINK_EVERY: Duration = Duration::from_secs(1);

/// The receive credit of all tunnels of a node. All clones are one.
#[derive(Debug, Clone)]
pub struct ReceiveBudget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    total: u64,
    given: Mutex<Given>,
}

#[derive(Debug, Default)]
struct Given {
    /// Promised beyond the floors.
    bytes: u64,
    /// Tunnels with more than the floor.
    large: u64,
}

impl ReceiveBudget {
    /// Nothing promised out of `total` bytes.
    #[must_use]
    pub fn new(total: u64) -> Self {
        Self(Arc::new(Shared { total, given: Mutex::default() }))
    }

    /// Bytes that are promised to peers now, not counting 256 KiB of every tunnel.
    #[must_use]
    pub fn promised(&self) -> u64 {
        self.given().bytes
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        // Nothing panics while it holds the lock; poisoned sums are still right.
        self.0.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One tunnel's part of the budget; given back when dropped.
#[derive(Debug)]
struct Share {
    budget: ReceiveBudget,
    /// What the peer shall have.
    window: u32,
    /// What it may still send: more than the window for a while after the window shrank.
    promised: u32,
}

fn beyond_floor(window: u32) -> u64 {
    u64::from(window.saturating_sub(FLOOR))
}

impl Share {
    fn take(budget: ReceiveBudget, full: u32, opened: bool) -> Self {
        let mut given = budget.given();
        let fits = |window, part| given.bytes.saturating_add(beyond_floor(window)) <= budget.0.total / part;
        let window = match opened {
            true if fits(START_OPENED, 4) => START_OPENED,
            _ if fits(START, 2) => START,
            _ => FLOOR,
        };
        let window = window.min(full);
        given.bytes += beyond_floor(window);
        given.large += u64::from(window > FLOOR);
        drop(given);
        Self { budget, window, promised: window }
    }

    /// Doubles the window, up to `full`, if the budget has the credit: to keep a quarter free for others, or no more than an equal part.
    fn grow(&mut self, full: u32) -> bool {
        let next = self.window.saturating_mul(2).min(full);
        let more = beyond_floor(next).saturating_sub(beyond_floor(self.promised));
        let total = self.budget.0.total;
        let mut given = self.budget.given();
        let free = total.saturating_sub(given.bytes);
        let fair = total / given.large.max(1);
        if next <= self.window || free < more || (free - more < total / 4 && u64::from(next) > fair) {
            return false;
        }
        given.bytes += more;
        given.large += u64::from(self.window <= FLOOR && next > FLOOR);
        drop(given);
        self.window = next;
        self.promised = self.promised.max(next);
        true
    }

    /// Halves the window if others need the credit and this tunnel has more than its part, or does not use it.
    fn shrink(&mut self, unused: bool) -> bool {
        let next = (self.window / 2).max(START);
        let total = self.budget.0.total;
        let given = self.budget.given();
        let tight = total.saturating_sub(given.bytes) < total / 8;
        let fair = total / given.large.max(1);
        drop(given);
        if next >= self.window || !tight || (!unused && u64::from(self.window) <= fair) {
            return false;
        }
        self.window = next;
        true
    }

    /// The peer used this much of its promise. What is beyond the window is not promised again.
    fn used(&mut self, bytes: u64) {
        let left = u64::from(self.promised).saturating_sub(bytes).max(u64::from(self.window));
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        let back = beyond_floor(self.promised).saturating_sub(beyond_floor(left));
        if back > 0 {
            let mut given = self.budget.given();
            given.bytes = given.bytes.saturating_sub(back);
        }
        self.promised = left;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut given = self.budget.given();
        given.bytes = given.bytes.saturating_sub(beyond_floor(self.promised));
        given.large = given.large.saturating_sub(u64::from(self.window > FLOOR));
    }
}

/// The receive windows of one tunnel as they follow its use.
#[derive(Debug)]
pub(super) struct Windows {
    share: Share,
    full: u32,
    full_stream: u32,
    /// Bytes of DATA seen.
    seen: u64,
    /// Where and when the present measurement began.
    measured_from: (u64, Instant),
    shrunk_at: Instant,
}

impl Windows {
    /// For a tunnel that may have windows of up to `full` bytes, and its streams up to `full_stream`; `opened` if by us.
    pub(super) fn new(budget: &ReceiveBudget, (full, full_stream): (u32, u32), opened: bool) -> Self {
        let now = Instant::now();
        let share = Share::take(budget.clone(), full, opened);
        Self { share, full, full_stream, seen: 0, measured_from: (0, now), shrunk_at: now }
    }

    /// Continues a tunnel that was taken up: its window, and what its peer may still send of what it was promised. That cannot be taken back,
    /// so it counts whether the budget has it or not.
    pub(super) fn resume(&mut self, window: u32, promised: u32) {
        let share = &mut self.share;
        let window = window.clamp(FLOOR.min(self.full), self.full.max(1));
        let promised = promised.max(window);
        let mut given = share.budget.given();
        given.bytes = given.bytes.saturating_sub(beyond_floor(share.promised)).saturating_add(beyond_floor(promised));
        given.large = given.large.saturating_sub(u64::from(share.window > FLOOR)) + u64::from(window > FLOOR);
        drop(given);
        (share.window, share.promised) = (window, promised);
    }

    /// The window of the whole tunnel.
    pub(super) fn tunnel(&self) -> u32 {
        self.share.window
    }

    /// The window of each stream: always the same part of the tunnel's, so that one stream that is not read never blocks the others.
    pub(super) fn stream(&self) -> u32 {
        let part = u64::from(self.share.window) * u64::from(self.full_stream) / u64::from(self.full.max(1));
        u32::try_from(part).unwrap_or(u32::MAX).max(MIN_STREAM)
    }

    /// `data` bytes of DATA have arrived since the tunnel began; says the tunnel's new window if it changes.
    pub(super) fn observe(&mut self, data: u64) -> Option<u32> {
        if data == self.seen {
            return None;
        }
        self.observe_at(data, Instant::now())
    }

    fn observe_at(&mut self, data: u64, now: Instant) -> Option<u32> {
        self.share.used(data.saturating_sub(self.seen));
        self.seen = data;
        let (from, since) = self.measured_from;
        let received = data.saturating_sub(from);
        let elapsed = now.saturating_duration_since(since);
        let mut changed = false;
        if elapsed <= MEASURE {
            if received < u64::from(self.stream()) {
                return None;
            }
            changed = self.share.grow(self.full);
        }
        self.measured_from = (data, now);
        if !changed && now.saturating_duration_since(self.shrunk_at) >= SHRINK_EVERY {
            // Rounded to what would fill a sixteenth of the window in one measurement.
            let pace = received * 250 / u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
            changed = self.share.shrink(pace < u64::from(self.share.window / 16));
            self.shrunk_at = now;
        }
        changed.then_some(self.share.window)
    }
}

#[cfg(test)]
mod tests;
