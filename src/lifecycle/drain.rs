//! Telling tasks to end, and knowing when they have.
//!
//! One side holds the trigger, every task a watcher. Dropping the watcher is how a task says that it is done, so a task that
//! ends in whatever way, panic included, is counted. Each pod has its own channel (removal is immediate), the process another.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// How to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DrainMode {
    /// Stop accepting at once, and let what is open finish until the deadline.
    Graceful,
    /// Close everything now: the pod is gone, or the deadline has passed.
    Immediate,
}

/// Starts a drain, once. Dropping it means [`DrainMode::Immediate`]: nobody is left who could ask for more.
#[derive(Debug)]
#[must_use = "dropping the trigger ends everything at once"]
pub struct DrainTrigger {
    signal: Signal,
    /// Closed when the last watcher is dropped; nothing is ever sent.
    watchers: mpsc::Receiver<()>,
}

/// Says Immediate when it goes away, in whatever way.
#[derive(Debug)]
struct Signal(watch::Sender<Option<DrainMode>>);

impl Drop for Signal {
    fn drop(&mut self) {
        self.0.send_replace(Some(DrainMode::Immediate));
    }
}

/// One task's view of a drain. Hold it as long as there is work to finish, and no longer.
#[derive(Debug, Clone)]
pub struct DrainWatcher {
    signal: watch::Receiver<Option<DrainMode>>,
    hold: DrainHold,
}

/// Work that a drain waits for and that is told of it in another way: a third of a [`DrainWatcher`], for what every idle connection keeps.
#[derive(Debug, Clone)]
pub struct DrainHold(Arc<Hold>);

#[derive(Debug)]
struct Hold {
    signal: watch::Receiver<Option<DrainMode>>,
    /// The watchers are gone when this is.
    _alive: mpsc::Sender<()>,
}

impl DrainHold {
    /// Whether there is no more time.
    #[must_use]
    pub fn is_forced(&self) -> bool {
        *self.0.signal.borrow() == Some(DrainMode::Immediate)
    }
}

/// A view of a drain that does not hold it up.
#[derive(Debug, Clone)]
pub struct DrainObserver(watch::Receiver<Option<DrainMode>>);

impl DrainObserver {
    /// Waits until there is no more time, as [`DrainWatcher::forced`] does.
    pub async fn forced(&mut self) {
        // The sender says Immediate before it goes, so that an error means the same.
        let _ = self.0.wait_for(|mode| *mode == Some(DrainMode::Immediate)).await;
    }
}

/// A trigger and the first watcher.
pub fn channel() -> (DrainTrigger, DrainWatcher) {
    let (signal, receiver) = watch::channel(None);
    let (alive, watchers) = mpsc::channel(1);
    (
        DrainTrigger { signal: Signal(signal), watchers },
        DrainWatcher { hold: DrainHold(Arc::new(Hold { signal: receiver.clone(), _alive: alive })), signal: receiver },
    )
}

impl DrainTrigger {
    /// Tells every watcher, and waits until all of them are dropped (`true`) or `deadline` has passed (`false`). Whoever is left
    /// then is told [`DrainMode::Immediate`]; so it is when this future is dropped before its end.
    pub async fn start(mut self, mode: DrainMode, deadline: Duration) -> bool {
        self.signal.0.send_replace(Some(mode));
        timeout(deadline, self.watchers.recv()).await.is_ok()
    }
}

impl DrainWatcher {
    /// Waits for the drain to start, and says how. From then on it answers at once.
    pub async fn signaled(&mut self) -> DrainMode {
        self.wait(|mode| mode.is_some()).await
    }

    /// Waits until there is no more time: an immediate drain, or the deadline of a graceful one.
    pub async fn forced(&mut self) {
        self.wait(|mode| mode == Some(DrainMode::Immediate)).await;
    }

    /// For who only wants to know.
    #[must_use]
    pub fn observer(&self) -> DrainObserver {
        DrainObserver(self.signal.clone())
    }

    /// What is left of it when somebody else wakes the work.
    #[must_use]
    pub fn into_hold(self) -> DrainHold {
        self.hold
    }

    /// The drain that is on now, if any.
    #[must_use]
    pub fn mode(&self) -> Option<DrainMode> {
        *self.signal.borrow()
    }

    /// The sender says Immediate before it goes, so that an error means the same.
    async fn wait(&mut self, until: impl Fn(Option<DrainMode>) -> bool) -> DrainMode {
        let mode = self.signal.wait_for(|mode| until(*mode)).await;
        mode.ok().and_then(|mode| *mode).unwrap_or(DrainMode::Immediate)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::time::{Instant, sleep};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_when_the_last_watcher_is_dropped() {
        let (trigger, watcher) = channel();
        let begin = Instant::now();
        for seconds in [1, 7, 3] {
            let mut watcher = watcher.clone();
            tokio::spawn(async move {
                assert_eq!(watcher.mode(), None);
                assert_eq!(watcher.signaled().await, DrainMode::Graceful);
                sleep(Duration::from_secs(seconds)).await;
                assert_eq!(watcher.signaled().await, DrainMode::Graceful);
            });
        }
        drop(watcher);
        tokio::task::yield_now().await;
        assert!(trigger.start(DrainMode::Graceful, DEADLINE).await);
        assert_eq!(begin.elapsed(), Duration::from_secs(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_at_its_deadline_and_then_forces_the_rest() {
        let (trigger, mut watcher) = channel();
        let mut other = watcher.clone();
        let forced = tokio::spawn(async move {
            other.forced().await;
            Instant::now()
        });
        let begin = Instant::now();
        assert!(!trigger.start(DrainMode::Graceful, DEADLINE).await);
        assert_eq!(begin.elapsed(), DEADLINE);
        assert_eq!(forced.await.unwrap(), begin + DEADLINE);
        assert_eq!((watcher.mode(), watcher.signaled().await), (Some(DrainMode::Immediate), DrainMode::Immediate));
    }

    #[tokio::test(start_paused = true)]
    async fn an_immediate_drain_is_immediate_and_without_watchers_over_at_once() {
        let (trigger, mut watcher) = channel();
        let task = tokio::spawn(async move {
            watcher.forced().await;
            watcher.mode()
        });
        assert!(trigger.start(DrainMode::Immediate, DEADLINE).await);
        assert_eq!(task.await.unwrap(), Some(DrainMode::Immediate));
        let (trigger, watcher) = channel();
        drop(watcher);
        assert!(trigger.start(DrainMode::Graceful, Duration::ZERO).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_trigger_or_an_abandoned_drain_means_immediate() {
        let (trigger, mut watcher) = channel();
        drop(trigger);
        assert_eq!((watcher.mode(), watcher.signaled().await), (Some(DrainMode::Immediate), DrainMode::Immediate));
        watcher.forced().await;
        let (trigger, mut watcher) = channel();
        assert!(timeout(Duration::from_secs(1), trigger.start(DrainMode::Graceful, DEADLINE)).await.is_err());
        watcher.forced().await;
        assert_eq!(watcher.clone().signaled().await, DrainMode::Immediate);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_does_not_hold_a_drain_up() {
        let (trigger, mut watcher) = channel();
        let task = tokio::spawn(async move {
            watcher.signaled().await;
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(trigger.start(DrainMode::Graceful, DEADLINE).await);
        assert!(task.await.unwrap_err().is_panic());
    }
}
