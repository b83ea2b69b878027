//! The capture rules inside a pod: one `nft` transaction and one policy route per family.
//!
//! What they do is what istio-cni does (reference, node-and-control A.6; the numbers below are the rows of its table), so that pods
//! may move between the two. How they are written is ours: one table `inet culvert` for both families, a counter and a comment on
//! every rule, so that `nft list table inet culvert` in a pod explains itself.
//!
//! Order matters to the caller: the proxy's listeners must exist before [`install`], and go only after [`stop_capturing`]: rules that point
//! at no listener refuse the pod's connections. [`remove`] comes last, because the proxy's live connections need the address translation.

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::sys::netns::NetNs;
use crate::sys::nft;
use crate::sys::route::{MarkedLocalRoute, install_marked_local_route, ipv6_usable, remove_marked_local_route};
use crate::sys::socket::BORROWED_MARK_BIT;

/// The table that holds all rules of ours in a pod.
pub const TABLE: &str = "culvert";

/// How answers to a borrowed source address find their way back to the proxy (reference, dataplane §1.2).
pub const RETURN_ROUTE: MarkedLocalRoute = MarkedLocalRoute { mark: 0x111, mask: 0xfff, preference: 32764, table: 100 };

/// What to capture in a pod. The default is what a pod gets without annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulesConfig {
    /// Also write rules for IPv6. Default true; policy routes for IPv6 are left out where the pod's loopback has none.
    pub ipv6: bool,
    /// Redirect DNS (UDP and TCP port 53) to 15053 (`ambient.istio.io/dns-capture`). Default true; a proxy must serve it.
    pub dns_capture: bool,
    /// Leave inbound connections alone (`ambient.istio.io/bypass-inbound-capture`, for ingress gateways). Default false.
    pub bypass_inbound: bool,
    /// Interfaces whose arriving TCP is outbound traffic of a machine inside the pod (`istio.io/reroute-virtual-interfaces`). Default none.
    pub rerouted_interfaces: Vec<String>,
    /// The address that probes of the node's kubelet come from; never captured. Default 169.254.7.127 (`HOST_PROBE_SNAT_IP`).
    pub probe_ipv4: Ipv4Addr,
    /// The same for IPv6. Default fd16:9254:7127:1337:ffff:ffff:ffff:ffff (`HOST_PROBE_SNAT_IPV6`).
    pub probe_ipv6: Ipv6Addr,
}

impl Default for RulesConfig {
    fn default() -> Self {
        Self {
            ipv6: true,
            dns_capture: true,
            bypass_inbound: false,
            rerouted_interfaces: Vec::new(),
            probe_ipv4: Ipv4Addr::new(169, 254, 7, 127),
            probe_ipv6: Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff),
        }
    }
}

/// Why a pod's rules could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The name could end the rule it stands in.
    #[error("{0:?} is not the name of a network interface (1 to 15 letters, digits, '.', '_', '-')")]
    InterfaceName(String),
    /// The namespace cannot be entered.
    #[error("cannot enter the pod's network namespace: {0}")]
    Namespace(#[source] io::Error),
    /// `nft` is missing or refused the rules.
    #[error("cannot change the pod's capture rules: {0}")]
    Rules(#[source] io::Error),
    /// The policy route.
    #[error("cannot change the pod's policy route: {0}")]
    Route(#[source] io::Error),
}

/// Puts rules and routes into a pod, or brings those that are there up to date: the table is emptied and filled in one
/// transaction, so there is no moment without rules, and connections that exist are not disturbed.
///
/// The listeners on 15001, 15006, 15008 and, with DNS capture, 15053 must exist (see the module). Blocks for the time that `nft` runs, a few milliseconds.
///
/// # Errors
/// See [`RulesError`]. If the rules fail, nothing captures; a route that was added before stays, which without rules has no effect.
pub fn install(netns: &NetNs, config: &RulesConfig) -> Result<(), RulesError> {
    let script = script(config)?;
    let inside = || {
        install_marked_local_route(&RETURN_ROUTE, false).map_err(RulesError::Route)?;
        if config.ipv6 && ipv6_usable() {
            install_marked_local_route(&RETURN_ROUTE, true).map_err(RulesError::Route)?;
        }
        nft::apply(&script).map_err(RulesError::Rules)
    };
    netns.run(inside).map_err(RulesError::Namespace)?
}

/// Ends capture: new connections of the pod go where they are addressed. Connections that exist are still translated, so that the proxy can
/// close them towards both ends; without the table they would end in silence. When the proxy has let go of the pod, [`remove`] takes the rest.
/// A pod without rules is no error.
///
/// # Errors
/// See [`RulesError`].
pub fn stop_capturing(netns: &NetNs) -> Result<(), RulesError> {
    // "add" first, because flushing what is not there is an error. A chain that exists keeps its hook, and translates even when it is empty.
    let chain = |name: &str| format!("add chain inet {TABLE} {name}\nflush chain inet {TABLE} {name}\n");
    let script = format!("add table inet {TABLE}\n{}{}", chain("nat_prerouting"), chain("nat_output"));
    netns.run(|| nft::apply(&script).map_err(RulesError::Rules)).map_err(RulesError::Namespace)?
}

/// Takes rules and routes out of a pod; what is not there is no error. The listeners may go afterwards.
///
/// # Errors
/// See [`RulesError`].
pub fn remove(netns: &NetNs) -> Result<(), RulesError> {
    let inside = || {
        // "add" first, because deleting a table that is not there is an error.
        nft::apply(&format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")).map_err(RulesError::Rules)?;
        remove_marked_local_route(&RETURN_ROUTE, false).map_err(RulesError::Route)?;
        if ipv6_usable() {
            remove_marked_local_route(&RETURN_ROUTE, true).map_err(RulesError::Route)?;
        }
        Ok(())
    };
    netns.run(inside).map_err(RulesError::Namespace)?
}

const OURS: &str = "meta mark & 0xfff == 0x539";
const NOT_OURS: &str = "meta mark & 0xfff != 0x539";
const TCP: &str = "meta l4proto tcp";

/// The whole transaction, as a person would write it.
///
/// # Errors
/// [`RulesError::InterfaceName`].
pub fn script(config: &RulesConfig) -> Result<String, RulesError> {
    for name in &config.rerouted_interfaces {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if name.is_empty() || name.len() > 15 || !name.bytes().all(plain) {
            return Err(RulesError::InterfaceName(name.clone()));
        }
    }
    let mut text = String::new();
    let _ = writeln!(text, "# Emptied and filled in one transaction. Sockets of the proxy carry the mark 0x539.");
    let _ = writeln!(text, "add table inet {TABLE}\nflush table inet {TABLE}\ntable inet {TABLE} {{");
    if config.dns_capture {
        chain(&mut text, "raw_prerouting", "type filter hook prerouting priority -300", &raw_prerouting());
    }
    chain(&mut text, "raw_output", "type filter hook output priority -300", &raw_output(config));
    chain(&mut text, "mangle_prerouting", "type filter hook prerouting priority -150", &mangle_prerouting());
    // A chain of type route looks the route up again when the mark has changed.
    chain(&mut text, "mangle_output", "type route hook output priority -150", &mangle_output());
    chain(&mut text, "nat_prerouting", "type nat hook prerouting priority -100", &nat_prerouting(config));
    chain(&mut text, "nat_output", "type nat hook output priority -100", &nat_output(config));
    text.push_str("}\n");
    Ok(text)
}

/// One rule: what it matches and does, and why.
type Rule = (String, &'static str);

fn chain(text: &mut String, name: &str, hook: &str, rules: &[Rule]) {
    let _ = writeln!(text, "    chain {name} {{\n        {hook}; policy accept;");
    for (rule, why) in rules {
        let _ = writeln!(text, "        {rule} comment \"{why}\"");
    }
    text.push_str("    }\n");
}

/// The loopback address that is exempt, per family: the keyword of the family and the address.
fn families(config: &RulesConfig) -> impl Iterator<Item = (&'static str, &'static str, String)> {
    let v4 = ("ip", "127.0.0.1", config.probe_ipv4.to_string());
    let v6 = ("ip6", "::1", config.probe_ipv6.to_string());
    [Some(v4), config.ipv6.then_some(v6)].into_iter().flatten()
}

/// Row 13.
fn raw_prerouting() -> Vec<Rule> {
    vec![(format!("udp sport 53 {NOT_OURS} counter ct zone set 1"), "answers to the proxy's own DNS queries")]
}

/// Row 12, and one that the table does not have. A connection with a borrowed source address looks like one of the address's owner; now and then
/// the kernels of both choose the same port, and connection tracking takes the two for one: the owner's would miss its redirection, and be refused, be
/// reset or hear nothing. The zone is that of the proxy's own direction only: answers know of no zone, and are found without one.
///
/// A socket's own port range (`IP_LOCAL_PORT_RANGE`) would not do instead: Linux lets it only narrow the pod's range, where clients' ports are too.
///
/// The mark has a bit that the rules of istio-cni do not look at, so that a proxy which does not set it is served as before, and connections that were
/// there before these rules stay what they were.
fn raw_output(config: &RulesConfig) -> Vec<Rule> {
    let dns = (format!("udp dport 53 {OURS} counter ct zone set 1"), "the proxy's own DNS queries, apart from the pod's");
    let mark = 0x539 | BORROWED_MARK_BIT;
    let borrowed = (
        format!("{TCP} meta mark & {:#x} == {mark:#x} counter ct original zone set 2", 0xfff | BORROWED_MARK_BIT),
        "borrowed addresses, apart from their owners",
    );
    config.dns_capture.then_some(dns).into_iter().chain([borrowed]).collect()
}

/// Row 4.
fn mangle_prerouting() -> Vec<Rule> {
    vec![(format!("{OURS} counter ct mark set ct mark & 0xfffff000 | 0x111"), "remember connections from the proxy")]
}

/// Row 5, for answers only: what the proxy sends itself stays in the pod without the route, and looking each packet's route up twice costs.
fn mangle_output() -> Vec<Rule> {
    vec![(format!("{NOT_OURS} ct mark & 0xfff == 0x111 counter meta mark set ct mark"), "answers to the proxy: the route of table 100")]
}

/// Rows 1 to 3.
fn nat_prerouting(config: &RulesConfig) -> Vec<Rule> {
    let mut rules = Vec::new();
    for name in &config.rerouted_interfaces {
        rules.push((format!("iifname \"{name}\" {TCP} counter redirect to :15001"), "traffic of a virtual machine is outbound"));
    }
    if config.bypass_inbound {
        return rules;
    }
    for (ip, _, probe) in families(config) {
        rules.push((format!("{ip} saddr {probe} {TCP} counter accept"), "probes of the kubelet reach the application"));
    }
    for (ip, loopback, _) in families(config) {
        rules.push((format!("{ip} daddr != {loopback} tcp dport != 15008 {NOT_OURS} counter redirect to :15006"), "inbound plaintext"));
    }
    rules
}

/// Rows 6 to 11.
fn nat_output(config: &RulesConfig) -> Vec<Rule> {
    let mut rules = Vec::new();
    for (ip, _, probe) in families(config) {
        rules.push((format!("{ip} daddr {probe} {TCP} counter accept"), "answers to probes"));
    }
    if config.dns_capture {
        rules.push((format!("oifname != \"lo\" udp dport 53 {NOT_OURS} counter redirect to :15053"), "DNS over UDP"));
        for (ip, loopback, _) in families(config) {
            rules.push((format!("{ip} daddr != {loopback} tcp dport 53 {NOT_OURS} counter redirect to :15053"), "DNS over TCP"));
        }
    }
    rules.push((format!("{TCP} meta mark & 0xfff == 0x111 counter accept"), "answers to the proxy"));
    for (ip, loopback, _) in families(config) {
        rules.push((format!("oifname \"lo\" {ip} daddr != {loopback} counter accept"), "the pod calls itself"));
    }
    for (ip, loopback, _) in families(config) {
        rules.push((format!("{ip} daddr != {loopback} {TCP} {NOT_OURS} counter redirect to :15001"), "outbound"));
    }
    rules
}

#[cfg(test)]
mod tests;
