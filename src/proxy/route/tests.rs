#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::IpAddr;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::model::{
    GatewayAddress, GatewayDestination, HealthStatus, IpFamilies, LoadBalancing, NamespacedHostname, NetworkAddress, NetworkMode, PortMap, Profile,
    SnapshotBuilder, WeightedWaypoint,
};

// Rows for the tests of this room and of those below it.

pub(super) fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn key(hostname: &str) -> NamespacedHostname {
    NamespacedHostname { namespace: "default".into(), hostname: hostname.into() }
}

pub(super) fn ports(pairs: &[(u16, u16)]) -> PortMap {
    pairs.iter().copied().collect()
}

/// An HBONE pod whose service account is its name.
pub(super) fn pod(name: &str, addresses: &[&str]) -> Workload {
    let profile = Profile { namespace: "default".into(), service_account: name.into(), protocol: TunnelProtocol::Hbone, ..Profile::default() };
    Workload {
        uid: format!("c//Pod/default/{name}").into(),
        name: name.into(),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        node: "local".into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(profile),
    }
}

pub(super) fn with(mut workload: Workload, change: impl FnOnce(&mut Profile)) -> Workload {
    change(Arc::make_mut(&mut workload.profile));
    workload
}

pub(super) fn backing(workload: Workload, hostname: &str, pairs: &[(u16, u16)]) -> Workload {
    with(workload, |profile| profile.services.push((key(hostname), ports(pairs))))
}

pub(super) fn plain(workload: Workload) -> Workload {
    with(workload, |profile| profile.protocol = TunnelProtocol::None)
}

pub(super) fn service(hostname: &str, vips: &[&str], pairs: &[(u16, u16)]) -> Service {
    Service {
        name: hostname.into(),
        namespace: "default".into(),
        hostname: hostname.into(),
        vips: vips.iter().map(|text| NetworkAddress { network: "".into(), ip: ip(text) }).collect(),
        ports: ports(pairs),
        ..Service::default()
    }
}

pub(super) fn balanced(service: Service, mode: LoadBalancingMode) -> Service {
    Service { load_balancing: Some(LoadBalancing { mode, ..LoadBalancing::default() }), ..service }
}

pub(super) fn snapshot(workloads: impl IntoIterator<Item = Workload>, services: impl IntoIterator<Item = Service>) -> Snapshot {
    let mut builder = SnapshotBuilder::default();
    workloads.into_iter().for_each(|workload| builder.insert_workload(workload));
    services.into_iter().for_each(|service| builder.insert_service(service));
    builder.build()
}

pub(super) fn rng() -> SmallRng {
    SmallRng::seed_from_u64(7)
}

fn route(snapshot: &Snapshot, destination: &str) -> Result<Route, RouteError> {
    outbound(snapshot, &RouteConfig::default(), &pod("client", &["10.0.0.9"]), socket(destination), &mut rng())
}

/// A route in one line.
fn shown(route: Result<Route, RouteError>) -> String {
    let accounts = |expected: Vec<SpiffeId>| expected.iter().map(|id| id.service_account().to_string()).collect::<Vec<_>>().join("|");
    let named = |service: Option<Arc<Service>>| service.map_or_else(String::new, |service| format!(" of {}", service.hostname));
    match route {
        Ok(Route::Passthrough { destination, service }) => format!("passthrough {destination}{}", named(service)),
        Ok(Route::Tcp { workload, service, address }) => format!("tcp {} {address}{}", workload.name, named(service)),
        Ok(Route::Hbone { workload, service, next_hop, authority, expected, waypoint }) => {
            assert_eq!(waypoint, ["way", "lone"].contains(&workload.name.as_str()) && authority != Authority::Address(next_hop), "{authority}");
            format!("hbone {} {next_hop} for {authority}{} as {}", workload.name, named(service), accounts(expected))
        }
        Ok(Route::Beyond { gateway, service, next_hop, authority, gateway_expected, expected, waypoint }) => {
            assert_eq!(waypoint, service.waypoint.is_some());
            let (outer, inner) = (accounts(gateway_expected), accounts(expected));
            format!("beyond {} {next_hop} for {authority} of {} as {outer} then {inner}", gateway.name, service.hostname)
        }
        Err(error) => error.to_string(),
    }
}

pub(super) fn gateway(address: &str) -> GatewayAddress {
    gateway_on("", address)
}

fn gateway_on(network: &str, address: &str) -> GatewayAddress {
    let destination = GatewayDestination::Address(NetworkAddress { network: network.into(), ip: ip(address) });
    GatewayAddress { destination, hbone_port: HBONE_PORT }
}

pub(super) fn gateway_named(hostname: &str, hbone_port: u16) -> GatewayAddress {
    GatewayAddress { destination: GatewayDestination::Hostname(key(hostname)), hbone_port }
}

pub(super) fn with_waypoint(service: Service, waypoint: GatewayAddress) -> Service {
    Service { waypoint: Some(waypoint), ..service }
}

pub(super) fn behind(workload: Workload, waypoint: GatewayAddress) -> Workload {
    with(workload, |profile| profile.waypoint = Some(waypoint))
}

/// What a case says where a waypoint by address or host name is missing.
fn unknown(waypoint: &str, owner: &str, missing: Missing) -> String {
    format!("unknown waypoint: waypoint {waypoint} of {owner} {missing}")
}

/// (rule, workloads, services, [(destination, the route in one line)])
type Case<'a> = (&'static str, Vec<Workload>, Vec<Service>, Vec<(&'static str, &'a str)>);

fn check(cases: Vec<Case<'_>>) {
    for (rule, workloads, services, connections) in cases {
        let snapshot = snapshot(workloads, services);
        for (destination, expected) in connections {
            assert_eq!(shown(route(&snapshot, destination)), expected, "{rule}: {destination}");
        }
    }
}

fn remote(workload: Workload) -> Workload {
    Workload { node: "remote".into(), ..workload }
}

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
            vec![("10.1.0.1:80", "DNS resolution produced no addresses: w.example of c//Pod/default/way cannot be resolved on demand yet")],
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

/// A workload of network "far", behind a gateway.
fn far(name: &str, network_gateway: Option<GatewayAddress>) -> Workload {
    let far = with(backing(pod(name, &[]), "h", &[]), |profile| {
        profile.network = "far".into();
        profile.network_gateway = network_gateway;
    });
    Workload { capacity: 1000, ..far }
}

#[test]
fn an_endpoint_of_another_network_is_reached_by_its_gateway_under_the_services_name() {
    let answers = |service: Service| Service { subject_alt_names: vec!["spiffe://far.local/ns/default/sa/far".into()], ..service };
    let vip = || answers(service("h", &["10.1.0.1"], &[(80, 8080)]));
    let gate = || with(pod("gate", &["192.0.2.7"]), |profile| profile.network = "far".into());
    let near_first =
        LoadBalancing { routing_preference: vec![crate::model::Scope::Network], mode: LoadBalancingMode::Failover, ..LoadBalancing::default() };
    let near_first = Service { load_balancing: Some(near_first), ..vip() };
    let named = || gateway_named("gate.x", 15009);
    let gates = || service("gate.x", &[], &[(15009, 15008)]);
    let further = Service { subject_alt_names: vec!["spiffe://far.local/ns/gates/sa/further".into()], ..gates() };
    let behind_gate = |gate: Workload| backing(gate, "gate.x", &[]);
    let by_address = || far("far", Some(gateway_on("far", "192.0.2.7")));
    check(vec![
        (
            "by the gateway's address",
            vec![by_address(), gate()],
            vec![vip()],
            vec![("10.1.0.1:80", "beyond gate 192.0.2.7:15008 for h:80 of h as gate then far")],
        ),
        (
            "by the gateway's host name, whose target port is used",
            vec![far("far", Some(named())), behind_gate(gate())],
            vec![vip(), gates()],
            vec![("10.1.0.1:80", "beyond gate 192.0.2.7:15008 for h:80 of h as gate then far")],
        ),
        (
            "with the further names of the gateway's service",
            vec![far("far", Some(named())), behind_gate(gate())],
            vec![vip(), further],
            vec![("10.1.0.1:80", "beyond gate 192.0.2.7:15008 for h:80 of h as gate|further then far")],
        ),
        (
            "failover to it",
            vec![by_address(), gate()],
            vec![near_first.clone()],
            vec![("10.1.0.1:80", "beyond gate 192.0.2.7:15008 for h:80 of h as gate then far")],
        ),
        (
            "not while there is one here",
            vec![by_address(), gate(), backing(pod("near", &["10.0.0.1"]), "h", &[])],
            vec![near_first],
            vec![("10.1.0.1:80", "hbone near 10.0.0.1:15008 for 10.0.0.1:8080 of h as near|far")],
        ),
        (
            "an address of one behind the gateway is unknown here",
            vec![Workload { addresses: vec![ip("10.0.0.1")], ..by_address() }, gate()],
            vec![],
            vec![("10.0.0.1:80", "passthrough 10.0.0.1:80")],
        ),
    ]);
}

#[test]
fn a_waypoint_of_another_network_is_reached_by_its_gateway_under_the_name_of_the_service_that_was_meant() {
    let gate = || with(pod("gate", &["192.0.2.7"]), |profile| profile.network = "far".into());
    let way = |names: &[&str]| Service {
        subject_alt_names: names.iter().map(|name| (*name).into()).collect(),
        ..service("h", &["10.1.0.6"], &[(15008, 15008)])
    };
    let instance = || far("way", Some(gateway_on("far", "192.0.2.7")));
    let web = || with_waypoint(service("web", &["10.1.0.1"], &[(80, 8080)]), gateway_named("h", 15008));
    let own = || behind(pod("a", &["10.0.0.1"]), gateway_named("h", 15008));
    let names = &["spiffe://far.local/ns/default/sa/way"];
    check(vec![
        (
            "of a service: the names of the waypoint's service are asked",
            vec![instance(), gate()],
            vec![web(), way(names)],
            vec![("10.1.0.1:80", "beyond gate 192.0.2.7:15008 for web:80 of web as gate then way")],
        ),
        (
            "of a workload",
            vec![instance(), gate(), own()],
            vec![way(names)],
            vec![(
                "10.0.0.1:80",
                "unknown waypoint: waypoint c//Pod/default/way of c//Pod/default/a is on network \"far\", where only services are reached",
            )],
        ),
        (
            "without names",
            vec![instance(), gate()],
            vec![web(), way(&[])],
            vec![(
                "10.1.0.1:80",
                "no valid destination for workload: nothing says who may answer for c//Pod/default/way behind its network gateway \
                 (subject alternative names of default/h)",
            )],
        ),
    ]);
}

#[test]
fn an_endpoint_of_another_network_whose_gateway_cannot_be_found_is_an_error() {
    let vip = || Service { subject_alt_names: vec!["spiffe://x/ns/a/sa/b".into()], ..service("h", &["10.1.0.1"], &[(80, 8080)]) };
    let unnamed = || service("h", &["10.1.0.1"], &[(80, 8080)]);
    let gate = with(pod("gate", &["192.0.2.7"]), |profile| profile.network = "far".into());
    let addressed = Workload { addresses: vec![ip("10.0.0.1")], ..far("far", None) };
    check(vec![
        (
            "no gateway is named",
            vec![addressed],
            vec![vip()],
            vec![("10.1.0.1:80", "no valid destination for workload: c//Pod/default/far is on network \"far\" and has no network gateway")],
        ),
        ("no gateway is named and it has no address", vec![far("far", None)], vec![vip()], vec![("10.1.0.1:80", "no healthy upstream: 10.1.0.1:80")]),
        (
            "on its own network nobody has the address",
            vec![far("far", Some(gateway("192.0.2.7"))), gate.clone()],
            vec![vip()],
            vec![(
                "10.1.0.1:80",
                "unknown network gateway: gateway /192.0.2.7:15008 of c//Pod/default/far is neither a service nor a workload that is known here",
            )],
        ),
        (
            "a service without instances",
            vec![far("far", Some(gateway_named("gate.x", 15008)))],
            vec![vip(), service("gate.x", &[], &[(15008, 15008)])],
            vec![(
                "10.1.0.1:80",
                "unknown network gateway: gateway default/gate.x:15008 of c//Pod/default/far is a service without an endpoint that could take it",
            )],
        ),
        (
            "nobody knows who may answer",
            vec![far("far", Some(gateway_on("far", "192.0.2.7"))), gate],
            vec![unnamed()],
            vec![(
                "10.1.0.1:80",
                "no valid destination for workload: nothing says who may answer for c//Pod/default/far behind its network gateway \
                 (subject alternative names of default/h)",
            )],
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
        (by_name, vip, "DNS resolution produced no addresses: db.example of c//Pod/default/db cannot be resolved on demand yet"),
        (backing(pod("a", &["10.0.0.1"]), "h", &[]), only_v6, "no valid destination for workload: c//Pod/default/a has no address that fits"),
    ] {
        let shown = shown(route(&snapshot([workload], [service]), "10.1.0.1:80"));
        assert!(shown.starts_with(expected), "{shown}");
    }
}

#[test]
fn a_network_that_the_proxy_and_the_workload_do_not_agree_on_fails_closed() {
    let mut service = service("h", &["10.1.0.1"], &[(80, 8080)]);
    service.vips[0].network = "proxy".into();
    let rows = snapshot([backing(pod("a", &["10.0.0.1"]), "h", &[])], [service.clone()]);
    let config = RouteConfig { network: "proxy".into(), ..RouteConfig::default() };
    let source = pod("client", &["10.0.0.9"]);
    let result = outbound(&rows, &config, &source, socket("10.1.0.1:80"), &mut rng());
    assert_eq!(result, Err(RouteError::NoHealthyUpstream(socket("10.1.0.1:80"))));
    service.waypoint = Some(gateway("10.0.0.6"));
    let rows = snapshot([], [service]);
    let source = with(source, |profile| profile.network = "proxy".into());
    let result = outbound(&rows, &RouteConfig::default(), &source, socket("10.1.0.1:80"), &mut rng());
    assert!(matches!(result, Err(RouteError::Waypoint { .. })), "{result:?}");
}

#[test]
fn the_own_ports_are_refused_on_each_way_as_the_reference_says() {
    let plain = RouteConfig::default();
    let socks = RouteConfig { socks: true, ..RouteConfig::default() };
    for (entry, target, config, refused) in [
        (Entry::Outbound, "127.0.0.1:15001", &plain, true),
        (Entry::Outbound, "127.9.9.9:15006", &plain, true),
        (Entry::Outbound, "[::1]:15008", &plain, true),
        (Entry::Outbound, "[::ffff:127.0.0.1]:15008", &plain, true),
        (Entry::Outbound, "0.0.0.0:15008", &plain, true),
        (Entry::Outbound, "10.0.0.1:15008", &plain, false),
        (Entry::Outbound, "127.0.0.1:15000", &plain, false),
        (Entry::Outbound, "127.0.0.1:15020", &plain, false),
        (Entry::Outbound, "127.0.0.1:15080", &plain, false),
        (Entry::Outbound, "127.0.0.1:15080", &socks, true),
        (Entry::Plaintext, "10.0.0.1:15001", &plain, true),
        (Entry::Plaintext, "10.0.0.1:15006", &plain, true),
        (Entry::Plaintext, "10.0.0.1:15008", &plain, true),
        (Entry::Plaintext, "10.0.0.1:15080", &plain, false),
        (Entry::Plaintext, "10.0.0.1:15080", &socks, true),
        (Entry::Plaintext, "10.0.0.1:15021", &plain, false),
        (Entry::Hbone, "10.0.0.1:15008", &plain, true),
        (Entry::Hbone, "[2001:db8::1]:15006", &plain, true),
        (Entry::Hbone, "10.0.0.1:15080", &socks, true),
        (Entry::Hbone, "10.0.0.1:15020", &plain, false),
        (Entry::Hbone, "10.0.0.1:15053", &plain, false),
    ] {
        let result = refuse_recursion(entry, socket(target), config);
        assert_eq!(result.is_err(), refused, "{entry:?} {target}");
    }
    assert!(shown(route(&snapshot([], []), "127.0.0.1:15001")).starts_with("recursive call"));
}

proptest! {
    /// The fail-closed rule as a whole: plain text goes only where nothing in the mesh is, to a workload that takes plain
    /// text, or where a service asks for it.
    #[test]
    fn plain_text_goes_only_to_the_unknown_and_to_those_that_take_it(
        last in 1..7_u8, port in 80..83_u16, mode in 0..4_u8, flags in any::<[bool; 9]>(),
    ) {
        let [hbone, healthy, waypoint, service_waypoint, far, both, way_is_there, way_is_far, gate_is_there] = flags;
        let mut a = backing(pod("a", &["10.0.0.1"]), "h", &[(81, 0)]);
        a = if hbone { a } else { plain(a) };
        a.status = if healthy { HealthStatus::Healthy } else { HealthStatus::Unhealthy };
        let network_gateway = || Some(gateway_on("far", "192.0.2.7"));
        a = with(a, |profile| {
            profile.waypoint = waypoint.then(|| gateway_named("way.x", HBONE_PORT));
            profile.network = if far { "far" } else { "" }.into();
            profile.network_gateway = network_gateway();
        });
        let way = with(backing(pod("way", &["10.0.0.6"]), "way.x", &[]), |profile| {
            profile.network = if way_is_far { "far" } else { "" }.into();
            profile.network_gateway = network_gateway();
        });
        let gate = with(pod("gate", &["192.0.2.7"]), |profile| profile.network = "far".into());
        let mode = [LoadBalancingMode::Standard, LoadBalancingMode::Strict, LoadBalancingMode::Failover, LoadBalancingMode::Passthrough][usize::from(mode)];
        let names = || vec!["spiffe://x/ns/a/sa/b".into()];
        let mut h = Service { subject_alt_names: names(), ..balanced(service("h", &["10.0.0.2"], &[(80, 8080), (81, 0)]), mode) };
        h.waypoint = service_waypoint.then(|| gateway_named("way.x", HBONE_PORT));
        if both {
            h.vips.push(NetworkAddress { network: "".into(), ip: ip("10.0.0.1") });
        }
        let ways = Service { subject_alt_names: names(), ..service("way.x", &["10.1.0.6"], &[(HBONE_PORT, HBONE_PORT)]) };
        let workloads = [Some(a.clone()), way_is_there.then_some(way), gate_is_there.then_some(gate)];
        let rows = snapshot(workloads.into_iter().flatten(), [h, ways]);
        let destination = format!("10.0.0.{last}:{port}");
        let way_hop = socket("10.0.0.6:15008");
        let routed = route(&rows, &destination);
        match &routed {
            Ok(Route::Passthrough { destination: to, .. }) => {
                prop_assert_eq!(*to, socket(&destination));
                let unknown = rows.locate("", to.ip(), Some("default")).is_none();
                prop_assert!(unknown || mode == LoadBalancingMode::Passthrough, "{to}");
            }
            Ok(Route::Tcp { .. }) => prop_assert!(!hbone && !far),
            Ok(Route::Hbone { expected, next_hop, authority, workload, .. }) => {
                prop_assert!(!expected.is_empty() && next_hop.port() == HBONE_PORT);
                if workload.name == "way" {
                    prop_assert_eq!(*next_hop, way_hop);
                    prop_assert_eq!(authority, &Authority::Address(socket(&destination)));
                    prop_assert!(way_is_there && !way_is_far);
                } else {
                    prop_assert!(hbone && !far);
                }
            }
            Ok(Route::Beyond { expected, gateway_expected, next_hop, authority, .. }) => {
                prop_assert!(gate_is_there && (far || way_is_far) && !expected.is_empty() && !gateway_expected.is_empty());
                prop_assert_eq!(*next_hop, socket("192.0.2.7:15008"));
                prop_assert_eq!(authority, &Authority::Host("h".into(), port));
            }
            Err(_) => {}
        }
        // A waypoint, once asked for, is never passed by: the connection goes to it, or to the gateway of its network, or nowhere.
        let by_service = service_waypoint && last == 2;
        let by_workload = waypoint && !far && last == 1 && !both;
        if by_service || by_workload {
            match routed {
                Ok(Route::Hbone { workload, .. }) => prop_assert_eq!(workload.name.as_str(), "way"),
                Ok(Route::Beyond { .. }) => prop_assert!(by_service && way_is_far),
                Ok(other) => prop_assert!(false, "a waypoint was passed by: {other:?}"),
                Err(error) => prop_assert!(!way_is_there || way_is_far, "{error}"),
            }
        }
    }
}
