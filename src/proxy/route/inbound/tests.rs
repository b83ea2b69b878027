#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::super::tests::{backing, behind, gateway, gateway_named, key, pod, ports, service, snapshot, socket, with, with_waypoint};
use super::*;
use crate::model::{ApplicationTunnel, NetworkAddress, Visibility, WeightedWaypoint};

fn tunnelled(workload: Workload, protocol: ApplicationProtocol, port: Option<u16>) -> Workload {
    with(workload, |profile| profile.application_tunnel = Some(ApplicationTunnel { protocol, port }))
}

/// What becomes of a CONNECT that reached the pod at 10.0.0.1.
fn connect(snapshot: &Snapshot, workload: &Workload, authority: &str) -> Result<SocketAddr, RouteError> {
    target(snapshot, workload, authority).map(|target| target.address)
}

fn target(snapshot: &Snapshot, workload: &Workload, authority: &str) -> Result<Target, RouteError> {
    let authority = authority.parse().unwrap();
    validate(snapshot, &RouteConfig::default(), workload, &authority, socket("10.0.0.1:15008"))?.resolve()
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
    let config = RouteConfig::default();
    assert!(validate(&rows, &config, &server, &authority, socket("[2001:db8::1]:15008")).is_ok());
    assert!(validate(&rows, &config, &server, &mapped, socket("[::ffff:10.0.0.1]:15008")).is_ok());
}

#[test]
fn an_address_is_accepted_for_whatever_has_this_pod_as_its_waypoint_and_for_nothing_else() {
    let way = backing(pod("way", &["10.0.0.1"]), "way.x", &[]);
    let weighted = |weight| {
        let weighted_waypoints = vec![
            WeightedWaypoint { destination: gateway("10.0.0.77"), weight: 1 },
            WeightedWaypoint { destination: gateway_named("way.x", 15008), weight },
        ];
        Service { weighted_waypoints, ..service("w", &["10.1.0.4"], &[]) }
    };
    let rows = snapshot(
        [
            way.clone(),
            backing(pod("sibling", &["10.0.0.6"]), "way.x", &[]),
            behind(pod("by-address", &["10.0.0.2"]), gateway("10.0.0.1")),
            behind(pod("by-vip", &["10.0.0.3"]), gateway("10.1.0.9")),
            behind(pod("by-name", &["10.0.0.4"]), gateway_named("way.x", 15008)),
            behind(pod("of-another", &["10.0.0.5"]), gateway("10.0.0.77")),
            behind(pod("of-a-sibling", &["10.0.0.7"]), gateway("10.0.0.6")),
            behind(pod("of-nobody", &["10.0.0.8"]), gateway_named("gone.x", 15008)),
            pod("free", &["10.0.0.9"]),
        ],
        [
            service("way.x", &["10.1.0.9"], &[(15008, 15008)]),
            with_waypoint(service("s", &["10.1.0.1"], &[]), gateway_named("way.x", 15008)),
            with_waypoint(service("t", &["10.1.0.2"], &[]), gateway("10.0.0.77")),
            service("free.x", &["10.1.0.3"], &[]),
            weighted(0),
        ],
    );
    for (authority, accepted) in [
        ("10.0.0.2:80", true),
        ("[::ffff:10.0.0.2]:80", true),
        ("10.0.0.3:80", true),
        ("10.0.0.4:80", true),
        ("10.1.0.1:80", true),
        ("10.1.0.4:80", true),
        ("10.0.0.5:80", false),
        ("10.0.0.7:80", false),
        ("10.0.0.8:80", false),
        ("10.0.0.9:80", false),
        ("10.1.0.2:80", false),
        ("10.1.0.3:80", false),
        // Its own service is not behind it, and nobody knows this one.
        ("10.1.0.9:80", false),
        ("192.0.2.1:80", false),
    ] {
        let outcome = connect(&rows, &way, authority);
        if accepted {
            assert_eq!(outcome, Ok(socket("10.0.0.1:80")), "{authority}");
        } else {
            assert!(matches!(outcome, Err(RouteError::IpMismatch { .. })), "{authority}: {outcome:?}");
        }
    }
}

#[test]
fn a_workload_with_an_application_tunnel_takes_any_address_at_its_own() {
    let rows = snapshot([], []);
    let server = || pod("server", &["10.0.0.1"]);
    let kept = tunnelled(server(), ApplicationProtocol::None, None);
    assert_eq!(connect(&rows, &kept, "10.9.9.9:80"), Ok(socket("10.0.0.1:80")));
    let moved = tunnelled(server(), ApplicationProtocol::None, Some(15088));
    assert_eq!(target(&rows, &moved, "10.9.9.9:80"), Ok(Target { address: socket("10.0.0.1:15088"), announce: None }));
    assert!(matches!(connect(&rows, &moved, "10.9.9.9:15008"), Err(RouteError::RecursiveCall(_))), "refused before the override");
    let told = tunnelled(server(), ApplicationProtocol::Proxy, Some(15088));
    let announced = |address, announce| Ok(Target { address: socket(address), announce: Some(socket(announce)) });
    assert_eq!(target(&rows, &told, "10.9.9.9:80"), announced("10.0.0.1:15088", "10.9.9.9:80"));
    assert_eq!(target(&rows, &told, "[2001:db8::9]:80"), announced("10.0.0.1:15088", "[2001:db8::9]:80"));
    let told = tunnelled(server(), ApplicationProtocol::Proxy, None);
    assert_eq!(target(&rows, &told, "10.9.9.9:80"), announced("10.0.0.1:80", "10.9.9.9:80"));
}

#[test]
fn a_service_that_was_asked_for_by_name_is_announced_by_an_address_of_this_network_and_ipv4_first() {
    let on = |network: &str, ip: &str| NetworkAddress { network: network.into(), ip: ip.parse().unwrap() };
    let of = |vips: Vec<NetworkAddress>, pairs: &[(u16, u16)]| Service { vips, ..service("web.x", &[], pairs) };
    let told = tunnelled(pod("way", &["10.0.0.1"]), ApplicationProtocol::Proxy, Some(15088));
    for (vips, expected) in [
        (vec![on("", "2001:db8::1"), on("", "10.1.0.1"), on("far", "10.1.0.2")], "10.1.0.1:80"),
        (vec![on("far", "10.1.0.2"), on("", "2001:db8::1")], "[2001:db8::1]:80"),
        (vec![on("far", "2001:db8::1"), on("far", "10.1.0.2")], "10.1.0.2:80"),
    ] {
        // The port of a service that it does not back need not lead anywhere on a waypoint.
        let rows = snapshot([], [of(vips, &[(80, 0)])]);
        let expected = Target { address: socket("10.0.0.1:15088"), announce: Some(socket(expected)) };
        assert_eq!(target(&rows, &told, "web.x:80"), Ok(expected));
    }
    let rows = snapshot([], [of(vec![], &[(80, 8080)])]);
    assert_eq!(target(&rows, &told, "web.x:80"), Err(RouteError::NoAddress("default/web.x".into())));
    assert!(matches!(target(&rows, &told, "web.x:81"), Err(RouteError::ServicePort { port: 81, .. })));
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
