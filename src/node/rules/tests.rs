#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use super::*;
use crate::sys::socket::{DialOptions, ListenOptions, dial_socket, listen_tcp, original_destination, wildcard};

/// Everything between the braces of one chain of a script.
fn chain_of(config: &RulesConfig, name: &str) -> String {
    let script = script(config).unwrap();
    let Some((_, rest)) = script.split_once(&format!("chain {name} {{\n")) else { return String::new() };
    let lines = rest.split("    }\n").next().unwrap().lines().map(str::trim);
    lines.map(|line| format!("{line}\n")).collect()
}

const DEFAULT: &str = r#"# Emptied and filled in one transaction. Sockets of the proxy carry the mark 0x539.
add table inet culvert
flush table inet culvert
table inet culvert {
    chain raw_prerouting {
        type filter hook prerouting priority -300; policy accept;
        udp sport 53 meta mark & 0xfff != 0x539 counter ct zone set 1 comment "answers to the proxy's own DNS queries"
    }
    chain raw_output {
        type filter hook output priority -300; policy accept;
        udp dport 53 meta mark & 0xfff == 0x539 counter ct zone set 1 comment "the proxy's own DNS queries, apart from the pod's"
        meta l4proto tcp meta mark & 0x1fff == 0x1539 counter ct original zone set 2 comment "borrowed addresses, apart from their owners"
    }
    chain mangle_prerouting {
        type filter hook prerouting priority -150; policy accept;
        meta mark & 0xfff == 0x539 counter ct mark set ct mark & 0xfffff000 | 0x111 comment "remember connections from the proxy"
    }
    chain mangle_output {
        type route hook output priority -150; policy accept;
        meta mark & 0xfff != 0x539 ct mark & 0xfff == 0x111 counter meta mark set ct mark comment "answers to the proxy: the route of table 100"
    }
    chain nat_prerouting {
        type nat hook prerouting priority -100; policy accept;
        ip saddr 169.254.7.127 meta l4proto tcp counter accept comment "probes of the kubelet reach the application"
        ip6 saddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff meta l4proto tcp counter accept comment "probes of the kubelet reach the application"
        ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006 comment "inbound plaintext"
        ip6 daddr != ::1 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006 comment "inbound plaintext"
    }
    chain nat_output {
        type nat hook output priority -100; policy accept;
        ip daddr 169.254.7.127 meta l4proto tcp counter accept comment "answers to probes"
        ip6 daddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff meta l4proto tcp counter accept comment "answers to probes"
        oifname != "lo" udp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053 comment "DNS over UDP"
        ip daddr != 127.0.0.1 tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053 comment "DNS over TCP"
        ip6 daddr != ::1 tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053 comment "DNS over TCP"
        meta l4proto tcp meta mark & 0xfff == 0x111 counter accept comment "answers to the proxy"
        oifname "lo" ip daddr != 127.0.0.1 counter accept comment "the pod calls itself"
        oifname "lo" ip6 daddr != ::1 counter accept comment "the pod calls itself"
        ip daddr != 127.0.0.1 meta l4proto tcp meta mark & 0xfff != 0x539 counter redirect to :15001 comment "outbound"
        ip6 daddr != ::1 meta l4proto tcp meta mark & 0xfff != 0x539 counter redirect to :15001 comment "outbound"
    }
}
"#;

#[test]
fn the_default_rules_are_this_text() {
    assert_eq!(script(&RulesConfig::default()).unwrap(), DEFAULT);
}

#[test]
fn without_ipv6_the_text_is_the_same_minus_its_ipv6_lines() {
    let expected: String = DEFAULT.lines().filter(|line| !line.contains("ip6 ")).map(|line| format!("{line}\n")).collect();
    assert_eq!(script(&RulesConfig { ipv6: false, ..RulesConfig::default() }).unwrap(), expected);
}

#[test]
fn dns_capture_adds_redirects_before_the_outbound_ones_and_a_connection_tracking_zone() {
    let config = RulesConfig { dns_capture: true, ipv6: false, ..RulesConfig::default() };
    assert_eq!(
        chain_of(&config, "raw_prerouting"),
        "type filter hook prerouting priority -300; policy accept;\n\
         udp sport 53 meta mark & 0xfff != 0x539 counter ct zone set 1 comment \"answers to the proxy's own DNS queries\"\n"
    );
    assert_eq!(
        chain_of(&config, "raw_output"),
        "type filter hook output priority -300; policy accept;\n\
         udp dport 53 meta mark & 0xfff == 0x539 counter ct zone set 1 comment \"the proxy's own DNS queries, apart from the pod's\"\n\
         meta l4proto tcp meta mark & 0x1fff == 0x1539 counter ct original zone set 2 comment \"borrowed addresses, apart from their owners\"\n"
    );
    assert_eq!(
        chain_of(&config, "nat_output"),
        "type nat hook output priority -100; policy accept;\n\
         ip daddr 169.254.7.127 meta l4proto tcp counter accept comment \"answers to probes\"\n\
         oifname != \"lo\" udp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053 comment \"DNS over UDP\"\n\
         ip daddr != 127.0.0.1 tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053 comment \"DNS over TCP\"\n\
         meta l4proto tcp meta mark & 0xfff == 0x111 counter accept comment \"answers to the proxy\"\n\
         oifname \"lo\" ip daddr != 127.0.0.1 counter accept comment \"the pod calls itself\"\n\
         ip daddr != 127.0.0.1 meta l4proto tcp meta mark & 0xfff != 0x539 counter redirect to :15001 comment \"outbound\"\n"
    );
}

#[test]
fn bypassing_inbound_leaves_out_probe_and_plaintext_rules_and_nothing_else() {
    let config = RulesConfig { bypass_inbound: true, ..RulesConfig::default() };
    assert_eq!(chain_of(&config, "nat_prerouting"), "type nat hook prerouting priority -100; policy accept;\n");
    for chain in ["nat_output", "mangle_prerouting", "mangle_output"] {
        assert_eq!(chain_of(&config, chain), chain_of(&RulesConfig::default(), chain));
    }
}

#[test]
fn rerouted_interfaces_come_first_and_their_traffic_is_outbound() {
    let config = RulesConfig { rerouted_interfaces: vec!["tap0".into(), "tap1".into()], bypass_inbound: true, ..RulesConfig::default() };
    assert_eq!(
        chain_of(&config, "nat_prerouting"),
        "type nat hook prerouting priority -100; policy accept;\n\
         iifname \"tap0\" meta l4proto tcp counter redirect to :15001 comment \"traffic of a virtual machine is outbound\"\n\
         iifname \"tap1\" meta l4proto tcp counter redirect to :15001 comment \"traffic of a virtual machine is outbound\"\n"
    );
}

#[test]
fn other_probe_addresses_replace_the_usual_ones() {
    let config = RulesConfig { probe_ipv4: Ipv4Addr::new(10, 9, 8, 7), probe_ipv6: "fd00::7".parse().unwrap(), ..RulesConfig::default() };
    let expected = DEFAULT.replace("169.254.7.127", "10.9.8.7").replace("fd16:9254:7127:1337:ffff:ffff:ffff:ffff", "fd00::7");
    assert_eq!(script(&config).unwrap(), expected);
}

#[test]
fn an_interface_name_cannot_smuggle_rules_in() {
    for name in ["", "a b", "x\" accept\n", "sixteen-letters-", "a;b"] {
        let config = RulesConfig { rerouted_interfaces: vec![name.into()], ..RulesConfig::default() };
        assert!(matches!(script(&config), Err(RulesError::InterfaceName(_))), "{name:?}");
    }
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A pod at 10.1.0.1 and fd01::1, and a neighbour at .2 and ::2, joined by a veth pair.
fn pod_and_neighbour() -> (NetNs, NetNs) {
    let (pod, neighbour) = (NetNs::create().unwrap(), NetNs::create().unwrap());
    // The other end is made here and pushed through /proc: the neighbour has no name. A thread stays in it meanwhile.
    let (id_sender, id) = std::sync::mpsc::channel();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let inside = neighbour.clone();
    let resident = std::thread::spawn(move || {
        inside
            .run(|| {
                id_sender.send(nix::unistd::gettid()).unwrap();
                let _ = wait.recv();
                sh("ip link set lo up; ip addr add 10.1.0.2/24 dev eth0; ip -6 addr add fd01::2/64 dev eth0 nodad; ip link set eth0 up");
            })
            .unwrap();
    });
    let thread = id.recv().unwrap();
    pod.run(|| {
        sh(&format!("ip link set lo up; ip link add eth0 type veth peer name eth0 netns {thread}"));
        sh("ip addr add 10.1.0.1/24 dev eth0; ip -6 addr add fd01::1/64 dev eth0 nodad; ip link set eth0 up");
    })
    .unwrap();
    done.send(()).unwrap();
    resident.join().unwrap();
    (pod, neighbour)
}

fn listen(netns: &NetNs, port: u16) -> TcpListener {
    let options = ListenOptions { mark: Some(0x539), ..ListenOptions::default() };
    let listener = netns.run(|| listen_tcp(wildcard(port, true), &options)).unwrap().unwrap();
    listener.socket.set_nonblocking(false).unwrap();
    listener.socket
}

fn connect(netns: &NetNs, target: &str) -> io::Result<TcpStream> {
    let target: SocketAddr = target.parse().unwrap();
    netns.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(5))).unwrap()
}

/// Connects, accepts on `listener`, and says where the client wanted to go.
fn arrives(from: &NetNs, target: &str, listener: &TcpListener) -> String {
    let _client = connect(from, target).unwrap_or_else(|error| panic!("{target}: {error}"));
    original_destination(&listener.accept().unwrap().0).unwrap().to_string()
}

#[test]
fn traffic_of_both_families_goes_where_the_table_says() {
    let (pod, neighbour) = pod_and_neighbour();
    let [outbound, plaintext, hbone] = [15001, 15006, 15008].map(|port| listen(&pod, port));
    let application = listen(&pod, 8080);
    let peer = listen(&neighbour, 9090);
    install(&pod, &RulesConfig::default()).unwrap();

    for (own, other, loopback) in [("10.1.0.1", "10.1.0.2", "127.0.0.1"), ("[fd01::1]", "[fd01::2]", "[::1]")] {
        assert_eq!(arrives(&pod, &format!("{other}:9090"), &outbound), format!("{other}:9090"), "outbound is captured");
        assert_eq!(arrives(&neighbour, &format!("{own}:8080"), &plaintext), format!("{own}:8080"), "inbound is captured");
        assert_eq!(arrives(&neighbour, &format!("{own}:15008"), &hbone), format!("{own}:15008"), "tunnels are not redirected");
        assert_eq!(arrives(&pod, &format!("{own}:8080"), &application), format!("{own}:8080"), "the pod's own address is not captured");
        assert_eq!(arrives(&pod, &format!("{loopback}:8080"), &application), format!("{loopback}:8080"), "loopback is not captured");
        // A marked socket, as the proxy's are, leaves the pod untouched.
        let target: SocketAddr = format!("{other}:9090").parse().unwrap();
        let marked = DialOptions { mark: Some(0x539), ..DialOptions::default() };
        let (socket, _) = pod.run(|| dial_socket(target, None, &marked)).unwrap().unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.connect_timeout(&target.into(), Duration::from_secs(5)).unwrap();
        peer.accept().unwrap();
    }
}

#[test]
fn a_borrowed_source_address_gets_its_answers_back() {
    let (pod, neighbour) = pod_and_neighbour();
    let application = listen(&pod, 8080);
    // The application's own sockets carry no mark.
    socket2::SockRef::from(&application).set_mark(0).unwrap();
    install(&pod, &RulesConfig::default()).unwrap();
    let cases = [("10.1.0.1:8080", "10.1.0.2:1", 0x1539), ("[fd01::1]:8080", "[fd01::2]:1", 0x1539), ("10.1.0.1:8080", "10.1.0.2:1", 0x539)];
    for (own, foreign, mark) in cases {
        let (target, source): (SocketAddr, SocketAddr) = (own.parse().unwrap(), foreign.parse().unwrap());
        let marked = DialOptions { borrowed_mark: Some(mark), ..DialOptions::default() };
        let (socket, spoofed) = pod.run(|| dial_socket(target, Some(source), &marked)).unwrap().unwrap();
        assert!(spoofed);
        socket.set_nonblocking(false).unwrap();
        socket.connect_timeout(&target.into(), Duration::from_secs(5)).unwrap();
        let (_, seen) = application.accept().unwrap();
        assert_eq!(seen.ip().to_canonical(), source.ip(), "the application sees the client's address");
    }

    remove(&pod).unwrap();
    let (target, source): (SocketAddr, SocketAddr) = ("10.1.0.1:8080".parse().unwrap(), "10.1.0.2:1".parse().unwrap());
    let (socket, _) = pod.run(|| dial_socket(target, Some(source), &DialOptions::default())).unwrap().unwrap();
    socket.set_nonblocking(false).unwrap();
    assert!(socket.connect_timeout(&target.into(), Duration::from_millis(300)).is_err(), "without the rules its answers go to the neighbour");
    drop(neighbour);
}

#[test]
fn the_owner_of_a_borrowed_address_and_the_proxy_use_the_same_port_at_once() {
    let (pod, neighbour) = pod_and_neighbour();
    let plaintext = listen(&pod, 15006);
    let application = listen(&pod, 8080);
    socket2::SockRef::from(&application).set_mark(0).unwrap();
    install(&pod, &RulesConfig::default()).unwrap();
    // Both kernels can choose this port only.
    for netns in [&pod, &neighbour] {
        netns.run(|| sh("echo 4321 4321 >/proc/sys/net/ipv4/ip_local_port_range")).unwrap();
    }
    let speak = |from: &TcpStream, to: &TcpStream| {
        to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        { from }.write_all(b"through").unwrap();
        { to }.read_exact(&mut [0; 7]).unwrap();
    };
    for (own, foreign) in [("10.1.0.1:8080", "10.1.0.2:4321"), ("[fd01::1]:8080", "[fd01::2]:4321")] {
        let (target, owner): (SocketAddr, SocketAddr) = (own.parse().unwrap(), foreign.parse().unwrap());
        let owners = || {
            let near = connect(&neighbour, own).unwrap();
            (near, plaintext.accept().unwrap())
        };
        let proxys = || {
            let options = DialOptions { mark: Some(0x539), borrowed_mark: Some(0x1539), ..DialOptions::default() };
            let (socket, _) = pod.run(|| dial_socket(target, Some(owner), &options)).unwrap().unwrap();
            socket.set_nonblocking(false).unwrap();
            socket.connect_timeout(&target.into(), Duration::from_secs(5)).unwrap();
            (TcpStream::from(socket), application.accept().unwrap())
        };
        for owner_is_first in [true, false] {
            let connections = if owner_is_first { [owners(), proxys()] } else { [proxys(), owners()] };
            for (near, (far, seen)) in connections {
                assert_eq!((seen.ip().to_canonical(), seen.port()), (owner.ip(), owner.port()));
                speak(&near, &far);
                speak(&far, &near);
                // No TIME_WAIT, which would keep the port from the next round.
                socket2::SockRef::from(&near).set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
    }
}

#[test]
fn probes_of_the_kubelet_reach_the_application_and_not_the_proxy() {
    let (pod, neighbour) = pod_and_neighbour();
    let application = listen(&pod, 8080);
    let config = RulesConfig { probe_ipv4: Ipv4Addr::new(10, 1, 0, 2), probe_ipv6: "fd01::2".parse().unwrap(), ..RulesConfig::default() };
    install(&pod, &config).unwrap();
    for own in ["10.1.0.1:8080", "[fd01::1]:8080"] {
        assert_eq!(arrives(&neighbour, own, &application), own);
    }
}

#[test]
fn a_bypassed_pod_gets_its_inbound_connections_itself() {
    let (pod, neighbour) = pod_and_neighbour();
    let (application, outbound) = (listen(&pod, 8080), listen(&pod, 15001));
    install(&pod, &RulesConfig { bypass_inbound: true, ..RulesConfig::default() }).unwrap();
    assert_eq!(arrives(&neighbour, "10.1.0.1:8080", &application), "10.1.0.1:8080");
    assert_eq!(arrives(&pod, "10.1.0.2:9090", &outbound), "10.1.0.2:9090");
}

#[test]
fn installing_again_replaces_the_rules_and_removing_leaves_nothing() {
    let pod = NetNs::create().unwrap();
    let state = || pod.run(|| sh("nft list ruleset; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all")).unwrap();
    pod.run(|| sh("ip link set lo up")).unwrap();
    let before = state();
    install(&pod, &RulesConfig { rerouted_interfaces: vec!["tap0".into()], ..RulesConfig::default() }).unwrap();
    assert!(state().contains("tap0") && state().contains("15053"));
    let without_dns = RulesConfig { dns_capture: false, ..RulesConfig::default() };
    install(&pod, &without_dns).unwrap();
    let once = state();
    assert!(!once.contains("tap0") && !once.contains("15053"), "{once}");
    install(&pod, &without_dns).unwrap();
    assert_eq!(state(), once);
    remove(&pod).unwrap();
    remove(&pod).unwrap();
    assert_eq!(state(), before);
}

#[test]
fn what_is_installed_can_be_read_back() {
    let pod = NetNs::create().unwrap();
    pod.run(|| sh("ip link set lo up")).unwrap();
    install(&pod, &RulesConfig::default()).unwrap();
    let listed = pod.run(|| nft::list_json(TABLE)).unwrap().unwrap().expect("the table exists");
    let comments: Vec<&str> = listed["nftables"].as_array().unwrap().iter().filter_map(|entry| entry["rule"]["comment"].as_str()).collect();
    assert_eq!(comments.len(), DEFAULT.matches("comment").count());
}

#[test]
fn without_rules_nothing_is_captured() {
    let (pod, neighbour) = pod_and_neighbour();
    install(&pod, &RulesConfig::default()).unwrap();
    let refused = connect(&pod, "10.1.0.2:9090").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "captured, and nobody listens on 15001");
    remove(&pod).unwrap();
    let peer = listen(&neighbour, 9090);
    assert_eq!(arrives(&pod, "10.1.0.2:9090", &peer), "10.1.0.2:9090");
}
