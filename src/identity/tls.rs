//! The rustls configurations of a certificate (ref §2.1).

use std::fmt;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::UnixTime;
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, Error, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};

use super::Config;
use super::revocation::Revocations;
use super::secrets::Capture;
use super::verify::{ClientVerifier, ServerVerifier};
use crate::lifecycle::Clock;

/// The ALPN name of HTTP/2. A peer that offers no ALPN at all passes the handshake: the tunnel checks what was agreed.
const ALPN: &[u8] = b"h2";

static TLS13_ONLY: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
static TLS13_AND_12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// What all configurations of a store share.
pub(super) struct Shape {
    pub(super) provider: Arc<CryptoProvider>,
    versions: &'static [&'static SupportedProtocolVersion],
    pub(super) revocations: Option<Revocations>,
    time: Arc<WallClock>,
}

impl Shape {
    pub(super) fn new(config: &Config, clock: Clock) -> Self {
        use aws_lc_rs::{cipher_suite as suite, kx_group as group};
        let mut cipher_suites: Vec<SupportedCipherSuite> = vec![suite::TLS13_AES_256_GCM_SHA384, suite::TLS13_AES_128_GCM_SHA256];
        if config.prefer_aes128 {
            cipher_suites.reverse();
        }
        // An exchange that is post-quantum exists in 1.3 only.
        let tls12 = config.tls12 && !config.post_quantum_only;
        if tls12 {
            cipher_suites.extend([
                suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
                suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
                suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
                suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            ]);
        }
        let versions = if tls12 { TLS13_AND_12 } else { TLS13_ONLY };
        let kx_groups = if config.post_quantum_only {
            vec![group::X25519MLKEM768]
        } else {
            vec![group::X25519, group::SECP256R1, group::SECP384R1, group::X25519MLKEM768]
        };
        let provider = CryptoProvider { cipher_suites, kx_groups, ..aws_lc_rs::default_provider() };
        Self { provider: Arc::new(provider), versions, revocations: config.revocations.clone(), time: Arc::new(WallClock(clock)) }
    }

    /// The time that certificates are judged by.
    pub(super) fn now(&self) -> Option<UnixTime> {
        self.time.current_time()
    }

    pub(super) fn server(&self, verifier: Arc<ClientVerifier>, key: Arc<CertifiedKey>) -> Result<ServerConfig, Error> {
        let mut config = ServerConfig::builder_with_details(self.provider.clone(), self.time.clone())
            .with_protocol_versions(self.versions)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would not be verified again after roots changed (CVE-2022-21654, CVE-2025-68121).
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        // Without it, the keys of TLS 1.2 do not depend on who has shaken hands (RFC 7627).
        config.require_ems = true;
        config.enable_secret_extraction = true;
        config.key_log = Arc::new(Capture);
        Ok(config)
    }

    pub(super) fn client(&self, verifier: Arc<ServerVerifier>, key: Arc<CertifiedKey>) -> Result<ClientConfig, Error> {
        let mut config = ClientConfig::builder_with_details(self.provider.clone(), self.time.clone())
            .with_protocol_versions(self.versions)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.enable_early_data = false;
        config.require_ems = true;
        config.enable_secret_extraction = true;
        config.key_log = Arc::new(Capture);
        Ok(config)
    }
}

/// Lets rustls see the clock that was handed in.
struct WallClock(Clock);

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        self.0.now().duration_since(UNIX_EPOCH).ok().map(UnixTime::since_unix_epoch)
    }
}

impl fmt::Debug for WallClock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("WallClock")
    }
}
