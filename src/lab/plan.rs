//! Which address everything gets. The lab's networks touch no other network, so every lab uses the same ranges:
//! pods 10.244.NODE.N and fd00:10:244:NODE::N, services 10.96.x.y and fd00:10:96::N, nodes among themselves 10.243.0.NODE and fd00:10:243::NODE.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Error;
use super::definition::{Definition, Pod, Service};

const DOMAIN: &str = "svc.cluster.local";

/// An IPv4 and an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
}

impl Addresses {
    pub(super) fn list(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// With the prefixes of the subnet: /24 and /64.
    pub(super) fn in_subnet(self) -> [IpNet; 2] {
        // Constant prefixes within range: new_assert cannot fail.
        [Ipv4Net::new_assert(self.v4, 24).into(), Ipv6Net::new_assert(self.v6, 64).into()]
    }
}

/// The default routes of both families.
pub(super) fn default_routes() -> [IpNet; 2] {
    [Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(), Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into()]
}

/// A node's address on the fabric between nodes; `number` counts from 1.
pub(super) fn fabric(number: u8) -> Addresses {
    Addresses { v4: Ipv4Addr::new(10, 243, 0, number), v6: Ipv6Addr::new(0xfd00, 0x10, 0x243, 0, 0, 0, 0, number.into()) }
}

/// The control plane's address on the fabric; nodes have at most 250.
pub(super) fn control_plane_address() -> Addresses {
    fabric(254)
}

/// Address `host` of the pods' subnet of a node; 1 is the node itself.
pub(super) fn on_node(number: u8, host: u8) -> Addresses {
    Addresses { v4: Ipv4Addr::new(10, 244, number, host), v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, number.into(), 0, 0, 0, host.into()) }
}

fn virtual_address(number: u16) -> Addresses {
    let [high, low] = number.to_be_bytes();
    Addresses { v4: Ipv4Addr::new(10, 96, high, low), v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number) }
}

/// A pod's key, `namespace/name`.
pub(super) fn pod_key(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

/// A service's host name.
pub(super) fn hostname(service: &Service) -> String {
    format!("{}.{}.{DOMAIN}", service.name, service.namespace)
}

/// The addresses of one lab. Adding pods or services later keeps those that others have.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    nodes: BTreeMap<String, u8>,
    pods: BTreeMap<String, Addresses>,
    services: BTreeMap<String, Vec<IpAddr>>,
}

impl Plan {
    /// Gives everything in the definition an address, and frees those of pods and services that are gone.
    pub(super) fn assign(&mut self, definition: &Definition) -> Result<(), Error> {
        let full = |what: &str| Error::Definition(format!("no address is left for {what}"));
        if self.nodes.is_empty() {
            self.nodes = definition.nodes.iter().map(|node| node.name.clone()).zip(1..).collect();
        } else if self.nodes.len() != definition.nodes.len() || definition.nodes.iter().any(|node| !self.nodes.contains_key(&node.name)) {
            return Err(Error::Definition("nodes: the nodes of a running lab cannot change".to_owned()));
        }
        let nodes = &self.nodes;
        let stays = |key: &String, addresses: &Addresses| {
            let on = |pod: &Pod| nodes.get(&pod.node).is_some_and(|node| addresses.v4.octets()[2] == *node);
            definition.pods.iter().any(|pod| pod_key(pod) == *key && on(pod))
        };
        self.pods.retain(|key, addresses| stays(key, addresses));
        self.services.retain(|host, _| definition.services.iter().any(|service| hostname(service) == *host));
        for pod in &definition.pods {
            if !self.pods.contains_key(&pod_key(pod)) {
                let node = self.node(&pod.node);
                let free = (2..=254).map(|host| on_node(node, host)).find(|free| !self.pods.values().any(|taken| taken == free));
                self.pods.insert(pod_key(pod), free.ok_or_else(|| full(&pod.name))?);
            }
        }
        for service in &definition.services {
            let addresses = if service.headless {
                Vec::new()
            } else if !service.addresses.is_empty() {
                service.addresses.clone()
            } else if let Some(kept) = self.services.get(&hostname(service)).filter(|kept| !kept.is_empty()) {
                kept.clone()
            } else {
                let taken = |address: IpAddr| self.services.values().flatten().any(|taken| *taken == address);
                let free = (1..u16::MAX).map(virtual_address).find(|free| !free.list().into_iter().any(taken));
                free.ok_or_else(|| full(&service.name))?.list().to_vec()
            };
            self.services.insert(hostname(service), addresses);
        }
        Ok(())
    }

    /// A node's number, from 1; 0 for a node that does not exist (definitions are checked before).
    pub(super) fn node(&self, name: &str) -> u8 {
        self.nodes.get(name).copied().unwrap_or(0)
    }

    /// A pod's addresses.
    pub(super) fn pod(&self, pod: &Pod) -> Option<Addresses> {
        self.pods.get(&pod_key(pod)).copied()
    }

    /// A service's virtual addresses; none when it is headless.
    pub(super) fn service(&self, service: &Service) -> &[IpAddr] {
        self.services.get(&hostname(service)).map_or(&[], Vec::as_slice)
    }

    /// The `/etc/hosts` of pods of one namespace: services by every name that Kubernetes gives them, pods by their names.
    pub(super) fn hosts(&self, definition: &Definition, own: &Pod) -> String {
        let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n".to_owned();
        let mut line = |address: IpAddr, names: &str| writeln!(text, "{address} {names}").unwrap_or_default();
        for service in &definition.services {
            let host = hostname(service);
            let mut names = format!("{host} {0}.{1}.svc {0}.{1}", service.name, service.namespace);
            if service.namespace == own.namespace {
                names = format!("{names} {}", service.name);
            }
            if service.headless {
                for pod in definition.pods.iter().filter(|pod| super::mesh::selects(service, pod)) {
                    self.pod(pod).into_iter().flat_map(Addresses::list).for_each(|address| line(address, &names));
                }
            }
            self.service(service).iter().for_each(|address| line(*address, &names));
        }
        let taken = |name: &str| definition.services.iter().any(|service| service.name == name && service.namespace == own.namespace);
        for pod in &definition.pods {
            let names = format!("{0}.{1}.pod {0}.{1}.pod.cluster.local", pod.name, pod.namespace);
            let short = if pod.namespace == own.namespace && !taken(&pod.name) { format!(" {}", pod.name) } else { String::new() };
            self.pod(pod).into_iter().flat_map(Addresses::list).for_each(|address| line(address, &format!("{names}{short}")));
        }
        text
    }
}
