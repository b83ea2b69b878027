//! The certificate service, package `istio.v1.auth` (reference, dataplane §7.1 and node-and-control B.9): a proxy sends a certificate request and
//! gets a chain with the roots to believe.

use prost::Message;

use super::google::Struct;

/// The one call of the service.
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The member of [`CertificateRequest::metadata`] in which a node proxy names the workload that the certificate is for.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// Proxy → CA (`IstioCertificateRequest`). Tag 2 is reserved.
#[derive(Clone, PartialEq, Message)]
pub struct CertificateRequest {
    /// PKCS#10 in PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// The lifetime wanted, in seconds; the CA may give less. Zero or less: the CA's default.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// Absent when the caller asks for itself.
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// CA → proxy (`IstioCertificateResponse`).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CertificateResponse {
    /// PEM texts: the leaf, then the intermediates, one in each; the last holds the roots, possibly several.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

impl CertificateRequest {
    /// A request; with `impersonated` it is a node proxy's for a workload of its node.
    #[must_use]
    pub fn new(csr: String, validity_duration: i64, impersonated: Option<&str>) -> Self {
        Self { csr, validity_duration, metadata: impersonated.map(|identity| Struct::from_iter([(IMPERSONATED_IDENTITY, identity)])) }
    }

    /// Whom a node proxy asks for, if it does.
    #[must_use]
    pub fn impersonated(&self) -> Option<&str> {
        self.metadata.as_ref()?.text(IMPERSONATED_IDENTITY)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The bytes that protoc's encoders give, written by hand from the field tags.
    #[test]
    fn requests_have_their_golden_bytes() {
        let golden: [(CertificateRequest, &[u8]); 3] = [
            (CertificateRequest::default(), b""),
            (CertificateRequest::new("CSR".into(), 86_400, None), b"\x0a\x03CSR\x18\x80\xa3\x05"),
            (
                CertificateRequest::new("CSR".into(), 60, Some("spiffe://t/ns/n/sa/s")),
                b"\x0a\x03CSR\x18\x3c\x22\x30\x0a\x2e\x0a\x14ImpersonatedIdentity\x12\x16\x1a\x14spiffe://t/ns/n/sa/s",
            ),
        ];
        for (request, bytes) in golden {
            assert_eq!(request.encode_to_vec(), bytes, "{request:?}");
            assert_eq!(CertificateRequest::decode(bytes).unwrap(), request);
        }
    }

    #[test]
    fn responses_have_their_golden_bytes() {
        let response = CertificateResponse { cert_chain: vec!["leaf".into(), "root".into()] };
        assert_eq!(response.encode_to_vec(), b"\x0a\x04leaf\x0a\x04root");
        assert_eq!(CertificateResponse::decode(&b"\x0a\x04leaf\x0a\x04root"[..]).unwrap(), response);
    }

    #[test]
    fn a_request_names_whom_it_is_for_or_the_caller() {
        assert_eq!(CertificateRequest::new(String::new(), 0, Some("spiffe://a")).impersonated(), Some("spiffe://a"));
        assert_eq!(CertificateRequest::new(String::new(), 0, None).impersonated(), None);
    }
}
