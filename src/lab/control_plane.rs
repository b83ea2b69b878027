//! The lab's control plane: one `culvert control` in a namespace of its own between the nodes, and what each proxy needs to reach it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Error;
use super::control::ControlPlaneStatus;
use super::definition::{Definition, Pod};
use super::directory::{Directory, write_atomically};
use super::plan::{control_plane_address, pod_key};
use super::pod::place;
use super::proxies::wait_until_ready;
use super::tasks::{Program, Task};
use crate::model::SpiffeId;
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
    tokens: BTreeMap<String, Token>,
}

/// Who a token is given to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    token: String,
    node: String,
    /// `node`: those of the pods that the mesh file places on the node.
    identity: String,
}

impl ControlPlane {
    /// Starts one in its namespace and waits until it serves.
    pub(super) async fn start(program: &Path, directory: &Directory, definition: &Definition, netns: NetNs) -> Result<Self, Error> {
        let mut tokens = BTreeMap::new();
        for node in &definition.nodes {
            admit(directory, &mut tokens, (&node_token(&node.name), &node.name), "node")?;
        }
        let task = spawn(program, directory, &netns)?;
        let started = Self { program: program.to_owned(), directory: directory.clone(), netns, task, tokens };
        started.ready().await?;
        Ok(started)
    }

    /// Ends it and starts another one.
    pub(super) async fn restart(&mut self) -> Result<(), Error> {
        self.task.stop().await;
        self.task = spawn(&self.program, &self.directory, &self.netns)?;
        self.ready().await
    }

    /// Lets a pod's own proxy, which asks for nobody's certificate but its pod's, be that pod.
    pub(super) fn admit_pod(&mut self, pod: &Pod) -> Result<(), Error> {
        let Pod { trust_domain, namespace, service_account, .. } = pod;
        let identity = SpiffeId::new(trust_domain, namespace, service_account);
        let identity = identity.map_err(Error::failed(format!("pod {} has no identity", pod_key(pod))))?;
        admit(&self.directory, &mut self.tokens, (&pod_token(pod), &pod.node), identity.uri())
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

/// What a proxy with this token has in its environment to learn everything over the wire.
pub(super) fn proxy_env(directory: &Directory, token: &str) -> BTreeMap<String, String> {
    let url = format!("https://{}", address());
    let root = directory.ca().join("root-cert.pem").display().to_string();
    let token = directory.tokens().join(token).display().to_string();
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

/// The name of the token of a node's proxy.
pub(super) fn node_token(node: &str) -> String {
    format!("node.{node}")
}

/// The name of the token of a pod's own proxy.
pub(super) fn pod_token(pod: &Pod) -> String {
    format!("pod.{}", pod_key(pod).replace('/', "."))
}

/// Makes a token and lets the control plane know it, which reads the file when it has changed. The first one made for somebody stays.
fn admit(directory: &Directory, tokens: &mut BTreeMap<String, Token>, (name, node): (&str, &str), identity: &str) -> Result<(), Error> {
    let known = tokens.get(name);
    if known.is_some_and(|known| known.node == node && known.identity == identity) {
        return Ok(());
    }
    let token = known.map_or_else(|| format!("{:032x}", rand::random::<u128>()), |known| known.token.clone());
    let write = |token: &str| -> io::Result<()> {
        let mut options = OpenOptions::new();
        // Only this user may read it.
        options.create(true).truncate(true).write(true).mode(0o600).open(directory.tokens().join(name))?.write_all(token.as_bytes())
    };
    let failed = || Error::failed::<io::Error>(format!("cannot write the token {name}"));
    write(&token).map_err(failed())?;
    tokens.insert(name.to_owned(), Token { token, node: node.to_owned(), identity: identity.to_owned() });
    let all: Vec<Value> = tokens.values().map(|one| json!({"token": one.token, "node": one.node, "identities": [one.identity]})).collect();
    write_atomically(&token_file(directory), &json!({ "tokens": all }).to_string()).map_err(failed())
}

fn token_file(directory: &Directory) -> PathBuf {
    directory.tokens().join("tokens.yaml")
}
