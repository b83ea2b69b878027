//! The three listening sockets of a pod.

use std::io;

use super::{Config, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, PodListeners};
use crate::sys::netns::NetNs;
use crate::sys::socket::{ListenOptions, Listener, is_unknown_family, listen_tcp, wildcard};

/// Opens the listeners of a pod inside its namespace: all three, or none.
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
    let [outbound, plaintext, hbone] = netns.run(|| {
        let open = |port, options| listen(port, config.ipv6, options);
        Ok::<_, io::Error>([open(OUTBOUND_PORT, &redirected)?, open(PLAINTEXT_PORT, &redirected)?, open(HBONE_PORT, &tunnels)?])
    })??;
    Ok(PodListeners {
        transparent: outbound.transparent && plaintext.transparent && hbone.transparent,
        outbound: tokio::net::TcpListener::from_std(outbound.socket)?,
        plaintext: tokio::net::TcpListener::from_std(plaintext.socket)?,
        hbone: tokio::net::TcpListener::from_std(hbone.socket)?,
        netns: netns.clone(),
    })
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
    use crate::pods::PACKET_MARK;

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
