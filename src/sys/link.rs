//! Network links through rtnetlink: veth pairs, bridges, addresses, routes, and the sysctls of a network namespace.
//!
//! A [`Links`] is a netlink socket, and a netlink socket belongs for ever to the namespace it was opened in: open it inside
//! [`NetNs::run`](super::netns::NetNs::run), then use it from anywhere. No `ip` program is needed.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use ipnet::IpNet;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket};

const VETH_INFO_PEER: u16 = 1;
const BRIDGE_MULTICAST_SNOOPING: u16 = 23;
/// `IFA_F_NODAD` of `struct ifaddrmsg`.
const NO_DUPLICATE_DETECTION: u8 = 0x02;
const HEADER: usize = 16;
/// A kernel answer to one request is a few hundred bytes; link dumps are not used here.
const ANSWER: usize = 32 * 1024;

/// The links of one network namespace.
#[derive(Debug)]
pub struct Links {
    socket: OwnedFd,
    sequence: AtomicU32,
}

impl Links {
    /// Opens the links of the namespace that this thread is in now.
    pub fn open() -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket, sequence: AtomicU32::new(1) })
    }

    /// The index of a link by its name.
    pub fn index(&self, name: &str) -> io::Result<u32> {
        let mut message = Message::new(libc::RTM_GETLINK, 0);
        message.link_header(0, 0, 0);
        message.attribute(libc::IFLA_IFNAME, &c_name(name)?);
        let answer = self.exchange(message)?;
        let index = answer.get(HEADER + 4..HEADER + 8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
        index.ok_or_else(|| io::Error::other("the kernel's answer about a link is too short"))
    }

    /// Adds a bridge, up, that forwards at once (no spanning tree) and floods multicast, so that neighbour discovery needs no querier.
    pub fn add_bridge(&self, name: &str) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        message.link_header(0, libc::IFF_UP as u32, libc::IFF_UP as u32);
        message.attribute(libc::IFLA_IFNAME, &c_name(name)?);
        message.nested(libc::IFLA_LINKINFO, |info| {
            info.attribute(libc::IFLA_INFO_KIND, b"bridge");
            info.nested(libc::IFLA_INFO_DATA, |data| data.attribute(BRIDGE_MULTICAST_SNOOPING, &[0]));
        });
        self.exchange(message).map(drop)
    }

    /// Adds a veth pair: `name` here, `peer` in another namespace; both are down.
    pub fn add_veth(&self, name: &str, peer: &str, peer_netns: BorrowedFd<'_>) -> io::Result<()> {
        let peer = c_name(peer)?;
        let mut message = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        message.link_header(0, 0, 0);
        message.attribute(libc::IFLA_IFNAME, &c_name(name)?);
        message.nested(libc::IFLA_LINKINFO, |info| {
            info.attribute(libc::IFLA_INFO_KIND, b"veth");
            info.nested(libc::IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |other| {
                    other.link_header(0, 0, 0);
                    other.attribute(libc::IFLA_IFNAME, &peer);
                    other.attribute(libc::IFLA_NET_NS_FD, &peer_netns.as_raw_fd().to_ne_bytes());
                });
            });
        });
        self.exchange(message).map(drop)
    }

    /// Sets a link up.
    pub fn set_up(&self, name: &str) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.link_header(self.index(name)?, libc::IFF_UP as u32, libc::IFF_UP as u32);
        self.exchange(message).map(drop)
    }

    /// Gives an Ethernet link another hardware address.
    pub fn set_hardware_address(&self, name: &str, address: [u8; 6]) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.link_header(self.index(name)?, 0, 0);
        message.attribute(libc::IFLA_ADDRESS, &address);
        self.exchange(message).map(drop)
    }

    /// Makes a link a port of a bridge.
    pub fn set_bridge(&self, name: &str, bridge: &str) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.link_header(self.index(name)?, 0, 0);
        message.attribute(libc::IFLA_MASTER, &self.index(bridge)?.to_ne_bytes());
        self.exchange(message).map(drop)
    }

    /// Removes a link; the other end of a veth pair goes with it.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_DELLINK, 0);
        message.link_header(self.index(name)?, 0, 0);
        self.exchange(message).map(drop)
    }

    /// Adds an address with the prefix of its subnet; an IPv6 one is usable at once (no duplicate detection).
    pub fn add_address(&self, name: &str, address: IpNet) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        let index = self.index(name)?.to_ne_bytes();
        message.bytes(&[family(address.addr()), address.prefix_len(), NO_DUPLICATE_DETECTION, 0]);
        message.bytes(&index);
        message.attribute(libc::IFA_LOCAL, &octets(address.addr()));
        message.attribute(libc::IFA_ADDRESS, &octets(address.addr()));
        self.exchange(message).map(drop)
    }

    /// Adds a route to a prefix through a gateway that is on a connected subnet.
    pub fn add_route(&self, prefix: IpNet, gateway: IpAddr) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        let (table, protocol, scope, kind) = (libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST);
        message.bytes(&[family(prefix.addr()), prefix.prefix_len(), 0, 0, table, protocol, scope, kind]);
        message.bytes(&0u32.to_ne_bytes());
        if prefix.prefix_len() > 0 {
            message.attribute(libc::RTA_DST, &octets(prefix.network()));
        }
        message.attribute(libc::RTA_GATEWAY, &octets(gateway));
        self.exchange(message).map(drop)
    }

    /// Sends one request and returns the first answer to it, or the kernel's error.
    fn exchange(&self, message: Message) -> io::Result<Vec<u8>> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        send(self.socket.as_raw_fd(), &message.finish(sequence), MsgFlags::empty())?;
        let mut answer = vec![0; ANSWER];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let word = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
            let (Some(kind), Some(of)) = (word(4).map(|kind| kind & 0xffff), word(8)) else {
                return Err(io::Error::other("the kernel's netlink answer is too short"));
            };
            if of != sequence {
                continue;
            }
            if kind != libc::NLMSG_ERROR as u32 {
                answer.truncate(length);
                return Ok(answer);
            }
            return match word(HEADER).map(u32::cast_signed) {
                Some(0) => Ok(Vec::new()),
                Some(code) => Err(io::Error::from_raw_os_error(-code)),
                None => Err(io::Error::other("the kernel's netlink error is too short")),
            };
        }
    }
}

/// Writes a sysctl of the namespace that this thread is in now, by its dotted name (`net.ipv4.ip_forward`).
pub fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    std::fs::write(format!("/proc/sys/{}", name.replace('.', "/")), value)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot set {name} to {value:?}: {error}")))
}

/// Reads a sysctl of the namespace that this thread is in now, without the newline.
pub fn sysctl(name: &str) -> io::Result<String> {
    std::fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).map(|text| text.trim_end().to_owned())
}

/// A netlink request under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: i32) -> Self {
        // Layout: length (set by finish), type, flags, sequence (set by finish), port 0.
        let mut message = Self(vec![0; 4]);
        // A GETLINK is answered by the link itself; everything else by an acknowledgement.
        let acknowledge = if kind == libc::RTM_GETLINK { 0 } else { libc::NLM_F_ACK };
        let flags = u16::try_from(libc::NLM_F_REQUEST | acknowledge | flags).unwrap_or(0);
        message.bytes(&kind.to_ne_bytes());
        message.bytes(&flags.to_ne_bytes());
        message.bytes(&[0; 8]);
        message
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// `struct ifinfomsg`.
    fn link_header(&mut self, index: u32, flags: u32, change: u32) {
        self.bytes(&[0; 4]);
        self.bytes(&index.to_ne_bytes());
        self.bytes(&flags.to_ne_bytes());
        self.bytes(&change.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nested(kind, |message| message.bytes(value));
    }

    fn nested(&mut self, kind: u16, content: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.bytes(&[0; 2]);
        self.bytes(&kind.to_ne_bytes());
        content(self);
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        if let Some(place) = self.0.get_mut(start..start + 2) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        for (at, word) in [(0, length), (8, sequence)] {
            if let Some(place) = self.0.get_mut(at..at + 4) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
        }
        self.0
    }
}

/// The name with its terminating zero; the kernel takes at most 15 bytes (IFNAMSIZ).
fn c_name(name: &str) -> io::Result<Vec<u8>> {
    if name.is_empty() || name.len() > 15 || name.bytes().any(|byte| byte == 0 || byte == b'/' || byte.is_ascii_whitespace()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} cannot be the name of a network link (1 to 15 bytes)")));
    }
    Ok(name.bytes().chain([0]).collect())
}

fn family(ip: IpAddr) -> u8 {
    const INET: u8 = 2;
    const INET6: u8 = 10;
    if ip.is_ipv4() { INET } else { INET6 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Whether an error of [`Links`] means that there is no link of that name.
#[must_use]
pub fn is_no_such_link(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}
