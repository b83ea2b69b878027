//! What is asked and what becomes of the answers (reference, dataplane §5.4–5.6).

use culvert::model::NamespacedHostname;
use culvert::wire::authorization::Scope;
use culvert::wire::workload;
use culvert::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};

use super::Stand;
use super::xds_server::{pod, pod_resource, policy_resource, resource, service_resource};

#[tokio::test]
async fn the_first_requests_say_who_we_are_and_ask_for_everything() {
    let mut stand = Stand::new().await;
    let mut stream = stand.server.accept().await;
    let header = |name: &str| stream.metadata.get(name).unwrap().to_str().unwrap().to_owned();
    assert_eq!((header("authorization"), header("clusterid")), ("Bearer one".to_owned(), "Kubernetes".to_owned()));
    for type_url in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
        let request = stream.request().await;
        let node = request.node.unwrap();
        assert_eq!(request.type_url, type_url, "Address before Authorization");
        assert_eq!(node.id, "ztunnel~1.1.1.1~proxy-x.istio-system~istio-system.svc.cluster.local");
        let metadata = node.metadata.unwrap();
        assert_eq!((metadata.text("NODE_NAME"), metadata.text("NAMESPACE")), (Some("n1"), Some("istio-system")));
        assert!(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty(), "never a name: everything");
        assert!(request.initial_resource_versions.is_empty() && request.response_nonce.is_empty());
    }
}

#[tokio::test]
async fn ready_is_after_the_first_push_of_both_kinds_even_if_they_bring_nothing() {
    let mut stand = Stand::new().await;
    let mut stream = stand.server.accept().await;
    stream.push(ADDRESS_TYPE, vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1")], &[]).await;
    stream.request().await;
    stream.request().await;
    stream.acked().await;
    assert!(!*stand.ready.borrow());
    assert!(!stand.has("Kubernetes//Pod/shop/a"), "there is no world without its policies");
    stream.push(AUTHORIZATION_TYPE, vec![], &[]).await;
    stream.acked().await;
    stand.ready().await;
    assert!(stand.has("Kubernetes//Pod/shop/a"));
}

#[tokio::test]
async fn one_bad_resource_among_5000_is_named_and_the_rest_applied_and_we_are_ready() {
    let mut stand = Stand::new().await;
    let mut stream = stand.server.accept().await;
    stream.request().await;
    stream.request().await;
    let mut resources: Vec<Resource> =
        (0..5000_u16).map(|index| pod_resource(&pod(&format!("p{index}"), [10, 1, index.to_be_bytes()[0], index.to_be_bytes()[1]]), "1")).collect();
    let bad = workload::Workload { addresses: vec![vec![1, 2, 3].into()], ..pod("p4321", [0; 4]) };
    resources[4321] = pod_resource(&bad, "1");
    stream.push(ADDRESS_TYPE, resources, &[]).await;
    assert_eq!(stream.nacked().await, "Kubernetes//Pod/shop/p4321: addresses: an address has 3 bytes, not 4 or 16");
    stream.push(AUTHORIZATION_TYPE, vec![], &[]).await;
    stream.acked().await;
    stand.ready().await;
    assert_eq!(stand.mesh.current().snapshot.workloads().count(), 4999);
    let page = stand.metrics();
    for line in [
        format!("culvert_xds_refused_resources_total{{url=\"{ADDRESS_TYPE}\"}} 1"),
        format!("istio_xds_message_total{{url=\"{ADDRESS_TYPE}\"}} 1"),
        format!("istio_xds_message_total{{url=\"{AUTHORIZATION_TYPE}\"}} 1"),
        format!("istio_xds_message_bytes_total{{url=\"{AUTHORIZATION_TYPE}\"}} 0"),
        "culvert_xds_stale_seconds 0.0".to_owned(),
    ] {
        assert!(page.contains(&line), "{line} is not in\n{page}");
    }
}

#[tokio::test]
async fn a_bad_policy_is_named_and_denies_its_targets_while_others_stay_reachable() {
    let mut stand = Stand::new().await;
    let named = workload::Workload { authorization_policies: vec!["shop/bad".into()], ..pod("a", [10, 0, 0, 1]) };
    let mut stream = stand.server.synced(vec![pod_resource(&named, "1"), pod_resource(&pod("b", [10, 0, 0, 2]), "1")], vec![]).await;
    stream.push(AUTHORIZATION_TYPE, vec![policy_resource("bad", Scope::WorkloadSelector, 9)], &[]).await;
    assert_eq!(stream.nacked().await, "shop/bad: action has the unknown value 9 (it denies all of its targets)");
    let world = stand.mesh.current();
    let facts =
        culvert::policy::Facts { identity: None, source_ip: [10, 0, 0, 9].into(), destination_ip: [10, 0, 0, 1].into(), destination_port: 80 };
    let denial = world.policies.compile("shop", &["shop/bad".into()]).permit(&facts).unwrap_err();
    assert!(denial.to_string().contains("action has the unknown value 9"), "{denial}");
    assert!(world.policies.compile("shop", &[]).permit(&facts).is_ok());
}

#[tokio::test]
async fn removals_are_by_uid_or_by_namespace_and_host_name_and_unknown_names_are_legal() {
    let mut stand = Stand::new().await;
    let policies = vec![policy_resource("p", Scope::Namespace, 1)];
    let mut stream =
        stand.server.synced(vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1"), service_resource("web.shop", [10, 9, 0, 1])], policies).await;
    let key = NamespacedHostname { namespace: "shop".into(), hostname: "web.shop".into() };
    assert!(stand.mesh.current().snapshot.service(&key).is_some());
    stream.push(ADDRESS_TYPE, vec![], &["Kubernetes//Pod/shop/a", "shop/web.shop", "never/was", "a/b/c/d", ""]).await;
    stream.acked().await;
    stream.push(AUTHORIZATION_TYPE, vec![], &["shop/p", "never/was"]).await;
    stream.acked().await;
    let world = stand.mesh.current();
    assert_eq!((world.snapshot.workloads().count(), world.snapshot.services().count(), world.policies.len()), (0, 0, 0));
}

#[tokio::test]
async fn a_reconnect_tells_every_held_version_and_hears_only_of_changes() {
    let mut stand = Stand::new().await;
    let bad = workload::Workload { status: 9, ..pod("bad", [10, 0, 0, 3]) };
    let addresses =
        vec![pod_resource(&pod("a", [10, 0, 0, 1]), "00000000000000aa"), pod_resource(&pod("b", [10, 0, 0, 2]), "v/2"), pod_resource(&bad, "3")];
    let mut stream = stand.server.accept().await;
    stream.request().await;
    stream.request().await;
    stream.push(ADDRESS_TYPE, addresses, &[]).await;
    stream.nacked().await;
    stream.push(AUTHORIZATION_TYPE, vec![policy_resource("p", Scope::Namespace, 1), policy_resource("bad", Scope::Namespace, 9)], &[]).await;
    stream.nacked().await;
    // As at the server's maximum connection age.
    drop(stream);
    let mut stream = stand.server.accept().await;
    let (address, authorization) = (stream.request().await, stream.request().await);
    let versions: Vec<_> = address.initial_resource_versions.into_iter().collect();
    let held = |name: &str, version: &str| (format!("Kubernetes//Pod/shop/{name}"), version.to_owned());
    assert_eq!(versions, [held("a", "00000000000000aa"), held("b", "v/2")], "what was refused is sent again");
    let policies: Vec<_> = authorization.initial_resource_versions.into_keys().collect();
    assert_eq!(policies, ["shop/bad", "shop/p"], "a policy that denies must be told when it is gone");
    let before = stand.mesh.current();
    stream.push(ADDRESS_TYPE, vec![], &["Kubernetes//Pod/shop/b"]).await;
    stream.acked().await;
    stream.push(AUTHORIZATION_TYPE, vec![policy_resource("p", Scope::Namespace, 1)], &["shop/bad"]).await;
    stream.acked().await;
    let after = stand.mesh.current();
    assert!(stand.has("Kubernetes//Pod/shop/a") && !stand.has("Kubernetes//Pod/shop/b"));
    assert_eq!((before.policies.len(), after.policies.len()), (2, 1));
    let kept = |world: &culvert::discovery::World| world.snapshot.workload("Kubernetes//Pod/shop/a").unwrap();
    assert!(std::sync::Arc::ptr_eq(&kept(&before), &kept(&after)), "what did not change is not even copied");
}

#[tokio::test]
async fn a_push_that_says_nothing_new_makes_no_new_world() {
    let mut stand = Stand::new().await;
    let mut stream = stand.server.synced(vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1")], vec![]).await;
    let worlds = stand.mesh.subscribe();
    stream.push(ADDRESS_TYPE, vec![pod_resource(&pod("a", [10, 0, 0, 1]), "1")], &["never"]).await;
    stream.acked().await;
    assert!(!worlds.has_changed().unwrap());
}

#[tokio::test]
async fn a_push_of_a_type_that_nobody_asked_for_is_acked_and_ignored() {
    let mut stand = Stand::new().await;
    let mut stream = stand.server.synced(vec![], vec![]).await;
    let other = resource("x", "1", "type.googleapis.com/other", &workload::Service::default());
    stream.push("type.googleapis.com/other", vec![other], &["a"]).await;
    stream.acked().await;
    assert!(stand.metrics().contains("istio_xds_message_total{url=\"other\"} 1"));
}

#[tokio::test]
async fn the_client_ends_with_the_last_reader() {
    let mut stand = Stand::new().await;
    let mut stream = stand.server.synced(vec![], vec![]).await;
    stand.supervisor.stop();
    let Stand { supervisor, mesh, .. } = stand;
    drop(mesh);
    assert!(!matches!(stream.next().await, Ok(Some(_))), "the stream ends");
    supervisor.finished().await;
}
