#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::cell::RefCell;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;

/// What happened to pods, in order: `+uid@ino`, `-uid@ino`, and `!uid` for a start that failed.
type Log = Rc<RefCell<Vec<String>>>;

#[derive(Debug)]
struct Proxy {
    name: String,
    log: Log,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.log.borrow_mut().push(format!("-{}", self.name));
    }
}

#[derive(Debug, Default)]
struct Recorder {
    log: Log,
    /// Uids whose start fails.
    failing: Rc<RefCell<HashSet<String>>>,
    names: Names,
}

impl Start for Recorder {
    type Running = Proxy;

    fn start(&mut self, pod: &Pod, netns: &NetNs) -> io::Result<Proxy> {
        if self.failing.borrow().contains(&pod.uid) {
            self.log.borrow_mut().push(format!("!{}", pod.uid));
            return Err(io::Error::other("port taken"));
        }
        let name = format!("{}@{}", pod.uid, self.names.of(netns));
        self.log.borrow_mut().push(format!("+{name}"));
        Ok(Proxy { name, log: Rc::clone(&self.log) })
    }
}

/// Stand-ins for namespaces: open files, which is all that the ledger looks at. `a` is always the same, and so on.
#[derive(Debug, Default, Clone)]
struct Names(Rc<RefCell<Vec<(char, NetNs)>>>);

impl Names {
    fn netns(&self, name: char) -> NetNs {
        let known = self.0.borrow().iter().find(|(known, _)| *known == name).map(|(_, netns)| netns.clone());
        known.unwrap_or_else(|| {
            let netns = NetNs::from_fd(tempfile::tempfile().unwrap().into()).unwrap();
            self.0.borrow_mut().push((name, netns.clone()));
            netns
        })
    }

    fn of(&self, netns: &NetNs) -> char {
        self.0.borrow().iter().find(|(_, known)| known == netns).map_or('?', |(name, _)| *name)
    }
}

struct World {
    ledger: Ledger<Recorder>,
    log: Log,
    failing: Rc<RefCell<HashSet<String>>>,
    names: Names,
}

impl World {
    fn new() -> Self {
        let starter = Recorder::default();
        let (log, failing, names) = (Rc::clone(&starter.log), Rc::clone(&starter.failing), starter.names.clone());
        Self { ledger: Ledger::new(starter), log, failing, names }
    }

    fn with_snapshot() -> Self {
        let mut world = Self::new();
        world.snapshot().unwrap();
        world
    }

    fn add(&mut self, uid: &str, netns: char) -> Result<(), Refusal> {
        let pod = Pod { uid: uid.into(), name: uid.into(), namespace: "ns".into(), service_account: "sa".into() };
        self.ledger.apply(Request::Add(pod, self.names.netns(netns)))
    }

    fn keep(&mut self, uid: &str) -> Result<(), Refusal> {
        self.ledger.apply(Request::Keep(uid.into()))
    }

    fn del(&mut self, uid: &str) {
        self.ledger.apply(Request::Del(uid.into())).unwrap();
    }

    fn snapshot(&mut self) -> Result<(), Refusal> {
        self.ledger.apply(Request::SnapshotSent)
    }

    fn fail(&self, uid: &str) {
        self.failing.borrow_mut().insert(uid.into());
    }

    fn heal(&self) {
        self.failing.borrow_mut().clear();
    }

    /// Everything that happened since the last look.
    fn events(&self) -> String {
        self.log.borrow_mut().drain(..).collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn add_starts_a_proxy() {
    let mut world = World::new();
    world.add("1", 'a').unwrap();
    assert_eq!(world.events(), "+1@a");
    assert!(!world.ledger.is_ready(), "not before the snapshot");
    world.snapshot().unwrap();
    assert!(world.ledger.is_ready());
    assert_eq!(world.events(), "");
}

#[test]
fn adding_the_same_pod_in_the_same_namespace_again_starts_only_one_proxy() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.add("1", 'a').unwrap();
    assert_eq!(world.events(), "+1@a");
    assert_eq!(world.ledger.totals(), (1, 0));
}

#[test]
fn a_failed_add_is_refused_pends_and_drops_readiness_until_a_retry_succeeds() {
    let mut world = World::with_snapshot();
    world.fail("1");
    let Err(Refusal::Pending(reason)) = world.add("1", 'a') else { panic!("must be refused") };
    assert!(reason.contains("port taken") && reason.contains("ns/1"), "{reason}");
    assert!(!world.ledger.is_ready());
    assert!(!world.ledger.retry(), "it fails again");
    world.heal();
    assert!(world.ledger.retry());
    assert!(world.ledger.is_ready());
    assert_eq!(world.events(), "!1 !1 +1@a");
}

#[test]
fn a_later_add_of_a_pending_pod_starts_it_and_ends_the_pending() {
    let mut world = World::with_snapshot();
    world.fail("1");
    world.add("1", 'a').unwrap_err();
    world.heal();
    world.add("1", 'a').unwrap();
    assert!(world.ledger.is_ready());
    assert!(!world.ledger.retry());
    assert_eq!(world.events(), "!1 +1@a");
}

#[test]
fn a_pending_pod_that_is_deleted_is_not_tried_again() {
    let mut world = World::with_snapshot();
    world.fail("1");
    world.add("1", 'a').unwrap_err();
    world.del("1");
    world.heal();
    assert!(world.ledger.is_ready());
    assert!(!world.ledger.retry());
    assert_eq!(world.events(), "!1");
}

#[test]
fn a_pending_pod_added_in_another_namespace_is_tried_only_in_the_newer_one() {
    let mut world = World::with_snapshot();
    world.fail("1");
    world.add("1", 'a').unwrap_err();
    world.add("1", 'b').unwrap_err();
    world.heal();
    world.ledger.retry();
    assert_eq!(world.events(), "!1 !1 +1@b");
}

#[test]
fn add_and_del_stops_at_once() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.del("1");
    assert_eq!(world.events(), "+1@a -1@a");
    assert_eq!(world.ledger.totals(), (1, 1));
}

#[test]
fn del_of_an_unknown_pod_is_acknowledged() {
    let mut world = World::with_snapshot();
    world.del("nobody");
    assert!(world.ledger.is_ready());
}

#[test]
fn del_before_the_snapshot_removes_from_snapshot_and_pending_and_stops_only_at_the_snapshot() {
    let mut world = World::new();
    world.add("1", 'a').unwrap();
    world.fail("2");
    world.add("2", 'b').unwrap_err();
    world.del("1");
    world.del("2");
    assert_eq!(world.events(), "+1@a !2");
    world.snapshot().unwrap();
    assert_eq!(world.events(), "-1@a");
    assert!(world.ledger.is_ready());
}

#[test]
fn add_del_add_before_the_snapshot_starts_only_one_proxy() {
    let mut world = World::new();
    world.add("1", 'a').unwrap();
    world.del("1");
    world.add("1", 'a').unwrap();
    world.snapshot().unwrap();
    assert_eq!(world.events(), "+1@a");
}

#[test]
fn add_del_add_after_the_snapshot_starts_anew() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.del("1");
    world.add("1", 'a').unwrap();
    assert_eq!(world.events(), "+1@a -1@a +1@a");
}

#[test]
fn a_pod_missing_from_the_new_snapshot_is_stopped() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.add("2", 'b').unwrap();
    world.ledger.disconnected();
    world.add("2", 'b').unwrap();
    assert_eq!(world.events(), "+1@a +2@b", "nothing stops before the snapshot is complete");
    world.snapshot().unwrap();
    assert_eq!(world.events(), "-1@a");
}

#[test]
fn a_pod_kept_in_the_new_snapshot_goes_on() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.ledger.disconnected();
    world.keep("1").unwrap();
    world.keep("unknown").unwrap();
    world.snapshot().unwrap();
    assert_eq!(world.events(), "+1@a");
    assert!(world.ledger.is_ready());
}

#[test]
fn another_namespace_for_a_running_pod_stops_the_old_proxy_first_and_keeps_the_latest() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.add("1", 'b').unwrap();
    assert_eq!(world.events(), "+1@a -1@a +1@b");
    assert_eq!(world.ledger.running().len(), 1);
}

#[test]
fn another_namespace_that_cannot_be_served_pends_with_the_old_proxy_already_stopped() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.fail("1");
    world.add("1", 'b').unwrap_err();
    assert_eq!(world.events(), "+1@a -1@a !1");
    assert!(world.ledger.running().is_empty() && world.ledger.waiting().contains_key("1"));
}

#[test]
fn keep_after_the_snapshot_is_fatal() {
    assert!(matches!(World::with_snapshot().keep("1"), Err(Refusal::Fatal(_))));
}

#[test]
fn a_second_snapshot_on_one_connection_is_fatal_but_not_on_the_next() {
    let mut world = World::with_snapshot();
    assert!(matches!(world.snapshot(), Err(Refusal::Fatal(_))));
    world.ledger.disconnected();
    world.snapshot().unwrap();
}

#[test]
fn a_disconnect_keeps_pods_and_forgets_snapshot_and_pending() {
    let mut world = World::with_snapshot();
    world.add("1", 'a').unwrap();
    world.fail("2");
    world.add("2", 'b').unwrap_err();
    world.ledger.disconnected();
    assert!(!world.ledger.is_ready());
    assert!(world.ledger.waiting().is_empty());
    assert_eq!(world.events(), "+1@a !2");
}

#[derive(Debug, Clone)]
enum Step {
    Add(u8, char),
    Keep(u8),
    Del(u8),
    Snapshot,
    Disconnect,
    Retry,
    Fail(u8),
    Heal,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4_u8, prop::sample::select(vec!['a', 'b', 'c'])).prop_map(|(uid, netns)| Step::Add(uid, netns)),
        1 => (0..4_u8).prop_map(Step::Keep),
        3 => (0..4_u8).prop_map(Step::Del),
        2 => Just(Step::Snapshot),
        1 => Just(Step::Disconnect),
        1 => Just(Step::Retry),
        1 => (0..4_u8).prop_map(Step::Fail),
        1 => Just(Step::Heal),
    ]
}

/// The slow oracle: keeps only the list of what the agent said on this connection, and derives what must run from it each time.
#[derive(Default)]
struct Oracle {
    /// Pods that ran when this connection began, and those started since.
    running: BTreeMap<u8, char>,
    wanted: BTreeMap<u8, Option<char>>,
    complete: bool,
}

proptest! {
    #[test]
    fn what_runs_is_always_what_the_agent_last_said(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        let mut oracle = Oracle::default();
        let mut failing = HashSet::new();
        for step in steps {
            match step {
                Step::Add(uid, netns) => {
                    let _ = world.add(&uid.to_string(), netns);
                    oracle.wanted.insert(uid, Some(netns));
                    if oracle.running.get(&uid) != Some(&netns) {
                        oracle.running.remove(&uid);
                        if !failing.contains(&uid) {
                            oracle.running.insert(uid, netns);
                        }
                    }
                }
                Step::Keep(uid) => {
                    let fatal = world.keep(&uid.to_string()).is_err();
                    prop_assert_eq!(fatal, oracle.complete);
                    if fatal {
                        return Ok(());
                    }
                    oracle.wanted.entry(uid).or_insert(None);
                }
                Step::Del(uid) => {
                    world.del(&uid.to_string());
                    oracle.wanted.remove(&uid);
                    if oracle.complete {
                        oracle.running.remove(&uid);
                    }
                }
                Step::Snapshot => {
                    let fatal = world.snapshot().is_err();
                    prop_assert_eq!(fatal, oracle.complete);
                    if fatal {
                        return Ok(());
                    }
                    oracle.complete = true;
                    oracle.running.retain(|uid, _| oracle.wanted.contains_key(uid));
                }
                Step::Disconnect => {
                    world.ledger.disconnected();
                    oracle.complete = false;
                    oracle.wanted.clear();
                }
                Step::Retry => {
                    world.ledger.retry();
                    for (uid, netns) in &oracle.wanted {
                        if let Some(netns) = netns && !oracle.running.contains_key(uid) && !failing.contains(uid) {
                            oracle.running.insert(*uid, *netns);
                        }
                    }
                }
                Step::Fail(uid) => {
                    world.fail(&uid.to_string());
                    failing.insert(uid);
                }
                Step::Heal => {
                    world.heal();
                    failing.clear();
                }
            }
            let expected: Vec<String> = oracle.running.iter().map(|(uid, netns)| format!("{uid}@{netns}")).collect();
            let running: Vec<String> = world.ledger.running().values().map(|served| served.running.name.clone()).collect();
            prop_assert_eq!(running, expected);
            let unserved = oracle.wanted.iter().any(|(uid, netns)| netns.is_some() && !oracle.running.contains_key(uid));
            prop_assert_eq!(world.ledger.is_ready(), oracle.complete && !unserved);
            let (started, stopped) = world.ledger.totals();
            prop_assert_eq!(started - stopped, world.ledger.running().len() as u64);
        }
    }
}
