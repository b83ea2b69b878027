//! A lab that runs: what there is, how it becomes what a file says, and how it ends.

use std::collections::BTreeMap;
use std::path::PathBuf;

use futures_util::future::join_all;

use super::Error;
use super::control::{NodeStatus, ServiceStatus, Status};
use super::control_plane::ControlPlane;
use super::definition::{Definition, Node, Pod};
use super::directory::{Directory, write_atomically};
use super::plan::{Plan, fabric, hostname, pod_key};
use super::pod::{RunningPod, place};
use super::proxies::{Proxy, log_env, shared_env, status, wait_until_ready};
use super::tasks::Task;
use super::topology::Topology;
use super::{Means, Wiring, certificates, control_plane, mesh, mesh::uid};
use crate::identity::LocalIssuer;
use crate::lifecycle::Clock;
use crate::node::rules::{self, RulesConfig};
use crate::node::zds::{Delivery, ZdsServer};

/// A lab's parts. Dropping it leaves its programs running; the end of the process namespace ends them.
#[derive(Debug)]
pub(super) struct Running {
    name: String,
    program: PathBuf,
    /// Where pods find programs.
    search_path: String,
    directory: Directory,
    definition: Definition,
    plan: Plan,
    topology: Topology,
    /// Absent if the proxies read files.
    control: Option<ControlPlane>,
    nodes: BTreeMap<String, RunningNode>,
    pods: BTreeMap<String, RunningPod>,
}

#[derive(Debug)]
struct RunningNode {
    proxy: Task,
    zds: ZdsServer,
    socket: PathBuf,
}

impl Running {
    /// Builds everything the definition asks for and starts it.
    pub(super) async fn start(name: &str, means: Means, directory: Directory, definition: Definition) -> Result<Self, Error> {
        let Means { program, search_path, wiring } = means;
        let mut plan = Plan::default();
        plan.assign(&definition)?;
        let topology = Topology::build(&definition, &plan)?;
        LocalIssuer::create(&directory.ca(), &Clock::system()).map_err(Error::failed("cannot make the lab's CA"))?;
        let name = name.to_owned();
        let search_path = super::pod::search_path(&program, &search_path);
        let (nodes, pods) = (BTreeMap::new(), BTreeMap::new());
        let mut running = Self { name, program, search_path, directory, definition, plan, topology, control: None, nodes, pods };
        running.write_mesh()?;
        if wiring == Wiring::Control {
            let netns = running.topology.add_control_plane()?;
            running.control = Some(ControlPlane::start(&running.program, &running.directory, &running.definition, netns).await?);
        }
        for node in running.definition.nodes.clone() {
            running.start_node(&node)?;
        }
        for (name, node) in &running.nodes {
            let netns = running.netns_of(name)?;
            wait_until_ready(&format!("the proxy of node {name}"), &node.proxy, netns, &running.directory.proxy_log(name)).await?;
        }
        running.add_missing_pods().await?;
        Ok(running)
    }

    /// Becomes what another file says: policies, services, labels and health of pods change in place; pods come and go.
    pub(super) async fn apply(&mut self, definition: Definition) -> Result<(), Error> {
        self.plan.assign(&definition)?;
        self.definition = definition;
        let mut gone = Vec::new();
        for (key, pod) in &self.pods {
            if !self.definition.pods.iter().any(|wanted| pod_key(wanted) == *key && is_same_process(&pod.definition, wanted)) {
                gone.push(key.clone());
            }
        }
        for key in gone {
            self.remove_pod(&key).await?;
        }
        for wanted in &self.definition.pods {
            if let Some(pod) = self.pods.get_mut(&pod_key(wanted)) {
                pod.definition = wanted.clone();
            }
        }
        if let Some(control) = &mut self.control {
            // Its trust domain may be another one now.
            self.pods.values().filter(|pod| pod.definition.dedicated).try_for_each(|pod| control.admit_pod(&pod.definition))?;
        }
        self.write_mesh()?;
        for pod in self.pods.values() {
            pod.write_hosts(&self.plan.hosts(&self.definition, &pod.definition))?;
        }
        self.add_missing_pods().await
    }

    /// Ends a node's proxy and starts a new one, which hears of its pods again.
    pub(super) async fn restart_proxy(&mut self, name: &str) -> Result<(), Error> {
        let no_node = || Error::State(format!("there is no node {name}"));
        let definition = self.definition.nodes.iter().find(|node| node.name == name).cloned().ok_or_else(no_node)?;
        self.nodes.get_mut(name).ok_or_else(no_node)?.proxy.stop().await;
        let socket = self.nodes.get(name).ok_or_else(no_node)?.socket.clone();
        let proxy = self.start_proxy(&definition, &socket)?;
        let netns = self.netns_of(name)?.clone();
        wait_until_ready(&format!("the proxy of node {name}"), &proxy, &netns, &self.directory.proxy_log(name)).await?;
        if let Some(node) = self.nodes.get_mut(name) {
            node.proxy = proxy;
        }
        Ok(())
    }

    /// Ends the control plane and starts another one.
    pub(super) async fn restart_control(&mut self) -> Result<(), Error> {
        let control = self.control.as_mut().ok_or_else(|| Error::State("the proxies of this lab read files: it has no control plane".to_owned()))?;
        control.restart().await
    }

    /// Ends commands first, then proxies, then the control plane.
    pub(super) async fn stop(&mut self) {
        join_all(self.pods.values_mut().map(RunningPod::stop_command)).await;
        let own = self.pods.values_mut().filter_map(|pod| pod.proxy.as_mut());
        join_all(own.chain(self.nodes.values_mut().map(|node| &mut node.proxy)).map(Task::stop)).await;
        if let Some(control) = &mut self.control {
            control.stop().await;
        }
    }

    /// What it tells about itself.
    pub(super) fn status(&self) -> Status {
        let nodes = self.definition.nodes.iter().filter_map(|node| {
            let running = self.nodes.get(&node.name)?;
            Some(NodeStatus {
                name: node.name.clone(),
                addresses: fabric(self.plan.node(&node.name)).list().to_vec(),
                netns: place(self.topology.node(&node.name)?),
                proxy: status(&running.proxy, self.directory.proxy_log(&node.name)),
                zds: running.socket.clone(),
            })
        });
        let pods = self.definition.pods.iter().filter_map(|pod| {
            let running = self.pods.get(&pod_key(pod))?;
            let proxy = running.proxy.as_ref().map(|task| status(task, self.directory.pod_proxy_log(&pod_key(pod))));
            Some(super::control::PodStatus { proxy, ..running.status(&self.plan) })
        });
        let services = self.definition.services.iter().map(|service| ServiceStatus {
            hostname: hostname(service),
            addresses: self.plan.service(service).to_vec(),
            ports: service.ports.iter().map(|port| port.port).collect(),
        });
        Status {
            name: self.name.clone(),
            directory: self.directory.path().to_owned(),
            mesh_file: self.directory.mesh_file(),
            congestion_control: self.topology.congestion_control().to_owned(),
            supervisor: 0,
            fabric: place(self.topology.fabric()),
            control: self.control.as_ref().map(ControlPlane::status),
            nodes: nodes.collect(),
            pods: pods.collect(),
            services: services.collect(),
        }
    }

    fn write_mesh(&self) -> Result<(), Error> {
        let file = self.directory.mesh_file();
        write_atomically(&file, &mesh::file(&self.definition, &self.plan)?).map_err(Error::failed(format!("cannot write {}", file.display())))
    }

    fn netns_of(&self, node: &str) -> Result<&crate::sys::netns::NetNs, Error> {
        self.topology.node(node).ok_or_else(|| Error::State(format!("there is no node {node}")))
    }

    fn start_node(&mut self, node: &Node) -> Result<(), Error> {
        // By number: the path of a socket is short of room.
        let socket = self.directory.zds().join(format!("{}.sock", self.plan.node(&node.name)));
        let zds = ZdsServer::bind(&socket, []).map_err(Error::failed(format!("cannot make the ZDS socket of node {}", node.name)))?;
        let proxy = self.start_proxy(node, &socket)?;
        self.nodes.insert(node.name.clone(), RunningNode { proxy, zds, socket });
        Ok(())
    }

    fn start_proxy(&self, node: &Node, socket: &std::path::Path) -> Result<Task, Error> {
        let own = [("PROXY_MODE", "shared".to_owned()), ("NODE_NAME", node.name.clone()), ("INPOD_UDS", socket.display().to_string())];
        let mut env = self.source_env(&control_plane::node_token(&node.name));
        env.extend(own.into_iter().map(|(name, value)| (name.to_owned(), value)));
        env.extend(self.definition.proxy_env.clone());
        env.extend(node.env.clone());
        let log = self.directory.proxy_log(&node.name);
        Proxy { program: &self.program, netns: self.netns_of(&node.name)?, log, env }.start()
    }

    /// From where a proxy with this token learns of the mesh and gets its certificates.
    fn source_env(&self, token: &str) -> BTreeMap<String, String> {
        match &self.control {
            Some(_) => control_plane::proxy_env(&self.directory, token).into_iter().chain(log_env()).collect(),
            None => shared_env(&self.directory),
        }
    }

    async fn add_missing_pods(&mut self) -> Result<(), Error> {
        // All namespaces before the first command: pods talk to each other.
        let missing: Vec<Pod> = self.definition.pods.iter().filter(|pod| !self.pods.contains_key(&pod_key(pod))).cloned().collect();
        for pod in &missing {
            self.prepare_pod(pod).await?;
        }
        for pod in &missing {
            if let Some(running) = self.pods.get_mut(&pod_key(pod)) {
                running.start_command().await?;
            }
        }
        Ok(())
    }

    /// Namespace, then listeners, then rules: there is no moment when rules lead to nobody.
    async fn prepare_pod(&mut self, pod: &Pod) -> Result<(), Error> {
        let key = pod_key(pod);
        let netns = self.topology.add_pod(&self.plan, pod)?;
        let addresses = self.plan.pod(pod).ok_or_else(|| Error::State(format!("pod {key} has no address")))?;
        let mut running = RunningPod::create(&self.directory, &self.search_path, pod, (netns.clone(), addresses))?;
        running.write_hosts(&self.plan.hosts(&self.definition, pod))?;
        running.write_files(&self.definition, &self.plan)?;
        if pod.native_tunnel {
            certificates::present(&self.directory.ca(), &running.identity()?, running.files()).await?;
        }
        if pod.dedicated {
            let log = self.directory.pod_proxy_log(&key);
            let own = [
                ("PROXY_MODE", "dedicated".to_owned()),
                ("NODE_NAME", pod.node.clone()),
                ("PROXY_WORKLOAD_INFO", format!("{}/{}/{}", pod.namespace, pod.name, pod.service_account)),
                // Without the mark its own connections would be captured again.
                ("PACKET_MARK", "1337".to_owned()),
            ];
            if let Some(control) = &mut self.control {
                control.admit_pod(pod)?;
            }
            let mut env = self.source_env(&control_plane::pod_token(pod));
            env.extend(own.into_iter().map(|(name, value)| (name.to_owned(), value)));
            env.extend(self.definition.proxy_env.clone());
            env.extend(pod.proxy_env.clone());
            let task = Proxy { program: &self.program, netns: &netns, log: log.clone(), env }.start()?;
            wait_until_ready(&format!("the proxy of pod {key}"), &task, &netns, &log).await?;
            running.proxy = Some(task);
        } else if pod.captured {
            let node = self.nodes.get(&pod.node).ok_or_else(|| Error::State(format!("there is no node {}", pod.node)))?;
            let told = node.zds.add(zds_pod(pod), netns.clone()).await;
            let told = told.map_err(Error::failed(format!("the proxy of node {} does not take pod {key}", pod.node)))?;
            if told != Delivery::Acknowledged {
                return Err(Error::State(format!("no proxy is there to take pod {key} on node {}", pod.node)));
            }
        }
        if pod.captured {
            let config = RulesConfig { dns_capture: self.definition.serves_dns(pod), ..RulesConfig::default() };
            rules::install(&netns, &config).map_err(Error::failed(format!("cannot capture pod {key}")))?;
        }
        self.pods.insert(key, running);
        Ok(())
    }

    /// Capture ends first, then listeners and connections. The rest of the rules ends with the namespace, and that with its last holder.
    async fn remove_pod(&mut self, key: &str) -> Result<(), Error> {
        let Some(mut pod) = self.pods.remove(key) else { return Ok(()) };
        pod.stop_command().await;
        if pod.definition.captured {
            rules::stop_capturing(&pod.netns).map_err(Error::failed(format!("cannot release pod {key}")))?;
        }
        if let Some(proxy) = &mut pod.proxy {
            proxy.stop().await;
        } else if pod.definition.captured
            && let Some(node) = self.nodes.get(&pod.definition.node)
        {
            node.zds.remove(&uid(&pod.definition)).await.map_err(Error::failed(format!("the proxy does not release pod {key}")))?;
        }
        Ok(())
    }
}

/// A pod as the proxies are told of it.
pub(super) fn zds_pod(pod: &Pod) -> crate::wire::zds::Pod {
    crate::wire::zds::Pod { uid: uid(pod), name: pod.name.clone(), namespace: pod.namespace.clone(), service_account: pod.service_account.clone() }
}

/// Whether a pod can stay as it is: everything that is not looked up in the mesh file is unchanged.
fn is_same_process(old: &Pod, new: &Pod) -> bool {
    let looked_up = |pod: &Pod| Pod {
        labels: BTreeMap::new(),
        ready: true,
        capacity: 1,
        ports: Vec::new(),
        wait_for: Vec::new(),
        trust_domain: String::new(),
        application_tunnel: None,
        waypoint: None,
        network: String::new(),
        ..pod.clone()
    };
    looked_up(old) == looked_up(new)
}
