#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use tokio::task::JoinHandle;

use super::*;
use crate::lifecycle::drain::{self, DrainTrigger};
use crate::pods::{Client, Config, PodListeners, PodRunner, PodsError, PodsView, RunningPod};
use crate::wire::zds::Version;

fn pod(uid: &str) -> Pod {
    Pod { uid: uid.into(), name: format!("pod-{uid}"), namespace: "shop".into(), service_account: "sa".into() }
}

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("zds.sock")
    }

    fn serve<const N: usize>(&self, known: [(Pod, Option<NetNs>); N]) -> ZdsServer {
        ZdsServer::bind(&self.path(), known).unwrap()
    }

    /// A proxy by hand, after its Hello.
    async fn dial(&self) -> ByHand {
        let socket = SeqPacket::connect(&self.path()).unwrap();
        socket.send(&ZdsHello { version: Version::V1 as i32 }.encode_to_vec(), &[]).await.unwrap();
        ByHand { socket }
    }

    /// The real client, with a runner that only keeps the listeners open.
    fn client(&self, port_reuse: bool) -> RealProxy {
        let config = Config { socket: self.path(), port_reuse, retry: Duration::from_millis(20), ..Config::default() };
        let (client, view) = Client::new(config, Arc::new(Idle));
        let (drain, watcher) = drain::channel();
        RealProxy { view, drain, task: tokio::spawn(client.run(watcher)) }
    }
}

struct RealProxy {
    view: PodsView,
    drain: DrainTrigger,
    task: JoinHandle<Result<(), PodsError>>,
}

impl RealProxy {
    async fn ready(&self, wanted: bool) {
        self.view.ready().wait_for(|ready| *ready == wanted).await.unwrap();
    }

    fn state(&self, uid: &str) -> String {
        self.view.dump()[uid]["state"].as_str().unwrap_or("none").to_owned()
    }

    fn started(&self) -> u64 {
        self.view.stats().started.load(std::sync::atomic::Ordering::Relaxed)
    }

    async fn stop(self) {
        assert!(self.drain.start(drain::DrainMode::Immediate, Duration::from_secs(10)).await);
        self.task.await.unwrap().unwrap();
    }
}

struct Idle;

impl PodRunner for Idle {
    fn start(&self, _: Pod, listeners: PodListeners) -> RunningPod {
        let (trigger, mut watcher) = drain::channel();
        tokio::spawn(async move {
            let _open = listeners;
            watcher.signaled().await;
        });
        RunningPod::new(trigger, Arc::new(|| serde_json::json!({})))
    }
}

struct ByHand {
    socket: SeqPacket,
}

impl ByHand {
    /// The next request and the namespace beside it, not yet acknowledged.
    async fn next(&self) -> (Payload, Option<NetNs>) {
        let mut buffer = [0; MAX_PACKET];
        let packet = self.socket.receive(&mut buffer).await.unwrap().expect("a request");
        let payload = WorkloadRequest::decode(&buffer[..packet.len]).unwrap().payload.unwrap();
        let netns = packet.fds.into_iter().next().map(|fd| NetNs::from_fd(fd).unwrap());
        (payload, netns)
    }

    async fn ack(&self, error: &str) {
        self.socket.send(&WorkloadResponse::ack(error).encode_to_vec(), &[]).await.unwrap();
    }

    /// The next request in short, acknowledged.
    async fn obey(&self) -> String {
        let (payload, netns) = self.next().await;
        assert_eq!(netns.is_some(), matches!(payload, Payload::Add(_)), "a namespace comes with Add and with nothing else");
        self.ack("").await;
        match payload {
            Payload::Add(add) => format!("add {}", add.uid),
            Payload::Del(del) => format!("del {}", del.uid),
            Payload::Keep(keep) => format!("keep {}", keep.uid),
            Payload::SnapshotSent(_) => "snapshot".into(),
        }
    }

    async fn hung_up(&self) {
        assert!(self.socket.receive(&mut [0; 16]).await.unwrap_or(None).is_none());
    }
}

async fn connected(server: &ZdsServer, wanted: usize) {
    server.connected().wait_for(|count| *count == wanted).await.unwrap();
}

fn listens(netns: &NetNs, port: u16) -> bool {
    netns.run(|| std::net::TcpListener::bind(("0.0.0.0", port)).is_err()).unwrap()
}

#[tokio::test]
async fn an_acknowledged_pod_has_its_listeners_and_a_removed_one_loses_them() {
    let world = World::new();
    let server = world.serve([]);
    let proxy = world.client(true);
    connected(&server, 1).await;
    let netns = NetNs::create().unwrap();
    assert_eq!(server.add(pod("1"), netns.clone()).await.unwrap(), Delivery::Acknowledged);
    assert!([15001, 15006, 15008].iter().all(|port| listens(&netns, *port)));
    assert_eq!(proxy.state("1"), "Up");
    server.remove("1").await.unwrap();
    assert_eq!(proxy.state("1"), "none");
    while listens(&netns, 15008) {
        tokio::task::yield_now().await;
    }
    proxy.stop().await;
    connected(&server, 0).await;
}

#[tokio::test]
async fn pods_known_at_start_and_pods_added_without_a_proxy_are_told_to_the_first_one() {
    let world = World::new();
    let (first, second) = (NetNs::create().unwrap(), NetNs::create().unwrap());
    let server = world.serve([(pod("1"), Some(first))]);
    assert_eq!(server.add(pod("2"), second).await.unwrap(), Delivery::Remembered);
    let proxy = world.client(true);
    proxy.ready(true).await;
    assert_eq!([proxy.state("1"), proxy.state("2")], ["Up", "Up"]);
    proxy.stop().await;
}

#[tokio::test]
async fn an_agent_that_restarts_keeps_what_it_knows_and_starts_nothing_twice() {
    let world = World::new();
    let namespaces = [NetNs::create().unwrap(), NetNs::create().unwrap(), NetNs::create().unwrap()];
    let server = world.serve([]);
    let proxy = world.client(true);
    connected(&server, 1).await;
    for (uid, netns) in ["found", "lost", "gone"].into_iter().zip(&namespaces) {
        server.add(pod(uid), netns.clone()).await.unwrap();
    }
    drop(server);
    proxy.ready(false).await;
    assert_eq!(proxy.state("gone"), "Up", "pods go on without an agent");
    let server = world.serve([(pod("found"), Some(namespaces[0].clone())), (pod("lost"), None)]);
    proxy.ready(true).await;
    connected(&server, 1).await;
    assert_eq!(["found", "lost", "gone"].map(|uid| proxy.state(uid)), ["Up", "Up", "none"]);
    assert_eq!(proxy.started(), 3);
    proxy.stop().await;
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_refused_with_the_reason_and_served_later_without_being_told_again() {
    let world = World::new();
    let server = world.serve([]);
    let proxy = world.client(false);
    connected(&server, 1).await;
    let netns = NetNs::create().unwrap();
    let squatter = netns.run(|| std::net::TcpListener::bind("0.0.0.0:15006")).unwrap().unwrap();
    let Err(ZdsError::Refused(reason)) = server.add(pod("1"), netns).await else { panic!("must be refused") };
    assert!(reason.contains("15006"), "{reason}");
    assert_eq!(proxy.state("1"), "Pending");
    drop(squatter);
    proxy.ready(true).await;
    assert_eq!(proxy.state("1"), "Up");
    proxy.stop().await;
}

#[tokio::test]
async fn the_snapshot_is_add_or_keep_per_pod_then_snapshot_sent_in_lock_step() {
    let world = World::new();
    let netns = NetNs::create().unwrap();
    let server = world.serve([(pod("1"), Some(netns.clone())), (pod("2"), None)]);
    let proxy = world.dial().await;
    let (payload, received) = proxy.next().await;
    assert_eq!(payload, Payload::Add(pod("1").into()));
    assert_eq!(received, Some(netns));
    let early = timeout(Duration::from_millis(50), proxy.next()).await;
    assert!(early.is_err(), "nothing more before the acknowledgement");
    assert_eq!(*server.connected().borrow(), 0);
    proxy.ack("").await;
    assert_eq!([proxy.obey().await, proxy.obey().await], ["keep 2", "snapshot"]);
    connected(&server, 1).await;
}

#[tokio::test]
async fn add_goes_only_to_the_newest_proxy_and_del_to_all() {
    let world = World::new();
    let server = world.serve([]);
    let old = world.dial().await;
    assert_eq!(old.obey().await, "snapshot");
    let new = world.dial().await;
    assert_eq!(new.obey().await, "snapshot");
    connected(&server, 2).await;
    let (added, told) = tokio::join!(server.add(pod("1"), NetNs::create().unwrap()), new.obey());
    assert_eq!((added.unwrap(), told.as_str()), (Delivery::Acknowledged, "add 1"));
    let (removed, told_new, told_old) = tokio::join!(server.remove("1"), new.obey(), old.obey());
    removed.unwrap();
    assert_eq!((told_new.as_str(), told_old.as_str()), ("del 1", "del 1"), "the old one was not told of the Add in between");
}

#[tokio::test]
async fn when_the_newest_proxy_is_lost_the_one_before_it_is_told_what_it_missed() {
    let world = World::new();
    let server = world.serve([(pod("0"), Some(NetNs::create().unwrap()))]);
    let old = world.dial().await;
    assert_eq!([old.obey().await, old.obey().await], ["add 0", "snapshot"]);
    let new = world.dial().await;
    assert_eq!([new.obey().await, new.obey().await], ["add 0", "snapshot"]);
    connected(&server, 2).await;
    let (added, _) = tokio::join!(server.add(pod("1"), NetNs::create().unwrap()), new.obey());
    added.unwrap();
    let unanswered = async {
        assert!(matches!(new.next().await.0, Payload::Add(_)));
        drop(new);
    };
    let (lost, ()) = tokio::join!(server.add(pod("2"), NetNs::create().unwrap()), unanswered);
    assert!(matches!(lost, Err(ZdsError::Lost)));
    assert_eq!([old.obey().await, old.obey().await], ["add 1", "add 2"]);
    connected(&server, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_does_not_answer_is_hung_up_on_after_five_seconds() {
    let world = World::new();
    let server = world.serve([]);
    let proxy = world.dial().await;
    assert_eq!(proxy.obey().await, "snapshot");
    connected(&server, 1).await;
    let begin = tokio::time::Instant::now();
    assert!(matches!(server.add(pod("1"), NetNs::create().unwrap()).await, Err(ZdsError::Lost)));
    assert_eq!(begin.elapsed(), DEADLINE);
    let _add = proxy.next().await;
    proxy.hung_up().await;
    let again = world.dial().await;
    assert_eq!([again.obey().await, again.obey().await], ["add 1", "snapshot"], "it stays known");
}

#[tokio::test(start_paused = true)]
async fn a_proxy_too_far_behind_is_hung_up_on_and_told_everything_when_it_calls_again() {
    let world = World::new();
    let server = world.serve([]);
    let proxy = world.dial().await;
    assert_eq!(proxy.obey().await, "snapshot");
    connected(&server, 1).await;
    let netns = NetNs::create().unwrap();
    let mut adds: Vec<_> = (0..QUEUE + 2).map(|uid| Box::pin(server.add(pod(&uid.to_string()), netns.clone()))).collect();
    let mut remembered = 0;
    for add in &mut adds {
        if let std::task::Poll::Ready(Ok(Delivery::Remembered)) = futures_util::poll!(add) {
            remembered += 1;
        }
    }
    assert!(remembered > 0, "the queue is full and nobody else is there");
    drop(adds);
    drop(proxy);
    let again = world.dial().await;
    for _ in 0..QUEUE + 2 {
        assert!(again.obey().await.starts_with("add "));
    }
    assert_eq!(again.obey().await, "snapshot");
}

#[tokio::test]
async fn a_proxy_that_speaks_unasked_or_answers_nonsense_is_hung_up_on_and_others_go_on() {
    let world = World::new();
    let server = world.serve([]);
    let good = world.dial().await;
    assert_eq!(good.obey().await, "snapshot");
    let unasked = world.dial().await;
    assert_eq!(unasked.obey().await, "snapshot");
    connected(&server, 2).await;
    unasked.ack("").await;
    unasked.hung_up().await;
    for nonsense in [&b"\xff\xff"[..], b"\x12\x00", &[7; MAX_PACKET + 1]] {
        let bad = world.dial().await;
        let _snapshot = bad.next().await;
        bad.socket.send(nonsense, &[]).await.unwrap();
        bad.hung_up().await;
    }
    let silent = SeqPacket::connect(&world.path()).unwrap();
    silent.send(&[0xff; 3], &[]).await.unwrap();
    assert!(silent.receive(&mut [0; 16]).await.unwrap_or(None).is_none());
    connected(&server, 1).await;
    let (added, told) = tokio::join!(server.add(pod("1"), NetNs::create().unwrap()), good.obey());
    assert_eq!((added.unwrap(), told.as_str()), (Delivery::Acknowledged, "add 1"));
}

#[tokio::test]
async fn a_pod_too_long_for_a_packet_is_refused_and_the_connection_lives() {
    let world = World::new();
    let server = world.serve([]);
    let proxy = world.dial().await;
    assert_eq!(proxy.obey().await, "snapshot");
    connected(&server, 1).await;
    let long = Pod { name: "x".repeat(2000), ..pod("long") };
    assert!(matches!(server.add(long, NetNs::create().unwrap()).await, Err(ZdsError::Refused(_))));
    let (added, _) = tokio::join!(server.add(pod("1"), NetNs::create().unwrap()), proxy.obey());
    added.unwrap();
}

#[tokio::test]
async fn the_socket_is_removed_at_the_end_unless_it_is_a_successors() {
    let world = World::new();
    let first = world.serve([]);
    let second = world.serve([]);
    drop(first);
    assert!(world.path().exists());
    drop(second);
    assert!(!world.path().exists());
}

#[tokio::test]
async fn a_dropped_server_hangs_up() {
    let world = World::new();
    let server = world.serve([]);
    let proxy = world.dial().await;
    assert_eq!(proxy.obey().await, "snapshot");
    drop(server);
    proxy.hung_up().await;
}
