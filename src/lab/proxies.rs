//! Starting the real proxies: one in the namespace of every node, and one in that of every dedicated pod.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Error;
use super::control::ProxyStatus;
use super::directory::Directory;
use super::pod::last_lines;
use super::tasks::{Program, Task};
use crate::sys::netns::NetNs;

const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
const READINESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15021);
const READY_WITHIN: Duration = Duration::from_secs(20);

/// A proxy to start.
#[derive(Debug)]
pub(super) struct Proxy<'a> {
    /// This program.
    pub(super) program: &'a Path,
    /// Where it runs.
    pub(super) netns: &'a NetNs,
    /// Its log.
    pub(super) log: PathBuf,
    /// Its whole environment.
    pub(super) env: BTreeMap<String, String>,
}

impl Proxy<'_> {
    /// Starts it. It is not ready yet.
    pub(super) fn start(self) -> Result<Task, Error> {
        let arguments = vec![self.program.display().to_string(), "proxy".to_owned()];
        Task::start(Program { arguments, env: self.env, netns: self.netns.clone(), mounts: None, log: self.log })
    }
}

/// What a proxy has in its environment that learns everything from files.
pub(super) fn shared_env(directory: &Directory) -> BTreeMap<String, String> {
    let path = |path: PathBuf| path.display().to_string();
    let shared = [("LOCAL_XDS_PATH", path(directory.mesh_file())), ("LOCAL_CA_DIR", path(directory.ca()))];
    shared.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(log_env()).collect()
}

/// What every proxy has in its environment.
pub(super) fn log_env() -> BTreeMap<String, String> {
    // Nobody to ask for other names: the machine's nameservers are out of reach of a lab.
    let all = [("RUST_LOG", "info"), ("RUST_BACKTRACE", "1"), ("CULVERT_RESOLV_CONF", "/dev/null")];
    all.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// Waits until a proxy, or whatever has its readiness page, says that it is ready.
pub(super) async fn wait_until_ready(whose: &str, task: &Task, netns: &NetNs, log: &Path) -> Result<(), Error> {
    let deadline = Instant::now() + READY_WITHIN;
    let mut answer = "no answer".to_owned();
    loop {
        match ask_readiness(netns).await {
            Ok(text) if text.starts_with("HTTP/1.1 200") => return Ok(()),
            Ok(text) => answer = text.lines().last().unwrap_or_default().to_owned(),
            Err(_) => {}
        }
        if task.ended().is_some() {
            return Err(Error::Failed { what: format!("{whose} {}", task.state()), cause: last_lines(log) });
        }
        if Instant::now() > deadline {
            return Err(Error::Failed { what: format!("{whose} is not ready within {READY_WITHIN:?} ({answer})"), cause: last_lines(log) });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn ask_readiness(netns: &NetNs) -> std::io::Result<String> {
    let connect = || std::net::TcpStream::connect_timeout(&READINESS, Duration::from_millis(200));
    let stream = netns.run(connect)??;
    stream.set_nonblocking(true)?;
    let mut stream = tokio::net::TcpStream::from_std(stream)?;
    let mut answer = String::new();
    let talk = async {
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
        stream.read_to_string(&mut answer).await
    };
    tokio::time::timeout(Duration::from_secs(1), talk).await??;
    Ok(answer)
}

/// What a proxy tells about itself.
pub(super) fn status(task: &Task, log: PathBuf) -> ProxyStatus {
    let pid = if task.ended().is_some() { 0 } else { task.pid() };
    ProxyStatus { pid, host_pid: 0, state: task.state(), admin: ADMIN.to_string(), log }
}
