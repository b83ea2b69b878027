//! What is known, in the words of the wire: the other direction of what a node proxy reads (reference, dataplane §5.1 and §6.1).

use std::net::IpAddr;

use bytes::Bytes;

use crate::model::{
    ApplicationProtocol, ApplicationTunnel, GatewayAddress, GatewayDestination, HealthPolicy, HealthStatus, IpFamilies, LoadBalancing,
    LoadBalancingMode, NetworkMode, PortMap, Scope, Service, Text, TunnelProtocol, Visibility, Workload, WorkloadKind,
};
use crate::policy::{self, Authorization, StringMatch, Validity};
use crate::wire::authorization as wire_policy;
use crate::wire::workload as wire;

pub(super) fn workload(row: &Workload) -> wire::Workload {
    let profile = &*row.profile;
    let locality = &profile.locality;
    let somewhere = [&locality.region, &locality.zone, &locality.subzone].iter().any(|part| !part.is_empty());
    wire::Workload {
        name: row.name.as_str().to_owned(),
        namespace: text(&profile.namespace),
        addresses: row.addresses.iter().copied().map(octets).collect(),
        network: text(&profile.network),
        tunnel_protocol: match profile.protocol {
            TunnelProtocol::None => wire::TunnelProtocol::None,
            TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone,
        }
        .into(),
        // The control plane elides the default (reference, node-and-control §B.2).
        trust_domain: if profile.trust_domain == "cluster.local" { String::new() } else { text(&profile.trust_domain) },
        service_account: text(&profile.service_account),
        waypoint: profile.waypoint.as_ref().map(gateway),
        node: text(&row.node),
        canonical_name: text(&profile.canonical_name),
        canonical_revision: text(&profile.canonical_revision),
        workload_type: match profile.kind {
            WorkloadKind::Deployment => wire::WorkloadType::Deployment,
            WorkloadKind::CronJob => wire::WorkloadType::Cronjob,
            WorkloadKind::Pod => wire::WorkloadType::Pod,
            WorkloadKind::Job => wire::WorkloadType::Job,
        }
        .into(),
        workload_name: text(&profile.workload_name),
        native_tunnel: profile.native_tunnel,
        authorization_policies: profile.authorization_policies.iter().map(text).collect(),
        status: match row.status {
            HealthStatus::Healthy => wire::WorkloadStatus::Healthy,
            HealthStatus::Unhealthy => wire::WorkloadStatus::Unhealthy,
        }
        .into(),
        cluster_id: text(&profile.cluster_id),
        network_gateway: profile.network_gateway.as_ref().map(gateway),
        uid: text(&row.uid),
        hostname: text(&row.hostname),
        services: profile.services.iter().map(|(key, ports)| (key.to_string(), wire::PortList { ports: port_list(ports) })).collect(),
        application_tunnel: profile.application_tunnel.map(application_tunnel),
        locality: somewhere.then(|| wire::Locality { region: text(&locality.region), zone: text(&locality.zone), subzone: text(&locality.subzone) }),
        network_mode: match profile.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        }
        .into(),
        extensions: Vec::new(),
        capacity: (row.capacity != 1).then_some(row.capacity),
    }
}

pub(super) fn service(row: &Service) -> wire::Service {
    let exact = row.vips.iter().map(|vip| wire::NetworkAddress { network: text(&vip.network), address: octets(vip.ip), length: None });
    let ranges = row.cidr_vips.iter().map(|(network, range)| wire::NetworkAddress {
        network: text(network),
        address: octets(range.addr()),
        length: Some(range.prefix_len().into()),
    });
    wire::Service {
        name: text(&row.name),
        namespace: text(&row.namespace),
        hostname: text(&row.hostname),
        addresses: exact.chain(ranges).collect(),
        ports: port_list(&row.ports),
        subject_alt_names: row.subject_alt_names.iter().map(text).collect(),
        waypoint: row.waypoint.as_ref().map(gateway),
        load_balancing: row.load_balancing.as_ref().map(load_balancing),
        ip_families: match row.ip_families {
            None => wire::IpFamilies::Automatic,
            Some(IpFamilies::Ipv4) => wire::IpFamilies::Ipv4Only,
            Some(IpFamilies::Ipv6) => wire::IpFamilies::Ipv6Only,
            Some(IpFamilies::Dual) => wire::IpFamilies::Dual,
        }
        .into(),
        extensions: Vec::new(),
        canonical: row.canonical,
        ingress_use_waypoint: false,
        weighted_waypoints: row
            .weighted_waypoints
            .iter()
            .map(|one| wire::WeightedWaypoint { destination: Some(gateway(&one.destination)), weight: one.weight })
            .collect(),
        visibility: match row.visibility {
            Visibility::Public => wire::Visibility::Public,
            Visibility::Namespace => wire::Visibility::Namespace,
        }
        .into(),
    }
}

/// A policy that nobody could understand has no words of its own on the wire: it becomes one that denies all of its targets.
pub(super) fn authorization(policy: &Authorization) -> wire_policy::Authorization {
    let everything = || vec![wire_policy::Rule { clauses: Vec::new() }];
    let (action, rules) = match (&policy.validity, policy.action) {
        (Validity::Invalid(_), _) => (wire_policy::Action::Deny, everything()),
        (Validity::Valid, policy::Action::Deny) => (wire_policy::Action::Deny, policy.rules.iter().map(rule).collect()),
        (Validity::Valid, policy::Action::Allow) => (wire_policy::Action::Allow, policy.rules.iter().map(rule).collect()),
    };
    wire_policy::Authorization {
        name: text(&policy.name),
        namespace: text(&policy.namespace),
        scope: match policy.scope {
            policy::Scope::Global => wire_policy::Scope::Global,
            policy::Scope::Namespace => wire_policy::Scope::Namespace,
            policy::Scope::WorkloadSelector => wire_policy::Scope::WorkloadSelector,
        }
        .into(),
        action: action.into(),
        rules,
        dry_run: policy.dry_run,
        extensions: Vec::new(),
    }
}

fn rule(rule: &policy::Rule) -> wire_policy::Rule {
    let clause = |clause: &policy::Clause| wire_policy::Clause { matches: clause.matches.iter().map(conditions).collect() };
    wire_policy::Rule { clauses: rule.clauses.iter().map(clause).collect() }
}

fn conditions(of: &policy::Match) -> wire_policy::Match {
    let texts = |list: &[StringMatch]| list.iter().map(string_match).collect();
    let ranges = |list: &[ipnet::IpNet]| {
        let range = |net: &ipnet::IpNet| wire_policy::Address { address: octets(net.addr()), length: net.prefix_len().into() };
        list.iter().map(range).collect()
    };
    let accounts = |list: &[policy::ServiceAccountMatch]| {
        let account = |one: &policy::ServiceAccountMatch| wire_policy::ServiceAccountMatch {
            namespace: text(&one.namespace),
            service_account: text(&one.service_account),
        };
        list.iter().map(account).collect()
    };
    wire_policy::Match {
        namespaces: texts(&of.namespaces),
        not_namespaces: texts(&of.not_namespaces),
        principals: texts(&of.principals),
        not_principals: texts(&of.not_principals),
        source_ips: ranges(&of.source_ips),
        not_source_ips: ranges(&of.not_source_ips),
        destination_ips: ranges(&of.destination_ips),
        not_destination_ips: ranges(&of.not_destination_ips),
        destination_ports: of.destination_ports.iter().copied().map(u32::from).collect(),
        not_destination_ports: of.not_destination_ports.iter().copied().map(u32::from).collect(),
        service_accounts: accounts(&of.service_accounts),
        not_service_accounts: accounts(&of.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn string_match(of: &StringMatch) -> wire_policy::StringMatch {
    let kind = match of {
        StringMatch::Exact(words) => wire_policy::MatchType::Exact(text(words)),
        StringMatch::Prefix(words) => wire_policy::MatchType::Prefix(text(words)),
        StringMatch::Suffix(words) => wire_policy::MatchType::Suffix(text(words)),
        StringMatch::Presence => wire_policy::MatchType::Presence(()),
    };
    wire_policy::StringMatch { match_type: Some(kind) }
}

fn gateway(of: &GatewayAddress) -> wire::GatewayAddress {
    let destination = match &of.destination {
        GatewayDestination::Address(address) => {
            wire::Destination::Address(wire::NetworkAddress { network: text(&address.network), address: octets(address.ip), length: None })
        }
        GatewayDestination::Hostname(key) => {
            wire::Destination::Hostname(wire::NamespacedHostname { namespace: text(&key.namespace), hostname: text(&key.hostname) })
        }
    };
    wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: of.hbone_port.into() }
}

fn load_balancing(of: &LoadBalancing) -> wire::LoadBalancing {
    let scope = |scope: &Scope| {
        match scope {
            Scope::Region => wire::Scope::Region,
            Scope::Zone => wire::Scope::Zone,
            Scope::Subzone => wire::Scope::Subzone,
            Scope::Node => wire::Scope::Node,
            Scope::Cluster => wire::Scope::Cluster,
            Scope::Network => wire::Scope::Network,
        }
        .into()
    };
    wire::LoadBalancing {
        routing_preference: of.routing_preference.iter().map(scope).collect(),
        mode: match of.mode {
            LoadBalancingMode::Standard => wire::Mode::Unspecified,
            LoadBalancingMode::Strict => wire::Mode::Strict,
            LoadBalancingMode::Failover => wire::Mode::Failover,
            LoadBalancingMode::Passthrough => wire::Mode::Passthrough,
        }
        .into(),
        health_policy: match of.health_policy {
            HealthPolicy::OnlyHealthy => wire::HealthPolicy::OnlyHealthy,
            HealthPolicy::AllowAll => wire::HealthPolicy::AllowAll,
        }
        .into(),
    }
}

fn application_tunnel(of: ApplicationTunnel) -> wire::ApplicationTunnel {
    let protocol = match of.protocol {
        ApplicationProtocol::None => wire::ApplicationProtocol::None,
        ApplicationProtocol::Proxy => wire::ApplicationProtocol::Proxy,
    };
    wire::ApplicationTunnel { protocol: protocol.into(), port: of.port.unwrap_or_default().into() }
}

fn port_list(ports: &PortMap) -> Vec<wire::Port> {
    ports.iter().map(|(service, target)| wire::Port { service_port: service.into(), target_port: target.into(), app_protocol: 0 }).collect()
}

fn octets(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

fn text(of: &Text) -> String {
    of.as_str().to_owned()
}
