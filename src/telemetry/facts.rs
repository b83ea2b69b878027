//! What is known about a connection when it is recorded.

use std::sync::Arc;

use crate::model::{Authority, Baggage, CompactAddress, Service, SpiffeId, Text, Workload};

/// Which end of the connection this proxy stands at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// At the client: outbound.
    Source,
    /// At the server: inbound.
    Destination,
}

impl Reporter {
    /// Value of the `reporter` label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// Value of the `direction` field of the access log.
    #[must_use]
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

/// How a connection ended, as the `response_flags` label (reference, dataplane §10.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum ResponseFlag {
    /// `-`: it ended by itself, or a drain ended it.
    #[default]
    Ok,
    /// `DENY`: policy, at the start or later.
    Denied,
    /// `CONNECT`: the upstream connection, and every error without a flag of its own.
    Connect,
    /// `TLS_FAILURE`.
    TlsFailure,
    /// `H2_HANDSHAKE_FAILURE`: HTTP/2 handshake or protocol error.
    H2Failure,
    /// `NETWORK_POLICY`: a timeout dialling 15008, which a NetworkPolicy usually causes.
    NetworkPolicy,
    /// `IDENTITY_ERROR`: no certificate.
    IdentityError,
    /// `CERT_REVOKED`.
    Revoked,
}

impl ResponseFlag {
    /// Every flag, in the order of their numbers.
    pub(super) const ALL: [Self; 8] =
        [Self::Ok, Self::Denied, Self::Connect, Self::TlsFailure, Self::H2Failure, Self::NetworkPolicy, Self::IdentityError, Self::Revoked];

    /// Value of the label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "-",
            Self::Denied => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2Failure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::Revoked => "CERT_REVOKED",
        }
    }
}

/// One end of a connection.
#[derive(Debug, Clone)]
pub struct PeerFacts {
    /// Its address. For the destination: the actual next hop (such as pod:15008), or the real destination of plain TCP.
    pub address: CompactAddress,
    /// The workload that we know it to be. When set, nothing of the baggage is used: a claim does not fill gaps of a fact.
    pub workload: Option<Arc<Workload>>,
    /// The identity of its certificate (or our own, on the side of this proxy). Shown only when the connection is mutual TLS.
    pub identity: Option<SpiffeId>,
    /// What it says about itself.
    pub baggage: Option<Box<Baggage>>,
}

impl PeerFacts {
    /// An end of which only the address is known.
    #[must_use]
    pub fn unknown(address: impl Into<CompactAddress>) -> Self {
        Self { address: address.into(), workload: None, identity: None, baggage: None }
    }
}

/// Everything that labels and access log need. Attribution rules: reference, dataplane §4.7 and §10.4.
///
/// Every live connection holds one, so it shares what it can and makes no text before somebody reads it.
#[derive(Debug, Clone)]
pub struct ConnectionFacts {
    /// Which end we are.
    pub reporter: Reporter,
    /// The client.
    pub source: PeerFacts,
    /// The next hop.
    pub destination: PeerFacts,
    /// The service originally intended, if any.
    pub service: Option<Arc<Service>>,
    /// `:authority` of the tunnel; `None` without one.
    pub hbone_target: Option<Authority>,
    /// Whether both ends were authenticated by certificates.
    pub mutual_tls: bool,
}

/// How a connection ended.
#[derive(Debug, Clone, Default)]
pub struct ConnectionEnd {
    /// The flag that metrics show.
    pub flag: ResponseFlag,
    /// Why it ended badly; makes the access log line an ERROR.
    pub error: Option<String>,
    /// `namespace/name` of the policy that decided, if one did.
    pub policy: Option<Text>,
}
