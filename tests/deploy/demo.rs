//! demo.sh against a stand-in for a mesh that enforces policies, or does not.

use std::fs;

use super::deploy;
use super::stubs::{Ran, Stubs};

/// Pods that answer as policies and the waypoint say, and a proxy that logs why it refused.
const KUBECTL: &str = r#"
state="$(dirname "$0")/../state"
arguments="$*" file="${arguments##*/}"
refuse() { [ -e "$state/$1" ] && [ ! -e "$state/enforces-nothing" ] && echo "$2" && exit 1; }
line() {
  printf 'time\terror\taccess\tconnection complete\tsrc.identity="spiffe://cluster.local/ns/culvert-demo/sa/visitor" dst.workload="%s" error="%s"\n' "$1" "$2"
}
case "$*" in
  *"apply -f"*demo/*.yaml) : >"$state/${file%.yaml}" ;;
  *"delete -f"*demo/*.yaml) rm "$state/${file%.yaml}" ;;
  *"apply -f -") cat >"$state/workloads" ;;
  *redirection*) printf 'enabled enabled enabled enabled' ;;
  *spec.nodeName}) printf n1 ;;
  *"get pods -l app=ztunnel --field-selector spec.nodeName=n1 "*) printf proxy-of-n1 ;;
  *"get crd"*) cat "$state/crd" 2>/dev/null || true ;;
  *"logs proxy-of-n1 "*)
    line web "nothing"
    [ -e "$state/silent" ] || line ledger "allow policies exist, but none allowed"
    line web "explicitly denied by: culvert-demo/no-visitors"
    ;;
  *"exec visitor "*ledger*) refuse allow "connected, then closed" || echo hello ;;
  *"exec visitor "*/public*) refuse waypoint "RBAC: access denied" || echo page ;;
  *"exec visitor "*) refuse deny "connected, then closed" || echo page ;;
  *"exec shop "*/private*) refuse waypoint "$(cat "$state/words" 2>/dev/null || echo "RBAC: access denied")" || echo page ;;
  *"exec shop "*) echo page ;;
esac"#;

fn mesh(with: &[&str]) -> (Stubs, Ran) {
    let stubs = Stubs::new().with("kubectl", KUBECTL).with("istioctl", "");
    stubs.state("");
    for name in with {
        fs::write(stubs.state(name), *name).unwrap();
    }
    let ran = stubs.run(&deploy("kind/demo.sh"), &["--image", "mine:1", "--wait", "1"]);
    (stubs, ran)
}

#[test]
fn every_step_is_said_with_the_reason_of_each_denial() {
    let (stubs, ran) = mesh(&["crd"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    for said in [
        "✓ visitor is answered: page",
        "✓ web's proxy saw spiffe://cluster.local/ns/culvert-demo/sa/visitor",
        "✓ visitor is denied: connected, then closed",
        "✓ its proxy says: spiffe://cluster.local/ns/culvert-demo/sa/visitor: allow policies exist, but none allowed",
        "✓ its proxy says: spiffe://cluster.local/ns/culvert-demo/sa/visitor: explicitly denied by: culvert-demo/no-visitors",
        "✓ shop is denied: RBAC: access denied",
        "every step held",
    ] {
        assert!(ran.printed.contains(said), "{said}: {}", ran.printed);
    }
    assert!(!ran.printed.contains('✗'), "{}", ran.printed);
    let workloads = fs::read_to_string(stubs.state("workloads")).unwrap();
    assert_eq!((workloads.matches("image: mine:1").count(), workloads.contains("culvert:dev")), (4, false));
    let calls = stubs.calls();
    assert!(calls.contains("istioctl --context kind-culvert waypoint apply -n culvert-demo --enroll-namespace --overwrite --wait"), "{calls}");
    assert!(calls.trim_end().ends_with("delete namespace culvert-demo --ignore-not-found --wait=false"), "{calls}");
}

#[test]
fn without_the_gateway_api_the_waypoint_is_left_out_and_said_so() {
    let (stubs, ran) = mesh(&[]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.printed.contains("left out: the Gateway API's definitions are not in the cluster"), "{}", ran.printed);
    assert!(!stubs.calls().contains("istioctl"));
}

#[test]
fn a_mesh_that_enforces_nothing_or_says_nothing_fails() {
    let (_, open) = mesh(&["crd", "enforces-nothing"]);
    assert_eq!(open.code, 1);
    assert!(open.printed.contains("✗ visitor should be denied, but: hello") && open.printed.contains("4 steps did not hold"), "{}", open.printed);
    let (_, silent) = mesh(&["silent"]);
    assert_eq!(silent.code, 1);
    assert!(silent.printed.contains("✗ the proxy of ledger has no word about it"), "{}", silent.printed);
    // Denied, but not by the waypoint.
    let (_, other) = mesh(&["crd", "words"]);
    assert_eq!(other.code, 1);
    assert!(other.printed.contains("✗ shop should be denied, but: words"), "{}", other.printed);
}
