#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::IpAddr;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::model::{
    GatewayAddress, GatewayDestination, HealthStatus, IpFamilies, LoadBalancing, NamespacedHostname, NetworkAddress, NetworkMode, PortMap, Profile,
    SnapshotBuilder, WeightedWaypoint,
};

mod direct;
mod networks;
mod refusals;
mod waypoints;

// Rows for the tests of this room and of those below it.

pub(super) fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn key(hostname: &str) -> NamespacedHostname {
    NamespacedHostname { namespace: "default".into(), hostname: hostname.into() }
}

pub(super) fn ports(pairs: &[(u16, u16)]) -> PortMap {
    pairs.iter().copied().collect()
}

/// An HBONE pod whose service account is its name.
pub(super) fn pod(name: &str, addresses: &[&str]) -> Workload {
    let profile = Profile { namespace: "default".into(), service_account: name.into(), protocol: TunnelProtocol::Hbone, ..Profile::default() };
    Workload {
        uid: format!("c//Pod/default/{name}").into(),
        name: name.into(),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        node: "local".into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(profile),
    }
}

pub(super) fn with(mut workload: Workload, change: impl FnOnce(&mut Profile)) -> Workload {
    change(Arc::make_mut(&mut workload.profile));
    workload
}

pub(super) fn backing(workload: Workload, hostname: &str, pairs: &[(u16, u16)]) -> Workload {
    with(workload, |profile| profile.services.push((key(hostname), ports(pairs))))
}

pub(super) fn plain(workload: Workload) -> Workload {
    with(workload, |profile| profile.protocol = TunnelProtocol::None)
}

pub(super) fn service(hostname: &str, vips: &[&str], pairs: &[(u16, u16)]) -> Service {
    Service {
        name: hostname.into(),
        namespace: "default".into(),
        hostname: hostname.into(),
        vips: vips.iter().map(|text| NetworkAddress { network: "".into(), ip: ip(text) }).collect(),
        ports: ports(pairs),
        ..Service::default()
    }
}

pub(super) fn balanced(service: Service, mode: LoadBalancingMode) -> Service {
    Service { load_balancing: Some(LoadBalancing { mode, ..LoadBalancing::default() }), ..service }
}

pub(super) fn snapshot(workloads: impl IntoIterator<Item = Workload>, services: impl IntoIterator<Item = Service>) -> Snapshot {
    let mut builder = SnapshotBuilder::default();
    workloads.into_iter().for_each(|workload| builder.insert_workload(workload));
    services.into_iter().for_each(|service| builder.insert_service(service));
    builder.build()
}

pub(super) fn rng() -> SmallRng {
    SmallRng::seed_from_u64(7)
}

fn route(snapshot: &Snapshot, destination: &str) -> Result<Route, RouteError> {
    outbound(snapshot, &RouteConfig::default(), &pod("client", &["10.0.0.9"]), socket(destination), &mut rng())
}

/// A route in one line.
fn shown(route: Result<Route, RouteError>) -> String {
    let accounts = |expected: Vec<SpiffeId>| expected.iter().map(|id| id.service_account().to_string()).collect::<Vec<_>>().join("|");
    let named = |service: Option<Arc<Service>>| service.map_or_else(String::new, |service| format!(" of {}", service.hostname));
    match route {
        Ok(Route::Passthrough { destination, service }) => format!("passthrough {destination}{}", named(service)),
        Ok(Route::Tcp { workload, service, address }) => format!("tcp {} {address}{}", workload.name, named(service)),
        Ok(Route::Hbone { workload, service, next_hop, authority, expected, waypoint }) => {
            assert_eq!(
                waypoint,
                ["way", "lone"].contains(&workload.name.as_str()) && authority != Authority::Address(next_hop.into()),
                "{authority}"
            );
            format!("hbone {} {next_hop} for {authority}{} as {}", workload.name, named(service), accounts(expected))
        }
        Ok(Route::Beyond { gateway, service, next_hop, authority, gateway_expected, expected, waypoint }) => {
            assert_eq!(waypoint, service.waypoint.is_some());
            let (outer, inner) = (accounts(gateway_expected), accounts(expected));
            format!("beyond {} {next_hop} for {authority} of {} as {outer} then {inner}", gateway.name, service.hostname)
        }
        Err(error) => error.to_string(),
    }
}

pub(super) fn gateway(address: &str) -> GatewayAddress {
    gateway_on("", address)
}

fn gateway_on(network: &str, address: &str) -> GatewayAddress {
    let destination = GatewayDestination::Address(NetworkAddress { network: network.into(), ip: ip(address) });
    GatewayAddress { destination, hbone_port: HBONE_PORT }
}

pub(super) fn gateway_named(hostname: &str, hbone_port: u16) -> GatewayAddress {
    GatewayAddress { destination: GatewayDestination::Hostname(key(hostname)), hbone_port }
}

pub(super) fn with_waypoint(service: Service, waypoint: GatewayAddress) -> Service {
    Service { waypoint: Some(waypoint), ..service }
}

pub(super) fn behind(workload: Workload, waypoint: GatewayAddress) -> Workload {
    with(workload, |profile| profile.waypoint = Some(waypoint))
}

/// What a case says where a waypoint by address or host name is missing.
fn unknown(waypoint: &str, owner: &str, missing: Missing) -> String {
    format!("unknown waypoint: waypoint {waypoint} of {owner} {missing}")
}

/// (rule, workloads, services, [(destination, the route in one line)])
type Case<'a> = (&'static str, Vec<Workload>, Vec<Service>, Vec<(&'static str, &'a str)>);

fn check(cases: Vec<Case<'_>>) {
    for (rule, workloads, services, connections) in cases {
        let snapshot = snapshot(workloads, services);
        for (destination, expected) in connections {
            assert_eq!(shown(route(&snapshot, destination)), expected, "{rule}: {destination}");
        }
    }
}

fn remote(workload: Workload) -> Workload {
    Workload { node: "remote".into(), ..workload }
}
