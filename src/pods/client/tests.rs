#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use tokio::task::JoinHandle;

use super::*;
use crate::lifecycle::drain::{self, DrainTrigger};
use crate::sys::seqpacket::SeqPacketListener;
use crate::wire::zds::{AddWorkload, Answer, DelWorkload, KeepWorkload, Payload, SnapshotSent, WorkloadRequest};

/// A runner that keeps the listeners open until the pod is told to stop, and writes down how it was told.
#[derive(Default)]
struct Recorder {
    ended: Arc<Mutex<Vec<(String, DrainMode)>>>,
}

impl PodRunner for Recorder {
    fn start(&self, pod: Pod, listeners: super::super::PodListeners) -> RunningPod {
        let (trigger, mut watcher) = drain::channel();
        let ended = Arc::clone(&self.ended);
        tokio::spawn(async move {
            let _open = listeners;
            let mode = watcher.signaled().await;
            ended.lock().unwrap().push((pod.uid, mode));
        });
        RunningPod::new(trigger, Arc::new(|| serde_json::json!({ "inbound": [], "outbound": [] })))
    }
}

/// The agent's end, by hand, and a client that calls it.
struct World {
    _dir: tempfile::TempDir,
    agent: SeqPacketListener,
    view: PodsView,
    client: JoinHandle<Result<(), PodsError>>,
    drain: DrainTrigger,
    ended: Arc<Mutex<Vec<(String, DrainMode)>>>,
}

impl World {
    fn new(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config { socket: dir.path().join("zds.sock"), ..Config::default() };
        change(&mut config);
        let agent = SeqPacketListener::bind(&config.socket).unwrap();
        let runner = Recorder::default();
        let ended = Arc::clone(&runner.ended);
        let (client, view) = Client::new(config, Arc::new(runner));
        let (drain, watcher) = drain::channel();
        Self { _dir: dir, agent, view, client: tokio::spawn(client.run(watcher)), drain, ended }
    }

    async fn accept(&self) -> SeqPacket {
        let proxy = self.agent.accept().await.unwrap();
        let mut buffer = [0; MAX_PACKET];
        let packet = proxy.receive(&mut buffer).await.unwrap().unwrap();
        assert_eq!(ZdsHello::decode(&buffer[..packet.len]).unwrap().version, Version::V1 as i32);
        proxy
    }

    async fn ready(&self, wanted: bool) {
        self.view.ready().wait_for(|ready| *ready == wanted).await.unwrap();
    }

    fn ended(&self) -> Vec<(String, DrainMode)> {
        self.ended.lock().unwrap().clone()
    }
}

async fn raw(proxy: &SeqPacket, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Option<String> {
    proxy.send(bytes, fds).await.unwrap();
    let mut buffer = [0; MAX_PACKET];
    let packet = proxy.receive(&mut buffer).await.unwrap()?;
    let Some(Answer::Ack(ack)) = WorkloadResponse::decode(&buffer[..packet.len]).unwrap().payload else { panic!("not an ack") };
    Some(ack.error)
}

async fn ask(proxy: &SeqPacket, payload: Payload, fds: &[BorrowedFd<'_>]) -> String {
    raw(proxy, &WorkloadRequest::from(payload).encode_to_vec(), fds).await.expect("an acknowledgement")
}

fn add(uid: &str) -> Payload {
    Payload::Add(Pod { uid: uid.into(), name: "web".into(), namespace: "shop".into(), service_account: "sa".into() }.into())
}

fn snapshot() -> Payload {
    Payload::SnapshotSent(SnapshotSent {})
}

async fn gone(proxy: &SeqPacket) {
    assert!(proxy.receive(&mut [0; 16]).await.unwrap_or(None).is_none());
}

#[tokio::test]
async fn a_pod_is_served_from_add_to_del_and_shown_in_the_dump_and_the_counts() {
    let world = World::new(|_| {});
    let proxy = world.accept().await;
    let netns = NetNs::create().unwrap();
    assert_eq!(ask(&proxy, add("u1"), &[netns.as_fd()]).await, "");
    assert!(!*world.view.ready().borrow());
    assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
    world.ready(true).await;
    let dump = serde_json::json!({ "u1": { "state": "Up", "connections": { "inbound": [], "outbound": [] },
        "info": { "name": "web", "namespace": "shop", "serviceAccount": "sa" } } });
    assert_eq!(world.view.dump(), dump);
    assert_eq!(world.view.stats().active.load(Ordering::Relaxed), 1);
    assert_eq!(netns.run(|| std::net::TcpListener::bind("0.0.0.0:15008").map(drop)).unwrap().unwrap_err().kind(), io::ErrorKind::AddrInUse);

    assert_eq!(ask(&proxy, Payload::Del(DelWorkload { uid: "u1".into() }), &[]).await, "");
    assert_eq!(world.view.dump(), serde_json::json!({}));
    let stats = world.view.stats();
    let counts = [&stats.active, &stats.pending, &stats.started, &stats.stopped].map(|count| count.load(Ordering::Relaxed));
    assert_eq!(counts, [0, 0, 1, 1]);
    while world.ended().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.ended(), [("u1".to_owned(), DrainMode::Immediate)]);
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_nacked_shown_as_pending_and_tried_again() {
    let world = World::new(|config| {
        config.port_reuse = false;
        config.retry = Duration::from_millis(20);
    });
    let proxy = world.accept().await;
    let netns = NetNs::create().unwrap();
    let squatter = netns.run(|| std::net::TcpListener::bind("0.0.0.0:15001")).unwrap().unwrap();
    let error = ask(&proxy, add("u1"), &[netns.as_fd()]).await;
    assert!(error.contains("15001") && error.contains("shop/web"), "{error}");
    assert_eq!(world.view.dump()["u1"]["state"], "Pending");
    assert_eq!(world.view.stats().pending.load(Ordering::Relaxed), 1);
    assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
    assert!(!*world.view.ready().borrow(), "not ready while a pod is pending");
    drop(squatter);
    world.ready(true).await;
    assert_eq!(world.view.dump()["u1"]["state"], "Up");
}

#[tokio::test]
async fn a_descriptor_that_is_no_namespace_is_nacked_with_the_reason() {
    let world = World::new(|_| {});
    let proxy = world.accept().await;
    let file = std::fs::File::open("/proc/self/status").unwrap();
    let error = ask(&proxy, add("u1"), &[file.as_fd()]).await;
    assert!(error.contains("not a network namespace"), "{error}");
}

#[tokio::test]
async fn pods_go_on_without_an_agent_and_the_next_snapshot_settles_them() {
    let world = World::new(|_| {});
    let proxy = world.accept().await;
    let namespaces = [NetNs::create().unwrap(), NetNs::create().unwrap(), NetNs::create().unwrap()];
    for (uid, netns) in ["kept", "added", "gone"].into_iter().zip(&namespaces) {
        assert_eq!(ask(&proxy, add(uid), &[netns.as_fd()]).await, "");
    }
    assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
    world.ready(true).await;
    drop(proxy);
    world.ready(false).await;
    assert_eq!(world.view.stats().active.load(Ordering::Relaxed), 3);
    assert!(world.ended().is_empty());

    let proxy = world.accept().await;
    assert_eq!(ask(&proxy, Payload::Keep(KeepWorkload { uid: "kept".into() }), &[]).await, "");
    assert_eq!(ask(&proxy, add("added"), &[namespaces[1].as_fd()]).await, "");
    assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
    world.ready(true).await;
    assert_eq!(world.view.stats().started.load(Ordering::Relaxed), 3, "nothing was started twice");
    while world.ended().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.ended(), [("gone".to_owned(), DrainMode::Immediate)]);
}

#[tokio::test]
async fn a_packet_that_makes_no_sense_is_nacked_then_the_client_calls_again() {
    let netns = NetNs::create().unwrap();
    let good_add = WorkloadRequest::from(add("u1")).encode_to_vec();
    let too_long = vec![b'x'; MAX_PACKET + 1];
    let senseless: [(&[u8], &[BorrowedFd<'_>]); 5] =
        [(b"\xff\xff\xff", &[]), (&too_long, &[]), (&good_add, &[]), (&good_add, &[netns.as_fd(), netns.as_fd()]), (b"\x1a\x00", &[netns.as_fd()])];
    let world = World::new(|_| {});
    for (bytes, fds) in senseless {
        let proxy = world.accept().await;
        let error = raw(&proxy, bytes, fds).await.expect("the reason comes first");
        assert_ne!(error, "");
        gone(&proxy).await;
    }
    let proxy = world.accept().await;
    assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
    world.ready(true).await;
}

#[tokio::test]
async fn broken_protocol_is_nacked_and_ends_the_client_with_the_reason() {
    let without_info = Payload::Add(AddWorkload { uid: "u1".into(), workload_info: None });
    let netns = NetNs::create().unwrap();
    let keep = Payload::Keep(KeepWorkload { uid: "u1".into() });
    let cases: [(Payload, &[BorrowedFd<'_>]); 3] = [(without_info, &[netns.as_fd()]), (keep, &[]), (snapshot(), &[])];
    for (payload, fds) in cases {
        let world = World::new(|_| {});
        let proxy = world.accept().await;
        assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
        let told = ask(&proxy, payload, fds).await;
        assert_ne!(told, "");
        let error = world.client.await.unwrap().unwrap_err();
        assert!(error.to_string().contains(&told), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_missing_agent_is_called_again_until_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { socket: dir.path().join("late.sock"), ..Config::default() };
    let socket = config.socket.clone();
    let (client, view) = Client::new(config, Arc::new(Recorder::default()));
    let (_drain, watcher) = drain::channel();
    let _client = tokio::spawn(client.run(watcher));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let agent = SeqPacketListener::bind(&socket).unwrap();
    let proxy = agent.accept().await.unwrap();
    let _hello = proxy.receive(&mut [0; 16]).await.unwrap().unwrap();
    assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
    view.ready().wait_for(|ready| *ready).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_drains_every_pod_gracefully_and_hangs_up() {
    let world = World::new(|_| {});
    let proxy = world.accept().await;
    let (first, second) = (NetNs::create().unwrap(), NetNs::create().unwrap());
    assert_eq!(ask(&proxy, add("u1"), &[first.as_fd()]).await, "");
    assert_eq!(ask(&proxy, add("u2"), &[second.as_fd()]).await, "");
    let ended = Arc::clone(&world.ended);
    assert!(world.drain.start(DrainMode::Graceful, Duration::from_secs(10)).await);
    world.client.await.unwrap().unwrap();
    let mut seen = ended.lock().unwrap().clone();
    seen.sort_by(|left, right| left.0.cmp(&right.0));
    assert_eq!(seen, [("u1".to_owned(), DrainMode::Graceful), ("u2".to_owned(), DrainMode::Graceful)]);
    gone(&proxy).await;
}

#[tokio::test]
async fn no_namespace_stays_open_after_its_pod_is_gone() {
    let world = World::new(|_| {});
    let proxy = world.accept().await;
    let netns = NetNs::create().unwrap();
    let open = || {
        let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        entries.filter(|entry| std::fs::metadata(entry.path()).is_ok_and(|file| file.dev() == netns.id().dev && file.ino() == netns.id().ino)).count()
    };
    let before = open();
    for _ in 0..3 {
        assert_eq!(ask(&proxy, add("u1"), &[netns.as_fd()]).await, "");
    }
    assert_eq!(ask(&proxy, snapshot(), &[]).await, "");
    assert_eq!(ask(&proxy, Payload::Del(DelWorkload { uid: "u1".into() }), &[]).await, "");
    while world.ended().is_empty() || open() != before {
        tokio::task::yield_now().await;
    }
}
