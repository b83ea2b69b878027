//! Lists that were read, and the question whether they revoke a chain.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth, RevocationOptionsBuilder,
    UnknownStatusPolicy,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Trust;
use crate::telemetry::Reporter;

/// What a file holds.
#[derive(Default)]
pub(super) struct Lists {
    lists: Vec<CertRevocationList<'static>>,
    revoked: usize,
}

impl Lists {
    /// One list in DER, or any number of them in PEM. Nothing at all revokes nothing.
    pub(super) fn parse(content: &[u8]) -> Result<Self, String> {
        if content.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        // DER of a list begins with a SEQUENCE, which no text does.
        let encoded = if content.starts_with(b"\x30") {
            vec![CertificateRevocationListDer::from(content)]
        } else {
            let sections = CertificateRevocationListDer::pem_slice_iter(content).collect::<Result<Vec<_>, _>>();
            sections.map_err(|error| format!("it is neither DER nor PEM: {error}"))?
        };
        if encoded.is_empty() {
            return Err("it has no PEM section named X509 CRL".to_owned());
        }
        let mut all = Self::default();
        for (index, der) in encoded.iter().enumerate() {
            let list = OwnedCertRevocationList::from_der(der).map_err(|error| format!("list {} of {}: {error}", index + 1, encoded.len()))?;
            all.revoked += x509_parser::revocation_list::CertificateRevocationList::from_der(der)
                .map_or(0, |(_, list)| list.iter_revoked_certificates().count());
            all.lists.push(list.into());
        }
        Ok(all)
    }

    pub(super) fn len(&self) -> usize {
        self.lists.len()
    }

    /// Certificates on all lists together.
    pub(super) fn revoked(&self) -> usize {
        self.revoked
    }

    /// Whether a certificate of a chain is revoked.
    ///
    /// Most chains are on no list, which two look-ups for each certificate show. Only for one that is, the path to the root is verified once more,
    /// now with the list: its signature, its scope, and whether the certificate belongs to the path at all.
    pub(super) fn revoke(&self, (leaf, intermediates): (&CertificateDer<'_>, &[CertificateDer<'_>]), trust: &Trust, at: UnixTime) -> bool {
        self.lists.iter().any(|list| {
            let named = std::iter::once(leaf).chain(intermediates).any(|certificate| names(list, certificate));
            named && !stands(list, (leaf, intermediates), trust, at)
        })
    }
}

/// Whether a list has an entry of this issuer and serial number. What cannot be read is taken for one that has.
fn names(list: &CertRevocationList<'_>, certificate: &CertificateDer<'_>) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return true };
    // The list has the issuer without tag and length. A longer name that ends like it is told apart when the path is verified.
    certificate.issuer().as_raw().ends_with(list.issuer()) && !matches!(list.find_serial(certificate.raw_serial()), Ok(None))
}

/// Whether the chain holds in spite of this list.
fn stands(list: &CertRevocationList<'_>, (leaf, intermediates): (&CertificateDer<'_>, &[CertificateDer<'_>]), trust: &Trust, at: UnixTime) -> bool {
    let (Ok(certificate), lists) = (EndEntityCert::try_from(leaf), [list]) else { return false };
    let Ok(options) = RevocationOptionsBuilder::new(&lists) else { return false };
    let options = options
        .with_depth(RevocationCheckDepth::Chain)
        .with_status_policy(UnknownStatusPolicy::Allow)
        .with_expiration_policy(ExpirationPolicy::Ignore)
        .build();
    let usage = match trust.reporter {
        Reporter::Source => KeyUsage::server_auth(),
        Reporter::Destination => KeyUsage::client_auth(),
    };
    certificate.verify_for_usage(trust.algorithms.all, &trust.roots.roots, intermediates, at, usage, Some(options), None).is_ok()
}
