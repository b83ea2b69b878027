//! The lab's wires: one bridge between the nodes in a namespace of its own, one bridge on every node, one veth pair for every pod.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;

use super::Error;
use super::definition::{Definition, Pod};
use super::plan::{Plan, control_plane_address, default_routes, fabric, on_node};
use crate::sys::link::{Links, is_no_such_link, set_sysctl, sysctl};
use crate::sys::netns::NetNs;

/// The bridge between the nodes, and the node's side of the wire to it.
const FABRIC_LINK: &str = "fabric";
/// The bridge of a node.
const PODS_LINK: &str = "pods";
/// The only link of a pod.
const POD_LINK: &str = "eth0";
/// What is good inside a data centre and on a veth pair alike; BBR's pacing only costs CPU here.
const CONGESTION_CONTROL: &str = "cubic";

/// A network namespace and its links.
#[derive(Debug)]
pub(super) struct Net {
    pub(super) netns: NetNs,
    pub(super) links: Links,
}

/// All network namespaces but the pods'. They exist as long as this value (or a process in them) does.
#[derive(Debug)]
pub(super) struct Topology {
    fabric: Net,
    nodes: BTreeMap<String, Net>,
    congestion_control: String,
}

impl Topology {
    /// Builds fabric and nodes.
    pub(super) fn build(definition: &Definition, plan: &Plan) -> Result<Self, Error> {
        let failed = |what: &str| Error::failed::<io::Error>(format!("cannot build the network of {what}"));
        let fabric = Net::create().map_err(failed("the fabric"))?;
        fabric.links.add_bridge(FABRIC_LINK).map_err(failed("the fabric"))?;
        let mut nodes = BTreeMap::new();
        for node in &definition.nodes {
            let net = build_node(&fabric, plan.node(&node.name), definition.nodes.len()).map_err(failed(&node.name))?;
            nodes.insert(node.name.clone(), net);
        }
        let congestion_control = fabric.netns.run(|| sysctl("net.ipv4.tcp_congestion_control")).and_then(|read| read).unwrap_or_default();
        Ok(Self { fabric, nodes, congestion_control })
    }

    pub(super) fn fabric(&self) -> &NetNs {
        &self.fabric.netns
    }

    pub(super) fn node(&self, name: &str) -> Option<&NetNs> {
        self.nodes.get(name).map(|net| &net.netns)
    }

    pub(super) fn congestion_control(&self) -> &str {
        &self.congestion_control
    }

    /// Makes the control plane's namespace and wires it to the fabric, from where it reaches nodes and pods.
    pub(super) fn add_control_plane(&self) -> Result<NetNs, Error> {
        let build = || {
            let net = Net::create()?;
            self.fabric.links.add_veth("control", FABRIC_LINK, net.netns.as_fd())?;
            self.fabric.links.set_bridge("control", FABRIC_LINK)?;
            self.fabric.links.set_up("control")?;
            net.links.set_up(FABRIC_LINK)?;
            for address in control_plane_address().in_subnet() {
                net.links.add_address(FABRIC_LINK, address)?;
            }
            for number in 1..=u8::try_from(self.nodes.len()).unwrap_or(u8::MAX) {
                for (prefix, gateway) in on_node(number, 0).in_subnet().into_iter().zip(fabric(number).list()) {
                    net.links.add_route(prefix, gateway)?;
                }
            }
            Ok(net.netns)
        };
        build().map_err(Error::failed::<io::Error>("cannot build the network of the control plane"))
    }

    /// Makes a pod's namespace and wires it to its node. The wire goes with the namespace.
    pub(super) fn add_pod(&self, plan: &Plan, pod: &Pod) -> Result<NetNs, Error> {
        let failed = || Error::failed::<io::Error>(format!("cannot build the network of pod {}/{}", pod.namespace, pod.name));
        let (Some(node), Some(addresses)) = (self.nodes.get(&pod.node), plan.pod(pod)) else {
            return Err(Error::State(format!("pod {} has no node or no address", pod.name)));
        };
        let build = || {
            let net = Net::create()?;
            let outer = format!("pod-{}", addresses.v4.octets()[3]);
            // A pod that was just removed may still hold its wire.
            node.links.remove(&outer).or_else(|error| if is_no_such_link(&error) { Ok(()) } else { Err(error) })?;
            node.links.add_veth(&outer, POD_LINK, net.netns.as_fd())?;
            node.links.set_bridge(&outer, PODS_LINK)?;
            node.links.set_up(&outer)?;
            // A pod that gets the address of one that is gone need not wait until its neighbours have noticed.
            net.links.set_hardware_address(POD_LINK, hardware_address(addresses.v4))?;
            net.links.set_up(POD_LINK)?;
            for address in addresses.in_subnet() {
                net.links.add_address(POD_LINK, address)?;
            }
            for (prefix, gateway) in default_routes().into_iter().zip(on_node(plan.node(&pod.node), 1).list()) {
                net.links.add_route(prefix, gateway)?;
            }
            Ok(net.netns)
        };
        build().map_err(failed())
    }
}

impl Net {
    /// A new namespace with the settings of every namespace of a lab; its loopback is up.
    pub(super) fn create() -> io::Result<Self> {
        let netns = NetNs::create()?;
        let links = netns.run(|| {
            prepare()?;
            Links::open()
        })??;
        links.set_up("lo")?;
        Ok(Self { netns, links })
    }
}

/// A locally administered one, by the address that goes with it.
fn hardware_address(address: std::net::Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [2, 0, a, b, c, d]
}

fn build_node(between: &Net, number: u8, nodes: usize) -> io::Result<Net> {
    let net = Net::create()?;
    net.netns.run(|| {
        set_sysctl("net.ipv4.ip_forward", "1")?;
        set_sysctl("net.ipv6.conf.all.forwarding", "1")
    })??;
    let port = format!("node-{number}");
    between.links.add_veth(&port, FABRIC_LINK, net.netns.as_fd())?;
    between.links.set_bridge(&port, FABRIC_LINK)?;
    between.links.set_up(&port)?;
    net.links.set_up(FABRIC_LINK)?;
    for address in fabric(number).in_subnet() {
        net.links.add_address(FABRIC_LINK, address)?;
    }
    net.links.add_bridge(PODS_LINK)?;
    // By itself a bridge takes one of its ports' and changes it as they come and go; pods would send to the old one for seconds.
    net.links.set_hardware_address(PODS_LINK, hardware_address(on_node(number, 1).v4))?;
    for address in on_node(number, 1).in_subnet() {
        net.links.add_address(PODS_LINK, address)?;
    }
    for other in (1..=u8::try_from(nodes).unwrap_or(u8::MAX)).filter(|other| *other != number) {
        for (prefix, gateway) in on_node(other, 0).in_subnet().into_iter().zip(fabric(other).list()) {
            net.links.add_route(prefix, gateway)?;
        }
    }
    Ok(net)
}

/// Settings of every namespace of the lab, before it has links. Must run inside it.
fn prepare() -> io::Result<()> {
    // Addresses are usable at once: nobody else is on these wires.
    for scope in ["all", "default"] {
        set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "0")?;
        set_sysctl(&format!("net.ipv6.conf.{scope}.accept_dad"), "0")?;
        set_sysctl(&format!("net.ipv6.conf.{scope}.accept_ra"), "0")?;
    }
    // Benchmarks open many short connections from one address; the proxy's own ports stay out of the ephemeral range.
    set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")?;
    set_sysctl("net.ipv4.ip_local_reserved_ports", "15000-15090")?;
    set_sysctl("net.ipv4.tcp_tw_reuse", "1")?;
    // A machine may forbid it to namespaces (net.ipv4.tcp_allowed_congestion_control, which is the whole machine's and thus not
    // ours to change). Reno is always allowed; `lab status` says what it is.
    for wanted in [CONGESTION_CONTROL, "reno"] {
        if set_sysctl("net.ipv4.tcp_congestion_control", wanted).is_ok() {
            break;
        }
    }
    Ok(())
}
