//! The table of identities: what state each is in and when it is due next. Pure: both clocks are handed in, nothing here waits or asks.
//!
//! Monotonic time paces retries; wall time decides renewal and expiry, because certificates are dated by it (it can jump when a machine sleeps).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::Config;
use super::certificate::Validity;
use super::credential::Credential;
use super::error::IdentityError;
use super::metrics::Census;
use crate::model::SpiffeId;

/// How urgently a certificate is wanted; later is more urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Priority {
    /// Renewal of a certificate that still serves.
    Background,
    /// Somebody will probably want it soon.
    Warmup,
    /// A connection is waiting.
    RealTime,
}

/// What a waiter waits for: `None` while a first certificate is being fetched.
pub(super) type Outcome = Option<Result<Arc<Credential>, IdentityError>>;

/// Both clocks at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) monotonic: Instant,
    pub(super) wall: SystemTime,
}

enum State {
    Initializing(Priority),
    Available(Arc<Credential>),
    Unavailable(IdentityError),
}

struct Entry {
    /// Tells this entry from an earlier one of the same identity, whose answer may still arrive. Also the order of arrival.
    ticket: u64,
    state: State,
    /// When it was first wanted; orders requests of one priority.
    wanted_at: Instant,
    /// When an available certificate is renewed.
    renew_at: SystemTime,
    /// Set after a failure: no request before this.
    retry_at: Option<Instant>,
    failures: u32,
    last_failure: Option<IdentityError>,
    /// Present while a request is out; dropping it gives the request up.
    in_flight: Option<oneshot::Sender<()>>,
    /// Prefetched and not forgotten: kept fresh whether used or not.
    pinned: bool,
    /// Fetched since it was last issued (or last failed): kept fresh.
    used: bool,
    outcome: watch::Sender<Outcome>,
}

/// What [`Table::look_up`] found.
pub(super) enum LookUp {
    /// Known now.
    Ready(Result<Arc<Credential>, IdentityError>),
    /// To be waited for.
    Wait(watch::Receiver<Outcome>),
}

/// A request to be sent. It is to be given up when `forgotten` resolves.
pub(super) struct Job {
    pub(super) identity: SpiffeId,
    pub(super) ticket: u64,
    pub(super) forgotten: oneshot::Receiver<()>,
}

/// What became of an answer.
pub(super) enum Settled {
    /// Nobody wants it any more.
    Unwanted,
    /// Installed.
    Installed,
    /// Failed; the next try is after this delay. `serving` tells whether an older certificate still serves.
    Retry { delay: Duration, serving: bool },
}

/// Failures in a row after which an identity that nobody asks for is dropped (about four minutes with the default delays).
const ABANDON_AFTER: u32 = 8;

#[derive(Default)]
pub(super) struct Table {
    entries: HashMap<SpiffeId, Entry>,
    next_ticket: u64,
}

impl Table {
    /// Looks an identity up for a connection, and asks for it urgently if it is not there.
    pub(super) fn look_up(&mut self, identity: &SpiffeId, now: Moment) -> (LookUp, bool) {
        if let Some(entry) = self.entries.get_mut(identity) {
            entry.expire(now.wall);
            let first_use = !std::mem::replace(&mut entry.used, true);
            match &mut entry.state {
                State::Available(credential) => return (LookUp::Ready(Ok(credential.clone())), first_use),
                State::Unavailable(error) => return (LookUp::Ready(Err(error.clone())), first_use),
                State::Initializing(priority) => {
                    *priority = Priority::RealTime;
                    return (LookUp::Wait(entry.outcome.subscribe()), true);
                }
            }
        }
        let entry = self.insert(identity, Priority::RealTime, now);
        entry.used = true;
        (LookUp::Wait(entry.outcome.subscribe()), true)
    }

    /// Asks for an identity ahead of need. `false`: too many wait already, and it was dropped.
    pub(super) fn prefetch(&mut self, identity: &SpiffeId, now: Moment, queue: usize) -> bool {
        if let Some(entry) = self.entries.get_mut(identity) {
            entry.pinned = true;
            if let State::Initializing(priority) = &mut entry.state {
                *priority = (*priority).max(Priority::Warmup);
            }
            return true;
        }
        let waiting = |entry: &&Entry| matches!(entry.state, State::Initializing(Priority::Warmup)) && entry.in_flight.is_none();
        if self.entries.values().filter(waiting).count() >= queue {
            return false;
        }
        self.insert(identity, Priority::Warmup, now).pinned = true;
        true
    }

    fn insert(&mut self, identity: &SpiffeId, priority: Priority, now: Moment) -> &mut Entry {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.entries.entry(identity.clone()).or_insert_with(|| Entry {
            ticket,
            state: State::Initializing(priority),
            wanted_at: now.monotonic,
            renew_at: now.wall,
            retry_at: None,
            failures: 0,
            last_failure: None,
            in_flight: None,
            pinned: false,
            used: false,
            outcome: watch::Sender::new(None),
        })
    }

    /// Drops an identity; whoever waits for it is told.
    pub(super) fn forget(&mut self, identity: &SpiffeId) {
        if let Some(entry) = self.entries.remove(identity) {
            entry.outcome.send_replace(Some(Err(IdentityError::Forgotten(identity.clone()))));
        }
    }

    /// Tells everybody who waits that nothing will come, and gives up what is out.
    pub(super) fn stop(&mut self) {
        for entry in self.entries.values_mut() {
            entry.in_flight = None;
            if let State::Initializing(_) = entry.state {
                entry.outcome.send_replace(Some(Err(IdentityError::Stopped)));
            }
        }
    }

    /// Takes the most urgent due identities, at most `room`, and says when to look again.
    pub(super) fn take_due(&mut self, room: usize, now: Moment) -> (Vec<Job>, Option<Instant>) {
        // Unused certificates lapse.
        self.entries.retain(|_, entry| {
            entry.expire(now.wall);
            let lapsed = matches!(entry.state, State::Initializing(Priority::Background)) && !entry.pinned && !entry.used;
            !lapsed || entry.in_flight.is_some()
        });
        let mut due = Vec::new();
        let mut next: Option<Instant> = None;
        for (identity, entry) in &self.entries {
            if let Some(at) = entry.due(now) {
                if at <= now.monotonic {
                    due.push((std::cmp::Reverse(entry.priority()), at, entry.ticket, identity.clone()));
                } else {
                    next = Some(next.map_or(at, |next| next.min(at)));
                }
            }
        }
        due.sort_unstable_by_key(|one| (one.0, one.1, one.2));
        let mut jobs = Vec::new();
        for (_, _, ticket, identity) in due.into_iter().take(room) {
            if let Some(entry) = self.entries.get_mut(&identity) {
                let (keep, forgotten) = oneshot::channel();
                entry.in_flight = Some(keep);
                jobs.push(Job { identity, ticket, forgotten });
            }
        }
        (jobs, next)
    }

    /// Files an answer. `luck` in `-1.0..=1.0` spreads renewals and retries.
    pub(super) fn settle(
        &mut self,
        (identity, ticket): (&SpiffeId, u64),
        answer: Result<Credential, IdentityError>,
        (now, luck): (Moment, f64),
        config: &Config,
    ) -> Settled {
        let Some(entry) = self.entries.get_mut(identity).filter(|entry| entry.ticket == ticket) else {
            return Settled::Unwanted;
        };
        entry.in_flight = None;
        entry.expire(now.wall);
        match answer {
            Ok(credential) => {
                entry.renew_at = renewal_time(credential.validity(), now.wall, luck);
                let credential = Arc::new(credential);
                entry.state = State::Available(credential.clone());
                entry.retry_at = None;
                entry.failures = 0;
                entry.last_failure = None;
                entry.used = false;
                entry.outcome.send_replace(Some(Ok(credential)));
                Settled::Installed
            }
            Err(error) => {
                entry.failures = entry.failures.saturating_add(1);
                let mut delay = retry_delay(entry.failures, config, luck);
                let serving = if let State::Available(credential) = &entry.state {
                    // Try once more at the latest when it expires.
                    delay = delay.min(credential.not_after.duration_since(now.wall).unwrap_or_default());
                    true
                } else {
                    entry.state = State::Unavailable(error.clone());
                    entry.outcome.send_replace(Some(Err(error.clone())));
                    false
                };
                entry.last_failure = Some(error);
                entry.retry_at = Some(now.monotonic + delay);
                let abandoned = !serving && !entry.pinned && !entry.used && entry.failures >= ABANDON_AFTER;
                entry.used = entry.used && serving;
                if abandoned {
                    self.entries.remove(identity);
                    return Settled::Unwanted;
                }
                Settled::Retry { delay, serving }
            }
        }
    }

    /// Every identity with the words for its state and its certificate, in no order.
    pub(super) fn states(&mut self, now: SystemTime) -> Vec<(SpiffeId, String, Option<Arc<Credential>>)> {
        let each = |(identity, entry): (&SpiffeId, &mut Entry)| {
            entry.expire(now);
            match &entry.state {
                State::Initializing(_) => (identity.clone(), "Initializing".to_owned(), None),
                State::Available(credential) => (identity.clone(), "Available".to_owned(), Some(credential.clone())),
                State::Unavailable(error) => (identity.clone(), format!("Unavailable: {error}"), None),
            }
        };
        self.entries.iter_mut().map(each).collect()
    }

    /// How many identities are in each state.
    pub(super) fn census(&mut self, now: SystemTime) -> Census {
        let mut census = Census::default();
        for entry in self.entries.values_mut() {
            entry.expire(now);
            match &entry.state {
                State::Initializing(_) => census.initializing += 1,
                State::Unavailable(_) => census.unavailable += 1,
                State::Available(credential) => {
                    census.available += 1;
                    census.first_expiry = Some(census.first_expiry.map_or(credential.not_after, |first| first.min(credential.not_after)));
                }
            }
        }
        census
    }
}

impl Entry {
    /// A certificate that has expired serves nobody, whatever the state of its renewal.
    fn expire(&mut self, now: SystemTime) {
        if let State::Available(credential) = &self.state
            && now >= credential.not_after
        {
            if let Some(error) = &self.last_failure {
                self.state = State::Unavailable(error.clone());
                self.outcome.send_replace(Some(Err(error.clone())));
            } else {
                self.state = State::Initializing(Priority::Background);
                self.outcome.send_replace(None);
            }
        }
    }

    fn priority(&self) -> Priority {
        match self.state {
            State::Initializing(priority) => priority,
            State::Available(_) => Priority::Background,
            // Nobody waits (all get the error at once), but connections fail meanwhile.
            State::Unavailable(_) => Priority::Warmup,
        }
    }

    /// When something must be done about it: at or before now means now.
    fn due(&self, now: Moment) -> Option<Instant> {
        if self.in_flight.is_some() {
            return None;
        }
        if let Some(retry_at) = self.retry_at {
            return Some(retry_at);
        }
        match &self.state {
            State::Initializing(_) | State::Unavailable(_) => Some(self.wanted_at),
            State::Available(credential) => {
                // A clock before the certificate's beginning was set back: dates cannot be trusted, get a new one (ref §7.3).
                let at = match (self.pinned || self.used, now.wall < credential.not_before) {
                    (true, true) => now.wall,
                    (true, false) => self.renew_at,
                    (false, _) => credential.not_after,
                };
                match at.duration_since(now.wall) {
                    Ok(ahead) => Some(now.monotonic + ahead),
                    Err(late) => Some(now.monotonic.checked_sub(late.duration()).unwrap_or(now.monotonic)),
                }
            }
        }
    }
}

/// Half of the certificate's life (ref §7.3), spread by 5 % of it so that nodes that started together do not renew together.
///
/// An answer that is old already is not asked for again at once: never before a quarter of what is left has passed, nor within a second.
fn renewal_time(validity: Validity, now: SystemTime, luck: f64) -> SystemTime {
    let life = validity.not_after.duration_since(validity.not_before).unwrap_or_default();
    let left = validity.not_after.duration_since(now).unwrap_or_default();
    let half = validity.not_before + life.mul_f64(0.5 + 0.05 * luck.clamp(-1.0, 1.0));
    half.max(now + (left / 4).max(Duration::from_secs(1).min(left / 2)))
}

/// The delay after this many failures in a row: doubling, ±20 %, never above the limit (ref §7.3).
fn retry_delay(failures: u32, config: &Config, luck: f64) -> Duration {
    let doubled = config.retry_initial.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1).min(30)));
    doubled.min(config.retry_limit).mul_f64(1.0 + 0.2 * luck.clamp(-1.0, 1.0)).min(config.retry_limit)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::UNIX_EPOCH;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn renewal_is_at_half_life_spread_by_five_percent() {
        let validity = Validity { not_before: UNIX_EPOCH, not_after: UNIX_EPOCH + 24 * HOUR };
        assert_eq!(renewal_time(validity, UNIX_EPOCH, 0.0), UNIX_EPOCH + 12 * HOUR);
        assert_eq!(renewal_time(validity, UNIX_EPOCH, -1.0), UNIX_EPOCH + HOUR.mul_f64(24.0 * 0.45));
        assert_eq!(renewal_time(validity, UNIX_EPOCH, 1.0), UNIX_EPOCH + HOUR.mul_f64(24.0 * 0.55));
    }

    #[test]
    fn an_answer_that_is_old_already_is_not_asked_for_again_at_once() {
        let validity = Validity { not_before: UNIX_EPOCH, not_after: UNIX_EPOCH + 24 * HOUR };
        let now = UNIX_EPOCH + 20 * HOUR;
        assert_eq!(renewal_time(validity, now, 0.0), now + HOUR);
        let tiny = Validity { not_before: now, not_after: now + Duration::from_secs(4) };
        assert!(renewal_time(tiny, now, -1.0) >= now + Duration::from_secs(1));
    }

    #[test]
    fn delays_double_from_one_second_to_the_limit_within_a_fifth() {
        let config = Config::default();
        let plain: Vec<u64> = (1..=10).map(|failures| retry_delay(failures, &config, 0.0).as_secs()).collect();
        assert_eq!(plain, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
        assert_eq!(retry_delay(1, &config, -1.0), Duration::from_millis(800));
        assert_eq!(retry_delay(4, &config, 1.0), Duration::from_millis(9600));
        assert_eq!(retry_delay(u32::MAX, &config, 1.0), Duration::from_secs(150));
    }

    #[test]
    fn a_late_answer_for_an_earlier_entry_is_not_filed() {
        let identity = SpiffeId::new("td", "ns", "sa").unwrap();
        let now = Moment { monotonic: Instant::now(), wall: UNIX_EPOCH };
        let mut table = Table::default();
        let ask = |table: &mut Table| {
            table.look_up(&identity, now);
            table.take_due(1, now).0.remove(0)
        };
        let early = ask(&mut table);
        table.forget(&identity);
        let late = ask(&mut table);
        let error = || Err(IdentityError::Stopped);
        let settled = table.settle((&identity, early.ticket), error(), (now, 0.0), &Config::default());
        assert!(matches!(settled, Settled::Unwanted));
        assert_eq!(table.states(UNIX_EPOCH)[0].1, "Initializing");
        let settled = table.settle((&identity, late.ticket), error(), (now, 0.0), &Config::default());
        assert!(matches!(settled, Settled::Retry { serving: false, .. }));
    }
}
