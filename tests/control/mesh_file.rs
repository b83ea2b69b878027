//! The file behind it: what a bad one does, and what an object of it that cannot be sent does.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use culvert::discovery::Edit;
use culvert::model::{Profile, Workload};
use culvert::policy::{Action, Authorization as Policy, Clause, Match, Rule, Scope, StringMatch};

use crate::control_client::*;
use crate::ground::*;

#[tokio::test]
async fn a_bad_file_keeps_the_old_state_for_old_and_new_clients_and_a_good_one_counts_again() {
    let plane = Plane::of_file(&mesh(&[("a", "left", 1)], &["p"])).await;
    let mut view = View::default();
    let connection = plane.connect().await;
    let mut stream = connection.subscribe("left", &view).await.unwrap();
    stream.until(&mut view, |view| view.names(AUTHORIZATION).len() == 1 && view.names(ADDRESS).len() == 2).await;
    plane.write("workloads:\n- {name: a, namespace: default, colour: blue}\n");
    while plane.reloads.failures.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    let mut other = View::default();
    let mut late = connection.subscribe("left", &other).await.unwrap();
    late.until(&mut other, |other| *other == view).await;
    plane.write(&mesh(&[("a", "left", 3)], &["p"]));
    let response = stream.next().await;
    assert_eq!(response.resources.len(), 1, "the bad file had an effect");
    view.apply(&response);
    assert_eq!(view.workload(&uid("a")).unwrap().capacity, Some(3));
}

#[tokio::test]
async fn an_object_too_large_to_send_is_left_out_but_a_policy_becomes_one_that_denies() {
    let (plane, mut publisher) = Plane::published(config()).await;
    let huge = "x".repeat(17 << 20);
    let workload = |uid: &str, name: &str| {
        Edit::Workload(Workload {
            uid: uid.into(),
            name: name.into(),
            addresses: Default::default(),
            node: "left".into(),
            hostname: "".into(),
            status: Default::default(),
            capacity: 1,
            profile: Arc::new(Profile::default()),
        })
    };
    let conditions = Match { principals: vec![StringMatch::Exact(huge.as_str().into())], ..Match::default() };
    let rules = vec![Rule { clauses: vec![Clause { matches: vec![conditions] }] }];
    let policy = Policy::new("p", "default", Scope::Namespace, Action::Allow, rules);
    publisher.publish([workload("good", "good"), workload("bad", &huge), Edit::Policy(policy)]);
    let mut view = View::default();
    let mut stream = plane.connect().await.subscribe("left", &view).await.unwrap();
    stream.until(&mut view, |view| !view.names(AUTHORIZATION).is_empty() && !view.names(ADDRESS).is_empty()).await;
    assert_eq!(view.names(ADDRESS), ["good"]);
    let policy = view.get::<Authorization>(AUTHORIZATION, "default/p").unwrap();
    assert_eq!((policy.action, policy.scope), (1, 1), "it must deny, in the same scope");
}
