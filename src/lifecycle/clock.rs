//! The wall clock, as a value that is passed in.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

/// Where wall-clock time comes from: what decides about the validity of certificates. Timers use monotonic time instead
/// (`tokio::time`), so that a step of the clock cuts nothing.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    set: Option<SettableTime>,
}

/// A time that stands still until it is set. All clones are one.
#[derive(Debug, Clone)]
pub struct SettableTime(Arc<RwLock<SystemTime>>);

impl Clock {
    /// The clock of the system.
    #[must_use]
    pub fn system() -> Self {
        Self::default()
    }

    /// A clock that shows what `time` is set to.
    #[must_use]
    pub fn fixed(time: SettableTime) -> Self {
        Self { set: Some(time) }
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        self.set.as_ref().map_or_else(SystemTime::now, SettableTime::now)
    }
}

impl SettableTime {
    /// Starts at `time`.
    #[must_use]
    pub fn new(time: SystemTime) -> Self {
        Self(Arc::new(RwLock::new(time)))
    }

    /// What it is set to.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        *self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Steps to `time`, forward or back.
    pub fn set(&self, time: SystemTime) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = time;
    }

    /// Goes forward.
    pub fn advance(&self, by: Duration) {
        let mut time = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *time = time.checked_add(by).unwrap_or(*time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fixed_clock_shows_what_it_is_set_to_and_the_system_clock_goes() {
        let time = SettableTime::new(SystemTime::UNIX_EPOCH);
        let (clock, other) = (Clock::fixed(time.clone()), Clock::fixed(time.clone()));
        time.advance(Duration::from_secs(5));
        assert_eq!(clock.now(), SystemTime::UNIX_EPOCH + Duration::from_secs(5));
        time.set(SystemTime::UNIX_EPOCH);
        assert_eq!((clock.now(), other.now()), (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH));
        assert!(Clock::system().now() >= SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    }
}
