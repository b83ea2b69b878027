//! Calls to a control plane: gRPC over TLS, with roots and a bearer token that are read again whenever they are used, so that whoever rotates the
//! files restarts nothing. It never speaks in plaintext, never sends a token to a server that it did not verify, and knows no message of any
//! protocol.
//! Main types: [`Dialer`] (how to reach and trust one server), [`Connection`] (one HTTP/2 connection to it).
//!
//! Shared by `identity` (CA) and `discovery` (xDS), which may not use each other; the map of design §2 has no other place for it. Source of the
//! rules: reference, dataplane §5.3 and §7.4.

mod answers;
mod coalesce;
mod connection;
mod dial;
mod files;
mod pieces;
mod trust;

use std::path::PathBuf;
use std::time::Duration;

pub use answers::Answers;
pub use coalesce::Coalescing;
pub use connection::{Connection, status_text};
pub use dial::{Address, Dialer};
pub use files::{RootSource, Token};
pub use trust::Roots;

/// How to reach one server and what to show it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it is.
    pub address: Address,
    /// Which roots its certificate must lead to.
    pub roots: RootSource,
    /// A second name that its certificate may have (`ALT_XDS_HOSTNAME`, `ALT_CA_HOSTNAME`). The name sent in SNI stays the address's.
    pub alternate_name: Option<String>,
    /// What proves who we are; `None` sends no `authorization` header.
    pub token: Option<Token>,
    /// Headers of every call, such as `clusterid`.
    pub headers: Vec<(String, String)>,
    /// Offer only X25519MLKEM768 and TLS 1.3 (`COMPLIANCE_POLICY=pqc`). Default off.
    pub post_quantum_only: bool,
    /// `SO_MARK` of its sockets (needs CAP_NET_ADMIN). Default none. A proxy within a captured pod would catch its own calls without it.
    pub mark: Option<u32>,
    /// How long TCP may take for one address, and TLS and HTTP/2 together. Default 5 s.
    pub connect_timeout: Duration,
    /// While a call is under way: a PING is sent after this much silence. Default 18 s: the reference's control plane calls more than one in 15 s
    /// abuse, and with [`Config::ping_timeout`] a dead stream is noticed within 30 s.
    pub ping_interval: Duration,
    /// A PING without an answer for this long means that the connection is dead. Default 10 s.
    pub ping_timeout: Duration,
}

impl Config {
    /// The defaults, for a server.
    #[must_use]
    pub fn new(address: Address, roots: RootSource) -> Self {
        Self {
            address,
            roots,
            alternate_name: None,
            token: None,
            headers: Vec::new(),
            post_quantum_only: false,
            mark: None,
            connect_timeout: Duration::from_secs(5),
            ping_interval: Duration::from_secs(18),
            ping_timeout: Duration::from_secs(10),
        }
    }
}

/// Why a call cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The address, a name or a header is not usable: nothing will work until it is changed.
    #[error("{what} {value:?} {problem}")]
    Setting {
        /// Which one.
        what: &'static str,
        /// What it is set to.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There are no roots to verify the server with.
    #[error("the roots {origin}: {problem}")]
    Roots {
        /// Where they come from.
        origin: String,
        /// What is wrong with them.
        problem: String,
    },
    /// The token cannot be sent.
    #[error("the token file {path}: {problem}", path = path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The server cannot be reached.
    #[error("cannot reach {address}: {problem}")]
    Unreachable {
        /// The server.
        address: String,
        /// What happened.
        problem: String,
    },
    /// The server was reached, but is not trusted or does not speak TLS with HTTP/2.
    #[error("no trusted connection to {address}: {problem}")]
    Untrusted {
        /// The server.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
}

#[cfg(test)]
mod tests;
