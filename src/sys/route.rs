//! Policy routing for the return path of foreign source addresses: packets with a mark are delivered to this host, whatever their
//! destination address, so that answers to an address a transparent socket has borrowed come back to that socket.
//!
//! Everything acts on the namespace of the calling thread: call inside [`NetNs::run`](super::netns::NetNs::run). Two fixed netlink
//! requests per family are written by hand, which is less to trust than three crates.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket};

/// `ip rule fwmark MARK/MASK pref PREFERENCE lookup TABLE` and, in that table, `local default dev lo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkedLocalRoute {
    /// The mark that a packet must carry.
    pub mark: u32,
    /// The bits of the mark that count.
    pub mask: u32,
    /// Preference of the rule; the main table is looked up at 32766.
    pub preference: u32,
    /// Routing table, 1 to 255.
    pub table: u8,
}

/// Installs rule and route for IPv4, or for IPv6. What is there already stays.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`; `ENETDOWN` for IPv6 while `lo` is down; the error says which of the two could not be added.
pub fn install_marked_local_route(route: &MarkedLocalRoute, ipv6: bool) -> io::Result<()> {
    // Route before rule: a packet that matches the rule always finds the route.
    for (what, message) in [("local route", local_route(route, ipv6, Change::Add)?), ("rule", rule(route, ipv6, Change::Add))] {
        match exchange(message) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(explained("add", what, route, &error)),
            _ => {}
        }
    }
    Ok(())
}

/// Removes rule and route of one family. What is not there is no error.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub fn remove_marked_local_route(route: &MarkedLocalRoute, ipv6: bool) -> io::Result<()> {
    for (what, message) in [("rule", rule(route, ipv6, Change::Delete)), ("local route", local_route(route, ipv6, Change::Delete)?)] {
        match exchange(message) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return Err(explained("remove", what, route, &error)),
            _ => {}
        }
    }
    Ok(())
}

/// Whether IPv6 is usable on loopback in this namespace (reference, dataplane §1.8).
#[must_use]
pub fn ipv6_usable() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|disabled| disabled.trim() != "1")
}

fn explained(verb: &str, what: &str, route: &MarkedLocalRoute, error: &io::Error) -> io::Error {
    let hint = if error.raw_os_error() == Some(libc::ENETDOWN) { " (bring the loopback interface up first)" } else { "" };
    io::Error::new(error.kind(), format!("cannot {verb} the {what} for mark {:#x} in table {}: {error}{hint}", route.mark, route.table))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Add,
    Delete,
}

/// `struct fib_rule_hdr` and its attributes.
fn rule(route: &MarkedLocalRoute, ipv6: bool, change: Change) -> Vec<u8> {
    const FRA_PRIORITY: u16 = 6;
    const FRA_FWMARK: u16 = 10;
    const FRA_FWMASK: u16 = 16;
    const TO_TABLE: u8 = 1;
    let kind = if change == Change::Add { libc::RTM_NEWRULE } else { libc::RTM_DELRULE };
    let mut message = header(kind, change);
    message.extend([family(ipv6), 0, 0, 0, route.table, 0, 0, TO_TABLE]);
    message.extend(0_u32.to_ne_bytes());
    attribute(&mut message, FRA_PRIORITY, route.preference);
    attribute(&mut message, FRA_FWMARK, route.mark);
    attribute(&mut message, FRA_FWMASK, route.mask);
    message
}

/// `struct rtmsg` and its attributes.
fn local_route(route: &MarkedLocalRoute, ipv6: bool, change: Change) -> io::Result<Vec<u8>> {
    let kind = if change == Change::Add { libc::RTM_NEWROUTE } else { libc::RTM_DELROUTE };
    let mut message = header(kind, change);
    message.extend([family(ipv6), 0, 0, 0, route.table, libc::RTPROT_BOOT, libc::RT_SCOPE_HOST, libc::RTN_LOCAL]);
    message.extend(0_u32.to_ne_bytes());
    attribute(&mut message, libc::RTA_OIF, nix::net::if_::if_nametoindex("lo")?);
    Ok(message)
}

/// `AF_INET` or `AF_INET6` as the one byte that these headers have for it.
const fn family(ipv6: bool) -> u8 {
    if ipv6 { 10 } else { 2 }
}

/// `struct nlmsghdr`, its length still 0.
fn header(kind: u16, change: Change) -> Vec<u8> {
    let mut flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    if change == Change::Add {
        flags |= libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    }
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    // The flags are 16 bits wide; libc's constants for them are wider than they need to be.
    message.extend(u16::try_from(flags).unwrap_or(0).to_ne_bytes());
    message.extend([0; 8]);
    message
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: u32) {
    message.extend(8_u16.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value.to_ne_bytes());
}

/// Sends one request and waits for the kernel's acknowledgement, which it queues before `send` returns.
fn exchange(mut message: Vec<u8>) -> io::Result<()> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_ne_bytes();
    message.splice(..4, length);
    let netlink: OwnedFd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    connect(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 1024];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // nlmsghdr (16 bytes), then nlmsgerr, which begins with the negative error number; 0 is success.
    match answer.get(16..20).filter(|_| length >= 20).map(|bytes| bytes.try_into().map(i32::from_ne_bytes)) {
        Some(Ok(0)) => Ok(()),
        Some(Ok(code)) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's netlink answer is too short")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::sys::netns::NetNs;
    use std::process::Command;

    const ROUTE: MarkedLocalRoute = MarkedLocalRoute { mark: 0x111, mask: 0xfff, preference: 32764, table: 100 };

    fn ip(arguments: &str) -> String {
        let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
        String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn marked_packets_are_delivered_here_in_both_families_and_installing_twice_is_the_same() {
        NetNs::create()
            .unwrap()
            .run(|| {
                ip("link set lo up");
                for (ipv6, flag) in [(false, "-4"), (true, "-6")] {
                    let before = ip(&format!("{flag} rule"));
                    install_marked_local_route(&ROUTE, ipv6).unwrap();
                    install_marked_local_route(&ROUTE, ipv6).unwrap();
                    let rules = ip(&format!("{flag} rule"));
                    assert_eq!(rules.matches("32764: from all fwmark 0x111/0xfff lookup 100").count(), 1, "{rules}");
                    let routes = ip(&format!("{flag} route show table 100"));
                    assert!(routes.starts_with("local default dev lo"), "{routes}");
                    remove_marked_local_route(&ROUTE, ipv6).unwrap();
                    remove_marked_local_route(&ROUTE, ipv6).unwrap();
                    assert_eq!(ip(&format!("{flag} rule")), before);
                    assert_eq!(ip(&format!("{flag} route show table 100")), "");
                }
            })
            .unwrap();
    }
}
