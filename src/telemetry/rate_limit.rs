//! Rate-limited logging: whoever can cause a line must not be able to cause a million (design §9: at most 10 lines a second per
//! cause).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Lines suppressed since the process started, all causes together.
static SUPPRESSED: AtomicU64 = AtomicU64::new(0);

/// Limits with suppressed lines that nobody was told of yet.
static UNREPORTED: Mutex<Vec<&'static RateLimit>> = Mutex::new(Vec::new());

/// At most so many lines in each second; the rest is counted. Costs one atomic operation.
#[derive(Debug)]
pub struct RateLimit {
    cause: &'static str,
    per_second: u32,
    /// Second since the first use of any limit (upper half) and lines in it (lower half).
    window: AtomicU64,
    suppressed: AtomicU64,
    listed: AtomicBool,
}

impl RateLimit {
    /// A limit of `per_second` lines (at least one).
    #[must_use]
    pub const fn new(per_second: u32) -> Self {
        Self::of("lines of one cause", per_second)
    }

    /// The same, with the words that [`report_suppressed`] shows.
    #[must_use]
    pub const fn of(cause: &'static str, per_second: u32) -> Self {
        let per_second = if per_second == 0 { 1 } else { per_second };
        Self { cause, per_second, window: AtomicU64::new(0), suppressed: AtomicU64::new(0), listed: AtomicBool::new(false) }
    }

    /// Whether this line may be written; `false` counts it as suppressed. The caller of a limit that is not a static says itself how
    /// many were suppressed: [`RateLimit::take_suppressed`].
    pub fn admit(&self) -> bool {
        self.admit_in(second())
    }

    /// [`RateLimit::admit`], and the log's thread reports what was suppressed within about a second.
    pub fn admit_listed(&'static self) -> bool {
        let admitted = self.admit();
        if !admitted && !self.listed.swap(true, Ordering::AcqRel) {
            UNREPORTED.lock().unwrap_or_else(PoisonError::into_inner).push(self);
        }
        admitted
    }

    /// How many lines were suppressed since the last call.
    pub fn take_suppressed(&self) -> u64 {
        self.suppressed.swap(0, Ordering::AcqRel)
    }

    fn admit_in(&self, second: u32) -> bool {
        let admitted = self.window.fetch_update(Ordering::AcqRel, Ordering::Acquire, |window| {
            let now = u64::from(second) << 32;
            match (window & !u64::from(u32::MAX) == now, window & u64::from(u32::MAX)) {
                (false, _) => Some(now | 1),
                (true, used) if used < u64::from(self.per_second) => Some(window + 1),
                (true, _) => None,
            }
        });
        if admitted.is_err() {
            self.suppressed.fetch_add(1, Ordering::AcqRel);
            SUPPRESSED.fetch_add(1, Ordering::Relaxed);
        }
        admitted.is_ok()
    }
}

/// Seconds since the first use, counted from one so that a fresh window is never the current one.
fn second() -> u32 {
    static START: OnceLock<Instant> = OnceLock::new();
    u32::try_from(START.get_or_init(Instant::now).elapsed().as_secs()).unwrap_or(u32::MAX - 1).saturating_add(1)
}

/// Lines suppressed since the process started.
pub(super) fn suppressed_lines() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// Writes one line for each cause with suppressed lines. The log's thread calls it every second.
pub fn report_suppressed() {
    let limits = std::mem::take(&mut *UNREPORTED.lock().unwrap_or_else(PoisonError::into_inner));
    for limit in limits {
        limit.listed.store(false, Ordering::Release);
        let suppressed = limit.take_suppressed();
        if suppressed > 0 {
            tracing::warn!(target: "culvert::telemetry", cause = limit.cause, suppressed, "log lines suppressed");
        }
    }
}

/// Logs at most 10 lines a second from this place: `limited!(warn, "failed to accept", error = %error, "cannot accept")`. The first
/// argument is the `tracing` macro, the second the cause as the "log lines suppressed" line names it.
macro_rules! limited {
    ($level:ident, $cause:literal, $($event:tt)+) => {{
        static LIMIT: $crate::telemetry::RateLimit = $crate::telemetry::RateLimit::of($cause, 10);
        if LIMIT.admit_listed() {
            tracing::$level!($($event)+);
        }
    }};
}
pub(crate) use limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_pass_in_a_second_and_the_rest_is_counted() {
        let limit = RateLimit::new(10);
        assert_eq!((0..100).filter(|_| limit.admit_in(7)).count(), 10);
        assert_eq!(limit.take_suppressed(), 90);
        assert_eq!(limit.take_suppressed(), 0);
        assert_eq!((0..100).filter(|_| limit.admit_in(8)).count(), 10);
    }

    #[test]
    fn racing_threads_share_one_allowance() {
        let limit = RateLimit::new(10);
        let passed: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| (0..1000).filter(|_| limit.admit_in(1)).count())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
        });
        assert_eq!(passed, 10);
        assert_eq!(limit.take_suppressed(), 3990);
    }
}
