#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;

fn refusal(text: &str) -> String {
    Definition::parse(text).expect_err(text).to_string()
}

#[test]
fn every_mistake_is_refused_with_its_place() {
    let long = "x".repeat(64);
    let table: &[(&str, &[&str])] = &[
        ("", &["line"]),
        ("nodes: []", &["nodes", "1 to 250"]),
        ("nodes: [a, a]", &["\"a\" is taken"]),
        ("nodes: [fabric]", &["\"fabric\" is taken"]),
        ("nodes: [A]", &["node \"A\""]),
        ("nodes: ['../x']", &["node \"../x\""]),
        (&format!("nodes: [{long}]"), &["1 to 63"]),
        ("nodes: [{nam: a}]", &["line 1", "expected a node"]),
        ("nodes: [a]\nnodes: [b]", &["line 2", "nodes"]),
        ("nodes: [a]\npods:\n- name: x\n  node: a\n  captred: true", &["line 5", "captred"]),
        ("nodes: [a]\npods:\n- name: x\n  node: a\n  captured: maybe", &["line 5", "boolean"]),
        ("nodes: [a]\npods:\n- name: x\n  node: b", &["pod x", "\"b\""]),
        ("nodes: [a]\npods:\n- name: x\n", &["node"]),
        ("nodes: [a]\npods: [{name: x, node: a}, {name: x, node: a}]", &["two pods default/x"]),
        ("nodes: [a]\npods: [{name: x, node: a, command: []}]", &["pod x", "command is empty"]),
        ("nodes: [a]\npods: [{name: x, node: a, command: {a: b}}]", &["line 2", "expected a command"]),
        ("nodes: [a]\npods: [{name: x, node: a, waitFor: [80]}]", &["waitFor needs a command"]),
        ("nodes: [a]\npods: [{name: x, node: a, dedicated: true, captured: false}]", &["dedicated needs captured"]),
        ("nodes: [a]\npods: [{name: x, node: a, waitFor: [99999], command: [a]}]", &["line 2", "u16"]),
        ("nodes: [a]\nservices: [{name: s, ports: []}]", &["service s", "ports"]),
        ("nodes: [a]\nservices: [{name: s, ports: [{port: 0}]}]", &["service s", "ports"]),
        ("nodes: [a]\nservices: [{name: s, ports: [{port: 1}, {port: 1}]}]", &["service s", "each number once"]),
        ("nodes: [a]\nservices: [{name: s, ports: [{port: 1}]}, {name: s, ports: [{port: 1}]}]", &["two of this name"]),
        ("nodes: [a]\nservices: [{name: s, headless: true, addresses: [1.2.3.4], ports: [{port: 1}]}]", &["headless"]),
        ("nodes: [a]\nservices: [{name: s, ports: [{port: 1, targetPort: [1]}]}]", &["line 2", "expected a target port"]),
        ("nodes: [a]\nservices: [{name: s, ports: [{port: 1}], trafficDistribution: Near}]", &["line 2", "Near"]),
        ("nodes: [a]\nextra: {workload: []}", &["line 2", "workload"]),
    ];
    for (text, words) in table {
        let refusal = refusal(text);
        assert!(words.iter().all(|word| refusal.contains(word)), "{text:?}: {refusal}");
        assert_eq!(refusal.lines().count(), 1, "{refusal}");
    }
}

#[test]
fn a_node_is_a_name_or_a_map_and_a_command_is_a_list_or_a_line() {
    let definition = Definition::parse(
        "nodes: [a, {name: b, zone: z}]\n\
         pods:\n\
         - {name: x, node: a, command: [sleep, '1']}\n\
         - {name: y, node: b, command: sleep 1}\n\
         services: [{name: s, ports: [{port: 80, targetPort: http}, {port: 81, targetPort: 8081}, {port: 82}]}]",
    )
    .unwrap();
    assert_eq!((definition.nodes[0].name.as_str(), definition.nodes[1].zone.as_str()), ("a", "z"));
    assert_eq!(definition.pods[0].command.as_ref().unwrap().arguments(), ["sleep", "1"]);
    assert_eq!(definition.pods[1].command.as_ref().unwrap().arguments(), ["/bin/sh", "-c", "sleep 1"]);
    assert!(definition.pods[0].captured && definition.pods[0].ready && definition.pods[0].capacity == 1);
    let targets: Vec<_> = definition.services[0].ports.iter().map(|port| port.target_port.clone()).collect();
    assert_eq!(targets, [Some(TargetPort::Name("http".to_owned())), Some(TargetPort::Number(8081)), None]);
}

#[test]
fn the_examples_are_good() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/lab");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        Definition::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        count += 1;
    }
    assert!(count >= 2);
}
