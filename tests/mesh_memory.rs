//! What a large mesh costs in resident memory, under the allocator of the program. A test of its own process, alone in its
//! file: nothing else may allocate meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use culvert::model::{HealthStatus, NamespacedHostname, NetworkAddress, Profile, Service, SnapshotBuilder, Text, TunnelProtocol, Workload};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const WORKLOADS: u32 = 100_000;
/// Workloads of a deployment with its own service, service account and profile.
const REPLICAS: u32 = 10;

fn key(service: u32) -> NamespacedHostname {
    let namespace = format!("team-{}", service % 200);
    NamespacedHostname { hostname: format!("app-{service}.{namespace}.svc.cluster.local").into(), namespace: namespace.into() }
}

/// A row as it comes off the wire: nothing in it is shared with any other.
fn workload(index: u32) -> Workload {
    let service = index / REPLICAS;
    let key = key(service);
    let name = format!("app-{service}-7d4b9c6f5d-{index:05}");
    let app = || Text::from(format!("app-{service}"));
    Workload {
        uid: format!("Kubernetes//Pod/{}/{name}", key.namespace).into(),
        name: name.as_str().into(),
        addresses: vec![IpAddr::V4(Ipv4Addr::from_bits((10 << 24) + index))],
        node: format!("node-{}.region-1.example.internal", index % 1000).into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(Profile {
            namespace: key.namespace.clone(),
            protocol: TunnelProtocol::Hbone,
            service_account: app(),
            canonical_name: app(),
            workload_name: app(),
            canonical_revision: "latest".into(),
            authorization_policies: vec![format!("{}/allow-app-{service}", key.namespace).into()],
            services: vec![(key, [(80, 8080), (443, 8443)].into_iter().collect())],
            ..Profile::default()
        }),
    }
}

fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn a_hundred_thousand_workloads_and_ten_thousand_services_take_at_most_60_megabytes() {
    let before = resident_bytes();
    let mut builder = SnapshotBuilder::default().local_node("node-1.region-1.example.internal".into());
    for service in 0..WORKLOADS / REPLICAS {
        let key = key(service);
        builder.insert_service(Service {
            name: format!("app-{service}").into(),
            namespace: key.namespace,
            hostname: key.hostname,
            vips: vec![NetworkAddress { network: "".into(), ip: IpAddr::V4(Ipv4Addr::from_bits((11 << 24) + service)) }],
            ports: [(80, 8080), (443, 8443)].into_iter().collect(),
            ..Service::default()
        });
    }
    (0..WORKLOADS).for_each(|index| builder.insert_workload(workload(index)));
    let snapshot = builder.build();
    let each = (resident_bytes() - before) / WORKLOADS as usize;
    println!("{each} bytes a workload, its share of services included");
    assert!(each <= 600, "{each} bytes a workload");
    assert_eq!(snapshot.workloads().count(), WORKLOADS as usize);
}
