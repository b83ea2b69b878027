//! Look-ups, edits and load balancing in a mesh of 100,000 workloads.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use culvert::model::{
    HealthStatus, LoadBalancing, LoadBalancingMode, NamespacedHostname, NetworkAddress, Profile, Scope, Service, Snapshot, SnapshotBuilder,
    TunnelProtocol, Workload,
};
use culvert::proxy::route::{RouteConfig, outbound};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const WORKLOADS: u32 = 100_000;
const REPLICAS: u32 = 10;

fn pod_ip(index: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits((10 << 24) + index))
}

fn vip(service: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits((172 << 24) + (16 << 16) + service))
}

fn key(service: u32) -> NamespacedHostname {
    let namespace = format!("team-{}", service % 200);
    NamespacedHostname { hostname: format!("app-{service}.{namespace}.svc.cluster.local").into(), namespace: namespace.into() }
}

fn workload(index: u32) -> Workload {
    let service = index / REPLICAS;
    let key = key(service);
    let name = format!("app-{service}-7d4b9c6f5d-{index:05}");
    Workload {
        uid: format!("Kubernetes//Pod/{}/{name}", key.namespace).into(),
        name: name.as_str().into(),
        addresses: pod_ip(index).into(),
        node: format!("node-{}", index % 1000).into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(Profile {
            namespace: key.namespace.clone(),
            protocol: TunnelProtocol::Hbone,
            service_account: format!("app-{service}").into(),
            workload_name: format!("app-{service}").into(),
            services: vec![(key, [(80, 8080)].into_iter().collect())],
            ..Profile::default()
        }),
    }
}

fn mesh(workloads: u32) -> SnapshotBuilder {
    let mut builder = SnapshotBuilder::default().local_node("node-1".into());
    for service in 0..workloads / REPLICAS {
        let key = key(service);
        builder.insert_service(Service {
            name: format!("app-{service}").into(),
            namespace: key.namespace,
            hostname: key.hostname,
            vips: vec![NetworkAddress { network: "".into(), ip: vip(service) }],
            ports: [(80, 8080)].into_iter().collect(),
            ..Service::default()
        });
    }
    (0..workloads).for_each(|index| builder.insert_workload(workload(index)));
    builder
}

/// Look-ups of `busy` destinations out of all: a few hundred are what a node talks to at a time and stay in the processor's
/// caches; all of them miss every cache at every step and show the distance in memory.
fn lookups(criterion: &mut Criterion, snapshot: &Snapshot, busy: usize) {
    let mut rng = rand::rng();
    let order: Vec<u32> = (0..busy).map(|_| rng.random_range(0..WORKLOADS)).collect();
    let uids: Vec<_> = order.iter().map(|index| workload(*index).uid).collect();
    let mut turn = 0;
    let mut next = move || {
        turn = (turn + 1) % order.len();
        (turn, order[turn])
    };
    criterion.bench_function(&format!("workload by address, {busy} busy"), |bencher| {
        bencher.iter(|| snapshot.workload_by_address("", pod_ip(next().1)).unwrap());
    });
    criterion.bench_function(&format!("workload by uid, {busy} busy"), |bencher| bencher.iter(|| snapshot.workload(&uids[next().0]).unwrap()));
    criterion.bench_function(&format!("service by address, {busy} busy"), |bencher| {
        bencher.iter(|| snapshot.service_by_address("", vip(next().1 / REPLICAS), Some("team-7")).unwrap());
    });
    criterion.bench_function(&format!("locate a service, {busy} busy"), |bencher| {
        bencher.iter(|| snapshot.locate("", vip(next().1 / REPLICAS), Some("team-7")).unwrap());
    });
}

fn nothing(criterion: &mut Criterion, snapshot: &Snapshot) {
    let unknown = "192.0.2.1".parse().unwrap();
    criterion.bench_function("locate nothing", |bencher| bencher.iter(|| black_box(snapshot.locate("", unknown, Some("team-7")))));
}

/// One connection's whole decision, through services of several sizes.
fn routes(criterion: &mut Criterion) {
    for endpoints in [1, 10, 100, 1000] {
        let mut builder = mesh(10_000);
        let key = NamespacedHostname { namespace: "big".into(), hostname: "big.svc".into() };
        let failover = LoadBalancing {
            routing_preference: vec![Scope::Network, Scope::Region, Scope::Zone],
            mode: LoadBalancingMode::Failover,
            ..LoadBalancing::default()
        };
        builder.insert_service(Service {
            namespace: key.namespace.clone(),
            hostname: key.hostname.clone(),
            vips: vec![NetworkAddress { network: "".into(), ip: vip(60_000) }],
            ports: [(80, 8080)].into_iter().collect(),
            load_balancing: Some(failover),
            ..Service::default()
        });
        for index in 0..endpoints {
            let mut row = workload(100_000 + index);
            Arc::make_mut(&mut row.profile).services = vec![(key.clone(), [(80, 8080)].into_iter().collect())];
            builder.insert_workload(row);
        }
        let (snapshot, source, config) = (builder.build(), workload(1), RouteConfig::default());
        let mut rng = SmallRng::seed_from_u64(1);
        let to = |ip| SocketAddr::new(ip, 80);
        criterion.bench_function(&format!("route to one of {endpoints}"), |bencher| {
            bencher.iter(|| outbound(&snapshot, &config, &source, to(vip(60_000)), &mut rng).unwrap());
        });
    }
}

fn edits(criterion: &mut Criterion, snapshot: &Snapshot) {
    let mut rng = rand::rng();
    let rows: Vec<_> = (0..1024).map(|_| snapshot.workload(&workload(rng.random_range(0..WORKLOADS)).uid).unwrap()).collect();
    let mut turn = 0;
    criterion.bench_function("publish one changed row", |bencher| {
        bencher.iter_batched(
            || {
                turn = (turn + 1) % rows.len();
                Workload { status: HealthStatus::Unhealthy, ..Workload::clone(&rows[turn]) }
            },
            |row| {
                let mut builder = snapshot.edit();
                builder.insert_workload(row);
                builder.build()
            },
            criterion::BatchSize::SmallInput,
        );
    });
    criterion.bench_function("build 10,000 rows", |bencher| bencher.iter(|| mesh(10_000).build()));
}

fn all(criterion: &mut Criterion) {
    let snapshot = mesh(WORKLOADS).build();
    lookups(criterion, &snapshot, 256);
    lookups(criterion, &snapshot, WORKLOADS as usize);
    nothing(criterion, &snapshot);
    edits(criterion, &snapshot);
    routes(criterion);
}

criterion_group!(benches, all);
criterion_main!(benches);
