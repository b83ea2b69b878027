#![allow(clippy::unwrap_used)]
//! What questions ask of a control plane that is asked on demand (reference, dataplane §3.8 and §9).

use std::collections::HashSet;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::discovery::Publisher;
use crate::discovery::xds::Demand;
use crate::model::{HealthStatus, Profile, Text};

const SECOND: Duration = Duration::from_secs(1);

/// The DNS of a node, its mesh, and the control plane's side of it.
struct Ground {
    dns: Arc<Dns>,
    mesh: Mesh,
    demand: Demand,
    _publisher: Publisher,
}

impl Ground {
    fn new() -> Self {
        let (publisher, mesh) = Publisher::new(None);
        // A connection would wait longer.
        let demand = Demand::new(5 * SECOND);
        demand.begin();
        let dns = Dns::new(Config { resolv_conf: "/nonexistent/resolv.conf".into(), ..Config::default() }, &mut Registry::default());
        Self { dns, mesh: mesh.on_demand(Some(demand.clone())), demand, _publisher: publisher }
    }

    /// A question waits for these. Gives how long it did.
    fn know(&self, pod: &str, unknown: Vec<NamespacedHostname>) -> JoinHandle<Duration> {
        let (dns, mesh) = (self.dns.clone(), self.mesh.clone());
        let pod = LocalName { name: pod.into(), namespace: "shop".into(), service_account: "default".into() };
        tokio::spawn(async move {
            let begun = Instant::now();
            dns.know(&mesh, &pod, &unknown).await;
            begun.elapsed()
        })
    }

    /// What the control plane is asked for that it was not before.
    async fn asked(&self) -> HashSet<Text> {
        sleep(SECOND / 1000).await;
        timeout(SECOND / 1000, self.demand.news()).await.map(|news| news.subscribe).unwrap_or_default()
    }
}

fn client() -> Workload {
    let profile = Profile { namespace: "shop".into(), ..Profile::default() };
    Workload {
        uid: "client".into(),
        name: "client".into(),
        addresses: Default::default(),
        node: "n".into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(profile),
    }
}

fn key(number: usize) -> NamespacedHostname {
    NamespacedHostname { namespace: "shop".into(), hostname: format!("n{number}.example").as_str().into() }
}

#[tokio::test(start_paused = true)]
async fn a_question_asks_for_eight_names_at_most_and_waits_a_second_for_them_and_no_longer() {
    let ground = Ground::new();
    let question = Query::about(&format!("{}example.com", "a.".repeat(20)), Family::Ipv4).unwrap();
    let unknown = ground.dns.unknown(&ground.mesh, &client(), &question);
    assert_eq!(unknown.len(), 8);
    let waiting = ground.know("client", unknown.clone());
    assert_eq!(ground.asked().await, unknown.iter().map(|key| key.to_string().into()).collect());
    assert_eq!(waiting.await.unwrap(), SECOND);
    // Answered meanwhile, they are not asked for again, and nobody waits.
    let waiting = ground.know("client", unknown.clone());
    sleep(SECOND / 4).await;
    let names: Vec<String> = unknown.iter().map(ToString::to_string).collect();
    ground.demand.answered(&[], &names);
    assert_eq!(waiting.await.unwrap(), SECOND / 4);
    assert_eq!(ground.dns.unknown(&ground.mesh, &client(), &question), []);
    // Nor is anything where the mesh is told as a whole.
    let (_publisher, whole) = Publisher::new(None);
    assert_eq!(ground.dns.unknown(&whole, &client(), &question), []);
}

#[tokio::test(start_paused = true)]
async fn eight_questions_of_a_pod_ask_at_once_and_those_behind_them_wait_a_second_in_all() {
    let ground = Ground::new();
    let many: Vec<_> = (0..20).map(|number| ground.know("busy", vec![key(number)])).collect();
    let other = ground.know("other", vec![key(99)]);
    let first = ground.asked().await;
    assert_eq!(first.len(), 9, "{first:?}");
    assert!(first.contains(&Text::from("shop/n99.example")), "another pod's share is its own");
    sleep(SECOND * 9 / 10).await;
    ground.demand.answered(&[], &first.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(ground.asked().await.len(), 8, "those who waited");
    for waited in many.into_iter().chain([other]) {
        assert!(waited.await.unwrap() <= SECOND);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_invents_names_asks_four_hundred_times_and_then_two_hundred_a_second() {
    let ground = Ground::new();
    let refused = async |questions: Vec<JoinHandle<Duration>>| {
        sleep(SECOND / 1000).await;
        questions.iter().filter(|question| question.is_finished()).count()
    };
    assert_eq!(refused((0..500).map(|number| ground.know("client", vec![key(number)])).collect()).await, 100, "refused at once");
    sleep(SECOND).await;
    let again = refused((500..800).map(|number| ground.know("client", vec![key(number)])).collect()).await;
    assert!((95..=100).contains(&again), "{again}");
    assert_eq!(refused(vec![ground.know("neighbour", vec![key(900)])]).await, 0);
}

/// The addresses of the answer to a question about `web.shop`, as they came, and the code of the answer.
fn answered(config: Config, name: &str, family: Family) -> Option<(u8, Vec<std::net::IpAddr>)> {
    let dns = Dns::new(Config { resolv_conf: "/nonexistent/resolv.conf".into(), ..config }, &mut Registry::default());
    let mut builder = crate::model::SnapshotBuilder::default();
    let vip = |ip: std::net::IpAddr| crate::model::NetworkAddress { network: "".into(), ip };
    let vips = (1..=8).map(|last| vip([10, 96, 0, last].into())).chain([vip("fd00::1".parse().unwrap())]).collect();
    builder.insert_service(crate::model::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        vips,
        ..crate::model::Service::default()
    });
    let question = Query::about(name, family).unwrap();
    let bytes = dns.answer(&builder.build(), &client(), &question, Transport::Udp)?;
    Some((bytes[3] & 0x0f, message::addresses(&bytes, family).unwrap().list))
}

#[test]
fn without_ipv6_its_addresses_are_not_given_and_the_name_is_still_ours() {
    let six = "fd00::1".parse().unwrap();
    assert_eq!(answered(Config::default(), "web.shop", Family::Ipv6), Some((0, vec![six])));
    let without = || Config { ipv6: false, ..Config::default() };
    assert_eq!(answered(without(), "web.shop", Family::Ipv6), Some((0, Vec::new())));
    assert_eq!(answered(without(), "web.shop", Family::Ipv4).unwrap().1.len(), 8);
    assert_eq!(answered(without(), "other.shop", Family::Ipv6), None);
}

#[test]
fn addresses_come_in_another_order_each_time() {
    let orders: HashSet<_> = (0..50).map(|_| answered(Config::default(), "web.shop", Family::Ipv4).unwrap().1).collect();
    assert!(orders.len() > 25, "{} orders of 50 answers", orders.len());
    let firsts: HashSet<_> = orders.iter().map(|order| order[0]).collect();
    assert!(firsts.len() > 4, "{firsts:?}");
}

/// A dedicated proxy's pod may have been given others than Kubernetes gives.
#[test]
fn search_domains_are_those_of_kubernetes_or_those_of_the_pod_itself() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("resolv.conf");
    std::fs::write(&file, "nameserver 10.0.0.1\nsearch corp.example\n").unwrap();
    let of = |own: bool| {
        let config = Config { resolv_conf: file.clone(), own_search_domains: own, ..Config::default() };
        Dns::new(config, &mut Registry::default()).with_scope(&client(), |scope| scope.search.to_vec())
    };
    assert_eq!(of(false), ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
    assert_eq!(of(true), ["corp.example"]);
}
