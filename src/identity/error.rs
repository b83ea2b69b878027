//! What can go wrong with our own certificates, and with a peer's.

use std::path::PathBuf;
use std::time::Duration;

use super::explain::HandshakeFailure;
use crate::model::{SpiffeError, SpiffeId, Text};

/// Why there is no certificate for an identity, or why the local CA cannot be used. Cheap to clone: every waiter gets a copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// A file or the directory of the local CA is not as it must be.
    #[error("local CA {path}: {problem}; {remedy}", path = path.display())]
    LocalCa {
        /// The file or directory at fault.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The issuer refused, or could not be reached.
    #[error("the issuer gave no certificate: {0}")]
    Issuer(String),
    /// The CA could not be asked: our settings, roots or token, or the way to it.
    #[error("the CA could not be asked: {0}")]
    Channel(#[from] crate::grpc::Error),
    /// The CA answered with an error instead of a certificate.
    #[error("the CA refused: {text}{hint}")]
    Refused {
        /// Of which kind the error is.
        code: tonic::Code,
        /// What the CA said, shortened and escaped.
        text: String,
        /// What to look at.
        hint: &'static str,
    },
    /// The issuer did not answer in time ([`Config::request_timeout`](super::Config::request_timeout)).
    #[error("the issuer did not answer within {0:?}")]
    Timeout(Duration),
    /// The issuer answered something that must not be installed.
    #[error("the issuer's answer for {identity} was not installed: {problem}")]
    Answer {
        /// The identity that was asked for.
        identity: SpiffeId,
        /// What is wrong with the answer.
        problem: AnswerProblem,
    },
    /// A workload whose trust domain, namespace or service account make no SPIFFE ID: it cannot have a certificate.
    #[error(transparent)]
    Name(#[from] SpiffeError),
    /// No key or certificate request could be made.
    #[error("no certificate request could be made: {0}")]
    Request(String),
    /// The identity was forgotten while somebody waited for it: its last workload left this node.
    #[error("the certificate of {0} is no longer needed")]
    Forgotten(SpiffeId),
    /// Renewal was stopped because the process is shutting down.
    #[error("certificate renewal has stopped")]
    Stopped,
}

/// Why an issuer's answer is refused. The old certificate stays in use while it is valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerProblem {
    /// No certificate at all.
    #[error("it is empty")]
    Empty,
    /// Only the leaf: without roots no peer can be verified.
    #[error("it has no root certificates")]
    NoRoots,
    /// A part is not a PEM certificate.
    #[error("{0}")]
    Malformed(String),
    /// More certificates than any sane chain.
    #[error("it has {0} certificates in its chain")]
    TooLong(usize),
    /// The leaf is for somebody else.
    #[error("it is for {0}")]
    WrongIdentity(SpiffeId),
    /// The leaf breaks the rules that every peer would apply to it.
    #[error("every peer would refuse it: {0}")]
    Leaf(PeerError),
    /// The leaf is for another key.
    #[error("it certifies another key than the one requested")]
    OtherKey,
    /// The leaf, or the chain to the roots, would be refused by a peer.
    #[error("every peer would refuse it: {0}")]
    Untrusted(HandshakeFailure),
}

impl IdentityError {
    /// One of a fixed set of words, fit for a metric label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        use crate::grpc::Error as Channel;
        match self {
            Self::LocalCa { .. } | Self::Issuer(_) => "local_ca",
            Self::Channel(Channel::Setting { .. }) => "setting",
            Self::Channel(Channel::Roots { .. }) => "roots",
            Self::Channel(Channel::Token { .. }) => "token",
            Self::Channel(Channel::Unreachable { .. }) => "unreachable",
            Self::Channel(Channel::Untrusted { .. }) => "untrusted_ca",
            Self::Refused { code: tonic::Code::Unauthenticated | tonic::Code::PermissionDenied, .. } => "unauthenticated",
            // What tonic says of a message over the limit.
            Self::Refused { code: tonic::Code::OutOfRange, .. } => "too_large",
            Self::Refused { code: tonic::Code::Unavailable, .. } => "unavailable",
            Self::Refused { .. } => "refused",
            Self::Timeout(_) => "timeout",
            Self::Answer { problem, .. } => problem.reason(),
            Self::Name(_) | Self::Request(_) => "request",
            Self::Forgotten(_) | Self::Stopped => "given_up",
        }
    }
}

impl AnswerProblem {
    fn reason(&self) -> &'static str {
        match self {
            Self::Empty => "answer_empty",
            Self::NoRoots => "answer_without_roots",
            Self::Malformed(_) => "answer_malformed",
            Self::TooLong(_) => "answer_too_long",
            Self::WrongIdentity(_) => "answer_for_other_identity",
            Self::OtherKey => "answer_for_other_key",
            Self::Untrusted(failure) if failure.reason == "expired" => "answer_expired",
            Self::Untrusted(failure) if failure.reason == "not_yet_valid" => "answer_not_yet_valid",
            Self::Leaf(_) | Self::Untrusted(_) => "answer_untrusted",
        }
    }
}

/// Why a peer's certificate is not an identity that we accept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The peer presented nothing.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// More certificates than any sane chain: refused before any signature is checked.
    #[error("the peer presented {presented} certificates, more than the {limit} allowed")]
    TooLong {
        /// Number presented.
        presented: usize,
        /// Number allowed.
        limit: usize,
    },
    /// The leaf does not parse.
    #[error("the certificate cannot be read: {0}")]
    Malformed(String),
    /// SPIFFE X.509-SVID §4.1: a leaf must not be a CA.
    #[error("the certificate is a CA certificate, which must not be used as a workload's")]
    Authority,
    /// SPIFFE X.509-SVID §4.3: digitalSignature yes, keyCertSign and cRLSign no.
    #[error("the certificate's key usage {0}")]
    KeyUsage(&'static str),
    /// No URI name: other names do not count.
    #[error("the certificate has no URI name, so it names no workload")]
    NoUri,
    /// SPIFFE X.509-SVID §2: more than one URI name must be rejected.
    #[error("the certificate has {0} URI names, exactly one is allowed")]
    SeveralUris(usize),
    /// The one URI name is not a workload's SPIFFE ID.
    #[error("{0}")]
    NotSpiffe(#[from] SpiffeError),
    /// A client of another trust domain.
    #[error("trust domain mismatch: the peer is {peer}, only {own} is accepted")]
    TrustDomain {
        /// The trust domain of our own certificate.
        own: Text,
        /// The whole identity of the peer.
        peer: SpiffeId,
    },
    /// A server that is not the one that was dialled.
    #[error("identity mismatch: the peer is {actual}, expected {}", list(expected))]
    Unexpected {
        /// Who may answer there.
        expected: Vec<SpiffeId>,
        /// Who answered.
        actual: SpiffeId,
    },
}

impl PeerError {
    /// The error of this room inside an error of rustls, when that is what refused the peer.
    pub(super) fn within(error: &rustls::Error) -> Option<&Self> {
        match error {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => other.0.downcast_ref(),
            _ => None,
        }
    }
}

/// Names at most five identities; a service can have thousands of accounts and this is a log line.
fn list(identities: &[SpiffeId]) -> String {
    match identities {
        [] => "nobody (the destination has no known identity)".to_owned(),
        [one] => one.to_string(),
        many => {
            let shown = many.iter().take(5).map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let rest = many.len().saturating_sub(5);
            if rest == 0 { format!("one of {shown}") } else { format!("one of {shown} and {rest} more") }
        }
    }
}
