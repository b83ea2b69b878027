#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::follow::{Follower, Places, Signal, fingerprint};
use super::local::{Config, LocalSource};
use super::*;
use crate::model::{NamespacedHostname, Profile, Service, Text, Workload};
use crate::policy::{Action, Authorization, Scope};

const SOON: Duration = Duration::from_secs(10);
const QUIET: Duration = Duration::from_millis(5);

fn workload(uid: &str, name: &str) -> Workload {
    let profile = Profile { namespace: "shop".into(), ..Profile::default() };
    Workload {
        uid: uid.into(),
        name: name.into(),
        addresses: Default::default(),
        node: "here".into(),
        hostname: Text::default(),
        status: Default::default(),
        capacity: 1,
        profile: Arc::new(profile),
    }
}

fn service(namespace: &str) -> Service {
    Service { namespace: namespace.into(), hostname: "web.example".into(), ..Service::default() }
}

fn deny_all() -> Authorization {
    Authorization::new("none", "shop", Scope::Namespace, Action::Allow, Vec::new())
}

fn local_name(name: &str) -> LocalName {
    LocalName { name: name.into(), namespace: "shop".into(), service_account: "default".into() }
}

#[test]
fn one_publication_is_one_world_whatever_the_number_of_edits() {
    let (mut publisher, mesh) = Publisher::new(None);
    let updates = mesh.subscribe();
    let before = mesh.current();
    assert!(publisher.publish([Edit::Workload(workload("u", "a")), Edit::Service(service("shop")), Edit::Policy(deny_all())]));
    assert!(updates.has_changed().unwrap());
    let world = mesh.current();
    assert!(Arc::ptr_eq(&world, &updates.borrow()));
    assert_eq!((before.epoch, world.epoch), (0, 1));
    assert!(before.snapshot.workload("u").is_none(), "a published world changed");
    assert!(world.snapshot.workload("u").is_some());
    assert!(world.policies.get("shop/none").is_some());
}

#[test]
fn edits_that_change_nothing_publish_nothing() {
    let (mut publisher, mesh) = Publisher::new(None);
    let edits = || [Edit::Workload(workload("u", "a")), Edit::Service(service("shop")), Edit::Policy(deny_all())];
    publisher.publish(edits());
    let updates = mesh.subscribe();
    assert!(!publisher.publish(edits()));
    assert!(!publisher.publish([Edit::Remove("never/was".into()), Edit::RemovePolicy("never/was".into())]));
    assert!(!updates.has_changed().unwrap());
    assert_eq!(mesh.current().epoch, 1);
}

#[test]
fn the_last_edit_of_a_key_wins() {
    let (mut publisher, mesh) = Publisher::new(None);
    publisher.publish([Edit::Workload(workload("u", "a"))]);
    // The second edit equals the published row, the third is new again.
    publisher.publish([Edit::Workload(workload("u", "b")), Edit::Workload(workload("u", "a"))]);
    assert_eq!(mesh.current().snapshot.workload("u").unwrap().name, "a");
    publisher.publish([Edit::Remove("u".into()), Edit::Workload(workload("u", "a"))]);
    assert!(mesh.current().snapshot.workload("u").is_some());
    publisher.publish([Edit::Remove("u".into())]);
    assert!(mesh.current().snapshot.workload("u").is_none());
}

#[test]
fn removals_reach_workloads_services_and_policies() {
    let (mut publisher, mesh) = Publisher::new(None);
    publisher.publish([Edit::Workload(workload("u", "a")), Edit::Service(service("shop")), Edit::Policy(deny_all())]);
    publisher.publish([Edit::Remove("u".into()), Edit::Remove("shop/web.example".into()), Edit::RemovePolicy("shop/none".into())]);
    let world = mesh.current();
    assert_eq!(world.snapshot.workloads().count() + world.snapshot.services().count() + world.policies.len(), 0);
    assert!(world.snapshot.service(&NamespacedHostname { namespace: "shop".into(), hostname: "web.example".into() }).is_none());
}

#[test]
fn a_subscriber_is_woken_only_by_what_comes_after_it() {
    let (mut publisher, mesh) = Publisher::new(None);
    publisher.publish([Edit::Workload(workload("u", "a"))]);
    let updates = mesh.subscribe();
    assert!(!updates.has_changed().unwrap());
    assert_eq!(updates.borrow().epoch, 1);
    publisher.publish([Edit::Workload(workload("u", "b"))]);
    assert!(updates.has_changed().unwrap());
}

/// Work is counted, not time: what is ready is looked up.
#[test]
fn no_connection_of_this_node_waits_for_policies_to_be_compiled() {
    let (mut publisher, mesh) = Publisher::new(Some("here".into()));
    let pod = |uid: &str, namespace: &str, node: &str, names: &[&str]| {
        let authorization_policies = names.iter().map(|name| Text::from(*name)).collect();
        let profile = Arc::new(Profile { namespace: namespace.into(), authorization_policies, ..Profile::default() });
        Edit::Workload(Workload { node: node.into(), profile, ..workload(uid, uid) })
    };
    let policy = |name: &str, namespace: &str, scope| Edit::Policy(Authorization::new(name, namespace, scope, Action::Allow, Vec::new()));
    for edits in [
        vec![policy("all", "root", Scope::Global), policy("own", "shop", Scope::Namespace), policy("one", "shop", Scope::WorkloadSelector)],
        vec![pod("a", "shop", "here", &["shop/one"]), pod("b", "shop", "here", &["shop/one", "shop/unknown"]), pod("c", "far", "there", &[])],
        vec![pod("d", "office", "here", &[])],
        vec![pod("e", "office", "there", &["shop/one"]), policy("more", "office", Scope::Namespace)],
        vec![Edit::RemovePolicy("root/all".into())],
        vec![pod("d", "office", "here", &["shop/one"])],
        vec![Edit::Remove("a".into()), policy("one", "shop", Scope::Namespace)],
    ] {
        let what = format!("{edits:?}");
        assert!(publisher.publish(edits));
        let world = mesh.current();
        for local in world.snapshot.local_workloads() {
            assert!(world.policies.is_ready(&local.profile.namespace, &local.profile.authorization_policies), "{} after {what}", local.uid);
        }
        assert!(!world.policies.is_ready("far", &[]), "nothing is done for other nodes");
    }
    assert_eq!(mesh.current().snapshot.local_workloads().count(), 2);
}

#[test]
fn who_looks_at_departures_only_is_woken_by_workloads_that_go_wherever_they_were() {
    let (mut publisher, mesh) = Publisher::new(Some("here".into()));
    let elsewhere = |capacity| Workload { node: "there".into(), capacity, ..workload("u", "a") };
    let mut departures = mesh.subscribe_departures();
    for (edit, wakes) in [
        (Edit::Workload(elsewhere(1)), false),
        (Edit::Workload(elsewhere(2)), false),
        (Edit::Workload(workload("v", "b")), false),
        (Edit::Service(service("shop")), false),
        (Edit::Remove("shop/web.example".into()), false),
        (Edit::Remove("never/was".into()), false),
        (Edit::Policy(deny_all()), false),
        (Edit::Remove("u".into()), true),
        (Edit::Remove("v".into()), true),
    ] {
        let what = format!("{edit:?}");
        publisher.publish([edit]);
        assert_eq!(departures.has_changed().unwrap(), wakes, "{what}");
        if wakes {
            assert_eq!(*departures.borrow_and_update(), mesh.current().epoch);
        }
    }
}

#[test]
fn who_looks_at_this_node_only_is_woken_by_its_workloads_and_by_policies() {
    let (mut publisher, mesh) = Publisher::new(Some("here".into()));
    let elsewhere = |uid: &str, node: &str| Edit::Workload(Workload { node: node.into(), ..workload(uid, "a") });
    let mut updates = mesh.subscribe_local();
    for (edit, wakes) in [
        (elsewhere("u", "there"), false),
        (Edit::Service(service("shop")), false),
        (elsewhere("u", "here"), true),
        (Edit::Workload(Workload { capacity: 7, ..workload("u", "a") }), true),
        (elsewhere("v", "there"), false),
        (Edit::Policy(deny_all()), true),
        (Edit::RemovePolicy("shop/none".into()), true),
        (elsewhere("u", "there"), true),
        (Edit::Remove("u".into()), false),
    ] {
        let (shown, before) = (format!("{edit:?}"), mesh.current());
        assert!(publisher.publish([edit]));
        let after = mesh.current();
        assert_eq!(updates.has_changed().unwrap(), wakes, "{shown}");
        assert_eq!(after.local_epoch, if wakes { after.epoch } else { before.local_epoch }, "{shown}");
        if wakes {
            assert!(Arc::ptr_eq(&updates.borrow_and_update(), &after));
        }
    }
}

#[tokio::test]
async fn a_pod_finds_its_workload_whether_it_comes_before_or_after() {
    let (mut publisher, mesh) = Publisher::new(Some("here".into()));
    let waiting = tokio::spawn({
        let mesh = mesh.clone();
        async move { mesh.wait_for_local(&local_name("a"), SOON).await }
    });
    tokio::task::yield_now().await;
    publisher.publish([Edit::Workload(workload("other", "b"))]);
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    publisher.publish([Edit::Workload(workload("u", "a"))]);
    assert_eq!(waiting.await.unwrap().unwrap().uid, "u");
    assert_eq!(mesh.wait_for_local(&local_name("a"), Duration::ZERO).await.unwrap().uid, "u", "known at once");
}

#[tokio::test]
async fn waiting_for_a_workload_ends_at_its_deadline() {
    let (mut publisher, mesh) = Publisher::new(Some("elsewhere".into()));
    publisher.publish([Edit::Workload(workload("u", "a"))]);
    assert!(mesh.wait_for_local(&local_name("a"), Duration::from_millis(20)).await.is_none(), "a workload of another node is not local");
    assert!(mesh.wait_for_local(&local_name("b"), Duration::from_millis(20)).await.is_none());
}

#[tokio::test]
async fn waiting_for_a_workload_ends_when_no_world_can_come_any_more() {
    let (publisher, mesh) = Publisher::new(None);
    drop(publisher);
    assert!(timeout(SOON, mesh.wait_for_local(&local_name("a"), SOON * 10)).await.unwrap().is_none());
}

#[test]
fn every_link_of_a_path_is_a_place_to_watch() {
    let base = tempfile::tempdir().unwrap();
    let root = std::fs::canonicalize(base.path()).unwrap();
    std::fs::create_dir_all(root.join("a/v1")).unwrap();
    std::fs::create_dir(root.join("b")).unwrap();
    std::fs::write(root.join("a/v1/mesh.yaml"), "{}").unwrap();
    std::os::unix::fs::symlink("v1", root.join("a/..data")).unwrap();
    std::os::unix::fs::symlink("..data/mesh.yaml", root.join("a/mesh.yaml")).unwrap();
    std::os::unix::fs::symlink(root.join("a"), root.join("b/current")).unwrap();
    let places = Places::of(&root.join("b/../b/current/mesh.yaml"));
    for entry in ["b/current", "a/mesh.yaml", "a/..data", "a/v1/mesh.yaml"] {
        assert!(places.concerns(&root.join(entry)), "{entry} is not in {places:?}");
    }
    assert!(!places.concerns(&root.join("a/other")));
    assert!(!places.concerns(&root.join("b/mesh.yaml")));
    std::os::unix::fs::symlink("loop", root.join("loop")).unwrap();
    assert!(Places::of(&root.join("loop")).concerns(&root.join("loop")), "a loop of links ends");
    assert!(Places::of(&root.join("none/mesh.yaml")).concerns(&root.join("none")), "the nearest directory that exists");
}

#[tokio::test]
async fn a_file_that_cannot_be_watched_is_polled() {
    fn refuse(_: &Places, _: tokio::sync::mpsc::Sender<Signal>) -> notify::Result<Box<dyn Send>> {
        Err(notify::Error::new(notify::ErrorKind::MaxFilesWatch))
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mesh.yaml");
    std::fs::write(&path, "{}").unwrap();
    let mut follower = Follower::with(path.clone(), QUIET, QUIET, refuse);
    let read = fingerprint(&path);
    assert!(timeout(QUIET * 5, follower.changed(read)).await.is_err(), "nothing happened");
    std::fs::write(&path, "workloads: []").unwrap();
    timeout(SOON, follower.changed(read)).await.unwrap();
    let read = fingerprint(&path);
    std::fs::remove_file(&path).unwrap();
    timeout(SOON, follower.changed(read)).await.unwrap();
}

#[tokio::test]
async fn a_change_between_reading_and_waiting_is_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mesh.yaml");
    std::fs::write(&path, "{}").unwrap();
    let mut follower = Follower::new(path.clone(), QUIET, QUIET);
    let read = fingerprint(&path);
    std::fs::write(&path, "workloads: []").unwrap();
    timeout(SOON, follower.changed(read)).await.unwrap();
}

#[tokio::test]
async fn other_files_of_the_directory_wake_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mesh.yaml");
    std::fs::write(&path, "{}").unwrap();
    let mut follower = Follower::new(path.clone(), QUIET, QUIET);
    let read = fingerprint(&path);
    std::fs::write(directory.path().join("other"), "x").unwrap();
    let _ = std::fs::read(&path).unwrap();
    assert!(timeout(QUIET * 10, follower.changed(read)).await.is_err());
}

#[tokio::test]
async fn following_a_file_ends_with_the_last_handle() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mesh.yaml");
    std::fs::write(&path, "{}").unwrap();
    let config = Config::default();
    let stats = Arc::clone(&config.stats);
    let mesh = local::start(LocalSource::Path(path), config).await.unwrap();
    assert_eq!(stats.loads.load(Ordering::Relaxed), 1);
    let kept = mesh.subscribe();
    drop(mesh);
    assert_eq!(Arc::strong_count(&stats), 2, "a subscriber keeps the task");
    drop(kept);
    timeout(SOON, async {
        while Arc::strong_count(&stats) > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the task is still there");
}

#[tokio::test]
async fn a_text_is_loaded_once_and_refused_with_its_origin() {
    let mesh = local::start(LocalSource::Text("workloads: [{uid: u, namespace: n}]".to_owned()), Config::default()).await.unwrap();
    assert!(mesh.current().snapshot.workload("u").is_some());
    let refused = local::start(LocalSource::Text("workload: []".to_owned()), Config::default()).await.unwrap_err().to_string();
    assert!(refused.starts_with("LOCAL_XDS:1:1: workload: unknown field"), "{refused}");
}

#[test]
fn what_leads_nowhere_has_no_fingerprint() {
    assert_eq!(fingerprint(Path::new("/nowhere/at/all")), None);
}
