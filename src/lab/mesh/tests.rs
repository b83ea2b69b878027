#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::discovery::local::{Config, LocalSource, start};

const LAB: &str = "
nodes: [{name: a, region: r, zone: z}, b]
pods:
- {name: web-0, node: a, labels: {app: web, version: v2}, ports: [{name: http, containerPort: 8080}]}
- {name: web-1, node: b, labels: {app: web}, ready: false, capacity: 3, serviceAccount: web, trustDomain: other.test}
- {name: plain, namespace: shop, node: a, captured: false, labels: {app: web}}
services:
- {name: web, selector: {app: web}, ports: [{port: 80, targetPort: http}, {port: 90, targetPort: 9090}], trafficDistribution: PreferClose}
- {name: local, selector: {app: web}, ports: [{port: 80}], internalTrafficPolicy: Local, ipFamilies: IPv4}
- {name: pods, selector: {app: web}, ports: [{port: 80}], headless: true, publishNotReadyAddresses: true}
- {name: outside, ports: [{port: 443}], passthrough: true, addresses: [192.0.2.1]}
authorizationPolicies:
- {metadata: {name: z}, spec: {selector: {matchLabels: {app: web}}, action: DENY, rules: [{from: [{source: {notPrincipals: ['*']}}]}]}}
- {metadata: {name: a, namespace: istio-system}, spec: {selector: {matchLabels: {app: web}}, rules: [{}]}}
- {metadata: {name: everybody}}
peerAuthentications:
- {metadata: {name: mesh, namespace: shop}, spec: {mtls: {mode: STRICT}}}
extra:
  services: [{name: more, namespace: default, hostname: more.test, vips: [/192.0.2.7], ports: {'80': 80}}]
";

fn generated(text: &str) -> (Plan, Value) {
    let definition = Definition::parse(text).unwrap();
    let mut plan = Plan::default();
    plan.assign(&definition).unwrap();
    let file = file(&definition, &plan).unwrap();
    (plan, serde_json::from_str(&file).unwrap())
}

fn entry<'a>(mesh: &'a Value, list: &str, name: &str) -> &'a Value {
    mesh[list].as_array().unwrap().iter().find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("no {name} in {list}"))
}

#[tokio::test]
async fn a_proxy_takes_the_file() {
    let (_, mesh) = generated(LAB);
    let mesh = start(LocalSource::Text(mesh.to_string()), Config::default()).await.unwrap_or_else(|error| panic!("{error}"));
    let world = mesh.current();
    assert_eq!((world.snapshot.workloads().count(), world.snapshot.services().count(), world.policies.iter().count()), (3, 5, 4));
}

#[test]
fn a_pod_becomes_a_workload() {
    let (_, mesh) = generated(LAB);
    let web = entry(&mesh, "workloads", "web-0");
    for (field, expected) in [
        ("uid", json!("Kubernetes//Pod/default/web-0")),
        ("workloadIps", json!(["10.244.1.2", "fd00:10:244:1::2"])),
        ("protocol", json!("HBONE")),
        ("status", json!("Healthy")),
        ("canonicalName", json!("web")),
        ("canonicalRevision", json!("v2")),
        ("locality", json!({"region": "r", "zone": "z", "subzone": ""})),
        ("authorizationPolicies", json!(["default/z", "istio-system/a"])),
    ] {
        assert_eq!(web[field], expected, "{field}");
    }
    let other = entry(&mesh, "workloads", "web-1");
    assert_eq!((&other["status"], &other["capacity"], &other["trustDomain"]), (&json!("Unhealthy"), &json!(3), &json!("other.test")));
    let plain = entry(&mesh, "workloads", "plain");
    assert_eq!((&plain["protocol"], &plain["services"]), (&json!("TCP"), &Value::Null));
    assert_eq!(plain["authorizationPolicies"], json!(["istio-system/a", "istio-system/istio_converted_static_strict"]));
}

#[test]
fn a_named_port_is_the_pods_own_and_left_out_where_it_has_none() {
    let (_, mesh) = generated(LAB);
    let ports = |pod: &str| entry(&mesh, "workloads", pod)["services"]["default/web.default.svc.cluster.local"].clone();
    assert_eq!(ports("web-0"), json!({"80": 8080, "90": 9090}));
    assert_eq!(ports("web-1"), json!({"90": 9090}));
    assert_eq!(entry(&mesh, "services", "web")["ports"], json!({"80": 0, "90": 9090}));
}

#[test]
fn a_service_has_two_addresses_or_none_or_its_own() {
    let (_, mesh) = generated(LAB);
    assert_eq!(entry(&mesh, "services", "web")["vips"], json!(["/10.96.0.1", "/fd00:10:96::1"]));
    assert_eq!(entry(&mesh, "services", "pods")["vips"], json!([]));
    assert_eq!(entry(&mesh, "services", "outside")["vips"], json!(["/192.0.2.1"]));
}

#[test]
fn traffic_settings_become_modes() {
    let (_, mesh) = generated(LAB);
    for (service, mode, preferences, health) in [
        ("web", "Failover", json!(["Network", "Region", "Zone"]), "OnlyHealthy"),
        ("local", "Strict", json!(["Node"]), "OnlyHealthy"),
        ("pods", "Standard", json!([]), "AllowAll"),
        ("outside", "Passthrough", json!([]), "AllowAll"),
    ] {
        let expected = json!({"mode": mode, "routingPreferences": preferences, "healthPolicy": health});
        assert_eq!(entry(&mesh, "services", service)["loadBalancer"], expected, "{service}");
    }
}

#[test]
fn addresses_stay_when_neighbours_come_and_go() {
    let first =
        Definition::parse("nodes: [a, b]\npods: [{name: x, node: a}, {name: y, node: a}]\nservices: [{name: s, ports: [{port: 1}]}]").unwrap();
    let text = "nodes: [a, b]\npods: [{name: w, node: a}, {name: y, node: a}, {name: z, node: b}]\n\
                services: [{name: r, ports: [{port: 1}]}, {name: s, ports: [{port: 1}]}]";
    let second = Definition::parse(text).unwrap();
    let mut plan = Plan::default();
    plan.assign(&first).unwrap();
    let (y, s) = (plan.pod(&first.pods[1]).unwrap(), plan.service(&first.services[0]).to_vec());
    plan.assign(&second).unwrap();
    assert_eq!((plan.pod(&second.pods[1]).unwrap(), plan.service(&second.services[1])), (y, s.as_slice()));
    let mut all: Vec<_> = second.pods.iter().map(|pod| plan.pod(pod).unwrap().v4).collect();
    all.dedup();
    assert_eq!(all.len(), 3);
    assert!(plan.assign(&Definition::parse("nodes: [a, c]").unwrap()).is_err());
}

#[test]
fn hosts_has_every_name_that_kubernetes_gives() {
    let definition = Definition::parse(LAB).unwrap();
    let (plan, _) = generated(LAB);
    let seen = |pod: usize| plan.hosts(&definition, &definition.pods[pod]);
    let line =
        |text: &str, start: &str| text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no {start} in {text}")).to_owned();
    assert_eq!(line(&seen(0), "10.96.0.1 "), "10.96.0.1 web.default.svc.cluster.local web.default.svc web.default web");
    assert_eq!(line(&seen(2), "10.96.0.1 "), "10.96.0.1 web.default.svc.cluster.local web.default.svc web.default");
    assert_eq!(line(&seen(0), "10.244.1.2 pods"), "10.244.1.2 pods.default.svc.cluster.local pods.default.svc pods.default pods");
    assert!(line(&seen(0), "10.244.1.2 web-0").ends_with(" web-0") && !line(&seen(2), "10.244.1.2 web-0").ends_with(" web-0"));
}
