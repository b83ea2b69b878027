#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;
use crate::discovery::xds::Demand;
use crate::discovery::{Edit, Publisher};
use crate::model::{GatewayAddress, GatewayDestination, HealthStatus, NetworkAddress, PortMap, Profile, Service, WeightedWaypoint};

const LIMIT: Duration = Duration::from_secs(5);

/// A mesh that is asked on demand, and the control plane's side of it.
struct Ground {
    publisher: Publisher,
    mesh: Mesh,
    demand: Demand,
}

impl Ground {
    fn new() -> Self {
        let (publisher, mesh) = Publisher::new(None);
        let demand = Demand::new(LIMIT);
        demand.begin();
        Self { publisher, mesh: mesh.on_demand(Some(demand.clone())), demand }
    }

    /// A connection of a pod to an address.
    fn connect(&self, ip: [u8; 4]) -> JoinHandle<Result<(), Unanswered>> {
        self.connect_of("client", ip)
    }

    fn connect_of(&self, name: &str, ip: [u8; 4]) -> JoinHandle<Result<(), Unanswered>> {
        let (mesh, pod) = (self.mesh.clone(), pod(name));
        tokio::spawn(async move { prepare(&mesh, &RouteConfig::default(), (&pod, &client()), (ip, 80).into()).await })
    }

    /// The names that the control plane is asked for next.
    async fn asked(&self) -> BTreeSet<String> {
        settle().await;
        // Paused time runs to this at once if nobody asks.
        let news = tokio::time::timeout(Duration::from_secs(60), self.demand.news()).await.unwrap_or_else(|_| panic!("nobody asks for anything"));
        news.subscribe.iter().map(ToString::to_string).collect()
    }

    fn answer(&mut self, edits: Vec<Edit>, found: &[&str], gone: &[&str]) {
        self.publisher.publish(edits);
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        self.demand.answered(&strings(found), &strings(gone));
    }
}

fn names<const N: usize>(list: [&str; N]) -> BTreeSet<String> {
    list.into_iter().map(str::to_owned).collect()
}

/// Until every task waits for something.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn workload(uid: &str, profile: Profile) -> Workload {
    Workload {
        uid: uid.into(),
        name: uid.into(),
        addresses: Default::default(),
        node: "n".into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: std::sync::Arc::new(profile),
    }
}

fn pod(name: &str) -> LocalName {
    LocalName { name: name.into(), namespace: "shop".into(), service_account: "default".into() }
}

fn client() -> Workload {
    workload("client", Profile { namespace: "shop".into(), ..Profile::default() })
}

fn key(hostname: &str) -> NamespacedHostname {
    NamespacedHostname { namespace: "shop".into(), hostname: hostname.into() }
}

fn gateway(hostname: &str) -> GatewayAddress {
    GatewayAddress { destination: GatewayDestination::Hostname(key(hostname)), hbone_port: 15008 }
}

fn service(hostname: &str, ip: [u8; 4]) -> Service {
    let vip = NetworkAddress { network: "".into(), ip: ip.into() };
    Service { name: hostname.into(), namespace: "shop".into(), hostname: hostname.into(), vips: vec![vip], ..Service::default() }
}

#[tokio::test(start_paused = true)]
async fn a_mesh_that_is_told_as_a_whole_is_not_asked() {
    let (_publisher, mesh) = Publisher::new(None);
    let begun = Instant::now();
    prepare(&mesh, &RouteConfig::default(), (&pod("client"), &client()), ([10, 0, 0, 1], 80).into()).await.unwrap();
    assert!(prepare_names(&mesh, &pod("client"), &[key("web")], LIMIT).await);
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_nobody_explains_is_refused_after_the_time_limit() {
    let ground = Ground::new();
    let begun = Instant::now();
    let refused = ground.connect([10, 0, 0, 1]).await.unwrap().unwrap_err();
    assert_eq!(refused, Unanswered::Late { name: "/10.0.0.1".into(), limit: LIMIT });
    assert_eq!(begun.elapsed(), LIMIT);
}

#[tokio::test(start_paused = true)]
async fn connections_to_one_address_share_one_ask_and_its_answer_wakes_them_all() {
    let mut ground = Ground::new();
    let same: Vec<_> = (0..100).map(|_| ground.connect([10, 0, 0, 1])).collect();
    let other = ground.connect([10, 0, 0, 2]);
    assert_eq!(ground.asked().await, names(["/10.0.0.1", "/10.0.0.2"]));
    assert!(!same.iter().any(JoinHandle::is_finished), "nobody goes on before there is an answer");
    ground.answer(vec![], &[], &["/10.0.0.1"]);
    for connection in same {
        connection.await.unwrap().unwrap();
    }
    settle().await;
    assert!(!other.is_finished());
    let begun = Instant::now();
    ground.connect([10, 0, 0, 1]).await.unwrap().unwrap();
    assert_eq!(begun.elapsed(), Duration::ZERO, "known for a while");
}

#[tokio::test(start_paused = true)]
async fn the_gateways_on_the_way_are_asked_for_when_the_destination_is_known() {
    let mut ground = Ground::new();
    let connection = ground.connect([10, 96, 0, 1]);
    assert_eq!(ground.asked().await, names(["/10.96.0.1"]));
    let weighted = |name: &str| WeightedWaypoint { destination: gateway(name), weight: 1 };
    let web =
        Service { waypoint: Some(gateway("fixed")), weighted_waypoints: vec![weighted("one"), weighted("two")], ..service("web", [10, 96, 0, 1]) };
    let ports: PortMap = [(80, 8080)].into_iter().collect();
    let far =
        Profile { network: "far".into(), network_gateway: Some(gateway("east-west")), services: vec![(key("web"), ports)], ..Profile::default() };
    ground.answer(vec![Edit::Service(web), Edit::Workload(workload("far", far))], &["/10.96.0.1"], &[]);
    // One after the other, so that each may have the time limit; no connection goes on before it knows them all.
    for name in ["shop/one", "shop/two", "shop/fixed", "shop/east-west"] {
        assert_eq!(ground.asked().await, names([name]));
        assert!(!connection.is_finished());
        let hostname = name.strip_prefix("shop/").unwrap();
        ground.answer(vec![Edit::Service(service(hostname, [10, 97, 0, 1]))], &[name], &[]);
    }
    connection.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn so_many_destinations_wait_at_once_and_no_more_and_the_rest_is_refused_at_once() {
    let mut ground = Ground::new();
    let address = |index: u16| [10, 1, index.to_be_bytes()[0], index.to_be_bytes()[1]];
    let mut waiting: Vec<_> = (0..256).map(|index| ground.connect_of("greedy", address(index))).collect();
    settle().await;
    let begun = Instant::now();
    let refused = ground.connect_of("greedy", [10, 0, 0, 1]).await.unwrap().unwrap_err();
    let share = Unanswered::Share { pod: Box::new(pod("greedy")), name: "/10.0.0.1".into() };
    assert_eq!((refused, begun.elapsed()), (share, Duration::ZERO), "one pod has a quarter");
    waiting.extend((256..1024).map(|index| ground.connect_of(&format!("p{}", index % 3), address(index))));
    settle().await;
    let begun = Instant::now();
    let refused = ground.connect([10, 0, 0, 1]).await.unwrap().unwrap_err();
    assert_eq!((refused, begun.elapsed()), (Unanswered::TooMany { name: "/10.0.0.1".into() }, Duration::ZERO));
    let shared = ground.connect(address(7));
    settle().await;
    assert!(!shared.is_finished(), "whoever wants what is asked for already may wait with the others");
    let all: Vec<String> = (0..1024).map(|index| format!("/{}", std::net::Ipv4Addr::from(address(index)))).collect();
    ground.answer(vec![], &[], &all.iter().map(String::as_str).collect::<Vec<_>>());
    for connection in waiting.into_iter().chain([shared]) {
        connection.await.unwrap().unwrap();
    }
    let next = ground.connect([10, 0, 0, 1]);
    settle().await;
    assert!(!next.is_finished(), "there are places again");
}

#[tokio::test(start_paused = true)]
async fn names_are_asked_for_all_at_once_and_no_longer_than_the_one_who_asks_will_wait() {
    let mut ground = Ground::new();
    let patience = Duration::from_secs(1);
    let ask = |ground: &Ground| {
        let (mesh, keys) = (ground.mesh.clone(), [key("a"), key("b"), key("known")]);
        tokio::spawn(async move { prepare_names(&mesh, &pod("client"), &keys, patience).await })
    };
    ground.answer(vec![Edit::Service(service("known", [10, 96, 0, 1]))], &[], &[]);
    let begun = Instant::now();
    let asking = ask(&ground);
    assert_eq!(ground.asked().await, names(["shop/a", "shop/b"]));
    assert!([key("a"), key("b")].iter().all(|key| ground.mesh.must_ask(key)) && !ground.mesh.must_ask(&key("known")));
    ground.answer(vec![Edit::Service(service("a", [10, 96, 0, 2]))], &["shop/a"], &[]);
    assert!(!asking.await.unwrap());
    assert_eq!(begun.elapsed(), patience);
    // An answer that comes too late for one comes in time for the next.
    ground.answer(vec![], &[], &["shop/b"]);
    assert!(!ground.mesh.must_ask(&key("b")), "nothing has it, for a while");
    assert!(ask(&ground).await.unwrap());
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(ground.mesh.must_ask(&key("b")) && !ground.mesh.must_ask(&key("a")));
}
