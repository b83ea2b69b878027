//! Many clients, and clients that do not behave.

use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert::discovery::Edit;
use culvert::model::{Profile, Workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::control_client::*;
use crate::ground::*;

const WORKLOADS: usize = 20_000;

fn workload(number: usize, capacity: u32) -> Edit {
    Edit::Workload(Workload {
        uid: format!("Kubernetes//Pod/default/workload-with-an-ordinary-name-{number}").into(),
        name: format!("workload-with-an-ordinary-name-{number}").into(),
        addresses: std::net::IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + u32::try_from(number).unwrap())).into(),
        node: format!("node-{}", number % 200).into(),
        hostname: "".into(),
        status: Default::default(),
        capacity,
        profile: Arc::new(Profile { namespace: "default".into(), ..Profile::default() }),
    })
}

/// Resident memory of this process in KiB.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_clients_that_do_not_read_cost_little_and_hold_up_nobody() {
    let (plane, mut publisher) = Plane::published(config()).await;
    publisher.publish((0..WORKLOADS).map(|number| workload(number, 1)));
    plane.until_metric("culvert_control_resources{type=\"address\"}", WORKLOADS as f64).await;

    let before = memory();
    let mut stuck = Vec::new();
    for _ in 0..200 {
        // They take 64 KiB of about 3 MiB.
        let connection = connect_with(plane.address, &plane.ca(), NAME, Some(LEFT), 65_535).await.unwrap();
        let stream = connection.stream().await.unwrap();
        stream.say(first(ADDRESS, "left"));
        stuck.push(stream);
    }
    plane.until_metric("culvert_control_pushes_total{type=\"address\"}", 200.0).await;
    // Both ends are in this process; the clients hold their 64 KiB, TLS records and tasks as well.
    let each = (memory().saturating_sub(before)) / 200;
    println!("{each} KiB for each client that does not read");
    assert!(each < 1024, "{each} KiB for each client that does not read");

    let mut view = View::default();
    let mut stream = plane.connect().await.stream().await.unwrap();
    stream.say(first(ADDRESS, "left"));
    stream.until(&mut view, |view| view.names(ADDRESS).len() == WORKLOADS).await;
    for capacity in 2..5 {
        publisher.publish([workload(7, capacity)]);
        let began = Instant::now();
        let response = stream.next().await;
        assert_eq!(response.resources.len(), 1);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    // One that reads again gets the state, then what changed since, once.
    let mut late = stuck.pop().unwrap();
    let mut view = View::default();
    let name = "Kubernetes//Pod/default/workload-with-an-ordinary-name-7";
    late.until(&mut view, |view| view.workload(name).is_some_and(|workload| workload.capacity == Some(4))).await;
    assert_eq!(view.names(ADDRESS).len(), WORKLOADS);
    drop(stuck);
    drop(late);
    plane.until_metric("culvert_control_clients{type=\"address\"}", 1.0).await;
    drop(stream);
    assert!(plane.end().await, "a client that went away is still waited for");
}

#[tokio::test]
async fn a_stream_ends_well_when_it_is_old() {
    let plane = Plane::in_directory(directory("{}"), culvert::control::Config { longest_stream: Duration::from_millis(100), ..config() }).await;
    let mut stream = plane.connect().await.stream().await.unwrap();
    stream.say(first(ADDRESS, "left"));
    stream.next().await;
    assert_eq!(stream.response().await.unwrap(), None);
}

#[tokio::test]
async fn a_request_that_is_too_large_or_nonsense_ends_its_stream_only() {
    let plane =
        Plane::in_directory(directory(&mesh(&[("a", "left", 1)], &[])), culvert::control::Config { largest_request: 1 << 20, ..config() }).await;
    let connection = plane.connect().await;
    let mut good = connection.stream().await.unwrap();
    good.say(first(ADDRESS, "left"));
    good.next().await;
    let versions = (0..20_000).map(|number| (format!("a-resource-with-an-ordinary-name-{number}"), "0123456789abcdef".to_owned()));
    let large = DeltaRequest { versions: versions.collect(), ..first(ADDRESS, "left") };
    let long = DeltaRequest { subscribe: vec!["x".repeat(2000)], ..first(ADDRESS, "left") };
    for (request, code) in [(large, tonic::Code::OutOfRange), (long, tonic::Code::ResourceExhausted)] {
        let mut stream = connection.stream().await.unwrap();
        stream.say(request);
        assert_eq!(stream.response().await.unwrap_err().code(), code);
    }
    let status = connection.call::<DeltaRequest, DeltaResponse>("/no.such.Service/Method", DeltaRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unimplemented);
    plane.write(&mesh(&[("a", "left", 2)], &[]));
    assert_eq!(good.next().await.resources.len(), 1, "the other stream of the connection suffers");
}

#[tokio::test]
async fn somebody_who_speaks_no_tls_or_says_nothing_is_nobody() {
    let plane = Plane::of_file("{}").await;
    let mut plain = TcpStream::connect(plane.address).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // A TLS alert and the end, or a reset: never HTTP/2.
    let _ = tokio::time::timeout(PATIENCE, plain.read_to_end(&mut answer)).await.expect("no end");
    assert!(answer.len() < 16, "{answer:?}");
    let mut stream = plane.connect().await.stream().await.unwrap();
    stream.say(first(ADDRESS, "left"));
    assert_eq!(stream.next().await.type_url, ADDRESS);
}
