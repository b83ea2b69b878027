//! Revocation lists, good and bad.

use std::time::{Duration, SystemTime};

use rcgen::{CertificateRevocationList, CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 3600);

pub fn serial(der: &CertificateDer<'_>) -> SerialNumber {
    SerialNumber::from_slice(X509Certificate::from_der(der).unwrap().1.raw_serial())
}

/// A list of these certificates, signed by this CA, but for what `edit` does to it.
pub fn list_with(
    ca: &Issuer<'_, KeyPair>,
    revoked: &[SerialNumber],
    edit: impl FnOnce(&mut CertificateRevocationListParams),
) -> CertificateRevocationList {
    let now = SystemTime::now();
    let entry = |serial: &SerialNumber| RevokedCertParams {
        serial_number: serial.clone(),
        revocation_time: (now - DAY).into(),
        reason_code: None,
        invalidity_date: None,
    };
    let mut params = CertificateRevocationListParams {
        this_update: (now - DAY).into(),
        next_update: (now + DAY).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked.iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    edit(&mut params);
    params.signed_by(ca).unwrap()
}

/// The PEM text of a list of these certificates.
pub fn list(ca: &Issuer<'_, KeyPair>, revoked: &[&CertificateDer<'_>]) -> String {
    let serials: Vec<_> = revoked.iter().map(|der| serial(der)).collect();
    list_with(ca, &serials, |_| {}).pem().unwrap()
}
