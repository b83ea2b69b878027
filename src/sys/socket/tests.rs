#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use super::*;
use crate::sys::netns::NetNs;
use crate::sys::nft;

/// A fresh namespace with loopback up.
fn namespace() -> NetNs {
    let pod = NetNs::create().unwrap();
    let up = pod.run(|| Command::new("ip").args(["link", "set", "lo", "up"]).status()).unwrap().unwrap();
    assert!(up.success());
    pod
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

#[test]
fn listener_carries_mark_and_shared_port_and_accepted_sockets_inherit_the_rest() {
    namespace()
        .run(|| {
            let options =
                ListenOptions { mark: Some(0x539), reuse_port: true, user_timeout: Some(Duration::from_secs(7)), ..ListenOptions::default() };
            let listener = listen_tcp(wildcard(0, true), &options).unwrap();
            assert!(listener.transparent);
            let listening = SockRef::from(&listener.socket);
            assert_eq!(listening.mark().unwrap(), 0x539);
            assert!(listening.reuse_port().unwrap());
            assert!(listening.nonblocking().unwrap());
            let port = listener.socket.local_addr().unwrap().port();
            listener.socket.set_nonblocking(false).unwrap();
            let _client = TcpStream::connect(at("127.0.0.1", port)).unwrap();
            let (accepted, _) = listener.socket.accept().unwrap();
            let accepted = SockRef::from(&accepted);
            assert_eq!(accepted.mark().unwrap(), 0x539);
            assert!(accepted.tcp_nodelay().unwrap());
            assert!(accepted.keepalive().unwrap());
            assert_eq!(accepted.tcp_keepalive_time().unwrap(), Duration::from_secs(180));
            assert_eq!(accepted.tcp_keepalive_interval().unwrap(), Duration::from_secs(180));
            assert_eq!(accepted.tcp_keepalive_retries().unwrap(), 9);
            assert_eq!(accepted.tcp_user_timeout().unwrap(), Some(Duration::from_secs(7)));
        })
        .unwrap();
}

#[test]
fn without_keepalive_accepted_sockets_have_none() {
    namespace()
        .run(|| {
            let listener = listen_tcp(wildcard(0, false), &ListenOptions { keepalive: None, ..ListenOptions::default() }).unwrap();
            listener.socket.set_nonblocking(false).unwrap();
            let _client = TcpStream::connect(at("127.0.0.1", listener.socket.local_addr().unwrap().port())).unwrap();
            assert!(!SockRef::from(&listener.socket.accept().unwrap().0).keepalive().unwrap());
        })
        .unwrap();
}

#[test]
fn the_user_timeout_of_the_reference_is_idle_plus_all_probes() {
    assert_eq!(Keepalive::default().user_timeout(), Duration::from_secs(180 + 9 * 180));
}

#[test]
fn a_shared_port_can_be_bound_twice_and_an_exclusive_one_cannot() {
    namespace()
        .run(|| {
            let shared = ListenOptions { reuse_port: true, ..ListenOptions::default() };
            let _first = listen_tcp(wildcard(15008, true), &shared).unwrap();
            let _second = listen_tcp(wildcard(15008, true), &shared).unwrap();
            let refused = listen_tcp(wildcard(15008, true), &ListenOptions::default()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
            assert!(refused.to_string().contains("15008"), "{refused}");
        })
        .unwrap();
}

#[test]
fn the_ipv6_wildcard_takes_both_families_and_the_ipv4_one_only_its_own() {
    namespace()
        .run(|| {
            let dual = listen_tcp(wildcard(7001, true), &ListenOptions::default()).unwrap();
            for ip in ["127.0.0.1", "::1"] {
                drop(TcpStream::connect(at(ip, 7001)).unwrap());
            }
            drop(dual);
            let _v4 = listen_tcp(wildcard(7002, false), &ListenOptions::default()).unwrap();
            drop(TcpStream::connect(at("127.0.0.1", 7002)).unwrap());
            assert!(TcpStream::connect(at("::1", 7002)).is_err());
        })
        .unwrap();
}

#[test]
fn transparency_is_never_taken_unasked() {
    namespace()
        .run(|| {
            let listener = listen_tcp(wildcard(0, true), &ListenOptions { transparent: Transparency::Never, ..ListenOptions::default() }).unwrap();
            assert!(!listener.transparent);
            assert!(!SockRef::from(&listener.socket).ip_transparent_v6().unwrap());
        })
        .unwrap();
}

#[test]
fn original_destination_is_the_address_before_redirection_for_both_families() {
    namespace()
        .run(|| {
            nft::apply("table inet t { chain o { type nat hook output priority -100; policy accept; tcp dport 4444 redirect to :15001\n }\n }")
                .unwrap();
            let ip = Command::new("sh").args(["-c", "ip a add 10.9.9.9/32 dev lo && ip -6 a add fd00::9/128 dev lo nodad"]).status().unwrap();
            assert!(ip.success());
            let listener = listen_tcp(wildcard(15001, true), &ListenOptions::default()).unwrap();
            listener.socket.set_nonblocking(false).unwrap();
            for target in [at("10.9.9.9", 4444), at("fd00::9", 4444)] {
                let _client = TcpStream::connect(target).unwrap();
                let (accepted, _) = listener.socket.accept().unwrap();
                assert_eq!(accepted.local_addr().unwrap().port(), 15001);
                assert_eq!(original_destination(&accepted).unwrap(), target);
            }
        })
        .unwrap();
}

#[test]
fn original_destination_of_an_unredirected_connection_is_the_local_address_and_canonical() {
    namespace()
        .run(|| {
            let listener = listen_tcp(wildcard(7003, true), &ListenOptions::default()).unwrap();
            listener.socket.set_nonblocking(false).unwrap();
            for target in [at("127.0.0.1", 7003), at("::1", 7003)] {
                let _client = TcpStream::connect(target).unwrap();
                assert_eq!(original_destination(&listener.socket.accept().unwrap().0).unwrap(), target);
            }
        })
        .unwrap();
}

#[test]
fn a_foreign_source_is_taken_without_a_port_of_ours() {
    namespace()
        .run(|| {
            for (target, source) in [(at("10.0.0.1", 80), at("10.0.0.2", 4321)), (at("fd00::1", 80), at("fd00::2", 4321))] {
                let (socket, spoofed) =
                    dial_socket(target, Some(source), &DialOptions { mark: Some(0x539), borrowed_mark: Some(0x1539), ..DialOptions::default() })
                        .unwrap();
                assert!(spoofed);
                let local = socket.local_addr().unwrap().as_socket().unwrap();
                assert_eq!((local.ip(), local.port()), (source.ip(), 0), "the port is picked at connect time");
                assert_eq!(socket.mark().unwrap(), 0x1539);
                assert!(socket.nonblocking().unwrap() && socket.tcp_nodelay().unwrap());
            }
        })
        .unwrap();
}

#[test]
fn no_spoofing_without_a_source_or_to_oneself_or_across_families() {
    for source in [None, Some(at("10.0.0.1", 9)), Some(at("::ffff:10.0.0.1", 9)), Some(at("fd00::2", 9))] {
        let (socket, spoofed) = dial_socket(at("10.0.0.1", 80), source, &DialOptions::default()).unwrap();
        assert!(!spoofed, "{source:?}");
        assert!(!SockRef::from(&socket).ip_transparent_v4().unwrap());
    }
}

#[test]
fn a_mapped_target_and_source_are_dialled_as_ipv4() {
    let (socket, spoofed) = dial_socket(at("::ffff:10.0.0.1", 80), Some(at("::ffff:10.0.0.2", 1)), &DialOptions::default()).unwrap();
    assert!(spoofed);
    assert_eq!(socket.domain().unwrap(), Domain::IPV4);
}

#[test]
fn reset_on_close_sends_a_reset_instead_of_an_end() {
    namespace()
        .run(|| {
            let listener = listen_tcp(wildcard(7004, false), &ListenOptions::default()).unwrap();
            listener.socket.set_nonblocking(false).unwrap();
            let mut client = TcpStream::connect(at("127.0.0.1", 7004)).unwrap();
            client.write_all(b"x").unwrap();
            let (mut accepted, _) = listener.socket.accept().unwrap();
            accepted.read_exact(&mut [0]).unwrap();
            reset_on_close(&accepted).unwrap();
            drop(accepted);
            assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        })
        .unwrap();
}

#[test]
fn this_process_may_mark() {
    check_may_mark(0x539).unwrap();
}
