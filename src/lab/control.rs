//! What a lab tells about itself, and the lines of JSON that its control socket takes and gives.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::sys::process::listening_process;

/// Applying a definition may start pods; everything else is answered at once.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// One request: a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Request {
    /// Tell about yourself.
    Status,
    /// Become what this file says.
    Apply(String),
    /// End the proxy of this node (SIGTERM) and start a new one when it is gone.
    RestartProxy(String),
    /// End the control plane (SIGTERM) and start a new one when it is gone.
    RestartControl,
}

/// The answer: a line of JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Answer {
    /// The state afterwards.
    Done(Box<Status>),
    /// Why it could not be done.
    Refused(String),
}

/// A running lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Name.
    pub name: String,
    /// The run directory.
    pub directory: PathBuf,
    /// The proxies' configuration file.
    pub mesh_file: PathBuf,
    /// Congestion control of every namespace of the lab.
    pub congestion_control: String,
    /// The supervisor's process id as this machine sees it (0 inside the lab).
    #[serde(default)]
    pub supervisor: i32,
    /// The namespace between the nodes.
    pub fabric: Netns,
    /// The control plane; none if the proxies read files.
    #[serde(default)]
    pub control: Option<ControlPlaneStatus>,
    /// The nodes.
    pub nodes: Vec<NodeStatus>,
    /// The pods.
    pub pods: Vec<PodStatus>,
    /// The services.
    pub services: Vec<ServiceStatus>,
}

/// Where a namespace can be opened.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Netns {
    /// Descriptor in the supervisor.
    pub descriptor: i32,
    /// The same as a path on this machine, `/proc/SUPERVISOR/fd/N`.
    #[serde(default)]
    pub path: PathBuf,
}

/// A control plane. Its readiness (15021) and metrics (15014) ports are in its namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControlPlaneStatus {
    /// Process id inside the lab.
    pub pid: i32,
    /// Process id as this machine sees it (0: it has ended).
    #[serde(default)]
    pub host_pid: i32,
    /// `running`, `exited with 1`, `killed by 9`.
    pub state: String,
    /// Where it serves xDS and certificates, on the fabric.
    pub address: SocketAddr,
    /// Its network namespace.
    pub netns: Netns,
    /// Its log.
    pub log: PathBuf,
}

/// A node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Name.
    pub name: String,
    /// Its addresses on the fabric.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace.
    pub netns: Netns,
    /// Its proxy.
    pub proxy: ProxyStatus,
    /// The socket on which its proxy is told of pods.
    pub zds: PathBuf,
}

/// A proxy. Its admin (15000), readiness (15021) and metrics (15020) ports are in the namespace it runs in.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// Process id inside the lab.
    pub pid: i32,
    /// Process id as this machine sees it (0: it has ended).
    #[serde(default)]
    pub host_pid: i32,
    /// `running`, `exited with 1`, `killed by 9`.
    pub state: String,
    /// Admin address inside its namespace.
    pub admin: String,
    /// Its log.
    pub log: PathBuf,
}

/// A pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// SPIFFE identity.
    pub identity: String,
    /// Uid in ZDS and in the mesh file.
    pub uid: String,
    /// Node.
    pub node: String,
    /// Addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Whether its traffic passes a proxy.
    pub captured: bool,
    /// Its own proxy, if it has one.
    pub proxy: Option<ProxyStatus>,
    /// Its network namespace.
    pub netns: Netns,
    /// Its mount namespace.
    pub mounts: Netns,
    /// Process id of its command inside the lab; 0 without a command.
    pub pid: i32,
    /// The same as this machine sees it (0: none, or it has ended).
    #[serde(default)]
    pub host_pid: i32,
    /// `no command`, `running`, `exited with 0`, `killed by 9`.
    pub state: String,
    /// Output of its command.
    pub log: PathBuf,
    /// Environment for commands in it.
    pub env: BTreeMap<String, String>,
}

/// A service.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// Host name.
    pub hostname: String,
    /// Virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<u16>,
}

impl Status {
    /// A pod by `name` or `namespace/name`.
    ///
    /// # Errors
    /// When there is none, or several of this name.
    pub fn pod(&self, wanted: &str) -> Result<&PodStatus, Error> {
        let (namespace, name) = wanted.split_once('/').map_or((None, wanted), |(namespace, name)| (Some(namespace), name));
        let mut found = self.pods.iter().filter(|pod| pod.name == name && namespace.is_none_or(|namespace| pod.namespace == namespace));
        match (found.next(), found.next()) {
            (Some(pod), None) => Ok(pod),
            (Some(_), Some(_)) => Err(Error::State(format!("several pods are named {name}: say NAMESPACE/{name}"))),
            (None, _) => {
                let all: Vec<String> = self.pods.iter().map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect();
                Err(Error::State(format!("lab {} has no pod {wanted}; it has: {}", self.name, all.join(", "))))
            }
        }
    }

    /// A node by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&NodeStatus, Error> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| Error::State(format!("lab {} has no node {name}", self.name)))
    }

    /// Fills in what only the machine outside of the lab knows: paths and process ids.
    fn seen_from_outside(&mut self, supervisor: i32) {
        self.supervisor = supervisor;
        let ids = process_ids(supervisor);
        let place = |netns: &mut Netns| netns.path = PathBuf::from(format!("/proc/{supervisor}/fd/{}", netns.descriptor));
        let outside = |pid: i32| ids.get(&pid).copied().unwrap_or(0);
        place(&mut self.fabric);
        if let Some(control) = &mut self.control {
            place(&mut control.netns);
            control.host_pid = outside(control.pid);
        }
        for node in &mut self.nodes {
            place(&mut node.netns);
            node.proxy.host_pid = outside(node.proxy.pid);
        }
        for pod in &mut self.pods {
            place(&mut pod.netns);
            place(&mut pod.mounts);
            pod.host_pid = outside(pod.pid);
            if let Some(proxy) = &mut pod.proxy {
                proxy.host_pid = outside(proxy.pid);
            }
        }
    }
}

/// Sends one request to the supervisor behind a socket. The second value is whether the lab refused.
pub(super) fn ask(socket: &Path, request: &Request) -> Result<Status, Error> {
    let failed = |what: &str| format!("cannot {what} the lab's supervisor at {}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(Error::failed(failed("reach")))?;
    // The kernel translates the listener's process id into ours, which nobody inside the lab could tell.
    let supervisor = listening_process(&stream).map_err(Error::failed(failed("identify")))?;
    stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(Error::failed(failed("reach")))?;
    let mut line = serde_json::to_string(request).map_err(Error::failed(failed("ask")))?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(Error::failed(failed("ask")))?;
    let mut text = String::new();
    BufReader::new(stream).read_line(&mut text).map_err(Error::failed(failed("hear")))?;
    match serde_json::from_str(&text).map_err(Error::failed(failed("understand")))? {
        Answer::Refused(sentence) => Err(Error::State(sentence)),
        Answer::Done(mut status) => {
            status.seen_from_outside(supervisor);
            Ok(*status)
        }
    }
}

/// Process ids inside the lab to process ids on this machine, from the NSpid lines of `/proc`.
pub(super) fn process_ids(supervisor: i32) -> BTreeMap<i32, i32> {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = namespace(supervisor);
    let mut ids = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(outside) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if own.is_none() || namespace(outside) != own {
            continue;
        }
        let status = std::fs::read_to_string(format!("/proc/{outside}/status")).unwrap_or_default();
        let inside = status.lines().find_map(|line| line.strip_prefix("NSpid:")).and_then(|ids| ids.split_whitespace().last()?.parse().ok());
        ids.extend(inside.map(|inside: i32| (inside, outside)));
    }
    ids
}
