//! Flags and environment of DNS capture (reference, dataplane §9 and §10.1).

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

use crate::pods::DnsAddress;
use crate::proxy::dns::Config;

/// Flags and environment of DNS.
#[derive(Debug, clap::Args)]
pub(super) struct DnsArgs {
    /// Answer the DNS queries of pods, which their rules redirect to port 15053: `true`, or anything else for no.
    #[arg(long, env = "ISTIO_META_DNS_CAPTURE", default_value = "true")]
    dns_capture: String,
    /// Where they are answered within each pod: `localhost:PORT`, which is 127.0.0.1 and ::1, or `IP:PORT`.
    #[arg(long, env = "ISTIO_META_DNS_PROXY_ADDR", default_value = "localhost:15053")]
    dns_proxy_addr: String,
    /// Domain of the cluster's services.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,
    /// Namespace whose services win when nothing else decides between services of one name.
    #[arg(long, env = "PREFERED_SERVICE_NAMESPACE")]
    prefered_service_namespace: Option<String>,
    /// The file with the nameservers that are asked what the mesh does not own; read again when it changes.
    #[arg(long, env = "CULVERT_RESOLV_CONF", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
}

impl DnsArgs {
    fn is_on(&self) -> bool {
        self.dns_capture.eq_ignore_ascii_case("true")
    }

    /// Where DNS is served, if it is.
    pub(super) fn address(&self) -> anyhow::Result<Option<DnsAddress>> {
        if !self.is_on() {
            return Ok(None);
        }
        let text = self.dns_proxy_addr.trim();
        let address = match text.strip_prefix("localhost:") {
            Some(port) => port.parse().ok().filter(|port| *port != 0).map(DnsAddress::Loopback),
            None => text.parse::<SocketAddr>().ok().filter(|address| address.port() != 0).map(DnsAddress::At),
        };
        address.map(Some).with_context(|| format!("ISTIO_META_DNS_PROXY_ADDR is {text:?}: expected localhost:PORT or IP:PORT"))
    }

    /// How names are answered.
    pub(super) fn config(&self, ipv6: bool, dedicated: bool) -> Config {
        Config {
            cluster_domain: self.cluster_domain.clone(),
            preferred_namespace: self.prefered_service_namespace.clone().filter(|namespace| !namespace.is_empty()),
            ipv6,
            resolv_conf: self.resolv_conf.clone(),
            own_search_domains: dedicated,
            ..Config::default()
        }
    }

    /// Its part of the `config` object of `config_dump`.
    pub(super) fn dump(&self) -> Value {
        serde_json::json!({
            "dnsProxy": self.is_on(), "dnsProxyAddr": self.dns_proxy_addr, "clusterDomain": self.cluster_domain,
            "preferedServiceNamespace": self.prefered_service_namespace, "resolvConf": self.resolv_conf,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::parsed;
    use super::*;

    fn address(line: &[&str]) -> anyhow::Result<Option<DnsAddress>> {
        parsed::<DnsArgs>(line)?.address()
    }

    #[test]
    fn dns_is_served_on_loopback_unless_capture_is_something_other_than_true() {
        assert_eq!(address(&[]).unwrap(), Some(DnsAddress::Loopback(15053)));
        assert_eq!(address(&["--dns-capture", "TRUE"]).unwrap(), Some(DnsAddress::Loopback(15053)));
        for off in ["false", "yes", "1", ""] {
            assert_eq!(address(&["--dns-capture", off]).unwrap(), None, "{off:?}");
        }
    }

    #[test]
    fn an_address_is_localhost_or_an_ip_with_a_port_and_anything_else_stops_the_start() {
        let at = |text: &str| address(&["--dns-proxy-addr", text]);
        assert_eq!(at("localhost:53").unwrap(), Some(DnsAddress::Loopback(53)));
        assert_eq!(at("10.0.0.1:5353").unwrap(), Some(DnsAddress::At("10.0.0.1:5353".parse().unwrap())));
        assert_eq!(at("[::1]:5353").unwrap(), Some(DnsAddress::At("[::1]:5353".parse().unwrap())));
        for wrong in ["localhost", "localhost:0", "localhost:dns", "10.0.0.1", "example.com:53", ":53", ""] {
            let error = format!("{:#}", at(wrong).unwrap_err());
            assert!(error.contains("ISTIO_META_DNS_PROXY_ADDR") && error.contains("localhost:PORT"), "{error}");
        }
    }
}
