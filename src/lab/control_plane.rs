//! The lab's control plane: one `culvert control` in a namespace of its own between the nodes, and what each proxy needs to reach it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::Error;
use super::control::ControlPlaneStatus;
use super::definition::Definition;
use super::directory::{Directory, write_atomically};
use super::plan::control_plane_address;
use super::pod::place;
use super::proxies::wait_until_ready;
use super::tasks::{Program, Task};
use crate::sys::netns::NetNs;

const PORT: u16 = 15012;

/// Its name for people, and in `lab logs`.
pub(super) const NAME: &str = "control";

/// Short: nothing happens in a lab but what somebody just did and waits for.
const DEBOUNCE: &str = "10ms";

/// A control plane that was started.
#[derive(Debug)]
pub(super) struct ControlPlane {
    program: PathBuf,
    directory: Directory,
    netns: NetNs,
    task: Task,
}

impl ControlPlane {
    /// Starts one in its namespace and waits until it serves.
    pub(super) async fn start(program: &Path, directory: &Directory, definition: &Definition, netns: NetNs) -> Result<Self, Error> {
        let failed = || Error::failed::<io::Error>("cannot write the tokens of the lab's proxies");
        write_tokens(directory, definition).map_err(failed())?;
        let task = spawn(program, directory, &netns)?;
        let started = Self { program: program.to_owned(), directory: directory.clone(), netns, task };
        started.ready().await?;
        Ok(started)
    }

    /// Ends it and starts another one.
    pub(super) async fn restart(&mut self) -> Result<(), Error> {
        self.task.stop().await;
        self.task = spawn(&self.program, &self.directory, &self.netns)?;
        self.ready().await
    }

    pub(super) async fn stop(&mut self) {
        self.task.stop().await;
    }

    pub(super) fn status(&self) -> ControlPlaneStatus {
        ControlPlaneStatus {
            pid: if self.task.ended().is_some() { 0 } else { self.task.pid() },
            host_pid: 0,
            state: self.task.state(),
            address: address(),
            netns: place(&self.netns),
            log: self.directory.control_plane_log(),
        }
    }

    async fn ready(&self) -> Result<(), Error> {
        wait_until_ready("the control plane", &self.task, &self.netns, &self.directory.control_plane_log()).await
    }
}

/// What a node's proxy has in its environment to learn everything over the wire.
pub(super) fn proxy_env(directory: &Directory, node: &str) -> BTreeMap<String, String> {
    let url = format!("https://{}", address());
    let root = directory.ca().join("root-cert.pem").display().to_string();
    let token = token_path(directory, node).display().to_string();
    let env = [("XDS_ADDRESS", &url), ("CA_ADDRESS", &url), ("XDS_ROOT_CA", &root), ("CA_ROOT_CA", &root), ("AUTH_TOKEN", &token)];
    env.into_iter().map(|(name, value)| (name.to_owned(), value.clone())).collect()
}

fn address() -> SocketAddr {
    SocketAddr::new(control_plane_address().v4.into(), PORT)
}

fn spawn(program: &Path, directory: &Directory, netns: &NetNs) -> Result<Task, Error> {
    let path = |path: PathBuf| path.display().to_string();
    let listen = address();
    let flags = [
        ("config", path(directory.mesh_file())),
        ("ca-dir", path(directory.ca())),
        ("token-file", path(token_file(directory))),
        ("listen", listen.to_string()),
        ("server-names", format!("istiod.istio-system.svc,{}", listen.ip())),
        ("debounce", DEBOUNCE.to_owned()),
    ];
    let flags = flags.into_iter().map(|(name, value)| format!("--{name}={value}"));
    let arguments = [path(program.to_owned()), "control".to_owned()].into_iter().chain(flags).collect();
    let env = [("RUST_LOG", "info"), ("RUST_BACKTRACE", "1")].map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Task::start(Program { arguments, env, netns: netns.clone(), mounts: None, log: directory.control_plane_log() })
}

/// One token for every node, which gives the identities of the pods that the mesh file places on it.
fn write_tokens(directory: &Directory, definition: &Definition) -> io::Result<()> {
    let mut tokens = Vec::new();
    for node in &definition.nodes {
        let token = format!("{:032x}", rand::random::<u128>());
        // Not atomically: nobody reads it yet. Only this user may.
        let mut options = OpenOptions::new();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(token_path(directory, &node.name))?;
        file.write_all(token.as_bytes())?;
        tokens.push(json!({"token": token, "node": node.name, "identities": ["node"]}));
    }
    write_atomically(&token_file(directory), &json!({ "tokens": tokens }).to_string())
}

fn token_file(directory: &Directory) -> PathBuf {
    directory.tokens().join("tokens.yaml")
}

fn token_path(directory: &Directory, node: &str) -> PathBuf {
    directory.tokens().join(format!("node.{node}"))
}
