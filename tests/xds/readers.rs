//! Readers while the mesh changes.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use culvert::wire::workload::Workload;
use culvert::wire::xds::ADDRESS_TYPE;

use super::Stand;
use super::xds_server::{pod, pod_resource};

const PODS: u32 = 2000;

fn address(index: u32) -> [u8; 4] {
    Ipv4Addr::from_bits((10 << 24) + index).octets()
}

/// A hundred pushes a second for two seconds. A look-up is what a new connection does; on a machine that has other work too, the operating
/// system may take a reader off its core for longer than a millisecond, so a thousandth of the look-ups is left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_new_look_up_waits_a_millisecond_for_an_update_and_no_known_workload_is_lost() {
    let mut stand = Stand::new().await;
    let pods: Vec<Workload> = (0..PODS).map(|index| pod(&format!("p{index}"), address(index))).collect();
    let mut stream = stand.server.synced(pods.iter().map(|pod| pod_resource(pod, "1")).collect(), vec![]).await;
    stand.ready().await;
    let over = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let (mesh, over) = (stand.mesh.clone(), over.clone());
        move || {
            let (mut times, mut lost, mut index) = (Vec::new(), 0, 0);
            while !over.load(Ordering::Relaxed) {
                index = (index + 7919) % PODS;
                let begun = Instant::now();
                let world = mesh.current();
                let found = world.snapshot.locate("", IpAddr::from(address(index)), Some("shop"));
                drop(world);
                times.push(begun.elapsed());
                lost += u32::from(found.is_none());
            }
            (times, lost)
        }
    });
    let begun = Instant::now();
    for round in 0..200_u32 {
        let from = &pods[(round * 31 % PODS) as usize];
        let changed = Workload { capacity: Some(round + 2), ..from.clone() };
        stream.push(ADDRESS_TYPE, vec![pod_resource(&changed, &format!("{round}"))], &[]).await;
        stream.acked().await;
        tokio::time::sleep_until(tokio::time::Instant::from_std(begun + Duration::from_millis(10) * round)).await;
    }
    over.store(true, Ordering::Relaxed);
    let (mut times, lost) = reader.join().unwrap();
    assert_eq!(lost, 0, "of {} look-ups", times.len());
    assert!(stand.mesh.current().epoch >= 200, "the updates were published");
    times.sort_unstable();
    let late = times[times.len() - 1 - times.len() / 1000];
    assert!(late < Duration::from_millis(1), "a thousandth of {} look-ups took longer than {late:?}", times.len());
}
