//! What signs certificates, and what we send to it.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::crypto::KeyProvider;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::SigningKey;
use zeroize::Zeroizing;

use super::error::IdentityError;
use crate::model::SpiffeId;

/// A request for one certificate. It holds no secret.
#[derive(Debug, Clone)]
pub struct SigningRequest {
    /// The identity to certify.
    pub identity: SpiffeId,
    /// PKCS#10 in PEM: a P-256 key, an empty subject, and the identity as its only name.
    pub csr_pem: String,
    /// The lifetime wanted. The issuer may give less.
    pub ttl: Duration,
}

/// An answer of an issuer, in the layout of ref §7.1. It is verified before it is installed, whoever gave it.
#[derive(Debug, Clone)]
pub struct Issued {
    /// PEM texts: first the leaf, then the intermediates in order, last the roots (possibly several in one text).
    pub certificates: Vec<String>,
}

/// The pending answer of an issuer. Dropping it gives the request up.
pub type IssuerFuture<'a> = Pin<Box<dyn Future<Output = Result<Issued, IdentityError>> + Send + 'a>>;

/// Signs certificates: in process ([`LocalIssuer`](super::LocalIssuer)) or over the network.
pub trait Issuer: Send + Sync + 'static {
    /// Asks for a certificate. Called for at most [`Config::requests_in_flight`](super::Config::requests_in_flight) identities at a time, and
    /// given up after [`Config::request_timeout`](super::Config::request_timeout); repetition is the caller's work.
    fn issue<'a>(&'a self, request: &'a SigningRequest) -> IssuerFuture<'a>;
}

/// A fresh private key and the request for its certificate. The key bytes are wiped as soon as rustls has them; they are never written anywhere.
pub(super) struct PendingKey {
    pub(super) key: Arc<dyn SigningKey>,
    pub(super) request: SigningRequest,
}

impl PendingKey {
    pub(super) fn generate(identity: &SpiffeId, ttl: Duration, keys: &dyn KeyProvider) -> Result<Self, IdentityError> {
        let failed = |error: &dyn fmt::Display| IdentityError::Request(error.to_string());
        let pair = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| failed(&error))?);
        let name = Ia5String::try_from(identity.to_string()).map_err(|error| failed(&error))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(name)];
        let csr = params.serialize_request(&*pair).map_err(|error| failed(&error))?;
        let csr_pem = csr.pem().map_err(|error| failed(&error))?;
        // rustls takes the bytes over and wipes them when it has read them.
        let key = keys.load_private_key(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()))).map_err(|error| failed(&error))?;
        Ok(Self { key, request: SigningRequest { identity: identity.clone(), csr_pem, ttl } })
    }
}
