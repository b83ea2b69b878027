//! Programs that a lab runs: started inside namespaces, their output in a file, their end noticed.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::Error;
use crate::sys::netns::NetNs;
use crate::sys::process::{end_group, start_inside};

/// How long a program may take to end by itself.
const PATIENCE: Duration = Duration::from_secs(2);

/// What to start, and where.
#[derive(Debug)]
pub(super) struct Program {
    /// Program and arguments.
    pub(super) arguments: Vec<String>,
    /// Its whole environment.
    pub(super) env: BTreeMap<String, String>,
    /// Network namespace.
    pub(super) netns: NetNs,
    /// Mount namespace; the lab's when absent.
    pub(super) mounts: Option<Arc<OwnedFd>>,
    /// Where its output goes; appended.
    pub(super) log: PathBuf,
}

/// A program that was started.
#[derive(Debug)]
pub(super) struct Task {
    pid: i32,
    end: watch::Receiver<Option<ExitStatus>>,
}

impl Task {
    /// Starts a program. Must be called in the runtime.
    pub(super) fn start(program: Program) -> Result<Self, Error> {
        let name = program.arguments.first().cloned().unwrap_or_default();
        let failed = |what: &str| Error::failed::<std::io::Error>(format!("cannot {what} {name:?}"));
        let log = OpenOptions::new().create(true).append(true).open(&program.log).map_err(failed("open the log of"))?;
        let mut command = Command::new(&name);
        command.args(program.arguments.iter().skip(1)).env_clear().envs(&program.env).current_dir("/").stdin(Stdio::null());
        command.stdout(log.try_clone().map_err(failed("open the log of"))?).stderr(log);
        let network = program.netns.as_fd().try_clone_to_owned().map_err(failed("start"))?;
        start_inside(&mut command, Arc::new(network), program.mounts);
        let mut child = tokio::process::Command::from(command).spawn().map_err(failed("start"))?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).unwrap_or(0);
        let (told, end) = watch::channel(None);
        tokio::spawn(async move { told.send_replace(child.wait().await.ok()) });
        Ok(Self { pid, end })
    }

    /// Process id inside the lab.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// How it ended; `None` while it runs.
    pub(super) fn ended(&self) -> Option<ExitStatus> {
        *self.end.borrow()
    }

    /// In words.
    pub(super) fn state(&self) -> String {
        match self.ended() {
            None => "running".to_owned(),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with {code}"),
                (None, signal) => format!("killed by {}", signal.unwrap_or(0)),
            },
        }
    }

    /// Ends it and what it started: SIGTERM, and SIGKILL when it does not end within two seconds.
    pub(super) async fn stop(&mut self) {
        for gently in [true, false] {
            if self.ended().is_some() {
                return;
            }
            // It leads its own process group, and its id cannot be in use again before its end was noticed.
            end_group(self.pid, gently).ok();
            tokio::time::timeout(PATIENCE, self.end.wait_for(Option::is_some)).await.ok();
        }
    }
}
