#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::discovery::{Edit, Mesh, Publisher};
use crate::model::{
    ApplicationProtocol, ApplicationTunnel, GatewayAddress, GatewayDestination, HealthPolicy, HealthStatus, IpFamilies, LoadBalancing,
    LoadBalancingMode, Locality, NetworkAddress, NetworkMode, Profile, Scope, TunnelProtocol, Visibility, WeightedWaypoint, WorkloadKind,
};
use crate::policy::{self, Action, Clause, Match, Rule, ServiceAccountMatch, StringMatch, Validity};

fn word() -> impl Strategy<Value = Text> {
    "[a-z][a-z0-9-]{0,6}".prop_map(Text::from)
}

/// Also what YAML would read as something else, and the empty text.
fn text() -> impl Strategy<Value = Text> {
    prop_oneof![3 => Just(String::new()), 3 => "[a-z./-]{1,6}", 1 => Just("null".to_owned()), 1 => Just("1.0".to_owned()), 1 => "[ -~\u{e9}\\n]{1,5}"]
        .prop_map(Text::from)
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)].prop_map(crate::model::canonical)
}

fn range() -> impl Strategy<Value = IpNet> {
    (ip(), 0..=128u8).prop_map(|(ip, length)| IpNet::new(ip, if ip.is_ipv4() { length / 4 } else { length }).unwrap())
}

fn network_address() -> impl Strategy<Value = NetworkAddress> {
    (prop_oneof![Just(Text::default()), word()], ip()).prop_map(|(network, ip)| NetworkAddress { network, ip })
}

/// Few of them, so that workloads and services meet.
fn key() -> impl Strategy<Value = NamespacedHostname> {
    ("[ab]", "[xyz]").prop_map(|(namespace, host)| NamespacedHostname { namespace: namespace.into(), hostname: format!("{host}.example").into() })
}

fn gateway() -> impl Strategy<Value = GatewayAddress> {
    let destination = prop_oneof![network_address().prop_map(GatewayDestination::Address), key().prop_map(GatewayDestination::Hostname)];
    (destination, 1..u16::MAX).prop_map(|(destination, hbone_port)| GatewayAddress { destination, hbone_port })
}

fn ports() -> impl Strategy<Value = PortMap> {
    btree_map(1..u16::MAX, any::<u16>(), 0..3).prop_map(PortMap::from_iter)
}

fn tunnel() -> impl Strategy<Value = ApplicationTunnel> {
    (prop_oneof![Just(ApplicationProtocol::None), Just(ApplicationProtocol::Proxy)], option::of(1..u16::MAX))
        .prop_map(|(protocol, port)| ApplicationTunnel { protocol, port })
}

fn profile() -> impl Strategy<Value = Profile> {
    let names = (word(), text(), word(), word(), word(), text(), text(), text());
    let kind = prop_oneof![Just(WorkloadKind::Deployment), Just(WorkloadKind::CronJob), Just(WorkloadKind::Pod), Just(WorkloadKind::Job)];
    let rest = (option::of(gateway()), option::of(gateway()), option::of(tunnel()), any::<[bool; 3]>(), kind);
    let lists = (vec((word(), word()).prop_map(|(a, b)| Text::from(format!("{a}/{b}"))), 0..3), btree_map(key(), ports(), 0..3), vec(text(), 3));
    (names, rest, lists).prop_map(|(names, rest, lists)| {
        let (namespace, network, trust_domain, service_account, cluster_id, canonical_name, canonical_revision, workload_name) = names;
        let (waypoint, network_gateway, application_tunnel, [hbone, native_tunnel, host], kind) = rest;
        let (authorization_policies, services, place) = lists;
        Profile {
            namespace,
            network,
            protocol: if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None },
            trust_domain,
            service_account,
            waypoint,
            network_gateway,
            canonical_name,
            canonical_revision,
            kind,
            workload_name,
            native_tunnel,
            authorization_policies,
            cluster_id,
            services: services.into_iter().collect(),
            application_tunnel,
            locality: Locality { region: place[0].clone(), zone: place[1].clone(), subzone: place[2].clone() },
            network_mode: if host { NetworkMode::HostNetwork } else { NetworkMode::Standard },
            ..Profile::default()
        }
    })
}

fn workload() -> impl Strategy<Value = Workload> {
    ("[a-c]{1,2}//Pod/[a-d]{1,3}", vec(ip(), 0..3), vec(text(), 3), any::<bool>(), any::<u32>(), profile()).prop_map(
        |(uid, addresses, names, healthy, capacity, profile)| Workload {
            uid: uid.into(),
            name: names[0].clone().into(),
            addresses: addresses.into(),
            node: names[1].clone(),
            hostname: names[2].clone(),
            status: if healthy { HealthStatus::Healthy } else { HealthStatus::Unhealthy },
            capacity,
            profile: Arc::new(profile),
        },
    )
}

fn balancing() -> impl Strategy<Value = LoadBalancing> {
    let scope =
        prop_oneof![Just(Scope::Region), Just(Scope::Zone), Just(Scope::Subzone), Just(Scope::Node), Just(Scope::Cluster), Just(Scope::Network)];
    let mode = prop_oneof![
        Just(LoadBalancingMode::Standard),
        Just(LoadBalancingMode::Strict),
        Just(LoadBalancingMode::Failover),
        Just(LoadBalancingMode::Passthrough)
    ];
    (vec(scope, 0..4), mode, any::<bool>()).prop_map(|(routing_preference, mode, all)| LoadBalancing {
        routing_preference,
        mode,
        health_policy: if all { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy },
    })
}

fn service() -> impl Strategy<Value = Service> {
    let families = option::of(prop_oneof![Just(IpFamilies::Ipv4), Just(IpFamilies::Ipv6), Just(IpFamilies::Dual)]);
    let weighted = (gateway(), any::<u32>()).prop_map(|(destination, weight)| WeightedWaypoint { destination, weight });
    let addresses = (vec(network_address(), 0..3), vec((text(), range()), 0..2), ports(), vec(text(), 0..2));
    let routing = (option::of(gateway()), vec(weighted, 0..2), option::of(balancing()), families);
    (key(), text(), addresses, routing, any::<[bool; 2]>()).prop_map(|(key, name, addresses, routing, [canonical, hidden])| Service {
        name,
        namespace: key.namespace,
        hostname: key.hostname,
        vips: addresses.0,
        cidr_vips: addresses.1,
        ports: addresses.2,
        subject_alt_names: addresses.3,
        waypoint: routing.0,
        weighted_waypoints: routing.1,
        load_balancing: routing.2,
        ip_families: routing.3,
        canonical,
        visibility: if hidden { Visibility::Namespace } else { Visibility::Public },
    })
}

fn authorization() -> impl Strategy<Value = Authorization> {
    let string = || {
        let plain = || "[a-z/.]{1,5}".prop_map(Text::from);
        prop_oneof![
            plain().prop_map(StringMatch::Exact),
            plain().prop_map(StringMatch::Prefix),
            plain().prop_map(StringMatch::Suffix),
            Just(StringMatch::Presence)
        ]
    };
    let strings = move || vec(string(), 0..2);
    let accounts = || vec((word(), word()).prop_map(|(namespace, service_account)| ServiceAccountMatch { namespace, service_account }), 0..2);
    let ranges = || vec(range(), 0..2);
    let numbers = || vec(any::<u16>(), 0..2);
    let names = (strings(), strings(), strings(), strings(), accounts(), accounts());
    let places = (ranges(), ranges(), ranges(), ranges(), numbers(), numbers());
    let one = (names, places).prop_map(|(names, places)| Match {
        namespaces: names.0,
        not_namespaces: names.1,
        principals: names.2,
        not_principals: names.3,
        service_accounts: names.4,
        not_service_accounts: names.5,
        source_ips: places.0,
        not_source_ips: places.1,
        destination_ips: places.2,
        not_destination_ips: places.3,
        destination_ports: places.4,
        not_destination_ports: places.5,
    });
    let clause = vec(one, 0..2).prop_map(|matches| Clause { matches });
    let rules = vec(vec(clause, 0..2).prop_map(|clauses| Rule { clauses }), 0..3);
    let scope = prop_oneof![Just(policy::Scope::Global), Just(policy::Scope::Namespace), Just(policy::Scope::WorkloadSelector)];
    (word(), word(), scope, any::<[bool; 2]>(), rules, option::weighted(0.2, text())).prop_map(
        |(name, namespace, scope, [deny, dry_run], rules, invalid)| Authorization {
            name,
            namespace,
            scope,
            action: if deny { Action::Deny } else { Action::Allow },
            rules: if invalid.is_some() { Vec::new() } else { rules },
            dry_run,
            validity: invalid.map_or(Validity::Valid, Validity::Invalid),
        },
    )
}

pub(in crate::discovery) fn mesh_of(edits: impl IntoIterator<Item = Edit>) -> Mesh {
    let (mut publisher, mesh) = Publisher::fixed(None);
    publisher.publish(edits);
    mesh
}

pub(in crate::discovery) fn mesh(rows: &Rows) -> Mesh {
    let workloads = rows.workloads.iter().cloned().map(Edit::Workload);
    mesh_of(workloads.chain(rows.services.iter().cloned().map(Edit::Service)).chain(rows.policies.iter().cloned().map(Edit::Policy)))
}

pub(in crate::discovery) fn rows() -> impl Strategy<Value = Rows> {
    (vec(workload(), 0..5), vec(service(), 0..4), vec(authorization(), 0..3)).prop_map(|(workloads, services, policies)| Rows {
        workloads,
        services,
        policies,
    })
}

/// Everything in a world, in an order of its own.
pub(in crate::discovery) fn contents(mesh: &Mesh) -> (Vec<Workload>, Vec<Service>, Vec<Authorization>) {
    let world = mesh.current();
    let mut workloads: Vec<Workload> = world.snapshot.workloads().map(|workload| (**workload).clone()).collect();
    workloads.sort_by(|left, right| left.uid.cmp(&right.uid));
    let mut services: Vec<Service> = world.snapshot.services().map(|service| (**service).clone()).collect();
    services.sort_by_key(|service| service.key());
    let mut policies: Vec<Authorization> = world.policies.iter().map(|policy| (**policy).clone()).collect();
    policies.sort_by_key(|policy| policy.key());
    (workloads, services, policies)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Oracle: the world itself.
    #[test]
    fn the_static_config_of_a_dump_loads_again_as_the_same_world(rows in rows()) {
        let first = mesh(&rows);
        let dumped = first.dump()["staticConfig"].to_string();
        let second = mesh(&read(&dumped).map_err(|fault| TestCaseError::fail(format!("{fault:?} in {dumped}")))?);
        prop_assert_eq!(contents(&first), contents(&second));
        prop_assert_eq!(first.dump(), second.dump());
    }

    /// The same for the sections that people see, whose workloads do not tell ports.
    #[test]
    fn the_sections_of_a_dump_load_again_as_the_same_world(mut rows in rows()) {
        for workload in &mut rows.workloads {
            workload.status = HealthStatus::Healthy;
        }
        let first = mesh(&rows);
        let mut dumped = first.dump();
        dumped.as_object_mut().unwrap().remove("staticConfig");
        let dumped = dumped.to_string();
        let second = mesh(&read(&dumped).map_err(|fault| TestCaseError::fail(format!("{fault:?} in {dumped}")))?);
        prop_assert_eq!(contents(&first), contents(&second));
    }

    /// Nothing that is cut off, and nothing with one byte changed, brings the reader down.
    #[test]
    fn a_damaged_file_is_an_answer_and_never_a_panic(rows in rows(), cut in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let text = mesh(&rows).dump()["staticConfig"].to_string();
        let mut bytes = text.into_bytes();
        let position = cut.index(bytes.len());
        let _ = read(&String::from_utf8_lossy(&bytes[..position]));
        bytes[position] = byte;
        let _ = read(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn uids_of_a_document_are_unique_or_it_is_refused(uids in vec("[ab]", 1..4)) {
        let workloads: Vec<Value> = uids.iter().map(|uid| json!({"uid": uid, "namespace": "n"})).collect();
        let unique: std::collections::BTreeSet<_> = uids.iter().collect();
        prop_assert_eq!(read(&json!({"workloads": workloads}).to_string()).is_ok(), unique.len() == uids.len());
    }

    #[test]
    fn prefixes_of_mapped_addresses_are_ipv4_ranges(length in 96..=128u8, address in any::<[u8; 4]>()) {
        let [a, b, c, d] = address;
        let written = format!("::ffff:{a}.{b}.{c}.{d}/{length}");
        let expected = ipnet::Ipv4Net::new(address.into(), length - 96).unwrap();
        prop_assert_eq!(<IpNet as scalar::Scalar>::read(&written), Some(IpNet::V4(expected)));
    }

    #[test]
    fn every_set_of_ports_comes_back(ports in btree_set(1..u16::MAX, 0..8)) {
        let map: PortMap = ports.iter().map(|port| (*port, port / 2)).collect();
        prop_assert_eq!(port_map(&workload::ports_of(&map)), map);
    }
}

#[test]
fn a_dump_has_the_shapes_of_the_reference() {
    let rows = read(include_str!("golden.yaml")).unwrap();
    let mut expected: Value = serde_json::from_str(include_str!("golden.json")).unwrap();
    let mesh = mesh(&rows);
    let dumped = mesh.dump();
    let fixed = expected["staticConfig"].take();
    for section in ["workloads", "services", "policies", "stagedServices"] {
        assert_eq!(dumped[section], expected[section], "{section} is\n{:#}", dumped[section]);
    }
    assert_eq!(dumped["staticConfig"]["workloads"][1]["services"], fixed["workloads"][1]["services"]);
    assert_eq!(dumped.as_object().unwrap().len(), 5);
    let from_elsewhere = crate::discovery::dump(&mesh.current());
    assert_eq!(from_elsewhere["staticConfig"], json!({"workloads": [], "services": [], "policies": []}));
    assert_eq!(from_elsewhere["workloads"], dumped["workloads"]);
}

#[test]
fn an_endpoint_that_a_service_leaves_out_for_its_health_takes_the_ports_of_the_service() {
    let text = "workloads: [{uid: u, namespace: n, status: Unhealthy, services: {n/h: {80: 8080}}}]\n\
                services: [{name: h, namespace: n, hostname: h, ports: {80: 8000}}]";
    let mut dumped = mesh(&read(text).unwrap()).dump();
    assert_eq!(dumped["services"][0]["endpoints"], json!({}));
    dumped.as_object_mut().unwrap().remove("staticConfig");
    let again = read(&dumped.to_string()).unwrap();
    assert_eq!(again.workloads[0].profile.services[0].1, [(80, 8000)].into_iter().collect());
}

#[test]
fn endpoints_that_only_the_service_lists_are_endpoints() {
    let text = "workloads: [{uid: u, namespace: n}]\n\
                services: [{name: h, namespace: n, hostname: h, endpoints: {u: {workloadUid: u, port: {80: 81}}}}]";
    let rows = read(text).unwrap();
    let expected: BTreeMap<String, u16> = [("n/h:80".to_owned(), 81)].into();
    let found: BTreeMap<String, u16> = rows.workloads[0]
        .profile
        .services
        .iter()
        .flat_map(|(key, ports)| ports.iter().map(move |(port, target)| (format!("{key}:{port}"), target)))
        .collect();
    assert_eq!(found, expected);
}
