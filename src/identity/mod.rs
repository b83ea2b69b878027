//! Who: certificates of the workloads on this node, their renewal, the rustls configurations made of them, and the check of a peer's certificate.
//! This room never lets a private key out (only certificate requests leave it), never installs an answer that it did not verify, and never
//! accepts a peer with anything but exactly one SPIFFE name.
//! Main types: [`Credentials`] (the store that renews), [`Credential`] (one certificate with its configurations), [`Issuer`] with
//! [`LocalIssuer`] and [`RemoteIssuer`].
//!
//! Sources of the rules: ref dataplane §2.1 (TLS), §7 (issuer, cache and renewal); SPIFFE X.509-SVID §2–5 (one URI name, leaf is not a CA).

mod certificate;
mod credential;
mod credentials;
mod error;
mod explain;
mod issuer;
mod local;
mod local_files;
mod metrics;
mod remote;
mod renewal;
mod revocation;
mod secrets;
mod tls;
mod verify;

use std::time::Duration;

pub use certificate::{CertificateEntry, CertificateState};
pub use credential::Credential;
pub use credentials::Credentials;
pub use error::{AnswerProblem, IdentityError, PeerError};
pub use explain::{HandshakeFailure, explain, explain_io};
pub use issuer::{Issued, Issuer, IssuerFuture, SigningRequest};
pub use local::{LocalIssuer, ServerCertificate};
pub use remote::RemoteIssuer;
pub use revocation::{Revocations, Revoked};
pub use secrets::{TrafficSecrets, capture_secrets};
pub use verify::{expect_peer, peer_identity};

/// Settings of this room.
#[derive(Debug, Clone)]
pub struct Config {
    /// Lifetime asked of the issuer (`SECRET_TTL`). Default 24 h: a stolen key is useful for a day at most, and an issuer may be down for 12 h.
    pub ttl: Duration,
    /// Requests to the issuer at the same time. Default 8 (ref §7.3): a node that starts with 250 identities does not flood the issuer.
    pub requests_in_flight: usize,
    /// How long one request may take before it counts as failed. Default 30 s: longer than a slow issuer (20 s), short enough to free its place.
    pub request_timeout: Duration,
    /// First delay after a failed request. Default 1 s (ref §7.3); doubles with each failure, ±20 %.
    pub retry_initial: Duration,
    /// Longest delay after a failed request. Default 150 s (ref §7.3).
    pub retry_limit: Duration,
    /// Prefetches that may wait; more are dropped and fetched when first needed. Default 256 (ref §7.3).
    pub prefetch_queue: usize,
    /// Revocation lists that peers' certificates must not be on (`CRL_PATH`). Default none.
    pub revocations: Option<Revocations>,
    /// Offer and accept only X25519MLKEM768 (`COMPLIANCE_POLICY=pqc`). Default off: peers without it could not connect.
    pub post_quantum_only: bool,
    /// Offer AES-128-GCM before AES-256-GCM. Default off (ref §2.1). Saves about a fifth of the CPU of bulk encryption; a server follows its client.
    pub prefer_aes128: bool,
    /// Speak TLS 1.2 with peers that speak nothing newer (`TLS12_ENABLED`). Default off; has no effect with `post_quantum_only`, which 1.2 cannot be.
    pub tls12: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 60 * 60),
            requests_in_flight: 8,
            request_timeout: Duration::from_secs(30),
            retry_initial: Duration::from_secs(1),
            retry_limit: Duration::from_secs(150),
            prefetch_queue: 256,
            revocations: None,
            post_quantum_only: false,
            prefer_aes128: false,
            tls12: false,
        }
    }
}
