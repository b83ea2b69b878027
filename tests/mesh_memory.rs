//! What a large mesh costs in memory, under the allocator of the program: in bytes that were asked for, and resident. A test of its own process,
//! alone in its file: nothing else may allocate meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// An allocator cannot be written without.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use culvert::model::{HealthStatus, NamespacedHostname, NetworkAddress, Profile, Service, SnapshotBuilder, Text, TunnelProtocol, Workload};

/// Counts the bytes that are out, and leaves the work to the program's allocator.
struct Counting(tikv_jemallocator::Jemalloc);

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the program's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { self.0.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting(tikv_jemallocator::Jemalloc);

const WORKLOADS: u32 = 100_000;
/// Bytes that one may take. Measured: see the documentation of `model`.
const MOST: usize = 400;
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
        addresses: IpAddr::V4(Ipv4Addr::from_bits((10 << 24) + index)).into(),
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
fn a_hundred_thousand_workloads_and_ten_thousand_services_take_at_most_40_megabytes() {
    let (before, live) = (resident_bytes(), LIVE.load(Ordering::Relaxed));
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
    let each = |bytes: usize| bytes / WORKLOADS as usize;
    let (asked, resident) = (each(LIVE.load(Ordering::Relaxed) - live), each(resident_bytes() - before));
    println!("{asked} bytes a workload, {resident} resident, its share of services included");
    assert!(asked <= MOST, "{asked} bytes a workload");
    // What the allocator rounds up and what was in between.
    assert!(resident <= MOST * 3 / 2, "{resident} bytes resident a workload");
    assert_eq!(snapshot.workloads().count(), WORKLOADS as usize);
}
