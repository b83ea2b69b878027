//! Waypoints of a lab: who has which, and what the proxies are told of it (reference, node-and-control §B.5).

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Error;
use super::definition::{Definition, Pod, Service};
use super::mesh::selects;
use super::plan::{Plan, hostname, pod_key};

/// Says that something has no waypoint although its namespace has one.
const NONE: &str = "none";

/// What holds for a whole namespace.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// The waypoint of everything in it: a service or a pod, as NAME or NAMESPACE/NAME.
    pub waypoint: String,
    /// Which traffic it is for.
    #[serde(default)]
    pub waypoint_for: WaypointFor,
}

/// Which traffic a namespace's waypoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WaypointFor {
    /// That to services.
    #[default]
    Service,
    /// That to the addresses of pods.
    Workload,
    /// Both.
    All,
}

/// One of several waypoints of a service.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeightedWaypoint {
    /// A service or a pod, as NAME or NAMESPACE/NAME.
    pub waypoint: String,
    /// Its share of the connections.
    pub weight: u32,
}

/// How a captured pod that is a waypoint gets its connections.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApplicationTunnel {
    /// Whether each begins with a PROXY header.
    pub protocol: ApplicationProtocol,
    /// The port to which all of them go; without it they keep theirs.
    #[serde(default)]
    pub port: Option<u16>,
}

/// What is in front of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum ApplicationProtocol {
    /// Nothing.
    #[serde(rename = "NONE")]
    None,
    /// A PROXY header, version 2.
    #[serde(rename = "PROXY")]
    Proxy,
}

/// What a waypoint's name stands for.
enum Waypoint<'a> {
    Service(&'a Service),
    Pod(&'a Pod),
}

fn find<'a>(definition: &'a Definition, (namespace, name): (&str, &str)) -> Option<Waypoint<'a>> {
    let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
    let service = definition.services.iter().find(|service| service.namespace == namespace && service.name == name);
    let pod = || definition.pods.iter().find(|pod| pod.namespace == namespace && pod.name == name);
    service.map(Waypoint::Service).or_else(|| pod().map(Waypoint::Pod))
}

/// All names of waypoints, each with the namespace that it is said in.
fn named(definition: &Definition) -> impl Iterator<Item = (&str, &str)> {
    let namespaces = definition.namespaces.iter().map(|one| (one.name.as_str(), one.waypoint.as_str()));
    let services = definition.services.iter().flat_map(|one| {
        let weighted = one.weighted_waypoints.iter().map(|weighted| &weighted.waypoint);
        one.waypoint.iter().chain(weighted).map(|waypoint| (one.namespace.as_str(), waypoint.as_str()))
    });
    let pods = definition.pods.iter().filter_map(|one| Some((one.namespace.as_str(), one.waypoint.as_deref()?)));
    namespaces.chain(services).chain(pods).filter(|(_, name)| *name != NONE)
}

/// Checks that every waypoint exists and every namespace is said once.
pub(super) fn check(definition: &Definition) -> Result<(), Error> {
    let mut names = BTreeSet::new();
    for namespace in &definition.namespaces {
        if !names.insert(&namespace.name) {
            return Err(Error::Definition(format!("namespaces: {} comes twice", namespace.name)));
        }
    }
    match named(definition).find(|name| find(definition, *name).is_none()) {
        None => Ok(()),
        Some((namespace, name)) => {
            Err(Error::Definition(format!("waypoint {name:?} (said in namespace {namespace}) is neither a service nor a pod of this file")))
        }
    }
}

/// Waypoints have none themselves.
fn is_waypoint(definition: &Definition, candidate: &Waypoint<'_>) -> bool {
    named(definition).filter_map(|name| find(definition, name)).any(|waypoint| match (&waypoint, candidate) {
        (Waypoint::Service(waypoint), Waypoint::Service(one)) => std::ptr::eq(*waypoint, *one),
        (Waypoint::Service(waypoint), Waypoint::Pod(one)) => selects(waypoint, one),
        (Waypoint::Pod(waypoint), Waypoint::Pod(one)) => std::ptr::eq(*waypoint, *one),
        (Waypoint::Pod(_), Waypoint::Service(_)) => false,
    })
}

/// The waypoint of a service as its entry shows it.
pub(super) fn of_service(definition: &Definition, plan: &Plan, service: &Service) -> Option<Value> {
    let inherited = inherited(definition, &service.namespace, WaypointFor::Service);
    let name = service.waypoint.as_deref().or(inherited).filter(|_| !is_waypoint(definition, &Waypoint::Service(service)))?;
    entry(definition, plan, (&service.namespace, name))
}

/// The weighted waypoints of a service as its entry shows them.
pub(super) fn weighted(definition: &Definition, plan: &Plan, service: &Service) -> Vec<Value> {
    let weighted = service.weighted_waypoints.iter();
    let shown =
        |one: &WeightedWaypoint| Some(json!({"destination": entry(definition, plan, (&service.namespace, &one.waypoint))?, "weight": one.weight}));
    weighted.filter_map(shown).collect()
}

/// The waypoint of a pod as its entry shows it.
pub(super) fn of_pod(definition: &Definition, plan: &Plan, pod: &Pod) -> Option<Value> {
    let inherited = inherited(definition, &pod.namespace, WaypointFor::Workload);
    let name = pod.waypoint.as_deref().or(inherited).filter(|_| !is_waypoint(definition, &Waypoint::Pod(pod)))?;
    entry(definition, plan, (&pod.namespace, name))
}

fn inherited<'a>(definition: &'a Definition, namespace: &str, traffic: WaypointFor) -> Option<&'a str> {
    let found = definition.namespaces.iter().find(|one| one.name == namespace)?;
    (found.waypoint_for == WaypointFor::All || found.waypoint_for == traffic).then_some(found.waypoint.as_str())
}

fn entry(definition: &Definition, plan: &Plan, name: (&str, &str)) -> Option<Value> {
    let destination = match find(definition, name)? {
        Waypoint::Service(service) => format!("{}/{}", service.namespace, hostname(service)),
        Waypoint::Pod(pod) => format!("{}/{}", pod.network, plan.pod(pod)?.v4),
    };
    Some(json!({"destination": destination}))
}

/// Fills in what the files of a pod say in `@{…}`: `files`, the directory in which they are; `pod:NAME` and `service:NAME`, IPv4 addresses of
/// pods and services, as NAME or NAMESPACE/NAME.
pub(super) fn fill_in(text: &str, definition: &Definition, plan: &Plan, (pod, files): (&Pod, &str)) -> Result<String, Error> {
    let split = |name: &str| {
        let (namespace, name) = name.split_once('/').unwrap_or((&pod.namespace, name));
        (namespace.to_owned(), name.to_owned())
    };
    let pod_address = |name: &str| {
        let name = split(name);
        let found = definition.pods.iter().find(|one| (&one.namespace, &one.name) == (&name.0, &name.1))?;
        Some(plan.pod(found)?.v4.to_string())
    };
    let service_address = |name: &str| {
        let name = split(name);
        let found = definition.services.iter().find(|one| (&one.namespace, &one.name) == (&name.0, &name.1))?;
        plan.service(found).iter().find(|ip| ip.is_ipv4()).map(ToString::to_string)
    };
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("@{") {
        let (word, after) = after.split_once('}').unwrap_or(("", after));
        let value = match word.split_once(':') {
            None if word == "files" => Some(files.to_owned()),
            Some(("pod", name)) => pod_address(name),
            Some(("service", name)) => service_address(name),
            _ => None,
        };
        let unknown = || Error::Definition(format!("pod {}: files: nothing is known to put in the place of @{{{word}}}", pod_key(pod)));
        filled.push_str(before);
        filled.push_str(&value.ok_or_else(unknown)?);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const LAB: &str = "
nodes: [a]
namespaces:
- {name: default, waypoint: way, waypointFor: all}
- {name: shop, waypoint: default/way}
pods:
- {name: way, node: a, labels: {app: way}, captured: false, nativeTunnel: true}
- {name: canary, node: a}
- {name: web, node: a, labels: {app: web}}
- {name: free, node: a, waypoint: none}
- {name: seller, namespace: shop, node: a}
services:
- {name: way, selector: {app: way}, ports: [{port: 15008}]}
- {name: web, selector: {app: web}, ports: [{port: 80}]}
- {name: free, ports: [{port: 80}], waypoint: none}
- {name: mixed, ports: [{port: 80}], weightedWaypoints: [{waypoint: way, weight: 90}, {waypoint: canary, weight: 10}]}
- {name: till, namespace: shop, ports: [{port: 80}]}
";

    fn planned(text: &str) -> (Definition, Plan) {
        let definition = Definition::parse(text).unwrap();
        let mut plan = Plan::default();
        plan.assign(&definition).unwrap();
        (definition, plan)
    }

    #[test]
    fn what_a_namespace_says_holds_for_all_in_it_but_waypoints_and_those_that_say_otherwise() {
        let (definition, plan) = planned(LAB);
        let way = Some(json!({"destination": "default/way.default.svc.cluster.local"}));
        for (name, expected) in [("way", None), ("web", way.clone()), ("free", None), ("mixed", way.clone()), ("till", way.clone())] {
            let service = definition.services.iter().find(|service| service.name == name).unwrap();
            assert_eq!(of_service(&definition, &plan, service), expected, "service {name}");
        }
        // The namespace `shop` has its waypoint for services only.
        for (name, expected) in [("way", None), ("canary", None), ("web", way), ("free", None), ("seller", None)] {
            let pod = definition.pods.iter().find(|pod| pod.name == name).unwrap();
            assert_eq!(of_pod(&definition, &plan, pod), expected, "pod {name}");
        }
        let mixed = definition.services.iter().find(|service| service.name == "mixed").unwrap();
        let expected = [
            json!({"destination": {"destination": "default/way.default.svc.cluster.local"}, "weight": 90}),
            json!({"destination": {"destination": "/10.244.1.3"}, "weight": 10}),
        ];
        assert_eq!(weighted(&definition, &plan, mixed), expected);
    }

    #[test]
    fn a_waypoint_that_does_not_exist_is_refused() {
        for (more, words) in [
            ("pods: [{name: x, node: a, waypoint: gone}]", "\"gone\" (said in namespace default)"),
            ("services: [{name: x, ports: [{port: 1}], waypoint: other/gone}]", "\"other/gone\""),
            ("services: [{name: x, ports: [{port: 1}], weightedWaypoints: [{waypoint: gone, weight: 1}]}]", "\"gone\""),
            ("namespaces: [{name: default, waypoint: gone}]", "\"gone\""),
            ("namespaces: [{name: x, waypoint: none}, {name: x, waypoint: none}]", "x comes twice"),
        ] {
            let refused = Definition::parse(&format!("nodes: [a]\n{more}")).expect_err(more).to_string();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn files_name_addresses_by_pods_and_services() {
        let (definition, plan) = planned(LAB);
        let fill = |text| fill_in(text, &definition, &plan, (&definition.pods[0], "/run/x"));
        let filled = fill("{a: @{pod:web}:80, b: @{service:web}, c: @{pod:shop/seller}, d: \"@{files}/chain.pem\", e: %REQ(X)%}");
        assert_eq!(filled.unwrap(), "{a: 10.244.1.4:80, b: 10.96.0.2, c: 10.244.1.6, d: \"/run/x/chain.pem\", e: %REQ(X)%}");
        for bad in ["@{pod:gone}", "@{service:canary}", "@{thing}", "@{pod:web", "@{}"] {
            assert!(fill(bad).is_err(), "{bad}");
        }
    }
}
