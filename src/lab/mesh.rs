//! The proxies' configuration file: what a control plane would tell them about this lab (reference, node-and-control §B.2 and §B.3,
//! in the form of dataplane §5.8 and §10.2).

use serde_json::{Map, Value, json};

use super::Error;
use super::definition::{Definition, InternalTrafficPolicy, Pod, Service, TargetPort, TrafficDistribution};
use super::plan::{Addresses, Plan, hostname};
use super::policies::{ROOT_NAMESPACE, peer_policies, peer_policy_keys};
use super::waypoints::{self, ApplicationProtocol};

/// Whether a pod is behind a service.
pub(super) fn selects(service: &Service, pod: &Pod) -> bool {
    service.namespace == pod.namespace
        && !service.selector.is_empty()
        && service.selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
}

/// The workload uid of a pod.
pub(super) fn uid(pod: &Pod) -> String {
    format!("Kubernetes//Pod/{}/{}", pod.namespace, pod.name)
}

/// The whole file. JSON, which is YAML too.
pub(super) fn file(definition: &Definition, plan: &Plan) -> Result<String, Error> {
    let mut workloads: Vec<Value> = definition.pods.iter().map(|pod| workload(definition, plan, pod)).collect();
    workloads.extend(definition.extra.workloads.iter().cloned());
    let mut services: Vec<Value> = definition.services.iter().map(|one| service(definition, plan, one)).collect();
    services.extend(definition.extra.services.iter().cloned());
    let mut policies = Vec::new();
    for policy in &definition.authorization_policies {
        policies.push(json!(policy.translate()?));
    }
    policies.extend(peer_policies(&definition.peer_authentications).into_iter().map(|policy| json!(policy)));
    policies.extend(definition.extra.policies.iter().cloned());
    Ok(format!("{:#}\n", json!({"workloads": workloads, "services": services, "policies": policies})))
}

fn workload(definition: &Definition, plan: &Plan, pod: &Pod) -> Value {
    let mut entry = Map::new();
    let mut set = |name: &str, value: Value| drop(entry.insert(name.to_owned(), value));
    set("uid", json!(uid(pod)));
    set("name", json!(pod.name));
    set("namespace", json!(pod.namespace));
    set("serviceAccount", json!(pod.service_account));
    set("trustDomain", json!(pod.trust_domain));
    set("workloadIps", json!(plan.pod(pod).map(Addresses::list)));
    set("protocol", json!(if pod.captured || pod.native_tunnel { "HBONE" } else { "TCP" }));
    set("nativeTunnel", json!(pod.native_tunnel));
    if !pod.network.is_empty() {
        set("network", json!(pod.network));
    }
    if let Some(waypoint) = waypoints::of_pod(definition, plan, pod) {
        set("waypoint", waypoint);
    }
    if let Some(tunnel) = &pod.application_tunnel {
        let mut entry = json!({"protocol": if tunnel.protocol == ApplicationProtocol::Proxy { "PROXY" } else { "NONE" }});
        if let Some(port) = tunnel.port {
            entry["port"] = json!(port);
        }
        set("applicationTunnel", entry);
    }
    set("node", json!(pod.node));
    set("workloadName", json!(label(pod, &["service.istio.io/workload-name"]).unwrap_or(&pod.name)));
    set("workloadType", json!("pod"));
    let canonical = label(pod, &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]).unwrap_or(&pod.name);
    set("canonicalName", json!(canonical));
    let revision = label(pod, &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]).unwrap_or("latest");
    set("canonicalRevision", json!(revision));
    set("status", json!(if pod.ready { "Healthy" } else { "Unhealthy" }));
    set("capacity", json!(pod.capacity));
    set("clusterId", json!("Kubernetes"));
    if let Some(node) = definition.nodes.iter().find(|node| node.name == pod.node) {
        set("locality", json!({"region": node.region, "zone": node.zone, "subzone": node.subzone}));
    }
    let policies = policy_keys(definition, pod);
    if !policies.is_empty() {
        set("authorizationPolicies", json!(policies));
    }
    let services: Map<String, Value> = definition.services.iter().filter(|one| selects(one, pod)).map(|one| backing(one, pod)).collect();
    if !services.is_empty() {
        set("services", Value::Object(services));
    }
    Value::Object(entry)
}

/// The selector policies that apply to a pod, sorted, then those of PeerAuthentications.
fn policy_keys(definition: &Definition, pod: &Pod) -> Vec<String> {
    let applies = |namespace: &str| namespace == pod.namespace || namespace == ROOT_NAMESPACE;
    let mut keys: Vec<String> = definition
        .authorization_policies
        .iter()
        .filter(|policy| applies(&policy.metadata.namespace))
        .filter(|policy| policy.spec.selector.as_ref().is_some_and(|selector| selector.matches(&pod.labels)))
        .map(|policy| format!("{}/{}", policy.metadata.namespace, policy.metadata.name))
        .collect();
    keys.sort();
    keys.extend(peer_policy_keys(&definition.peer_authentications, &pod.namespace, &pod.labels));
    keys
}

/// How a pod backs a service: service port to its own port. A named port that the pod does not have is left out.
fn backing(service: &Service, pod: &Pod) -> (String, Value) {
    let target = |port: &super::definition::ServicePort| match &port.target_port {
        None => Some(port.port),
        Some(TargetPort::Number(number)) => Some(*number),
        Some(TargetPort::Name(name)) => pod.ports.iter().find(|own| own.name == *name).map(|own| own.container_port),
    };
    let ports: Map<String, Value> =
        service.ports.iter().filter_map(|port| target(port).map(|target| (port.port.to_string(), json!(target)))).collect();
    (format!("{}/{}", service.namespace, hostname(service)), Value::Object(ports))
}

fn service(definition: &Definition, plan: &Plan, service: &Service) -> Value {
    let ports: Map<String, Value> = service
        .ports
        .iter()
        .map(|port| {
            let target = match &port.target_port {
                None => port.port,
                Some(TargetPort::Number(number)) => *number,
                Some(TargetPort::Name(_)) => 0,
            };
            (port.port.to_string(), json!(target))
        })
        .collect();
    let mut entry = Map::new();
    let mut set = |name: &str, value: Value| drop(entry.insert(name.to_owned(), value));
    set("name", json!(service.name));
    set("namespace", json!(service.namespace));
    set("hostname", json!(hostname(service)));
    set("vips", json!(plan.service(service).iter().map(|address| format!("/{address}")).collect::<Vec<_>>()));
    set("ports", Value::Object(ports));
    set("canonical", json!(true));
    if let Some(families) = service.ip_families {
        set("ipFamilies", json!(format!("{families:?}")));
    }
    if let Some(waypoint) = waypoints::of_service(definition, plan, service) {
        set("waypoint", waypoint);
    }
    let weighted = waypoints::weighted(definition, plan, service);
    if !weighted.is_empty() {
        set("weightedWaypoints", Value::Array(weighted));
    }
    if let Some(balancing) = load_balancer(service) {
        set("loadBalancer", balancing);
    }
    Value::Object(entry)
}

fn load_balancer(service: &Service) -> Option<Value> {
    let (mode, preferences): (&str, &[&str]) = if service.passthrough {
        ("Passthrough", &[])
    } else if service.internal_traffic_policy == InternalTrafficPolicy::Local {
        ("Strict", &["Node"])
    } else {
        match service.traffic_distribution {
            Some(TrafficDistribution::PreferClose | TrafficDistribution::PreferSameZone) => ("Failover", &["Network", "Region", "Zone"]),
            Some(TrafficDistribution::PreferSameNode) => ("Failover", &["Network", "Region", "Zone", "Subzone", "Node"]),
            None if service.publish_not_ready_addresses => ("Standard", &[]),
            None => return None,
        }
    };
    let health = if service.publish_not_ready_addresses || service.passthrough { "AllowAll" } else { "OnlyHealthy" };
    Some(json!({"routingPreferences": preferences, "mode": mode, "healthPolicy": health}))
}

fn label<'a>(pod: &'a Pod, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| pod.labels.get(*name)).map(String::as_str)
}

#[cfg(test)]
mod tests;
