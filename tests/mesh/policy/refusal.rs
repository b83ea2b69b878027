//! What is refused, by each attribute, and what that looks like.

use std::io::{ErrorKind, Read};

use super::ground::{Ground, about, policy};
use crate::mesh::wait_until;

const FAILED: &str = "istio_tcp_connections_failed_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";

#[test]
fn a_denied_stream_is_answered_401_and_its_refusal_is_logged_and_counted_with_the_reason() {
    let ground = Ground::market();
    let mesh = &ground.mesh;
    ground.set(&[about("shop/for-clerks", "ALLOW", "{serviceAccounts: [bank/clerk]}")]);
    let line = ground.refused("buyer", (mesh.ip("till"), 8080));
    assert!(line.contains("error=\"connection closed due to policy rejection: allow policies exist, but none allowed\""), "{line}");
    assert!(!line.contains("policy=") && line.contains("src.identity=\"spiffe://cluster.local/ns/shop/sa/buyer\""), "{line}");
    let outbound = mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", "401"]);
    assert!(outbound.contains("error="), "{outbound}");
    // A refusal that has a policy to blame names it.
    ground.set(&[about("shop/no-buyers", "DENY", "{serviceAccounts: [shop/buyer]}")]);
    let line = ground.refused("buyer", (mesh.ip6("till"), 8080));
    assert!(line.contains("error=\"connection closed due to policy rejection: explicitly denied by: shop/no-buyers\""), "{line}");
    assert!(line.contains("policy=\"shop/no-buyers\""), "{line}");
    // Both ends count both.
    let denied = ["reporter=\"destination\"", "response_flags=\"DENY\"", "connection_security_policy=\"mutual_tls\""];
    let refused = ["reporter=\"source\"", "response_flags=\"CONNECT\"", "connection_security_policy=\"mutual_tls\""];
    for (node, labels) in [("right", denied), ("left", refused)] {
        for metric in [FAILED, CLOSED] {
            wait_until("both are counted", || mesh.metric(node, metric, &labels) == 2.0);
            assert_eq!(mesh.metric(node, metric, &labels[..1]), 2.0);
        }
    }
    // The stream of another identity passes, and says which policy let it.
    ground.set(&[about("shop/for-clerks", "ALLOW", "{serviceAccounts: [bank/clerk]}")]);
    assert!(ground.passes("clerk", (mesh.ip("till"), 8080)));
    mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", "policy=\"shop/for-clerks\""]);
}

#[test]
fn a_plain_connection_that_is_denied_is_closed_and_logged_without_an_identity() {
    let ground = Ground::market();
    ground.set(&[policy("shop/nobody", "{}")]);
    for target in ground.both("till", 8080) {
        let line = ground.refused("outside", target);
        assert!(line.contains("allow policies exist, but none allowed") && !line.contains("src.identity"), "{line}");
    }
    let labels = ["reporter=\"destination\"", "response_flags=\"DENY\"", "connection_security_policy=\"unknown\""];
    wait_until("both are counted", || ground.mesh.metric("right", FAILED, &labels) == 2.0);
    // Whoever waits for the server's first words must not take the refusal for an empty answer.
    let ended = ground.mesh.connect("outside", (ground.mesh.ip("till"), 8080)).and_then(|mut socket| socket.read(&mut [0; 1]));
    assert_eq!(ended.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
}

/// The clients: who they are as policy sees it.
const CLIENTS: [&str; 3] = ["buyer", "clerk", "outside"];

/// Tries a source in ALLOW and in DENY policies; `matches` says for which of [`CLIENTS`] by IPv4 and by IPv6 it must match.
fn is_matched(ground: &Ground, source: &str, matches: [[bool; 2]; 3]) {
    for action in ["ALLOW", "DENY"] {
        ground.set(&[about("shop/one", action, source)]);
        for (client, expected) in CLIENTS.iter().zip(matches) {
            for (target, matched) in ground.both("till", 8080).into_iter().zip(expected) {
                assert_eq!(ground.passes(client, target), matched == (action == "ALLOW"), "{action} {source}: {client} to {target}");
            }
        }
    }
}

const YES: [bool; 2] = [true; 2];
const NO: [bool; 2] = [false; 2];

#[test]
fn sources_match_by_namespace_principal_and_service_account_and_never_without_an_identity() {
    let ground = Ground::market();
    is_matched(&ground, "{namespaces: [shop]}", [YES, NO, NO]);
    is_matched(&ground, "{namespaces: ['ba*']}", [NO, YES, NO]);
    is_matched(&ground, "{principals: [cluster.local/ns/shop/sa/buyer]}", [YES, NO, NO]);
    is_matched(&ground, "{principals: ['*/sa/clerk']}", [NO, YES, NO]);
    is_matched(&ground, "{principals: ['*']}", [YES, YES, NO]);
    is_matched(&ground, "{serviceAccounts: [bank/clerk]}", [NO, YES, NO]);
    // Without a namespace it is one of the policy's own.
    is_matched(&ground, "{serviceAccounts: [buyer, clerk]}", [YES, NO, NO]);
}

#[test]
fn sources_match_by_address_and_range_in_both_families() {
    let ground = Ground::market();
    let (v4, v6) = (ground.mesh.ip("buyer"), ground.mesh.ip6("buyer"));
    is_matched(&ground, &format!("{{ipBlocks: ['{v4}']}}"), [[true, false], NO, NO]);
    is_matched(&ground, &format!("{{ipBlocks: ['{v6}']}}"), [[false, true], NO, NO]);
    is_matched(&ground, &format!("{{ipBlocks: ['{v4}/24']}}"), [[true, false]; 3]);
    is_matched(&ground, &format!("{{ipBlocks: ['{v4}/24'], notIpBlocks: ['{v4}']}}"), [NO, [true, false], [true, false]]);
    is_matched(&ground, "{notIpBlocks: ['::/0']}", [[true, false]; 3]);
}

#[test]
fn ports_are_those_of_the_pod_and_not_of_the_service() {
    let ground = Ground::market();
    let (till, pay) = (ground.mesh.ip("till"), ground.mesh.vips("pay"));
    let to = |action: &str, port: u16| policy("shop/port", &format!("{{action: {action}, rules: [{{to: [{{operation: {{ports: ['{port}']}}}}]}}]}}"));
    ground.set(&[to("DENY", 80)]);
    assert!(pay.iter().all(|vip| ground.passes("buyer", (*vip, 80))));
    ground.set(&[to("DENY", 8080)]);
    for client in ["buyer", "clerk", "outside"] {
        assert!(!ground.passes(client, (till, 8080)), "{client}");
        assert!(ground.passes(client, (till, 9000)), "{client}");
    }
    // By way of a named port.
    assert!(pay.iter().all(|vip| !ground.passes("buyer", (*vip, 80))));
    ground.set(&[to("ALLOW", 9000)]);
    assert!(ground.passes("buyer", (till, 9000)) && ground.passes("outside", (till, 9000)));
    assert!(!ground.passes("buyer", (till, 8080)) && pay.iter().all(|vip| !ground.passes("buyer", (*vip, 80))));
}

#[test]
fn a_peer_without_identity_passes_no_negated_matcher_of_an_allow_policy_and_is_caught_by_that_of_a_deny_policy() {
    let ground = Ground::market();
    let till = ground.both("till", 8080);
    let nobody_elses = ["{notPrincipals: [cluster.local/ns/bank/sa/clerk]}", "{notNamespaces: [bank]}", "{notServiceAccounts: [bank/clerk]}"];
    for source in nobody_elses {
        ground.set(&[about("shop/one", "ALLOW", source)]);
        assert!(till.iter().all(|target| ground.passes("buyer", *target)), "{source}");
        assert!(!till.iter().any(|target| ground.passes("clerk", *target)), "{source}");
        assert!(!till.iter().any(|target| ground.passes("outside", *target)), "{source}");
        ground.set(&[about("shop/one", "DENY", source)]);
        assert!(!till.iter().any(|target| ground.passes("buyer", *target)), "{source}");
        assert!(till.iter().all(|target| ground.passes("clerk", *target)), "{source}");
        assert!(!till.iter().any(|target| ground.passes("outside", *target)), "{source}");
    }
    // Beside a matcher that does match, the one for names still decides.
    let address = ground.mesh.ip("outside");
    ground.set(&[about("shop/one", "ALLOW", &format!("{{ipBlocks: ['{address}'], notNamespaces: [bank]}}"))]);
    assert!(!ground.passes("outside", till[0]));
    ground.set(&[about("shop/one", "ALLOW", &format!("{{ipBlocks: ['{address}']}}"))]);
    assert!(ground.passes("outside", till[0]));
}

#[test]
fn a_dry_run_policy_is_only_logged() {
    let ground = Ground::of(&format!("{}proxyEnv: {{AUTHZ_POLICY_INFO_LOGGING: 'true'}}\n", super::ground::MARKET));
    crate::mesh::serve_echo(ground.mesh.listen("till", 8080));
    let tried = |policy: String| policy.replace("metadata: {", "metadata: {annotations: {istio.io/dry-run: 'true'}, ");
    ground.set(&[
        tried(about("shop/would-deny", "DENY", "{namespaces: [shop]}")),
        tried(policy("shop/would-allow-nothing", "{}")),
        tried(about("shop/would-allow", "ALLOW", "{principals: ['*']}")),
    ]);
    let till = (ground.mesh.ip("till"), 8080);
    for client in ["buyer", "clerk", "outside"] {
        assert!(ground.passes(client, till), "{client}");
    }
    for (name, effect) in [("would-deny", "would deny"), ("would-allow", "would allow")] {
        let parts = ["dry-run policy matches", &format!("policy=\"shop/{name}\""), &format!("effect=\"{effect}\"")];
        let line = ground.mesh.wait_for_log("right", &parts);
        assert!(line.contains("info\tpolicy\t") && line.contains("src.identity=spiffe://cluster.local/ns/shop/sa/buyer"), "{line}");
    }
    ground.mesh.wait_for_log("right", &["policy decision", "verdict=\"permitted\""]);
    // And it changes nothing about one that is enforced.
    ground.set(&[about("shop/no", "DENY", "{namespaces: [shop]}"), tried(about("shop/would-allow", "ALLOW", "{principals: ['*']}"))]);
    assert!(!ground.passes("buyer", till) && ground.passes("clerk", till) && ground.passes("outside", till));
}
