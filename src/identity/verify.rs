//! Verification of peers. The chain (roots, validity, purpose) is webpki's work; what a name must look like is ours.
//!
//! Both verifiers run webpki first, so that our own reading of names only sees certificates that a trusted CA signed.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::error::PeerError;
use super::revocation::{Revocations, Trust};
use super::tls::Shape;
use crate::model::{SpiffeId, Text};
use crate::telemetry::Reporter;

/// Certificates that a peer may present: its leaf and four intermediates. Longer chains cost CPU before anything is proven.
pub(super) const MAX_PRESENTED: usize = 5;

/// The identity in the first certificate of a chain that was verified before (by the configuration of the connection).
///
/// Refuses a leaf that is a CA, that may not sign a handshake, or that has anything but exactly one URI name which is a workload's SPIFFE ID.
/// Names of other kinds (DNS, IP) are ignored.
///
/// # Errors
/// [`PeerError`] says which rule is broken.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
    let malformed = |reason: &dyn std::fmt::Display| PeerError::Malformed(reason.to_string());
    let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|error| malformed(&error))?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed("bytes follow the certificate".to_owned()));
    }
    if certificate.basic_constraints().map_err(|error| malformed(&error))?.is_some_and(|constraints| constraints.value.ca) {
        return Err(PeerError::Authority);
    }
    if let Some(usage) = certificate.key_usage().map_err(|error| malformed(&error))? {
        if !usage.value.digital_signature() {
            return Err(PeerError::KeyUsage("does not allow digital signatures"));
        }
        if usage.value.key_cert_sign() || usage.value.crl_sign() {
            return Err(PeerError::KeyUsage("is that of a CA"));
        }
    }
    let names = certificate.subject_alternative_name().map_err(|error| malformed(&error))?.ok_or(PeerError::NoUri)?;
    let mut uris = Vec::new();
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::Invalid(tag, _) => return Err(PeerError::Malformed(format!("a name of kind {} is not text", tag.0))),
            _ => {}
        }
    }
    match uris.as_slice() {
        [] => Err(PeerError::NoUri),
        [uri] => Ok(uri.parse()?),
        several => Err(PeerError::SeveralUris(several.len())),
    }
}

/// Checks, after a client handshake, that the server is one of those expected there; the chain itself was verified in the handshake.
///
/// This is apart from the handshake so that one configuration per certificate serves all destinations. An empty list accepts nobody.
///
/// # Errors
/// [`PeerError::Unexpected`] names both sides; otherwise the errors of [`peer_identity`].
pub fn expect_peer(chain: &[CertificateDer<'_>], expected: &[SpiffeId]) -> Result<SpiffeId, PeerError> {
    let actual = peer_identity(chain)?;
    if expected.contains(&actual) { Ok(actual) } else { Err(PeerError::Unexpected { expected: expected.to_vec(), actual }) }
}

fn refuse(error: PeerError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

fn check_length(intermediates: &[CertificateDer<'_>]) -> Result<(), Error> {
    let presented = intermediates.len() + 1;
    if presented > MAX_PRESENTED { Err(refuse(PeerError::TooLong { presented, limit: MAX_PRESENTED })) } else { Ok(()) }
}

/// The revocation lists of a verifier, if there are any.
#[derive(Debug)]
struct Listed {
    lists: Option<Revocations>,
    trust: Trust,
}

impl Listed {
    fn new(roots: &Arc<RootCertStore>, shape: &Shape, reporter: Reporter) -> Self {
        let algorithms = shape.provider.signature_verification_algorithms;
        Self { lists: shape.revocations.clone(), trust: Trust { roots: roots.clone(), algorithms, reporter } }
    }

    fn refuse_revoked(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Error> {
        match &self.lists {
            Some(lists) if lists.revoke((leaf, intermediates), &self.trust, now) => Err(CertificateError::Revoked.into()),
            _ => Ok(()),
        }
    }
}

/// Verifies clients: a certificate is required, must lead to our roots, be meant for clients, and name a workload of our own trust domain.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: Text,
    listed: Listed,
}

impl ClientVerifier {
    pub(super) fn new(roots: Arc<RootCertStore>, shape: &Shape, trust_domain: Text) -> Result<Self, Error> {
        let listed = Listed::new(&roots, shape, Reporter::Destination);
        let chain = WebPkiClientVerifier::builder_with_provider(roots, shape.provider.clone())
            // A peer has one certificate; naming our roots would only make the handshake longer and tell strangers who we trust.
            .clear_root_hint_subjects()
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self { chain, trust_domain, listed })
    }

    /// What [`ClientCertVerifier::verify_client_cert`] does but for the revocation lists, for a certificate that was not presented in a handshake.
    pub(super) fn check(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> Result<ClientCertVerified, Error> {
        check_length(intermediates)?;
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        let peer = peer_identity(std::slice::from_ref(leaf)).map_err(refuse)?;
        if *peer.trust_domain() != self.trust_domain {
            return Err(refuse(PeerError::TrustDomain { own: self.trust_domain.clone(), peer }));
        }
        Ok(verified)
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.check(leaf, intermediates, now)?;
        self.listed.refuse_revoked(leaf, intermediates, now)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Verifies servers: the certificate must lead to our roots, be meant for servers, and name some workload. *Which* workload is checked after the
/// handshake by [`expect_peer`]; the server name of the connection is ignored.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    listed: Listed,
}

impl ServerVerifier {
    pub(super) fn new(roots: Arc<RootCertStore>, shape: &Shape) -> Self {
        let listed = Listed::new(&roots, shape, Reporter::Source);
        Self { roots, algorithms: shape.provider.signature_verification_algorithms, listed }
    }

    /// What [`ServerCertVerifier::verify_server_cert`] does but for the revocation lists, for a certificate that was not presented in a handshake.
    pub(super) fn check(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], now: UnixTime) -> Result<SpiffeId, Error> {
        check_length(intermediates)?;
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms.all)?;
        peer_identity(std::slice::from_ref(leaf)).map_err(refuse)
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(leaf, intermediates, now)?;
        self.listed.refuse_revoked(leaf, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
