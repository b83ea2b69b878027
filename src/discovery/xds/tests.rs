//! Pushes against worlds, without a connection; and rows in their wire form.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::IpAddr;

use bytes::Bytes;
use ipnet::IpNet;
use prost::Message;

use crate::model::{self, GatewayDestination, Text};
use crate::policy;
use crate::wire::google::Any;
use crate::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};
use crate::wire::{authorization, workload as wire};

fn octets(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

fn words(list: &[Text]) -> Vec<String> {
    list.iter().map(Text::to_string).collect()
}

fn gateway(from: &model::GatewayAddress) -> wire::GatewayAddress {
    let destination = match &from.destination {
        GatewayDestination::Address(at) => {
            wire::Destination::Address(wire::NetworkAddress { network: at.network.to_string(), address: octets(at.ip), length: None })
        }
        GatewayDestination::Hostname(key) => {
            wire::Destination::Hostname(wire::NamespacedHostname { namespace: key.namespace.to_string(), hostname: key.hostname.to_string() })
        }
    };
    wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: from.hbone_port.into() }
}

fn ports(map: &model::PortMap) -> Vec<wire::Port> {
    map.iter().map(|(port, target)| wire::Port { service_port: port.into(), target_port: target.into(), app_protocol: 0 }).collect()
}

/// The wire form of a workload, written from the reference (dataplane §5.1), not from the reader.
pub(super) fn workload(from: &model::Workload) -> wire::Workload {
    let profile = &from.profile;
    wire::Workload {
        name: from.name.to_string(),
        namespace: profile.namespace.to_string(),
        addresses: from.addresses.iter().copied().map(octets).collect(),
        network: profile.network.to_string(),
        tunnel_protocol: match profile.protocol {
            model::TunnelProtocol::None => 0,
            model::TunnelProtocol::Hbone => 1,
        },
        trust_domain: profile.trust_domain.to_string(),
        service_account: profile.service_account.to_string(),
        waypoint: profile.waypoint.as_ref().map(gateway),
        node: from.node.to_string(),
        canonical_name: profile.canonical_name.to_string(),
        canonical_revision: profile.canonical_revision.to_string(),
        workload_type: match profile.kind {
            model::WorkloadKind::Deployment => 0,
            model::WorkloadKind::CronJob => 1,
            model::WorkloadKind::Pod => 2,
            model::WorkloadKind::Job => 3,
        },
        workload_name: profile.workload_name.to_string(),
        native_tunnel: profile.native_tunnel,
        authorization_policies: words(&profile.authorization_policies),
        status: i32::from(from.status == model::HealthStatus::Unhealthy),
        cluster_id: profile.cluster_id.to_string(),
        network_gateway: profile.network_gateway.as_ref().map(gateway),
        uid: from.uid.to_string(),
        hostname: from.hostname.to_string(),
        services: profile.services.iter().map(|(key, map)| (key.to_string(), wire::PortList { ports: ports(map) })).collect(),
        application_tunnel: profile.application_tunnel.map(|tunnel| wire::ApplicationTunnel {
            protocol: i32::from(tunnel.protocol == model::ApplicationProtocol::Proxy),
            port: tunnel.port.unwrap_or(0).into(),
        }),
        locality: Some(wire::Locality {
            region: profile.locality.region.to_string(),
            zone: profile.locality.zone.to_string(),
            subzone: profile.locality.subzone.to_string(),
        }),
        network_mode: i32::from(profile.network_mode == model::NetworkMode::HostNetwork),
        extensions: Vec::new(),
        capacity: Some(from.capacity),
    }
}

/// The same for a service.
pub(super) fn service(from: &model::Service) -> wire::Service {
    let vip = |network: &Text, ip, length| wire::NetworkAddress { network: network.to_string(), address: octets(ip), length };
    let exact = from.vips.iter().map(|at| vip(&at.network, at.ip, None));
    let ranges = from.cidr_vips.iter().map(|(network, range)| vip(network, range.addr(), Some(range.prefix_len().into())));
    wire::Service {
        name: from.name.to_string(),
        namespace: from.namespace.to_string(),
        hostname: from.hostname.to_string(),
        addresses: exact.chain(ranges).collect(),
        ports: ports(&from.ports),
        subject_alt_names: words(&from.subject_alt_names),
        waypoint: from.waypoint.as_ref().map(gateway),
        load_balancing: from.load_balancing.as_ref().map(|balancing| wire::LoadBalancing {
            routing_preference: balancing
                .routing_preference
                .iter()
                .map(|scope| match scope {
                    model::Scope::Region => 1,
                    model::Scope::Zone => 2,
                    model::Scope::Subzone => 3,
                    model::Scope::Node => 4,
                    model::Scope::Cluster => 5,
                    model::Scope::Network => 6,
                })
                .collect(),
            mode: match balancing.mode {
                model::LoadBalancingMode::Standard => 0,
                model::LoadBalancingMode::Strict => 1,
                model::LoadBalancingMode::Failover => 2,
                model::LoadBalancingMode::Passthrough => 3,
            },
            health_policy: i32::from(balancing.health_policy == model::HealthPolicy::AllowAll),
        }),
        ip_families: match from.ip_families {
            None => 0,
            Some(model::IpFamilies::Ipv4) => 1,
            Some(model::IpFamilies::Ipv6) => 2,
            Some(model::IpFamilies::Dual) => 3,
        },
        extensions: Vec::new(),
        canonical: from.canonical,
        ingress_use_waypoint: false,
        weighted_waypoints: from
            .weighted_waypoints
            .iter()
            .map(|waypoint| wire::WeightedWaypoint { destination: Some(gateway(&waypoint.destination)), weight: waypoint.weight })
            .collect(),
        visibility: i32::from(from.visibility == model::Visibility::Namespace),
    }
}

/// The same for a policy.
pub(super) fn policy(from: &policy::Authorization) -> authorization::Authorization {
    use authorization::MatchType;
    let texts = |list: &[policy::StringMatch]| -> Vec<authorization::StringMatch> {
        let kind = |word: &policy::StringMatch| match word {
            policy::StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
            policy::StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
            policy::StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
            policy::StringMatch::Presence => MatchType::Presence(()),
        };
        list.iter().map(|word| authorization::StringMatch { match_type: Some(kind(word)) }).collect()
    };
    let ranges = |list: &[IpNet]| -> Vec<authorization::Address> {
        list.iter().map(|range| authorization::Address { address: octets(range.addr()), length: range.prefix_len().into() }).collect()
    };
    let numbers = |list: &[u16]| list.iter().copied().map(u32::from).collect();
    let accounts = |list: &[policy::ServiceAccountMatch]| -> Vec<authorization::ServiceAccountMatch> {
        let pair = |account: &policy::ServiceAccountMatch| authorization::ServiceAccountMatch {
            namespace: account.namespace.to_string(),
            service_account: account.service_account.to_string(),
        };
        list.iter().map(pair).collect()
    };
    let conditions = |from: &policy::Match| authorization::Match {
        namespaces: texts(&from.namespaces),
        not_namespaces: texts(&from.not_namespaces),
        principals: texts(&from.principals),
        not_principals: texts(&from.not_principals),
        source_ips: ranges(&from.source_ips),
        not_source_ips: ranges(&from.not_source_ips),
        destination_ips: ranges(&from.destination_ips),
        not_destination_ips: ranges(&from.not_destination_ips),
        destination_ports: numbers(&from.destination_ports),
        not_destination_ports: numbers(&from.not_destination_ports),
        service_accounts: accounts(&from.service_accounts),
        not_service_accounts: accounts(&from.not_service_accounts),
        extensions: Vec::new(),
    };
    let clause = |from: &policy::Clause| authorization::Clause { matches: from.matches.iter().map(conditions).collect() };
    authorization::Authorization {
        name: from.name.to_string(),
        namespace: from.namespace.to_string(),
        scope: match from.scope {
            policy::Scope::Global => 0,
            policy::Scope::Namespace => 1,
            policy::Scope::WorkloadSelector => 2,
        },
        action: i32::from(from.action == policy::Action::Deny),
        rules: from.rules.iter().map(|rule| authorization::Rule { clauses: rule.clauses.iter().map(clause).collect() }).collect(),
        dry_run: from.dry_run,
        extensions: Vec::new(),
    }
}

/// A resource whose version is that of its content.
pub(super) fn resource(name: &str, type_url: &str, content: &impl Message) -> Resource {
    let value = Bytes::from(content.encode_to_vec());
    let version = format!("{:016x}", value.iter().fold(7_u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(*byte))));
    Resource { version, resource: Some(Any { type_url: type_url.to_owned(), value }), name: name.to_owned(), aliases: Vec::new() }
}

pub(super) fn workload_resource(from: &wire::Workload) -> Resource {
    let address = wire::Address { r#type: Some(wire::AddressType::Workload(from.clone())) };
    resource(&from.uid, ADDRESS_TYPE, &address)
}

pub(super) fn service_resource(from: &wire::Service) -> Resource {
    let address = wire::Address { r#type: Some(wire::AddressType::Service(from.clone())) };
    resource(&format!("{}/{}", from.namespace, from.hostname), ADDRESS_TYPE, &address)
}

pub(super) fn policy_resource(from: &authorization::Authorization) -> Resource {
    Resource { version: String::new(), ..resource(&format!("{}/{}", from.namespace, from.name), AUTHORIZATION_TYPE, from) }
}
