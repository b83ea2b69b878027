//! Workloads as WDS describes them (reference, dataplane §5.1), in rows small enough for 100,000 of them.

use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

use super::service::{GatewayAddress, NamespacedHostname, PortMap};
use super::{Addresses, Ending, SpiffeError, SpiffeId, Text};

/// One workload: what is its own, plus a [`Profile`] that it shares with its siblings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Primary key, such as `Kubernetes//Pod/default/web-0`.
    pub uid: Text,
    /// Pod name.
    pub name: Ending,
    /// Canonical addresses; empty for workloads that are known by host name or behind a gateway only.
    pub addresses: Addresses,
    /// Name of the node it runs on.
    pub node: Text,
    /// DNS name to resolve on demand when there is no address; "" if none.
    pub hostname: Text,
    /// Health as the control plane reports it.
    pub status: HealthStatus,
    /// Load-balancing weight; 0 takes no traffic. Default 1.
    pub capacity: u32,
    /// Everything that replicas have in common.
    pub profile: Arc<Profile>,
}

/// The part of a workload that all replicas of one deployment share; kept once in memory per distinct value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Profile {
    /// Namespace.
    pub namespace: Text,
    /// Network name; "" is the default network.
    pub network: Text,
    /// How to reach it.
    pub protocol: TunnelProtocol,
    /// Trust domain of its identity.
    pub trust_domain: Text,
    /// Service account of its identity.
    pub service_account: Text,
    /// Workload waypoint, if traffic to the pod itself must pass one.
    pub waypoint: Option<GatewayAddress>,
    /// Gateway of its network, if it is on another one.
    pub network_gateway: Option<GatewayAddress>,
    /// Telemetry: canonical service name.
    pub canonical_name: Text,
    /// Telemetry: canonical revision.
    pub canonical_revision: Text,
    /// Telemetry: kind of owner.
    pub kind: WorkloadKind,
    /// Telemetry: owner's name.
    pub workload_name: Text,
    /// Takes HBONE itself (no node proxy); changes nothing in routing.
    pub native_tunnel: bool,
    /// `namespace/name` of the selector policies that apply.
    pub authorization_policies: Vec<Text>,
    /// Cluster id.
    pub cluster_id: Text,
    /// Services it backs: key, and service port to target port.
    pub services: Vec<(NamespacedHostname, PortMap)>,
    /// Set for captured waypoints that want the original target.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Region, zone, subzone.
    pub locality: Locality,
    /// Host-network workloads are never looked up by address.
    pub network_mode: NetworkMode,
    /// The identity, once somebody has asked for it.
    pub identity: KnownIdentity,
}

impl Default for Profile {
    /// The defaults of the reference (dataplane §3.1): trust domain `cluster.local`, service account `default`, cluster `Kubernetes`.
    fn default() -> Self {
        Self {
            namespace: Text::default(),
            network: Text::default(),
            protocol: TunnelProtocol::None,
            trust_domain: "cluster.local".into(),
            service_account: "default".into(),
            waypoint: None,
            network_gateway: None,
            canonical_name: Text::default(),
            canonical_revision: Text::default(),
            kind: WorkloadKind::Deployment,
            workload_name: Text::default(),
            native_tunnel: false,
            authorization_policies: Vec::new(),
            cluster_id: "Kubernetes".into(),
            services: Vec::new(),
            application_tunnel: None,
            locality: Locality::default(),
            network_mode: NetworkMode::Standard,
            identity: KnownIdentity::default(),
        }
    }
}

/// A [`SpiffeId`] that follows from the other fields of a [`Profile`], made on first use and then shared by all connections. A copy begins anew,
/// because its other fields may be changed.
#[derive(Default)]
pub struct KnownIdentity(OnceLock<Option<SpiffeId>>);

impl Clone for KnownIdentity {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for KnownIdentity {
    /// Adds nothing to the fields that it follows from.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for KnownIdentity {}

impl Hash for KnownIdentity {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl std::fmt::Debug for KnownIdentity {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("KnownIdentity")
    }
}

impl Workload {
    /// The workload's SPIFFE identity, or why its parts do not make one.
    pub fn identity(&self) -> Result<SpiffeId, SpiffeError> {
        let profile = &self.profile;
        let make = || SpiffeId::new(&profile.trust_domain, &profile.namespace, &profile.service_account);
        profile.identity.0.get_or_init(|| make().ok()).clone().map_or_else(make, Ok)
    }

    /// The port mapping of this workload for one service, if it backs it.
    #[must_use]
    pub fn service_ports(&self, service: &NamespacedHostname) -> Option<&PortMap> {
        self.profile.services.iter().find(|(key, _)| key == service).map(|(_, ports)| ports)
    }
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum TunnelProtocol {
    /// Plain TCP.
    #[default]
    None,
    /// HBONE on port 15008.
    Hbone,
}

/// Whether a workload has its own network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NetworkMode {
    /// Own address.
    #[default]
    Standard,
    /// Shares the node's address, so an address does not name it.
    HostNetwork,
}

/// Health as published by the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HealthStatus {
    /// May take traffic.
    #[default]
    Healthy,
    /// Takes traffic only from services that allow all endpoints.
    Unhealthy,
}

/// What owns the workload; names the baggage key (reference, dataplane §2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WorkloadKind {
    /// A Deployment, and every kind that we do not know.
    #[default]
    Deployment,
    /// A CronJob.
    CronJob,
    /// A bare pod.
    Pod,
    /// A Job.
    Job,
}

impl WorkloadKind {
    /// Lower-case name as in baggage keys and the config dump.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// What an application behind a tunnel gets to see of the original target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// How the target is told.
    pub protocol: ApplicationProtocol,
    /// Port override; `None` keeps the requested port.
    pub port: Option<u16>,
}

/// How an application behind a tunnel learns the original target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ApplicationProtocol {
    /// Not at all.
    #[default]
    None,
    /// By a PROXY protocol v2 header.
    Proxy,
}

/// Where a workload runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Locality {
    /// Region.
    pub region: Text,
    /// Zone.
    pub zone: Text,
    /// Subzone.
    pub subzone: Text,
}
