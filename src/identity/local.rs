//! A CA in this process, for the lab and for a single machine without a control plane.

mod serving;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};

use super::certificate::{Validity, rfc3339_of, to_pem};
use super::credential::Credential;
use super::error::IdentityError;
use super::issuer::{Issued, Issuer, IssuerFuture, PendingKey, SigningRequest};
use super::local_files::{self, CA_CERT, CA_KEY, CERT_CHAIN, Files, ROOT_CERT, wrong};
use super::tls::Shape;
use crate::lifecycle::Clock;
use crate::model::SpiffeId;
pub use serving::ServerCertificate;

/// How long before now a certificate begins, so that peers with a slow clock accept it. Shorter for short-lived ones.
pub(super) const BACKDATE: Duration = Duration::from_secs(2 * 60);

/// A CA with less left than this is complained about.
const CA_NEARLY_EXPIRED: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The same complaint is not repeated within this time.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60 * 60);

/// Signs certificates with a CA whose key is in a local directory (`LOCAL_CA_DIR`), laid out as Istio's `cacerts` secret.
///
/// Whoever can read the directory can be anybody in the mesh; [`load`](Self::load) logs a warning that says so.
pub struct LocalIssuer {
    clock: Clock,
    signer: rcgen::Issuer<'static, KeyPair>,
    /// PEM of each certificate sent with a leaf.
    intermediates: Vec<String>,
    /// PEM of all roots.
    roots: String,
    validity: Validity,
    ca_path: PathBuf,
    /// Seconds since 1970 of the last complaint about the CA's nearing end.
    complained: AtomicU64,
}

impl LocalIssuer {
    /// The names of the files that [`load`](Self::load) reads.
    pub const FILES: [&'static str; 4] = [CA_CERT, CA_KEY, ROOT_CERT, CERT_CHAIN];

    /// Reads `ca-cert.pem`, `ca-key.pem`, `root-cert.pem` and `cert-chain.pem` and proves that certificates signed with them will be accepted.
    ///
    /// The last two may be absent where that is unambiguous: without a chain file the CA must be a root or be signed by one; without a root file
    /// the chain (or the CA) must end with a root. Keys: RSA of at least 2048 bits or ECDSA on P-256, P-384 or P-521; PKCS#8, SEC1 or PKCS#1.
    ///
    /// # Errors
    /// [`IdentityError::LocalCa`] names the file, what is wrong with it and what to do.
    pub fn load(dir: &Path, clock: Clock) -> Result<Self, IdentityError> {
        let files = Files::read(dir, clock.now())?;
        let ca_path = dir.join(CA_CERT);
        let signer = rcgen::Issuer::from_ca_cert_der(&files.ca, files.key)
            .map_err(|error| wrong(ca_path.clone(), format!("it cannot be used to sign: {error}"), "use an X.509 v3 CA certificate"))?;
        let issuer = Self {
            clock,
            signer,
            intermediates: files.intermediates.iter().map(|der| to_pem(der)).collect(),
            roots: files.roots.iter().map(|der| to_pem(der)).collect(),
            validity: files.validity,
            ca_path,
            complained: AtomicU64::new(0),
        };
        issuer.prove(dir)?;
        tracing::warn!(
            directory = %dir.display(),
            "certificates are signed in this process with the CA key in a local directory: whoever can read it can be any workload; \
             meant for a lab or a single machine"
        );
        issuer.complain_if_nearly_expired(issuer.clock.now(), Duration::ZERO);
        Ok(issuer)
    }

    /// Writes a fresh root and CA (P-256, ten years) in the layout that [`load`](Self::load) reads; the key file has mode 0600. The root's key is
    /// thrown away. Existing files are never overwritten.
    ///
    /// # Errors
    /// [`IdentityError::LocalCa`] when the directory cannot be made or already holds such a file.
    pub fn create(dir: &Path, clock: &Clock) -> Result<(), IdentityError> {
        local_files::create(dir, clock.now())
    }

    /// Signs a throw-away certificate and verifies it as a peer will: whatever is wrong shows now and not at the first connection.
    fn prove(&self, dir: &Path) -> Result<(), IdentityError> {
        let shape = Arc::new(Shape::new(&super::Config::default(), self.clock.clone()));
        let identity = SpiffeId::new("culvert.internal", "self-test", "self-test")?;
        let pending = PendingKey::generate(&identity, Duration::from_secs(60), shape.provider.key_provider)?;
        let issued = self.sign(&pending.request)?;
        match Credential::verify(&shape, pending, &issued, 0) {
            Ok(_) => Ok(()),
            Err(IdentityError::Answer { problem, .. }) => Err(wrong(
                dir.join(if self.intermediates.len() > 1 { CERT_CHAIN } else { CA_CERT }),
                format!("its chain does not lead to a root in root-cert.pem: {problem}"),
                "put all certificates between the CA and the root into cert-chain.pem, in order, and the root that signed them into root-cert.pem",
            )),
            Err(other) => Err(other),
        }
    }

    fn sign(&self, request: &SigningRequest) -> Result<Issued, IdentityError> {
        let refused = |reason: String| Err(IdentityError::Issuer(reason));
        let now = self.clock.now();
        if !self.validity.covers(now) {
            let (from, to) = (rfc3339_of(self.validity.not_before), rfc3339_of(self.validity.not_after));
            return refused(format!("the local CA {} is valid from {from} to {to} only; renew it", self.ca_path.display()));
        }
        let csr = CertificateSigningRequestParams::from_pem(&request.csr_pem)
            .map_err(|error| IdentityError::Issuer(format!("the certificate request is not valid: {error}")))?;
        if csr.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 || csr.public_key.der_bytes().len() != 65 {
            return refused("the certificate request is not for a P-256 key".to_owned());
        }
        let name = Ia5String::try_from(request.identity.to_string()).map_err(|error| IdentityError::Issuer(error.to_string()))?;
        let name = SanType::URI(name);
        if csr.params.subject_alt_names.iter().any(|asked| *asked != name) {
            return refused(format!("the certificate request names somebody else than {}", request.identity));
        }
        self.complain_if_nearly_expired(now, request.ttl);

        // Nothing of the request but its key is used.
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![name];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(fresh_serial());
        params.not_before = (now - BACKDATE.min(request.ttl / 10)).max(self.validity.not_before).into();
        params.not_after = (now + request.ttl).min(self.validity.not_after).into();
        let leaf = params
            .signed_by(&csr.public_key, &self.signer)
            .map_err(|error| IdentityError::Issuer(format!("the local CA could not sign: {error}")))?;
        let mut certificates = vec![to_pem(leaf.der())];
        certificates.extend(self.intermediates.iter().cloned());
        certificates.push(self.roots.clone());
        Ok(Issued { certificates })
    }

    fn complain_if_nearly_expired(&self, now: SystemTime, ttl: Duration) {
        let left = self.validity.not_after.duration_since(now).unwrap_or_default();
        if left >= CA_NEARLY_EXPIRED.max(ttl) {
            return;
        }
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let last = self.complained.load(Ordering::Relaxed);
        if last != 0 && seconds < last.saturating_add(COMPLAIN_EVERY.as_secs()) {
            return;
        }
        self.complained.store(seconds, Ordering::Relaxed);
        tracing::warn!(
            ca = %self.ca_path.display(),
            expires = rfc3339_of(self.validity.not_after),
            days_left = left.as_secs() / 86_400,
            "the local CA expires soon, and no certificate outlives it: renew it"
        );
    }
}

impl Issuer for LocalIssuer {
    fn issue<'a>(&'a self, request: &'a SigningRequest) -> IssuerFuture<'a> {
        Box::pin(async move { self.sign(request) })
    }
}

impl fmt::Debug for LocalIssuer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By hand: the key must not appear.
        formatter.debug_struct("LocalIssuer").field("ca", &self.ca_path).field("expires", &rfc3339_of(self.validity.not_after)).finish()
    }
}

/// 16 random bytes, positive (RFC 5280 §4.1.2.2).
pub(super) fn fresh_serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests;
