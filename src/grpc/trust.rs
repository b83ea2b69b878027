//! Whether a server is the one that was dialled.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme, SupportedProtocolVersion};

use super::{Error, RootSource};

static TLS13_ONLY: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// The roots as they were when they were read. Equal ones have the same certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    pub(super) certificates: Vec<CertificateDer<'static>>,
}

impl Roots {
    /// The certificates of a PEM text; those that cannot be roots are passed over.
    pub(super) fn parse(source: &RootSource, pem: &[u8]) -> Result<Self, Error> {
        let failed = |problem: String| Error::Roots { origin: source.to_string(), problem };
        let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let certificates = certificates.map_err(|error| failed(format!("not PEM: {error}")))?;
        let roots = Self { certificates };
        if roots.store().is_empty() {
            return Err(failed("there is no usable certificate among them (PEM, -----BEGIN CERTIFICATE-----)".to_owned()));
        }
        Ok(roots)
    }

    fn store(&self) -> RootCertStore {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(self.certificates.iter().cloned());
        store
    }

    /// A TLS configuration that believes these roots, for a server that may also have the name `alternate`.
    pub(super) fn client(&self, alternate: Option<ServerName<'static>>, post_quantum_only: bool) -> Result<ClientConfig, TlsError> {
        let mut provider = aws_lc_rs::default_provider();
        let mut versions = rustls::ALL_VERSIONS;
        if post_quantum_only {
            provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
            versions = TLS13_ONLY;
        }
        let provider = Arc::new(provider);
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(self.store()), provider.clone());
        let verifier = builder.build().map_err(|error| TlsError::General(error.to_string()))?;
        let mut config = ClientConfig::builder_with_provider(provider as Arc<CryptoProvider>)
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(EitherName { verifier, alternate }))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would not be verified again after the roots changed.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

/// The chain must be right in any case; the name may be the one that was dialled or the alternate.
#[derive(Debug)]
struct EitherName {
    verifier: Arc<WebPkiServerVerifier>,
    alternate: Option<ServerName<'static>>,
}

impl ServerCertVerifier for EitherName {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let verdict = self.verifier.verify_server_cert(leaf, intermediates, name, ocsp, now);
        match (&verdict, &self.alternate) {
            (
                Err(TlsError::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. })),
                Some(alternate),
            ) => self.verifier.verify_server_cert(leaf, intermediates, alternate, ocsp, now),
            _ => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verifier.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verifier.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
