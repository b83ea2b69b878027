//! The files of a local CA, as in Istio's `cacerts` secret: reading them with checks that say what to do, and writing a fresh set.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PublicKeyData,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::{Zeroize, Zeroizing};

use super::certificate::{Validity, from_pem, rfc3339_of};
use super::error::IdentityError;

pub(super) const CA_CERT: &str = "ca-cert.pem";
pub(super) const CA_KEY: &str = "ca-key.pem";
pub(super) const ROOT_CERT: &str = "root-cert.pem";
pub(super) const CERT_CHAIN: &str = "cert-chain.pem";

/// What the directory holds, each file checked by itself and against the others, but the chain not yet verified.
pub(super) struct Files {
    pub(super) ca: CertificateDer<'static>,
    pub(super) key: KeyPair,
    /// Sent with every leaf: the CA and what lies between it and the roots; empty when the CA is a root itself.
    pub(super) intermediates: Vec<CertificateDer<'static>>,
    pub(super) roots: Vec<CertificateDer<'static>>,
    /// When all of the chain is valid.
    pub(super) validity: Validity,
}

/// An error about one file.
pub(super) fn wrong(path: PathBuf, problem: impl Into<String>, remedy: &'static str) -> IdentityError {
    IdentityError::LocalCa { path, problem: problem.into(), remedy }
}

impl Files {
    pub(super) fn read(dir: &Path, now: SystemTime) -> Result<Self, IdentityError> {
        let ca_path = dir.join(CA_CERT);
        let key_path = dir.join(CA_KEY);
        let ca = required(&ca_path, "put the CA's certificate there (PEM), as in Istio's cacerts secret")?;
        let ca = parse(&ca_path, &ca)?.swap_remove(0);
        check_authority(&ca_path, &ca)?;
        check_dates(&ca_path, &ca, now)?;
        let key = read_key(&key_path)?;
        check_key_matches(&key_path, &ca, &key)?;

        let chain_path = dir.join(CERT_CHAIN);
        let root_path = dir.join(ROOT_CERT);
        let mut chain = match optional(&chain_path)? {
            Some(text) => parse(&chain_path, &text)?,
            None => Vec::new(),
        };
        for certificate in &chain {
            check_authority(&chain_path, certificate)?;
            check_dates(&chain_path, certificate, now)?;
        }
        let roots = match optional(&root_path)? {
            Some(text) => parse(&root_path, &text)?,
            // Unambiguous only when the end of the chain is a root itself.
            None => match chain.last().or(Some(&ca)).filter(|last| is_self_issued(last)) {
                Some(last) => vec![last.clone()],
                None => {
                    return Err(wrong(root_path, "it is missing, and the chain does not end with a root", "put the root certificates there (PEM)"));
                }
            },
        };
        check_roots(&root_path, &roots, now)?;
        // The chain file usually begins with the CA and may end with a root; both are put in their places here.
        chain.retain(|certificate| *certificate != ca && !roots.contains(certificate));
        let mut intermediates = Vec::new();
        if !roots.contains(&ca) {
            intermediates.push(ca.clone());
            intermediates.append(&mut chain);
        }
        let mut validity = dates(&ca_path, &ca)?;
        for certificate in &intermediates {
            let one = dates(&chain_path, certificate)?;
            validity = Validity { not_before: validity.not_before.max(one.not_before), not_after: validity.not_after.min(one.not_after) };
        }
        Ok(Self { ca, key, intermediates, roots, validity })
    }
}

fn required(path: &Path, remedy: &'static str) -> Result<Vec<u8>, IdentityError> {
    optional(path)?.ok_or_else(|| wrong(path.to_owned(), "it is missing", remedy))
}

fn optional(path: &Path) -> Result<Option<Vec<u8>>, IdentityError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(wrong(path.to_owned(), format!("it cannot be read: {error}"), "make it a file that this process may read")),
    }
}

fn parse(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    from_pem(text).map_err(|problem| wrong(path.to_owned(), problem, "write certificates in PEM there (-----BEGIN CERTIFICATE-----)"))
}

fn dates(path: &Path, der: &CertificateDer<'_>) -> Result<Validity, IdentityError> {
    Validity::of(der).map_err(|problem| wrong(path.to_owned(), problem, "write an X.509 certificate there"))
}

fn check_dates(path: &Path, der: &CertificateDer<'_>, now: SystemTime) -> Result<(), IdentityError> {
    let validity = dates(path, der)?;
    if now >= validity.not_after {
        let problem = format!("it expired at {} (it is {})", rfc3339_of(validity.not_after), rfc3339_of(now));
        return Err(wrong(path.to_owned(), problem, "renew the CA, or correct this machine's clock"));
    }
    if now < validity.not_before {
        let problem = format!("it is not valid before {} (it is {})", rfc3339_of(validity.not_before), rfc3339_of(now));
        return Err(wrong(path.to_owned(), problem, "correct this machine's clock, or wait"));
    }
    Ok(())
}

fn check_authority(path: &Path, der: &CertificateDer<'_>) -> Result<(), IdentityError> {
    let remedy = "use a certificate made for a CA (basicConstraints CA:TRUE, keyUsage keyCertSign)";
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|error| wrong(path.to_owned(), format!("it cannot be read as a certificate: {error}"), "write an X.509 certificate there"))?;
    if !certificate.basic_constraints().ok().flatten().is_some_and(|constraints| constraints.value.ca) {
        return Err(wrong(path.to_owned(), "it is not the certificate of a CA", remedy));
    }
    if certificate.key_usage().ok().flatten().is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(wrong(path.to_owned(), "its key usage does not allow it to sign certificates", remedy));
    }
    Ok(())
}

/// A bundle may hold retired roots, but one must be good.
fn check_roots(path: &Path, roots: &[CertificateDer<'static>], now: SystemTime) -> Result<(), IdentityError> {
    let mut first_problem = None;
    let mut good = false;
    for root in roots {
        match check_authority(path, root).and_then(|()| check_dates(path, root, now)) {
            Ok(()) => good = true,
            Err(problem) => first_problem = first_problem.or(Some(problem)),
        }
    }
    match first_problem {
        Some(problem) if !good => Err(problem),
        Some(problem) => {
            tracing::warn!(%problem, "one root certificate of the local CA is of no use; the others are used");
            Ok(())
        }
        None => Ok(()),
    }
}

fn is_self_issued(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| certificate.subject() == certificate.issuer())
}

fn read_key(path: &Path) -> Result<KeyPair, IdentityError> {
    let text = Zeroizing::new(required(path, "put the CA's private key there (PEM, not encrypted)")?);
    let remedy = "write the CA's RSA or ECDSA key there, not encrypted, in PEM (PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY)";
    if text.windows(9).any(|window| window == b"ENCRYPTED") {
        return Err(wrong(path.to_owned(), "the key is encrypted", remedy));
    }
    let der = PrivateKeyDer::from_pem_slice(&text).map_err(|error| wrong(path.to_owned(), format!("it holds no PEM key: {error}"), remedy))?;
    let der = Zeroizing::new(der);
    let mut key = KeyPair::try_from(&*der).map_err(|error| wrong(path.to_owned(), format!("the key cannot be used: {error}"), remedy))?;
    // Wipes the text form only; the key itself stays in the crypto library, which wipes it when it is freed.
    key.zeroize();
    if fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o077 != 0) {
        tracing::warn!(path = %path.display(), "the local CA's private key may be read by others than its owner; set its mode to 0600");
    }
    Ok(key)
}

fn check_key_matches(path: &Path, ca: &CertificateDer<'_>, key: &KeyPair) -> Result<(), IdentityError> {
    let certified = X509Certificate::from_der(ca).map(|(_, certificate)| certificate.public_key().subject_public_key.data.to_vec());
    if certified.is_ok_and(|public| public == key.der_bytes()) {
        return Ok(());
    }
    Err(wrong(path.to_owned(), format!("the key does not match the certificate in {CA_CERT}"), "use the certificate and the key of the same CA"))
}

/// Lifetime of a fresh root and of the CA below it: lab and single-machine use, nobody should have to renew it.
const FRESH_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Writes a fresh root and a CA below it. The root's key is thrown away.
pub(super) fn create(dir: &Path, now: SystemTime) -> Result<(), IdentityError> {
    let failed = |error: rcgen::Error| wrong(dir.to_owned(), format!("no CA could be made: {error}"), "report this");
    fs::create_dir_all(dir)
        .map_err(|error| wrong(dir.to_owned(), format!("it cannot be made: {error}"), "choose a directory that may be written"))?;
    let params = |name: &str, below| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Culvert local CA");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(super::local::fresh_serial());
        params.not_before = (now - super::local::BACKDATE).into();
        params.not_after = (now + FRESH_LIFETIME).into();
        params
    };
    let generate = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Zeroizing::new).map_err(failed);
    let (root_key, ca_key) = (generate()?, generate()?);
    let root = CertifiedIssuer::self_signed(params("root", 1), &*root_key).map_err(failed)?;
    let ca = params("intermediate", 0).signed_by(&*ca_key, &root).map_err(failed)?;
    let key_text = Zeroizing::new(ca_key.serialize_pem());
    // The key last: a directory without it is refused, so a half-written one is never used.
    write_new(dir, ROOT_CERT, 0o644, root.pem().as_bytes())?;
    write_new(dir, CERT_CHAIN, 0o644, ca.pem().as_bytes())?;
    write_new(dir, CA_CERT, 0o644, ca.pem().as_bytes())?;
    write_new(dir, CA_KEY, 0o600, key_text.as_bytes())
}

fn write_new(dir: &Path, name: &str, mode: u32, bytes: &[u8]) -> Result<(), IdentityError> {
    let path = dir.join(name);
    let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| wrong(path, format!("it cannot be written: {error}"), "choose an empty directory that may be written"))
}
