//! To another network, through its gateway.

use super::*;

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
            vec![Workload { addresses: ip("10.0.0.1").into(), ..by_address() }, gate()],
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
    let addressed = Workload { addresses: ip("10.0.0.1").into(), ..far("far", None) };
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
