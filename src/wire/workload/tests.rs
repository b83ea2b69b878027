//! Each message with the bytes that protoc's encoders give for it, written by hand from the field tags. Every field has a value of
//! its own, so that two swapped tags cannot hide.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn gateway() -> GatewayAddress {
    let address = NetworkAddress { network: "n".into(), address: Bytes::from_static(&[10, 0, 0, 1]), length: None };
    GatewayAddress { destination: Some(Destination::Address(address)), hbone_mtls_port: 15008 }
}

/// Address (2) with network (1) and address (2), then port (3).
const GATEWAY: &[u8] = b"\x12\x09\x0a\x01n\x12\x04\x0a\x00\x00\x01\x18\xa0\x75";

#[test]
fn a_workload_has_its_golden_bytes() {
    let workload = Workload {
        name: "a".into(),
        namespace: "b".into(),
        addresses: vec![Bytes::from_static(&[1, 2, 3, 4])],
        network: "c".into(),
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: "d".into(),
        service_account: "e".into(),
        waypoint: Some(gateway()),
        node: "f".into(),
        canonical_name: "g".into(),
        canonical_revision: "h".into(),
        workload_type: WorkloadType::Job.into(),
        workload_name: "i".into(),
        native_tunnel: true,
        authorization_policies: vec!["j/k".into()],
        status: WorkloadStatus::Unhealthy.into(),
        cluster_id: "l".into(),
        network_gateway: Some(gateway()),
        uid: "m".into(),
        hostname: "o".into(),
        services: [("p/q".to_owned(), PortList { ports: vec![Port { service_port: 80, target_port: 81, app_protocol: 4 }] })].into(),
        application_tunnel: Some(ApplicationTunnel { protocol: ApplicationProtocol::Proxy.into(), port: 82 }),
        locality: Some(Locality { region: "r".into(), zone: "s".into(), subzone: "t".into() }),
        network_mode: NetworkMode::HostNetwork.into(),
        extensions: vec![Extension { name: "u".into(), config: None }],
        capacity: Some(2),
    };
    let bytes = joined(&[
        b"\x0a\x01a\x12\x01b\x1a\x04\x01\x02\x03\x04\x22\x01c\x28\x01\x32\x01d\x3a\x01e\x42\x0e",
        GATEWAY,
        b"\x4a\x01f\x52\x01g\x5a\x01h\x60\x03\x6a\x01i\x70\x01\x82\x01\x03j/k\x88\x01\x01\x92\x01\x01l\x9a\x01\x0e",
        GATEWAY,
        b"\xa2\x01\x01m\xaa\x01\x01o\xb2\x01\x0f\x0a\x03p/q\x12\x08\x0a\x06\x08\x50\x10\x51\x18\x04",
        b"\xba\x01\x04\x08\x01\x10\x52\xc2\x01\x09\x0a\x01r\x12\x01s\x1a\x01t\xc8\x01\x01\xd2\x01\x03\x0a\x01u\xda\x01\x02\x08\x02",
    ]);
    assert_eq!(workload.encode_to_vec(), bytes);
    assert_eq!(Workload::decode(&bytes[..]).unwrap(), workload);
    let address = Address { r#type: Some(AddressType::Workload(Workload { uid: "m".into(), ..Workload::default() })) };
    assert_eq!(address.encode_to_vec(), b"\x0a\x04\xa2\x01\x01m");
}

#[test]
fn a_service_has_its_golden_bytes() {
    let service = Service {
        name: "a".into(),
        namespace: "b".into(),
        hostname: "c".into(),
        addresses: vec![NetworkAddress { network: String::new(), address: Bytes::from_static(&[10, 0, 0, 0]), length: Some(8) }],
        ports: vec![Port { service_port: 80, target_port: 0, app_protocol: 0 }],
        subject_alt_names: vec!["d".into()],
        waypoint: Some(gateway()),
        load_balancing: Some(LoadBalancing {
            routing_preference: vec![Scope::Network.into(), Scope::Region.into()],
            mode: Mode::Failover.into(),
            health_policy: HealthPolicy::AllowAll.into(),
        }),
        ip_families: IpFamilies::Dual.into(),
        extensions: vec![Extension { name: "e".into(), config: Some(Any { type_url: "t".into(), value: Bytes::new() }) }],
        canonical: true,
        ingress_use_waypoint: true,
        weighted_waypoints: vec![WeightedWaypoint { destination: Some(gateway()), weight: 3 }],
        visibility: Visibility::Namespace.into(),
    };
    let bytes = joined(&[
        b"\x0a\x01a\x12\x01b\x1a\x01c\x22\x08\x12\x04\x0a\x00\x00\x00\x18\x08\x2a\x02\x08\x50\x32\x01d\x3a\x0e",
        GATEWAY,
        b"\x42\x08\x0a\x02\x06\x01\x10\x02\x18\x01\x48\x03\x52\x08\x0a\x01e\x12\x03\x0a\x01t\x58\x01\x60\x01\x6a\x12\x0a\x0e",
        GATEWAY,
        b"\x10\x03\x70\x01",
    ]);
    assert_eq!(service.encode_to_vec(), bytes);
    assert_eq!(Service::decode(&bytes[..]).unwrap(), service);
    let address = Address { r#type: Some(AddressType::Service(Service { name: "a".into(), ..Service::default() })) };
    assert_eq!(address.encode_to_vec(), b"\x12\x03\x0a\x01a");
}

#[test]
fn a_gateway_by_name_has_its_golden_bytes() {
    let hostname = NamespacedHostname { namespace: "a".into(), hostname: "b".into() };
    let gateway = GatewayAddress { destination: Some(Destination::Hostname(hostname)), hbone_mtls_port: 1 };
    assert_eq!(gateway.encode_to_vec(), b"\x0a\x06\x0a\x01a\x12\x01b\x18\x01");
}

#[test]
fn a_whole_prefix_and_a_prefix_of_no_bits_differ_from_no_prefix() {
    let address = |length| NetworkAddress { network: String::new(), address: Bytes::new(), length }.encode_to_vec();
    assert_eq!((address(None), address(Some(0)), address(Some(32))), (vec![], vec![0x18, 0], vec![0x18, 32]));
}

#[test]
fn a_kind_of_address_that_we_do_not_know_decodes_to_none() {
    assert_eq!(Address::decode(&b"\x1a\x00"[..]).unwrap().r#type, None);
}
