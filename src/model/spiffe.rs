//! SPIFFE names of workloads, `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use super::Text;

/// The identity of a workload. Made only by [`SpiffeId::new`] and parsing, which refuse everything that is not exactly the
/// grammar of the reference (dataplane §2.1) within the character set of the SPIFFE standard (SPIFFE-ID §2).
///
/// Every live connection holds some: one pointer, cloned by a reference count.
#[derive(Clone)]
pub struct SpiffeId(Arc<Parts>);

struct Parts {
    uri: Text,
    trust_domain: Text,
    namespace: Text,
    service_account: Text,
}

/// Why a name is not a workload's SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a workload SPIFFE ID: {0:?}: {1}")]
pub struct SpiffeError(pub String, pub &'static str);

/// SPIFFE-ID §2.3: at most 2048 bytes.
const MAX_LENGTH: usize = 2048;

impl SpiffeId {
    /// Makes an identity from its three parts, each of which must be non-empty and of permitted characters.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, SpiffeError> {
        let refuse = |reason| {
            let shown = format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}");
            Err(SpiffeError(shown.chars().take(300).flat_map(char::escape_default).collect(), reason))
        };
        if trust_domain.len() + namespace.len() + service_account.len() + 17 > MAX_LENGTH {
            return refuse("longer than 2048 bytes");
        }
        let domain_ok = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_');
        if trust_domain.is_empty() || !trust_domain.bytes().all(domain_ok) {
            return refuse("the trust domain must be lower-case letters, digits, '.', '-' or '_'");
        }
        let segment_ok = |segment: &str| {
            !segment.is_empty()
                && segment != "."
                && segment != ".."
                && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
        };
        if !segment_ok(namespace) {
            return refuse("the namespace is not a path segment of letters, digits, '.', '-' or '_'");
        }
        if !segment_ok(service_account) {
            return refuse("the service account is not a path segment of letters, digits, '.', '-' or '_'");
        }
        let uri = format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}").into();
        let (trust_domain, namespace, service_account) = (trust_domain.into(), namespace.into(), service_account.into());
        Ok(Self(Arc::new(Parts { uri, trust_domain, namespace, service_account })))
    }

    /// The whole name.
    #[must_use]
    pub fn uri(&self) -> &Text {
        &self.0.uri
    }

    /// The trust domain, such as `cluster.local`.
    #[must_use]
    pub fn trust_domain(&self) -> &Text {
        &self.0.trust_domain
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &Text {
        &self.0.namespace
    }

    /// The service account.
    #[must_use]
    pub fn service_account(&self) -> &Text {
        &self.0.service_account
    }

    /// The name without its scheme, as policies write principals: `<td>/ns/<ns>/sa/<sa>`.
    #[must_use]
    pub fn principal(&self) -> &str {
        let uri = self.0.uri.as_str();
        uri.strip_prefix("spiffe://").unwrap_or(uri)
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.uri == other.0.uri
    }
}

impl Eq for SpiffeId {}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.uri.hash(state);
    }
}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.uri.cmp(&other.0.uri)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |reason| SpiffeError(text.chars().take(300).flat_map(char::escape_default).collect(), reason);
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| refuse("it does not start with spiffe://"))?;
        let mut parts = rest.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) => {
                Self::new(trust_domain, namespace, service_account)
            }
            _ => Err(refuse("it is not <trust domain>/ns/<namespace>/sa/<service account>")),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}
