//! Why a handshake failed, in words for the log and in one word for a metric.

use std::borrow::Cow;
use std::io;

use rustls::{AlertDescription, CertificateError, Error};

use super::error::PeerError;

/// Why a handshake failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandshakeFailure {
    /// One of a fixed set of words, fit for a metric label.
    pub reason: &'static str,
    /// A sentence for the log. Names that a peer chose are escaped.
    pub text: Cow<'static, str>,
}

impl std::fmt::Display for HandshakeFailure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.text)
    }
}

fn failure(reason: &'static str, text: impl Into<Cow<'static, str>>) -> HandshakeFailure {
    HandshakeFailure { reason, text: text.into() }
}

/// Explains an error of a rustls connection.
#[must_use]
pub fn explain(error: &Error) -> HandshakeFailure {
    match error {
        Error::InvalidCertificate(problem) => explain_certificate(problem),
        Error::NoCertificatesPresented => failure("no_certificate", PeerError::NoCertificate.to_string()),
        Error::AlertReceived(alert) => explain_alert(*alert),
        Error::PeerIncompatible(problem) => failure("incompatible", format!("the peer offers nothing that we accept: {problem:?}")),
        Error::NoApplicationProtocol => failure("incompatible", "the peer does not speak h2 (ALPN)"),
        Error::InvalidMessage(problem) => failure("not_tls", format!("the peer does not speak TLS correctly: {problem:?}")),
        Error::PeerMisbehaved(problem) => failure("misbehaved", format!("the peer broke the rules of TLS: {problem:?}")),
        other => failure("other", other.to_string()),
    }
}

/// Explains the error of a handshake over a socket: the TLS reason inside it when there is one, otherwise the socket's own words.
#[must_use]
pub fn explain_io(error: &io::Error) -> HandshakeFailure {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(inner) => explain(inner),
        None if error.kind() == io::ErrorKind::UnexpectedEof => failure("closed", "the peer closed the connection during the handshake"),
        None => failure("io", error.to_string()),
    }
}

fn explain_certificate(problem: &CertificateError) -> HandshakeFailure {
    use CertificateError as E;
    match problem {
        E::Expired => failure("expired", "peer certificate expired"),
        E::ExpiredContext { time, not_after } => {
            let ago = time.as_secs().saturating_sub(not_after.as_secs());
            failure("expired", format!("peer certificate expired {ago} s ago"))
        }
        E::NotValidYet => failure("not_yet_valid", "peer certificate is not valid yet"),
        E::NotValidYetContext { time, not_before } => {
            let ahead = not_before.as_secs().saturating_sub(time.as_secs());
            failure("not_yet_valid", format!("peer certificate is not valid for another {ahead} s (is a clock wrong?)"))
        }
        E::UnknownIssuer => failure("unknown_issuer", "unknown issuer: the peer's certificate does not lead to a root that we trust"),
        E::BadSignature => {
            failure("bad_signature", "bad signature: the peer's certificate was not signed by the CA it names, or its key is not its own")
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            failure("wrong_purpose", "the peer's certificate is not meant for this (extended key usage)")
        }
        E::Revoked => failure("revoked", "peer certificate revoked"),
        E::BadEncoding => failure("malformed", "the peer's certificate cannot be read"),
        E::Other(other) => match other.0.downcast_ref::<PeerError>() {
            Some(peer) => explain_peer(peer),
            // webpki's own words for this one do not cross rustls as a type.
            None if other.0.to_string() == "CaUsedAsEndEntity" => explain_peer(&PeerError::Authority),
            None => failure("certificate", format!("the peer's certificate is refused: {}", other.0)),
        },
        other => failure("certificate", format!("the peer's certificate is refused: {other}")),
    }
}

fn explain_peer(error: &PeerError) -> HandshakeFailure {
    let reason = match error {
        PeerError::NoCertificate => "no_certificate",
        PeerError::TooLong { .. } => "chain_too_long",
        PeerError::Malformed(_) => "malformed",
        PeerError::Authority => "ca_as_leaf",
        PeerError::KeyUsage(_) => "wrong_purpose",
        PeerError::NoUri | PeerError::SeveralUris(_) | PeerError::NotSpiffe(_) => "bad_name",
        PeerError::TrustDomain { .. } => "trust_domain",
        PeerError::Unexpected { .. } => "identity",
    };
    failure(reason, error.to_string())
}

fn explain_alert(alert: AlertDescription) -> HandshakeFailure {
    use AlertDescription as A;
    let text = match alert {
        A::CertificateRequired => "the peer refused us: it wants a certificate",
        A::CertificateExpired => "the peer refused our certificate: expired, by its clock",
        A::UnknownCA => "the peer refused our certificate: it does not know our CA",
        A::CertificateRevoked => "the peer refused our certificate: revoked",
        A::BadCertificate | A::UnsupportedCertificate | A::CertificateUnknown | A::AccessDenied => {
            "the peer refused our certificate; its log says why (often another trust domain or identity)"
        }
        A::ProtocolVersion => "the peer does not accept our TLS version",
        A::HandshakeFailure => "the peer accepts none of our suites or key exchanges",
        other => return failure("refused_by_peer", format!("the peer ended the handshake: {other:?}")),
    };
    failure("refused_by_peer", text)
}

impl From<&PeerError> for HandshakeFailure {
    fn from(error: &PeerError) -> Self {
        explain_peer(error)
    }
}
