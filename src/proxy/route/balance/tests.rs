#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use super::super::tests::{backing, pod, ports, rng, service, snapshot, with};
use super::*;
use crate::model::{GatewayAddress, GatewayDestination, HealthPolicy, HealthStatus, NetworkAddress};

/// region, zone, subzone, node, cluster, network
type Place = [&'static str; 6];

fn at(workload: Workload, [region, zone, subzone, node, cluster, network]: Place) -> Workload {
    let workload = with(workload, |profile| {
        profile.locality.region = region.into();
        profile.locality.zone = zone.into();
        profile.locality.subzone = subzone.into();
        profile.cluster_id = cluster.into();
        profile.network = network.into();
    });
    Workload { node: node.into(), ..workload }
}

fn wanted(service: &Service, port: u16) -> Wanted<'_> {
    Wanted { service, port, kind: Kind::Workload }
}

const HERE: Place = ["r", "z", "s", "n", "c", "net"];

fn preferring(scopes: &[Scope], mode: LoadBalancingMode) -> LoadBalancing {
    LoadBalancing { routing_preference: scopes.to_vec(), mode, ..LoadBalancing::default() }
}

#[test]
fn ranks_count_scopes_up_to_the_first_mismatch_and_a_first_network_outweighs_all() {
    use Scope::{Cluster, Network, Node, Region, Subzone, Zone};
    let table: [(&[Scope], Place, usize, bool); 19] = [
        (&[Region, Zone], HERE, 2, true),
        (&[Region, Zone], ["r", "x", "s", "n", "c", "net"], 1, false),
        (&[Region, Zone], ["x", "z", "s", "n", "c", "net"], 0, false),
        (&[Region, Zone, Subzone, Node, Cluster, Network], HERE, 6, true),
        (&[Region, Zone, Subzone, Node], ["r", "z", "s", "x", "c", "net"], 3, false),
        (&[Cluster, Node], ["", "", "", "n", "c", ""], 2, true),
        (&[Node], ["x", "x", "x", "n", "x", "x"], 1, true),
        (&[], HERE, 0, true),
        // A network that does not come first ends the comparison like any other scope.
        (&[Region, Network, Zone], ["r", "z", "s", "n", "c", "x"], 1, false),
        (&[Region, Network, Zone], HERE, 3, true),
        // The example of the reference: [NETWORK, REGION, ZONE].
        (&[Network, Region, Zone], HERE, 5, true),
        (&[Network, Region, Zone], ["r", "x", "s", "n", "c", "net"], 4, false),
        (&[Network, Region, Zone], ["x", "x", "s", "n", "c", "net"], 3, false),
        (&[Network, Region, Zone], ["x", "z", "s", "n", "c", "net"], 3, false),
        (&[Network, Region, Zone], ["r", "z", "s", "n", "c", "x"], 2, false),
        (&[Network, Region, Zone], ["r", "x", "s", "n", "c", "x"], 1, false),
        (&[Network, Region, Zone], ["x", "x", "s", "n", "c", "x"], 0, false),
        (&[Network], HERE, 1, true),
        (&[Network], ["r", "z", "s", "n", "c", "x"], 0, false),
    ];
    let source = at(pod("client", &[]), HERE);
    for (scopes, place, expected, complete) in table {
        let endpoint = at(pod("a", &[]), place);
        assert_eq!(rank(&preferring(scopes, LoadBalancingMode::Failover), &source, &endpoint), Some(expected), "{scopes:?} {place:?}");
        let strict = rank(&preferring(scopes, LoadBalancingMode::Strict), &source, &endpoint);
        assert_eq!(strict, complete.then_some(expected), "strict {scopes:?} {place:?}");
    }
    let nowhere = at(pod("client", &[]), ["", "", "", "n", "c", "net"]);
    let zones = preferring(&[Region, Zone], LoadBalancingMode::Failover);
    assert_eq!(rank(&zones, &nowhere, &at(pod("a", &[]), ["", "", "", "x", "c", "net"])), Some(2), "an unknown place equals an unknown place");
}

/// How often each endpoint is chosen in `draws` connections.
fn draw(workloads: Vec<Workload>, balancing: Option<LoadBalancing>, draws: u32) -> BTreeMap<String, u32> {
    let service = Service { load_balancing: balancing, ..service("h", &[], &[(80, 8080)]) };
    let rows = snapshot(workloads.into_iter().map(|workload| backing(workload, "h", &[])), [service.clone()]);
    let (mut rng, mut chosen) = (rng(), BTreeMap::new());
    let source = at(pod("client", &[]), HERE);
    for _ in 0..draws {
        if let Some((workload, port)) = choose(&rows, &source, wanted(&service, 80), &mut rng) {
            assert_eq!(port, 8080);
            *chosen.entry(workload.name.to_string()).or_default() += 1;
        }
    }
    chosen
}

fn near(name: &str) -> Workload {
    at(pod(name, &["10.0.0.1"]), HERE)
}

fn weighing(workload: Workload, capacity: u32) -> Workload {
    Workload { capacity, ..workload }
}

#[test]
fn endpoints_are_chosen_in_proportion_to_their_capacity() {
    let chosen = draw(vec![weighing(near("one"), 1), weighing(near("two"), 2), weighing(near("seven"), 7), weighing(near("none"), 0)], None, 10_000);
    assert!(!chosen.contains_key("none"));
    for (name, share) in [("one", 1_000_u32), ("two", 2_000), ("seven", 7_000)] {
        assert!(chosen[name].abs_diff(share) < 200, "{chosen:?}");
    }
    // The largest capacities there are neither overflow nor starve each other.
    let chosen = draw((0..8).map(|index| weighing(near(&index.to_string()), u32::MAX)).collect(), None, 8_000);
    assert!(chosen.len() == 8 && chosen.values().all(|count| count.abs_diff(1_000) < 200), "{chosen:?}");
}

#[test]
fn endpoints_that_all_have_no_capacity_are_no_endpoints() {
    assert!(draw(vec![weighing(near("a"), 0), weighing(near("b"), 0)], None, 10).is_empty());
    // Also when others have some: nearness is decided first.
    let far = at(pod("far", &["10.0.0.2"]), ["x", "z", "s", "n", "c", "net"]);
    assert!(draw(vec![weighing(near("near"), 0), far], Some(preferring(&[Scope::Region], LoadBalancingMode::Failover)), 10).is_empty());
}

#[test]
fn only_strict_and_failover_prefer_and_only_the_nearest_remain() {
    let in_zone = near("zone");
    let in_region = at(pod("region", &["10.0.0.2"]), ["r", "x", "s", "n", "c", "net"]);
    let elsewhere = at(pod("elsewhere", &["10.0.0.3"]), ["x", "x", "s", "n", "c", "net"]);
    let sick = Workload { status: HealthStatus::Unhealthy, ..near("sick") };
    let zones = |mode| Some(preferring(&[Scope::Region, Scope::Zone], mode));
    let all = || vec![in_zone.clone(), in_region.clone(), elsewhere.clone(), sick.clone()];
    let names = |workloads, balancing| draw(workloads, balancing, 100).into_keys().collect::<Vec<_>>();
    assert_eq!(names(all(), None), ["elsewhere", "region", "zone"]);
    assert_eq!(names(all(), zones(LoadBalancingMode::Standard)), ["elsewhere", "region", "zone"]);
    assert_eq!(names(all(), zones(LoadBalancingMode::Failover)), ["zone"]);
    assert_eq!(names(all(), zones(LoadBalancingMode::Strict)), ["zone"]);
    assert_eq!(names(all()[1..].to_vec(), zones(LoadBalancingMode::Failover)), ["region"]);
    assert_eq!(names(vec![elsewhere.clone(), sick.clone()], zones(LoadBalancingMode::Failover)), ["elsewhere"]);
    assert!(names(all()[1..].to_vec(), zones(LoadBalancingMode::Strict)).is_empty());
    let lenient = LoadBalancing { health_policy: HealthPolicy::AllowAll, ..preferring(&[Scope::Region, Scope::Zone], LoadBalancingMode::Failover) };
    assert_eq!(names(all(), Some(lenient)), ["sick", "zone"]);
}

#[test]
fn an_endpoint_needs_an_address_or_a_name_or_the_gateway_of_another_network() {
    let gateway = GatewayAddress {
        destination: GatewayDestination::Address(NetworkAddress { network: "far".into(), ip: "192.0.2.1".parse().unwrap() }),
        hbone_port: 15008,
    };
    let via_gateway = |network: &'static str| {
        with(at(pod("a", &[]), ["r", "z", "s", "n", "c", network]), |profile| profile.network_gateway = Some(gateway.clone()))
    };
    for (workload, can) in [
        (near("a"), true),
        (at(pod("a", &[]), HERE), false),
        (Workload { hostname: "db.example".into(), ..at(pod("a", &[]), HERE) }, true),
        (via_gateway("net"), false),
        (via_gateway("far"), true),
        (at(pod("a", &[]), ["r", "z", "s", "n", "c", "far"]), false),
    ] {
        assert_eq!(draw(vec![workload.clone()], None, 1).len(), usize::from(can), "{workload:?}");
    }
}

#[test]
fn the_target_port_is_the_endpoints_else_the_services_and_a_named_port_must_be_mapped() {
    type Pairs = &'static [(u16, u16)];
    // Service ports, endpoint ports, asked port, target.
    let table: [(Pairs, Pairs, u16, Option<u16>); 10] = [
        (&[(80, 8080)], &[], 80, Some(8080)),
        (&[(80, 8080)], &[(80, 8000)], 80, Some(8000)),
        (&[(80, 8080)], &[(80, 0)], 80, Some(8080)),
        (&[(80, 8080)], &[(90, 9000)], 80, Some(8080)),
        (&[(80, 8080)], &[], 90, None),
        (&[(80, 8080)], &[(90, 9000)], 90, None),
        (&[(80, 0)], &[(80, 8000)], 80, Some(8000)),
        (&[(80, 0)], &[], 80, None),
        (&[(80, 0)], &[(90, 9000)], 80, None),
        (&[(80, 0)], &[(80, 0)], 80, None),
    ];
    for (service_ports, endpoint_ports, port, expected) in table {
        let service = Service { ports: ports(service_ports), ..service("h", &[], &[]) };
        let rows = snapshot([backing(pod("a", &["10.0.0.1"]), "h", endpoint_ports)], [service.clone()]);
        let target = choose(&rows, &pod("client", &[]), wanted(&service, port), &mut rng()).map(|(_, target)| target);
        assert_eq!(target, expected, "{service_ports:?} {endpoint_ports:?} {port}");
    }
    // Of two endpoints of a named port only the one that maps it is chosen.
    let service = service("h", &[], &[(80, 0)]);
    let rows = snapshot([backing(pod("a", &["10.0.0.1"]), "h", &[]), backing(pod("b", &["10.0.0.2"]), "h", &[(80, 81)])], [service.clone()]);
    let mut rng = rng();
    assert!((0..50).all(|_| choose(&rows, &pod("client", &[]), wanted(&service, 80), &mut rng).is_some_and(|(workload, _)| workload.name == "b")));
}

#[test]
fn a_captured_waypoint_needs_no_port_in_its_service_and_nobody_else_does_without() {
    let tunnel = |port| crate::model::ApplicationTunnel { protocol: crate::model::ApplicationProtocol::Proxy, port };
    let captured = |port| with(backing(pod("way", &["10.0.0.6"]), "way", &[]), |profile| profile.application_tunnel = Some(tunnel(port)));
    let mapped = with(backing(pod("way", &["10.0.0.6"]), "way", &[(15008, 15007)]), |profile| profile.application_tunnel = Some(tunnel(None)));
    let plain = backing(pod("way", &["10.0.0.6"]), "way", &[]);
    for (rule, endpoint, service_ports, kind, expected) in [
        ("no port", captured(Some(15088)), vec![], Kind::Waypoint, Some(15008)),
        ("a named port that it does not have", captured(Some(15088)), vec![(15008, 0)], Kind::Waypoint, Some(15008)),
        ("a port", captured(Some(15088)), vec![(15008, 15009)], Kind::Waypoint, Some(15009)),
        ("its own mapping", mapped, vec![], Kind::Waypoint, Some(15007)),
        ("no port of its own", captured(None), vec![], Kind::Waypoint, None),
        ("not captured", plain.clone(), vec![], Kind::Waypoint, None),
        ("not captured, with a port", plain, vec![(15008, 15008)], Kind::Waypoint, Some(15008)),
        ("called itself", captured(Some(15088)), vec![], Kind::Workload, None),
        ("called itself by a named port", captured(Some(15088)), vec![(15008, 0)], Kind::Workload, None),
        ("the way to a network", captured(Some(15088)), vec![], Kind::NetworkGateway, None),
    ] {
        let service = service("way", &[], &service_ports);
        let rows = snapshot([endpoint], [service.clone()]);
        let chosen = choose(&rows, &pod("client", &[]), Wanted { service: &service, port: 15008, kind }, &mut rng());
        assert_eq!(chosen.map(|(_, port)| port), expected, "{rule}");
    }
}
