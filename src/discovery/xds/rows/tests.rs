#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;
use prost::Message;

use super::super::reader::Reader;
use super::*;

fn workload() -> wire::Workload {
    wire::Workload { uid: "Kubernetes//Pod/shop/web-0".into(), name: "web-0".into(), namespace: "shop".into(), ..wire::Workload::default() }
}

fn service() -> wire::Service {
    wire::Service { name: "web".into(), namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into(), ..wire::Service::default() }
}

fn read(from: wire::Workload) -> Result<Workload, String> {
    let address = wire::Address { r#type: Some(wire::AddressType::Workload(from)) };
    match Reader::default().row(&address.encode_to_vec())? {
        Row::Workload(workload) => Ok(workload),
        Row::Service(service) => panic!("{service:?}"),
    }
}

fn read_vip(address: &[u8], length: Option<u32>) -> Result<Service, String> {
    let vip = wire::NetworkAddress { network: "n".into(), address: Bytes::copy_from_slice(address), length };
    read_service(wire::Service { addresses: vec![vip], ..service() }, &mut Words::default())
}

#[test]
fn a_workload_that_says_little_has_the_defaults_of_the_reference() {
    let found = read(workload()).unwrap();
    let expected = Profile { namespace: "shop".into(), ..Profile::default() };
    assert_eq!(*found.profile, expected);
    assert_eq!((found.capacity, found.status, found.addresses.len()), (1, HealthStatus::Healthy, 0));
    assert_eq!(read(wire::Workload { capacity: Some(0), ..workload() }).unwrap().capacity, 0);
}

#[test]
fn addresses_have_4_or_16_bytes_and_mapped_ones_are_canonical() {
    let with = |bytes: &[u8]| read(wire::Workload { addresses: vec![Bytes::copy_from_slice(bytes)], ..workload() });
    assert_eq!(with(&[10, 0, 0, 1]).unwrap().addresses, [IpAddr::from([10, 0, 0, 1])]);
    let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
    assert_eq!(with(&mapped).unwrap().addresses, [IpAddr::from([10, 0, 0, 1])]);
    assert_eq!(with(&[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]).unwrap().addresses, ["2001:db8::1".parse::<IpAddr>().unwrap()]);
    for length in [0, 3, 5, 15, 17] {
        assert_eq!(with(&vec![1; length]).unwrap_err(), format!("addresses: an address has {length} bytes, not 4 or 16"));
    }
}

#[test]
fn numbers_that_an_enumeration_does_not_have_refuse_the_resource() {
    let balancing = |balancing| wire::Service { load_balancing: Some(balancing), ..service() };
    let workloads = [
        ("tunnel_protocol", wire::Workload { tunnel_protocol: 9, ..workload() }),
        ("tunnel_protocol LEGACY", wire::Workload { tunnel_protocol: 2, ..workload() }),
        ("network_mode", wire::Workload { network_mode: 9, ..workload() }),
        ("status", wire::Workload { status: 9, ..workload() }),
        ("application_tunnel.protocol", wire::Workload { application_tunnel: Some(wire::ApplicationTunnel { protocol: 9, port: 0 }), ..workload() }),
    ];
    for (field, from) in workloads {
        let reason = read(from).unwrap_err();
        assert!(reason.starts_with(field), "{reason}");
    }
    let services = [
        ("ip_families", wire::Service { ip_families: 9, ..service() }),
        ("load_balancing.mode", balancing(wire::LoadBalancing { mode: 9, ..wire::LoadBalancing::default() })),
        ("load_balancing.health_policy", balancing(wire::LoadBalancing { health_policy: 9, ..wire::LoadBalancing::default() })),
        ("load_balancing.routing", balancing(wire::LoadBalancing { routing_preference: vec![9], ..wire::LoadBalancing::default() })),
        ("load_balancing.routing", balancing(wire::LoadBalancing { routing_preference: vec![0], ..wire::LoadBalancing::default() })),
    ];
    for (field, from) in services {
        let reason = read_service(from, &mut Words::default()).unwrap_err();
        assert!(reason.starts_with(field), "{reason}");
    }
}

#[test]
fn an_unknown_type_is_a_deployment_and_an_unknown_visibility_is_public() {
    assert_eq!(read(wire::Workload { workload_type: 9, ..workload() }).unwrap().profile.kind, WorkloadKind::Deployment);
    let read = read_service(wire::Service { visibility: 9, ..service() }, &mut Words::default()).unwrap();
    assert_eq!(read.visibility, Visibility::Public);
}

#[test]
fn what_no_look_up_could_use_refuses_the_resource() {
    let ports = |service_port, target_port| {
        let list = wire::PortList { ports: vec![wire::Port { service_port, target_port, app_protocol: 0 }] };
        wire::Workload { services: [("shop/web".to_owned(), list)].into(), ..workload() }
    };
    let nowhere = wire::GatewayAddress { destination: None, hbone_mtls_port: 1 };
    let nameless = wire::NamespacedHostname { namespace: "shop".into(), hostname: String::new() };
    let unnamed = wire::GatewayAddress { destination: Some(wire::Destination::Hostname(nameless)), hbone_mtls_port: 1 };
    for (reason, from) in [
        ("uid is empty", wire::Workload { uid: String::new(), ..workload() }),
        (
            "services: \"web\" is not namespace/hostname",
            wire::Workload { services: [("web".to_owned(), wire::PortList::default())].into(), ..workload() },
        ),
        ("services: 0 is not a service port", ports(0, 80)),
        ("services: 65536 is not a port", ports(65536, 80)),
        ("services: 65617 is not a port", ports(80, 65617)),
        ("waypoint: it has no destination", wire::Workload { waypoint: Some(nowhere.clone()), ..workload() }),
        ("network_gateway: it has no destination", wire::Workload { network_gateway: Some(nowhere.clone()), ..workload() }),
        ("waypoint: its host name is empty", wire::Workload { waypoint: Some(unnamed), ..workload() }),
    ] {
        assert_eq!(read(from).unwrap_err(), reason);
    }
    let weighted = vec![wire::WeightedWaypoint { destination: None, weight: 1 }];
    for from in [
        wire::Service { hostname: String::new(), ..service() },
        wire::Service { namespace: "a/b".into(), ..service() },
        wire::Service { weighted_waypoints: weighted, ..service() },
    ] {
        assert!(read_service(from.clone(), &mut Words::default()).is_err(), "{from:?}");
    }
    assert!(ports_of(&read(ports(80, 0)).unwrap()).eq([(80, 0)]), "a named port");
}

fn ports_of(workload: &Workload) -> impl Iterator<Item = (u16, u16)> {
    workload.profile.services[0].1.iter()
}

#[test]
fn a_length_makes_a_range_unless_it_is_the_whole_address() {
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let mapped = Ipv4Addr::new(10, 1, 2, 3).to_ipv6_mapped().octets();
    for (bytes, length, range) in [
        (&[10, 1, 2, 3][..], None, None),
        (&[10, 1, 2, 3], Some(32), None),
        (&[10, 1, 2, 3], Some(8), Some("10.0.0.0/8")),
        (&[10, 1, 2, 3], Some(0), Some("0.0.0.0/0")),
        (&v6.octets(), Some(128), None),
        (&v6.octets(), Some(32), Some("2001:db8::/32")),
        (&mapped, Some(128), None),
        (&mapped, Some(104), Some("10.0.0.0/8")),
    ] {
        let read = read_vip(bytes, length).unwrap();
        let found = read.cidr_vips.iter().map(|(_, range)| range.to_string()).next();
        assert_eq!(found.as_deref(), range, "{bytes:?} {length:?}");
        assert_eq!(read.vips.len(), usize::from(range.is_none()));
    }
    for (bytes, length) in [(&[10, 1, 2, 3][..], 33), (&v6.octets(), 129), (&mapped, 95), (&[10, 1, 2, 3], 1 << 20)] {
        assert!(read_vip(bytes, Some(length)).is_err(), "{bytes:?} {length}");
    }
}

#[test]
fn a_gateway_without_a_port_has_the_usual_one() {
    let hostname = wire::NamespacedHostname { namespace: "shop".into(), hostname: "waypoint.shop".into() };
    let waypoint = wire::GatewayAddress { destination: Some(wire::Destination::Hostname(hostname)), hbone_mtls_port: 0 };
    let read = read(wire::Workload { waypoint: Some(waypoint), ..workload() }).unwrap();
    assert_eq!(read.profile.waypoint.as_ref().unwrap().hbone_port, 15008);
}
