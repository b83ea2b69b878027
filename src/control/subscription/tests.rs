#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::discovery::{Edit, Mesh, Publisher};
use crate::model::{HealthStatus, NamespacedHostname, NetworkAddress, Profile, Service, Workload};
use crate::policy::{self, Action, Authorization, Scope};

const NODE: &str = "n0";

/// A small mesh in the simplest form, from which everything is recomputed.
#[derive(Debug, Clone, Default, PartialEq)]
struct Little {
    workloads: BTreeMap<u8, LittleWorkload>,
    /// Services, with a value that changes their content.
    services: BTreeMap<u8, u16>,
    policies: BTreeMap<u8, u16>,
}

#[derive(Debug, Clone, PartialEq)]
struct LittleWorkload {
    node: u8,
    services: BTreeSet<u8>,
    healthy: bool,
    capacity: u32,
}

impl Little {
    fn publish(&self, before: &Self, publisher: &mut Publisher) {
        let mut edits = Vec::new();
        edits.extend(before.workloads.keys().filter(|id| !self.workloads.contains_key(id)).map(|id| Edit::Remove(uid(*id).into())));
        edits.extend(before.services.keys().filter(|id| !self.services.contains_key(id)).map(|id| Edit::Remove(service_name(*id).into())));
        edits.extend(before.policies.keys().filter(|id| !self.policies.contains_key(id)).map(|id| Edit::RemovePolicy(policy_name(*id).into())));
        for (id, workload) in &self.workloads {
            let services = workload.services.iter().map(|service| {
                let hostname = format!("s{service}").into();
                (NamespacedHostname { namespace: "ns".into(), hostname }, [(80, 8080)].into_iter().collect())
            });
            edits.push(Edit::Workload(Workload {
                uid: uid(*id).into(),
                name: format!("w{id}").into(),
                addresses: address(0, *id).into(),
                node: format!("n{}", workload.node).into(),
                hostname: "".into(),
                status: if workload.healthy { HealthStatus::Healthy } else { HealthStatus::Unhealthy },
                capacity: workload.capacity,
                profile: Arc::new(Profile { namespace: "ns".into(), services: services.collect(), ..Profile::default() }),
            }));
        }
        for (id, port) in &self.services {
            edits.push(Edit::Service(Service {
                name: format!("s{id}").into(),
                namespace: "ns".into(),
                hostname: format!("s{id}").into(),
                vips: vec![NetworkAddress { network: "".into(), ip: address(1, *id) }],
                ports: [(80, *port)].into_iter().collect(),
                ..Service::default()
            }));
        }
        for (id, port) in &self.policies {
            let conditions = policy::Match { destination_ports: vec![*port], ..policy::Match::default() };
            let rules = vec![policy::Rule { clauses: vec![policy::Clause { matches: vec![conditions] }] }];
            edits.push(Edit::Policy(Authorization::new(format!("p{id}"), "ns", Scope::Namespace, Action::Deny, rules)));
        }
        publisher.publish(edits);
    }

    /// Everything that a client must know that asked for `name`.
    fn belonging(&self, name: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for (id, workload) in &self.workloads {
            if name == uid(*id) || name == format!("/{}", address(0, *id)) {
                found.insert(uid(*id));
                workload.services.iter().for_each(|service| found.extend(self.with_endpoints(*service)));
            }
        }
        for id in self.services.keys() {
            if name == service_name(*id) || name == format!("/{}", address(1, *id)) {
                found.extend(self.with_endpoints(*id));
            }
        }
        found
    }

    fn with_endpoints(&self, service: u8) -> BTreeSet<String> {
        if !self.services.contains_key(&service) {
            return BTreeSet::new();
        }
        let endpoints = self.workloads.iter().filter(|(_, workload)| workload.healthy && workload.services.contains(&service));
        endpoints.map(|(id, _)| uid(*id)).chain([service_name(service)]).collect()
    }
}

fn uid(id: u8) -> String {
    format!("c//Pod/ns/w{id}")
}

fn service_name(id: u8) -> String {
    format!("ns/s{id}")
}

fn policy_name(id: u8) -> String {
    format!("ns/p{id}")
}

fn address(kind: u8, id: u8) -> IpAddr {
    Ipv4Addr::new(10, kind, 0, id).into()
}

#[derive(Debug, Clone)]
enum Step {
    Workload(u8, Option<LittleWorkload>),
    Service(u8, Option<u16>),
    Policy(u8, Option<u16>),
    Ask(Vec<u8>),
    Leave(Vec<u8>),
    Reconnect(Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let workload = (0..3_u8, prop::collection::btree_set(0..3_u8, 0..3), any::<bool>(), 1..3_u32)
        .prop_map(|(node, services, healthy, capacity)| LittleWorkload { node, services, healthy, capacity });
    let step = prop_oneof![
        4 => (0..5_u8, prop::option::weighted(0.7, workload)).prop_map(|(id, workload)| Step::Workload(id, workload)),
        3 => (0..3_u8, prop::option::weighted(0.7, 1..3_u16)).prop_map(|(id, port)| Step::Service(id, port)),
        2 => (0..3_u8, prop::option::weighted(0.7, 1..3_u16)).prop_map(|(id, port)| Step::Policy(id, port)),
        3 => prop::collection::vec(0..20_u8, 1..3).prop_map(Step::Ask),
        1 => prop::collection::vec(0..20_u8, 1..3).prop_map(Step::Leave),
        1 => any::<Index>().prop_map(Step::Reconnect),
    ];
    prop::collection::vec(step, 1..24)
}

/// One of the names that a client may come by, whether or not there is such a thing.
fn name(kind: Kind, number: u8) -> String {
    match (kind, number % 4, number / 4) {
        (Kind::Authorization, _, id) => policy_name(id),
        (_, 0, id) => uid(id),
        (_, 1, id) => service_name(id),
        (_, 2, id) => format!("/{}", address(0, id)),
        (_, _, id) => format!("/{}", address(1, id)),
    }
}

/// A client that believes what it is told.
#[derive(Debug, Default)]
struct Client {
    view: BTreeMap<String, String>,
    told: BTreeSet<String>,
}

impl Client {
    fn apply(&mut self, push: &Push) {
        let items = match &push.upserts {
            Upserts::All(set) => set.entries.values().map(Item::from).collect(),
            Upserts::Some(items) => items.clone(),
        };
        for item in items {
            self.view.insert(item.entry.name.to_string(), item.entry.version.clone());
            self.told.extend(item.entry.row.aliases().into_iter().chain(item.aliases).chain([item.entry.name.to_string()]));
        }
        for name in &push.removed {
            self.view.remove(name);
            self.told.insert(name.clone());
        }
    }
}

fn current(set: &Set) -> BTreeMap<String, String> {
    set.entries.values().map(|entry| (entry.name.to_string(), entry.version.clone())).collect()
}

/// Runs a schedule, and checks the client's view after every step.
fn run(kind: Kind, wildcard: bool, halves: bool, steps: Vec<Step>) {
    let (mut publisher, mesh): (Publisher, Mesh) = Publisher::new(None);
    let mut catalog = Catalog::default();
    let (mut little, mut client, mut asked) = (Little::default(), Client::default(), BTreeSet::new());
    let first = |versions: BTreeMap<String, String>, asked: &BTreeSet<String>| DeltaDiscoveryRequest {
        resource_names_subscribe: if wildcard { Vec::new() } else { asked.iter().cloned().chain([WILDCARD.to_owned()]).collect() },
        resource_names_unsubscribe: if wildcard { Vec::new() } else { vec![WILDCARD.to_owned()] },
        initial_resource_versions: versions,
        ..DeltaDiscoveryRequest::default()
    };
    let (mut subscription, push) = Subscription::first(kind, Some(NODE.into()), &first(BTreeMap::new(), &asked), &catalog).unwrap();
    client.apply(&push);
    for step in steps {
        let before = little.clone();
        match step {
            Step::Workload(id, workload) => drop(set(&mut little.workloads, id, workload)),
            Step::Service(id, port) => drop(set(&mut little.services, id, port)),
            Step::Policy(id, port) => drop(set(&mut little.policies, id, port)),
            Step::Ask(numbers) => {
                let names: Vec<String> = numbers.into_iter().map(|number| name(kind, number)).collect();
                client.told.clear();
                let request = DeltaDiscoveryRequest { resource_names_subscribe: names.clone(), ..DeltaDiscoveryRequest::default() };
                client.apply(&subscription.request(&request, &catalog).unwrap().expect("what is asked for is answered"));
                assert!(names.iter().all(|name| client.told.contains(name)), "{names:?} was not answered: {:?}", client.told);
                asked.extend(names);
            }
            Step::Leave(numbers) => {
                let names: Vec<String> = numbers.into_iter().map(|number| name(kind, number)).collect();
                let request = DeltaDiscoveryRequest { resource_names_unsubscribe: names.clone(), ..DeltaDiscoveryRequest::default() };
                let answer = subscription.request(&request, &catalog).unwrap();
                asked.retain(|name| !names.contains(name));
                answer.into_iter().for_each(|push| client.apply(&push));
            }
            Step::Reconnect(spoiled) => {
                // Something may have gone or changed while it was away.
                if let Some((id, mut workload)) = little.workloads.pop_first() {
                    workload.capacity += 1;
                    let stays = spoiled.index(2) == 0;
                    set(&mut little.workloads, id, stays.then_some(workload));
                }
                little.policies.pop_first();
                little.publish(&before, &mut publisher);
                // The client may have lost or refused one of them; and the process may be another one, with a catalog of its own.
                let mut versions = client.view.clone();
                if !versions.is_empty() {
                    let name = versions.keys().nth(spoiled.index(versions.len())).unwrap().clone();
                    versions.insert(name, "refused".to_owned());
                }
                catalog = Catalog { epoch: catalog.epoch + 10, ..Catalog::default().next(&mesh.current()).unwrap_or_default() };
                let (fresh, push) = Subscription::first(kind, Some(NODE.into()), &first(versions.clone(), &asked), &catalog).unwrap();
                if wildcard {
                    let unchanged = |item: &Item| versions.get(item.entry.name.as_str()) == Some(&item.entry.version);
                    match &push.upserts {
                        Upserts::Some(items) => assert!(!items.iter().any(unchanged), "sent again what the client has"),
                        Upserts::All(_) => assert!(versions.is_empty()),
                    }
                }
                client.apply(&push);
                subscription = fresh;
            }
        }
        little.publish(&before, &mut publisher);
        // Nothing more if the step did it itself.
        if let Some(next) = catalog.next(&mesh.current()) {
            catalog = next;
        }
        if halves && let Some(push) = subscription.update(&catalog, Part::Upserts) {
            assert!(push.removed.is_empty(), "removals come with the second half");
            client.apply(&push);
        }
        subscription.update(&catalog, Part::Everything).into_iter().for_each(|push| client.apply(&push));
        assert!(subscription.update(&catalog, Part::Everything).is_none(), "the same is sent twice");
        check(kind, wildcard, (&little, &catalog), &client, &asked);
        if wildcard {
            assert_eq!(current(subscription.sent()), client.view);
        }
    }
}

fn set<T>(map: &mut BTreeMap<u8, T>, id: u8, value: Option<T>) -> Option<T> {
    match value {
        Some(value) => map.insert(id, value),
        None => map.remove(&id),
    }
}

fn check(kind: Kind, wildcard: bool, (little, catalog): (&Little, &Catalog), client: &Client, asked: &BTreeSet<String>) {
    let current = current(catalog.set(kind));
    let names: BTreeSet<String> = match kind {
        Kind::Address => little.workloads.keys().map(|id| uid(*id)).chain(little.services.keys().map(|id| service_name(*id))).collect(),
        Kind::Authorization => little.policies.keys().map(|id| policy_name(*id)).collect(),
    };
    assert_eq!(current.keys().cloned().collect::<BTreeSet<_>>(), names, "the catalog is not the mesh");
    if wildcard {
        assert_eq!(client.view, current);
        return;
    }
    let mut required: BTreeSet<String> = match kind {
        Kind::Address => asked.iter().flat_map(|name| little.belonging(name)).collect(),
        Kind::Authorization => asked.intersection(&names).cloned().collect(),
    };
    if kind == Kind::Address {
        required.extend(little.workloads.iter().filter(|(_, workload)| format!("n{}", workload.node) == NODE).map(|(id, _)| uid(*id)));
    }
    for name in &required {
        assert_eq!(client.view.get(name), current.get(name), "{name} of {required:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_wildcard_client_always_has_exactly_the_mesh(steps in steps(), halves: bool, policies: bool) {
        run(if policies { Kind::Authorization } else { Kind::Address }, true, halves, steps);
    }

    #[test]
    fn a_client_on_demand_always_has_what_belongs_to_what_it_asked_for(steps in steps(), halves: bool, policies: bool) {
        run(if policies { Kind::Authorization } else { Kind::Address }, false, halves, steps);
    }
}

#[test]
fn what_a_client_on_demand_has_is_kept_current_and_taken_back_only_when_it_is_gone() {
    let (mut publisher, mesh) = Publisher::new(None);
    let pod = |services: &[u8], capacity| LittleWorkload { node: 9, services: services.iter().copied().collect(), healthy: true, capacity };
    let mut little = Little { workloads: [(1, pod(&[1], 1))].into(), services: [(1, 1)].into(), ..Little::default() };
    little.publish(&Little::default(), &mut publisher);
    let mut catalog = Catalog::default().next(&mesh.current()).unwrap();
    let first = DeltaDiscoveryRequest {
        resource_names_subscribe: vec![service_name(1), WILDCARD.into()],
        resource_names_unsubscribe: vec![WILDCARD.into()],
        ..DeltaDiscoveryRequest::default()
    };
    let (mut subscription, push) = Subscription::first(Kind::Address, None, &first, &catalog).unwrap();
    assert_eq!(push.len(), 2);
    let mut step = |little: &mut Little, workload: Option<LittleWorkload>| {
        let before = little.clone();
        set(&mut little.workloads, 1, workload);
        little.publish(&before, &mut publisher);
        catalog = catalog.next(&mesh.current()).unwrap();
        let push = subscription.update(&catalog, Part::Everything).unwrap();
        (push.len(), push.removed)
    };
    assert_eq!(step(&mut little, Some(pod(&[], 2))), (1, Vec::new()), "a pod that left the service is still there");
    assert_eq!(step(&mut little, Some(pod(&[], 3))), (1, Vec::new()), "and is kept current");
    assert_eq!(step(&mut little, None), (0, vec![uid(1)]));
}

#[test]
fn a_client_that_asks_for_too_much_is_refused() {
    let catalog = Catalog::default();
    let (mut subscription, _) = Subscription::first(Kind::Address, None, &DeltaDiscoveryRequest::default(), &catalog).unwrap();
    let ask = |names: Vec<String>| DeltaDiscoveryRequest { resource_names_subscribe: names, ..DeltaDiscoveryRequest::default() };
    assert_eq!(subscription.request(&ask(vec!["x".repeat(LONGEST_NAME + 1)]), &catalog).unwrap_err(), Refused::LongName);
    let many: Vec<String> = (0..=MOST_NAMES).map(|number| format!("n/{number}")).collect();
    assert_eq!(subscription.request(&ask(many), &catalog).unwrap_err(), Refused::TooManyNames);
}

#[test]
fn an_address_within_a_range_is_answered_by_the_name_it_was_asked_by() {
    let (mut publisher, mesh) = Publisher::new(None);
    let service = Service {
        namespace: "ns".into(),
        hostname: "wide".into(),
        cidr_vips: vec![("net".into(), "10.9.0.0/16".parse().unwrap())],
        ..Service::default()
    };
    publisher.publish([Edit::Service(service)]);
    let catalog = Catalog::default().next(&mesh.current()).unwrap();
    let first = DeltaDiscoveryRequest { resource_names_subscribe: vec!["net/10.9.8.7".into()], ..DeltaDiscoveryRequest::default() };
    let (_, push) = Subscription::first(Kind::Address, None, &first, &catalog).unwrap();
    let Upserts::Some(items) = push.upserts else { panic!("everything") };
    assert_eq!((items.len(), items[0].entry.name.as_str(), &items[0].aliases[..]), (1, "ns/wide", &["net/10.9.8.7".to_owned()][..]));
    assert_eq!(items[0].entry.row.aliases(), ["net/10.9.0.0/16"]);
}

#[test]
fn a_client_on_demand_hears_no_more_of_what_it_left() {
    let (mut publisher, mesh) = Publisher::new(None);
    let mut little = Little { services: [(1, 1), (2, 1)].into(), policies: [(1, 1), (2, 1)].into(), ..Little::default() };
    little.publish(&Little::default(), &mut publisher);
    let mut catalog = Catalog::default().next(&mesh.current()).unwrap();
    for (kind, names) in [(Kind::Address, [service_name(1), service_name(2)]), (Kind::Authorization, [policy_name(1), policy_name(2)])] {
        let first = DeltaDiscoveryRequest { resource_names_subscribe: names.to_vec(), ..DeltaDiscoveryRequest::default() };
        let (mut subscription, push) = Subscription::first(kind, None, &first, &catalog).unwrap();
        assert_eq!(push.len(), 2);
        let leave = DeltaDiscoveryRequest { resource_names_unsubscribe: vec![names[0].clone()], ..DeltaDiscoveryRequest::default() };
        assert!(subscription.request(&leave, &catalog).unwrap().is_none());
        let before = little.clone();
        for id in [1, 2] {
            set(&mut little.services, id, before.services.get(&id).map(|port| port + 1));
            set(&mut little.policies, id, before.policies.get(&id).map(|port| port + 1));
        }
        little.publish(&before, &mut publisher);
        catalog = catalog.next(&mesh.current()).unwrap();
        let push = subscription.update(&catalog, Part::Everything).unwrap();
        let Upserts::Some(items) = push.upserts else { panic!("everything") };
        assert_eq!(items.iter().map(|item| item.entry.name.to_string()).collect::<Vec<_>>(), names[1..]);
    }
}
