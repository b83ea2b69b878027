#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::super::tests::{backing, ip, key, pod, ports, service, snapshot, socket, with};
use super::*;
use crate::model::{ApplicationTunnel, GatewayAddress, GatewayDestination, NetworkAddress, Visibility};

fn tunnelled(workload: Workload, protocol: ApplicationProtocol, port: Option<u16>) -> Workload {
    with(workload, |profile| profile.application_tunnel = Some(ApplicationTunnel { protocol, port }))
}

/// What becomes of a CONNECT that reached the pod at 10.0.0.1.
fn connect(snapshot: &Snapshot, workload: &Workload, authority: &str) -> Result<SocketAddr, RouteError> {
    let authority = authority.parse().unwrap();
    validate(workload, &authority, socket("10.0.0.1:15008"))?.resolve(snapshot, &RouteConfig::default())
}

#[test]
fn an_address_must_be_the_one_that_the_peer_connected_to() {
    let rows = snapshot([], []);
    let server = pod("server", &["10.0.0.1", "2001:db8::1"]);
    assert_eq!(connect(&rows, &server, "10.0.0.1:80"), Ok(socket("10.0.0.1:80")));
    assert_eq!(connect(&rows, &server, "[::ffff:10.0.0.1]:80"), Ok(socket("10.0.0.1:80")));
    for (authority, requested) in [("10.0.0.2:80", "10.0.0.2"), ("[2001:db8::1]:80", "2001:db8::1"), ("127.0.0.1:80", "127.0.0.1")] {
        assert_eq!(connect(&rows, &server, authority).unwrap_err().to_string(), format!("ip mismatch: 10.0.0.1 != {requested}"));
    }
    let authority = "[2001:db8::1]:80".parse().unwrap();
    let mapped = "10.0.0.1:80".parse().unwrap();
    assert!(validate(&server, &authority, socket("[2001:db8::1]:15008")).is_ok());
    assert!(validate(&server, &mapped, socket("[::ffff:10.0.0.1]:15008")).is_ok());
}

#[test]
fn an_address_is_not_accepted_for_another_workload_even_if_this_one_is_its_waypoint() {
    let destination = GatewayDestination::Address(NetworkAddress { network: "".into(), ip: ip("10.0.0.1") });
    let behind = with(pod("behind", &["10.0.0.2"]), |profile| profile.waypoint = Some(GatewayAddress { destination, hbone_port: 15008 }));
    let rows = snapshot([behind, pod("server", &["10.0.0.1"])], []);
    assert!(matches!(connect(&rows, &pod("server", &["10.0.0.1"]), "10.0.0.2:80"), Err(RouteError::IpMismatch { .. })));
}

#[test]
fn a_workload_with_an_application_tunnel_takes_any_address_at_its_own() {
    let rows = snapshot([], []);
    let server = || pod("server", &["10.0.0.1"]);
    let kept = tunnelled(server(), ApplicationProtocol::None, None);
    assert_eq!(connect(&rows, &kept, "10.9.9.9:80"), Ok(socket("10.0.0.1:80")));
    let moved = tunnelled(server(), ApplicationProtocol::None, Some(15088));
    assert_eq!(connect(&rows, &moved, "10.9.9.9:80"), Ok(socket("10.0.0.1:15088")));
    assert!(matches!(connect(&rows, &moved, "10.9.9.9:15008"), Err(RouteError::RecursiveCall(_))), "refused before the override");
    let told = tunnelled(server(), ApplicationProtocol::Proxy, Some(15088));
    assert!(matches!(connect(&rows, &told, "10.9.9.9:80"), Err(RouteError::ProxyHeader(_))));
}

#[test]
fn a_service_port_is_this_workloads_mapping_else_the_services() {
    let elsewhere = Service { namespace: "other".into(), canonical: true, ..service("web.x", &[], &[(80, 1)]) };
    let hidden = Service { namespace: "other".into(), visibility: Visibility::Namespace, ..service("hidden.x", &[], &[(80, 1)]) };
    let services = [service("web.x", &[], &[(80, 8080), (81, 8081), (82, 0), (83, 15006)]), elsewhere, hidden];
    let server = backing(pod("server", &["10.0.0.1"]), "web.x", &[(80, 8000), (82, 8002), (84, 8004)]);
    let rows = snapshot([server.clone()], services);
    for (authority, expected) in [
        ("web.x:80", Ok("10.0.0.1:8000")),
        ("WEB.x:80", Ok("10.0.0.1:8000")),
        ("web.x:81", Ok("10.0.0.1:8081")),
        ("web.x:82", Ok("10.0.0.1:8002")),
        ("web.x:84", Ok("10.0.0.1:8004")),
        ("web.x:83", Err("recursive call: 10.0.0.1:15006 is a port of this proxy")),
        ("web.x:85", Err("service port unresolvable: port 85 of web.x has no target on this workload")),
        ("hidden.x:80", Err("no service for hostname: hidden.x")),
        ("none.x:80", Err("no service for hostname: none.x")),
        ("10.0.0.1:15001", Err("recursive call: 10.0.0.1:15001 is a port of this proxy")),
        ("10.0.0.1:15020", Ok("10.0.0.1:15020")),
    ] {
        let result = connect(&rows, &server, authority).map_err(|error| error.to_string());
        assert_eq!(result, expected.map(socket).map_err(str::to_owned), "{authority}");
    }
    let unmapped = backing(pod("server", &["10.0.0.1"]), "web.x", &[]);
    assert!(matches!(connect(&rows, &unmapped, "web.x:82"), Err(RouteError::ServicePort { port: 82, .. })), "a named port needs a mapping");
}

#[test]
fn the_forwarded_host_is_the_first_host_of_the_header() {
    for (header, expected) in [
        ("host=web.x", Some("web.x")),
        ("for=\"10.0.0.1:1234\";host=web.x", Some("web.x")),
        ("for=\"[::1]:1234\"; host=\"web.x\" ;proto=tcp", Some("web.x")),
        ("host=a;host=b", Some("a")),
        ("host=", None),
        ("host=\"\"", None),
        ("for=1.2.3.4", None),
        ("by=host=x", None),
        ("xhost=web.x", None),
        ("HOST=web.x", None),
        ("", None),
        ("host=w\u{e9}b", None),
    ] {
        assert_eq!(forwarded_host(header.as_bytes()), expected, "{header:?}");
    }
    assert_eq!(forwarded_host(b"host=\xff"), None);
}

#[test]
fn telemetry_names_the_hinted_service_if_it_is_ours_else_the_first_of_the_port() {
    let server = with(pod("server", &["10.0.0.1"]), |profile| {
        profile.services =
            vec![(key("a.x"), ports(&[(80, 8080)])), (key("b.x"), ports(&[(80, 8080), (90, 0)])), (key("staged.x"), ports(&[(1, 7000)]))];
    });
    let services =
        [service("a.x", &[], &[(80, 8080), (91, 9100)]), service("b.x", &[], &[(80, 8080), (90, 9000)]), service("other.x", &[], &[(80, 8080)])];
    let rows = snapshot([server.clone()], services);
    for (hint, port, expected) in [
        (Some("b.x"), 8080, Some("b.x")),
        (Some("b.x"), 1, Some("b.x")),
        (Some("other.x"), 8080, Some("a.x")),
        (Some("none.x"), 8080, Some("a.x")),
        (Some("staged.x"), 8080, Some("a.x")),
        (None, 8080, Some("a.x")),
        (None, 9000, Some("b.x")),
        (None, 9100, Some("a.x")),
        (None, 7000, None),
        (None, 1, None),
    ] {
        let found = intended_service(&rows, &server, hint, port).map(|service| service.hostname.to_string());
        assert_eq!(found.as_deref(), expected, "{hint:?} {port}");
    }
}
