//! The tunnel: HTTP/2 CONNECT over mutual TLS on port 15008; dials, accepts, pools, keeps alive and limits.
//! It never decides who may connect (that is `policy`, asked by `proxy`) and shows no HTTP/2 type to its callers, so that the forwarding core
//! can take the place of the stock `h2` underneath.
//! Main types: [`Endpoint`], [`ServerTunnel`], [`Pool`], [`TunnelStream`], [`ConnectRequest`]; [`Mover`] and [`Frozen`] move a live tunnel.

mod accept;
mod budget;
mod dial;
mod engine;
pub mod hpack;
mod lifetime;
mod moving;
mod pool;
mod request;
mod stream;
mod within;

/// Walking through HTTP/2 frames (RFC 9113 §4.1) in whatever pieces they arrive. In no signature of the room; public like [`hpack`], for the
/// fuzz targets and benches.
pub mod framing {
    pub use super::engine::{Head, Step, Walker};
}

use std::time::Duration;

use crate::forward::record::KEY_LIMIT;
use crate::identity::Revocations;
use crate::lifecycle::Clock;

pub use accept::{Incoming, ServerTunnel, accept};
pub use budget::ReceiveBudget;
pub use dial::ClientTunnel;
pub use engine::{Frozen, StateError};
pub use moving::{Immovable, MovedStream, Mover};
pub use pool::{Dialer, Pool, PoolKey};
pub use request::{BadRequest, ConnectRequest, ConnectResponse, Refusal};
pub use stream::{Relaying, Role, TunnelStream};
pub use within::Inner;

/// The port of HBONE on pods (reference, dataplane §1.1).
pub const PORT: u16 = 15008;

/// Sizes and times of tunnels.
#[derive(Debug, Clone)]
pub struct Config {
    /// Full receive window of one stream, bytes. What a stream whose reader stopped can hold. Default 4 MiB (`HTTP2_STREAM_WINDOW_SIZE`). Streams
    /// have the same part of this as their tunnel has of its full window.
    pub stream_window: u32,
    /// Full receive window of one tunnel, bytes; must exceed [`Config::stream_window`] or an application that stops one stream until another
    /// progresses can deadlock. Default 16 MiB (`HTTP2_CONNECTION_WINDOW_SIZE`). Tunnels begin with 1 MiB and have it after 4 MiB in a row, if
    /// the [`ReceiveBudget`] allows; 256 KiB in any case.
    pub connection_window: u32,
    /// Largest frame that we accept, bytes; one is held per tunnel. Default 1 MiB (`HTTP2_FRAME_SIZE`).
    pub frame_size: u32,
    /// Streams served at once per tunnel. Default 256. Of those that a peer opens before it has acknowledged this, four times as many.
    pub max_streams: u32,
    /// Largest decoded header list that we accept, bytes; beyond it 431, beyond four times it the tunnel ends. Default 8 KiB.
    pub header_list: u32,
    /// TLS, preface and first SETTINGS together must be done by then. Default 10 s.
    pub handshake_deadline: Duration,
    /// A PING is sent after this much time since the last answer. Default 10 s.
    pub ping_interval: Duration,
    /// A peer that was silent for this long and has not answered a PING is dead. Default 15 s.
    pub ping_timeout: Duration,
    /// Streams opened at once per pooled tunnel before a sibling is dialled. Default 100 (`POOL_MAX_STREAMS_PER_CONNECTION`).
    pub pool_max_streams: u16,
    /// A pooled tunnel without a stream for this long is closed. Default 5 min (`POOL_UNUSED_RELEASE_TIMEOUT`).
    pub pool_unused_release: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_size: 1 << 20,
            max_streams: 256,
            header_list: 8 << 10,
            handshake_deadline: Duration::from_secs(10),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(15),
            pool_max_streams: 100,
            pool_unused_release: Duration::from_secs(300),
        }
    }
}

/// What all tunnels of a node have in common.
#[derive(Debug)]
pub struct Endpoint {
    /// Sizes and times.
    pub config: Config,
    /// What peers may send before applications have taken it, for all tunnels together. Default 64 MiB (`CULVERT_RECEIVE_BUDGET`).
    pub budget: ReceiveBudget,
    /// Tells when certificates expire.
    pub clock: Clock,
    /// Revocation lists, to count tunnels that were taken up without the certificates of their peers (which were too large to be kept), so that no list can
    /// cut them. Default none.
    pub revocations: Option<Revocations>,
    /// Records that we seal with one key before we update it. Default and most: [`KEY_LIMIT`] (RFC 8446 §5.5).
    pub records_per_key: u64,
}

impl Endpoint {
    /// The receive budget of a node unless it is told another, bytes.
    pub const RECEIVE_BUDGET: u64 = 64 << 20;

    /// With the default budget and the system's clock.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config, budget: ReceiveBudget::new(Self::RECEIVE_BUDGET), clock: Clock::system(), revocations: None, records_per_key: KEY_LIMIT }
    }
}

/// A peer that agreed on nothing might speak anything (reference, craft-and-trust H1). TLS itself lets one pass that offers no ALPN.
fn require_alpn(agreed: Option<&[u8]>) -> Result<(), Error> {
    match agreed {
        Some(b"h2") => Ok(()),
        Some(other) => Err(Error::Handshake(format!("the peer agreed on ALPN {:?} instead of h2", String::from_utf8_lossy(other)))),
        None => Err(Error::Handshake("the peer did not agree on ALPN h2".to_owned())),
    }
}

/// Why a tunnel or a stream could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// TCP connect failed.
    #[error("connection failed: {0}")]
    Connect(#[source] std::io::Error),
    /// TCP connect to the HBONE port timed out.
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: {0}")]
    ConnectTimeout(std::net::SocketAddr),
    /// TLS failed.
    #[error("TLS handshake failed: {0}")]
    Tls(String),
    /// A certificate of the peer is on a revocation list.
    #[error("a certificate of the peer is revoked")]
    Revoked,
    /// The peer is not one of the expected identities.
    #[error("{0}")]
    Peer(#[from] crate::identity::PeerError),
    /// The handshake took too long.
    #[error("TLS and HTTP/2 handshake not finished within {0:?}")]
    HandshakeDeadline(Duration),
    /// The HTTP/2 handshake failed.
    #[error("HTTP/2 handshake failed: {0}")]
    Handshake(String),
    /// The tunnel broke.
    #[error("HTTP/2 error: {0}")]
    Tunnel(String),
    /// The peer asked too much without moving bytes, see the guards of the engine. What it was.
    #[error("closed with ENHANCE_YOUR_CALM: {0}")]
    Flood(&'static str),
    /// The peer answered something else than 200.
    #[error("http status: {0}")]
    Status(u16),
    /// The tunnel closed while the request waited for it.
    #[error("the pool is draining")]
    Draining,
    /// The tunnel through a gateway stands, and the one within it does not.
    #[error("beyond gateway {gateway}: {error}")]
    Within {
        /// The gateway.
        gateway: std::net::SocketAddr,
        /// What happened behind it.
        error: Box<Self>,
    },
    /// The tunnel cannot be moved to another process. It goes on.
    #[error("the tunnel cannot be moved: {0}")]
    Immovable(Immovable),
    /// A PING was not answered.
    #[error("no answer to PING within {0:?}")]
    PingTimeout(Duration),
}
