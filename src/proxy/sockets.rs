//! Sockets where the pod's own would be: in its network namespace, marked, with the source address that the destination shall see.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use super::Config;
use crate::hbone::Dialer;
use crate::pods::PACKET_MARK;
use crate::sys::datagram::dial_udp;
use crate::sys::link::sysctl;
use crate::sys::netns::NetNs;
use crate::sys::socket::{BORROWED_MARK_BIT, DialOptions, dial_socket};
use crate::telemetry::limited;

/// Dials for one pod.
#[derive(Clone)]
pub struct PodSockets {
    netns: Option<NetNs>,
    options: DialOptions,
    connect_timeout: Duration,
    may_spoof: bool,
}

impl PodSockets {
    /// Sockets of the pod in `netns`, or of this process's own namespace. `may_spoof` is what the pod's listeners found out about
    /// transparency.
    #[must_use]
    pub fn new(netns: Option<NetNs>, may_spoof: bool, config: &Config) -> Self {
        let user_timeout = config.keepalive.as_ref().filter(|_| config.user_timeout).map(crate::sys::socket::Keepalive::user_timeout);
        // Only the bits that the reference's rules look at are known to be the proxy's; with another mark, nobody knows what the rules look at.
        let borrowed_mark = config.mark.map(|mark| if mark == PACKET_MARK { mark | BORROWED_MARK_BIT } else { mark });
        let options = DialOptions { mark: config.mark, borrowed_mark, keepalive: config.keepalive, user_timeout };
        Self { netns, options, connect_timeout: config.connect_timeout, may_spoof }
    }

    /// Connects to the pod's own application within the connect timeout. With a `source`, it sees that address if the kernel allows it (reference,
    /// dataplane §1.6); the second part of the answer is whether the kernel did not. Both ends are this kernel's, which knows when one is gone: no
    /// keepalive, whose four options cost more than the socket.
    ///
    /// # Errors
    /// Those of the connect; [`io::ErrorKind::TimedOut`] after the timeout.
    pub async fn deliver(&self, target: SocketAddr, source: Option<SocketAddr>) -> io::Result<(TcpStream, bool)> {
        let options = DialOptions { keepalive: None, ..self.options };
        self.open(target, source.filter(|_| self.may_spoof), &options).await
    }

    /// Connects to another host, as the pod would, within the connect timeout.
    ///
    /// # Errors
    /// Those of [`deliver`](Self::deliver).
    pub async fn connect(&self, target: SocketAddr) -> io::Result<TcpStream> {
        self.open(target, None, &self.options).await.map(|(socket, _)| socket)
    }

    /// Whether an address is one of the pod's, or of a prefix that is local to it: a socket can be bound to it. In a pod that lets sockets have foreign
    /// addresses as well, whether it is where the kernel would call it from. Nothing is sent.
    pub(super) fn are_at(&self, ip: IpAddr) -> bool {
        let (foreign, unspecified): (_, IpAddr) = match ip {
            IpAddr::V4(_) => ("net.ipv4.ip_nonlocal_bind", Ipv4Addr::UNSPECIFIED.into()),
            IpAddr::V6(_) => ("net.ipv6.ip_nonlocal_bind", Ipv6Addr::UNSPECIFIED.into()),
        };
        let source = || -> io::Result<IpAddr> {
            let socket = std::net::UdpSocket::bind((unspecified, 0))?;
            socket.connect((ip, 9))?;
            Ok(socket.local_addr()?.ip())
        };
        let ours = || {
            let bound = std::net::UdpSocket::bind((ip, 0)).is_ok();
            bound && (sysctl(foreign).is_ok_and(|value| value.trim() == "0") || source().is_ok_and(|source| source == ip))
        };
        match &self.netns {
            Some(netns) => netns.run(ours).unwrap_or(false),
            None => ours(),
        }
    }

    /// A UDP socket to a nameserver: of the pod, so that its NetworkPolicy holds, but of this process for a nameserver on a loopback address, which
    /// is nobody in the pod.
    ///
    /// # Errors
    /// See [`dial_udp`].
    pub(super) fn datagrams(&self, nameserver: SocketAddr) -> io::Result<UdpSocket> {
        let make = || dial_udp(nameserver, self.options.mark);
        let socket = match &self.netns {
            Some(netns) if !nameserver.ip().is_loopback() => netns.run(make)??,
            _ => make()?,
        };
        UdpSocket::from_std(socket)
    }

    /// A connection to a nameserver, from where [`datagrams`](Self::datagrams) go out.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect).
    pub(super) async fn resolver(&self, nameserver: SocketAddr) -> io::Result<TcpStream> {
        if nameserver.ip().is_loopback() {
            let here = Self { netns: None, ..self.clone() };
            return here.connect(nameserver).await;
        }
        self.connect(nameserver).await
    }

    async fn open(&self, target: SocketAddr, source: Option<SocketAddr>, options: &DialOptions) -> io::Result<(TcpStream, bool)> {
        let make = || dial_socket(target, source, options);
        let (socket, spoofed) = match &self.netns {
            Some(netns) => netns.run(make)??,
            None => make()?,
        };
        let lost = !spoofed && source.is_some_and(|source| source.ip().to_canonical() != target.ip().to_canonical());
        if lost {
            limited!(warn, "source address lost", %target, source = ?source, "the application does not see its client's address: the kernel refused it");
        }
        let socket = TcpSocket::from_std_stream(socket.into());
        match tokio::time::timeout(self.connect_timeout, socket.connect(target)).await {
            Ok(outcome) => outcome.map(|socket| (socket, lost)),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {target} within {:?}", self.connect_timeout))),
        }
    }
}

impl Dialer for PodSockets {
    fn dial(&self, target: SocketAddr) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send + '_>> {
        Box::pin(self.connect(target))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::link::{Links, set_sysctl};

    #[test]
    fn the_addresses_of_the_pod_are_told_from_others() {
        let netns = NetNs::create().unwrap();
        let addresses = || {
            let links = Links::open().unwrap();
            links.set_up("lo").unwrap();
            // A whole prefix of it is local, as is all of 127.0.0.0/8.
            ["10.9.0.1/24", "fd00:9::1/128"].map(|address| links.add_address("lo", address.parse().unwrap()).unwrap())
        };
        netns.run(addresses).unwrap();
        let sockets = PodSockets { netns: Some(netns), options: DialOptions::default(), connect_timeout: Duration::from_secs(20), may_spoof: false };
        let ours = ["127.0.0.1", "127.1.2.3", "10.9.0.1", "10.9.0.77", "::1", "fd00:9::1"];
        let theirs = ["10.0.0.1", "fd00::1", "fe80::1"];
        let are_at = |ips: &[&str]| ips.iter().map(|ip| sockets.are_at(ip.parse().unwrap())).collect::<Vec<_>>();
        assert_eq!((are_at(&ours), are_at(&theirs)), (vec![true; 6], vec![false; 3]));
        for family in ["ipv4", "ipv6"] {
            sockets.netns.as_ref().unwrap().run(|| set_sysctl(&format!("net.{family}.ip_nonlocal_bind"), "1")).unwrap().unwrap();
        }
        assert_eq!((are_at(&["127.0.0.1", "10.9.0.1", "::1", "fd00:9::1"]), are_at(&theirs)), (vec![true; 4], vec![false; 3]));
    }

    #[tokio::test]
    async fn an_application_is_reached_without_its_clients_address_if_the_kernel_refuses_that_and_its_caller_is_told() {
        let netns = NetNs::create().unwrap();
        let listener = netns.run(|| {
            Links::open().unwrap().set_up("lo").unwrap();
            std::net::TcpListener::bind("[::1]:0").unwrap()
        });
        let listener = listener.unwrap();
        let target = listener.local_addr().unwrap();
        let sockets = PodSockets { netns: Some(netns), options: DialOptions::default(), connect_timeout: Duration::from_secs(20), may_spoof: true };
        // Nobody can be at a link-local address without saying of which link.
        let unspeakable: SocketAddr = "[fe80::1]:4321".parse().unwrap();
        for (source, may_spoof, lost) in
            [(Some(unspeakable), true, true), (Some(unspeakable), false, false), (Some(target), true, false), (None, true, false)]
        {
            let sockets = PodSockets { may_spoof, ..sockets.clone() };
            let (socket, said) = sockets.deliver(target, source).await.unwrap();
            assert_eq!((said, listener.accept().unwrap().1), (lost, socket.local_addr().unwrap()), "{source:?}, {may_spoof}");
            assert_eq!(socket.local_addr().unwrap().ip(), target.ip());
        }
    }
}
