//! What the control plane tells is what our own proxy then believes: every field of every row, in both wordings of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use culvert::discovery::xds::{self, Identity};
use culvert::discovery::{Edit, Mesh, Publisher};
use culvert::grpc::{self, Dialer, RootSource, Token};
use culvert::lifecycle::Supervisor;
use culvert::model::*;
use culvert::policy::{Action, Authorization, Clause, Match, Rule, Scope as Whom, ServiceAccountMatch, StringMatch, Validity};

use crate::control_client::{PATIENCE, View};
use crate::ground::*;

/// In a debug build 200 clients of 5,000 workloads take 23 s, both sides and all handshakes on two threads.
const CLIENTS: usize = 40;
const WORKLOADS: u32 = 1000;

fn gateway(hostname: bool, port: u16) -> GatewayAddress {
    let destination = if hostname {
        GatewayDestination::Hostname(key("way"))
    } else {
        GatewayDestination::Address(NetworkAddress { network: "net".into(), ip: "fd00::7".parse().unwrap() })
    };
    GatewayAddress { destination, hbone_port: port }
}

fn key(hostname: &str) -> NamespacedHostname {
    NamespacedHostname { namespace: "ns".into(), hostname: hostname.into() }
}

fn ports(pairs: &[(u16, u16)]) -> PortMap {
    pairs.iter().copied().collect()
}

/// Every value of every field is in one of them; and one has nothing but what it must have.
fn workloads() -> Vec<Workload> {
    let full = Profile {
        namespace: "ns".into(),
        network: "net".into(),
        protocol: TunnelProtocol::Hbone,
        trust_domain: "elsewhere.test".into(),
        service_account: "account".into(),
        waypoint: Some(gateway(true, 15008)),
        network_gateway: Some(gateway(false, 15009)),
        canonical_name: "canonical".into(),
        canonical_revision: "v7".into(),
        kind: WorkloadKind::CronJob,
        workload_name: "owner".into(),
        native_tunnel: true,
        authorization_policies: vec!["ns/b".into(), "ns/a".into()],
        cluster_id: "other-cluster".into(),
        services: vec![(key("a"), ports(&[(80, 8080), (81, 0)])), (key("b"), ports(&[(90, 65_535)]))],
        application_tunnel: Some(ApplicationTunnel { protocol: ApplicationProtocol::Proxy, port: Some(15_088) }),
        locality: Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() },
        network_mode: NetworkMode::HostNetwork,
        identity: KnownIdentity::default(),
    };
    let row = |uid: &str, profile: Profile| Workload {
        uid: uid.into(),
        name: uid.into(),
        addresses: ["10.0.0.1", "fd00::1"].iter().map(|ip| ip.parse().unwrap()).collect(),
        node: "left".into(),
        hostname: "by.name".into(),
        status: HealthStatus::Unhealthy,
        capacity: 7,
        profile: Arc::new(profile),
    };
    let mut rows = vec![row("full", full)];
    for (index, kind) in [WorkloadKind::Deployment, WorkloadKind::Pod, WorkloadKind::Job].into_iter().enumerate() {
        rows.push(row(&format!("kind-{index}"), Profile { namespace: "ns".into(), kind, ..Profile::default() }));
    }
    let tunnel = ApplicationTunnel { protocol: ApplicationProtocol::None, port: None };
    let profile = Profile { namespace: "ns".into(), application_tunnel: Some(tunnel), ..Profile::default() };
    let addresses = Default::default();
    rows.push(Workload { addresses, hostname: "".into(), status: HealthStatus::Healthy, capacity: 0, ..row("bare", profile) });
    rows
}

fn services() -> Vec<Service> {
    let balancing = |mode, health_policy| {
        let routing_preference = vec![Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster, Scope::Network];
        Some(LoadBalancing { routing_preference, mode, health_policy })
    };
    let bare = |hostname: &str| Service { name: hostname.into(), namespace: "ns".into(), hostname: hostname.into(), ..Service::default() };
    vec![
        Service {
            vips: vec![NetworkAddress { network: "net".into(), ip: "10.1.0.1".parse().unwrap() }],
            cidr_vips: vec![("net".into(), "10.2.0.0/16".parse().unwrap()), ("".into(), "fd01::/32".parse().unwrap())],
            ports: ports(&[(80, 8080), (443, 0)]),
            subject_alt_names: vec!["spiffe://t/ns/n/sa/s".into()],
            waypoint: Some(gateway(false, 1)),
            weighted_waypoints: vec![WeightedWaypoint { destination: gateway(true, 2), weight: 30 }],
            load_balancing: balancing(LoadBalancingMode::Failover, HealthPolicy::AllowAll),
            ip_families: Some(IpFamilies::Dual),
            canonical: true,
            visibility: Visibility::Namespace,
            ..bare("full")
        },
        Service {
            load_balancing: balancing(LoadBalancingMode::Strict, HealthPolicy::OnlyHealthy),
            ip_families: Some(IpFamilies::Ipv4),
            ..bare("strict")
        },
        Service {
            load_balancing: balancing(LoadBalancingMode::Standard, HealthPolicy::AllowAll),
            ip_families: Some(IpFamilies::Ipv6),
            ..bare("any")
        },
        Service { load_balancing: balancing(LoadBalancingMode::Passthrough, HealthPolicy::AllowAll), ..bare("through") },
        bare("*.wild"),
    ]
}

fn policies() -> Vec<Authorization> {
    let texts =
        |text: &str| vec![StringMatch::Exact(text.into()), StringMatch::Prefix(text.into()), StringMatch::Suffix(text.into()), StringMatch::Presence];
    let account = |name: &str| vec![ServiceAccountMatch { namespace: "ns".into(), service_account: name.into() }];
    let range = |text: &str| vec![text.parse().unwrap()];
    let full = Match {
        namespaces: texts("a"),
        not_namespaces: texts("b"),
        principals: texts("c"),
        not_principals: texts("d"),
        service_accounts: account("e"),
        not_service_accounts: account("f"),
        source_ips: range("10.1.0.0/16"),
        not_source_ips: range("fd01::/64"),
        destination_ips: range("10.2.0.1/32"),
        not_destination_ips: range("0.0.0.0/0"),
        destination_ports: vec![1, 65_535],
        not_destination_ports: vec![2],
    };
    let one = |condition: Match| vec![Rule { clauses: vec![Clause { matches: vec![condition] }] }];
    let empty = vec![Rule::default(), Rule { clauses: vec![Clause::default(), Clause { matches: vec![Match::default()] }] }];
    let mut dry = Authorization::new("dry", "ns", Whom::WorkloadSelector, Action::Deny, one(full.clone()));
    dry.dry_run = true;
    vec![
        Authorization::new("full", "ns", Whom::Namespace, Action::Allow, one(full)),
        Authorization::new("empty", "ns", Whom::Global, Action::Deny, empty),
        Authorization::new("nothing", "ns", Whom::Global, Action::Allow, Vec::new()),
        dry,
    ]
}

async fn publish(plane: &Plane, publisher: &mut Publisher, edits: Vec<Edit>) {
    let epoch = plane.metric("culvert_control_epoch");
    assert!(publisher.publish(edits));
    plane.until_metric("culvert_control_epoch", epoch + 1.0).await;
}

/// Our own client of a control plane, and the end of its tasks.
fn client(plane: &Plane, token: &str, node: &str) -> (Mesh, tokio::sync::watch::Receiver<bool>, Supervisor) {
    let address = format!("localhost:{}", plane.address.port()).parse().unwrap();
    let roots = RootSource::File(plane.ca().join("root-cert.pem"));
    let dialer = Dialer::new(grpc::Config { token: Some(Token::of(token)), ..grpc::Config::new(address, roots) }).unwrap();
    let identity = Identity { ip: String::new(), pod: "p".into(), namespace: "n".into(), node: node.into(), metadata: Vec::new() };
    let config = xds::Config::new(dialer, identity);
    let supervisor = config.supervisor.clone();
    let (mesh, ready) = xds::start(config);
    (mesh, ready, supervisor)
}

#[tokio::test]
async fn every_field_of_every_row_arrives_as_it_was() {
    let (plane, mut publisher) = Plane::published(config()).await;
    let edits =
        workloads().into_iter().map(Edit::Workload).chain(services().into_iter().map(Edit::Service)).chain(policies().into_iter().map(Edit::Policy));
    publish(&plane, &mut publisher, edits.collect()).await;
    let (mesh, mut ready, _supervisor) = client(&plane, LEFT, "left");
    tokio::time::timeout(PATIENCE, ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    let world = mesh.current();
    for row in workloads() {
        assert_eq!(world.snapshot.workload(&row.uid).map(Arc::unwrap_or_clone), Some(row));
    }
    for row in services() {
        assert_eq!(world.snapshot.service(&row.key()).map(Arc::unwrap_or_clone), Some(row));
    }
    for policy in policies() {
        assert_eq!(world.policies.get(&policy.key()).map(|known| (**known).clone()), Some(policy));
    }
    assert_eq!(
        plane.metric("culvert_control_nacks_total{type=\"address\"}") + plane.metric("culvert_control_nacks_total{type=\"authorization\"}"),
        0.0
    );
}

#[tokio::test]
async fn a_policy_that_was_not_understood_arrives_as_one_that_denies_all_of_its_targets() {
    let (plane, mut publisher) = Plane::published(config()).await;
    let invalid = Authorization::invalid("p", "ns", Whom::Namespace, Action::Allow, "a field that is not known");
    publish(&plane, &mut publisher, vec![Edit::Policy(invalid)]).await;
    let (mesh, mut ready, _supervisor) = client(&plane, LEFT, "left");
    tokio::time::timeout(PATIENCE, ready.wait_for(|ready| *ready)).await.unwrap().unwrap();
    let policy = mesh.current().policies.get("ns/p").cloned().unwrap();
    assert_eq!(
        (policy.scope, policy.action, &policy.rules[..], &policy.validity),
        (Whom::Namespace, Action::Deny, &[Rule::default()][..], &Validity::Valid)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_all_come_back_at_once_hear_only_what_changed() {
    let (plane, mut publisher) = Plane::published(config()).await;
    let rows = |capacity: u32| {
        (0..WORKLOADS).map(move |number| {
            let profile = Profile { namespace: "ns".into(), ..Profile::default() };
            let addresses = std::net::IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + number));
            let capacity = if number == 7 { capacity } else { 1 };
            let (name, node) = (format!("workload-{number}"), "right".into());
            let uid = format!("Kubernetes//Pod/ns/{name}").into();
            Edit::Workload(Workload {
                uid,
                name: name.into(),
                addresses: addresses.into(),
                node,
                hostname: "".into(),
                status: HealthStatus::Healthy,
                capacity,
                profile: Arc::new(profile),
            })
        })
    };
    publish(&plane, &mut publisher, rows(1).collect()).await;
    let mut view = View::default();
    let first = plane.connect().await;
    first
        .subscribe("left", &view)
        .await
        .unwrap()
        .until(&mut view, |view| view.names(crate::control_client::ADDRESS).len() == WORKLOADS as usize)
        .await;
    publish(&plane, &mut publisher, rows(2).collect()).await;
    let (began, heard) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let (connection, view, heard) = (plane.connect().await, view.clone(), heard.clone());
        clients.spawn(async move {
            let mut stream = connection.subscribe("left", &view).await.unwrap();
            for _ in 0..2 {
                heard.fetch_add(stream.next().await.resources.len(), Ordering::Relaxed);
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    println!("{CLIENTS} clients resumed {WORKLOADS} workloads each in {:?}", began.elapsed());
    assert_eq!(heard.load(Ordering::Relaxed), CLIENTS, "more than the one change was sent");
}
