#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream as Blocking};
use std::thread;

use super::super::{Held, server};
use super::*;
use crate::sys::netns::NetNs;

const SHORT: Duration = Duration::from_millis(60);

/// A server on a thread; its address. It lives as long as the test's process.
fn server() -> SocketAddr {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    thread::spawn(move || server::serve(port).unwrap());
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let deadline = Instant::now() + Duration::from_secs(10);
    while Blocking::connect(address).is_err() {
        assert!(Instant::now() < deadline, "the server does not listen");
        thread::sleep(Duration::from_millis(5));
    }
    address
}

/// What is done to one byte on the way.
#[derive(Debug, Clone, Copy)]
enum Harm {
    Lost(usize),
    Changed(usize),
}

/// Stands before a server and does harm to what the server is sent (`up`), or to what it sends.
fn thief(server: SocketAddr, up: bool, harm: Harm) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), Blocking::connect(server).unwrap());
            let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || copy(from, to, up.then_some(harm)));
            thread::spawn(move || copy(server, client, (!up).then_some(harm)));
        }
    });
    address
}

fn copy(mut from: Blocking, mut to: Blocking, harm: Option<Harm>) {
    let (mut buffer, mut seen) = (vec![0; 65536], 0);
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let mut chunk = buffer[..length].to_vec();
        match harm {
            Some(Harm::Lost(at)) if (seen..seen + length).contains(&at) => drop(chunk.remove(at - seen)),
            Some(Harm::Changed(at)) if (seen..seen + length).contains(&at) => chunk[at - seen] ^= 1,
            _ => {}
        }
        seen += length;
        if to.write_all(&chunk).is_err() {
            break;
        }
    }
    to.shutdown(std::net::Shutdown::Write).ok();
}

/// This test's own namespace.
fn here() -> Seat {
    Seat { netns: NetNs::current().unwrap(), cpu: None }
}

async fn load(server: SocketAddr, job: Job) -> Result<Load, String> {
    run(&here(), server, job, Arc::default()).await
}

fn bulk(up: bool) -> Job {
    Job::Bulk { streams: 3, up, pace: None, lasts: SHORT }
}

#[tokio::test]
async fn every_job_counts_what_really_arrived() {
    let server = server();
    for up in [true, false] {
        let load = load(server, bulk(up)).await.unwrap();
        assert!(load.bytes > 0 && load.elapsed >= SHORT, "{load:?}");
    }
    for job in [Job::Requests { connections: 4, lasts: SHORT }, Job::Connections { at_once: 4, lasts: SHORT }] {
        let mut load = load(server, job).await.unwrap();
        assert!(load.requests >= 4 && load.latencies.count() == load.requests, "{load:?}");
        assert!(load.latencies.percentile(0.5) > 0.0);
    }
}

#[tokio::test]
async fn a_paced_stream_keeps_to_its_pace() {
    let job = Job::Bulk { streams: 1, up: true, pace: Some(20_000_000), lasts: SHORT * 4 };
    let load = load(server(), job).await.unwrap();
    // A burst may be ahead by one write, which is at most a period of the pattern.
    assert!(load.bytes <= 20_000_000 * 24 / 100 + 2 * 262_139, "{} bytes", load.bytes);
    assert!(load.bytes > 0);
}

#[tokio::test]
async fn a_stopped_stream_ends_in_good_order() {
    let watch = Arc::new(Watch::default());
    watch.stop.store(true, Ordering::Relaxed);
    let job = Job::Bulk { streams: 1, up: true, pace: None, lasts: Duration::from_secs(20) };
    let load = run(&here(), server(), job, watch).await.unwrap();
    assert!(load.elapsed < Duration::from_secs(10));
}

#[tokio::test]
async fn one_lost_or_changed_byte_is_noticed() {
    let server = server();
    for (job, up, position) in [(bulk(true), true, 5000), (bulk(false), false, 5000), (bulk(true), false, 3), (bulk(false), false, 0)] {
        let outcome = load(thief(server, up, Harm::Lost(position)), job).await;
        assert!(outcome.is_err(), "{job:?} up {up} at {position}: {outcome:?}");
    }
    for up in [true, false] {
        let changed = load(thief(server, up, Harm::Changed(500)), Job::Connections { at_once: 1, lasts: SHORT }).await;
        assert!(changed.is_err(), "up {up}: {changed:?}");
    }
}

#[tokio::test]
async fn held_connections_answer_and_move_bytes() {
    let held = Held::start(&here(), server());
    held.open(1).await.unwrap();
    held.open(70).await.unwrap();
    held.move_each(300_000).await.unwrap();
    held.move_each(20).await.unwrap();
}

#[tokio::test]
async fn held_connections_to_nobody_are_an_error() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let held = Held::start(&here(), nobody);
    let error = held.open(1).await.unwrap_err();
    assert!(error.contains("cannot connect"), "{error}");
}
