//! Control planes that are not there, come and go, hang, or refuse (craft-and-trust F4, F5).

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use culvert::discovery::xds::Unanswered;
use culvert::grpc::{self, RootSource};
use culvert::lifecycle::Backoff;
use culvert::wire::authorization::Scope;
use culvert::wire::workload;
use culvert::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use tonic::Code;

use super::freezer::Freezer;
use super::xds_server::{Server, Trust, pod, pod_resource, policy_resource};
use super::{Setup, Stand, asker};

const A: &str = "Kubernetes//Pod/shop/a";

#[tokio::test]
async fn without_a_control_plane_at_start_we_are_not_ready_and_know_nobody_until_it_comes() {
    let mut stand = Stand::new().await;
    let address = stand.stop_server().await;
    assert!(!*stand.ready.borrow());
    assert_eq!(stand.mesh.current().epoch, 0);
    let stale = |stand: &Stand| -> f64 {
        let page = stand.metrics();
        page.lines().find_map(|line| line.strip_prefix("culvert_xds_stale_seconds ")?.parse().ok()).unwrap_or_else(|| panic!("{page}"))
    };
    let (before, later) = (stale(&stand), stale(&stand));
    assert!(before > 0.0 && later > before, "it grows: {before}, {later}");
    stand.restart_server(address).await;
    let _stream = stand.server.synced(vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1")], vec![]).await;
    stand.ready().await;
    assert!(stand.has(A));
    assert_eq!(stale(&stand), 0.0);
}

/// One that has forgotten what it told us, and tells it all again.
#[tokio::test]
async fn five_thousand_workloads_are_caught_up_with_in_five_seconds_and_what_is_as_it_was_stays() {
    let named = |index: u16| {
        let [high, low] = index.to_be_bytes();
        pod(&format!("p{index}"), [10, 1, high, low])
    };
    let everything = |version: &str| -> Vec<_> { (0..5000).map(|index| pod_resource(&named(index), version)).collect() };
    let mut stand = Stand::new().await;
    let stream = stand.server.synced(everything("1"), vec![policy_resource("p", Scope::Namespace, 1)]).await;
    stand.ready().await;
    let before = stand.mesh.current();
    let address = stand.stop_server().await;
    drop(stream);
    stand.restart_server(address).await;
    let mut stream = stand.server.accept().await;
    let begun = Instant::now();
    assert_eq!(stream.request().await.initial_resource_versions.len(), 5000);
    stream.request().await;
    let mut all = everything("2");
    let moved = workload::Workload { node: "elsewhere".into(), ..named(4321) };
    all[4321] = pod_resource(&moved, "2");
    stream.push(ADDRESS_TYPE, all, &[]).await;
    stream.acked().await;
    stream.push(AUTHORIZATION_TYPE, vec![policy_resource("p", Scope::Namespace, 1)], &[]).await;
    stream.acked().await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let after = stand.mesh.current();
    assert_eq!(&*after.snapshot.workload(&moved.uid).unwrap().node, "elsewhere");
    assert_eq!((after.snapshot.workloads().count(), after.epoch - before.epoch), (5000, 1), "one change is one new world");
    let kept = |world: &culvert::discovery::World| world.snapshot.workload(&named(7).uid).unwrap();
    assert_eq!(kept(&before), kept(&after));
}

#[tokio::test]
async fn a_control_plane_that_takes_its_time_is_waited_for() {
    let mut stand = Stand::new().await;
    let mut stream = stand.server.accept().await;
    for (kind, resources) in [(ADDRESS_TYPE, vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1")]), (AUTHORIZATION_TYPE, vec![])] {
        stream.request().await;
        // The fault itself: half a second for each message.
        tokio::time::sleep(Duration::from_millis(500)).await;
        stream.push(kind, resources, &[]).await;
    }
    stand.ready().await;
    assert!(stand.has(A) && !stand.server.has_stream(), "it was called again");
}

/// Ten minutes of a clock that is only moved on: the client waits its real waits.
#[tokio::test]
async fn what_is_known_stays_while_the_control_plane_is_gone_for_ten_minutes() {
    let backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(2));
    let mut stand = Stand::with(Setup { backoff, ..Setup::default() }).await;
    let stream = stand.server.synced(vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1")], vec![policy_resource("p", Scope::Namespace, 1)]).await;
    stand.ready().await;
    let before = stand.mesh.current();
    let address = stand.stop_server().await;
    drop(stream);
    tokio::time::pause();
    let gone = tokio::time::Instant::now();
    while gone.elapsed() < Duration::from_secs(600) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(stand.has(A), "a known workload is lost");
        assert!(Arc::ptr_eq(&stand.mesh.current(), &before));
        assert!(*stand.ready.borrow(), "readiness does not go with the control plane");
    }
    tokio::time::resume();
    let failures = counter(&stand.metrics(), "istio_xds_connection_terminations_total{reason=\"ConnectionError\"}");
    // Delays between zero and two seconds: about 600.
    assert!((300..1200).contains(&failures), "{failures} attempts in ten minutes");
    stand.restart_server(address).await;
    let mut stream = stand.server.accept().await;
    let (first, second) = (stream.request().await, stream.request().await);
    assert_eq!((first.initial_resource_versions.len(), second.initial_resource_versions.len()), (1, 1));
    stream.push(ADDRESS_TYPE, vec![pod_resource(&pod("b", [10, 0, 0, 2]), "1")], &[A]).await;
    stream.acked().await;
    assert!(!stand.has(A) && stand.has("Kubernetes//Pod/shop/b"));
}

fn counter(page: &str, series: &str) -> u64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series)).unwrap_or_else(|| panic!("no {series} in\n{page}"));
    line.trim().parse().unwrap()
}

#[tokio::test]
async fn a_control_plane_that_flaps_loses_nobody_and_each_stream_goes_on_where_the_last_one_ended() {
    let mut stand = Stand::new().await;
    let stream = stand.server.synced(vec![pod_resource(&pod("a", [10, 0, 0, 1]), "v0")], vec![]).await;
    stand.ready().await;
    drop(stream);
    for round in 1..20 {
        let mut stream = stand.server.accept().await;
        let versions = stream.request().await.initial_resource_versions;
        assert_eq!(versions.get(A).unwrap(), &format!("v{}", round - 1));
        stream.push(ADDRESS_TYPE, vec![pod_resource(&pod("a", [10, 0, 0, 1]), &format!("v{round}"))], &[]).await;
        stream.request().await;
        stream.acked().await;
        match round % 3 {
            0 => drop(stream),
            1 => stream.fail(Code::Unavailable, "transport is closing").await,
            _ => {
                let address = stand.stop_server().await;
                drop(stream);
                stand.restart_server(address).await;
            }
        }
        assert!(stand.has(A));
    }
}

#[tokio::test]
async fn a_server_that_ends_every_stream_at_once_is_not_called_in_a_loop() {
    let backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(5));
    let mut stand = Stand::with(Setup { backoff, ..Setup::default() }).await;
    let begun = Instant::now();
    let mut streams = 0;
    while begun.elapsed() < Duration::from_secs(2) {
        if stand.server.has_stream() {
            // Answers, so that it seems to work, and ends well.
            let mut stream = stand.server.accept().await;
            stream.push(ADDRESS_TYPE, vec![], &[]).await;
            streams += 1;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!((2..25).contains(&streams), "{streams} streams in two seconds");
}

#[tokio::test]
async fn a_stream_that_hangs_is_noticed_and_opened_anew() {
    let target = Arc::new(Mutex::new(None));
    let upstream = target.clone();
    let freezer = Freezer::start(move || upstream.lock().unwrap().unwrap()).await;
    let ping = (Duration::from_millis(200), Duration::from_millis(300));
    // The client may dial before the relay knows the way; it dials again.
    let trust_first = Server::start(&Trust::new(&[])).await;
    *target.lock().unwrap() = Some(trust_first.address);
    let mut stand = Stand::with(Setup { at: Some(freezer.address), ping, ..Setup::default() }).await;
    *target.lock().unwrap() = Some(stand.server.address);
    let _stream = stand.server.synced(vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1")], vec![]).await;
    stand.ready().await;
    let default = grpc::Config::new("localhost:1".parse().unwrap(), RootSource::System);
    assert!(default.ping_interval + default.ping_timeout <= Duration::from_secs(30), "by default, within 30 s (F4)");
    freezer.freeze();
    let mut again = stand.server.accept().await;
    assert_eq!(again.request().await.initial_resource_versions.len(), 1);
    assert!(stand.has(A));
    assert!(counter(&stand.metrics(), "istio_xds_connection_terminations_total{reason=\"Reconnect\"}") >= 1);
}

#[tokio::test]
async fn root_and_token_are_read_for_every_stream() {
    let mut stand = Stand::new().await;
    drop(stand.server.synced(vec![], vec![]).await);
    stand.ready().await;
    // The control plane comes back with another root, and our token is another one.
    let address = stand.stop_server().await;
    stand.trust = Trust::new(&[]);
    std::fs::write(stand.files.path().join("token"), "two").unwrap();
    stand.restart_server(address).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!stand.server.has_stream(), "a server of another root was believed");
    stand.trust.write_root(&stand.files.path().join("root.pem"));
    let stream = stand.server.accept().await;
    assert_eq!(stream.metadata.get("authorization").unwrap(), "Bearer two");
}

#[tokio::test]
async fn a_refused_stream_is_counted_and_tried_again() {
    let mut stand = Stand::new().await;
    stand.server.accept().await.fail(Code::Unauthenticated, "no").await;
    let _stream = stand.server.synced(vec![], vec![]).await;
    stand.ready().await;
    assert_eq!(counter(&stand.metrics(), "istio_xds_connection_terminations_total{reason=\"Error\"}"), 1);
}

/// Larger than the 4 MiB that gRPC clients take by default.
#[tokio::test]
async fn a_message_of_many_megabytes_is_taken() {
    let mut stand = Stand::new().await;
    let large = |index: u8| {
        let mut pod = pod(&format!("p{index}"), [10, 0, 0, index]);
        pod.canonical_name = "n".repeat(1 << 20);
        pod_resource(&pod, "1")
    };
    let _stream = stand.server.synced((0..20).map(large).collect(), vec![]).await;
    stand.ready().await;
    assert_eq!(stand.mesh.current().snapshot.workloads().count(), 20);
}

#[tokio::test]
async fn a_server_that_cannot_take_all_our_versions_tells_us_everything_and_what_it_leaves_out_is_gone() {
    let mut stand = Stand::new().await;
    let long = |name: &str| pod(&format!("{name}{}", "x".repeat(500_000)), [10, 0, 0, 1]);
    let pods: Vec<_> = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"].map(long).to_vec();
    let policies = vec![policy_resource("p", Scope::Namespace, 1), policy_resource("q", Scope::Namespace, 1)];
    let stream = stand.server.synced(pods.iter().map(|pod| pod_resource(pod, "1")).collect(), policies).await;
    stand.ready().await;
    drop(stream);
    // The first attempt is refused for its size: the request is more than the server takes.
    let mut refused = stand.server.accept().await;
    let status = refused.next().await.unwrap_err();
    refused.fail(Code::ResourceExhausted, status.message()).await;
    let mut stream = stand.server.accept().await;
    for _ in 0..2 {
        assert!(stream.request().await.initial_resource_versions.is_empty());
    }
    assert!(stand.has(&pods[1].uid), "nothing is lost meanwhile");
    stream.push(ADDRESS_TYPE, vec![pod_resource(&pods[0], "1")], &[]).await;
    stream.acked().await;
    stream.push(AUTHORIZATION_TYPE, vec![policy_resource("q", Scope::Namespace, 1)], &[]).await;
    stream.acked().await;
    stand.until("only what is left", |world| world.snapshot.workloads().count() == 1 && world.policies.len() == 1).await;
    stream.push(ADDRESS_TYPE, vec![pod_resource(&pods[1], "1")], &[]).await;
    stream.acked().await;
    assert_eq!(stand.mesh.current().snapshot.workloads().count(), 2, "later pushes are changes again");
}

#[tokio::test]
async fn on_demand_nobody_is_told_what_the_control_plane_did_not_say() {
    let mut stand = Stand::with(Setup { on_demand: Some(Duration::from_millis(100)), ..Setup::default() }).await;
    stand.stop_server().await;
    let error = stand.mesh.know_address(&asker(), "", [10, 0, 0, 1].into()).await.unwrap_err();
    assert!(matches!(error, Unanswered::Late { .. }), "{error}");
}
