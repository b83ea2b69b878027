//! Background tasks that must not end unnoticed.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinError;

/// Watches over the tasks without which the process is not what it claims to be. One that ends or panics without having been
/// told to is a failure of the process: the front door waits for [`Supervisor::failed`] and exits, so that whoever runs it
/// starts it anew. All clones are one.
#[derive(Debug, Clone)]
pub struct Supervisor(Arc<watch::Sender<State>>);

#[derive(Debug, Default)]
struct State {
    /// The first failure; later ones are its consequences.
    failure: Option<TaskFailure>,
    stopping: bool,
    running: usize,
}

/// A task that ended without being told to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("background task {name:?} {end}")]
pub struct TaskFailure {
    /// The name it was supervised under.
    pub name: String,
    /// How it ended.
    pub end: TaskEnd,
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskEnd {
    /// Its future was finished.
    Returned,
    /// It panicked, with this message.
    Panicked(String),
}

impl fmt::Display for TaskEnd {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Returned => formatter.write_str("ended without being told to"),
            Self::Panicked(message) => write!(formatter, "panicked: {message}"),
        }
    }
}

impl Default for Supervisor {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::default())))
    }
}

impl Supervisor {
    /// Watches over nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `task` in the background, on the current runtime. It is expected to end only after [`Supervisor::stop`].
    pub fn supervise(&self, name: impl Into<String>, task: impl Future<Output = ()> + Send + 'static) {
        let (name, supervisor) = (name.into(), self.clone());
        self.0.send_modify(|state| state.running += 1);
        let task = tokio::spawn(task);
        tokio::spawn(async move {
            let end = task.await;
            supervisor.0.send_modify(|state| {
                state.running = state.running.saturating_sub(1);
                state.note(name, end);
            });
        });
    }

    /// From now on tasks may end. A panic remains a failure.
    pub fn stop(&self) {
        self.0.send_modify(|state| state.stopping = true);
    }

    /// Waits for the first task that ends or panics without being told to. Without one it waits for ever.
    pub async fn failed(&self) -> TaskFailure {
        let mut state = self.0.subscribe();
        let failure = state.wait_for(|state| state.failure.is_some()).await.ok().and_then(|state| state.failure.clone());
        match failure {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Waits until no supervised task runs.
    pub async fn finished(&self) {
        // It can only fail when the sender is gone, and that is ours.
        let _ = self.0.subscribe().wait_for(|state| state.running == 0).await;
    }
}

impl State {
    fn note(&mut self, name: String, end: Result<(), JoinError>) {
        let end = match end {
            Ok(()) if self.stopping => return,
            Ok(()) => TaskEnd::Returned,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => TaskEnd::Panicked(message(&*panic)),
                // Cancelled: the runtime is going down.
                Err(_) => return,
            },
        };
        self.failure.get_or_insert(TaskFailure { name, end });
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("(no message)").to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_without_being_told_to_is_named() {
        let supervisor = Supervisor::new();
        supervisor.supervise("stays", std::future::pending());
        supervisor.supervise("leaves", sleep(Duration::from_secs(2)));
        supervisor.supervise("leaves later", sleep(Duration::from_secs(3)));
        assert!(timeout(Duration::from_secs(1), supervisor.failed()).await.is_err());
        let failure = supervisor.failed().await;
        assert_eq!(failure, TaskFailure { name: "leaves".into(), end: TaskEnd::Returned });
        assert_eq!(failure.to_string(), "background task \"leaves\" ended without being told to");
        sleep(LONG).await;
        assert_eq!(supervisor.clone().failed().await, failure, "the first failure stays the answer");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_named_with_its_message_even_when_stopping() {
        let supervisor = Supervisor::new();
        supervisor.stop();
        supervisor.supervise("quiet", async {});
        supervisor.supervise("loud", async { std::panic::resume_unwind(Box::new(String::from("on purpose"))) });
        assert_eq!(supervisor.failed().await.to_string(), "background task \"loud\" panicked: on purpose");
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_were_told_to_end_do_not_fail() {
        let supervisor = Supervisor::new();
        for seconds in [1, 2] {
            supervisor.supervise("worker", sleep(Duration::from_secs(seconds)));
        }
        supervisor.stop();
        supervisor.finished().await;
        assert!(timeout(LONG, supervisor.failed()).await.is_err());
    }
}
