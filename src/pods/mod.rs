//! Which pods are ours: listens to the node agent over ZDS, opens each pod's listeners inside the pod, hands them to a [`PodRunner`]
//! and stops it when the pod goes. This room never accepts or dials a connection, installs no rules, and decides nothing about traffic.
//! Main types: [`Client`], [`PodsView`], [`PodRunner`], [`PodListeners`].
//!
//! The protocol is reference, dataplane §8: packets in lock step, each acknowledged before the next comes. Its rules live without a
//! socket in `ledger` (what is running, what waits, what the snapshot named) and `request` (what a packet may look like).

mod client;
mod ledger;
mod listeners;
mod request;
mod view;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::lifecycle::drain::DrainTrigger;
use crate::sys::netns::NetNs;
use crate::sys::socket::{Keepalive, Transparency};

pub use crate::wire::zds::Pod;
pub use client::Client;
pub use listeners::open_listeners;
pub use view::{PodStats, PodsView};

/// Port of captured outbound connections (reference, dataplane §1.1).
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of captured inbound plaintext connections.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Port of captured DNS queries, UDP and TCP.
pub const DNS_PORT: u16 = 15053;
/// Port of SOCKS5, where it is served.
pub const SOCKS_PORT: u16 = 15080;
/// Port of inbound tunnels.
pub const HBONE_PORT: u16 = 15008;
/// The mark on every socket made in a pod (reference, dataplane §1.2); the pod's rules leave marked packets alone.
pub const PACKET_MARK: u32 = 0x539;

/// How pods are found and their listeners made.
#[derive(Debug, Clone)]
pub struct Config {
    /// The agent's socket. Default `/var/run/ztunnel/ztunnel.sock` (`INPOD_UDS`), where istio-cni listens.
    pub socket: PathBuf,
    /// Mark on in-pod sockets. Default [`PACKET_MARK`] (`PACKET_MARK`); must be what the pod's rules exempt. `None` only for a dedicated proxy.
    pub mark: Option<u32>,
    /// `SO_REUSEPORT` on in-pod listeners. Default true (`INPOD_PORT_REUSE`): the successor binds beside us during an upgrade.
    pub port_reuse: bool,
    /// Whether inbound connections keep the client's address. Default: try (`ENABLE_ORIG_SRC`).
    pub transparency: Transparency,
    /// Keepalive of connections accepted on 15001 and 15006. Default 180 s, 180 s, 9 probes. 15008 has HTTP/2 PING instead.
    pub keepalive: Option<Keepalive>,
    /// `TCP_USER_TIMEOUT` of the same connections. Default off.
    pub user_timeout: Option<Duration>,
    /// Listen on `[::]` for both families. Default true (`IPV6_ENABLED`); where the kernel has no IPv6 the listeners are IPv4 ones.
    pub ipv6: bool,
    /// Time between attempts to serve a pod whose listeners could not be opened. Default 5 s, as the reference.
    pub retry: Duration,
    /// What else is served in the pods. Default DNS only.
    pub services: Services,
    /// How long connections of the pods may go on after a graceful shutdown began. Default 5 s; the chart sets it below the grace period.
    pub drain_deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/var/run/ztunnel/ztunnel.sock"),
            mark: Some(PACKET_MARK),
            port_reuse: true,
            transparency: Transparency::Try,
            keepalive: Some(Keepalive::default()),
            user_timeout: None,
            ipv6: true,
            retry: Duration::from_secs(5),
            services: Services::default(),
            drain_deadline: Duration::from_secs(5),
        }
    }
}

/// What is served to a pod's own processes, beside the connections that its rules bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Services {
    /// Where DNS is served. Default on loopback, port 15053 (`DNS_PROXY_ADDR`); `None` without DNS capture (`DNS_CAPTURE`).
    pub dns: Option<DnsAddress>,
    /// Whether SOCKS5 is served, on 127.0.0.1 and [`SOCKS_PORT`] (`UNSTABLE_ENABLE_SOCKS5`). Default false.
    pub socks: bool,
}

impl Default for Services {
    fn default() -> Self {
        Self { dns: Some(DnsAddress::default()), socks: false }
    }
}

/// Where DNS is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsAddress {
    /// A port of 127.0.0.1, and of ::1 where there is one.
    Loopback(u16),
    /// One address.
    At(SocketAddr),
}

impl Default for DnsAddress {
    fn default() -> Self {
        Self::Loopback(DNS_PORT)
    }
}

/// The sockets on which DNS of one pod is served.
#[derive(Debug)]
pub struct DnsSockets {
    /// One per address.
    pub udp: Vec<tokio::net::UdpSocket>,
    /// One per address.
    pub tcp: Vec<tokio::net::TcpListener>,
}

/// The listening sockets of one pod, and the namespace for the sockets that will be dialled from it.
#[derive(Debug)]
pub struct PodListeners {
    /// Port 15001: connections of the pod's applications, redirected.
    pub outbound: tokio::net::TcpListener,
    /// Port 15006: plaintext connections to the pod's applications, redirected.
    pub plaintext: tokio::net::TcpListener,
    /// Port 15008: tunnels to the pod.
    pub hbone: tokio::net::TcpListener,
    /// Port 15053, if DNS is captured.
    pub dns: Option<DnsSockets>,
    /// Port 15080 of loopback, if SOCKS5 is served.
    pub socks: Option<tokio::net::TcpListener>,
    /// Whether dialled sockets of this pod may take the client's address.
    pub transparent: bool,
    /// The pod's network namespace.
    pub netns: NetNs,
}

/// Serves pods: the `proxy` room, seen from here.
pub trait PodRunner: Send + Sync {
    /// Starts to accept on `listeners`, on tasks of its own, and returns at once. Called within the runtime that is to serve the pod.
    fn start(&self, pod: Pod, listeners: PodListeners) -> RunningPod;
}

/// A function that lists a pod's live connections as `{"inbound": […], "outbound": […]}` (reference, dataplane §10.2).
pub type Connections = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// A pod that is being served. Dropping it stops the pod at once: the drain watchers of its tasks see their trigger gone.
pub struct RunningPod {
    trigger: DrainTrigger,
    connections: Connections,
}

impl RunningPod {
    /// `trigger` must be the one whose watchers all tasks of the pod hold; `connections` is asked when a person dumps the state.
    #[must_use]
    pub fn new(trigger: DrainTrigger, connections: Connections) -> Self {
        Self { trigger, connections }
    }
}

impl std::fmt::Debug for RunningPod {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("RunningPod").finish_non_exhaustive()
    }
}

/// Why the client gave up for good.
#[derive(Debug, thiserror::Error)]
pub enum PodsError {
    /// The agent broke the protocol in a way after which our state cannot be trusted: the process must exit with code 1 and start afresh.
    #[error("the node agent at {socket} broke the protocol: {reason}; restart the proxy, and check that agent and proxy versions fit")]
    Protocol {
        /// The agent's socket.
        socket: PathBuf,
        /// What it did.
        reason: String,
    },
}
