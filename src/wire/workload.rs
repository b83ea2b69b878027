//! WDS, package `istio.workload`: workloads and services as the control plane tells them to node proxies (reference, dataplane §5.1).

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

use super::google::Any;

/// A workload or a service: whatever can be addressed.
#[derive(Clone, PartialEq, Message)]
pub struct Address {
    /// Absent only in messages of a newer protocol; the resource is then refused.
    #[prost(oneof = "AddressType", tags = "1, 2")]
    pub r#type: Option<AddressType>,
}

/// The kinds of [`Address`].
#[derive(Clone, PartialEq, prost::Oneof)]
#[allow(clippy::large_enum_variant, reason = "it lives for a moment, and a box would be an allocation a resource")]
pub enum AddressType {
    /// A pod or something like it.
    #[prost(message, tag = "1")]
    Workload(Workload),
    /// A service.
    #[prost(message, tag = "2")]
    Service(Service),
}

/// A service.
#[derive(Clone, PartialEq, Message)]
pub struct Service {
    /// Name of the object.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Full name; may begin with `*.`.
    #[prost(string, tag = "3")]
    pub hostname: String,
    /// Virtual addresses; none if the service is headless.
    #[prost(message, repeated, tag = "4")]
    pub addresses: Vec<NetworkAddress>,
    /// Its ports.
    #[prost(message, repeated, tag = "5")]
    pub ports: Vec<Port>,
    /// Names that endpoints may present beside their own.
    #[prost(string, repeated, tag = "6")]
    pub subject_alt_names: Vec<String>,
    /// Where traffic to the service goes first.
    #[prost(message, optional, tag = "7")]
    pub waypoint: Option<GatewayAddress>,
    /// How an endpoint is chosen.
    #[prost(message, optional, tag = "8")]
    pub load_balancing: Option<LoadBalancing>,
    /// Families of its addresses.
    #[prost(enumeration = "IpFamilies", tag = "9")]
    pub ip_families: i32,
    /// Of no meaning to node proxies.
    #[prost(message, repeated, tag = "10")]
    pub extensions: Vec<Extension>,
    /// Wins when several services have the same host name or address.
    #[prost(bool, tag = "11")]
    pub canonical: bool,
    /// Of no meaning to node proxies.
    #[prost(bool, tag = "12")]
    pub ingress_use_waypoint: bool,
    /// Overrides `waypoint`.
    #[prost(message, repeated, tag = "13")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// Who may see the service.
    #[prost(enumeration = "Visibility", tag = "14")]
    pub visibility: i32,
}

/// A pod or something like it.
#[derive(Clone, PartialEq, Message)]
pub struct Workload {
    /// Name of the pod.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Its addresses, 4 or 16 bytes each.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub addresses: Vec<Bytes>,
    /// Its network; empty is the default one.
    #[prost(string, tag = "4")]
    pub network: String,
    /// How to reach it.
    #[prost(enumeration = "TunnelProtocol", tag = "5")]
    pub tunnel_protocol: i32,
    /// Empty means `cluster.local`.
    #[prost(string, tag = "6")]
    pub trust_domain: String,
    /// Empty means `default`.
    #[prost(string, tag = "7")]
    pub service_account: String,
    /// Where traffic to its addresses goes first.
    #[prost(message, optional, tag = "8")]
    pub waypoint: Option<GatewayAddress>,
    /// The node it runs on.
    #[prost(string, tag = "9")]
    pub node: String,
    /// For telemetry.
    #[prost(string, tag = "10")]
    pub canonical_name: String,
    /// For telemetry.
    #[prost(string, tag = "11")]
    pub canonical_revision: String,
    /// For telemetry.
    #[prost(enumeration = "WorkloadType", tag = "12")]
    pub workload_type: i32,
    /// For telemetry: the object that owns the pod.
    #[prost(string, tag = "13")]
    pub workload_name: String,
    /// It ends the tunnel itself.
    #[prost(bool, tag = "14")]
    pub native_tunnel: bool,
    /// Policies that name it by selector, `namespace/name`.
    #[prost(string, repeated, tag = "16")]
    pub authorization_policies: Vec<String>,
    /// Whether it can take traffic.
    #[prost(enumeration = "WorkloadStatus", tag = "17")]
    pub status: i32,
    /// Empty means `Kubernetes`.
    #[prost(string, tag = "18")]
    pub cluster_id: String,
    /// How to reach it from another network.
    #[prost(message, optional, tag = "19")]
    pub network_gateway: Option<GatewayAddress>,
    /// Primary key.
    #[prost(string, tag = "20")]
    pub uid: String,
    /// Name to resolve when it has no address.
    #[prost(string, tag = "21")]
    pub hostname: String,
    /// The services it is an endpoint of, `namespace/hostname` to ports.
    #[prost(btree_map = "string, message", tag = "22")]
    pub services: BTreeMap<String, PortList>,
    /// How traffic is handed to the application.
    #[prost(message, optional, tag = "23")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Where it runs.
    #[prost(message, optional, tag = "24")]
    pub locality: Option<Locality>,
    /// Whether its addresses are its own.
    #[prost(enumeration = "NetworkMode", tag = "25")]
    pub network_mode: i32,
    /// Of no meaning to node proxies.
    #[prost(message, repeated, tag = "26")]
    pub extensions: Vec<Extension>,
    /// Weight among endpoints (`google.protobuf.UInt32Value`); absent means 1.
    #[prost(message, optional, tag = "27")]
    pub capacity: Option<u32>,
}

/// Where something runs.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Locality {
    /// Region.
    #[prost(string, tag = "1")]
    pub region: String,
    /// Zone in the region.
    #[prost(string, tag = "2")]
    pub zone: String,
    /// Part of the zone.
    #[prost(string, tag = "3")]
    pub subzone: String,
}

/// The ports of one endpoint.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PortList {
    /// The ports.
    #[prost(message, repeated, tag = "1")]
    pub ports: Vec<Port>,
}

/// A port of a service.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Port {
    /// Port of the service.
    #[prost(uint32, tag = "1")]
    pub service_port: u32,
    /// Port of the endpoint; 0 if it has a name and so differs between endpoints.
    #[prost(uint32, tag = "2")]
    pub target_port: u32,
    /// Of no meaning to node proxies.
    #[prost(int32, tag = "3")]
    pub app_protocol: i32,
}

/// How traffic is handed to the application.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct ApplicationTunnel {
    /// What goes before the traffic.
    #[prost(enumeration = "ApplicationProtocol", tag = "1")]
    pub protocol: i32,
    /// The port to use; 0 leaves it.
    #[prost(uint32, tag = "2")]
    pub port: u32,
}

/// A waypoint or a network gateway.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct GatewayAddress {
    /// Absent only in messages of a newer protocol; the resource is then refused.
    #[prost(oneof = "Destination", tags = "1, 2")]
    pub destination: Option<Destination>,
    /// Its tunnel port.
    #[prost(uint32, tag = "3")]
    pub hbone_mtls_port: u32,
}

/// The kinds of [`GatewayAddress`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Destination {
    /// A service or workload by name.
    #[prost(message, tag = "1")]
    Hostname(NamespacedHostname),
    /// A service or workload by address.
    #[prost(message, tag = "2")]
    Address(NetworkAddress),
}

/// One of several waypoints.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WeightedWaypoint {
    /// The waypoint.
    #[prost(message, optional, tag = "1")]
    pub destination: Option<GatewayAddress>,
    /// Its share.
    #[prost(uint32, tag = "2")]
    pub weight: u32,
}

/// An address within a network.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct NetworkAddress {
    /// The network.
    #[prost(string, tag = "1")]
    pub network: String,
    /// 4 or 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub address: Bytes,
    /// Prefix length in bits; absent means all of it.
    #[prost(uint32, optional, tag = "3")]
    pub length: Option<u32>,
}

/// A host name within a namespace.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct NamespacedHostname {
    /// The namespace.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// The host name.
    #[prost(string, tag = "2")]
    pub hostname: String,
}

/// Something that only other proxies understand.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Extension {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its content.
    #[prost(message, optional, tag = "2")]
    pub config: Option<Any>,
}

/// How an endpoint is chosen.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LoadBalancing {
    /// What an endpoint should have in common with the client, the most important first.
    #[prost(enumeration = "Scope", repeated, tag = "1")]
    pub routing_preference: Vec<i32>,
    /// What the preference means.
    #[prost(enumeration = "Mode", tag = "2")]
    pub mode: i32,
    /// Which endpoints count.
    #[prost(enumeration = "HealthPolicy", tag = "3")]
    pub health_policy: i32,
}

/// See [`LoadBalancing::routing_preference`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Scope {
    /// Not valid.
    Unspecified = 0,
    /// Same region.
    Region = 1,
    /// Same zone.
    Zone = 2,
    /// Same part of the zone.
    Subzone = 3,
    /// Same node.
    Node = 4,
    /// Same cluster.
    Cluster = 5,
    /// Same network.
    Network = 6,
}

/// See [`LoadBalancing::mode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Mode {
    /// Any endpoint.
    Unspecified = 0,
    /// Only endpoints that match every preference.
    Strict = 1,
    /// The endpoints that match most.
    Failover = 2,
    /// The address that the client asked for.
    Passthrough = 3,
}

/// See [`LoadBalancing::health_policy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum HealthPolicy {
    /// Healthy endpoints.
    OnlyHealthy = 0,
    /// All.
    AllowAll = 1,
}

/// See [`Service::ip_families`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum IpFamilies {
    /// Whatever its addresses are.
    Automatic = 0,
    /// IPv4.
    Ipv4Only = 1,
    /// IPv6.
    Ipv6Only = 2,
    /// Both.
    Dual = 3,
}

/// See [`Service::visibility`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Visibility {
    /// Everyone.
    Public = 0,
    /// Clients of its own namespace.
    Namespace = 1,
}

/// See [`Workload::tunnel_protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum TunnelProtocol {
    /// Plain TCP.
    None = 0,
    /// HBONE.
    Hbone = 1,
    /// The mutual TLS of Istio's sidecars.
    LegacyIstioMtls = 2,
}

/// See [`Workload::workload_type`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum WorkloadType {
    /// A deployment, or a type that is not known.
    Deployment = 0,
    /// A cron job.
    Cronjob = 1,
    /// A pod of its own.
    Pod = 2,
    /// A job.
    Job = 3,
}

/// See [`Workload::status`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum WorkloadStatus {
    /// It can take traffic.
    Healthy = 0,
    /// It cannot.
    Unhealthy = 1,
}

/// See [`Workload::network_mode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum NetworkMode {
    /// Its addresses are its own.
    Standard = 0,
    /// Its addresses are those of its node.
    HostNetwork = 1,
}

/// See [`ApplicationTunnel::protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum ApplicationProtocol {
    /// Nothing.
    None = 0,
    /// A PROXY protocol header.
    Proxy = 1,
}

#[cfg(test)]
mod tests;
