#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::IpAddr;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::model::{
    HealthStatus, IpFamilies, LoadBalancing, NamespacedHostname, NetworkAddress, NetworkMode, PortMap, Profile, SnapshotBuilder, WeightedWaypoint,
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
    let named = |service: Option<Arc<Service>>| service.map_or_else(String::new, |service| format!(" of {}", service.hostname));
    match route {
        Ok(Route::Passthrough { destination, service }) => format!("passthrough {destination}{}", named(service)),
        Ok(Route::Tcp { workload, service, address }) => format!("tcp {} {address}{}", workload.name, named(service)),
        Ok(Route::Hbone { workload, service, next_hop, authority, expected }) => {
            let accounts: Vec<_> = expected.iter().map(|id| id.service_account().to_string()).collect();
            format!("hbone {} {next_hop} for {authority}{} as {}", workload.name, named(service), accounts.join("|"))
        }
        Err(error) => error.to_string(),
    }
}

fn gateway(address: &str) -> GatewayAddress {
    let destination = GatewayDestination::Address(NetworkAddress { network: "".into(), ip: ip(address) });
    GatewayAddress { destination, hbone_port: HBONE_PORT }
}

/// (rule, workloads, services, [(destination, the route in one line)])
type Case = (&'static str, Vec<Workload>, Vec<Service>, Vec<(&'static str, &'static str)>);

fn check(cases: Vec<Case>) {
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
            vec![],
            vec![by_waypoint],
            vec![("10.1.0.1:80", "unknown waypoint: waypoint /10.0.0.6:15008 of default/p cannot be used yet")],
        ),
    ]);
}

#[test]
fn a_destination_with_a_waypoint_is_refused_while_waypoints_cannot_be_used() {
    let named = GatewayAddress { destination: GatewayDestination::Hostname(key("way.x")), hbone_port: 15009 };
    let weighted = |weight| Service {
        weighted_waypoints: vec![WeightedWaypoint { destination: gateway("10.0.0.6"), weight }],
        ..service("h", &["10.1.0.1"], &[(80, 8080)])
    };
    let behind = with(pod("a", &["10.0.0.1"]), |profile| profile.waypoint = Some(named.clone()));
    check(vec![
        (
            "by host name, of a pod that is called directly, and not through its service",
            vec![backing(behind, "h", &[])],
            vec![service("h", &["10.1.0.1"], &[(80, 8080)])],
            vec![
                ("10.0.0.1:80", "unknown waypoint: waypoint default/way.x:15009 of c//Pod/default/a cannot be used yet"),
                ("10.1.0.1:80", "hbone a 10.0.0.1:15008 for 10.0.0.1:8080 of h as a"),
            ],
        ),
        ("weighted", vec![], vec![weighted(1)], vec![("10.1.0.1:80", "unknown waypoint: waypoint /10.0.0.6:15008 of default/h cannot be used yet")]),
        (
            "of weight 0",
            vec![],
            vec![weighted(0)],
            vec![("10.1.0.1:80", "unknown waypoint: waypoint /10.0.0.6:15008 of default/h cannot be used yet")],
        ),
    ]);
}

#[test]
fn an_endpoint_of_another_network_is_refused_while_gateways_cannot_be_used() {
    let far = |name| {
        let far = with(backing(pod(name, &[]), "h", &[]), |profile| {
            profile.network = "far".into();
            profile.network_gateway = Some(gateway("192.0.2.7"));
        });
        Workload { capacity: 1000, ..far }
    };
    let refused = "unknown network gateway: c//Pod/default/far is on network \"far\", which cannot be reached yet";
    let vip = service("h", &["10.1.0.1"], &[(80, 8080)]);
    let near_first =
        LoadBalancing { routing_preference: vec![crate::model::Scope::Network], mode: LoadBalancingMode::Failover, ..LoadBalancing::default() };
    let near_first = Service { load_balancing: Some(near_first), ..vip.clone() };
    check(vec![
        ("the only endpoint", vec![far("far")], vec![vip], vec![("10.1.0.1:80", refused)]),
        ("failover to it", vec![far("far")], vec![near_first.clone()], vec![("10.1.0.1:80", refused)]),
        (
            "not while there is one here",
            vec![far("far"), backing(pod("near", &["10.0.0.1"]), "h", &[])],
            vec![near_first],
            vec![("10.1.0.1:80", "hbone near 10.0.0.1:15008 for 10.0.0.1:8080 of h as near")],
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
        last in 1..6_u8, port in 80..83_u16, mode in 0..4_u8, flags in any::<[bool; 6]>(),
    ) {
        let [hbone, healthy, waypoint, service_waypoint, far, both] = flags;
        let mut a = backing(pod("a", &["10.0.0.1"]), "h", &[(81, 0)]);
        a = if hbone { a } else { plain(a) };
        a.status = if healthy { HealthStatus::Healthy } else { HealthStatus::Unhealthy };
        a = with(a, |profile| {
            profile.waypoint = waypoint.then(|| gateway("10.0.0.6"));
            profile.network = if far { "far" } else { "" }.into();
        });
        let mode = [LoadBalancingMode::Standard, LoadBalancingMode::Strict, LoadBalancingMode::Failover, LoadBalancingMode::Passthrough][usize::from(mode)];
        let mut h = balanced(service("h", &["10.0.0.2"], &[(80, 8080), (81, 0)]), mode);
        h.waypoint = service_waypoint.then(|| gateway("10.0.0.6"));
        if both {
            h.vips.push(NetworkAddress { network: "".into(), ip: ip("10.0.0.1") });
        }
        let rows = snapshot([a.clone()], [h]);
        let destination = format!("10.0.0.{last}:{port}");
        match route(&rows, &destination) {
            Ok(Route::Passthrough { destination: to, .. }) => {
                prop_assert_eq!(to, socket(&destination));
                let unknown = rows.locate("", to.ip(), Some("default")).is_none();
                prop_assert!(unknown || mode == LoadBalancingMode::Passthrough, "{to}");
            }
            Ok(Route::Tcp { .. }) => prop_assert!(!hbone && !far),
            Ok(Route::Hbone { expected, next_hop, .. }) => prop_assert!(hbone && !far && !expected.is_empty() && next_hop.port() == HBONE_PORT),
            Err(_) => {}
        }
        if service_waypoint && last == 2 {
            prop_assert!(matches!(route(&rows, &destination), Err(RouteError::Waypoint { .. })), "a waypoint was passed by");
        }
    }
}
