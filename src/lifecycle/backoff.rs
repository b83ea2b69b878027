//! Waiting before the next attempt.

use std::time::Duration;

use rand::RngExt;

/// Delays that double from `initial` to `max`, each drawn evenly between zero and that bound ("full jitter"): peers that failed
/// together do not come back together.
///
/// ```
/// # use std::time::Duration;
/// let mut backoff = culvert::lifecycle::Backoff::new(Duration::from_millis(10), Duration::from_secs(15));
/// assert!(backoff.next_delay() <= Duration::from_millis(10));
/// assert!(backoff.next_delay() <= Duration::from_millis(20));
/// ```
#[derive(Debug, Clone)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    bound: Duration,
}

/// Why two durations do not make a backoff.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackoffError {
    /// Zero never grows by doubling.
    #[error("the first backoff delay must be longer than zero")]
    ZeroInitial,
    /// The bound is below the start.
    #[error("the longest backoff delay ({max:?}) is shorter than the first one ({initial:?})")]
    MaxBelowInitial {
        /// The first delay.
        initial: Duration,
        /// The longest delay.
        max: Duration,
    },
}

impl Backoff {
    /// The shortest first bound of a backoff made by [`Backoff::new`], so that a mistake never makes a busy loop.
    pub const SHORTEST: Duration = Duration::from_millis(1);

    /// For durations that are constants of the program. Never fails: an initial bound of zero becomes [`Backoff::SHORTEST`], and
    /// `max` is at least the initial bound.
    #[must_use]
    pub const fn new(initial: Duration, max: Duration) -> Self {
        let initial = if initial.is_zero() { Self::SHORTEST } else { initial };
        let max = if max.as_nanos() < initial.as_nanos() { initial } else { max };
        Self { initial, max, bound: initial }
    }

    /// For durations that somebody configured: says what is wrong with them instead of repairing it.
    pub fn checked(initial: Duration, max: Duration) -> Result<Self, BackoffError> {
        if initial.is_zero() {
            return Err(BackoffError::ZeroInitial);
        }
        if max < initial {
            return Err(BackoffError::MaxBelowInitial { initial, max });
        }
        Ok(Self::new(initial, max))
    }

    /// The next delay; doubles the bound of the one after it.
    pub fn next_delay(&mut self) -> Duration {
        let bound = self.bound;
        self.bound = bound.saturating_mul(2).min(self.max);
        rand::rng().random_range(Duration::ZERO..=bound)
    }

    /// The bound of the next delay.
    #[must_use]
    pub fn bound(&self) -> Duration {
        self.bound
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.bound = self.initial;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn delays_stay_below_a_bound_that_doubles_up_to_max(
            initial in 1..10_000_000_u64, factor in 1..10_000_u64, steps in 1..40_usize, resets in 0..3_u8,
        ) {
            let (initial, max) = (Duration::from_nanos(initial), Duration::from_nanos(initial * factor));
            let mut backoff = Backoff::checked(initial, max).unwrap();
            for _ in 0..=resets {
                let mut bound = initial;
                for _ in 0..steps {
                    prop_assert_eq!(backoff.bound(), bound);
                    prop_assert!(backoff.next_delay() <= bound);
                    bound = (bound * 2).min(max);
                }
                backoff.reset();
            }
        }

        #[test]
        fn no_durations_make_it_panic(initial in any::<Duration>(), max in any::<Duration>()) {
            let mut backoff = Backoff::new(initial, max);
            for _ in 0..100 {
                let bound = backoff.bound();
                prop_assert!(!bound.is_zero() && backoff.next_delay() <= bound);
            }
            let initial_used = if initial.is_zero() { Backoff::SHORTEST } else { initial };
            prop_assert_eq!(backoff.bound(), max.max(initial_used));
            prop_assert_eq!(Backoff::checked(initial, max).is_ok(), !initial.is_zero() && initial <= max);
        }
    }

    #[test]
    fn delays_spread_over_the_whole_range() {
        let second = Duration::from_secs(1);
        let delays: Vec<Duration> = (0..4000).map(|_| Backoff::new(second, second).next_delay()).collect();
        for tenth in 0..10 {
            let range = second * tenth / 10..second * (tenth + 1) / 10;
            let inside = delays.iter().filter(|delay| range.contains(*delay)).count();
            assert!((250..550).contains(&inside), "{inside} of 4000 delays in {range:?}");
        }
    }
}
