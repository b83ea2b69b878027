//! swap.sh against a stand-in for a cluster.

use std::fs;

use super::deploy;
use super::stubs::{Ran, Stubs};

const KUBECTL: &str = include_str!("kubectl.bash");
/// As the stand-in for the API server has them.
const STRATEGY: &str = r#"{"rollingUpdate":{"maxSurge":1,"maxUnavailable":0},"type":"RollingUpdate"}"#;

fn cluster() -> Stubs {
    let stubs = Stubs::new().with("kubectl", KUBECTL);
    stubs.state("");
    stubs
}

fn swap(stubs: &Stubs, arguments: &[&str]) -> Ran {
    stubs.run(&deploy("kind/swap.sh"), &[arguments, &["--wait", "1"]].concat())
}

/// The calls that change something, without what they all begin with.
fn changes(stubs: &Stubs) -> Vec<String> {
    let verbs = ["label node", "patch daemonset", "annotate daemonset", "delete daemonset", "apply "];
    let calls = stubs.calls().replace("kubectl --context kind-culvert ", "").replace("-n istio-system ", "");
    calls.lines().filter(|call| verbs.iter().any(|verb| call.starts_with(verb))).map(str::to_owned).collect()
}

#[test]
fn culvert_comes_beside_ztunnel_before_ztunnel_goes_and_the_way_back_is_kept() {
    let stubs = cluster();
    let ran = swap(&stubs, &["culvert", "--node", "n1", "--image", "mine:1"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let made = changes(&stubs);
    let [apply, annotate, patch, both, alone] = &made[..] else { panic!("{made:?}") };
    assert_eq!(apply, "apply -f -");
    assert_eq!(annotate, &format!("annotate daemonset ztunnel culvert/update-strategy={STRATEGY} --overwrite"));
    assert!(patch.contains(r#""updateStrategy":{"type":"OnDelete","rollingUpdate":null}"#), "{patch}");
    assert!(patch.contains(r#"{"key":"culvert/node-proxy","operator":"NotIn","values":["culvert"]}"#), "{patch}");
    assert_eq!(both, "label node n1 culvert/node-proxy=both --overwrite");
    assert_eq!(alone, "label node n1 culvert/node-proxy=culvert --overwrite");
    // What this mesh told ztunnel holds for Culvert; the rest is the manifest's.
    let applied = fs::read_to_string(stubs.state("applied")).unwrap();
    assert!(applied.contains("mine:1") && applied.contains("XDS_ADDRESS=istiod-blue.istio-system.svc:15012 NETWORK=east -o"), "{applied}");
    // It waited in between.
    let calls = stubs.calls();
    let at = |text: &str| calls.find(text).unwrap_or_else(|| panic!("{text} is not in {calls}"));
    assert!(at("node-proxy=both") < at("name=culvert --field-selector spec.nodeName=n1 -o jsonpath={.items[*].status.conditions"));
    assert!(at("name=culvert --field-selector spec.nodeName=n1 -o jsonpath={.items[*].status.conditions") < at("node-proxy=culvert --overwrite"));
}

#[test]
fn every_node_is_swapped_by_default_and_a_second_time_changes_nothing() {
    let stubs = cluster();
    assert_eq!(swap(&stubs, &["culvert"]).code, 0);
    let labels = |node: &str| fs::read_to_string(stubs.state(&format!("label-{node}"))).unwrap();
    assert_eq!((labels("n1").as_str(), labels("n2").as_str()), ("culvert", "culvert"));
    let before = changes(&stubs).len();
    let ran = swap(&stubs, &["culvert"]);
    assert!(ran.printed.contains("n1: Culvert serves it already") && ran.printed.contains("n2: Culvert serves it already"), "{ran:?}");
    assert_eq!(changes(&stubs)[before..], ["apply -f -"], "a newer image is still applied");
}

#[test]
fn the_last_node_that_goes_back_makes_istios_daemon_set_what_it_was() {
    let stubs = cluster();
    assert_eq!(swap(&stubs, &["culvert"]).code, 0);
    let before = changes(&stubs).len();
    let ran = swap(&stubs, &["ztunnel", "--node", "n1"]);
    assert!(ran.printed.ends_with("still Culvert's: n2 \n"), "{ran:?}");
    assert_eq!(changes(&stubs)[before..], ["label node n1 culvert/node-proxy=both --overwrite", "label node n1 culvert/node-proxy- --overwrite"]);

    let before = changes(&stubs).len();
    assert_eq!(swap(&stubs, &["ztunnel"]).code, 0);
    let back = format!(
        r#"{{"metadata":{{"annotations":{{"culvert/update-strategy":null}}}},"spec":{{"updateStrategy":{STRATEGY},"template":{{"spec":{{"affinity":null}}}}}}}}"#
    );
    let expected = [
        "label node n2 culvert/node-proxy=both --overwrite".to_owned(),
        "label node n2 culvert/node-proxy- --overwrite".to_owned(),
        format!("patch daemonset ztunnel --type=merge -p {back}"),
        "delete daemonset culvert --ignore-not-found".to_owned(),
    ];
    assert_eq!(changes(&stubs)[before..], expected);
    assert!(!stubs.state("affinity").exists());
    // There is nothing to go back from any more.
    let before = changes(&stubs).len();
    assert_eq!(swap(&stubs, &["ztunnel"]).code, 0);
    assert_eq!(changes(&stubs)[before..], ["delete daemonset culvert --ignore-not-found"]);
}

#[test]
fn when_the_way_back_is_lost_istios_default_is_taken() {
    let stubs = cluster();
    assert_eq!(swap(&stubs, &["culvert"]).code, 0);
    fs::write(stubs.state("strategy"), "").unwrap();
    assert_eq!(swap(&stubs, &["ztunnel"]).code, 0);
    let made = changes(&stubs);
    let patch = made.iter().rfind(|call| call.starts_with("patch")).unwrap();
    assert!(patch.contains(r#""updateStrategy":{"type":"RollingUpdate","rollingUpdate":{"maxSurge":1,"maxUnavailable":0}},"#), "{patch}");
}

#[test]
fn a_proxy_that_does_not_become_ready_leaves_the_node_to_the_other_one() {
    for (target, broken, before) in [("culvert", "broken-culvert", None), ("ztunnel", "broken-ztunnel", Some("culvert"))] {
        let stubs = cluster();
        if let Some(label) = before {
            assert_eq!(swap(&stubs, &[label, "--node", "n1"]).code, 0);
        }
        fs::write(stubs.state(broken), "").unwrap();
        let ran = swap(&stubs, &[target, "--node", "n1"]);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.complained.contains("is not ready on n1 within 1 s; the node is left to the other one"), "{ran:?}");
        assert!(ran.complained.contains("what the proxy said last"), "{ran:?}");
        assert_eq!(fs::read_to_string(stubs.state("label-n1")).ok().as_deref(), before);
    }
}

#[test]
fn what_it_does_not_understand_it_leaves_alone() {
    let stubs = cluster();
    fs::write(stubs.state("affinity"), r#"{"nodeAffinity":{}}"#).unwrap();
    let ran = swap(&stubs, &["culvert"]);
    assert_eq!(ran.code, 1);
    assert!(ran.complained.contains("has an affinity of its own"), "{ran:?}");

    let stubs = cluster();
    fs::write(stubs.state("no-ztunnel"), "").unwrap();
    let ran = swap(&stubs, &["culvert"]);
    assert_eq!(ran.code, 1);
    assert!(ran.complained.contains("not found") && ran.complained.contains("kind-culvert") && ran.complained.contains("every-node"), "{ran:?}");

    let other = swap(&cluster(), &["culvert", "--node", "n3"]);
    assert_eq!((other.code, other.complained.contains("there is no node n3")), (1, true), "{other:?}");
    assert_eq!(changes(&stubs), [] as [&str; 0]);
}

#[test]
fn a_dry_run_at_the_server_changes_nothing_and_has_every_change_checked() {
    let stubs = cluster();
    for target in ["culvert", "ztunnel"] {
        let ran = swap(&stubs, &[target, "--node", "n1", "--dry-run=server"]);
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    let made = changes(&stubs);
    assert!(made.len() >= 6, "{made:?}");
    assert!(made.iter().all(|call| call.ends_with(" --dry-run=server")), "{made:?}");
    assert!(!stubs.state("label-n1").exists() && !stubs.state("affinity").exists() && !stubs.state("applied").exists());
}
