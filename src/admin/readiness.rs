//! Readiness: which tasks of the start, or of the pod watcher, are not done (reference, dataplane §10.3).

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{Method, StatusCode};
use tokio::net::TcpListener;

use super::server::{not_found, serve, text, wrong_method};
use crate::model::Text;

/// Connections of one source; the kubelet uses one.
const PER_SOURCE: usize = 16;

/// The tasks that are not done. Ready when there is none; so register every task of the start before the port is opened.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    pending: BTreeSet<(Text, u64)>,
    next: u64,
}

impl Readiness {
    /// No task, hence ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a task that is not done.
    pub fn register(&self, name: &str) -> ReadyToken {
        let mut state = self.state();
        state.next += 1;
        let task = (Text::from(name), state.next);
        state.pending.insert(task.clone());
        ReadyToken { readiness: self.clone(), task }
    }

    /// Names of the tasks that are not done, sorted, each once.
    #[must_use]
    pub fn pending(&self) -> Vec<Text> {
        let mut names: Vec<Text> = self.state().pending.iter().map(|(name, _)| name.clone()).collect();
        names.dedup();
        names
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One task. Dropping it means that it is done: a task that failed must end the process instead (`lifecycle::supervise`).
#[must_use = "the task counts as done as soon as its token is dropped"]
#[derive(Debug)]
pub struct ReadyToken {
    readiness: Readiness,
    task: (Text, u64),
}

impl ReadyToken {
    /// The task is done.
    pub fn ready(&self) {
        self.readiness.state().pending.remove(&self.task);
    }

    /// The task is not done, again: the pod watcher lost its connection, or a pod's proxy fails.
    pub fn rearm(&self) {
        self.readiness.state().pending.insert(self.task.clone());
    }
}

impl Drop for ReadyToken {
    fn drop(&mut self) {
        self.ready();
    }
}

/// Answers `GET /healthz/ready` until `shutdown`.
pub async fn serve_readiness(listener: TcpListener, readiness: Readiness, shutdown: impl Future<Output = ()>) {
    let handler = move |request: http::Request<hyper::body::Incoming>| {
        let answer = match (request.uri().path(), request.method()) {
            ("/healthz/ready", &Method::GET) => match readiness.pending() {
                pending if pending.is_empty() => text(StatusCode::OK, "ready\n"),
                pending => text(StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {}\n", pending.join(", "))),
            },
            ("/healthz/ready", _) => wrong_method(&Method::GET, "only GET\n"),
            _ => not_found(),
        };
        std::future::ready(answer)
    };
    serve(listener, PER_SOURCE, handler, shutdown).await;
}
