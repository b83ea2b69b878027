//! The lab's own process: builds it, answers on its socket, ends it.

use std::io::{Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::control::{Answer, Request};
use super::definition::Definition;
use super::directory::{Base, Directory};
use super::launch::{Role, enter};
use super::running::Running;
use super::{Error, Status, Wiring};
use crate::sys::process::wait_for;

/// What a lab is built with.
#[derive(Debug)]
pub struct Means {
    /// The `culvert` program: proxies and the small programs of pods.
    pub program: PathBuf,
    /// The last places where pods find programs, as in `PATH`.
    pub search_path: String,
    /// Where the proxies get their configuration and certificates.
    pub wiring: Wiring,
}

/// What the supervisor tells the process that started it: lines of JSON on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Progress {
    /// Everything runs.
    Ready,
    /// Nothing runs any more, and why.
    Failed(String),
}

/// The whole life of a lab, as `culvert lab supervise`: leaves the machine's namespaces, builds the lab of `name` below `base` from the
/// file in its directory by these means, and serves it until SIGTERM, or until standard input ends: with `leashed` ever,
/// otherwise only before it is ready.
/// Must be called with a single thread. Returns the exit code of the process (this function returns in three processes).
pub fn supervise(base: &Base, name: &str, means: Means, leashed: bool) -> i32 {
    within(base, name, leashed, |directory| serve(name, means, directory, leashed))
}

/// Enters the namespaces of a lab and runs `work` there, on a runtime of one thread; what has to go afterwards goes. Must be called with a
/// single thread. Returns the exit code of the process (this function returns in three processes).
pub(super) fn within<F: Future<Output = Result<(), Error>>>(base: &Base, name: &str, leashed: bool, work: impl FnOnce(Directory) -> F) -> i32 {
    let directory = base.lab(name);
    let failed = |error: &Error| {
        tell(&Progress::Failed(error.to_string()));
        1
    };
    match enter(&directory) {
        // Whoever holds the leash also learns from us that the lab has ended, and no process that has ended stays unnoticed.
        Ok(Role::Launcher(first)) => i32::from(leashed && wait_for(first).is_err()),
        Ok(Role::First(code)) => code,
        Err(error) => failed(&error),
        Ok(Role::Supervisor) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::failed("cannot start a runtime"));
            let outcome = runtime.and_then(|runtime| runtime.block_on(work(directory.clone())));
            // Whoever started us may be gone by now, so what can be cleaned up is cleaned up here.
            let code = outcome.map_or_else(|error| failed(&error), |()| 0);
            if code == 0 {
                directory.remove().ok();
                base.tidy();
            }
            code
        }
    }
}

/// Waits until this process is asked to end, by SIGTERM or SIGINT.
pub(super) fn signalled() -> Result<impl Future<Output = ()>, Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::failed("cannot wait for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::failed("cannot wait for signals"))?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn serve(name: &str, means: Means, directory: Directory, leashed: bool) -> Result<(), Error> {
    let signalled = signalled()?;
    tokio::pin!(signalled);
    let mut let_go = watch_leash()?;
    let text = std::fs::read_to_string(directory.definition()).map_err(Error::failed("cannot read the lab's definition"))?;
    let definition = Definition::parse(&text)?;
    let socket = directory.control_socket();
    let mut running = tokio::select! {
        started = Running::start(name, means, directory, definition) => started?,
        // Half of it may run: the end of the process namespace ends that too. Until it is ready every lab is on its starter's leash.
        () = &mut signalled => return Ok(()),
        _ = &mut let_go => return Ok(()),
    };
    let listener = UnixListener::bind(&socket).map_err(Error::failed(format!("cannot listen on {}", socket.display())))?;
    tell(&Progress::Ready);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if let Err(error) = answer(&mut running, stream).await {
                        eprintln!("a request on the control socket failed: {error}");
                    }
                }
                Err(error) => eprintln!("cannot accept on the control socket: {error}"),
            },
            () = &mut signalled => break,
            _ = &mut let_go, if leashed => break,
        }
    }
    running.stop().await;
    Ok(())
}

/// One request, one answer; the next one waits.
async fn answer(running: &mut Running, stream: UnixStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    tokio::time::timeout(std::time::Duration::from_secs(5), stream.read_line(&mut line)).await??;
    let answer = match serde_json::from_str(&line) {
        Err(error) => Answer::Refused(format!("not a request: {error}")),
        Ok(request) => match obey(running, request).await {
            Ok(status) => Answer::Done(Box::new(status)),
            Err(error) => Answer::Refused(error.to_string()),
        },
    };
    let mut text = serde_json::to_string(&answer)?;
    text.push('\n');
    stream.write_all(text.as_bytes()).await
}

async fn obey(running: &mut Running, request: Request) -> Result<Status, Error> {
    match request {
        Request::Status => {}
        Request::Apply(text) => running.apply(Definition::parse(&text)?).await?,
        Request::RestartProxy(node) => running.restart_proxy(&node).await?,
        Request::RestartControl => running.restart_control().await?,
    }
    Ok(running.status())
}

/// Tells when standard input ends, which it does when whoever holds the other end ends, however that happens.
pub(super) fn watch_leash() -> Result<oneshot::Receiver<()>, Error> {
    let (ended, let_go) = oneshot::channel();
    let hold = move || {
        let mut buffer = [0; 64];
        while matches!(std::io::stdin().read(&mut buffer), Ok(1..)) {}
        ended.send(()).ok();
    };
    std::thread::Builder::new().name("leash".into()).spawn(hold).map_err(Error::failed("cannot watch the leash"))?;
    Ok(let_go)
}

pub(super) fn tell(progress: &impl Serialize) {
    let line = serde_json::to_string(progress).unwrap_or_default();
    // Nobody may be listening any more.
    writeln!(std::io::stdout(), "{line}").ok();
}
