//! A service as the config dump and the static file write it (reference, dataplane §10.2).

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Refusal;
use super::scalar::{As, Flag, Word};
use super::workload::{GatewayForm, Ports, port_map, ports_of};
use crate::model::{
    HealthPolicy, HealthStatus, IpFamilies, LoadBalancing, LoadBalancingMode, NetworkAddress, PortMap, Scope, Service, Text, Visibility,
    WeightedWaypoint, Workload,
};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServiceForm {
    pub(super) name: Text,
    pub(super) namespace: Text,
    pub(super) hostname: Text,
    #[serde(default)]
    vips: Vec<As<NetworkAddress>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<CidrForm>,
    #[serde(default)]
    pub(super) ports: Ports,
    #[serde(default)]
    pub(super) endpoints: BTreeMap<Text, EndpointForm>,
    #[serde(default)]
    subject_alt_names: Vec<Text>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayForm>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<WeightedForm>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    load_balancer: Option<LoadBalancerForm>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ip_families: Option<Word<IpFamilies>>,
    #[serde(default)]
    canonical: Flag,
    #[serde(default)]
    visibility: Word<Visibility>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CidrForm {
    #[serde(default)]
    network: Text,
    cidr: As<IpNet>,
}

/// One endpoint of a service. In a file it says which ports a workload serves; `status` is there because dumps show it, the
/// status of the workload decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct EndpointForm {
    pub(super) workload_uid: Text,
    #[serde(default)]
    pub(super) port: Ports,
    #[serde(default)]
    status: Word<HealthStatus>,
}

impl EndpointForm {
    pub(super) fn of(workload: &Workload, ports: &PortMap) -> Self {
        Self { workload_uid: workload.uid.clone(), port: ports_of(ports), status: Word(workload.status) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WeightedForm {
    destination: GatewayForm,
    weight: As<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LoadBalancerForm {
    #[serde(default)]
    routing_preferences: Vec<Word<Scope>>,
    #[serde(default)]
    mode: Word<LoadBalancingMode>,
    #[serde(default)]
    health_policy: Word<HealthPolicy>,
}

impl ServiceForm {
    pub(super) fn of(service: &Service, endpoints: BTreeMap<Text, EndpointForm>) -> Self {
        Self {
            name: service.name.clone(),
            namespace: service.namespace.clone(),
            hostname: service.hostname.clone(),
            vips: service.vips.iter().cloned().map(As).collect(),
            cidr_vips: service.cidr_vips.iter().map(|(network, cidr)| CidrForm { network: network.clone(), cidr: As(*cidr) }).collect(),
            ports: ports_of(&service.ports),
            endpoints,
            subject_alt_names: service.subject_alt_names.clone(),
            waypoint: service.waypoint.as_ref().map(GatewayForm::from),
            weighted_waypoints: service
                .weighted_waypoints
                .iter()
                .map(|waypoint| WeightedForm { destination: GatewayForm::from(&waypoint.destination), weight: As(waypoint.weight) })
                .collect(),
            load_balancer: service.load_balancing.as_ref().map(|balancing| LoadBalancerForm {
                routing_preferences: balancing.routing_preference.iter().copied().map(Word).collect(),
                mode: Word(balancing.mode),
                health_policy: Word(balancing.health_policy),
            }),
            ip_families: service.ip_families.map(Word),
            canonical: Flag(service.canonical),
            visibility: Word(service.visibility),
        }
    }

    pub(super) fn into_row(self) -> Result<Service, Refusal> {
        for (field, text) in [("namespace", &self.namespace), ("hostname", &self.hostname)] {
            if text.is_empty() || text.contains('/') {
                return Err(Refusal::at(field, "expected a name without '/'"));
            }
        }
        Ok(Service {
            name: self.name,
            namespace: self.namespace,
            hostname: self.hostname,
            vips: self.vips.into_iter().map(|vip| vip.0).collect(),
            cidr_vips: self.cidr_vips.into_iter().map(|vip| (vip.network, vip.cidr.0)).collect(),
            ports: port_map(&self.ports),
            subject_alt_names: self.subject_alt_names,
            waypoint: self.waypoint.map(Into::into),
            weighted_waypoints: self
                .weighted_waypoints
                .into_iter()
                .map(|waypoint| WeightedWaypoint { destination: waypoint.destination.into(), weight: waypoint.weight.0 })
                .collect(),
            load_balancing: self.load_balancer.map(|form| LoadBalancing {
                routing_preference: form.routing_preferences.into_iter().map(|scope| scope.0).collect(),
                mode: form.mode.0,
                health_policy: form.health_policy.0,
            }),
            ip_families: self.ip_families.map(|families| families.0),
            canonical: self.canonical.0,
            visibility: self.visibility.0,
        })
    }
}
