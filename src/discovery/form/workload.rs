//! A workload as the config dump and the static file write it (reference, dataplane §10.2).

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use super::Refusal;
use super::scalar::{As, Flag, PolicyKey, RealPort, Word};
use crate::model::{
    ApplicationProtocol, ApplicationTunnel, GatewayAddress, GatewayDestination, HealthStatus, Locality, NamespacedHostname, NetworkMode, PortMap,
    Profile, SpiffeId, Text, TunnelProtocol, Workload, WorkloadKind,
};

/// The port on which gateways and waypoints take HBONE when a file names none.
const HBONE_PORT: u16 = 15008;

/// Service port to target port; target 0 is a named port.
pub(super) type Ports = BTreeMap<As<RealPort>, As<u16>>;

pub(super) fn ports_of(map: &PortMap) -> Ports {
    map.iter().map(|(port, target)| (As(RealPort(port)), As(target))).collect()
}

pub(super) fn port_map(ports: &Ports) -> PortMap {
    ports.iter().map(|(port, target)| (port.0.0, target.0)).collect()
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WorkloadForm {
    #[serde(default)]
    pub(super) workload_ips: Vec<As<IpAddr>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) waypoint: Option<GatewayForm>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) network_gateway: Option<GatewayForm>,
    #[serde(default)]
    pub(super) protocol: Word<TunnelProtocol>,
    #[serde(default)]
    pub(super) network_mode: Word<NetworkMode>,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) uid: Text,
    #[serde(default)]
    pub(super) name: Text,
    pub(super) namespace: Text,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) trust_domain: Text,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) service_account: Text,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) network: Text,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) workload_name: Text,
    #[serde(default)]
    pub(super) workload_type: Word<WorkloadKind>,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) canonical_name: Text,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) canonical_revision: Text,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) hostname: Text,
    #[serde(default, skip_serializing_if = "is_empty")]
    pub(super) node: Text,
    #[serde(default, skip_serializing_if = "Flag::is_false")]
    pub(super) native_tunnel: Flag,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) application_tunnel: Option<ApplicationTunnelForm>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) authorization_policies: Vec<As<PolicyKey>>,
    #[serde(default)]
    pub(super) status: Word<HealthStatus>,
    #[serde(default)]
    pub(super) cluster_id: Text,
    #[serde(default, skip_serializing_if = "LocalityForm::is_empty")]
    pub(super) locality: LocalityForm,
    #[serde(default, skip_serializing_if = "ServicesForm::is_empty")]
    pub(super) services: ServicesForm,
    #[serde(default = "one")]
    pub(super) capacity: As<u32>,
}

fn is_empty(text: &Text) -> bool {
    text.as_str().is_empty()
}

fn one() -> As<u32> {
    As(1)
}

fn hbone_port() -> As<RealPort> {
    As(RealPort(HBONE_PORT))
}

fn or(text: Text, default: &Text) -> Text {
    if is_empty(&text) { default.clone() } else { text }
}

/// Where a waypoint or gateway is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct GatewayForm {
    pub(super) destination: As<GatewayDestination>,
    #[serde(default = "hbone_port")]
    pub(super) hbone_mtls_port: As<RealPort>,
}

impl From<&GatewayAddress> for GatewayForm {
    fn from(gateway: &GatewayAddress) -> Self {
        Self { destination: As(gateway.destination.clone()), hbone_mtls_port: As(RealPort(gateway.hbone_port)) }
    }
}

impl From<GatewayForm> for GatewayAddress {
    fn from(form: GatewayForm) -> Self {
        Self { destination: form.destination.0, hbone_port: form.hbone_mtls_port.0.0 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ApplicationTunnelForm {
    #[serde(default)]
    protocol: Word<ApplicationProtocol>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    port: Option<As<RealPort>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct LocalityForm {
    #[serde(default)]
    region: Text,
    #[serde(default)]
    zone: Text,
    #[serde(default)]
    subzone: Text,
}

impl LocalityForm {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The services that a workload backs. A file maps each to its ports; a dump lists their keys only and shows the ports at the
/// endpoints of the service, where they are looked up again when a dump is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ServicesForm {
    Keys(Vec<As<NamespacedHostname>>),
    Ports(Vec<(As<NamespacedHostname>, Ports)>),
}

impl ServicesForm {
    fn is_empty(&self) -> bool {
        match self {
            Self::Keys(keys) => keys.is_empty(),
            Self::Ports(ports) => ports.is_empty(),
        }
    }
}

impl Default for ServicesForm {
    fn default() -> Self {
        Self::Ports(Vec::new())
    }
}

impl Serialize for ServicesForm {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Keys(keys) => serializer.collect_seq(keys),
            Self::Ports(ports) => serializer.collect_map(ports.iter().map(|(key, ports)| (key, ports))),
        }
    }
}

impl<'de> Deserialize<'de> for ServicesForm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = ServicesForm;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map from <namespace>/<host name> to ports, or a list of <namespace>/<host name>")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ServicesForm, A::Error> {
                let mut ports = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    ports.push(entry);
                }
                Ok(ServicesForm::Ports(ports))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ServicesForm, A::Error> {
                let mut keys = Vec::new();
                while let Some(key) = seq.next_element()? {
                    keys.push(key);
                }
                Ok(ServicesForm::Keys(keys))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl WorkloadForm {
    /// The form of a static file: services with their ports.
    pub(super) fn of(workload: &Workload) -> Self {
        let profile = &*workload.profile;
        Self {
            workload_ips: workload.addresses.iter().copied().map(As).collect(),
            waypoint: profile.waypoint.as_ref().map(GatewayForm::from),
            network_gateway: profile.network_gateway.as_ref().map(GatewayForm::from),
            protocol: Word(profile.protocol),
            network_mode: Word(profile.network_mode),
            uid: workload.uid.clone(),
            name: (&workload.name).into(),
            namespace: profile.namespace.clone(),
            trust_domain: profile.trust_domain.clone(),
            service_account: profile.service_account.clone(),
            network: profile.network.clone(),
            workload_name: profile.workload_name.clone(),
            workload_type: Word(profile.kind),
            canonical_name: profile.canonical_name.clone(),
            canonical_revision: profile.canonical_revision.clone(),
            hostname: workload.hostname.clone(),
            node: workload.node.clone(),
            native_tunnel: Flag(profile.native_tunnel),
            application_tunnel: profile
                .application_tunnel
                .map(|tunnel| ApplicationTunnelForm { protocol: Word(tunnel.protocol), port: tunnel.port.map(|port| As(RealPort(port))) }),
            authorization_policies: profile.authorization_policies.iter().cloned().map(PolicyKey).map(As).collect(),
            status: Word(workload.status),
            cluster_id: profile.cluster_id.clone(),
            locality: LocalityForm {
                region: profile.locality.region.clone(),
                zone: profile.locality.zone.clone(),
                subzone: profile.locality.subzone.clone(),
            },
            services: ServicesForm::Ports(profile.services.iter().map(|(key, ports)| (As(key.clone()), ports_of(ports))).collect()),
            capacity: As(workload.capacity),
        }
    }

    /// The form of a dump's `workloads` section: services by key.
    pub(super) fn listed(workload: &Workload) -> Self {
        let services = workload.profile.services.iter().map(|(key, _)| As(key.clone())).collect();
        Self { services: ServicesForm::Keys(services), ..Self::of(workload) }
    }

    /// The uid: the one that is written, or that of a pod of this cluster (reference, dataplane §5.2).
    pub(super) fn key(&self) -> Result<Text, Refusal> {
        if !is_empty(&self.uid) {
            return Ok(self.uid.clone());
        }
        if is_empty(&self.name) {
            return Err(Refusal::here("a workload needs a uid, or a name to make one of"));
        }
        let cluster = or(self.cluster_id.clone(), &Profile::default().cluster_id);
        Ok(format!("{cluster}//Pod/{}/{}", self.namespace, self.name).into())
    }

    /// The row, with the services that the document worked out for it.
    pub(super) fn into_row(self, uid: Text, services: Vec<(NamespacedHostname, PortMap)>) -> Result<Workload, Refusal> {
        let defaults = Profile::default();
        let profile = Profile {
            namespace: self.namespace,
            network: self.network,
            protocol: self.protocol.0,
            trust_domain: or(self.trust_domain, &defaults.trust_domain),
            service_account: or(self.service_account, &defaults.service_account),
            waypoint: self.waypoint.map(Into::into),
            network_gateway: self.network_gateway.map(Into::into),
            canonical_name: self.canonical_name,
            canonical_revision: self.canonical_revision,
            kind: self.workload_type.0,
            workload_name: self.workload_name,
            native_tunnel: self.native_tunnel.0,
            authorization_policies: self.authorization_policies.into_iter().map(|key| key.0.0).collect(),
            cluster_id: or(self.cluster_id, &defaults.cluster_id),
            services,
            application_tunnel: self
                .application_tunnel
                .map(|tunnel| ApplicationTunnel { protocol: tunnel.protocol.0, port: tunnel.port.map(|port| port.0.0) }),
            locality: Locality { region: self.locality.region, zone: self.locality.zone, subzone: self.locality.subzone },
            network_mode: self.network_mode.0,
            ..defaults
        };
        check_identity(&profile)?;
        Ok(Workload {
            uid,
            name: self.name.into(),
            addresses: self.workload_ips.into_iter().map(|ip| ip.0).collect(),
            node: self.node,
            hostname: self.hostname,
            status: self.status.0,
            capacity: self.capacity.0,
            profile: Arc::new(profile),
        })
    }
}

/// A workload whose identity cannot exist could never be spoken to: say so, and which of the three parts is wrong.
fn check_identity(profile: &Profile) -> Result<(), Refusal> {
    let parts = [
        ("trustDomain", SpiffeId::new(&profile.trust_domain, "a", "a")),
        ("namespace", SpiffeId::new("a", &profile.namespace, "a")),
        ("serviceAccount", SpiffeId::new("a", "a", &profile.service_account)),
    ];
    for (field, identity) in parts {
        if let Err(error) = identity {
            return Err(Refusal::at(field, format!("expected a part of a SPIFFE ID: {}", error.1)));
        }
    }
    Ok(())
}
