//! Nowhere: the ports of this proxy, and whatever would be plain text that should not be.

use proptest::prelude::*;

use super::*;

#[test]
fn the_own_ports_are_refused_on_each_way_as_the_reference_says() {
    let own = ["10.0.0.1:15001", "[2001:db8::1]:15006", "[::ffff:10.0.0.1]:15008"];
    let pages = ["10.0.0.1:15000", "10.0.0.1:15020", "10.0.0.1:15021", "10.0.0.1:15053"];
    let looped = ["127.0.0.1:15001", "127.9.9.9:15006", "[::1]:15008", "[::ffff:127.0.0.1]:15008", "0.0.0.0:15008"];
    // The way in, where the client wants to go, with SOCKS served or not: refused or not.
    let table: [(Entry, &[&str], bool, bool); 13] = [
        (Entry::Outbound, &looped, false, true),
        (Entry::Outbound, &own, false, false),
        (Entry::Outbound, &["127.0.0.1:15000", "127.0.0.1:15020", "127.0.0.1:15080"], false, false),
        (Entry::Outbound, &["127.0.0.1:15080"], true, true),
        (Entry::Outbound, &["10.0.0.1:15080"], true, false),
        (Entry::Plaintext, &own, false, true),
        (Entry::Plaintext, &pages, true, false),
        (Entry::Plaintext, &["10.0.0.1:15080"], false, false),
        (Entry::Plaintext, &["10.0.0.1:15080"], true, true),
        (Entry::Hbone, &own, false, true),
        (Entry::Hbone, &pages, true, false),
        (Entry::Hbone, &["10.0.0.1:15080"], false, false),
        (Entry::Hbone, &["10.0.0.1:15080"], true, true),
    ];
    for (entry, targets, socks, refused) in table {
        let config = RouteConfig { socks, ..RouteConfig::default() };
        for target in targets {
            assert_eq!(refuse_recursion(entry, socket(target), &config).is_err(), refused, "{entry:?} {target}, SOCKS {socks}");
        }
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
                    prop_assert_eq!(authority, &Authority::Address(socket(&destination).into()));
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
