//! What a CONNECT asks and what its answer says.

use super::hpack;
use crate::model::{Authority, AuthorityError, Baggage};

/// One CONNECT (reference, dataplane §2.3).
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// Where the bytes shall go.
    pub authority: Authority,
    /// `baggage`: describes the source workload. Telemetry only, the peer can write what it likes.
    pub baggage: Option<Baggage>,
    /// `forwarded`: `for="<client>"` and `;host=<service>`. Telemetry only.
    pub forwarded: Option<String>,
    /// `traceparent`, W3C form.
    pub traceparent: Option<String>,
    /// `x-forwarded-network`: set by the sender of double HBONE.
    pub forwarded_network: Option<String>,
    /// Not sent. A peer that terminates the connection, such as Envoy as a waypoint, ends its streams with RST_STREAM(CONNECT_ERROR) when it is done,
    /// and the reference takes that for an end. Where this is set we do too, unless the peer may have had more: unless it was waiting for our
    /// window. Elsewhere it is a reset (RFC 9113 §8.5).
    pub reset_is_end: bool,
}

/// What came with a 200.
#[derive(Debug, Clone, Default)]
pub struct ConnectResponse {
    /// Describes the destination workload. Telemetry only.
    pub baggage: Option<Baggage>,
}

/// Why a request is answered 400 before anything is looked at.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BadRequest {
    /// Anything but CONNECT. Method names are case-sensitive (RFC 9110 §9.1): `connect` is not CONNECT.
    #[error("method {0} is not CONNECT")]
    Method(String),
    /// Extended CONNECT (RFC 8441) is not offered.
    #[error("extended CONNECT is not supported")]
    Extended,
    /// The authority is neither `ip:port` nor `hostname:port`.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A CONNECT with content of a declared length is malformed (RFC 9113 §8.5).
    #[error("CONNECT with content-length")]
    ContentLength,
}

/// The status of a refused CONNECT (reference, dataplane §2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 400: the request itself is wrong, or its destination is not ours.
    BadRequest,
    /// 401: denied by policy.
    Denied,
    /// 503: everything else.
    Unavailable,
}

impl Refusal {
    pub(super) fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Denied => 401,
            Self::Unavailable => 503,
        }
    }
}

/// The header fields of a block, as far as a tunnel looks at them.
#[derive(Debug, Clone, Default)]
pub(super) struct Fields {
    method: Option<Vec<u8>>,
    authority: Option<Vec<u8>>,
    status: Option<Vec<u8>>,
    /// `:scheme` or `:path`: absent from a CONNECT (RFC 9113 §8.5), present in everything else.
    target: bool,
    extended: bool,
    content_length: bool,
    regular: bool,
    malformed: bool,
    baggage: Vec<Vec<u8>>,
    forwarded: Option<String>,
    traceparent: Option<String>,
    network: Option<String>,
}

impl Fields {
    /// Takes one field; remembers whether the rules of RFC 9113 §8.2 and §8.3 are kept.
    pub(super) fn add(&mut self, name: &[u8], value: &[u8]) {
        let legal_value = !value.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n'));
        let padded = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
        self.malformed |= !legal_value || padded(value.first()) || padded(value.last());
        if let Some(pseudo) = name.strip_prefix(b":") {
            let place = match pseudo {
                b"method" => &mut self.method,
                b"authority" => &mut self.authority,
                b"status" => &mut self.status,
                b"scheme" | b"path" => {
                    self.malformed |= self.regular;
                    self.target = true;
                    return;
                }
                b"protocol" => {
                    self.extended = true;
                    return;
                }
                _ => {
                    self.malformed = true;
                    return;
                }
            };
            self.malformed |= self.regular || place.is_some();
            *place = Some(value.to_vec());
            return;
        }
        self.regular = true;
        self.malformed |= name.is_empty() || name.iter().any(|byte| byte.is_ascii_uppercase() || *byte <= b' ' || *byte >= 0x7f);
        let text = || std::str::from_utf8(value).ok().filter(|text| text.is_ascii()).map(str::to_owned);
        match name {
            b"connection" | b"proxy-connection" | b"keep-alive" | b"transfer-encoding" | b"upgrade" => self.malformed = true,
            b"te" => self.malformed |= value != b"trailers",
            b"content-length" => self.content_length = true,
            b"baggage" => self.baggage.push(value.to_vec()),
            b"forwarded" if self.forwarded.is_none() => self.forwarded = text(),
            b"traceparent" if self.traceparent.is_none() => self.traceparent = text().filter(|value| well_formed_traceparent(value)),
            b"x-forwarded-network" if self.network.is_none() => self.network = text(),
            _ => {}
        }
    }

    /// Whether this can be a request at all: a malformed one is a stream error (RFC 9113 §8.1.1).
    pub(super) fn well_formed_request(&self) -> bool {
        let connect = self.method.as_deref() == Some(b"CONNECT") && !self.extended;
        !self.malformed && self.method.is_some() && self.status.is_none() && (!connect || (!self.target && self.authority.is_some()))
    }

    pub(super) fn status(&self) -> Option<u16> {
        let status = self.status.as_deref().filter(|_| !self.malformed)?;
        std::str::from_utf8(status).ok().filter(|text| text.len() == 3)?.parse().ok()
    }

    pub(super) fn baggage(&self) -> Option<Baggage> {
        Baggage::parse(self.baggage.iter().map(Vec::as_slice))
    }

    pub(super) fn into_request(self) -> Result<ConnectRequest, BadRequest> {
        let method = self.method.as_deref().unwrap_or_default();
        if method != b"CONNECT" {
            let shown = String::from_utf8_lossy(method).chars().take(32).flat_map(char::escape_default).collect();
            return Err(BadRequest::Method(shown));
        }
        if self.extended {
            return Err(BadRequest::Extended);
        }
        if self.content_length {
            return Err(BadRequest::ContentLength);
        }
        let authority = String::from_utf8_lossy(self.authority.as_deref().unwrap_or_default()).parse::<Authority>()?;
        let baggage = self.baggage();
        Ok(ConnectRequest {
            authority,
            baggage,
            forwarded: self.forwarded,
            traceparent: self.traceparent,
            forwarded_network: self.network,
            reset_is_end: false,
        })
    }
}

impl ConnectRequest {
    /// The header block of the request.
    pub(super) fn block(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(512);
        hpack::header(":method", b"CONNECT", &mut block);
        hpack::header(":authority", self.authority.to_string().as_bytes(), &mut block);
        put(&mut block, "baggage", self.baggage.as_ref().map(Baggage::to_header).as_deref());
        put(&mut block, "forwarded", self.forwarded.as_deref());
        put(&mut block, "traceparent", self.traceparent.as_deref());
        // An empty name is a name too: that of the default network.
        match self.forwarded_network.as_deref() {
            Some("") => hpack::header("x-forwarded-network", b"", &mut block),
            network => put(&mut block, "x-forwarded-network", network),
        }
        block
    }
}

impl ConnectResponse {
    /// The header block of a 200.
    pub(super) fn block(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(256);
        hpack::status(200, &mut block);
        put(&mut block, "baggage", self.baggage.as_ref().map(Baggage::to_header).as_deref());
        block
    }
}

/// A value that is not a legal field value is left out: telemetry must not stop traffic.
fn put(block: &mut Vec<u8>, name: &'static str, value: Option<&str>) {
    if let Some(value) = value.filter(|value| !value.is_empty() && value.bytes().all(|byte| (0x20..0x7f).contains(&byte))) {
        hpack::header(name, value.as_bytes(), block);
    }
}

/// A `traceparent` is used only when it is exactly `00-<32 hex>-<16 hex>-<2 hex>` (reference, dataplane §2.3).
fn well_formed_traceparent(value: &str) -> bool {
    let widths = [2, 32, 16, 2];
    let parts: Vec<&str> = value.split('-').collect();
    value.len() == 55
        && parts.len() == widths.len()
        && parts.iter().zip(widths).all(|(part, width)| part.len() == width && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fields(list: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::default();
        for (name, value) in list {
            fields.add(name.as_bytes(), value.as_bytes());
        }
        fields
    }

    fn request(method: &str, authority: &str) -> Result<ConnectRequest, BadRequest> {
        fields(&[(":method", method), (":authority", authority)]).into_request()
    }

    #[test]
    fn only_connect_with_a_good_authority_is_a_request() {
        assert!(request("CONNECT", "10.0.0.1:80").is_ok());
        assert!(matches!(request("connect", "10.0.0.1:80"), Err(BadRequest::Method(_))));
        assert!(matches!(request("GET", "10.0.0.1:80"), Err(BadRequest::Method(_))));
        assert!(matches!(request("CONNECT", "10.0.0.1"), Err(BadRequest::Authority(_))));
        assert!(matches!(request("CONNECT", "user@10.0.0.1:80"), Err(BadRequest::Authority(_))));
    }

    #[test]
    fn malformed_field_lists_are_no_requests() {
        let good = [(":method", "CONNECT"), (":authority", "10.0.0.1:80")];
        assert!(fields(&good).well_formed_request());
        for extra in [
            (":path", "/"),
            (":scheme", "http"),
            (":method", "CONNECT"),
            (":authority", "x"),
            (":status", "200"),
            (":unknown", "x"),
            ("Upper", "x"),
            ("connection", "close"),
            ("te", "gzip"),
            ("a b", "x"),
            ("x", "a\nb"),
            ("x", " a"),
        ] {
            let list = [good[0], good[1], extra];
            assert!(!fields(&list).well_formed_request(), "{extra:?}");
        }
        assert!(!fields(&[(":method", "CONNECT")]).well_formed_request());
        assert!(!fields(&[("x", "y"), (":method", "CONNECT"), (":authority", "10.0.0.1:80")]).well_formed_request());
    }

    #[test]
    fn a_request_survives_the_trip_through_its_block() {
        let sent = ConnectRequest {
            authority: "[2001:db8::1]:80".parse().unwrap(),
            baggage: None,
            forwarded: Some("for=\"10.0.0.1:1234\"".into()),
            traceparent: Some("00-0123456789abcdef0123456789abcdef-0123456789abcdef-00".into()),
            forwarded_network: Some("blue".into()),
            reset_is_end: false,
        };
        let mut fields = Fields::default();
        assert!(hpack::Decoder::default().decode(&sent.block(), 8192, |name, value| fields.add(name, value)).unwrap());
        assert!(fields.well_formed_request());
        let got = fields.into_request().unwrap();
        assert_eq!(got.authority, sent.authority);
        assert_eq!(got.forwarded, sent.forwarded);
        assert_eq!(got.traceparent, sent.traceparent);
        assert_eq!(got.forwarded_network, sent.forwarded_network);
    }

    #[test]
    fn a_malformed_traceparent_is_ignored() {
        for bad in
            ["", "00-00-00-00", "0123456789abcdef0123456789abcdef0123456789abcdef0123456", &format!("00-{}-{}-0g", "a".repeat(32), "b".repeat(16))]
        {
            assert!(!well_formed_traceparent(bad), "{bad}");
        }
    }
}
