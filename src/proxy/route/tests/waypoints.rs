//! To a waypoint.

use super::*;

#[test]
fn a_service_with_a_waypoint_is_reached_by_it_under_the_address_that_was_asked_for() {
    let web = || service("web", &["10.1.0.1", "2001:db8:1::1"], &[(80, 8080)]);
    let endpoint = || backing(pod("a", &["10.0.0.1"]), "web", &[]);
    let names = vec!["spiffe://cluster.local/ns/default/sa/further".into()];
    let way = || Service { subject_alt_names: names.clone(), ..service("way.x", &["10.1.0.6"], &[(15008, 15008)]) };
    let instance = || backing(pod("way", &["10.0.0.6", "2001:db8::6"]), "way.x", &[]);
    let by_name = || Workload { hostname: "lone.x".into(), ..pod("lone", &["10.0.0.5", "2001:db8::5"]) };
    check(vec![
        (
            "by the address of a workload, whose family decides",
            vec![endpoint(), instance()],
            vec![with_waypoint(web(), gateway("10.0.0.6"))],
            vec![
                ("10.1.0.1:80", "hbone way 10.0.0.6:15008 for 10.1.0.1:80 of web as way"),
                ("[2001:db8:1::1]:80", "hbone way 10.0.0.6:15008 for [2001:db8:1::1]:80 of web as way"),
                ("10.0.0.1:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:80 as a"),
            ],
        ),
        (
            "by the address of a service, with the names of that service",
            vec![endpoint(), instance()],
            vec![with_waypoint(web(), gateway("10.1.0.6")), way()],
            vec![("10.1.0.1:80", "hbone way 10.0.0.6:15008 for 10.1.0.1:80 of web as way|further")],
        ),
        (
            "by the host name of a service, whose target port is used, in the family of the client",
            vec![endpoint(), instance()],
            vec![with_waypoint(web(), gateway_named("way.x", 15010)), service("way.x", &[], &[(15010, 15011)])],
            vec![
                ("10.1.0.1:80", "hbone way 10.0.0.6:15011 for 10.1.0.1:80 of web as way"),
                ("[2001:db8:1::1]:80", "hbone way [2001:db8::6]:15011 for [2001:db8:1::1]:80 of web as way"),
            ],
        ),
        (
            "by the host name of a workload",
            vec![endpoint(), by_name()],
            vec![with_waypoint(web(), gateway_named("lone.x", 15009))],
            vec![("[2001:db8:1::1]:80", "hbone lone [2001:db8::5]:15009 for [2001:db8:1::1]:80 of web as lone")],
        ),
        (
            "a service is taken before a workload of the same name",
            vec![endpoint(), instance(), Workload { hostname: "way.x".into(), ..pod("other", &["10.0.0.7"]) }],
            vec![with_waypoint(web(), gateway_named("way.x", 15008)), way()],
            vec![("10.1.0.1:80", "hbone way 10.0.0.6:15008 for 10.1.0.1:80 of web as way|further")],
        ),
        (
            "without an endpoint, and whatever port is asked for: that is for the waypoint to say",
            vec![instance()],
            vec![with_waypoint(web(), gateway("10.0.0.6"))],
            vec![("10.1.0.1:99", "hbone way 10.0.0.6:15008 for 10.1.0.1:99 of web as way")],
        ),
        (
            "a waypoint that is called itself",
            vec![instance()],
            vec![with_waypoint(web(), gateway("10.1.0.6")), way()],
            vec![("10.0.0.6:15008", "hbone way 10.0.0.6:15008 for 10.0.0.6:15008 as way")],
        ),
        (
            "a range",
            vec![instance()],
            vec![Service {
                cidr_vips: vec![("".into(), "10.2.0.0/16".parse().unwrap())],
                ..with_waypoint(service("r", &[], &[]), gateway("10.0.0.6"))
            }],
            vec![("10.2.3.4:80", "hbone way 10.0.0.6:15008 for 10.2.3.4:80 of r as way")],
        ),
    ]);
}

#[test]
fn a_workload_with_a_waypoint_is_reached_by_it_when_it_is_called_itself_and_not_by_the_waypoint() {
    let way = || backing(pod("way", &["10.0.0.6"]), "way.x", &[]);
    let a = |waypoint| behind(backing(pod("a", &["10.0.0.1"]), "web", &[]), waypoint);
    let services = || vec![service("web", &["10.1.0.1"], &[(80, 8080)]), service("way.x", &["10.1.0.6"], &[(15008, 15008)])];
    for waypoint in [gateway("10.0.0.6"), gateway("10.1.0.6"), gateway_named("way.x", 15008)] {
        check(vec![(
            "of a pod",
            vec![a(waypoint.clone()), way()],
            services(),
            vec![
                ("10.0.0.1:80", "hbone way 10.0.0.6:15008 for 10.0.0.1:80 as way"),
                ("10.1.0.1:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:8080 of web as a"),
            ],
        )]);
        // The loop guard: any instance of the waypoint goes straight on, in good health or not; nobody who only shares its account does.
        let sick = Workload { status: HealthStatus::Unhealthy, ..backing(pod("sick", &["10.0.0.8"]), "way.x", &[]) };
        let rows = snapshot([a(waypoint.clone()), way(), sick.clone()], services());
        let from = |source: &Workload| shown(outbound(&rows, &RouteConfig::default(), source, socket("10.0.0.1:80"), &mut rng()));
        assert_eq!(from(&way()), "hbone a 10.0.0.1:15008 for 10.0.0.1:80 as a");
        let by_service = waypoint != gateway("10.0.0.6");
        assert_eq!(from(&sick).starts_with("hbone a"), by_service, "{waypoint:?}");
        let namesake = with(pod("namesake", &["10.0.0.9"]), |profile| profile.service_account = "way".into());
        assert_eq!(from(&namesake), "hbone way 10.0.0.6:15008 for 10.0.0.1:80 as way");
    }
    // An address that is a workload's and a service's: the service chooses, the workload's waypoint counts.
    check(vec![(
        "of both",
        vec![a(gateway("10.0.0.6")), way()],
        vec![service("web", &["10.0.0.1"], &[(80, 8080)])],
        vec![("10.0.0.1:80", "hbone way 10.0.0.6:15008 for 10.0.0.1:80 as way")],
    )]);
}

#[test]
fn a_waypoint_that_cannot_be_found_is_an_error_that_names_it_and_never_passed_by() {
    let web = |waypoint| with_waypoint(service("web", &["10.1.0.1"], &[(80, 8080)]), waypoint);
    let endpoint = || backing(pod("a", &["10.0.0.1"]), "web", &[]);
    let way = |pairs: &[(u16, u16)]| service("way.x", &[], pairs);
    let by_name = || gateway_named("way.x", 15008);
    let nothing = unknown("default/way.x:15008", "default/web", Missing::Unknown);
    let empty = unknown("default/way.x:15008", "default/web", Missing::NoEndpoint);
    let instance = || backing(pod("way", &["10.0.0.6"]), "way.x", &[]);
    let elsewhere =
        GatewayAddress { destination: GatewayDestination::Address(NetworkAddress { network: "n".into(), ip: ip("10.0.0.6") }), hbone_port: 1 };
    let sick = Workload { status: HealthStatus::Unhealthy, ..instance() };
    check(vec![
        ("nothing of this name", vec![endpoint()], vec![web(by_name())], vec![("10.1.0.1:80", &nothing)]),
        (
            "nothing of this address on this network",
            vec![endpoint(), instance()],
            vec![web(elsewhere)],
            vec![("10.1.0.1:80", &unknown("n/10.0.0.6:1", "default/web", Missing::Unknown))],
        ),
        ("no instance", vec![endpoint()], vec![web(by_name()), way(&[(15008, 15008)])], vec![("10.1.0.1:80", &empty)]),
        ("no healthy one", vec![endpoint(), sick], vec![web(by_name()), way(&[(15008, 15008)])], vec![("10.1.0.1:80", &empty)]),
        ("no such port", vec![endpoint(), instance()], vec![web(by_name()), way(&[(15009, 15008)])], vec![("10.1.0.1:80", &empty)]),
        (
            "a service without a choice",
            vec![endpoint(), instance()],
            vec![web(by_name()), balanced(way(&[(15008, 15008)]), LoadBalancingMode::Passthrough)],
            vec![("10.1.0.1:80", &empty)],
        ),
        (
            "of a workload",
            vec![behind(endpoint(), by_name())],
            vec![],
            vec![("10.0.0.1:80", &unknown("default/way.x:15008", "c//Pod/default/a", Missing::Unknown))],
        ),
        (
            "an instance without an address",
            vec![endpoint(), Workload { hostname: "w.example".into(), ..backing(pod("way", &[]), "way.x", &[]) }],
            vec![web(by_name()), way(&[(15008, 15008)])],
            vec![("10.1.0.1:80", "DNS resolution produced no addresses: w.example of c//Pod/default/way was not resolved")],
        ),
    ]);
}

#[test]
fn a_weighted_waypoint_is_drawn_for_each_connection_by_its_weight() {
    let ways = ["one", "two", "three"].map(|name| pod(name, &[&format!("10.0.0.{}", 10 + name.len())]));
    let weighted = |weights: [u32; 3], waypoint: Option<GatewayAddress>| {
        let destinations = ["10.0.0.13", "10.0.0.13", "10.0.0.15"].map(gateway);
        let weighted_waypoints =
            destinations.into_iter().zip(weights).map(|(destination, weight)| WeightedWaypoint { destination, weight }).collect();
        Service { weighted_waypoints, waypoint, ..service("web", &["10.1.0.1"], &[(80, 8080)]) }
    };
    let draw = |service: Service, times: usize| {
        let rows = snapshot(ways.clone(), [service]);
        let (mut rng, mut drawn) = (rng(), std::collections::BTreeMap::<String, usize>::new());
        for _ in 0..times {
            let route = outbound(&rows, &RouteConfig::default(), &pod("client", &["10.0.0.9"]), socket("10.1.0.1:80"), &mut rng);
            let Ok(Route::Hbone { next_hop, .. }) = route else { panic!("{route:?}") };
            *drawn.entry(next_hop.ip().to_string()).or_default() += 1;
        }
        drawn
    };
    let drawn = draw(weighted([80, 0, 20], Some(gateway("10.0.0.14"))), 2000);
    assert_eq!(drawn.values().sum::<usize>(), 2000);
    assert!((1500..1700).contains(&drawn["10.0.0.13"]) && (300..500).contains(&drawn["10.0.0.15"]), "{drawn:?}");
    assert_eq!(draw(weighted([0, 0, 1], None), 20)["10.0.0.15"], 20);
    // No weight at all: the only waypoint, and without one nobody. The reference goes on without a waypoint.
    let lone = Service { waypoint: Some(gateway("10.0.0.15")), ..weighted([0; 3], None) };
    assert_eq!(draw(lone, 20)["10.0.0.15"], 20);
    let refused = shown(route(&snapshot(ways.clone(), [weighted([0; 3], None)]), "10.1.0.1:80"));
    assert_eq!(refused, "unknown waypoint: all weighted waypoints of default/web have weight 0");
    // A draw that falls on one that is not there is an error, not a second draw.
    let broken = weighted([1, 0, 0], None);
    assert!(route(&snapshot([], [broken]), "10.1.0.1:80").is_err());
}
