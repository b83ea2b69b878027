//! To whom a policy applies, and which of several decides.

use super::ground::{Ground, about, policy};

const EVERYBODY: &str = "{action: DENY, rules: [{}]}";
const SERVERS: [&str; 3] = ["till", "shelf", "vault"];

/// Exactly these servers refuse the buyer, and blame this policy.
fn only_these_refuse(ground: &Ground, expected: &[&str], blamed: &str) {
    for server in SERVERS {
        for target in ground.both(server, 8080) {
            if expected.contains(&server) {
                let line = ground.refused("buyer", target);
                assert!(line.contains(&format!("explicitly denied by: {blamed}\"")), "{line}");
            } else {
                assert!(ground.passes("buyer", target), "{blamed}: {server} does not let the buyer in");
            }
        }
    }
}

#[test]
fn a_policy_reaches_its_namespace_its_selection_or_with_the_root_namespace_everybody_and_nobody_else() {
    let ground = Ground::market();
    ground.set(&[policy("bank/all", EVERYBODY)]);
    only_these_refuse(&ground, &["vault"], "bank/all");
    ground.set(&[policy("shop/all", EVERYBODY)]);
    only_these_refuse(&ground, &["till", "shelf"], "shop/all");
    let selection = "{selector: {matchLabels: {app: money}}, action: DENY, rules: [{}]}";
    ground.set(&[policy("shop/money", selection)]);
    only_these_refuse(&ground, &["till"], "shop/money");
    ground.set(&[policy("istio-system/money", selection)]);
    only_these_refuse(&ground, &["till", "vault"], "istio-system/money");
    ground.set(&[policy("istio-system/all", EVERYBODY)]);
    only_these_refuse(&ground, &SERVERS, "istio-system/all");
    // A namespace in which nobody lives.
    ground.set(&[policy("desert/all", EVERYBODY)]);
    only_these_refuse(&ground, &[], "desert/all");
}

#[test]
fn policies_of_one_name_in_two_namespaces_are_two_policies_and_the_later_of_one_key_replaces_the_earlier() {
    let ground = Ground::market();
    let selected = |action: &str| format!("{{selector: {{matchLabels: {{app: money}}}}, action: {action}, rules: [{{}}]}}");
    ground.set(&[policy("shop/same", &selected("DENY")), policy("bank/same", &selected("ALLOW"))]);
    only_these_refuse(&ground, &["till"], "shop/same");
    ground.set(&[policy("shop/same", &selected("ALLOW")), policy("bank/same", &selected("DENY"))]);
    only_these_refuse(&ground, &["vault"], "bank/same");
    // From a selection to the whole namespace, and to somebody else.
    ground.set(&[policy("shop/same", EVERYBODY)]);
    only_these_refuse(&ground, &["till", "shelf"], "shop/same");
    ground.set(&[about("shop/same", "DENY", "{namespaces: [bank]}")]);
    only_these_refuse(&ground, &[], "shop/same");
}

#[test]
fn deny_wins_over_every_allow_however_narrow() {
    let ground = Ground::market();
    let till = ground.mesh.ip("till");
    let narrow = "{selector: {matchLabels: {app: money}}, rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/buyer]}}]}]}";
    let wide = [about("istio-system/no-shop", "DENY", "{namespaces: [shop]}"), policy("shop/narrow", narrow), policy("shop/all", "{rules: [{}]}")];
    ground.set(&wide);
    let line = ground.refused("buyer", (till, 8080));
    assert!(line.contains("explicitly denied by: istio-system/no-shop"), "{line}");
    assert!(ground.passes("clerk", (till, 8080)));
    ground.set(&wide[1..]);
    assert!(ground.passes("buyer", (till, 8080)) && ground.passes("clerk", (till, 8080)));
    // Any ALLOW that matches is enough, and there it ends.
    ground.set(&wide[1..2]);
    assert!(ground.passes("buyer", (till, 8080)) && !ground.passes("clerk", (till, 8080)));
    assert!(ground.passes("clerk", (ground.mesh.ip("shelf"), 8080)));
}

#[test]
fn an_allow_policy_without_rules_allows_nothing_and_a_deny_policy_without_rules_denies_nothing() {
    let ground = Ground::market();
    ground.set(&[policy("shop/nothing", "{}")]);
    for client in ["buyer", "clerk", "outside"] {
        for target in ground.both("till", 8080) {
            assert!(!ground.passes(client, target), "{client} to {target}");
        }
        assert!(ground.passes(client, (ground.mesh.ip("vault"), 8080)), "{client}");
    }
    ground.set(&[policy("shop/nothing", "{action: DENY}")]);
    for client in ["buyer", "clerk", "outside"] {
        assert!(ground.passes(client, (ground.mesh.ip("till"), 8080)), "{client}");
    }
}
