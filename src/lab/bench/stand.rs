//! What one contestant stands in: two pods joined by one wire, a third namespace that the mesh does not know, a server in each of the two
//! others, and whatever is between client and server.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use ipnet::{IpNet, Ipv4Net};

use super::load::Seat;
use super::options::{Contestant, Floor, Kind, Options, Words};
use crate::identity::LocalIssuer;
use crate::lab::Error;
use crate::lab::control::process_ids;
use crate::lab::definition::Definition;
use crate::lab::directory::{Directory, write_atomically};
use crate::lab::mesh;
use crate::lab::plan::Plan;
use crate::lab::pod::{last_lines, listening_ports};
use crate::lab::proxies::{shared_env, wait_until_ready};
use crate::lab::running::zds_pod;
use crate::lab::tasks::{Program, Task};
use crate::lab::topology::Net;
use crate::lifecycle::Clock;
use crate::node::rules::{self, RulesConfig};
use crate::node::zds::{Delivery, ZdsServer};
use crate::sys::link::{set_sysctl, sysctl};
use crate::sys::netns::NetNs;
use crate::sys::process::{allowed_cpus, pin};

/// The mesh of every stand.
const MESH: &str = "
nodes: [client-node, server-node]
pods:
- {name: client, node: client-node}
- {name: server, node: server-node}
";
/// Port of both servers.
const PORT: u16 = 8000;
/// How long a server or a floor may take until it listens.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);
/// The wire between client and what the mesh does not know.
const OUTSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 245, 0, 1), Ipv4Addr::new(10, 245, 0, 2)];
/// `SO_MARK` of the sockets of every proxy.
const MARK: &str = "1337";

/// What all stands share.
#[derive(Debug)]
pub(super) struct Site {
    program: PathBuf,
    directory: Directory,
    definition: Definition,
    plan: Plan,
}

/// A contestant that is ready to be measured. Dropping it leaves its programs running; see [`stop`](Self::stop).
#[derive(Debug)]
pub(super) struct Stand {
    pub(super) name: String,
    pub(super) client: Seat,
    /// The server in the mesh.
    pub(super) server: SocketAddr,
    /// The server outside of it.
    pub(super) outside: SocketAddr,
    sides: Vec<Side>,
    servers: Vec<Task>,
    zds: Vec<ZdsServer>,
    namespaces: Vec<NetNs>,
}

/// What a stand is to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) contestant: &'a Contestant,
    pub(super) options: &'a Options,
    /// Added to the environment of its proxies.
    pub(super) extra: &'a [(&'a str, &'a str)],
}

/// A process between client and server.
#[derive(Debug)]
struct Side {
    whose: String,
    task: Task,
    log: PathBuf,
}

impl Site {
    /// Writes the files that all proxies read.
    pub(super) fn prepare(program: &Path, directory: &Directory) -> Result<Self, Error> {
        let definition = Definition::parse(MESH)?;
        let mut plan = Plan::default();
        plan.assign(&definition)?;
        LocalIssuer::create(&directory.ca(), &Clock::system()).map_err(Error::failed("cannot make the bench's CA"))?;
        let file = directory.mesh_file();
        write_atomically(&file, &mesh::file(&definition, &plan)?).map_err(Error::failed(format!("cannot write {}", file.display())))?;
        Ok(Self { program: program.to_owned(), directory: directory.clone(), definition, plan })
    }

    fn address(&self, pod: usize) -> Ipv4Addr {
        let pod = self.definition.pods.get(pod);
        pod.and_then(|pod| self.plan.pod(pod)).map_or(Ipv4Addr::UNSPECIFIED, |addresses| addresses.v4)
    }
}

/// The three namespaces and their wires.
#[derive(Debug)]
struct Nets {
    client: Net,
    server: Net,
    outside: Net,
}

impl Nets {
    fn build(site: &Site) -> io::Result<Self> {
        let nets = Self { client: Net::create()?, server: Net::create()?, outside: Net::create()? };
        join(&nets.client, &nets.server, "eth0", [site.address(0), site.address(1)])?;
        join(&nets.client, &nets.outside, "eth1", OUTSIDE)?;
        for net in [&nets.client, &nets.server, &nets.outside] {
            // Where a user namespace may not, the kernel's 4096 must do.
            net.netns.run(|| set_sysctl("net.core.somaxconn", "8192"))?.ok();
        }
        Ok(nets)
    }
}

/// Joins two namespaces by a veth pair; each end is in the same subnet as the other.
fn join(one: &Net, other: &Net, name: &str, addresses: [Ipv4Addr; 2]) -> io::Result<()> {
    one.links.add_veth(name, name, other.netns.as_fd())?;
    for (net, address) in [one, other].into_iter().zip(addresses) {
        net.links.set_up(name)?;
        net.links.add_address(name, IpNet::V4(Ipv4Net::new_assert(address, 16)))?;
    }
    Ok(())
}

impl Stand {
    /// Builds everything and returns when a request could be sent.
    pub(super) async fn build(site: &Site, wanted: Wanted<'_>) -> Result<Self, Error> {
        let name = wanted.contestant.name.clone();
        let nets = Nets::build(site).map_err(Error::failed(format!("cannot build the network of {name}")))?;
        let mut stand = Self {
            client: Seat { netns: nets.client.netns.clone(), cpu: None },
            server: SocketAddr::new(site.address(1).into(), PORT),
            outside: SocketAddr::new(IpAddr::V4(OUTSIDE[1]), PORT),
            sides: Vec::new(),
            servers: Vec::new(),
            zds: Vec::new(),
            namespaces: Vec::new(),
            name,
        };
        let built = stand.fill(site, &nets, wanted).await;
        if built.is_err() {
            stand.stop().await;
        }
        built.map(|()| stand)
    }

    async fn fill(&mut self, site: &Site, nets: &Nets, wanted: Wanted<'_>) -> Result<(), Error> {
        for (net, whose) in [(&nets.server, "server"), (&nets.outside, "outside")] {
            self.start_server(site, &net.netns, whose).await?;
        }
        let pods = [&nets.client.netns, &nets.server.netns];
        match &wanted.contestant.kind {
            Kind::Direct => {}
            Kind::Floor(floor) => self.start_floor(site, wanted.options, *floor, pods).await?,
            Kind::Culvert => {
                let own = Words { arguments: vec![site.program.display().to_string(), "proxy".to_owned()], ..Words::default() };
                self.start_proxies(site, wanted, [&own, &own], pods).await?;
            }
            Kind::Peer { client, server } => self.start_proxies(site, wanted, [client, server], pods).await?,
        }
        if wanted.options.pin {
            self.pin().map_err(Error::failed("cannot pin to CPUs"))?;
        }
        // After the listeners, as always. A floor of one hop has nobody in the server's pod.
        for (pod, _) in pods.into_iter().zip(&self.sides) {
            rules::install(pod, &RulesConfig::default()).map_err(Error::failed(format!("cannot capture the pods of {}", self.name)))?;
        }
        Ok(())
    }

    /// Client's proxy and server on one CPU, server's proxy and client on another: each hop crosses over, for everybody alike.
    fn pin(&mut self) -> io::Result<()> {
        let cpus = allowed_cpus()?;
        let [one, other, ..] = cpus.as_slice() else { return Err(io::Error::other("there are not two CPUs")) };
        let sides = self.sides.iter().map(|side| side.task.pid()).zip([*one, *other]);
        let servers = self.servers.iter().map(|task| (task.pid(), *one));
        for (pid, cpu) in sides.chain(servers) {
            for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                pin(thread?.file_name().to_str().and_then(|name| name.parse().ok()).unwrap_or(pid), cpu)?;
            }
        }
        self.client.cpu = Some(*other);
        Ok(())
    }

    fn log(&self, site: &Site, whose: &str) -> PathBuf {
        site.directory.logs().join(format!("{}.{whose}.log", self.name.replace('/', ".")))
    }

    async fn start_server(&mut self, site: &Site, netns: &NetNs, whose: &str) -> Result<(), Error> {
        let arguments = vec![site.program.display().to_string(), "lab".to_owned(), "serve-load".to_owned(), PORT.to_string()];
        let log = self.log(site, whose);
        let task = Task::start(Program { arguments, env: BTreeMap::new(), netns: netns.clone(), mounts: None, log: log.clone() })?;
        let side = Side { whose: format!("the {whose} of {}", self.name), task, log };
        wait_until_listening(&side, netns, PORT).await?;
        self.servers.push(side.task);
        Ok(())
    }

    async fn start_floor(&mut self, site: &Site, options: &Options, floor: Floor, pods: [&NetNs; 2]) -> Result<(), Error> {
        let program = options.floor.as_ref().ok_or_else(|| Error::State("a floor takes part, but there is no program of floors".to_owned()))?;
        let to_sink = ["--to", "0.0.0.0:15008"];
        let to_server = format!("0.0.0.0:{PORT}");
        let source: Vec<&str> = ["source", "--listen", "0.0.0.0:15001", "--original-destination"]
            .into_iter()
            .chain(to_sink.into_iter().filter(|_| floor != Floor::C1))
            .collect();
        let sink = vec!["sink", "--listen", "0.0.0.0:15008", "--to", to_server.as_str()];
        let both = [("client", source, 15001), ("server", sink, 15008)];
        let hops = if floor == Floor::C1 { 1 } else { 2 };
        for ((whose, role, port), netns) in both.into_iter().zip(pods).take(hops) {
            let mut arguments = vec![program.display().to_string()];
            arguments.extend(role.into_iter().map(str::to_owned));
            arguments.extend(["--kind", floor.name(), "--mark", MARK].map(str::to_owned));
            let log = self.log(site, &format!("{whose}-floor"));
            let task = Task::start(Program { arguments, env: BTreeMap::new(), netns: netns.clone(), mounts: None, log: log.clone() })?;
            self.sides.push(Side { whose: format!("{} on the {whose}'s side", self.name), task, log });
            if let Some(side) = self.sides.last() {
                wait_until_listening(side, netns, port).await?;
            }
        }
        Ok(())
    }

    /// As on a node: each proxy in a namespace of its own, its pod handed over by ZDS.
    async fn start_proxies(&mut self, site: &Site, wanted: Wanted<'_>, commands: [&Words; 2], pods: [&NetNs; 2]) -> Result<(), Error> {
        for ((pod, netns), command) in site.definition.pods.iter().zip(pods).zip(commands) {
            let node = Net::create().map_err(Error::failed(format!("cannot build the network of {}", self.name)))?;
            let socket = free_path(&site.directory.zds());
            let zds = ZdsServer::bind(&socket, []).map_err(Error::failed(format!("cannot make a ZDS socket for {}", self.name)))?;
            let mut env = shared_env(&site.directory);
            let own = [
                ("PROXY_MODE", "shared"),
                ("NODE_NAME", &pod.node),
                ("INPOD_UDS", &socket.display().to_string()),
                ("ZTUNNEL_WORKER_THREADS", &wanted.options.workers.to_string()),
                ("RUST_LOG", "warn"),
                // Everything is in the file.
                ("XDS_ADDRESS", ""),
            ];
            env.extend(own.into_iter().chain(wanted.extra.iter().copied()).map(|(name, value)| (name.to_owned(), value.to_owned())));
            env.extend(command.env.clone());
            let log = self.log(site, &format!("{}-proxy", pod.name));
            let whose = format!("{} on the {}'s side", self.name, pod.name);
            let arguments = command.arguments.clone();
            let task = Task::start(Program { arguments, env, netns: node.netns.clone(), mounts: None, log: log.clone() })?;
            self.sides.push(Side { whose: whose.clone(), task, log: log.clone() });
            if let Some(side) = self.sides.last() {
                wait_until_ready(&format!("the proxy of {whose}"), &side.task, &node.netns, &log).await?;
            }
            self.namespaces.push(node.netns);
            let told = zds.add(zds_pod(pod), netns.clone()).await;
            let why = |cause: String| Error::Failed { what: format!("the proxy of {whose} does not take its pod: {cause}"), cause: last_lines(&log) };
            match told {
                Ok(Delivery::Acknowledged) => {}
                Ok(other) => return Err(why(format!("it is not connected to INPOD_UDS ({other:?})"))),
                Err(error) => return Err(why(error.to_string())),
            }
            self.zds.push(zds);
        }
        Ok(())
    }

    /// The processes between client and server, client's side first, as `/proc` here shows them.
    pub(super) fn pids(&self) -> Result<Vec<i32>, String> {
        let own = std::fs::read_link("/proc/self").ok().and_then(|link| link.to_str()?.parse().ok()).unwrap_or(0);
        let shown = process_ids(own);
        let find = |side: &Side| shown.get(&side.task.pid()).copied().ok_or_else(|| format!("/proc does not show the process of {}", side.whose));
        self.sides.iter().map(find).collect()
    }

    /// Whether anything stands between client and server.
    pub(super) fn has_proxies(&self) -> bool {
        !self.sides.is_empty()
    }

    /// Which of its processes has ended, with its last words; `None` while all run.
    pub(super) fn ended(&self) -> Option<String> {
        let side = self.sides.iter().find(|side| side.task.ended().is_some())?;
        Some(format!("the process of {} {}; it last said: {}", side.whose, side.task.state(), last_lines(&side.log)))
    }

    /// Ends its programs; its namespaces go with them.
    pub(super) async fn stop(&mut self) {
        join_all(self.sides.iter_mut().map(|side| side.task.stop())).await;
        join_all(self.servers.iter_mut().map(Task::stop)).await;
    }

    /// What the pods really use.
    pub(super) fn congestion_control(&self) -> String {
        self.client.netns.run(|| sysctl("net.ipv4.tcp_congestion_control")).and_then(|read| read).unwrap_or_else(|_| "unknown".to_owned())
    }
}

async fn wait_until_listening(side: &Side, netns: &NetNs, port: u16) -> Result<(), Error> {
    let deadline = Instant::now() + LISTENS_WITHIN;
    loop {
        let ports = netns.run(listening_ports).and_then(|ports| ports).map_err(Error::failed("cannot look into a pod"))?;
        if ports.contains(&port) {
            return Ok(());
        }
        if side.task.ended().is_some() || Instant::now() > deadline {
            return Err(Error::Failed {
                what: format!("{} does not listen on port {port} ({})", side.whose, side.task.state()),
                cause: last_lines(&side.log),
            });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// By number: the path of a socket is short of room.
fn free_path(directory: &Path) -> PathBuf {
    let path = |number: u32| directory.join(format!("{number}.sock"));
    path((0..u32::MAX).find(|number| !path(*number).exists()).unwrap_or(0))
}
