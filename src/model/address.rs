//! Addresses: canonical IPs, addresses on a network, and the authority of a CONNECT request.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::str::FromStr;

use super::Text;

/// The canonical form of an address: `::ffff:a.b.c.d` becomes `a.b.c.d` (reference, dataplane §1.1). Every address that
/// enters the process passes through here before a look-up, a policy check or a log line.
#[must_use]
pub fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// [`canonical`] for a socket address; drops flow label and scope id of a mapped address.
#[must_use]
pub fn canonical_socket(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_canonical() {
            IpAddr::V4(v4) => SocketAddr::new(IpAddr::V4(v4), v6.port()),
            IpAddr::V6(_) => address,
        },
        SocketAddr::V4(_) => address,
    }
}

/// A socket address of the mesh, which has neither a flow label nor a scope: 20 bytes instead of the 32 of a [`SocketAddr`]. For what is kept for
/// every idle connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompactAddress {
    ip: IpAddr,
    port: u16,
}

impl CompactAddress {
    /// Its IP.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        self.ip
    }

    /// Its port.
    #[must_use]
    pub fn port(self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for CompactAddress {
    fn from(address: SocketAddr) -> Self {
        Self { ip: address.ip(), port: address.port() }
    }
}

impl From<CompactAddress> for SocketAddr {
    fn from(compact: CompactAddress) -> Self {
        Self::new(compact.ip, compact.port)
    }
}

impl fmt::Display for CompactAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(*self).fmt(formatter)
    }
}

/// An IP on a named network. Pod IPs of two networks may overlap; the empty name is the default network.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// Network name as in WDS; "" is the default network.
    pub network: Text,
    /// Canonical address.
    pub ip: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.network, self.ip)
    }
}

/// The addresses of a workload, in order. Most have one, which then needs no memory of its own.
#[derive(Clone, PartialEq, Eq)]
pub struct Addresses(Few);

#[derive(Clone, PartialEq, Eq)]
enum Few {
    One(IpAddr),
    /// None, or more than one.
    Many(Box<[IpAddr]>),
}

impl Addresses {
    /// Each address once, and as [`canonical`] makes it.
    pub(super) fn into_canonical(self) -> Self {
        let mut list = Vec::new();
        match self.0 {
            Few::One(ip) => return Self(Few::One(canonical(ip))),
            Few::Many(all) if all.is_empty() => return Self::default(),
            Few::Many(all) => {
                for ip in all {
                    let ip = canonical(ip);
                    if !list.contains(&ip) {
                        list.push(ip);
                    }
                }
            }
        }
        list.into()
    }
}

impl Default for Addresses {
    fn default() -> Self {
        Self(Few::Many(Box::default()))
    }
}

impl Deref for Addresses {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match &self.0 {
            Few::One(ip) => std::slice::from_ref(ip),
            Few::Many(all) => all,
        }
    }
}

impl From<IpAddr> for Addresses {
    fn from(ip: IpAddr) -> Self {
        Self(Few::One(ip))
    }
}

impl From<Vec<IpAddr>> for Addresses {
    fn from(list: Vec<IpAddr>) -> Self {
        match list[..] {
            [ip] => ip.into(),
            _ => Self(Few::Many(list.into())),
        }
    }
}

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(list: I) -> Self {
        list.into_iter().collect::<Vec<_>>().into()
    }
}

impl<'a> IntoIterator for &'a Addresses {
    type Item = &'a IpAddr;
    type IntoIter = std::slice::Iter<'a, IpAddr>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<const N: usize> PartialEq<[IpAddr; N]> for Addresses {
    fn eq(&self, other: &[IpAddr; N]) -> bool {
        **self == other[..]
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, formatter)
    }
}

/// The `:authority` of an HBONE CONNECT (reference, dataplane §2.3): an address, or a service host name with a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// `ip:port`, IPv6 in brackets.
    Address(CompactAddress),
    /// `hostname:port`, used on both legs of double HBONE.
    Host(Text, u16),
}

/// Why an authority was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid CONNECT address {0:?}: expected ip:port or hostname:port")]
pub struct AuthorityError(pub String);

impl FromStr for Authority {
    type Err = AuthorityError;

    /// Parses strictly: no userinfo, no zone id, no missing or zero port, no leading zeros or sign in the port, host names
    /// of letters, digits, `-`, `_` and `.` of at most 253 bytes.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || AuthorityError(text.chars().take(300).flat_map(char::escape_default).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(refused)?;
        if port.is_empty() || port.starts_with('0') || !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refused());
        }
        let port = port.parse::<u16>().map_err(|_| refused())?;
        if let Some(inner) = host.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or_else(refused)?;
            let ip = inner.parse::<std::net::Ipv6Addr>().map_err(|_| refused())?;
            return Ok(Self::Address(canonical_socket(SocketAddr::new(IpAddr::V6(ip), port)).into()));
        }
        if let Ok(ip) = host.parse::<std::net::Ipv4Addr>() {
            return Ok(Self::Address(SocketAddr::new(IpAddr::V4(ip), port).into()));
        }
        let plausible = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
            && host.split('.').all(|label| !label.is_empty() && label.len() <= 63)
            && !host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        if plausible { Ok(Self::Host(Text::from(host.to_ascii_lowercase()), port)) } else { Err(refused()) }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(formatter, "{address}"),
            Self::Host(host, port) => write!(formatter, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn well_formed_authorities_parse_and_print_alike() {
        for text in ["1.2.3.4:80", "[::1]:80", "[2001:db8::1]:65535", "web.default.svc.cluster.local:1", "a_b:8080"] {
            assert_eq!(text.parse::<Authority>().unwrap().to_string(), text);
        }
        assert_eq!("[::ffff:1.2.3.4]:80".parse::<Authority>().unwrap().to_string(), "1.2.3.4:80");
    }

    #[test]
    fn malformed_authorities_are_refused() {
        let long = format!("{}:80", "a".repeat(300));
        for text in [
            "",
            ":",
            "1.2.3.4",
            "1.2.3.4:",
            "1.2.3.4:0",
            "1.2.3.4:080",
            "1.2.3.4:+80",
            "1.2.3.4:65536",
            "user@1.2.3.4:80",
            "[::1%eth0]:80",
            "[::1]",
            "::1:80",
            "[1.2.3.4]:80",
            "1.2.3:80",
            "256.1.1.1:80",
            "web..x:80",
            "web.:80",
            ".web:80",
            "w\u{e9}b:80",
            "we b:80",
            "web:80 ",
            long.as_str(),
        ] {
            assert!(text.parse::<Authority>().is_err(), "{text:?} was accepted");
        }
    }
}
