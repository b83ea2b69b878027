//! Values that a file writes as one scalar. They are read here, where the YAML reader still knows the line, so that nothing
//! that cannot be used ever becomes a row.

use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};

use crate::model::{
    ApplicationProtocol, GatewayDestination, HealthPolicy, HealthStatus, IpFamilies, LoadBalancingMode, NamespacedHostname, NetworkAddress,
    NetworkMode, Scope, Text, TunnelProtocol, Visibility, WorkloadKind, canonical,
};
use crate::policy;

/// How one type is read from and written as a scalar.
pub(super) trait Scalar: Sized {
    /// What belongs there, for the sentence "expected …, found …".
    fn expected() -> String;
    /// Reads the scalar's text; `None` if it is not one.
    fn read(text: &str) -> Option<Self>;
    /// Writes the scalar.
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error>;
}

/// A value in its written form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct As<T>(pub(super) T);

impl<T: Scalar> Serialize for As<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.write(serializer)
    }
}

impl<'de, T: Scalar> Deserialize<'de> for As<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);
        impl<T: Scalar> Visitor<'_> for Reader<T> {
            type Value = As<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&T::expected())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<As<T>, E> {
                T::read(text).map(As).ok_or_else(|| {
                    let shown: String = text.chars().take(100).flat_map(char::escape_debug).collect();
                    E::custom(format_args!("expected {}, found \"{shown}\"", T::expected()))
                })
            }
        }
        deserializer.deserialize_str(Reader(PhantomData))
    }
}

/// A type that is written as one of a few words.
pub(super) trait Words: Copy + PartialEq + 'static {
    /// Every word and its meaning.
    const WORDS: &'static [(&'static str, Self)];
}

/// A word in its written form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Word<T>(pub(super) T);

impl<T: Words> Scalar for Word<T> {
    fn expected() -> String {
        let words: Vec<&str> = T::WORDS.iter().map(|(word, _)| *word).filter(|word| !word.is_empty()).collect();
        format!("one of {}", words.join(", "))
    }

    fn read(text: &str) -> Option<Self> {
        T::WORDS.iter().find(|(word, _)| *word == text).map(|(_, meaning)| Self(*meaning))
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let word = T::WORDS.iter().find(|(_, meaning)| *meaning == self.0).map_or("", |(word, _)| *word);
        serializer.serialize_str(word)
    }
}

impl<T: Words> Serialize for Word<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.write(serializer)
    }
}

impl<'de, T: Words> Deserialize<'de> for Word<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        As::<Self>::deserialize(deserializer).map(|read| read.0)
    }
}

impl Words for TunnelProtocol {
    const WORDS: &'static [(&'static str, Self)] = &[("TCP", Self::None), ("HBONE", Self::Hbone)];
}

impl Words for NetworkMode {
    const WORDS: &'static [(&'static str, Self)] = &[("Standard", Self::Standard), ("HostNetwork", Self::HostNetwork)];
}

impl Words for HealthStatus {
    const WORDS: &'static [(&'static str, Self)] = &[("Healthy", Self::Healthy), ("Unhealthy", Self::Unhealthy)];
}

impl Words for WorkloadKind {
    const WORDS: &'static [(&'static str, Self)] =
        &[("deployment", Self::Deployment), ("cronjob", Self::CronJob), ("pod", Self::Pod), ("job", Self::Job), ("", Self::Deployment)];
}

impl Words for ApplicationProtocol {
    const WORDS: &'static [(&'static str, Self)] = &[("NONE", Self::None), ("PROXY", Self::Proxy)];
}

impl Words for Scope {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("Region", Self::Region),
        ("Zone", Self::Zone),
        ("Subzone", Self::Subzone),
        ("Node", Self::Node),
        ("Cluster", Self::Cluster),
        ("Network", Self::Network),
    ];
}

impl Words for LoadBalancingMode {
    const WORDS: &'static [(&'static str, Self)] =
        &[("Standard", Self::Standard), ("Strict", Self::Strict), ("Failover", Self::Failover), ("Passthrough", Self::Passthrough)];
}

impl Words for HealthPolicy {
    const WORDS: &'static [(&'static str, Self)] = &[("OnlyHealthy", Self::OnlyHealthy), ("AllowAll", Self::AllowAll)];
}

impl Words for IpFamilies {
    const WORDS: &'static [(&'static str, Self)] = &[("IPv4", Self::Ipv4), ("IPv6", Self::Ipv6), ("Dual", Self::Dual)];
}

impl Words for Visibility {
    const WORDS: &'static [(&'static str, Self)] = &[("Public", Self::Public), ("Namespace", Self::Namespace)];
}

impl Words for policy::Scope {
    const WORDS: &'static [(&'static str, Self)] =
        &[("Global", Self::Global), ("Namespace", Self::Namespace), ("WorkloadSelector", Self::WorkloadSelector)];
}

impl Words for policy::Action {
    const WORDS: &'static [(&'static str, Self)] = &[("Allow", Self::Allow), ("Deny", Self::Deny)];
}

impl Words for bool {
    const WORDS: &'static [(&'static str, Self)] = &[("true", true), ("false", false)];
}

/// A flag; written without quotes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Flag(pub(super) bool);

impl Flag {
    pub(super) fn is_false(&self) -> bool {
        !self.0
    }
}

impl Serialize for Flag {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bool(self.0)
    }
}

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Word::<bool>::deserialize(deserializer).map(|word| Self(word.0))
    }
}

/// A port, 0 where 0 has a meaning of its own (a named target port).
impl Scalar for u16 {
    fn expected() -> String {
        "a port from 0 to 65535".to_owned()
    }

    fn read(text: &str) -> Option<Self> {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u16(*self)
    }
}

/// A port that a connection can be made to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RealPort(pub(super) u16);

impl Scalar for RealPort {
    fn expected() -> String {
        "a port from 1 to 65535".to_owned()
    }

    fn read(text: &str) -> Option<Self> {
        <u16 as Scalar>::read(text).filter(|port| *port != 0).map(Self)
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u16(self.0)
    }
}

impl Scalar for u32 {
    fn expected() -> String {
        "a number from 0 to 4294967295".to_owned()
    }

    fn read(text: &str) -> Option<Self> {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(*self)
    }
}

impl Scalar for IpAddr {
    fn expected() -> String {
        "an IPv4 or IPv6 address".to_owned()
    }

    fn read(text: &str) -> Option<Self> {
        text.parse().ok().map(canonical)
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Scalar for IpNet {
    fn expected() -> String {
        "an address range such as 10.0.0.0/8 (prefix at most 32) or 2001:db8::/32 (prefix at most 128)".to_owned()
    }

    /// A single address is the range of itself. A range of v4-mapped addresses becomes the IPv4 range, as addresses do: it could
    /// never match otherwise.
    fn read(text: &str) -> Option<Self> {
        let range = text.parse().ok().or_else(|| <IpAddr as Scalar>::read(text).map(Self::from))?;
        let IpAddr::V4(mapped) = canonical(range.addr()) else { return Some(range) };
        let length = if range.addr().is_ipv6() { range.prefix_len().checked_sub(96)? } else { range.prefix_len() };
        ipnet::Ipv4Net::new(mapped, length).ok().map(Self::V4)
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Scalar for NetworkAddress {
    fn expected() -> String {
        "<network>/<address>, where the default network is empty (such as /10.0.0.1)".to_owned()
    }

    fn read(text: &str) -> Option<Self> {
        let (network, ip) = text.split_once('/')?;
        Some(Self { network: network.into(), ip: <IpAddr as Scalar>::read(ip)? })
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Scalar for NamespacedHostname {
    fn expected() -> String {
        "<namespace>/<host name>".to_owned()
    }

    fn read(text: &str) -> Option<Self> {
        let (namespace, hostname) = text.split_once('/')?;
        let plausible = !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/');
        plausible.then(|| Self { namespace: namespace.into(), hostname: hostname.into() })
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Scalar for GatewayDestination {
    fn expected() -> String {
        "<network>/<address> or <namespace>/<host name>".to_owned()
    }

    /// What looks like an address but is none is refused rather than taken for a host name.
    fn read(text: &str) -> Option<Self> {
        if let Some(address) = NetworkAddress::read(text) {
            return Some(Self::Address(address));
        }
        let key = NamespacedHostname::read(text)?;
        let like_an_address = key.hostname.contains(':') || key.hostname.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        (!like_an_address).then_some(Self::Hostname(key))
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Address(address) => serializer.collect_str(address),
            Self::Hostname(key) => serializer.collect_str(key),
        }
    }
}

/// `namespace/name` of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PolicyKey(pub(super) Text);

impl Scalar for PolicyKey {
    fn expected() -> String {
        "<namespace>/<policy name>".to_owned()
    }

    fn read(text: &str) -> Option<Self> {
        let (_, name) = text.split_once('/')?;
        (!name.is_empty() && !name.contains('/')).then(|| Self(text.into()))
    }

    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}
