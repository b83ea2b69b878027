//! Certificates as text and as facts: PEM, validity, and what the configuration dump shows (ref §10.2).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Serialize;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

/// An entry of `certificates` in the configuration dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateState {
    /// The SPIFFE ID.
    pub identity: String,
    /// `Available`, `Initializing` or `Unavailable: <error>`.
    pub state: String,
    /// The leaf and its intermediates; empty unless available.
    pub cert_chain: Vec<CertificateEntry>,
    /// The roots that came with it; empty unless available.
    pub root_certs: Vec<CertificateEntry>,
}

/// One certificate in the configuration dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateEntry {
    /// Base64 of the PEM text.
    pub pem: String,
    /// Decimal.
    pub serial_number: String,
    /// RFC 3339 in seconds, UTC.
    pub valid_from: String,
    /// RFC 3339 in seconds, UTC.
    pub expiration_time: String,
}

impl CertificateEntry {
    pub(super) fn of(der: &CertificateDer<'_>) -> Self {
        let pem = BASE64_STANDARD.encode(to_pem(der));
        let parsed = X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate);
        let text = |of: fn(&X509Certificate<'_>) -> String| parsed.as_ref().map(of).unwrap_or_default();
        Self {
            pem,
            serial_number: text(|certificate| certificate.serial.to_string()),
            valid_from: text(|certificate| rfc3339(&certificate.validity.not_before)),
            expiration_time: text(|certificate| rfc3339(&certificate.validity.not_after)),
        }
    }
}

/// PEM text with lines of 64 characters (RFC 7468 §2).
pub(super) fn to_pem(der: &[u8]) -> String {
    let body = BASE64_STANDARD.encode(der);
    let mut pem = String::with_capacity(body.len() + body.len() / 64 + 60);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = tail;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// All certificates of a PEM text; sections of other kinds are passed over.
pub(super) fn from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|error| format!("it is not PEM: {error}"))?;
    if certificates.is_empty() { Err("it has no PEM section named CERTIFICATE".to_owned()) } else { Ok(certificates) }
}

/// The dates of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

impl Validity {
    pub(super) fn of(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| format!("it cannot be read as a certificate: {error}"))?;
        Ok(Self { not_before: system_time(&certificate.validity.not_before), not_after: system_time(&certificate.validity.not_after) })
    }

    pub(super) fn covers(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
}

fn system_time(time: &ASN1Time) -> SystemTime {
    // Dates before 1970 only occur in a certificate's beginning; the epoch serves as well.
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

/// A point in time as RFC 3339 in whole seconds, UTC.
pub(super) fn rfc3339_of(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let time = i64::try_from(seconds).ok().and_then(|seconds| ASN1Time::from_timestamp(seconds).ok());
    time.map_or_else(|| format!("{seconds} s after 1970"), |time| rfc3339(&time))
}

fn rfc3339(time: &ASN1Time) -> String {
    let time = time.to_datetime();
    let (month, day) = (u8::from(time.month()), time.day());
    format!("{:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time.year(), time.hour(), time.minute(), time.second())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_are_rfc3339_in_utc() {
        assert_eq!(rfc3339_of(UNIX_EPOCH), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339_of(UNIX_EPOCH + Duration::from_secs(1_709_210_096)), "2024-02-29T12:34:56Z");
        assert_eq!(rfc3339_of(UNIX_EPOCH + Duration::from_millis(4_102_444_799_999)), "2099-12-31T23:59:59Z");
    }

    #[test]
    fn pem_of_a_certificate_reads_back() {
        for length in [1, 47, 48, 49, 500] {
            let der = CertificateDer::from(vec![7_u8; length]);
            let pem = to_pem(&der);
            assert!(pem.lines().all(|line| line.len() <= 64), "{pem}");
            assert_eq!(from_pem(pem.repeat(2).as_bytes()).unwrap(), [der.clone(), der]);
        }
        assert!(from_pem(b"nonsense").unwrap_err().contains("no PEM section"));
        assert!(from_pem(b"-----BEGIN CERTIFICATE-----\nAAAA\n").unwrap_err().contains("not PEM"));
    }
}
