//! Straight to the pod that serves, or to where the client wanted to go.

use super::*;

#[test]
fn a_pod_is_reached_as_it_takes_connections_wherever_it_runs() {
    let far = with(pod("far", &["10.0.0.7"]), |profile| profile.network = "elsewhere".into());
    let host = with(pod("host", &["10.0.0.5"]), |profile| profile.network_mode = NetworkMode::HostNetwork);
    check(vec![
        (
            "an unknown destination",
            vec![],
            vec![],
            vec![("192.0.2.1:80", "passthrough 192.0.2.1:80"), ("[2001:db8::1]:80", "passthrough [2001:db8::1]:80")],
        ),
        ("an address of another network is unknown", vec![far], vec![], vec![("10.0.0.7:80", "passthrough 10.0.0.7:80")]),
        ("a host-network address is unknown", vec![host], vec![], vec![("10.0.0.5:80", "passthrough 10.0.0.5:80")]),
        (
            "same node, other node, TCP, HBONE",
            vec![pod("a", &["10.0.0.1"]), remote(pod("b", &["10.0.0.2"])), plain(pod("c", &["10.0.0.3"])), remote(plain(pod("d", &["10.0.0.4"])))],
            vec![],
            vec![
                ("10.0.0.1:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:80 as a"),
                ("10.0.0.2:80", "hbone b 10.0.0.2:15008 for 10.0.0.2:80 as b"),
                ("10.0.0.3:80", "tcp c 10.0.0.3:80"),
                ("10.0.0.4:80", "tcp d 10.0.0.4:80"),
                ("[::ffff:10.0.0.1]:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:80 as a"),
            ],
        ),
        (
            "a pod of several addresses is reached by the one that was asked for",
            vec![pod("a", &["10.0.0.1", "10.0.0.2", "2001:db8::1"])],
            vec![],
            vec![
                ("10.0.0.2:80", "hbone a 10.0.0.2:15008 for 10.0.0.2:80 as a"),
                ("[2001:db8::1]:80", "hbone a [2001:db8::1]:15008 for [2001:db8::1]:80 as a"),
            ],
        ),
    ]);
}

#[test]
fn a_service_port_leads_to_the_target_port_of_its_endpoint() {
    let named = Service {
        subject_alt_names: vec!["spiffe://cluster.local/ns/x/sa/extra".into(), "extra.example.com".into()],
        ..service("n", &["10.1.0.3"], &[(80, 8080)])
    };
    check(vec![
        (
            "HBONE and TCP endpoints",
            vec![backing(pod("a", &["10.0.0.1"]), "h", &[(80, 8080), (81, 9)]), backing(plain(pod("b", &["10.0.0.2"])), "t", &[(80, 8081)])],
            vec![service("h", &["10.1.0.1"], &[(80, 8080)]), service("t", &["10.1.0.2"], &[(80, 8080)])],
            vec![
                ("10.1.0.1:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:8080 of h as a"),
                ("10.1.0.2:80", "tcp b 10.0.0.2:8081 of t"),
                ("10.1.0.1:81", "no healthy upstream: 10.1.0.1:81"),
            ],
        ),
        (
            "a pod that calls itself through its service",
            vec![backing(pod("client", &["10.0.0.9"]), "h", &[])],
            vec![service("h", &["10.1.0.1"], &[(80, 8080)])],
            vec![("10.1.0.1:80", "hbone client 10.0.0.9:15008 for 10.0.0.9:8080 of h as client")],
        ),
        (
            "names of the service that are SPIFFE names may answer too",
            vec![backing(pod("a", &["10.0.0.1"]), "n", &[])],
            vec![named],
            vec![
                ("10.1.0.3:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:8080 of n as a|extra"),
                ("10.0.0.1:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:80 as a"),
            ],
        ),
        (
            "host-network endpoints are endpoints",
            vec![backing(with(plain(pod("host", &["10.0.0.5"])), |profile| profile.network_mode = NetworkMode::HostNetwork), "h", &[])],
            vec![service("h", &["10.1.0.1"], &[(80, 8080)])],
            vec![("10.1.0.1:80", "tcp host 10.0.0.5:8080 of h")],
        ),
    ]);
}

#[test]
fn a_known_service_that_nobody_can_serve_is_an_error_and_never_a_passthrough() {
    let sick = Workload { status: HealthStatus::Unhealthy, ..backing(pod("sick", &["10.0.0.1"]), "h", &[]) };
    let range = Service { cidr_vips: vec![("".into(), "10.2.0.0/16".parse().unwrap())], ..service("r", &[], &[(80, 80)]) };
    check(vec![
        ("no endpoint", vec![], vec![service("h", &["10.1.0.1"], &[(80, 8080)])], vec![("10.1.0.1:80", "no healthy upstream: 10.1.0.1:80")]),
        ("no port", vec![], vec![service("h", &["10.1.0.1"], &[])], vec![("10.1.0.1:80", "no healthy upstream: 10.1.0.1:80")]),
        (
            "no healthy endpoint",
            vec![sick],
            vec![service("h", &["10.1.0.1"], &[(80, 8080)])],
            vec![("10.1.0.1:80", "no healthy upstream: 10.1.0.1:80")],
        ),
        ("a range", vec![], vec![range], vec![("10.2.0.1:80", "no healthy upstream: 10.2.0.1:80"), ("10.3.0.1:80", "passthrough 10.3.0.1:80")]),
        (
            "an address that is a workload's too",
            vec![pod("a", &["10.1.0.1"])],
            vec![service("h", &["10.1.0.1"], &[(80, 8080)])],
            vec![("10.1.0.1:80", "no healthy upstream: 10.1.0.1:80")],
        ),
    ]);
}

#[test]
fn a_passthrough_service_goes_to_the_original_destination_unless_it_asks_for_a_waypoint() {
    let through = balanced(service("p", &["10.1.0.1"], &[(80, 8080)]), LoadBalancingMode::Passthrough);
    let by_waypoint = Service { waypoint: Some(gateway("10.0.0.6")), ..through.clone() };
    check(vec![
        (
            "with an endpoint",
            vec![backing(pod("a", &["10.0.0.1"]), "p", &[])],
            vec![through.clone()],
            vec![("10.1.0.1:80", "passthrough 10.1.0.1:80 of p")],
        ),
        ("without", vec![], vec![through], vec![("10.1.0.1:9", "passthrough 10.1.0.1:9 of p")]),
        (
            "with a waypoint",
            vec![pod("way", &["10.0.0.6"])],
            vec![by_waypoint.clone()],
            vec![("10.1.0.1:80", "hbone way 10.0.0.6:15008 for 10.1.0.1:80 of p as way")],
        ),
        (
            "with a waypoint that is not there",
            vec![],
            vec![by_waypoint],
            vec![("10.1.0.1:80", "unknown waypoint: waypoint /10.0.0.6:15008 of default/p is neither a service nor a workload that is known here")],
        ),
    ]);
}

#[test]
fn an_endpoint_that_cannot_be_addressed_or_verified_is_an_error() {
    let vip = service("h", &["10.1.0.1"], &[(80, 8080)]);
    let unnamed = with(backing(pod("a", &["10.0.0.1"]), "h", &[]), |profile| profile.service_account = "not/an account".into());
    let by_name = Workload { hostname: "db.example".into(), ..backing(pod("db", &[]), "h", &[]) };
    let only_v6 = Service { ip_families: Some(IpFamilies::Ipv6), ..vip.clone() };
    for (workload, service, expected) in [
        (unnamed, vip.clone(), "no valid destination for workload: c//Pod/default/a: not a workload SPIFFE ID"),
        (by_name, vip, "DNS resolution produced no addresses: db.example of c//Pod/default/db was not resolved"),
        (backing(pod("a", &["10.0.0.1"]), "h", &[]), only_v6, "no valid destination for workload: c//Pod/default/a has no address that fits"),
    ] {
        let shown = shown(route(&snapshot([workload], [service]), "10.1.0.1:80"));
        assert!(shown.starts_with(expected), "{shown}");
    }
}

#[test]
fn what_is_known_by_name_only_is_reached_at_the_address_that_was_resolved_for_it() {
    let by_name =
        |name: &str, service: &str| Workload { hostname: format!("{name}.example").as_str().into(), ..backing(pod(name, &[]), service, &[]) };
    let rows = snapshot(
        [plain(by_name("db", "h")), by_name("way", "way.x")],
        [
            service("h", &["10.1.0.1"], &[(80, 5432)]),
            service("way.x", &["10.1.0.6"], &[(15008, 15008)]),
            with_waypoint(service("web", &["10.1.0.2"], &[(80, 80)]), gateway_named("way.x", 15008)),
        ],
    );
    let resolved = vec![("db.example".into(), ip("192.0.2.5")), ("way.example".into(), ip("2001:db8::6"))];
    let config = RouteConfig { resolved, ..RouteConfig::default() };
    for (destination, expected) in
        [("10.1.0.1:80", "tcp db 192.0.2.5:5432 of h"), ("10.1.0.2:80", "hbone way [2001:db8::6]:15008 for 10.1.0.2:80 of web as way")]
    {
        let routed = outbound(&rows, &config, &pod("client", &["10.0.0.9"]), socket(destination), &mut rng());
        assert_eq!(shown(routed), expected);
    }
}
