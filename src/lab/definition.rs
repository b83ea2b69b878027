//! What a lab file may say. Every field that is not listed here is refused, with its line.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Deserialize;

use super::Error;
use super::policies::{AuthorizationPolicy, PeerAuthentication};
use super::waypoints::{self, ApplicationTunnel, Namespace, WeightedWaypoint};

/// Bridges, addresses and names are laid out for at most this many nodes, and pods on one node.
pub(super) const MOST: usize = 250;

/// A whole lab file.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Definition {
    /// The machines of the mesh; each gets a network namespace and a proxy.
    pub nodes: Vec<Node>,
    /// What holds for whole namespaces.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
    /// The pods.
    #[serde(default)]
    pub pods: Vec<Pod>,
    /// The services in front of them.
    #[serde(default)]
    pub services: Vec<Service>,
    /// Kubernetes objects `security.istio.io/v1 AuthorizationPolicy`, layer 4 fields only.
    #[serde(default)]
    pub authorization_policies: Vec<AuthorizationPolicy>,
    /// Kubernetes objects `security.istio.io/v1 PeerAuthentication`.
    #[serde(default)]
    pub peer_authentications: Vec<PeerAuthentication>,
    /// Environment of every proxy.
    #[serde(default)]
    pub proxy_env: BTreeMap<String, String>,
    /// Entries for the proxies' configuration file that are passed on as they are: `workloads`, `services` and `policies`.
    #[serde(default)]
    pub extra: Extra,
}

/// A node: its name, or its name with where it stands.
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "NodeForm")]
pub struct Node {
    /// Name; also the value of `NODE_NAME` of its proxy.
    pub name: String,
    /// Region of its pods.
    pub region: String,
    /// Zone of its pods.
    pub zone: String,
    /// Subzone of its pods.
    pub subzone: String,
    /// Environment of its proxy, over `proxyEnv`.
    pub env: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a node: its name, or a map of name, region, zone, subzone, env")]
enum NodeForm {
    Name(String),
    Full(FullNode),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FullNode {
    name: String,
    #[serde(default)]
    region: String,
    #[serde(default)]
    zone: String,
    #[serde(default)]
    subzone: String,
    #[serde(default)]
    env: BTreeMap<String, String>,
}

impl From<NodeForm> for Node {
    fn from(form: NodeForm) -> Self {
        let FullNode { name, region, zone, subzone, env } = match form {
            NodeForm::Full(full) => full,
            NodeForm::Name(name) => FullNode { name, region: String::new(), zone: String::new(), subzone: String::new(), env: BTreeMap::new() },
        };
        Self { name, region, zone, subzone, env }
    }
}

/// A pod: one network namespace, at most one command.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pod {
    /// Name.
    pub name: String,
    /// Namespace.
    #[serde(default = "default_name")]
    pub namespace: String,
    /// Service account, the last part of its identity.
    #[serde(default = "default_name")]
    pub service_account: String,
    /// Labels, for selectors.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Node it runs on.
    pub node: String,
    /// What runs in it: a list (program and arguments) or a line for the shell. None: the pod only exists, for `lab exec`.
    #[serde(default)]
    pub command: Option<Run>,
    /// Environment of the command, and of `lab exec`.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Whether its traffic passes a proxy.
    #[serde(default = "yes")]
    pub captured: bool,
    /// Its proxy is one of its own inside its namespace (`PROXY_MODE=dedicated`), not the node's.
    #[serde(default)]
    pub dedicated: bool,
    /// Whether the mesh believes that it is healthy.
    #[serde(default = "yes")]
    pub ready: bool,
    /// Load-balancing weight; 0 takes no traffic.
    #[serde(default = "one")]
    pub capacity: u32,
    /// Named ports, for services with a named `targetPort`.
    #[serde(default)]
    pub ports: Vec<ContainerPort>,
    /// `lab up` is done only when the pod listens on these TCP ports.
    #[serde(default)]
    pub wait_for: Vec<u16>,
    /// Trust domain of its identity.
    #[serde(default = "default_trust_domain")]
    pub trust_domain: String,
    /// Gives it an empty `/tmp` in memory.
    #[serde(default)]
    pub tmpfs: bool,
    /// It speaks HBONE itself, like a waypoint: the mesh takes it for a member although it is not captured. In `POD_FILES` are its `chain.pem`,
    /// `key.pem` and `root.pem`.
    #[serde(default)]
    pub native_tunnel: bool,
    /// It is captured and a waypoint: how it gets its connections.
    #[serde(default)]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Waypoint of connections to its own addresses: a service or a pod, as NAME or NAMESPACE/NAME; `none` for none.
    #[serde(default)]
    pub waypoint: Option<String>,
    /// The network that the mesh takes it to be on.
    #[serde(default)]
    pub network: String,
    /// Files for its command, by name, in the directory `POD_FILES`. Filled in: `@{files}`, that directory; `@{pod:NAME}` and `@{service:NAME}`,
    /// IPv4 addresses.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// Environment of its dedicated proxy, over `proxyEnv`.
    #[serde(default)]
    pub proxy_env: BTreeMap<String, String>,
}

/// A command.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a command: a list of program and arguments, or one line for the shell")]
pub enum Run {
    /// Program and arguments.
    Arguments(Vec<String>),
    /// For `/bin/sh -c`.
    Line(String),
}

impl Run {
    /// Program and arguments.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        match self {
            Self::Arguments(arguments) => arguments.clone(),
            Self::Line(line) => vec!["/bin/sh".to_owned(), "-c".to_owned(), line.clone()],
        }
    }
}

/// A named port of a pod.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ContainerPort {
    /// Name.
    pub name: String,
    /// TCP port.
    pub container_port: u16,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    /// Name; its host name is `NAME.NAMESPACE.svc.cluster.local`.
    pub name: String,
    /// Namespace.
    #[serde(default = "default_name")]
    pub namespace: String,
    /// Labels of the pods behind it, in the same namespace; empty selects none.
    #[serde(default)]
    pub selector: BTreeMap<String, String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// No virtual address: its name leads to the pods themselves.
    #[serde(default)]
    pub headless: bool,
    /// Pods that are not ready take traffic too.
    #[serde(default)]
    pub publish_not_ready_addresses: bool,
    /// `Local`: only pods of the client's node.
    #[serde(default)]
    pub internal_traffic_policy: InternalTrafficPolicy,
    /// Which pods are preferred.
    #[serde(default)]
    pub traffic_distribution: Option<TrafficDistribution>,
    /// No choice of a pod at all: connections go where they were addressed (a ServiceEntry with resolution NONE).
    #[serde(default)]
    pub passthrough: bool,
    /// Address families that clients may use; both when absent.
    #[serde(default)]
    pub ip_families: Option<IpFamilies>,
    /// Virtual addresses instead of assigned ones.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Its waypoint: a service or a pod, as NAME or NAMESPACE/NAME; `none` for none.
    #[serde(default)]
    pub waypoint: Option<String>,
    /// Several waypoints, each with its share.
    #[serde(default)]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServicePort {
    /// Name.
    #[serde(default)]
    pub name: String,
    /// Port on the virtual address.
    pub port: u16,
    /// Port on the pod: a number, or the name of a pod's port; the same as `port` when absent.
    #[serde(default)]
    pub target_port: Option<TargetPort>,
}

/// Where a service port leads on a pod.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a target port: a number or the name of a pod's port")]
pub enum TargetPort {
    /// This port.
    Number(u16),
    /// The pod's port of this name.
    Name(String),
}

/// Kubernetes' `internalTrafficPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum InternalTrafficPolicy {
    /// All pods.
    #[default]
    Cluster,
    /// Pods of the client's node only.
    Local,
}

/// Kubernetes' `trafficDistribution`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum TrafficDistribution {
    /// Same zone first (older name).
    PreferClose,
    /// Same zone first.
    PreferSameZone,
    /// Same node first.
    PreferSameNode,
}

/// Address families of a service, as in the proxies' configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum IpFamilies {
    /// IPv4 only.
    IPv4,
    /// IPv6 only.
    IPv6,
    /// Both.
    Dual,
}

/// Raw entries of the proxies' configuration file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Extra {
    /// Further workloads.
    #[serde(default)]
    pub workloads: Vec<serde_json::Value>,
    /// Further services.
    #[serde(default)]
    pub services: Vec<serde_json::Value>,
    /// Further policies.
    #[serde(default)]
    pub policies: Vec<serde_json::Value>,
}

impl Definition {
    /// Reads a lab file and checks everything that can be checked before anything is built.
    ///
    /// # Errors
    /// A sentence that names the line or the entry and the field.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
        let definition: Self = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
            let sentence = error.to_string();
            Error::Definition(sentence.strip_prefix("error: ").unwrap_or(&sentence).to_owned())
        })?;
        definition.check()?;
        Ok(definition)
    }

    /// Whether the proxy of a pod answers DNS, so that rules may lead it there.
    #[must_use]
    pub fn serves_dns(&self, pod: &Pod) -> bool {
        let node = self.nodes.iter().find(|node| node.name == pod.node && !pod.dedicated).map(|node| &node.env);
        let own = node.unwrap_or(&pod.proxy_env);
        let set = [own, &self.proxy_env].into_iter().find_map(|env| env.get("ISTIO_META_DNS_CAPTURE"));
        set.is_none_or(|value| value.eq_ignore_ascii_case("true"))
    }

    fn check(&self) -> Result<(), Error> {
        let refuse = |sentence: String| Err(Error::Definition(sentence));
        if self.nodes.is_empty() || self.nodes.len() > MOST {
            return refuse(format!("nodes: a lab has 1 to {MOST} nodes, not {}", self.nodes.len()));
        }
        let mut nodes = BTreeMap::new();
        for node in &self.nodes {
            check_name("node", &node.name)?;
            if node.name == super::FABRIC || nodes.insert(node.name.as_str(), 0_usize).is_some() {
                return refuse(format!("nodes: the name {:?} is taken", node.name));
            }
        }
        let mut names = BTreeSet::new();
        for pod in &self.pods {
            for (what, name) in [("pod", &pod.name), ("namespace", &pod.namespace), ("service account", &pod.service_account)] {
                check_name(what, name)?;
            }
            if !names.insert((&pod.namespace, &pod.name)) {
                return refuse(format!("pods: there are two pods {}/{}", pod.namespace, pod.name));
            }
            match nodes.get_mut(pod.node.as_str()) {
                None => return refuse(format!("pod {}: node {:?} is not in nodes", pod.name, pod.node)),
                Some(count) if *count == MOST => return refuse(format!("pods: node {} has more than {MOST} pods", pod.node)),
                Some(count) => *count += 1,
            }
            if pod.dedicated && !pod.captured {
                return refuse(format!("pod {}: dedicated needs captured: true", pod.name));
            }
            if pod.command.as_ref().is_some_and(|command| command.arguments().first().is_none_or(String::is_empty)) {
                return refuse(format!("pod {}: command is empty", pod.name));
            }
            if pod.native_tunnel && pod.captured {
                return refuse(format!("pod {}: nativeTunnel needs captured: false", pod.name));
            }
            if pod.files.keys().any(|name| name.is_empty() || name.starts_with('.') || name.contains('/')) {
                return refuse(format!("pod {}: files: a name has no '/' and does not begin with '.'", pod.name));
            }
            if !pod.wait_for.is_empty() && pod.command.is_none() {
                return refuse(format!("pod {}: waitFor needs a command that listens", pod.name));
            }
        }
        self.check_services()?;
        waypoints::check(self)?;
        for policy in &self.authorization_policies {
            policy.translate()?;
        }
        super::policies::check_peer_authentications(&self.peer_authentications)
    }

    fn check_services(&self) -> Result<(), Error> {
        let mut names = BTreeSet::new();
        for service in &self.services {
            let refuse = |sentence: String| Err(Error::Definition(format!("service {}: {sentence}", service.name)));
            check_name("service", &service.name)?;
            check_name("namespace", &service.namespace)?;
            if !names.insert((&service.namespace, &service.name)) {
                return refuse(format!("there are two of this name in namespace {}", service.namespace));
            }
            let ports: BTreeSet<u16> = service.ports.iter().map(|port| port.port).collect();
            if service.ports.is_empty() || ports.len() != service.ports.len() || ports.contains(&0) {
                return refuse("ports: at least one is needed, each number once, and 0 is none".to_owned());
            }
            if service.headless && !service.addresses.is_empty() {
                return refuse("headless and addresses exclude each other".to_owned());
            }
        }
        Ok(())
    }
}

/// Kubernetes' rule for names (RFC 1123 label), which also keeps file names and host names of the lab safe.
fn check_name(what: &str, name: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = name.bytes().all(|byte| plain(byte) || byte == b'-')
        && name.bytes().next().is_some_and(plain)
        && name.bytes().last().is_some_and(plain)
        && name.len() <= 63;
    if good { Ok(()) } else { Err(Error::Definition(format!("{what} {name:?}: a name is 1 to 63 of a-z, 0-9 and '-', not at its ends"))) }
}

fn default_name() -> String {
    "default".to_owned()
}

fn default_trust_domain() -> String {
    "cluster.local".to_owned()
}

fn yes() -> bool {
    true
}

fn one() -> u32 {
    1
}

#[cfg(test)]
mod tests;
