//! `config_dump` as `istioctl ztunnel-config` reads it, written from the reference alone (dataplane §10.2): what has no default there is required here,
//! and a word or a type that is not in the reference is an error.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

/// The sections that istioctl reads, and the two that people do.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigDump {
    pub workloads: Vec<Workload>,
    pub services: Vec<Service>,
    pub policies: Vec<Policy>,
    pub certificates: Vec<Certificate>,
    pub workload_state: BTreeMap<String, PodState>,
    pub staged_services: BTreeMap<String, BTreeMap<String, Endpoint>>,
    pub static_config: StaticConfig,
    pub version: Version,
    pub config: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Deserialize)]
pub struct StaticConfig {
    pub workloads: Vec<serde_json::Value>,
    pub policies: Vec<serde_json::Value>,
    pub services: Vec<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    pub version: String,
    pub git_revision: String,
    pub rust_version: String,
    pub build_profile: String,
    pub build_status: String,
    pub istio_version: String,
    pub crypto_provider: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    pub workload_ips: Vec<IpAddr>,
    pub waypoint: Option<Gateway>,
    pub network_gateway: Option<Gateway>,
    pub protocol: TunnelProtocol,
    pub network_mode: NetworkMode,
    pub uid: String,
    pub name: String,
    pub namespace: String,
    #[serde(default)]
    pub trust_domain: String,
    #[serde(default)]
    pub service_account: String,
    #[serde(default)]
    pub network: String,
    #[serde(default)]
    pub workload_name: String,
    pub workload_type: WorkloadType,
    #[serde(default)]
    pub canonical_name: String,
    #[serde(default)]
    pub canonical_revision: String,
    #[serde(default)]
    pub hostname: String,
    #[serde(default)]
    pub node: String,
    #[serde(default)]
    pub native_tunnel: bool,
    pub application_tunnel: Option<ApplicationTunnel>,
    #[serde(default)]
    pub authorization_policies: Vec<String>,
    pub status: Health,
    pub cluster_id: String,
    pub locality: Option<Locality>,
    #[serde(default)]
    pub services: Vec<String>,
    pub capacity: u32,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gateway {
    pub destination: String,
    pub hbone_mtls_port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum TunnelProtocol {
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "HBONE")]
    Hbone,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum NetworkMode {
    Standard,
    HostNetwork,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadType {
    Deployment,
    Cronjob,
    Pod,
    Job,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum Health {
    Healthy,
    Unhealthy,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct ApplicationTunnel {
    pub protocol: ApplicationProtocol,
    pub port: Option<u16>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ApplicationProtocol {
    None,
    Proxy,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Locality {
    pub region: String,
    pub zone: String,
    pub subzone: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub hostname: String,
    pub vips: Vec<String>,
    #[serde(default)]
    pub cidr_vips: Vec<CidrVip>,
    pub ports: BTreeMap<u16, u16>,
    pub endpoints: BTreeMap<String, Endpoint>,
    pub subject_alt_names: Vec<String>,
    pub waypoint: Option<Gateway>,
    #[serde(default)]
    pub weighted_waypoints: Vec<Weighted>,
    pub load_balancer: Option<LoadBalancer>,
    pub ip_families: Option<IpFamilies>,
    pub canonical: bool,
    pub visibility: Visibility,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct CidrVip {
    pub network: String,
    pub cidr: ipnet::IpNet,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    pub workload_uid: String,
    pub port: BTreeMap<u16, u16>,
    pub status: Health,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Weighted {
    pub destination: Gateway,
    pub weight: u32,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancer {
    pub routing_preferences: Vec<Scope>,
    pub mode: Mode,
    pub health_policy: HealthPolicy,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum Mode {
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum HealthPolicy {
    OnlyHealthy,
    AllowAll,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum IpFamilies {
    #[serde(rename = "IPv4")]
    V4,
    #[serde(rename = "IPv6")]
    V6,
    Dual,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum Visibility {
    Public,
    Namespace,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    pub name: String,
    pub namespace: String,
    pub scope: PolicyScope,
    pub action: Action,
    pub rules: Vec<Vec<Vec<Match>>>,
    pub dry_run: bool,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum PolicyScope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum Action {
    Allow,
    Deny,
}

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Match {
    pub namespaces: Vec<Text>,
    pub not_namespaces: Vec<Text>,
    pub service_accounts: Vec<ServiceAccount>,
    pub not_service_accounts: Vec<ServiceAccount>,
    pub principals: Vec<Text>,
    pub not_principals: Vec<Text>,
    pub source_ips: Vec<ipnet::IpNet>,
    pub not_source_ips: Vec<ipnet::IpNet>,
    pub destination_ips: Vec<ipnet::IpNet>,
    pub not_destination_ips: Vec<ipnet::IpNet>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum Text {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence([(); 0]),
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccount {
    pub namespace: String,
    pub service_account: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    pub identity: String,
    pub state: String,
    pub cert_chain: Vec<CertificateEntry>,
    pub root_certs: Vec<CertificateEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateEntry {
    pub pem: String,
    pub serial_number: String,
    pub valid_from: String,
    pub expiration_time: String,
}

#[derive(Debug, Deserialize)]
pub struct PodState {
    pub state: PodPhase,
    /// Not there while a pod is pending.
    pub connections: Option<Connections>,
    pub info: PodInfo,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub enum PodPhase {
    Pending,
    Up,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodInfo {
    pub name: String,
    pub namespace: String,
    pub service_account: String,
}

#[derive(Debug, Deserialize)]
pub struct Connections {
    pub inbound: Vec<Inbound>,
    pub outbound: Vec<Outbound>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inbound {
    pub src: SocketAddr,
    /// The service that was asked for, if one is known.
    pub original_dst: Option<String>,
    pub actual_dst: SocketAddr,
    pub protocol: Protocol,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outbound {
    pub src: SocketAddr,
    pub original_dst: SocketAddr,
    pub actual_dst: SocketAddr,
    pub protocol: Protocol,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Hbone,
    DoubleHbone,
}
