//! The tunnel: HTTP/2 CONNECT over mutual TLS on port 15008; dials, accepts, pools, keeps alive and limits.
//! It never decides who may connect (that is `policy`, asked by `proxy`) and shows no HTTP/2 type to its callers, so that the forwarding core
//! can take the place of the stock `h2` underneath.
//! Main types: [`ServerTunnel`], [`Pool`], [`TunnelStream`], [`ConnectRequest`].

mod accept;
mod dial;
mod keepalive;
mod pool;
mod request;
mod stream;

use std::time::Duration;

pub use accept::{Incoming, ServerTunnel, accept};
pub use dial::ClientTunnel;
pub use pool::{Dialer, Pool, PoolKey};
pub use request::{BadRequest, ConnectRequest, ConnectResponse, Refusal};
pub use stream::{Role, TunnelStream};

/// The port of HBONE on pods (reference, dataplane §1.1).
pub const PORT: u16 = 15008;

/// Sizes and times of tunnels.
#[derive(Debug, Clone)]
pub struct Config {
    /// Receive window of one stream, bytes. Worst case memory of a stream whose reader stopped. Default 4 MiB (`HTTP2_STREAM_WINDOW_SIZE`).
    pub stream_window: u32,
    /// Receive window of one tunnel, bytes; must exceed [`Config::stream_window`] or an application that stops one stream until another
    /// progresses can deadlock. Default 16 MiB (`HTTP2_CONNECTION_WINDOW_SIZE`).
    pub connection_window: u32,
    /// Largest frame that we accept, bytes. Default 1 MiB (`HTTP2_FRAME_SIZE`).
    pub frame_size: u32,
    /// Streams served at once per tunnel. Default 256.
    pub max_streams: u32,
    /// Largest decoded header list that we accept, bytes; also what bounds CONTINUATION frames. Default 8 KiB.
    pub header_list: u32,
    /// TLS, preface and first SETTINGS together must be done by then. Default 10 s.
    pub handshake_deadline: Duration,
    /// A PING is sent after this much time since the last answer. Default 10 s.
    pub ping_interval: Duration,
    /// A PING without an answer for this long means that the peer is dead. Default 15 s.
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
    /// The peer answered something else than 200.
    #[error("http status: {0}")]
    Status(u16),
    /// The tunnel closed while the request waited for it.
    #[error("the pool is draining")]
    Draining,
    /// A PING was not answered.
    #[error("no answer to PING within {0:?}")]
    PingTimeout(Duration),
}
