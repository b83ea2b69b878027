//! The snapshot against a slow oracle: two plain maps that are searched row by row in the words of the reference.

use proptest::prelude::*;

use super::*;

const UIDS: [&str; 5] = ["c//Pod/n1/a", "c//Pod/n1/b", "c//Pod/n2/a", "c/WorkloadEntry/n1/a", "n1/web.x"];
const ADDRESSES: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.1.0.1", "fd00::1"];
const RANGES: [&str; 4] = ["10.0.0.0/8", "10.0.0.0/24", "10.0.0.2/32", "fd00::/16"];
const NAMESPACES: [&str; 2] = ["n1", "n2"];
const NETWORKS: [&str; 2] = ["", "far"];
const HOSTS: [&str; 2] = ["web.x", "api.x"];

#[derive(Debug, Clone)]
enum Step {
    Workload(Workload),
    Service(Service),
    Remove(String),
    Publish,
}

#[derive(Debug, Clone, Default)]
struct Oracle {
    workloads: BTreeMap<Text, Workload>,
    services: BTreeMap<(Text, Text), Service>,
}

impl Oracle {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Workload(workload) => drop(self.workloads.insert(workload.uid.clone(), workload.clone())),
            Step::Service(service) => drop(self.services.insert((service.namespace.clone(), service.hostname.clone()), service.clone())),
            Step::Remove(name) => {
                if self.workloads.remove(name.as_str()).is_none()
                    && let Some((namespace, hostname)) = name.split_once('/')
                {
                    self.services.remove(&(namespace.into(), hostname.into()));
                }
            }
            Step::Publish => {}
        }
    }

    fn owner(&self, network: &str, address: IpAddr) -> Option<&Workload> {
        let claims = |workload: &&Workload| {
            let profile = &workload.profile;
            profile.network_mode == NetworkMode::Standard && profile.network == *network && workload.addresses.contains(&address)
        };
        let pod = |workload: &&Workload| workload.uid.contains("//Pod/");
        let hbone = |workload: &&Workload| workload.profile.protocol == TunnelProtocol::Hbone;
        let mut rows = self.workloads.values().filter(claims);
        let all = || self.workloads.values().filter(claims);
        all().find(|row| pod(row) && hbone(row)).or_else(|| all().find(pod)).or_else(|| all().find(hbone)).or_else(|| rows.next())
    }

    fn pick<'a>(candidates: Vec<&'a Service>, client: Option<&str>) -> Option<&'a Service> {
        let Some(client) = client else {
            return candidates.iter().find(|service| service.canonical).or_else(|| candidates.first()).copied();
        };
        let seen: Vec<_> =
            candidates.into_iter().filter(|service| service.visibility == Visibility::Public || service.namespace == *client).collect();
        let home = seen.iter().find(|service| service.namespace == *client);
        home.or_else(|| seen.iter().find(|service| service.canonical)).or_else(|| seen.first()).copied()
    }

    fn by_hostname(&self, hostname: &str, client: Option<&str>) -> Option<&Service> {
        Self::pick(self.services.values().filter(|service| service.hostname == *hostname).collect(), client)
    }

    fn by_address(&self, network: &str, address: IpAddr, client: Option<&str>) -> Option<&Service> {
        let home = |service: &Service| client.is_some_and(|client| service.namespace == *client);
        // Within one namespace and address the canonical service counts, then the name.
        let exact = |service: &&Service| service.vips.iter().any(|vip| vip.network == *network && vip.ip == address);
        let mut candidates: Vec<_> = self.services.values().filter(exact).collect();
        candidates.sort_by_key(|service| !service.canonical);
        if let Some(service) = Self::pick(candidates, client) {
            return Some(service);
        }
        let mut candidates = Vec::new();
        for service in self.services.values() {
            for (on, range) in &service.cidr_vips {
                if *on == *network && range.contains(&address) && (client.is_none() || service.visibility == Visibility::Public || home(service)) {
                    candidates.push((service, range.prefix_len()));
                }
            }
        }
        candidates.sort_by_key(|(service, length)| (!home(service), Reverse(*length), !service.canonical));
        candidates.first().map(|(service, _)| *service)
    }

    fn endpoints(&self, key: &NamespacedHostname) -> Vec<Text> {
        let Some(service) = self.services.get(&(key.namespace.clone(), key.hostname.clone())) else { return Vec::new() };
        let counts =
            |workload: &&Workload| workload.service_ports(key).is_some() && (workload.status == HealthStatus::Healthy || service.allows_unhealthy());
        self.workloads.values().filter(counts).map(|workload| workload.uid.clone()).collect()
    }
}

/// As the snapshot gives it.
fn shared<T: Clone>(row: Option<&T>) -> Option<Arc<T>> {
    row.cloned().map(Arc::new)
}

fn check(snapshot: &Snapshot, oracle: &Oracle) -> Result<(), TestCaseError> {
    let mut uids: Vec<_> = snapshot.workloads().map(|workload| &workload.uid).collect();
    uids.sort();
    prop_assert_eq!(uids, oracle.workloads.keys().collect::<Vec<_>>());
    let mut keys: Vec<_> = snapshot.services().map(|service| (service.namespace.clone(), service.hostname.clone())).collect();
    keys.sort();
    prop_assert_eq!(&keys, &oracle.services.keys().cloned().collect::<Vec<_>>());
    for uid in UIDS {
        prop_assert_eq!(snapshot.workload(uid), shared(oracle.workloads.get(uid)));
    }
    for client in [None, Some("n1"), Some("n2"), Some("n3")] {
        for network in NETWORKS {
            for address in ADDRESSES.map(ip).into_iter().chain([ip("10.9.9.9")]) {
                prop_assert_eq!(snapshot.workload_by_address(network, address), shared(oracle.owner(network, address)));
                prop_assert_eq!(snapshot.service_by_address(network, address, client), shared(oracle.by_address(network, address, client)));
            }
        }
        for host in HOSTS {
            prop_assert_eq!(snapshot.service_by_hostname(host, client), shared(oracle.by_hostname(host, client)));
        }
    }
    let mut staged = 0;
    for (namespace, host) in NAMESPACES.into_iter().flat_map(|namespace| HOSTS.map(|host| (namespace, host))) {
        let key = key(namespace, host);
        let mut found: Vec<_> = snapshot.endpoints(&key).map(|(workload, _)| workload.uid.clone()).collect();
        found.sort();
        prop_assert_eq!(found, oracle.endpoints(&key));
        let backers = oracle.workloads.values().filter(|workload| workload.service_ports(&key).is_some()).count();
        staged += if oracle.services.contains_key(&(key.namespace.clone(), key.hostname.clone())) { 0 } else { backers };
        let named = |row: &&Workload| row.hostname == key.hostname && row.profile.namespace == key.namespace;
        prop_assert_eq!(snapshot.workload_by_hostname(&key), shared(oracle.workloads.values().find(named)));
        for name in ["a", "b"] {
            let local = |row: &&Workload| row.node == "near" && row.name == name && row.profile.namespace == namespace;
            prop_assert_eq!(snapshot.local_workload(name, namespace, "default"), shared(oracle.workloads.values().find(local)));
        }
    }
    prop_assert_eq!(snapshot.staged().values().map(Vec::len).sum::<usize>(), staged);
    Ok(())
}

fn subset(of: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    proptest::sample::subsequence(of, 0..=of.len())
}

fn any_workload() -> impl Strategy<Value = Workload> {
    let place = (proptest::sample::select(&UIDS[..]), proptest::sample::select(&NAMESPACES[..]), proptest::sample::select(&NETWORKS[..]));
    let names = (subset(&ADDRESSES), subset(&HOSTS), proptest::sample::select(&["", "web.x"][..]));
    (place, names, any::<[bool; 5]>()).prop_map(|((uid, namespace, network), (addresses, hosts, hostname), [pod, healthy, hbone, near, foreign])| {
        let home = if foreign { "n2" } else { "n1" };
        let mut services: Vec<_> = hosts.into_iter().map(|host| (key(home, host), PortMap::from_iter([(80, 8080)]))).collect();
        services.sort_by(|left, right| left.0.cmp(&right.0));
        let mut row = with(workload(uid, &addresses), |profile| {
            profile.namespace = namespace.into();
            profile.network = network.into();
            profile.network_mode = if pod { NetworkMode::Standard } else { NetworkMode::HostNetwork };
            profile.protocol = if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None };
            profile.services = services;
        });
        row.hostname = hostname.into();
        row.node = if near { "near" } else { "far" }.into();
        if healthy { row } else { unhealthy(row) }
    })
}

fn any_service() -> impl Strategy<Value = Service> {
    let names = (proptest::sample::select(&NAMESPACES[..]), proptest::sample::select(&HOSTS[..]), proptest::sample::select(&NETWORKS[..]));
    (names, subset(&ADDRESSES), subset(&RANGES), any::<[bool; 3]>()).prop_map(
        |((namespace, host, network), addresses, ranges, [canonical, private, all])| {
            let mut row = service(namespace, host, &[addresses, ranges].concat());
            row.vips.iter_mut().for_each(|vip| vip.network = network.into());
            row.cidr_vips.iter_mut().for_each(|(on, _)| *on = network.into());
            row.canonical = canonical;
            row.visibility = if private { Visibility::Namespace } else { Visibility::Public };
            if all { allowing_all(row) } else { row }
        },
    )
}

/// Whether a step has to do with a workload of the local node, as it was or as it will be.
fn is_about_near(step: &Step, oracle: &Oracle) -> bool {
    let known = |uid: &str| oracle.workloads.get(uid).is_some_and(|row| row.node == "near");
    match step {
        Step::Workload(workload) => workload.node == "near" || known(&workload.uid),
        Step::Remove(name) => known(name),
        Step::Service(_) | Step::Publish => false,
    }
}

fn any_step() -> impl Strategy<Value = Step> {
    let names: Vec<String> =
        UIDS.iter().map(ToString::to_string).chain(NAMESPACES.iter().flat_map(|ns| HOSTS.map(|host| format!("{ns}/{host}")))).collect();
    prop_oneof![
        4 => any_workload().prop_map(Step::Workload),
        3 => any_service().prop_map(Step::Service),
        3 => proptest::sample::select(names).prop_map(Step::Remove),
        1 => Just(Step::Publish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_order_of_inserts_and_removals_answers_like_a_search_of_the_rows(steps in proptest::collection::vec(any_step(), 0..60)) {
        let (mut oracle, mut builder) = (Oracle::default(), SnapshotBuilder::default().local_node("near".into()));
        let mut published = Vec::new();
        let (mut local, mut touched) = (Vec::new(), false);
        for step in &steps {
            touched |= is_about_near(step, &oracle);
            oracle.apply(step);
            match step.clone() {
                Step::Workload(workload) => builder.insert_workload(workload),
                Step::Service(service) => builder.insert_service(service),
                Step::Remove(name) => drop(builder.remove(&name)),
                Step::Publish => {
                    let now: Vec<_> = oracle.workloads.values().filter(|row| row.node == "near").cloned().collect();
                    prop_assert!(builder.local_changed() || now == local, "a change of this node is not told");
                    prop_assert!(touched || !builder.local_changed(), "woken for others");
                    (local, touched) = (now, false);
                    let snapshot = builder.build();
                    builder = snapshot.edit();
                    published.push((snapshot, oracle.clone()));
                }
            }
        }
        let last = builder.clone().build();
        published.push((last, oracle.clone()));
        for (snapshot, oracle) in &published {
            check(snapshot, oracle)?;
        }
        // The same rows in another order, in one batch, with the node told last.
        let mut other = SnapshotBuilder::default();
        oracle.workloads.values().rev().for_each(|workload| other.insert_workload(workload.clone()));
        oracle.services.values().rev().for_each(|service| other.insert_service(service.clone()));
        check(&other.local_node("near".into()).build(), &oracle)?;
        // Nothing stays behind when all rows leave.
        oracle.workloads.keys().for_each(|uid| assert!(builder.remove(uid)));
        oracle.services.keys().for_each(|(namespace, hostname)| assert!(builder.remove(&format!("{namespace}/{hostname}"))));
        let empty = builder.build();
        prop_assert_eq!(empty.0.interner.sizes(), (0, 0));
        prop_assert!(empty.0.members.is_empty() && empty.0.vips.is_empty() && empty.0.ranges.is_empty() && empty.0.local.is_empty());
        prop_assert!(empty.0.by_address.is_empty() && empty.0.by_hostname.is_empty() && empty.0.service_hosts.is_empty());
        prop_assert!(empty.0.range_lengths.is_empty() && empty.0.by_uid.is_empty() && empty.0.by_key.is_empty());
        prop_assert!(empty.0.workloads.is_empty() && empty.0.services.is_empty());
    }
}
