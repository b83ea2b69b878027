//! The listening sockets of a pod.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use super::{Config, DnsAddress, DnsSockets, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, PodListeners, SOCKS_PORT};
use crate::sys::datagram::listen_udp;
use crate::sys::netns::NetNs;
use crate::sys::route::ipv6_usable;
use crate::sys::socket::{ListenOptions, Listener, Transparency, is_unknown_family, listen_tcp, wildcard};

/// Opens the listeners of a pod inside its namespace: all, or none.
///
/// # Errors
/// The namespace cannot be entered, a port is taken, or the mark or transparency is not allowed; the error names which.
pub fn open_listeners(netns: &NetNs, config: &Config) -> io::Result<PodListeners> {
    let redirected = ListenOptions {
        mark: config.mark,
        reuse_port: config.port_reuse,
        transparent: config.transparency,
        keepalive: config.keepalive,
        user_timeout: config.user_timeout,
        ..ListenOptions::default()
    };
    // PING watches over tunnels (reference, dataplane §1.3).
    let tunnels = ListenOptions { keepalive: None, user_timeout: None, ..redirected.clone() };
    let ([outbound, plaintext, hbone], dns, socks) = netns.run(|| {
        let open = |port, options| listen(port, config.ipv6, options);
        let dns = config.services.dns.map(|address| dns_sockets(address, config)).transpose()?;
        // Only the pod's own processes, over IPv4 as in the reference.
        let socks = || listen_tcp((Ipv4Addr::LOCALHOST, SOCKS_PORT).into(), &on_loopback(config));
        let socks = config.services.socks.then(socks).transpose()?;
        Ok::<_, io::Error>(([open(OUTBOUND_PORT, &redirected)?, open(PLAINTEXT_PORT, &redirected)?, open(HBONE_PORT, &tunnels)?], dns, socks))
    })??;
    let dns = dns.map(|(udp, tcp)| {
        let udp = udp.into_iter().map(tokio::net::UdpSocket::from_std).collect::<io::Result<_>>()?;
        let tcp = tcp.into_iter().map(|listener| tokio::net::TcpListener::from_std(listener.socket)).collect::<io::Result<_>>()?;
        Ok::<_, io::Error>(DnsSockets { udp, tcp })
    });
    Ok(PodListeners {
        transparent: outbound.transparent && plaintext.transparent && hbone.transparent,
        outbound: tokio::net::TcpListener::from_std(outbound.socket)?,
        plaintext: tokio::net::TcpListener::from_std(plaintext.socket)?,
        hbone: tokio::net::TcpListener::from_std(hbone.socket)?,
        dns: dns.transpose()?,
        socks: socks.map(|listener| tokio::net::TcpListener::from_std(listener.socket)).transpose()?,
        netns: netns.clone(),
    })
}

/// The sockets of DNS, marked as the others are, but not transparent: their clients are redirected to loopback.
fn dns_sockets(address: DnsAddress, config: &Config) -> io::Result<(Vec<UdpSocket>, Vec<Listener>)> {
    let addresses: Vec<SocketAddr> = match address {
        DnsAddress::At(address) => vec![address],
        DnsAddress::Loopback(port) => {
            let v6 = (config.ipv6 && ipv6_usable()).then_some(SocketAddr::from((Ipv6Addr::LOCALHOST, port)));
            std::iter::once(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).chain(v6).collect()
        }
    };
    let options = on_loopback(config);
    let udp = addresses.iter().map(|address| listen_udp(*address, config.mark, config.port_reuse)).collect::<io::Result<_>>()?;
    let tcp = addresses.iter().map(|address| listen_tcp(*address, &options)).collect::<io::Result<_>>()?;
    Ok((udp, tcp))
}

/// Options of listeners whose clients are processes of the pod.
fn on_loopback(config: &Config) -> ListenOptions {
    ListenOptions {
        mark: config.mark,
        reuse_port: config.port_reuse,
        transparent: Transparency::Never,
        freebind: true,
        keepalive: None,
        ..ListenOptions::default()
    }
}

fn listen(port: u16, ipv6: bool, options: &ListenOptions) -> io::Result<Listener> {
    match listen_tcp(wildcard(port, ipv6), options) {
        // A kernel without IPv6 refuses the socket itself. That is a fact about the machine, not a wrong setting.
        Err(error) if ipv6 && is_unknown_family(&error) => listen_tcp(wildcard(port, false), options),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::process::Command;
    use std::time::Duration;

    use socket2::SockRef;

    use super::*;
    use crate::pods::{PACKET_MARK, Services};

    fn inside(netns: &NetNs, port: u16) -> io::Result<std::net::TcpStream> {
        netns.run(|| std::net::TcpStream::connect(("127.0.0.1", port)))?
    }

    fn namespace() -> NetNs {
        let netns = NetNs::create().unwrap();
        assert!(netns.run(|| Command::new("ip").args(["link", "set", "lo", "up"]).status()).unwrap().unwrap().success());
        netns
    }

    #[tokio::test]
    async fn all_three_listen_in_the_pod_marked_and_with_a_shared_port() {
        let netns = namespace();
        let listeners = open_listeners(&netns, &Config::default()).unwrap();
        assert!(listeners.transparent);
        for (port, listener, keepalive) in [(15001, &listeners.outbound, true), (15006, &listeners.plaintext, true), (15008, &listeners.hbone, false)]
        {
            let socket = SockRef::from(listener);
            assert_eq!(socket.mark().unwrap(), PACKET_MARK);
            assert!(socket.reuse_port().unwrap());
            let _client = inside(&netns, port).unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            let accepted = SockRef::from(&accepted);
            assert_eq!((accepted.keepalive().unwrap(), accepted.tcp_nodelay().unwrap()), (keepalive, true));
            assert_eq!(accepted.mark().unwrap(), PACKET_MARK);
        }
        assert!(std::net::TcpStream::connect_timeout(&"127.0.0.1:15001".parse().unwrap(), Duration::from_millis(200)).is_err());
    }

    #[tokio::test]
    async fn a_taken_port_fails_the_whole_pod_and_frees_the_others() {
        let netns = namespace();
        let exclusive = Config { port_reuse: false, ..Config::default() };
        let squatter = netns.run(|| std::net::TcpListener::bind("0.0.0.0:15008")).unwrap().unwrap();
        let error = open_listeners(&netns, &exclusive).unwrap_err();
        assert!(error.to_string().contains("15008"), "{error}");
        drop(squatter);
        open_listeners(&netns, &exclusive).unwrap();
    }

    #[tokio::test]
    async fn dns_listens_on_loopback_only_marked_over_both_transports_and_both_families_where_there_are_two() {
        let netns = namespace();
        let dns = open_listeners(&netns, &Config::default()).unwrap().dns.unwrap();
        let udp: Vec<String> = dns.udp.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect();
        let tcp: Vec<String> = dns.tcp.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect();
        assert_eq!((udp, tcp), (vec!["127.0.0.1:15053".to_owned(), "[::1]:15053".to_owned()], vec!["127.0.0.1:15053".into(), "[::1]:15053".into()]));
        for socket in dns.udp.iter().map(SockRef::from).chain(dns.tcp.iter().map(SockRef::from)) {
            assert_eq!((socket.mark().unwrap(), socket.reuse_port().unwrap()), (PACKET_MARK, true));
        }
        drop(dns);
        let count = |config: &Config| open_listeners(&netns, config).unwrap().dns.map(|dns| (dns.udp.len(), dns.tcp.len()));
        assert_eq!(count(&Config { ipv6: false, ..Config::default() }), Some((1, 1)));
        let at = |dns| Config { services: Services { dns, ..Services::default() }, ..Config::default() };
        assert_eq!(count(&at(None)), None);
        assert_eq!(count(&at(Some(DnsAddress::At("127.0.0.2:5353".parse().unwrap())))), Some((1, 1)));
        netns.run(|| std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1")).unwrap().unwrap();
        assert_eq!(count(&Config::default()), Some((1, 1)));
        let squatter = netns.run(|| UdpSocket::bind("127.0.0.1:15053")).unwrap().unwrap();
        let error = open_listeners(&netns, &Config::default()).unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:15053 (UDP)"), "{error}");
        drop(squatter);
        // A namespace whose loopback is not up yet.
        let dns = open_listeners(&NetNs::create().unwrap(), &Config::default()).unwrap().dns.unwrap();
        assert!(!dns.udp.is_empty() && !dns.tcp.is_empty());
    }

    #[tokio::test]
    async fn socks_is_served_only_if_it_is_asked_for_on_ipv4_loopback_marked() {
        let netns = namespace();
        assert!(open_listeners(&netns, &Config::default()).unwrap().socks.is_none());
        let config = Config { services: Services { socks: true, ..Services::default() }, ..Config::default() };
        let socks = open_listeners(&netns, &config).unwrap().socks.unwrap();
        assert_eq!(socks.local_addr().unwrap().to_string(), "127.0.0.1:15080");
        let socket = SockRef::from(&socks);
        assert_eq!((socket.mark().unwrap(), socket.reuse_port().unwrap()), (PACKET_MARK, true));
        drop(socks);
        let squatter = netns.run(|| std::net::TcpListener::bind("127.0.0.1:15080")).unwrap().unwrap();
        let error = open_listeners(&netns, &config).unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:15080"), "{error}");
        drop(squatter);
        // A namespace whose loopback is not up yet.
        assert!(open_listeners(&NetNs::create().unwrap(), &config).unwrap().socks.is_some());
    }

    #[tokio::test]
    async fn with_port_reuse_a_successor_binds_beside_us_and_without_it_does_not() {
        let netns = namespace();
        let first = open_listeners(&netns, &Config::default()).unwrap();
        let _second = open_listeners(&netns, &Config::default()).unwrap();
        drop(first);
        let other = namespace();
        let exclusive = Config { port_reuse: false, ..Config::default() };
        let first = open_listeners(&other, &exclusive).unwrap();
        assert!(!SockRef::from(&first.outbound).reuse_port().unwrap());
        assert_eq!(open_listeners(&other, &exclusive).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
