//! What a large mesh costs over xDS: 100,000 workloads and 5,000 services in one push, then 100 changes a second for ten seconds. Printed: CPU of
//! the client's process (TLS, HTTP/2, decoding, applying, publishing), its memory a while after, and how long readers waited.
//!
//! The server is this program started again, so that its costs are its own. As istiod, it pushes each change when it is due, whether or not the ones
//! before were acknowledged. Meanwhile 250 pods wait for what concerns them, as those of a full node do, and a thread looks up addresses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[allow(dead_code, unreachable_pub)]
#[path = "../tests/support/pki.rs"]
mod pki;
#[allow(dead_code, unreachable_pub)]
#[path = "../tests/support/xds_server.rs"]
mod xds_server;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use culvert::discovery::xds::{self, Identity};
use culvert::grpc::{self, Dialer, RootSource};
use culvert::wire::workload::{Address, AddressType, Locality, NetworkAddress, Port, PortList, Service, Workload};
use culvert::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};
use nix::sys::resource::{UsageWho, getrusage};
use xds_server::{Server, Trust, resource};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const WORKLOADS: u32 = 100_000;
const SERVICES: u32 = 5_000;
const UPDATES: u32 = 1000;
const PER_SECOND: u32 = 100;
/// Of this node.
const PODS: usize = 250;

fn namespace(service: u32) -> String {
    format!("team-{}", service % 200)
}

fn host(service: u32) -> String {
    format!("app-{service}.{}.svc.cluster.local", namespace(service))
}

fn ports() -> Vec<Port> {
    vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }, Port { service_port: 443, target_port: 8443, app_protocol: 0 }]
}

fn workload(index: u32) -> Workload {
    let service = index % SERVICES;
    let (namespace, app) = (namespace(service), format!("app-{service}"));
    let name = format!("{app}-7d4b9c6f5d-{index:05}");
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}"),
        addresses: vec![Ipv4Addr::from_bits((10 << 24) + index).octets().to_vec().into()],
        tunnel_protocol: 1,
        trust_domain: "cluster.local".into(),
        service_account: app.clone(),
        node: format!("node-{}.region-1.example.internal", index % 1000),
        canonical_name: app.clone(),
        canonical_revision: "latest".into(),
        workload_name: app,
        authorization_policies: vec![format!("{namespace}/allow-app-{service}")],
        cluster_id: "Kubernetes".into(),
        services: [(format!("{namespace}/{}", host(service)), PortList { ports: ports() })].into(),
        locality: Some(Locality { region: "region-1".into(), zone: format!("zone-{}", index % 3), subzone: String::new() }),
        name,
        namespace,
        ..Workload::default()
    }
}

fn workload_resource(from: Workload, version: u64) -> Resource {
    let name = from.uid.clone();
    let address = Address { r#type: Some(AddressType::Workload(from)) };
    resource(&name, &format!("{version:016x}"), ADDRESS_TYPE, &address)
}

fn service_resource(index: u32) -> Resource {
    let service = Service {
        name: format!("app-{index}"),
        namespace: namespace(index),
        hostname: host(index),
        addresses: vec![NetworkAddress { address: Ipv4Addr::from_bits((11 << 24) + index).octets().to_vec().into(), ..NetworkAddress::default() }],
        ports: ports(),
        canonical: true,
        ..Service::default()
    };
    let name = format!("{}/{}", service.namespace, service.hostname);
    let address = Address { r#type: Some(AddressType::Service(service)) };
    resource(&name, &format!("{index:016x}"), ADDRESS_TYPE, &address)
}

/// Prints its address and its root; a line on its input begins the changes.
async fn serve() {
    let trust = Trust::new(&[]);
    let mut server = Server::start(&trust).await;
    let resources: Vec<Resource> =
        (0..SERVICES).map(service_resource).chain((0..WORKLOADS).map(|index| workload_resource(workload(index), index.into()))).collect();
    println!("{}", server.address);
    println!("{}", trust.root_pem().replace('\n', "|"));
    let mut stream = server.accept().await;
    stream.request().await;
    stream.request().await;
    stream.push(AUTHORIZATION_TYPE, vec![], &[]).await;
    stream.acked().await;
    stream.push(ADDRESS_TYPE, resources, &[]).await;
    stream.acked().await;
    tokio::task::spawn_blocking(|| std::io::stdin().lock().read_line(&mut String::new())).await.unwrap().unwrap();
    let (begun, mut acks) = (tokio::time::Instant::now(), 0);
    for round in 0..UPDATES {
        // As istiod, it does not wait for one push to be acknowledged before the next.
        let due = begun + Duration::from_secs(1) * round / PER_SECOND;
        while let Ok(ack) = tokio::time::timeout_at(due, stream.request()).await {
            assert_eq!(ack.error_detail, None);
            acks += 1;
        }
        let changed = Workload { status: i32::try_from(round % 2).unwrap(), capacity: Some(round), ..workload(round * 97 % WORKLOADS) };
        stream.push(ADDRESS_TYPE, vec![workload_resource(changed, u64::MAX - u64::from(round))], &[]).await;
    }
    for _ in acks..UPDATES {
        stream.request().await;
    }
    println!("done");
    std::future::pending::<()>().await;
}

fn cpu(of: UsageWho) -> Duration {
    let usage = getrusage(of).unwrap();
    let time = |value: nix::sys::time::TimeVal| Duration::new(value.tv_sec().try_into().unwrap(), u32::try_from(value.tv_usec()).unwrap() * 1000);
    time(usage.user_time()) + time(usage.system_time())
}

fn resident_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if std::env::args().any(|argument| argument == "serve") {
        return runtime.block_on(serve());
    }
    culvert::sys::memory::return_while_idle().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap()).arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let (address, root) = (lines.next().unwrap(), lines.next().unwrap().replace('|', "\n"));
    runtime.block_on(async {
        let dialer = Dialer::new(grpc::Config::new(address.parse().unwrap(), RootSource::Text(root))).unwrap();
        let (memory, before, begun) = (resident_mb(), cpu(UsageWho::RUSAGE_SELF), Instant::now());
        let identity = Identity { node: "node-1.region-1.example.internal".into(), ..Identity::default() };
        let (mesh, mut ready) = xds::start(xds::Config::new(dialer, identity));
        ready.wait_for(|ready| *ready).await.unwrap();
        // The ACK too.
        tokio::time::sleep(Duration::from_millis(200)).await;
        println!("first push: {:?} of CPU, {:?} in all", cpu(UsageWho::RUSAGE_SELF) - before, begun.elapsed() - Duration::from_millis(200));
        println!("memory then: {:.1} MB more than before", resident_mb() - memory);
        tokio::time::sleep(Duration::from_secs(4)).await;
        println!("memory after 4 s: {:.1} MB more than before", resident_mb() - memory);
        assert_eq!(mesh.current().snapshot.workloads().count(), WORKLOADS as usize);
        let over = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (mesh, over) = (mesh.clone(), over.clone());
            move || {
                let (mut worst, mut index) = (Vec::new(), 0);
                while !over.load(Ordering::Relaxed) {
                    index = (index + 7919) % WORKLOADS;
                    let begun = Instant::now();
                    let found = mesh.current().snapshot.locate("", IpAddr::V4(Ipv4Addr::from_bits((10 << 24) + index)), None);
                    worst.push(begun.elapsed());
                    assert!(found.is_some());
                    // A connection now and then, so that its cost does not hide what is measured.
                    std::thread::sleep(Duration::from_millis(1));
                }
                worst.sort_unstable();
                (worst, cpu(UsageWho::RUSAGE_THREAD))
            }
        });
        let woken = Arc::new(AtomicUsize::new(0));
        for _ in 0..PODS {
            // What a pod waits for: its policy and its workload, both of them on this node.
            let (mut worlds, woken) = (mesh.subscribe_local(), woken.clone());
            tokio::spawn(async move {
                while worlds.changed().await.is_ok() {
                    woken.fetch_add(1, Ordering::Relaxed);
                    worlds.borrow_and_update();
                }
            });
        }
        let epoch = mesh.current().epoch;
        let (before, begun) = (cpu(UsageWho::RUSAGE_SELF), Instant::now());
        writeln!(child.stdin.as_mut().unwrap()).unwrap();
        let done = tokio::task::spawn_blocking(move || lines.next());
        assert_eq!(done.await.unwrap().as_deref(), Some("done"));
        let took = begun.elapsed();
        over.store(true, Ordering::Relaxed);
        let (times, reading) = reader.join().unwrap();
        let spent = (cpu(UsageWho::RUSAGE_SELF) - before).saturating_sub(reading);
        let worlds = mesh.current().epoch - epoch;
        println!(
            "{UPDATES} changes in {took:?}, {worlds} worlds: {spent:?} of CPU beyond the reader's, {:.2} % of a core",
            spent.as_secs_f64() / took.as_secs_f64() * 100.0
        );
        println!("pods woken: {} times", woken.load(Ordering::Relaxed));
        println!("look-ups meanwhile: {} of them, p99 {:?}, longest {:?}", times.len(), times[times.len() * 99 / 100], times[times.len() - 1]);
        println!("memory at the end: {:.1} MB more than before", resident_mb() - memory);
    });
    child.kill().unwrap();
    child.wait().unwrap();
}
