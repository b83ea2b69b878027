//! One running pod: its namespaces, its view of names, its command.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Error;
use super::control::{Netns, PodStatus};
use super::definition::{Definition, Pod};
use super::directory::Directory;
use super::mesh::uid;
use super::plan::{Addresses, Plan, pod_key};
use super::tasks::{Program, Task};
use super::waypoints;
use crate::model::SpiffeId;
use crate::sys::netns::NetNs;
use crate::sys::process::{bind_mount, create_mount_namespace, mount_tmpfs};

/// How long a command may take until it listens on the ports of `waitFor`.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);
/// The last address for services, where nobody is.
const NAMESERVER: Ipv4Addr = Ipv4Addr::new(10, 96, 255, 254);
/// What a shell of Debian has.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where pods find programs: beside this one, where every system has them, and then where the lab's starter does.
pub(super) fn search_path(program: &Path, last: &str) -> String {
    let beside = program.parent().map(|parent| parent.display().to_string());
    let places = [beside.as_deref().unwrap_or_default(), SEARCH_PATH, last];
    places.into_iter().filter(|place| !place.is_empty()).collect::<Vec<_>>().join(":")
}

/// A pod whose namespaces exist.
#[derive(Debug)]
pub(super) struct RunningPod {
    pub(super) definition: Pod,
    pub(super) netns: NetNs,
    mounts: Arc<OwnedFd>,
    /// What its `/etc/hosts` shows.
    hosts: PathBuf,
    /// Where the files of the definition are, and its certificate if it has one.
    files: PathBuf,
    env: BTreeMap<String, String>,
    log: PathBuf,
    command: Option<Task>,
    /// Its own proxy, if it is dedicated.
    pub(super) proxy: Option<Task>,
}

impl RunningPod {
    /// Makes the pod's mount namespace; `netns` is wired already. Nothing runs in it yet.
    pub(super) fn create(directory: &Directory, search_path: &str, pod: &Pod, (netns, addresses): (NetNs, Addresses)) -> Result<Self, Error> {
        let key = pod_key(pod);
        let failed = || Error::failed::<io::Error>(format!("cannot make the files of pod {key}"));
        let files = directory.pods().join(key.replace('/', "."));
        let own = files.join("files");
        std::fs::create_dir_all(&own).map_err(failed())?;
        let (hosts, resolver) = (files.join("hosts"), files.join("resolv.conf"));
        std::fs::write(&hosts, "").map_err(failed())?;
        std::fs::write(&resolver, resolver_text(pod)).map_err(failed())?;
        let (shown, tmpfs) = (hosts.clone(), pod.tmpfs);
        let mounts = create_mount_namespace(move || {
            for (source, target) in [(&shown, "/etc/hosts"), (&resolver, "/etc/resolv.conf")] {
                // A machine without the file has nothing to cover.
                if Path::new(target).exists() {
                    bind_mount(source, Path::new(target))?;
                }
            }
            if tmpfs { mount_tmpfs(Path::new("/tmp")) } else { Ok(()) }
        })
        .map_err(failed())?;
        let facts = [
            ("PATH", search_path.to_owned()),
            ("POD_FILES", own.display().to_string()),
            ("HOME", "/root".to_owned()),
            ("LANG", "C.UTF-8".to_owned()),
            ("POD_NAME", pod.name.clone()),
            ("POD_NAMESPACE", pod.namespace.clone()),
            ("POD_IP", addresses.v4.to_string()),
            ("POD_IPV6", addresses.v6.to_string()),
            ("NODE_NAME", pod.node.clone()),
            ("SERVICE_ACCOUNT", pod.service_account.clone()),
        ];
        let mut env: BTreeMap<String, String> = facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        env.extend(pod.env.clone());
        let log = directory.pod_log(&key);
        Ok(Self { definition: pod.clone(), netns, mounts: Arc::new(mounts), hosts, files: own, env, log, command: None, proxy: None })
    }

    /// Replaces what its `/etc/hosts` says. In place, because a mount holds on to the file.
    pub(super) fn write_hosts(&self, text: &str) -> Result<(), Error> {
        std::fs::write(&self.hosts, text).map_err(Error::failed(format!("cannot write {}", self.hosts.display())))
    }

    /// Where its files are.
    pub(super) fn files(&self) -> &Path {
        &self.files
    }

    /// Who it is.
    pub(super) fn identity(&self) -> Result<SpiffeId, Error> {
        let Pod { trust_domain, namespace, service_account, .. } = &self.definition;
        let identity = SpiffeId::new(trust_domain, namespace, service_account);
        identity.map_err(Error::failed(format!("pod {} has no identity", pod_key(&self.definition))))
    }

    /// Writes the files of its definition.
    pub(super) fn write_files(&self, definition: &Definition, plan: &Plan) -> Result<(), Error> {
        for (name, text) in &self.definition.files {
            let text = waypoints::fill_in(text, definition, plan, (&self.definition, &self.files.display().to_string()))?;
            let path = self.files.join(name);
            std::fs::write(&path, text).map_err(Error::failed(format!("cannot write {}", path.display())))?;
        }
        Ok(())
    }

    /// Starts its command and waits until it listens where the definition says.
    pub(super) async fn start_command(&mut self) -> Result<(), Error> {
        let Some(run) = &self.definition.command else { return Ok(()) };
        let program = Program {
            arguments: run.arguments(),
            env: self.env.clone(),
            netns: self.netns.clone(),
            mounts: Some(self.mounts.clone()),
            log: self.log.clone(),
        };
        self.command = Some(Task::start(program)?);
        let key = pod_key(&self.definition);
        let deadline = Instant::now() + LISTENS_WITHIN;
        loop {
            let listening = self.netns.run(listening_ports).and_then(|ports| ports).map_err(Error::failed(format!("cannot look into pod {key}")))?;
            let missing: Vec<&u16> = self.definition.wait_for.iter().filter(|port| !listening.contains(port)).collect();
            if missing.is_empty() {
                return Ok(());
            }
            let ended = self.command.as_ref().filter(|task| task.ended().is_some());
            if ended.is_some() || Instant::now() > deadline {
                let state = ended.map_or_else(|| format!("does not listen within {LISTENS_WITHIN:?}"), Task::state);
                let what = format!("the command of pod {key} should listen on {missing:?}, but {state}");
                return Err(Error::Failed { what, cause: last_lines(&self.log) });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends its command.
    pub(super) async fn stop_command(&mut self) {
        if let Some(task) = &mut self.command {
            task.stop().await;
        }
    }

    /// What it tells about itself, but for its proxy.
    pub(super) fn status(&self, plan: &Plan) -> PodStatus {
        let pod = &self.definition;
        PodStatus {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            identity: format!("spiffe://{}/ns/{}/sa/{}", pod.trust_domain, pod.namespace, pod.service_account),
            uid: uid(pod),
            node: pod.node.clone(),
            addresses: plan.pod(pod).into_iter().flat_map(Addresses::list).collect(),
            captured: pod.captured,
            proxy: None,
            netns: place(&self.netns),
            mounts: Netns { descriptor: self.mounts.as_raw_fd(), path: PathBuf::new() },
            pid: self.command.as_ref().map_or(0, Task::pid),
            host_pid: 0,
            state: self.command.as_ref().map_or_else(|| "no command".to_owned(), Task::state),
            log: self.log.clone(),
            env: self.env.clone(),
        }
    }
}

/// Its `/etc/resolv.conf`. Names of the lab are in `/etc/hosts` too; the queries of captured pods are answered by the proxy, whatever the address.
fn resolver_text(pod: &Pod) -> String {
    if !pod.captured {
        return "# names of the lab are in /etc/hosts\n".to_owned();
    }
    let namespace = &pod.namespace;
    format!("nameserver {NAMESERVER}\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n")
}

/// Where a namespace can be opened, as far as the inside knows.
pub(super) fn place(netns: &NetNs) -> Netns {
    use std::os::fd::AsFd;
    Netns { descriptor: netns.as_fd().as_raw_fd(), path: PathBuf::new() }
}

/// The TCP ports on which somebody listens in the namespace of this thread.
pub(super) fn listening_ports() -> io::Result<Vec<u16>> {
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
        for line in text.lines().skip(1) {
            let mut words = line.split_whitespace().skip(1);
            let (local, state) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
            // 0A is TCP_LISTEN; the port is hexadecimal.
            if state == "0A" {
                ports.extend(local.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok()));
            }
        }
    }
    Ok(ports)
}

/// The end of a log, for an error message.
pub(super) fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(8).collect();
    if lines.is_empty() { "it has printed nothing".to_owned() } else { lines.into_iter().rev().collect::<Vec<_>>().join("\n") }
}
