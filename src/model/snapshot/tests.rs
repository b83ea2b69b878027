#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod oracle;

use super::*;
use crate::model::{HealthPolicy, LoadBalancing, NetworkAddress, NetworkMode, Profile};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(namespace: &str, hostname: &str) -> NamespacedHostname {
    NamespacedHostname { namespace: namespace.into(), hostname: hostname.into() }
}

fn workload(uid: &str, addresses: &[&str]) -> Workload {
    Workload {
        uid: uid.into(),
        name: uid.rsplit('/').next().unwrap().into(),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        node: "n1".into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(Profile { namespace: "default".into(), protocol: TunnelProtocol::Hbone, ..Profile::default() }),
    }
}

fn with(mut workload: Workload, change: impl FnOnce(&mut Profile)) -> Workload {
    change(Arc::make_mut(&mut workload.profile));
    workload
}

fn backing(uid: &str, address: &str, services: &[&NamespacedHostname]) -> Workload {
    let ports: PortMap = [(80, 8080)].into_iter().collect();
    with(workload(uid, &[address]), |profile| profile.services = services.iter().map(|key| ((*key).clone(), ports.clone())).collect())
}

fn unhealthy(workload: Workload) -> Workload {
    Workload { status: HealthStatus::Unhealthy, ..workload }
}

/// A service of the default network whose addresses are exact or, with a slash, ranges.
fn service(namespace: &str, hostname: &str, addresses: &[&str]) -> Service {
    let (ranges, exact): (Vec<&str>, Vec<&str>) = addresses.iter().partition(|text| text.contains('/'));
    Service {
        name: hostname.into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        vips: exact.iter().map(|text| NetworkAddress { network: "".into(), ip: ip(text) }).collect(),
        cidr_vips: ranges.iter().map(|text| ("".into(), text.parse().unwrap())).collect(),
        ports: [(80, 8080)].into_iter().collect(),
        ..Service::default()
    }
}

fn canonical_service(service: Service) -> Service {
    Service { canonical: true, ..service }
}

fn private(service: Service) -> Service {
    Service { visibility: Visibility::Namespace, ..service }
}

fn allowing_all(service: Service) -> Service {
    let load_balancing = Some(LoadBalancing { health_policy: HealthPolicy::AllowAll, ..LoadBalancing::default() });
    Service { load_balancing, ..service }
}

fn of_services(services: &[Service]) -> Snapshot {
    let mut builder = SnapshotBuilder::default();
    services.iter().cloned().for_each(|service| builder.insert_service(service));
    builder.build()
}

fn of_workloads(workloads: &[Workload]) -> Snapshot {
    let mut builder = SnapshotBuilder::default();
    workloads.iter().cloned().for_each(|workload| builder.insert_workload(workload));
    builder.build()
}

/// (name of the case, services, [(address, client namespace, expected `namespace/hostname`)])
type VipCase<'a> = (&'a str, Vec<Service>, Vec<(&'a str, Option<&'a str>, Option<&'a str>)>);

fn check_vips(cases: Vec<VipCase<'_>>) {
    for (name, mut services, queries) in cases {
        for _ in 0..services.len() {
            services.rotate_left(1);
            let snapshot = of_services(&services);
            for (address, client, expected) in &queries {
                let found = snapshot.service_by_address("", ip(address), *client).map(|service| service.key().to_string());
                assert_eq!(found.as_deref(), *expected, "{name}: {address} for {client:?}");
                assert!(snapshot.service_by_address("elsewhere", ip(address), *client).is_none(), "{name}: {address} elsewhere");
            }
        }
    }
}

#[test]
fn an_exact_address_leads_to_the_clients_namespace_then_the_canonical_then_the_first_by_name() {
    check_vips(vec![
        (
            "shared by three namespaces, none canonical",
            vec![service("b", "b.x", &["10.1.0.1"]), service("a", "a.x", &["10.1.0.1"]), service("c", "c.x", &["10.1.0.1"])],
            vec![
                ("10.1.0.1", Some("b"), Some("b/b.x")),
                ("10.1.0.1", Some("c"), Some("c/c.x")),
                ("10.1.0.1", Some("other"), Some("a/a.x")),
                ("10.1.0.1", None, Some("a/a.x")),
                ("10.1.0.2", Some("a"), None),
            ],
        ),
        (
            "the canonical one wins outside the namespaces of the others",
            vec![service("a", "a.x", &["10.1.0.1"]), canonical_service(service("c", "c.x", &["10.1.0.1"]))],
            vec![("10.1.0.1", Some("a"), Some("a/a.x")), ("10.1.0.1", Some("other"), Some("c/c.x")), ("10.1.0.1", None, Some("c/c.x"))],
        ),
        (
            "a mapped address is the address",
            vec![service("a", "a.x", &["::ffff:10.1.0.1"])],
            vec![("10.1.0.1", None, Some("a/a.x")), ("::ffff:10.1.0.1", None, Some("a/a.x"))],
        ),
    ]);
}

#[test]
fn a_service_of_namespace_visibility_is_hidden_from_other_namespaces() {
    check_vips(vec![
        (
            "alone",
            vec![private(service("a", "a.x", &["10.1.0.1"]))],
            vec![("10.1.0.1", Some("a"), Some("a/a.x")), ("10.1.0.1", Some("b"), None), ("10.1.0.1", None, Some("a/a.x"))],
        ),
        (
            "canonical, beside a public one",
            vec![private(canonical_service(service("a", "a.x", &["10.1.0.1"]))), service("b", "b.x", &["10.1.0.1"])],
            vec![("10.1.0.1", Some("a"), Some("a/a.x")), ("10.1.0.1", Some("c"), Some("b/b.x"))],
        ),
        (
            "a hidden exact address falls through to a range",
            vec![private(service("a", "a.x", &["10.1.0.1"])), service("b", "b.x", &["10.1.0.0/16"])],
            vec![("10.1.0.1", Some("a"), Some("a/a.x")), ("10.1.0.1", Some("c"), Some("b/b.x"))],
        ),
        (
            "a hidden range falls through to a wider one",
            vec![private(service("a", "a.x", &["10.1.0.0/24"])), service("b", "b.x", &["10.1.0.0/16"])],
            vec![("10.1.0.1", Some("a"), Some("a/a.x")), ("10.1.0.1", Some("c"), Some("b/b.x"))],
        ),
    ]);
    let snapshot = of_services(&[private(service("a", "h.x", &[])), private(service("b", "h.x", &[]))]);
    assert_eq!(snapshot.service_by_hostname("h.x", Some("a")).unwrap().namespace, "a");
    assert_eq!(snapshot.service_by_hostname("h.x", Some("b")).unwrap().namespace, "b");
    assert!(snapshot.service_by_hostname("h.x", Some("c")).is_none());
    assert_eq!(snapshot.service_by_hostname("h.x", None).unwrap().namespace, "a");
}

#[test]
fn ranges_match_by_namespace_then_longest_prefix_then_canonical() {
    check_vips(vec![
        ("IPv4", vec![service("a", "a.x", &["10.0.0.0/8"])], vec![("10.9.9.9", None, Some("a/a.x")), ("11.0.0.1", None, None), ("::1", None, None)]),
        (
            "IPv6, host bits are ignored",
            vec![service("a", "a.x", &["2001:db8::7/32"])],
            vec![("2001:db8:1::1", None, Some("a/a.x")), ("2001:db9::1", None, None), ("10.0.0.1", None, None)],
        ),
        (
            "the longest prefix",
            vec![
                service("a", "8.x", &["10.0.0.0/8", "fd00::/8"]),
                service("a", "24.x", &["10.0.0.0/24", "fd00::/64"]),
                service("a", "16.x", &["10.0.0.0/16"]),
            ],
            vec![
                ("10.0.0.1", None, Some("a/24.x")),
                ("10.0.1.1", None, Some("a/16.x")),
                ("10.1.0.1", None, Some("a/8.x")),
                ("fd00::1", None, Some("a/24.x")),
                ("fd01::1", None, Some("a/8.x")),
            ],
        ),
        (
            "a range of one family never matches the other, all addresses of a family included",
            vec![service("a", "4.x", &["0.0.0.0/0"]), service("a", "6.x", &["::/0"])],
            vec![("10.0.0.1", None, Some("a/4.x")), ("::1", None, Some("a/6.x"))],
        ),
        (
            "an exact address beside ranges of both families",
            vec![service("a", "one.x", &["10.0.0.1", "fd00::1"]), service("a", "many.x", &["10.0.0.0/8", "fd00::/16"])],
            vec![
                ("10.0.0.1", None, Some("a/one.x")),
                ("10.0.0.2", None, Some("a/many.x")),
                ("fd00::1", None, Some("a/one.x")),
                ("fd00::2", None, Some("a/many.x")),
            ],
        ),
        (
            "an exact address wins over a range of the client's own namespace",
            vec![service("a", "one.x", &["10.0.0.1"]), service("b", "many.x", &["10.0.0.0/8"])],
            vec![("10.0.0.1", Some("b"), Some("a/one.x"))],
        ),
        (
            "the same range in two namespaces",
            vec![service("a", "a.x", &["10.0.0.0/8"]), canonical_service(service("b", "b.x", &["10.0.0.0/8"]))],
            vec![("10.0.0.1", Some("a"), Some("a/a.x")), ("10.0.0.1", Some("b"), Some("b/b.x")), ("10.0.0.1", Some("c"), Some("b/b.x"))],
        ),
        (
            "the client's namespace counts before the prefix, the prefix before canonical",
            vec![
                service("a", "a.x", &["10.0.0.0/8"]),
                service("b", "b.x", &["10.0.0.0/24"]),
                canonical_service(service("c", "c.x", &["10.0.0.0/16"])),
            ],
            vec![("10.0.0.1", Some("a"), Some("a/a.x")), ("10.0.0.1", Some("d"), Some("b/b.x"))],
        ),
    ]);
}

#[test]
fn a_removed_service_leaves_no_address_and_no_range() {
    let mut builder = of_services(&[service("a", "a.x", &["10.0.0.1", "10.0.0.0/8", "10.0.0.0/8"]), service("b", "b.x", &["10.0.0.0/8"])]).edit();
    assert!(builder.remove("a/a.x"));
    let snapshot = builder.build();
    assert_eq!(snapshot.service_by_address("", ip("10.0.0.1"), None).unwrap().namespace, "b");
    let mut builder = snapshot.edit();
    builder.insert_service(service("b", "b.x", &["10.0.0.2"]));
    let snapshot = builder.build();
    assert!(snapshot.service_by_address("", ip("10.0.0.1"), None).is_none());
    assert!(snapshot.0.range_lengths.is_empty() && snapshot.0.ranges.is_empty());
    assert!(snapshot.service_by_address("", ip("10.0.0.2"), None).is_some());
}

#[test]
fn an_address_that_several_claim_belongs_to_the_best_kind_of_workload() {
    let plain = |uid| with(workload(uid, &["10.0.0.1"]), |profile| profile.protocol = TunnelProtocol::None);
    let ranked =
        [workload("c//Pod/ns/hbone", &["10.0.0.1"]), plain("c//Pod/ns/plain"), workload("c/WorkloadEntry/hbone", &["10.0.0.1"]), plain("other")];
    for rotation in 0..ranked.len() {
        let mut rows = ranked.to_vec();
        rows.rotate_left(rotation);
        let mut builder = of_workloads(&rows).edit();
        for expected in &ranked {
            let snapshot = builder.clone().build();
            assert_eq!(snapshot.workload_by_address("", ip("10.0.0.1")).unwrap().uid, expected.uid);
            assert!(builder.remove(&expected.uid));
        }
        assert!(builder.build().workload_by_address("", ip("10.0.0.1")).is_none());
    }
}

#[test]
fn host_network_workloads_are_known_by_uid_and_never_by_address() {
    let key = key("default", "web.x");
    let mut builder = of_services(&[service("default", "web.x", &[])]).edit();
    builder.insert_workload(with(backing("c//Pod/ns/a", "10.0.0.1", &[&key]), |profile| profile.network_mode = NetworkMode::HostNetwork));
    let snapshot = builder.build();
    assert!(snapshot.workload_by_address("", ip("10.0.0.1")).is_none());
    assert!(snapshot.locate("", ip("10.0.0.1"), None).is_none());
    assert!(snapshot.workload("c//Pod/ns/a").is_some());
    assert_eq!(snapshot.endpoints(&key).count(), 1);
}

#[test]
fn a_workload_is_found_by_each_of_its_addresses_until_they_change() {
    let mut builder = of_workloads(&[workload("u", &["10.0.0.1", "::ffff:10.0.0.2", "10.0.0.1", "fd00::1"])]).edit();
    let before = builder.clone().build();
    assert_eq!(before.workload("u").unwrap().addresses, [ip("10.0.0.1"), ip("10.0.0.2"), ip("fd00::1")]);
    builder.insert_workload(workload("u", &["10.0.0.2", "10.0.0.3"]));
    let after = builder.clone().build();
    for (address, first, second) in [("10.0.0.1", true, false), ("10.0.0.2", true, true), ("fd00::1", true, false), ("10.0.0.3", false, true)] {
        assert_eq!(before.workload_by_address("", ip(address)).is_some(), first, "{address}");
        assert_eq!(after.workload_by_address("", ip(address)).is_some(), second, "{address}");
        assert!(after.workload_by_address("other", ip(address)).is_none());
    }
    assert!(builder.remove("u") && !builder.remove("u"));
    let empty = builder.build();
    assert!(empty.workload_by_address("", ip("10.0.0.2")).is_none() && empty.workload("u").is_none());
    assert!(after.workload_by_address("", ip("::ffff:10.0.0.2")).is_some(), "an older snapshot does not change");
}

#[test]
fn locating_an_address_prefers_the_workload_to_the_service() {
    let mut builder = of_services(&[service("a", "a.x", &["10.0.0.1", "10.0.0.2"])]).edit();
    builder.insert_workload(workload("u", &["10.0.0.1"]));
    let snapshot = builder.build();
    assert!(matches!(snapshot.locate("", ip("10.0.0.1"), Some("a")), Some(Located::Workload(found)) if found.uid == "u"));
    assert!(matches!(snapshot.locate("", ip("10.0.0.2"), Some("a")), Some(Located::Service(found)) if found.hostname == "a.x"));
    assert!(snapshot.locate("", ip("10.0.0.3"), Some("a")).is_none());
}

/// The uids of the endpoints of a service, sorted.
fn endpoints(snapshot: &Snapshot, key: &NamespacedHostname) -> Vec<String> {
    let mut uids: Vec<_> = snapshot.endpoints(key).map(|(workload, _)| workload.uid.to_string()).collect();
    uids.sort();
    uids
}

#[test]
fn endpoints_wait_for_their_service_and_pass_its_health_filter_when_it_comes() {
    let (web, api) = (key("default", "web.x"), key("default", "api.x"));
    let mut builder = SnapshotBuilder::default();
    builder.insert_workload(backing("a", "10.0.0.1", &[&web, &api]));
    builder.insert_workload(unhealthy(backing("b", "10.0.0.2", &[&web])));
    let snapshot = builder.clone().build();
    assert!(endpoints(&snapshot, &web).is_empty());
    let staged: Vec<_> = snapshot.staged().into_iter().map(|(key, rows)| (key.to_string(), rows.len())).collect();
    assert_eq!(staged, [("default/api.x".to_owned(), 1), ("default/web.x".to_owned(), 2)], "unhealthy ones wait too");

    builder.insert_service(service("default", "web.x", &[]));
    let snapshot = builder.clone().build();
    assert_eq!(endpoints(&snapshot, &web), ["a"]);
    assert_eq!(snapshot.staged().len(), 1);
    builder.insert_service(allowing_all(service("default", "web.x", &[])));
    assert_eq!(endpoints(&builder.clone().build(), &web), ["a", "b"], "the new health policy applies to known endpoints");
    builder.insert_service(service("default", "web.x", &[]));
    assert_eq!(endpoints(&builder.clone().build(), &web), ["a"]);

    builder.insert_workload(unhealthy(backing("a", "10.0.0.1", &[&web, &api])));
    assert!(endpoints(&builder.clone().build(), &web).is_empty(), "an endpoint that became unhealthy leaves");
    builder.insert_workload(backing("a", "10.0.0.1", &[&api]));
    builder.insert_workload(backing("b", "10.0.0.2", &[&web]));
    let snapshot = builder.clone().build();
    assert_eq!(endpoints(&snapshot, &web), ["b"], "an endpoint that left the service leaves");

    assert!(builder.remove("a") && builder.remove("b"));
    let snapshot = builder.build();
    assert!(endpoints(&snapshot, &web).is_empty() && snapshot.staged().is_empty(), "staged endpoints leave with their workload");
}

#[test]
fn a_service_that_was_removed_has_no_endpoints_and_finds_them_again_when_it_returns() {
    let web = key("default", "web.x");
    let mut builder = of_workloads(&[backing("a", "10.0.0.1", &[&web])]).edit();
    builder.insert_service(service("default", "web.x", &["10.1.0.1"]));
    assert_eq!(endpoints(&builder.clone().build(), &web), ["a"]);
    assert!(builder.remove("default/web.x"));
    let snapshot = builder.clone().build();
    assert!(endpoints(&snapshot, &web).is_empty() && snapshot.service(&web).is_none());
    builder.insert_service(service("default", "web.x", &["10.1.0.1"]));
    assert_eq!(endpoints(&builder.build(), &web), ["a"]);
}

#[test]
fn a_removal_names_a_workload_first_then_a_service_and_else_nothing() {
    let mut builder = of_services(&[service("ns", "web.x", &[]), service("ns", "other.x", &[])]).edit();
    builder.insert_workload(workload("ns/web.x", &["10.0.0.1"]));
    assert!(builder.remove("ns/web.x"));
    assert!(builder.clone().build().service(&key("ns", "web.x")).is_some(), "the workload of this uid went first");
    assert!(builder.remove("ns/web.x"));
    for name in ["ns/web.x", "ns/other.x/more", "other.x", "", "/", "ns/"] {
        assert!(!builder.remove(name), "{name:?}");
    }
    assert_eq!(builder.build().services().count(), 1);
}

#[test]
fn a_pod_is_local_by_name_namespace_and_service_account_on_the_local_node_only() {
    let here = workload("c//Pod/default/a", &["10.0.0.1"]);
    let there = Workload { node: "n2".into(), ..workload("c//Pod/default/b", &["10.0.0.2"]) };
    let everywhere = of_workloads(&[here.clone(), there.clone()]);
    assert!(everywhere.local_workload("a", "default", "default").is_some() && everywhere.local_workload("b", "default", "default").is_some());
    let mut builder = everywhere.edit().local_node("n1".into());
    let snapshot = builder.clone().build();
    assert_eq!(snapshot.local_workload("a", "default", "default").unwrap().uid, here.uid);
    for (name, namespace, account) in [("b", "default", "default"), ("a", "other", "default"), ("a", "default", "other"), ("", "default", "default")]
    {
        assert!(snapshot.local_workload(name, namespace, account).is_none(), "{name} {namespace} {account}");
    }
    assert_eq!(snapshot.local_workloads().count(), 1);
    builder.insert_workload(Workload { node: "n1".into(), ..there });
    builder.insert_workload(Workload { node: "n2".into(), ..here });
    let moved = builder.build();
    assert!(moved.local_workload("b", "default", "default").is_some() && moved.local_workload("a", "default", "default").is_none());
}

#[test]
fn a_workload_is_found_by_namespace_and_host_name() {
    let snapshot = of_workloads(&[Workload { hostname: "db.example".into(), ..workload("u", &[]) }, workload("v", &["10.0.0.1"])]);
    assert_eq!(snapshot.workload_by_hostname(&key("default", "db.example")).unwrap().uid, "u");
    assert!(snapshot.workload_by_hostname(&key("other", "db.example")).is_none());
    assert!(snapshot.workload_by_hostname(&key("default", "")).is_none());
}

#[test]
fn replicas_share_their_profile_and_words_and_the_last_one_takes_them_along() {
    let web = key("default", "web.x");
    let replica = |index: usize| backing(&format!("c//Pod/default/{index}"), &format!("10.0.0.{index}"), &[&web]);
    let mut builder = SnapshotBuilder::default();
    (1..5).for_each(|index| builder.insert_workload(replica(index)));
    let snapshot = builder.clone().build();
    let rows: Vec<_> = snapshot.workloads().collect();
    assert!(rows.iter().all(|row| Arc::ptr_eq(&row.profile, &rows[0].profile) && row.node.as_ptr() == rows[0].node.as_ptr()));
    assert_eq!(snapshot.0.interner.sizes().1, 1);
    let words = snapshot.0.interner.sizes().0;
    builder.insert_workload(with(replica(1), |profile| profile.service_account = "changed".into()));
    assert_eq!(builder.clone().build().0.interner.sizes(), (words + 1, 2));
    builder.insert_workload(replica(1));
    assert_eq!(builder.clone().build().0.interner.sizes(), (words, 1));
    builder.insert_service(allowing_all(service("default", "web.x", &["10.1.0.1", "10.2.0.0/16"])));
    builder.remove("default/web.x");
    (1..5).for_each(|index| assert!(builder.remove(&replica(index).uid)));
    assert_eq!(builder.build().0.interner.sizes(), (0, 0));
}

#[test]
fn a_row_is_small_and_the_name_of_a_pod_lies_in_its_uid() {
    assert!(size_of::<Workload>() <= 80 && size_of::<Text>() == 8, "{} bytes", size_of::<Workload>());
    let snapshot = of_workloads(&[workload("c//Pod/default/web-0", &["10.0.0.1"]), Workload { name: "else".into(), ..workload("u", &[]) }]);
    let row = snapshot.workload("c//Pod/default/web-0").unwrap();
    assert_eq!(row.name, "web-0");
    assert!(row.uid.as_bytes().as_ptr_range().contains(&row.name.as_ptr()), "the name was copied");
    assert_eq!(snapshot.workload("u").unwrap().name, "else");
}

#[test]
fn a_uid_that_comes_twice_in_one_draft_is_one_row_the_last() {
    let web = key("default", "web.x");
    let mut builder = of_services(&[service("default", "web.x", &[])]).edit();
    builder.insert_workload(backing("u", "10.0.0.1", &[&web]));
    builder.insert_workload(workload("v", &["10.0.0.1"]));
    builder.insert_workload(backing("u", "10.0.0.2", &[&web]));
    let snapshot = builder.build();
    assert_eq!(snapshot.workload_count(), 2);
    assert_eq!(snapshot.workload_by_address("", ip("10.0.0.1")).unwrap().uid, "v");
    assert_eq!(snapshot.workload_by_address("", ip("10.0.0.2")).unwrap().uid, "u");
    assert_eq!(endpoints(&snapshot, &web), ["u"]);
}

#[test]
fn the_order_of_a_workloads_services_makes_no_second_profile() {
    let (web, api) = (key("default", "web.x"), key("default", "api.x"));
    let snapshot = of_workloads(&[backing("a", "10.0.0.1", &[&web, &api]), backing("b", "10.0.0.2", &[&api, &web, &api])]);
    assert_eq!(snapshot.0.interner.sizes().1, 1);
}
