#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use prost::Message;

use super::super::tests::{self, policy_resource, service_resource, workload_resource};
use super::*;
use crate::discovery::form::tests::{contents, rows};
use crate::discovery::local::{self, LocalSource};
use crate::discovery::{Document, Mesh};
use crate::policy::{Facts, Scope};
use crate::wire::google::Any;
use crate::wire::xds::Resource;
use crate::wire::{authorization, workload as wire};

fn workload(uid: &str) -> wire::Workload {
    wire::Workload { uid: uid.into(), name: "p".into(), namespace: "shop".into(), ..wire::Workload::default() }
}

fn deny(name: &str) -> authorization::Authorization {
    authorization::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: authorization::Scope::WorkloadSelector.into(),
        action: authorization::Action::Deny.into(),
        ..authorization::Authorization::default()
    }
}

fn push(resources: impl IntoIterator<Item = Resource>, gone: &[&str]) -> EncodedPush {
    EncodedPush {
        resources: resources.into_iter().map(|resource| resource.encode_to_vec().into()).collect(),
        removed_resources: gone.iter().map(|name| (*name).to_owned()).collect(),
        ..EncodedPush::default()
    }
}

impl Applier {
    /// A push alone; says whether anything changed.
    fn apply(&mut self, kind: Kind, push: EncodedPush, whole: bool, asked: bool) -> Result<(Applied, bool), String> {
        let applied = self.draw(kind, push, whole, asked)?;
        Ok((applied, self.publish()))
    }
}

struct Stand {
    applier: Applier,
    mesh: Mesh,
}

impl Stand {
    fn new() -> Self {
        let (publisher, mesh) = Publisher::new(None);
        Self { applier: Applier::new(publisher, Vec::new()), mesh }
    }

    fn address(&mut self, resources: impl IntoIterator<Item = Resource>, gone: &[&str]) -> Applied {
        self.applier.apply(Kind::Address, push(resources, gone), false, true).unwrap().0
    }

    fn policy(&mut self, resources: impl IntoIterator<Item = Resource>, gone: &[&str]) -> Applied {
        self.applier.apply(Kind::Authorization, push(resources, gone), false, false).unwrap().0
    }

    fn has(&self, uid: &str) -> bool {
        self.mesh.current().snapshot.workload(uid).is_some()
    }

    fn held(&self, kind: Kind) -> Vec<(String, String)> {
        let mut held: Vec<_> = self.applier.held(kind).collect();
        held.sort();
        held
    }

    /// Whether a workload of this namespace that names this policy may be reached.
    fn permits(&self, namespace: &str, policy: &str) -> bool {
        let names: Vec<Text> = Some(policy).filter(|name| !name.is_empty()).map(Text::from).into_iter().collect();
        let facts = Facts { identity: None, source_ip: [10, 0, 0, 1].into(), destination_ip: [10, 0, 0, 2].into(), destination_port: 80 };
        self.mesh.current().policies.compile(namespace, &names).permit(&facts).is_ok()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The file of a world over xDS makes the same world, and either is what was sent.
    #[test]
    fn a_world_over_xds_equals_the_world_of_the_file_that_says_the_same(mut sent in rows()) {
        for service in &mut sent.services {
            // On the wire, a range of one address is an address.
            service.cidr_vips.retain(|(_, range)| range.prefix_len() < range.max_prefix_len());
        }
        for policy in &mut sent.policies {
            policy.validity = Validity::Valid;
        }
        // One of each name: a push has no order.
        let (mut uids, mut keys, mut names) = (HashSet::new(), HashSet::new(), HashSet::new());
        sent.workloads.retain(|workload| uids.insert(workload.uid.clone()));
        sent.services.retain(|service| keys.insert(service.key()));
        sent.policies.retain(|policy| names.insert(policy.key()));
        let mut stand = Stand::new();
        let workloads = sent.workloads.iter().map(|row| workload_resource(&tests::workload(row)));
        let services = sent.services.iter().map(|row| service_resource(&tests::service(row)));
        let applied = stand.address(workloads.chain(services).collect::<Vec<_>>(), &[]);
        prop_assert_eq!(&applied.refused, &[]);
        let applied = stand.policy(sent.policies.iter().map(|row| policy_resource(&tests::policy(row))).collect::<Vec<_>>(), &[]);
        prop_assert_eq!(&applied.refused, &[]);
        prop_assert_eq!(contents(&stand.mesh), contents(&crate::discovery::form::tests::mesh(&sent)));
        let world = stand.mesh.current();
        let file = serde_json::to_string(&Document::of(&world.snapshot, &world.policies)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let from_file = runtime.block_on(local::start(LocalSource::Text(file), local::Config::default())).unwrap();
        prop_assert_eq!(contents(&stand.mesh), contents(&from_file));
        // Sent again, it changes nothing.
        let epoch = stand.mesh.current().epoch;
        stand.address(sent.workloads.iter().map(|row| workload_resource(&tests::workload(row))).collect::<Vec<_>>(), &[]);
        prop_assert_eq!(stand.mesh.current().epoch, epoch);
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), name in ".{0,20}", policy in any::<bool>()) {
        let kind = if policy { Kind::Authorization } else { Kind::Address };
        let any = Any { type_url: kind.type_url().to_owned(), value: bytes.into() };
        let resource = Resource { name, resource: Some(any), ..Resource::default() };
        let mut stand = Stand::new();
        stand.applier.apply(kind, push([resource], &[]), false, true).unwrap();
    }
}

#[test]
fn one_bad_resource_among_many_is_named_and_the_rest_is_applied() {
    let mut stand = Stand::new();
    let mut resources: Vec<_> = (0..5000).map(|index| workload_resource(&workload(&format!("u{index}")))).collect();
    resources[77] = workload_resource(&wire::Workload { status: 9, ..workload("u77") });
    let applied = stand.address(resources, &[]);
    assert_eq!(applied.refused, [("u77".to_owned(), "status has the unknown value 9".to_owned())]);
    assert_eq!(applied.error_detail().unwrap(), Status { code: 0, message: "u77: status has the unknown value 9".to_owned() });
    assert_eq!(stand.mesh.current().snapshot.workloads().count(), 4999);
    assert_eq!(stand.held(Kind::Address).len(), 4999, "what was refused is not said to be there");
}

#[test]
fn every_kind_of_bad_resource_is_refused_alone() {
    let good = || workload_resource(&workload("good"));
    let any = |type_url: &str, value: &'static [u8]| Some(Any { type_url: type_url.to_owned(), value: bytes::Bytes::from_static(value) });
    let named = |resource| Resource { name: "bad".into(), resource, ..Resource::default() };
    let huge = wire::Workload { canonical_name: "x".repeat(10 << 20), ..workload("bad") };
    for (reason, bad) in [
        ("it has no content", named(None)),
        ("it is of type other", named(any("other", b""))),
        ("neither a workload nor a service", named(any(Kind::Address.type_url(), b""))),
        ("failed to decode", named(any(Kind::Address.type_url(), b"\xff"))),
        ("uid is empty", Resource { name: "bad".into(), ..workload_resource(&workload("")) }),
        ("it has 10485", workload_resource(&huge)),
        ("it is in one push twice", workload_resource(&workload("good"))),
    ] {
        let mut stand = Stand::new();
        let applied = stand.address([good(), bad], &[]);
        assert_eq!(applied.refusals(), 1);
        assert!(applied.refused[0].1.starts_with(reason), "{:?}", applied.refused);
        assert!(stand.has("good"));
    }
}

#[test]
fn a_refused_address_keeps_what_was_there_and_its_old_version() {
    let mut stand = Stand::new();
    stand.address([workload_resource(&workload("u"))], &[]);
    let held = stand.held(Kind::Address);
    stand.address([workload_resource(&wire::Workload { status: 9, ..workload("u") })], &[]);
    assert!(stand.has("u"));
    assert_eq!(stand.held(Kind::Address), held);
}

#[test]
fn a_refused_policy_denies_its_targets_until_it_is_good_or_gone() {
    let mut stand = Stand::new();
    stand.policy([policy_resource(&deny("p"))], &[]);
    assert!(stand.permits("shop", "shop/p"), "a DENY without rules matches nothing");
    let bad = policy_resource(&authorization::Authorization { action: 9, ..deny("p") });
    let applied = stand.policy([bad.clone()], &[]);
    assert_eq!(applied.refused[0].1, "action has the unknown value 9 (it denies all of its targets)");
    assert!(!stand.permits("shop", "shop/p"));
    assert!(stand.permits("shop", ""), "only those that name it");
    assert_eq!(stand.held(Kind::Authorization), [("shop/p".to_owned(), String::new())], "so that its removal is told");
    stand.policy([policy_resource(&deny("p"))], &[]);
    assert!(stand.permits("shop", "shop/p"));
    stand.policy([bad], &[]);
    stand.policy([], &["shop/p"]);
    assert!(stand.mesh.current().policies.is_empty());
}

#[test]
fn a_policy_that_is_sent_twice_or_without_content_denies() {
    let mut stand = Stand::new();
    let applied = stand.policy([policy_resource(&deny("p")), policy_resource(&deny("p"))], &[]);
    assert_eq!(applied.refusals(), 1);
    assert!(!stand.permits("shop", "shop/p"));
    assert_eq!(stand.mesh.current().policies.get("shop/p").unwrap().scope, Scope::WorkloadSelector);
    let empty = Resource { name: "shop/empty".into(), ..Resource::default() };
    stand.policy([empty], &[]);
    assert!(!stand.permits("elsewhere", ""), "nobody knows whom it is for");
}

#[test]
fn a_name_that_is_removed_and_sent_in_one_push_is_there() {
    let mut stand = Stand::new();
    stand.address([workload_resource(&workload("u"))], &[]);
    stand.address([workload_resource(&wire::Workload { name: "q".into(), ..workload("u") })], &["u", "never/was", "a/b/c"]);
    assert_eq!(stand.mesh.current().snapshot.workload("u").unwrap().name, "q");
    stand.address([], &["u"]);
    assert!(!stand.has("u"));
    assert_eq!(stand.held(Kind::Address), []);
}

#[test]
fn removal_by_namespace_and_host_name_reaches_the_service_and_leaves_its_endpoints() {
    let mut stand = Stand::new();
    let service = wire::Service { namespace: "shop".into(), hostname: "web.shop".into(), ..wire::Service::default() };
    let member = wire::Workload { services: [("shop/web.shop".to_owned(), wire::PortList::default())].into(), ..workload("u") };
    stand.address([service_resource(&service), workload_resource(&member)], &[]);
    let key = crate::model::NamespacedHostname { namespace: "shop".into(), hostname: "web.shop".into() };
    assert_eq!(stand.mesh.current().snapshot.endpoints(&key).count(), 1);
    stand.address([], &["shop/web.shop"]);
    assert!(stand.mesh.current().snapshot.service(&key).is_none() && stand.has("u"));
    stand.address([service_resource(&service)], &[]);
    assert_eq!(stand.mesh.current().snapshot.endpoints(&key).count(), 1, "staged until it comes back");
}

#[test]
fn a_resource_of_another_name_than_its_content_goes_with_its_own_name() {
    let mut stand = Stand::new();
    let named = |uid: &str| Resource { name: "name".into(), ..workload_resource(&workload(uid)) };
    stand.address([named("one")], &[]);
    assert!(stand.has("one"));
    stand.address([named("two")], &[]);
    assert!(stand.has("two") && !stand.has("one"), "what it was before is gone");
    stand.address([], &["name"]);
    assert!(!stand.has("two"));
}

#[test]
fn versions_are_given_back_as_they_came() {
    for version in ["00000000000000ff", "abcdef0123456789", "ABCDEF0123456789", "ff", "", "v1/ü", "+0000000000000ff"] {
        assert_eq!(Version::of(version).text(), version);
    }
    assert_eq!(size_of::<Held>(), 16, "there may be 100,000");
}

#[test]
fn a_first_push_that_is_all_there_is_removes_the_rest() {
    let mut stand = Stand::new();
    stand.address([workload_resource(&workload("old")), workload_resource(&workload("kept"))], &[]);
    stand.applier.apply(Kind::Address, push([workload_resource(&workload("kept")), workload_resource(&workload("new"))], &[]), true, false).unwrap();
    assert!(stand.has("kept") && stand.has("new") && !stand.has("old"));
}

#[test]
fn there_is_no_world_before_both_kinds_were_heard_of() {
    for (one, other) in [(Kind::Address, Kind::Authorization), (Kind::Authorization, Kind::Address)] {
        let (publisher, mesh) = Publisher::new(None);
        let mut applier = Applier::new(publisher, Kind::ALL.to_vec());
        let content = |kind| match kind {
            Kind::Address => push([workload_resource(&workload("u"))], &[]),
            Kind::Authorization => push([policy_resource(&deny("p"))], &[]),
        };
        assert!(!applier.apply(one, content(one), false, false).unwrap().1);
        assert!(!applier.is_synced());
        assert_eq!(mesh.current().epoch, 0);
        assert!(applier.apply(other, content(other), false, false).unwrap().1);
        let world = mesh.current();
        assert_eq!((world.epoch, world.snapshot.workloads().count(), world.policies.len()), (1, 1, 1));
    }
}

#[test]
fn a_resource_that_cannot_be_read_is_refused_if_it_is_an_address_and_ends_the_stream_if_it_may_be_a_policy() {
    let mut stand = Stand::new();
    let mut mixed = push([workload_resource(&workload("u"))], &[]);
    // A name that is not UTF-8.
    mixed.resources.insert(0, bytes::Bytes::from_static(b"\x1a\x01\xff"));
    let (applied, _) = stand.applier.apply(Kind::Address, mixed, false, true).unwrap();
    assert_eq!(applied.refused, [("a resource".to_owned(), "cannot be read: a text is not UTF-8".to_owned())]);
    assert!(stand.has("u"));
    let mut mixed = push([policy_resource(&deny("p"))], &[]);
    mixed.resources.push(bytes::Bytes::from_static(b"\x1a\x01\xff"));
    assert_eq!(stand.applier.apply(Kind::Authorization, mixed, false, false).unwrap_err(), "a text is not UTF-8");
    assert!(stand.mesh.current().policies.is_empty(), "nothing of it is applied");
    stand.policy([policy_resource(&deny("p"))], &[]);
    assert_eq!(stand.mesh.current().policies.len(), 1);
}

#[test]
fn refusals_are_told_in_few_words() {
    let mut stand = Stand::new();
    let bad = (0..1000).map(|index| Resource { name: format!("{index}-{}", "n".repeat(10_000)), ..Resource::default() });
    let applied = stand.address(bad.collect::<Vec<_>>(), &[]);
    assert_eq!(applied.refusals(), 1000);
    let message = applied.error_detail().unwrap().message;
    assert!(message.ends_with("; and 980 more") && message.len() < 4000, "{} bytes", message.len());
}

#[test]
fn pushes_that_come_together_are_one_world_and_the_later_one_wins() {
    let mut stand = Stand::new();
    let named = |name: &str| workload_resource(&wire::Workload { name: name.into(), ..workload("u") });
    for (kind, push) in [
        (Kind::Address, push([named("a"), workload_resource(&workload("v"))], &[])),
        (Kind::Authorization, push([policy_resource(&deny("p"))], &[])),
        (Kind::Address, push([named("b")], &["v"])),
    ] {
        stand.applier.draw(kind, push, false, false).unwrap();
        assert_eq!(stand.mesh.current().epoch, 0);
    }
    assert!(stand.applier.publish() && !stand.applier.publish());
    let world = stand.mesh.current();
    assert_eq!((world.epoch, world.snapshot.workload("u").unwrap().name.as_str(), world.policies.len()), (1, "b", 1));
    assert!(!stand.has("v"));
}
