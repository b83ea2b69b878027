//! Delta xDS: what is sent when, under which names and versions.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config as ProptestConfig, TestRunner};

use crate::control_client::*;
use crate::ground::*;

const QUIET: Duration = Duration::from_millis(150);

fn has(view: &View, names: &[String]) -> bool {
    view.names(ADDRESS).into_iter().collect::<BTreeSet<_>>() == names.iter().cloned().collect()
}

#[tokio::test]
async fn an_empty_mesh_is_told_as_one_empty_response_of_each_type() {
    let plane = Plane::of_file("{}").await;
    let mut stream = plane.connect().await.subscribe("left", &View::default()).await.unwrap();
    let types: BTreeSet<String> = [stream.next().await, stream.next().await].into_iter().map(|response| response.type_url).collect();
    assert_eq!(types, [ADDRESS.to_owned(), AUTHORIZATION.to_owned()].into());
    assert!(stream.is_quiet(QUIET).await);
}

#[tokio::test]
async fn a_wildcard_client_hears_of_everything_and_then_of_changes_only() {
    let plane = Plane::of_file(&mesh(&[("a", "left", 1), ("b", "right", 1)], &["p"])).await;
    let (mut view, connection) = (View::default(), plane.connect().await);
    let mut stream = connection.subscribe("left", &view).await.unwrap();
    stream.until(&mut view, |view| view.names(AUTHORIZATION).len() == 1 && view.names(ADDRESS).len() == 3).await;
    let workload = view.workload(&uid("a")).unwrap();
    assert_eq!((workload.node.as_str(), workload.tunnel_protocol, workload.addresses), ("left", 1, vec![vec![10, 0, 0, 1]]));
    let policy = view.get::<Authorization>(AUTHORIZATION, "default/p").unwrap();
    assert_eq!((policy.scope, policy.action), (1, 1));
    assert!(view.names(ADDRESS).contains(&"default/web.default.svc".to_owned()));

    plane.write(&mesh(&[("a", "left", 7), ("b", "right", 1)], &["p"]));
    let response = stream.next().await;
    assert_eq!((response.resources.len(), response.removed.len()), (1, 0), "more than what changed was sent");
    assert_eq!(response.resources[0].name, uid("a"));
    assert_eq!(response.resources[0].aliases, ["/10.0.0.1"]);
    view.apply(&response);
    assert_eq!(view.workload(&uid("a")).unwrap().capacity, Some(7));

    plane.write(&mesh(&[("a", "left", 7)], &["p"]));
    let response = stream.next().await;
    assert_eq!((response.resources.len(), response.removed.clone()), (0, vec![uid("b")]));
    plane.until_metric("culvert_control_acks_total{type=\"address\"}", 3.0).await;
}

#[tokio::test]
async fn a_new_policy_comes_before_the_workloads_that_name_it_and_an_old_one_goes_after_them() {
    let with = |policy: bool| {
        let names = if policy { r#", "authorizationPolicies": ["default/p"]"# } else { "" };
        let policies =
            if policy { r#"[{"name": "p", "namespace": "default", "scope": "WorkloadSelector", "action": "Deny", "rules": []}]"# } else { "[]" };
        format!(r#"{{"workloads": [{{"name": "a", "namespace": "default"{names}}}], "policies": {policies}}}"#)
    };
    let plane = Plane::of_file(&with(false)).await;
    let mut view = View::default();
    let mut stream = plane.connect().await.subscribe("left", &view).await.unwrap();
    for _ in 0..2 {
        view.apply(&stream.next().await);
    }
    for policy in [true, false] {
        plane.write(&with(policy));
        for _ in 0..2 {
            view.apply(&stream.next().await);
            let named = view.workload(&uid("a")).unwrap().policies;
            assert!(named.iter().all(|name| view.names(AUTHORIZATION).contains(name)), "a policy is named that the client does not have");
        }
        assert_eq!(view.names(AUTHORIZATION).len(), usize::from(policy));
    }
}

#[tokio::test]
async fn a_client_that_comes_back_hears_of_differences_only_also_after_a_restart() {
    let plane = Plane::of_file(&mesh(&[("a", "left", 1), ("b", "left", 1), ("c", "left", 1)], &["p"])).await;
    let mut view = View::default();
    let mut stream = plane.connect().await.subscribe("left", &view).await.unwrap();
    stream.until(&mut view, |view| view.names(AUTHORIZATION).len() == 1 && view.names(ADDRESS).len() == 4).await;
    let directory = plane.directory.clone();
    assert!(plane.end().await);
    assert_eq!(stream.response().await.unwrap(), None, "a control plane that ends in order ends its streams in order");

    std::fs::write(directory.path().join("mesh.yaml"), mesh(&[("a", "left", 1), ("b", "left", 2)], &["p"])).unwrap();
    let plane = Plane::in_directory(directory, config()).await;
    let mut stream = plane.connect().await.subscribe("left", &view).await.unwrap();
    for _ in 0..2 {
        let response = stream.next().await;
        let names: Vec<&str> = response.resources.iter().map(|resource| resource.name.as_str()).collect();
        match response.type_url.as_str() {
            ADDRESS => assert_eq!((names, response.removed.clone()), (vec![uid("b").as_str()], vec![uid("c")])),
            _ => assert_eq!((names, response.removed.clone()), (vec![], vec![]), "an unchanged policy is sent again"),
        }
        view.apply(&response);
    }
    assert!(stream.is_quiet(QUIET).await);
    assert!(has(&view, &[uid("a"), uid("b"), "default/web.default.svc".into()]));
}

#[tokio::test]
async fn a_client_on_demand_gets_what_it_asks_for_with_what_belongs_to_it() {
    let plane = Plane::of_file(&mesh(&[("a", "left", 1), ("b", "right", 1), ("c", "right", 1)], &[])).await;
    let mut view = View::default();
    let mut stream = plane.connect().await.stream().await.unwrap();
    stream.say(DeltaRequest { subscribe: vec!["*".into()], unsubscribe: vec!["*".into()], ..first(ADDRESS, "left") });
    view.apply(&stream.next().await);
    assert!(has(&view, &[uid("a")]), "of its own node it hears without asking");

    stream.ask(&["/10.1.0.1"]);
    let response = stream.next().await;
    assert!(response.resources.iter().any(|resource| resource.aliases == ["/10.1.0.1"]));
    view.apply(&response);
    assert!(has(&view, &[uid("a"), uid("b"), uid("c"), "default/web.default.svc".into()]), "{view:?}");

    stream.ask(&["/10.9.9.9", "nobody"]);
    let response = stream.next().await;
    assert_eq!((response.resources.len(), response.removed.clone()), (0, vec!["/10.9.9.9".to_owned(), "nobody".into()]));

    // What it asked for and was not there is told when it comes.
    plane.write(&mesh(&[("a", "left", 1), ("b", "right", 1), ("c", "right", 1), ("d", "right", 1)], &[]).replace("10.0.0.4", "10.9.9.9"));
    let response = stream.next().await;
    assert_eq!(response.resources.len(), 1);
    assert_eq!((response.resources[0].name.clone(), response.resources[0].aliases.clone()), (uid("d"), vec!["/10.9.9.9".to_owned()]));
}

#[tokio::test]
async fn a_refused_resource_is_logged_and_counted_and_not_sent_again_until_it_changes() {
    let plane = Plane::of_file(&mesh(&[("a", "left", 1)], &[])).await;
    let mut stream = plane.connect().await.stream().await.unwrap();
    stream.say(first(ADDRESS, "left"));
    let response = stream.response().await.unwrap().unwrap();
    let refusal = Error { code: 0, message: "a: I do not like it\u{1b}".into() };
    stream.say(DeltaRequest { type_url: ADDRESS.into(), nonce: response.nonce, error: Some(refusal), ..DeltaRequest::default() });
    plane.until_metric("culvert_control_nacks_total{type=\"address\"}", 1.0).await;
    assert!(stream.is_quiet(QUIET).await);
    for nonce in ["0", "2", "-1", "nonsense"] {
        stream.say(DeltaRequest { type_url: ADDRESS.into(), nonce: nonce.into(), ..DeltaRequest::default() });
    }
    plane.until_metric("culvert_control_stale_answers_total", 4.0).await;
    assert_eq!(plane.metric("culvert_control_acks_total{type=\"address\"}"), 0.0);
    plane.write(&mesh(&[("a", "left", 2)], &[]));
    assert_eq!(stream.next().await.resources[0].name, uid("a"));
}

#[tokio::test]
async fn a_stream_must_say_its_node_and_may_say_no_other_than_the_tokens() {
    let plane = Plane::of_file("{}").await;
    let connection = plane.connect().await;
    for (request, code) in [
        (DeltaRequest { type_url: ADDRESS.into(), ..DeltaRequest::default() }, tonic::Code::InvalidArgument),
        (first(ADDRESS, "right"), tonic::Code::PermissionDenied),
    ] {
        let mut stream = connection.stream().await.unwrap();
        stream.say(request);
        assert_eq!(stream.response().await.unwrap_err().code(), code);
    }
    let mut stream = connection.stream().await.unwrap();
    stream.say(first("type.googleapis.com/istio.workload.Something", "left"));
    assert!(stream.is_quiet(QUIET).await, "an unknown type is no reason to end the stream");
    stream.say(DeltaRequest { type_url: ADDRESS.into(), ..DeltaRequest::default() });
    assert_eq!(stream.next().await.type_url, ADDRESS);
}

#[tokio::test]
async fn a_stream_ends_when_its_token_is_taken_out_of_the_file() {
    let config = culvert::control::Config { token_check: Duration::from_millis(20), ..config() };
    let plane = Plane::in_directory(directory("{}"), config).await;
    let mut streams = Vec::new();
    for (token, node) in [(LEFT, "left"), (RIGHT, "right")] {
        let mut stream = plane.connect_as(token).await.stream().await.unwrap();
        stream.say(first(ADDRESS, node));
        stream.next().await;
        streams.push(stream);
    }
    let file = plane.directory.path().join("tokens.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(file, text.replace(LEFT, "another-token-of-the-left-node")).unwrap();
    assert_eq!(streams[0].response().await.unwrap_err().code(), tonic::Code::Unauthenticated);
    assert!(streams[1].is_quiet(QUIET).await, "the stream of another token suffers");
    assert!(plane.connect().await.stream().await.is_err());
}

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    /// The mesh has these workloads (by presence and capacity) and policies.
    Mesh([u32; 4], [bool; 2]),
    /// The client comes back with what it has.
    Reconnect,
    /// It comes back having lost everything.
    Forget,
    /// It asks for something although it has everything.
    Ask(u8),
}

#[test]
fn any_schedule_of_changes_and_reconnects_leaves_the_client_with_the_mesh() {
    let step = prop_oneof![
        4 => (prop::array::uniform4(0..3_u32), prop::array::uniform2(any::<bool>())).prop_map(|(workloads, policies)| Step::Mesh(workloads, policies)),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Forget),
        1 => (0..5_u8).prop_map(Step::Ask),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut runner = TestRunner::new(ProptestConfig { cases: 12, ..ProptestConfig::default() });
    let outcome = runner.run(&prop::collection::vec(step, 1..10), |steps| {
        runtime.block_on(schedule(steps));
        Ok(())
    });
    outcome.unwrap();
}

async fn schedule(steps: Vec<Step>) {
    let names = ["a", "b", "c", "d"];
    let plane = Plane::of_file("{}").await;
    let connection = plane.connect().await;
    let mut view = View::default();
    let mut stream = connection.subscribe("left", &view).await.unwrap();
    let mut wanted = ([0; 4], [false; 2]);
    for step in steps {
        match step {
            Step::Mesh(workloads, policies) => {
                wanted = (workloads, policies);
                let rows: Vec<_> =
                    names.iter().zip(workloads).filter(|(_, capacity)| *capacity > 0).map(|(name, capacity)| (*name, "left", capacity)).collect();
                let policies: Vec<_> = ["p", "q"].into_iter().zip(policies).filter(|(_, there)| *there).map(|(name, _)| name).collect();
                plane.write(&mesh(&rows, &policies));
            }
            Step::Reconnect => stream = connection.subscribe("left", &view).await.unwrap(),
            Step::Forget => {
                view = View::default();
                stream = connection.subscribe("left", &view).await.unwrap();
            }
            Step::Ask(number) => stream.ask(&[&names.get(usize::from(number)).map_or_else(|| "nobody".to_owned(), |name| uid(name))]),
        }
        // Half of the steps are not waited for.
        if wanted.0[0] % 2 == 0 {
            settle(&mut stream, &mut view, wanted).await;
        }
    }
    settle(&mut stream, &mut view, wanted).await;
    assert!(plane.metric("culvert_control_nacks_total{type=\"address\"}") == 0.0);
}

async fn settle(stream: &mut Stream, view: &mut View, (workloads, policies): ([u32; 4], [bool; 2])) {
    let ([a, b, c, d], [p, q]) = (workloads, policies);
    let there = |view: &View| {
        let capacity = |name| view.workload(&uid(name)).map_or(0, |workload| workload.capacity.unwrap_or(1));
        let policies: Vec<bool> = ["default/p", "default/q"].iter().map(|name| view.names(AUTHORIZATION).contains(&(*name).to_owned())).collect();
        [capacity("a"), capacity("b"), capacity("c"), capacity("d")] == [a, b, c, d] && policies == [p, q]
    };
    stream.until(view, there).await;
}
