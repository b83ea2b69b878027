//! What a CONNECT asks and what its answer says, free of HTTP types.

use http::{HeaderMap, HeaderValue, Method, StatusCode};

use crate::model::{Authority, AuthorityError, Baggage};

const BAGGAGE: &str = "baggage";
const FORWARDED: &str = "forwarded";
const TRACEPARENT: &str = "traceparent";
const X_FORWARDED_NETWORK: &str = "x-forwarded-network";

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
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::UNAUTHORIZED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl ConnectRequest {
    pub(super) fn from_http(head: &http::request::Parts) -> Result<Self, BadRequest> {
        if head.method != Method::CONNECT {
            return Err(BadRequest::Method(head.method.as_str().chars().take(32).flat_map(char::escape_default).collect()));
        }
        if head.extensions.get::<h2::ext::Protocol>().is_some() {
            return Err(BadRequest::Extended);
        }
        if head.headers.contains_key(http::header::CONTENT_LENGTH) {
            return Err(BadRequest::ContentLength);
        }
        let authority = head.uri.authority().map_or("", http::uri::Authority::as_str).parse::<Authority>()?;
        Ok(Self {
            authority,
            baggage: baggage(&head.headers),
            forwarded: text(&head.headers, FORWARDED),
            traceparent: text(&head.headers, TRACEPARENT).filter(|value| well_formed_traceparent(value)),
            forwarded_network: text(&head.headers, X_FORWARDED_NETWORK),
        })
    }

    pub(super) fn to_http(&self) -> Result<http::Request<()>, http::Error> {
        let mut request = http::Request::builder()
            .method(Method::CONNECT)
            .version(http::Version::HTTP_2)
            .uri(http::Uri::builder().authority(self.authority.to_string()).build()?)
            .body(())?;
        let headers = request.headers_mut();
        set(headers, BAGGAGE, self.baggage.as_ref().map(Baggage::to_header).as_deref());
        set(headers, FORWARDED, self.forwarded.as_deref());
        set(headers, TRACEPARENT, self.traceparent.as_deref());
        set(headers, X_FORWARDED_NETWORK, self.forwarded_network.as_deref());
        Ok(request)
    }
}

impl ConnectResponse {
    pub(super) fn from_http(headers: &HeaderMap) -> Self {
        Self { baggage: baggage(headers) }
    }

    pub(super) fn to_http(&self) -> http::Response<()> {
        let mut response = http::Response::new(());
        set(response.headers_mut(), BAGGAGE, self.baggage.as_ref().map(Baggage::to_header).as_deref());
        response
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

fn baggage(headers: &HeaderMap) -> Option<Baggage> {
    Baggage::parse(headers.get_all(BAGGAGE).iter().map(HeaderValue::as_bytes))
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// A value that is not a legal header value is left out: telemetry must not stop traffic.
fn set(headers: &mut HeaderMap, name: &'static str, value: Option<&str>) {
    if let Some(value) = value.filter(|value| !value.is_empty()).and_then(|value| HeaderValue::from_str(value).ok()) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn request(method: &str, authority: &str) -> Result<ConnectRequest, BadRequest> {
        let request = http::Request::builder().method(method).uri(authority).body(()).unwrap();
        ConnectRequest::from_http(&request.into_parts().0)
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
    fn a_request_survives_the_trip_through_http() {
        let sent = ConnectRequest {
            authority: "[2001:db8::1]:80".parse().unwrap(),
            baggage: None,
            forwarded: Some("for=\"10.0.0.1:1234\"".into()),
            traceparent: Some("00-0123456789abcdef0123456789abcdef-0123456789abcdef-00".into()),
            forwarded_network: Some("blue".into()),
        };
        let got = ConnectRequest::from_http(&sent.to_http().unwrap().into_parts().0).unwrap();
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
