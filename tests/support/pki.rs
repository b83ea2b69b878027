//! Certificates of every kind, good and bad, made at run time.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};

pub const HOUR: Duration = Duration::from_secs(3600);

/// A CA that signs whatever it is told to.
pub struct Authority {
    pub signer: CertifiedIssuer<'static, KeyPair>,
    /// What lies between this CA and its root: this CA first. Empty for a root.
    pub chain: Vec<CertificateDer<'static>>,
}

/// The parameters of a CA; two of the same name differ only in their keys.
pub fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (SystemTime::now() - HOUR).into();
    params.not_after = (SystemTime::now() + 24 * 365 * HOUR).into();
    params
}

impl Authority {
    pub fn root(name: &str) -> Self {
        Self::root_with(ca_params(name), KeyPair::generate().unwrap())
    }

    pub fn root_with(params: CertificateParams, key: KeyPair) -> Self {
        Self { signer: CertifiedIssuer::self_signed(params, key).unwrap(), chain: Vec::new() }
    }

    pub fn intermediate(&self, name: &str) -> Self {
        let signer = CertifiedIssuer::signed_by(ca_params(name), KeyPair::generate().unwrap(), &self.signer).unwrap();
        let mut chain = vec![signer.der().clone()];
        chain.extend(self.chain.iter().cloned());
        Self { signer, chain }
    }

    /// A leaf with its chain.
    pub fn leaf(&self, params: CertificateParams) -> Presented {
        let key = KeyPair::generate().unwrap();
        let mut chain = vec![params.signed_by(&key, &self.signer).unwrap().der().clone()];
        chain.extend(self.chain.iter().cloned());
        Presented::new(chain, &key)
    }

    /// Writes the directory that `LocalIssuer::load` reads.
    pub fn write(&self, dir: &Path, root: &Self) {
        fs::write(dir.join("ca-cert.pem"), self.signer.pem()).unwrap();
        fs::write(dir.join("ca-key.pem"), self.signer.key().serialize_pem()).unwrap();
        fs::write(dir.join("root-cert.pem"), root.signer.pem()).unwrap();
        let chain: String = self.chain.iter().map(|der| pem("CERTIFICATE", der)).collect();
        fs::write(dir.join("cert-chain.pem"), if chain.is_empty() { root.signer.pem() } else { chain }).unwrap();
    }
}

pub fn pem(kind: &str, der: &[u8]) -> String {
    use base64::Engine;
    let body = base64::prelude::BASE64_STANDARD.encode(der);
    let lines: Vec<&str> = body.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
}

/// A good workload certificate with these URI names; change what the test is about.
pub fn workload(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = (SystemTime::now() - HOUR).into();
    params.not_after = (SystemTime::now() + HOUR).into();
    params
}

/// What a peer shows and signs with.
#[derive(Clone)]
pub struct Presented {
    pub certified: Arc<CertifiedKey>,
}

impl Presented {
    pub fn new(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Self {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = aws_lc_rs::default_provider().key_provider.load_private_key(key).unwrap();
        Self { certified: Arc::new(CertifiedKey::new(chain, key)) }
    }

    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The configuration of a client that believes everything and presents this.
    pub fn client(&self) -> rustls::ClientConfig {
        self.client_with(aws_lc_rs::default_provider(), &[&rustls::version::TLS13])
    }

    pub fn client_with(&self, provider: CryptoProvider, versions: &[&'static rustls::SupportedProtocolVersion]) -> rustls::ClientConfig {
        let mut config = credulous(provider, versions).with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }

    /// The configuration of a server that asks nobody for a certificate and presents this.
    pub fn server(&self) -> rustls::ServerConfig {
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

/// A client that believes every server.
pub fn credulous(
    provider: CryptoProvider,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    let verifier = Arc::new(Credulous(provider.signature_verification_algorithms.supported_schemes()));
    rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
}

#[derive(Debug)]
struct Credulous(Vec<SignatureScheme>);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}
