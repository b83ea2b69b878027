#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use serde_json::json;

use super::*;

fn policy(yaml: &str) -> Result<MeshPolicy, Error> {
    serde_saphyr::from_str::<AuthorizationPolicy>(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}")).translate()
}

fn rules(yaml: &str) -> Value {
    json!(policy(&format!("metadata: {{name: p, namespace: shop}}\nspec: {{rules: {yaml}}}")).unwrap().rules)
}

fn refusal(spec: &str) -> String {
    policy(&format!("metadata: {{name: p, namespace: shop}}\nspec: {spec}")).expect_err(spec).to_string()
}

fn peers(yaml: &str) -> Vec<PeerAuthentication> {
    serde_saphyr::from_str(yaml).unwrap()
}

fn labels(app: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("app".to_owned(), app.to_owned())])
}

#[test]
fn scope_follows_selector_and_namespace() {
    let scope = |metadata: &str, spec: &str| policy(&format!("metadata: {{name: p, {metadata}}}\nspec: {spec}")).unwrap().scope;
    assert_eq!(scope("namespace: shop", "{}"), "Namespace");
    assert_eq!(scope("namespace: istio-system", "{}"), "Global");
    assert_eq!(scope("namespace: shop", "{selector: {matchLabels: {app: web}}}"), "WorkloadSelector");
    assert_eq!(scope("namespace: istio-system", "{selector: {matchLabels: {app: web}}}"), "WorkloadSelector");
}

#[test]
fn all_of_from_is_one_clause_all_of_to_another_and_every_when_its_own() {
    let yaml = "[{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}], to: [{operation: {ports: ['80', '81']}}], \
                when: [{key: source.ip, values: [10.0.0.0/8]}, {key: destination.port, notValues: ['22']}]}]";
    let expected = json!([[
        [{"destinationPorts": [80, 81]}],
        [{"namespaces": [{"Exact": "a"}]}, {"namespaces": [{"Exact": "b"}]}],
        [{"sourceIps": ["10.0.0.0/8"]}],
        [{"notDestinationPorts": [22]}],
    ]]);
    assert_eq!(rules(yaml), expected);
}

#[test]
fn every_layer_4_field_has_its_attribute() {
    for (field, value, attribute, expected) in [
        ("principals", "td/ns/a/sa/b", "principals", json!({"Exact": "td/ns/a/sa/b"})),
        ("notPrincipals", "*", "notPrincipals", json!({"Presence": []})),
        ("namespaces", "prod-*", "namespaces", json!({"Prefix": "prod-"})),
        ("notNamespaces", "*-test", "notNamespaces", json!({"Suffix": "-test"})),
        ("serviceAccounts", "web", "serviceAccounts", json!({"namespace": "shop", "serviceAccount": "web"})),
        ("notServiceAccounts", "other/web", "notServiceAccounts", json!({"namespace": "other", "serviceAccount": "web"})),
        ("ipBlocks", "10.1.2.3", "sourceIps", json!("10.1.2.3/32")),
        ("notIpBlocks", "fd00::1/64", "notSourceIps", json!("fd00::/64")),
    ] {
        let mut clause = serde_json::Map::new();
        clause.insert(attribute.to_owned(), json!([expected]));
        assert_eq!(rules(&format!("[{{from: [{{source: {{{field}: ['{value}']}}}}]}}]")), json!([[[clause]]]), "{field}");
    }
    for (key, value, attribute, expected) in [
        ("source.ip", "1.2.3.4/32", "sourceIps", json!("1.2.3.4/32")),
        ("source.namespace", "a", "namespaces", json!({"Exact": "a"})),
        ("source.principal", "*/sa/b", "principals", json!({"Suffix": "/sa/b"})),
        ("source.serviceAccount", "a/b", "serviceAccounts", json!({"namespace": "a", "serviceAccount": "b"})),
        ("destination.ip", "::1", "destinationIps", json!("::1/128")),
        ("destination.port", "80", "destinationPorts", json!(80)),
    ] {
        let mut clause = serde_json::Map::new();
        clause.insert(attribute.to_owned(), json!([expected]));
        assert_eq!(rules(&format!("[{{when: [{{key: {key}, values: ['{value}']}}]}}]")), json!([[[clause]]]), "{key}");
    }
}

#[test]
fn a_rule_without_conditions_has_no_clause_and_no_rule_is_no_rule() {
    assert_eq!(rules("[{}]"), json!([[]]));
    assert_eq!(rules("[]"), json!([]));
    assert_eq!(policy("metadata: {name: p}").unwrap().action, "Allow");
}

#[test]
fn dry_run_is_an_annotation() {
    let dry = policy("metadata: {name: p, annotations: {istio.io/dry-run: 'true'}}\nspec: {action: DENY}").unwrap();
    assert!(dry.dry_run && dry.action == "Deny");
}

#[test]
fn what_cannot_be_enforced_is_refused_with_its_field() {
    for (spec, field) in [
        ("{action: AUDIT}", "spec.action \"AUDIT\""),
        ("{action: CUSTOM}", "spec.action \"CUSTOM\""),
        ("{targetRefs: [{kind: Gateway}]}", "spec.targetRefs"),
        ("{rules: [{to: [{operation: {methods: [GET]}}]}]}", "spec.rules[0].to[0].operation.methods"),
        ("{rules: [{}, {to: [{operation: {ports: ['80']}}, {operation: {paths: [/x]}}]}]}", "spec.rules[1].to[1].operation.paths"),
        ("{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}", "spec.rules[0].from[0].source.requestPrincipals"),
        ("{rules: [{from: [{source: {remoteIpBlocks: [1.2.3.4]}}]}]}", "source.remoteIpBlocks"),
        ("{rules: [{when: [{key: 'request.headers[x]', values: [a]}]}]}", "spec.rules[0].when[0].key"),
        ("{rules: [{when: [{key: source.ip}]}]}", "when[0]: neither"),
        ("{rules: [{from: [{source: {}}]}]}", "from[0].source: is empty"),
        ("{rules: [{from: [{source: {principals: []}}]}]}", "principals: an empty list"),
        ("{rules: [{from: [{source: {principals: ['']}}]}]}", "principals: \"\""),
        ("{rules: [{from: [{source: {principals: ['a*b']}}]}]}", "principals: \"a*b\""),
        ("{rules: [{from: [{source: {principals: ['*a*']}}]}]}", "principals: \"*a*\""),
        ("{rules: [{from: [{source: {principals: ['spiffe://td/ns/a/sa/b']}}]}]}", "without spiffe://"),
        ("{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}", "ipBlocks: \"10.0.0.0/33\""),
        ("{rules: [{to: [{operation: {ports: [http]}}]}]}", "ports: \"http\""),
        ("{rules: [{to: [{operation: {ports: ['0']}}]}]}", "ports: \"0\""),
        ("{rules: [{from: [{source: {serviceAccounts: [a/b/c]}}]}]}", "serviceAccounts: \"a/b/c\""),
    ] {
        let refusal = refusal(spec);
        assert!(refusal.contains("shop/p") && refusal.contains(field), "{spec}: {refusal}");
    }
}

const STRICT: &str = "istio-system/istio_converted_static_strict";

#[test]
fn the_narrowest_peer_authentication_decides() {
    let all = peers(
        "- {metadata: {name: mesh, namespace: istio-system}, spec: {mtls: {mode: STRICT}}}\n\
         - {metadata: {name: open, namespace: open}, spec: {mtls: {mode: PERMISSIVE}}}\n\
         - {metadata: {name: one, namespace: open}, spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}}\n\
         - {metadata: {name: off, namespace: shop}, spec: {selector: {matchLabels: {app: old}}, mtls: {mode: DISABLE}}}",
    );
    for (namespace, app, expected) in
        [("shop", "web", vec![STRICT]), ("open", "other", vec![]), ("open", "web", vec![STRICT]), ("shop", "old", vec![]), ("new", "x", vec![STRICT])]
    {
        assert_eq!(peer_policy_keys(&all, namespace, &labels(app)), expected, "{namespace} {app}");
    }
    assert_eq!(json!(peer_policies(&all)[0].rules), json!([[[{"notPrincipals": [{"Presence": []}]}]]]));
    assert!(peer_policies(&[]).is_empty() && peer_policy_keys(&[], "a", &labels("b")).is_empty());
}

#[test]
fn ports_may_differ_from_their_workload() {
    let web = |spec: &str| peers(&format!("- {{metadata: {{name: p, namespace: shop}}, spec: {{selector: {{matchLabels: {{app: web}}}}, {spec}}}}}"));
    let presence = json!([{"Presence": []}]);
    let named = ["shop/converted_peer_authentication_p"];

    let all = web("mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}, 9090: {mode: DISABLE}}");
    assert_eq!(peer_policy_keys(&all, "shop", &labels("web")), named);
    let expected = json!([[[{"notPrincipals": presence}], [{"notDestinationPorts": [8080]}], [{"notDestinationPorts": [9090]}]]]);
    assert_eq!(json!(peer_policies(&all)[1].rules), expected);

    let all = web("mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}, 9090: {mode: STRICT}}");
    assert_eq!(peer_policy_keys(&all, "shop", &labels("web")), named);
    let expected = json!([[[{"notPrincipals": presence, "destinationPorts": [8080]}]], [[{"notPrincipals": presence, "destinationPorts": [9090]}]]]);
    assert_eq!(json!(peer_policies(&all)[1].rules), expected);

    let all = web("mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: STRICT}}");
    assert_eq!(peer_policy_keys(&all, "shop", &labels("web")), [STRICT]);
    assert_eq!(peer_policies(&all).len(), 1);
}

#[test]
fn peer_authentications_that_mean_nothing_are_refused() {
    for yaml in [
        "- {metadata: {name: p}, spec: {portLevelMtls: {80: {mode: STRICT}}}}",
        "- {metadata: {name: p, namespace: istio-system}, spec: {selector: {matchLabels: {a: b}}}}",
        "- {kind: Gateway, metadata: {name: p}}",
    ] {
        assert!(check_peer_authentications(&peers(yaml)).is_err(), "{yaml}");
    }
}
