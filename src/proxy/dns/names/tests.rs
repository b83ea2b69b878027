#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::model::{
    HealthPolicy, HealthStatus, IpFamilies, LoadBalancing, NamespacedHostname, NetworkAddress, NetworkMode, PortMap, Profile, SnapshotBuilder,
    Workload,
};

const SEARCH: [&str; 3] = ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"];

fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    let vip = |text: &&str| {
        let (network, ip) = text.split_once('/').unwrap_or(("", text));
        NetworkAddress { network: network.into(), ip: ip.parse().unwrap() }
    };
    Service { name: "s".into(), namespace: namespace.into(), hostname: hostname.into(), vips: vips.iter().map(vip).collect(), ..Service::default() }
}

fn endpoint(uid: &str, addresses: &[&str], of: (&str, &str)) -> Workload {
    let key = NamespacedHostname { namespace: of.0.into(), hostname: of.1.into() };
    let ports: PortMap = [(80, 8080)].into_iter().collect();
    Workload {
        uid: uid.into(),
        name: uid.into(),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        node: "n".into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(Profile { namespace: of.0.into(), services: vec![(key, ports)], ..Profile::default() }),
    }
}

fn on_network(mut workload: Workload, network: &str) -> Workload {
    Arc::make_mut(&mut workload.profile).network = network.into();
    workload
}

fn snapshot(services: Vec<Service>, workloads: Vec<Workload>) -> Snapshot {
    let mut builder = SnapshotBuilder::default();
    services.into_iter().for_each(|service| builder.insert_service(service));
    workloads.into_iter().for_each(|workload| builder.insert_workload(workload));
    builder.build()
}

/// The mesh of the table: a client in `shop` on the default network.
fn mesh() -> Snapshot {
    let services = vec![
        service("shop", "web.shop.svc.cluster.local", &["10.96.0.1", "fd00::1"]),
        service("back", "api.back.svc.cluster.local", &["10.96.0.2", "other/10.96.0.99"]),
        service("shop", "elsewhere.shop.svc.cluster.local", &["other/10.96.0.3"]),
        Service { ip_families: Some(IpFamilies::Ipv4), ..service("shop", "four.shop.svc.cluster.local", &["10.96.0.4", "fd00::4"]) },
        service("shop", "headless.shop.svc.cluster.local", &[]),
        service("shop", "empty.shop.svc.cluster.local", &[]),
        Service { visibility: Visibility::Namespace, ..service("back", "secret.back.svc.cluster.local", &["10.96.0.5"]) },
        Service { visibility: Visibility::Namespace, ..service("shop", "secret.shop.svc.cluster.local", &["10.96.0.6"]) },
        // Service entries.
        service("back", "example.com", &["240.240.0.1", "2001:2::1"]),
        service("back", "*.example.com", &["240.240.0.2"]),
        service("back", "*.deep.example.com", &["240.240.0.3"]),
        service("back", "novip.example.org", &[]),
        service("back", "mapped.example.org", &["::ffff:240.240.0.4"]),
        // One name in three namespaces, and in none of the client's.
        service("a", "tie.example.net", &["240.240.1.1"]),
        Service { canonical: true, ..service("b", "tie.example.net", &["240.240.1.2"]) },
        service("c", "tie.example.net", &["240.240.1.3"]),
        service("a", "loose.example.net", &["240.240.2.1"]),
        service("c", "loose.example.net", &["240.240.2.3"]),
        Service { canonical: true, ..service("b", "home.example.net", &["240.240.3.2"]) },
        service("shop", "home.example.net", &["240.240.3.1"]),
        // The one at home has no answer to give.
        service("shop", "hollow.example.net", &[]),
        service("b", "hollow.example.net", &["240.240.4.2"]),
        // A name that looks like one of the cluster's and like a shorter one of its own.
        service("back", "web.shop", &["240.240.5.1"]),
        service("ns", "x.y.svc.cluster.local", &["10.96.1.1"]),
    ];
    let headless = ("shop", "headless.shop.svc.cluster.local");
    let workloads = vec![
        endpoint("p0", &["10.0.0.1", "10.0.0.11", "fd00:1::1"], headless),
        endpoint("p1", &["10.0.0.2"], headless),
        endpoint("p2", &["10.0.0.2"], headless),
        on_network(endpoint("far", &["10.0.0.3"], headless), "other"),
        Workload { status: HealthStatus::Unhealthy, ..endpoint("sick", &["10.0.0.4"], headless) },
        endpoint("nowhere", &[], headless),
    ];
    snapshot(services, workloads)
}

fn search() -> Vec<String> {
    SEARCH.map(str::to_owned).to_vec()
}

fn scope(search: &[String]) -> Scope<'_> {
    Scope { namespace: "shop", network: "", search, cluster_domain: "cluster.local", preferred_namespace: None }
}

fn ask(name: &str, family: Family) -> Option<(Option<usize>, String)> {
    let (snapshot, search) = (mesh(), search());
    let found = find(&snapshot, &scope(&search), name)?;
    let addresses = addresses(&snapshot, &scope(&search), &found.service, family);
    Some((found.canonical_labels, addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")))
}

#[test]
fn names_of_the_mesh_are_answered_as_the_reference_does_and_no_others() {
    use Family::{Ipv4, Ipv6};
    let own = |addresses: &str| Some((None, addresses.to_owned()));
    let cname = |labels: usize, addresses: &str| Some((Some(labels), addresses.to_owned()));
    let table = [
        // Services of Kubernetes under every name that they have.
        ("web", Ipv4, own("10.96.0.1")),
        ("web", Ipv6, own("fd00::1")),
        ("web.shop.svc", Ipv4, own("10.96.0.1")),
        ("web.shop.svc.cluster.local", Ipv4, own("10.96.0.1")),
        ("api.back", Ipv4, own("10.96.0.2")),
        ("api.back.svc", Ipv4, own("10.96.0.2")),
        ("api", Ipv4, None),
        ("x.y", Ipv4, own("10.96.1.1")),
        // What a resolver makes of names when it goes through its search list. `api.back.svc.cluster.local` is itself a name.
        ("api.back.svc.cluster.local", Ipv4, own("10.96.0.2")),
        ("api.back.shop.svc.cluster.local", Ipv4, cname(2, "10.96.0.2")),
        ("web.shop.svc.cluster.local.shop.svc.cluster.local", Ipv4, cname(5, "10.96.0.1")),
        ("example.com.shop.svc.cluster.local", Ipv4, cname(2, "240.240.0.1")),
        ("example.com.svc.cluster.local", Ipv6, cname(2, "2001:2::1")),
        ("example.com.cluster.local", Ipv4, cname(2, "240.240.0.1")),
        // A wildcard is no name that a CNAME could lead to.
        ("a.example.com.shop.svc.cluster.local", Ipv4, own("240.240.0.2")),
        // A shorter name of a service entry comes before what Kubernetes would make of it.
        ("web.shop", Ipv4, own("240.240.5.1")),
        // Service entries and wildcards, the most specific one first.
        ("example.com", Ipv4, own("240.240.0.1")),
        ("example.com", Ipv6, own("2001:2::1")),
        ("a.example.com", Ipv4, own("240.240.0.2")),
        ("b.a.example.com", Ipv4, own("240.240.0.2")),
        ("deep.example.com", Ipv4, own("240.240.0.2")),
        ("a.deep.example.com", Ipv4, own("240.240.0.3")),
        ("*.example.com", Ipv4, own("240.240.0.2")),
        ("anexample.com", Ipv4, None),
        ("com", Ipv4, None),
        ("", Ipv4, None),
        ("mapped.example.org", Ipv4, own("240.240.0.4")),
        ("mapped.example.org", Ipv6, own("")),
        // Owned, without an address of that kind: an answer, but an empty one.
        ("api.back", Ipv6, own("")),
        ("four", Ipv4, own("10.96.0.4")),
        ("four", Ipv6, own("")),
        ("elsewhere", Ipv4, own("")),
        ("empty", Ipv4, own("")),
        // Headless: the healthy endpoints of the client's network, the first address of each.
        ("headless", Ipv4, own("10.0.0.1 10.0.0.2")),
        ("headless", Ipv6, own("fd00:1::1")),
        ("p0.headless.shop.svc.cluster.local", Ipv4, None),
        // Left to others: no address of its own and not of Kubernetes.
        ("novip.example.org", Ipv4, None),
        ("google.com", Ipv4, None),
        ("google.com.shop.svc.cluster.local", Ipv4, None),
        // Visibility.
        ("secret.back.svc.cluster.local", Ipv4, None),
        ("secret", Ipv4, own("10.96.0.6")),
        // One name of several services: at home, then the canonical one, then the first by name of namespace; only those with an answer.
        ("tie.example.net", Ipv4, own("240.240.1.2")),
        ("loose.example.net", Ipv4, own("240.240.2.1")),
        ("home.example.net", Ipv4, own("240.240.3.1")),
        ("hollow.example.net", Ipv4, own("240.240.4.2")),
    ];
    for (name, family, expected) in table {
        assert_eq!(ask(name, family), expected, "{name} {family:?}");
    }
}

#[test]
fn the_preferred_namespace_wins_only_when_nothing_else_decides() {
    let (snapshot, search) = (mesh(), search());
    let scope = Scope { preferred_namespace: Some("c"), ..scope(&search) };
    let namespace = |name: &str| find(&snapshot, &scope, name).unwrap().service.namespace.to_string();
    assert_eq!(namespace("loose.example.net"), "c");
    assert_eq!(namespace("tie.example.net"), "b", "canonical");
    assert_eq!(namespace("home.example.net"), "shop");
}

#[test]
fn a_client_of_another_network_gets_the_addresses_of_its_own() {
    let (snapshot, search) = (mesh(), search());
    let scope = Scope { network: "other", ..scope(&search) };
    let ask = |name: &str| {
        let found = find(&snapshot, &scope, name).unwrap();
        addresses(&snapshot, &scope, &found.service, Family::Ipv4).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!((ask("api.back"), ask("web"), ask("headless")), ("10.96.0.99".into(), String::new(), "10.0.0.3".into()));
}

#[test]
fn unhealthy_endpoints_of_a_headless_service_are_given_when_it_publishes_them_and_host_network_ones_always() {
    let of = ("shop", "all.shop.svc.cluster.local");
    let all = LoadBalancing { health_policy: HealthPolicy::AllowAll, ..LoadBalancing::default() };
    let mut host = endpoint("host", &["10.0.0.9"], of);
    Arc::make_mut(&mut host.profile).network_mode = NetworkMode::HostNetwork;
    let sick = Workload { status: HealthStatus::Unhealthy, ..endpoint("sick", &["10.0.0.4"], of) };
    let snapshot = snapshot(vec![Service { load_balancing: Some(all), ..service(of.0, of.1, &[]) }], vec![sick, host]);
    let search = search();
    let found = find(&snapshot, &scope(&search), "all").unwrap();
    let given = addresses(&snapshot, &scope(&search), &found.service, Family::Ipv4);
    assert_eq!(given.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.4", "10.0.0.9"]);
}

/// The names under which a name is looked up, written down from the text of the reference with lists of labels, in the slowest way.
fn oracle_names(name: &str, search: &[String], namespace: &str, domain: &str) -> Vec<(String, Option<usize>)> {
    let split = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
    let kubernetes = |labels: &[String]| {
        let join = |more: &[&str]| labels.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>().join(".");
        let is_svc = labels.last().is_some_and(|label| label == "svc");
        let mut all = Vec::new();
        if is_svc && [3, 4].contains(&labels.len()) {
            all.push(join(&[domain]));
        }
        if labels.len() == 2 || labels.len() == 3 {
            all.push(join(&["svc", domain]));
        }
        if labels.len() == 1 || labels.len() == 2 {
            all.push(join(&[namespace, "svc", domain]));
        }
        all
    };
    let labels = split(name);
    let mut all = vec![(name.to_owned(), None)];
    all.extend(kubernetes(&labels).into_iter().map(|alias| (alias, None)));
    for domain in search {
        let tail = split(domain);
        if labels.len() > tail.len() && labels[labels.len() - tail.len()..] == tail[..] {
            let rest = labels[..labels.len() - tail.len()].to_vec();
            all.push((rest.join("."), Some(rest.len())));
            all.extend(kubernetes(&rest).into_iter().map(|alias| (alias, Some(rest.len()))));
        }
    }
    all
}

/// The service of a name by a walk over all services for every alias and every wildcard.
fn oracle(snapshot: &Snapshot, scope: &Scope<'_>, name: &str) -> Option<(String, String, Option<usize>)> {
    for (alias, labels) in oracle_names(name, scope.search, scope.namespace, scope.cluster_domain) {
        let labels_of_alias: Vec<&str> = alias.split('.').collect();
        let wildcards = (1..labels_of_alias.len()).map(|from| format!("*.{}", labels_of_alias[from..].join(".")));
        for candidate in std::iter::once(alias.clone()).chain(wildcards) {
            let mut best: Option<&Arc<Service>> = None;
            for service in snapshot.services().filter(|service| service.hostname == *candidate) {
                let cluster = service.hostname.ends_with(&format!(".svc.{}", scope.cluster_domain));
                let seen = service.visibility == Visibility::Public || service.namespace == *scope.namespace;
                if !seen || service.vips.is_empty() && !cluster {
                    continue;
                }
                let home = |service: &Service| service.namespace == *scope.namespace;
                let preferred = |service: &Service| scope.preferred_namespace == Some(&*service.namespace);
                let better = best.is_none_or(|best| {
                    if home(service) != home(best) {
                        return home(service);
                    }
                    if service.canonical != best.canonical {
                        return service.canonical;
                    }
                    if preferred(service) != preferred(best) {
                        return preferred(service);
                    }
                    service.namespace < best.namespace
                });
                if better {
                    best = Some(service);
                }
            }
            if let Some(service) = best {
                let labels = labels.filter(|_| !candidate.starts_with('*'));
                return Some((service.namespace.to_string(), candidate, labels));
            }
        }
    }
    None
}

fn word() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "shop", "svc", "cluster", "local", "com"]).prop_map(str::to_owned)
}

fn dotted(most: usize) -> impl Strategy<Value = String> {
    let suffix = prop::sample::select(vec!["", ".svc", ".svc.cluster.local", ".cluster.local", ".shop.svc.cluster.local"]);
    (prop::collection::vec(word(), 1..=most), suffix).prop_map(|(words, suffix)| format!("{}{suffix}", words.join(".")))
}

fn any_service() -> impl Strategy<Value = Service> {
    let namespace = prop::sample::select(vec!["shop", "a", "b"]);
    let (wildcard, vip, canonical, private) = (prop::bool::weighted(0.3), any::<bool>(), any::<bool>(), prop::bool::weighted(0.2));
    (namespace, dotted(2), wildcard, vip, canonical, private).prop_map(|(namespace, name, wildcard, vip, canonical, private)| {
        let hostname = if wildcard { format!("*.{name}") } else { name };
        let visibility = if private { Visibility::Namespace } else { Visibility::Public };
        Service { canonical, visibility, ..service(namespace, &hostname, if vip { &["10.96.0.1"] } else { &[] }) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn every_name_means_what_a_walk_over_all_services_says(
        services in prop::collection::vec(any_service(), 0..12),
        names in prop::collection::vec(dotted(3), 1..8),
        preferred in prop::option::of(prop::sample::select(vec!["a", "b"])),
    ) {
        let hostnames: BTreeSet<String> = services.iter().map(|service| service.hostname.replace('*', "any")).collect();
        let snapshot = snapshot(services, Vec::new());
        let search = search();
        let scope = Scope { preferred_namespace: preferred, ..scope(&search) };
        for name in names.into_iter().chain(hostnames) {
            let found = find(&snapshot, &scope, &name);
            let found = found.map(|found| (found.service.namespace.to_string(), found.hostname, found.canonical_labels));
            prop_assert_eq!(found, oracle(&snapshot, &scope, &name), "{}", name);
        }
    }
}

fn unknown_to(snapshot: &Snapshot, scope: &Scope<'_>, name: &str) -> Vec<String> {
    unknown(snapshot, scope, name).iter().map(ToString::to_string).collect()
}

#[test]
fn what_a_name_may_mean_is_asked_for_most_specific_first_and_little_of_it() {
    let (search, nothing) = (search(), Snapshot::default());
    for (name, expected) in [
        ("web", &["shop/web", "shop/web.shop.svc.cluster.local"][..]),
        ("api.back", &["shop/api.back", "back/api.back.svc.cluster.local"]),
        ("api.back.svc", &["back/api.back.svc.cluster.local"]),
        // As it is, and as what is left without a search domain.
        ("api.back.svc.cluster.local", &["back/api.back.svc.cluster.local", "shop/api.back"]),
        ("pod.api.back.svc.cluster.local", &["shop/pod.api.back", "shop/*.api.back"]),
        ("example.com", &["shop/example.com", "com/example.com.svc.cluster.local"]),
        ("www.example.com", &["shop/www.example.com", "shop/*.example.com"]),
        // What a resolver makes of it with its search domains: what is left without each of them.
        ("www.example.com.svc.cluster.local", &["shop/www.example.com", "shop/*.example.com"]),
        (
            "example.com.shop.svc.cluster.local",
            &["shop/example.com", "com/example.com.svc.cluster.local", "shop/example.com.shop", "shop/*.com.shop"],
        ),
        ("cluster.local", &["local/cluster.local.svc.cluster.local"]),
        ("", &[]),
    ] {
        assert_eq!(unknown_to(&nothing, &scope(&search), name), expected, "{name}");
    }
    let preferring = Scope { preferred_namespace: Some("back"), ..scope(&search) };
    assert_eq!(
        unknown_to(&nothing, &preferring, "www.example.com"),
        ["shop/www.example.com", "back/www.example.com", "shop/*.example.com", "back/*.example.com"]
    );
    let long = format!("{}example.com", "a.".repeat(100));
    assert_eq!(unknown_to(&nothing, &scope(&search), &long).len(), MOST_UNKNOWN);
    // What is known, and what would come after it, is not asked for.
    assert_eq!(unknown_to(&mesh(), &scope(&search), "web.shop.svc.cluster.local"), Vec::<String>::new());
    assert_eq!(unknown_to(&mesh(), &scope(&search), "home.example.net"), Vec::<String>::new());
    assert_eq!(unknown_to(&mesh(), &scope(&search), "example.com"), ["shop/example.com"], "one of the client's own namespace would win");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// On demand a name means what it means to whoever knows everything that can be asked for.
    #[test]
    fn what_was_asked_for_is_all_that_the_meaning_of_a_name_depends_on(
        services in prop::collection::vec(any_service(), 0..12),
        names in prop::collection::vec(dotted(2), 1..8),
        known in any::<u16>(),
    ) {
        let mut services = services;
        let mut seen = BTreeSet::new();
        services.retain(|service| seen.insert(service.key().to_string()));
        let (search, all) = (search(), snapshot(services.clone(), Vec::new()));
        let scope = scope(&search);
        for name in names {
            let known = services.iter().enumerate().filter(|(index, _)| known & (1 << index) != 0).map(|(_, service)| service.clone());
            let known: Vec<Service> = known.collect();
            let before = snapshot(known.clone(), Vec::new());
            let asked = unknown(&before, &scope, &name);
            if asked.len() == MOST_UNKNOWN {
                continue;
            }
            let answered = asked.iter().filter_map(|key| all.service(key)).map(|service| (*service).clone());
            let after = snapshot(known.into_iter().chain(answered).collect(), Vec::new());
            prop_assert_eq!(unknown(&after, &scope, &name).iter().filter_map(|key| all.service(key)).count(), 0, "{}: asked for all at once", name);
            // A name of another namespace outside of the cluster's domain cannot be asked for.
            let can_be = |service: &Service| {
                known_or_askable(&before, &scope, service)
            };
            let visible = snapshot(services.iter().filter(|service| can_be(service)).cloned().collect(), Vec::new());
            let meaning = |snapshot: &Snapshot| find(snapshot, &scope, &name).map(|found| (found.service.key().to_string(), found.hostname));
            prop_assert_eq!(meaning(&after), meaning(&visible), "{}", name);
        }
    }
}

fn known_or_askable(snapshot: &Snapshot, scope: &Scope<'_>, service: &Service) -> bool {
    snapshot.service(&service.key()).is_some() || namespaces(scope, &service.hostname).contains(&&*service.namespace)
}
