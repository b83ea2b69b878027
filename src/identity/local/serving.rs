//! Certificates of a server that is known by host names: the control plane's own.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

use super::{BACKDATE, IdentityError, LocalIssuer, fresh_serial};

/// A server's certificate with its key, and when it is valid.
#[derive(Debug)]
pub struct ServerCertificate {
    /// Leaf, intermediates and key, for rustls.
    pub certified: CertifiedKey,
    /// When it was made.
    pub from: SystemTime,
    /// When it ends.
    pub until: SystemTime,
}

impl LocalIssuer {
    /// A certificate for a server that clients reach by these host names and addresses, with a fresh P-256 key.
    ///
    /// # Errors
    /// [`IdentityError::Request`] for a name that no certificate can have, [`IdentityError::Issuer`] if the CA cannot sign now.
    pub fn issue_server(&self, names: &[String], ttl: Duration) -> Result<ServerCertificate, IdentityError> {
        let request = |problem: &dyn std::fmt::Display| IdentityError::Request(problem.to_string());
        let name = |name: &String| match name.parse::<IpAddr>() {
            Ok(ip) => Ok(SanType::IpAddress(ip)),
            Err(_) if name.is_empty() => Err(IdentityError::Request("a server name is empty".to_owned())),
            Err(_) => Ia5String::try_from(name.as_str()).map(SanType::DnsName).map_err(|error| request(&error)),
        };
        let now = self.clock.now();
        if !self.validity.covers(now) {
            return Err(IdentityError::Issuer(format!("the local CA {} is not valid now; renew it", self.ca_path.display())));
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names.iter().map(name).collect::<Result<_, _>>()?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(fresh_serial());
        params.not_before = (now - BACKDATE).max(self.validity.not_before).into();
        let until = (now + ttl).min(self.validity.not_after);
        params.not_after = until.into();
        let pair = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| request(&error))?);
        let leaf = params.signed_by(&*pair, &self.signer).map_err(|error| IdentityError::Issuer(format!("the local CA could not sign: {error}")))?;
        let mut chain = vec![leaf.der().clone()];
        for pem in &self.intermediates {
            chain.push(CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| request(&error))?);
        }
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        let key = aws_lc_rs::default_provider().key_provider.load_private_key(key).map_err(|error| request(&error))?;
        Ok(ServerCertificate { certified: CertifiedKey::new(chain, key), from: now, until })
    }
}
