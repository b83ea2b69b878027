//! The data path: one connection from accept to close, outbound (15001, and 15080 for SOCKS5), inbound HBONE (15008) and inbound plaintext
//! (15006); and the pods' DNS (15053).
//! It never opens a connection for a destination that policy has not permitted, and never holds mesh state of its own: it reads the snapshot.
//! Main types: [`Node`] (what all pods share), [`PodProxy`] (one pod), and the journey of a connection in `session`.

mod accept;
mod announcement;
mod connections;
mod demand;
mod departures;
pub mod dns;
mod failed_dials;
mod guard;
mod host_names;
mod inbound;
mod live;
mod outbound;
mod own_tunnel;
mod plaintext;
mod pod;
mod prefetch;
pub mod route;
mod session;
mod sockets;
mod socks;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

pub use connections::{Asked, ConnectionTable, LiveConnection, Protocol};
pub use departures::Departures;
pub use failed_dials::FailedDials;
pub use host_names::HostNames;
pub use own_tunnel::serve_own_tunnel;
pub use pod::PodProxy;
pub use prefetch::prefetch_certificates;
pub use session::Error;
pub use sockets::PodSockets;
pub use socks::HandshakeError;

use crate::discovery::Mesh;
use crate::hbone;
use crate::identity::Credentials;
use crate::lifecycle::Permits;
use crate::model::SpiffeId;
use crate::sys::socket::Keepalive;
use crate::telemetry::Telemetry;

/// What decides how connections are treated.
#[derive(Debug, Clone)]
pub struct Config {
    /// What routing needs to know: our network (`NETWORK`), which ports are our own.
    pub route: route::RouteConfig,
    /// `SO_MARK` of dialled sockets (`PACKET_MARK`). Default 1337 in shared mode, none in dedicated mode.
    pub mark: Option<u32>,
    /// TCP keepalive of dialled sockets. Default 180 s, 180 s, 9.
    pub keepalive: Option<Keepalive>,
    /// Whether `TCP_USER_TIMEOUT` follows the keepalive (`USER_TIMEOUT_ENABLED`). Default false.
    pub user_timeout: bool,
    /// How long a connect may take. Default 10 s.
    pub connect_timeout: Duration,
    /// How long a connection of which one direction has ended may lie still. Default 5 min.
    pub half_closed: Duration,
    /// How long a connection waits for its own workload to be known, and then for its certificate. Default 5 s.
    pub workload_timeout: Duration,
    /// Whether response baggage is sent and request baggage is believed (`ENABLE_RESPONSE_BAGGAGE`). Default true.
    pub baggage: bool,
    /// Whether applications that are told the client by a PROXY header are reached on the pod's loopback address (`LOCALHOST_APP_TUNNEL`). Default
    /// true.
    pub localhost_app_tunnel: bool,
    /// Whether policy decisions are logged at INFO rather than DEBUG (`AUTHZ_POLICY_INFO_LOGGING`). Default false.
    pub policy_info: bool,
}

/// What all pods of a node share.
pub struct Node {
    /// How connections are treated.
    pub config: Config,
    /// Sizes and times of tunnels, and what they share.
    pub hbone: Arc<hbone::Endpoint>,
    /// The mesh as it is known.
    pub mesh: Mesh,
    /// Certificates of local identities.
    pub credentials: Credentials,
    /// Addresses of what the mesh knows by name only.
    pub host_names: HostNames,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// Connections whose peer is not yet authenticated: 512 per node, 64 per source address.
    pub unauthenticated: Permits<IpAddr>,
    /// Dials under way on behalf of a peer: 64 each.
    pub dials: Permits<SpiffeId>,
    /// Dials that came to nothing, per peer and pod: 100 per second.
    pub failed_dials: FailedDials,
    /// Tells the pools of all pods who left the mesh.
    pub departures: Departures,
}
