#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::super::tests::workload;
use super::*;
use crate::discovery::form::tests::rows;

fn encoded(from: &wire::Workload) -> Vec<u8> {
    wire::Address { r#type: Some(wire::AddressType::Workload(from.clone())) }.encode_to_vec()
}

fn read(reader: &mut Reader, from: &wire::Workload) -> Result<Workload, String> {
    match reader.row(&encoded(from))? {
        Row::Workload(workload) => Ok(workload),
        Row::Service(service) => panic!("{service:?}"),
    }
}

fn replica(name: &str) -> wire::Workload {
    wire::Workload { uid: format!("c//Pod/shop/{name}"), name: name.into(), namespace: "shop".into(), node: "n".into(), ..wire::Workload::default() }
}

#[test]
fn replicas_share_one_profile_and_others_do_not() {
    let mut reader = Reader::default();
    let one = read(&mut reader, &replica("a")).unwrap();
    let two = read(&mut reader, &wire::Workload { capacity: Some(7), status: 1, hostname: "h".into(), ..replica("b") }).unwrap();
    let other = read(&mut reader, &wire::Workload { native_tunnel: true, ..replica("c") }).unwrap();
    assert!(Arc::ptr_eq(&one.profile, &two.profile));
    assert!(!Arc::ptr_eq(&one.profile, &other.profile) && other.profile.native_tunnel);
    assert_eq!((two.name.as_str(), two.capacity, two.hostname.as_str()), ("b", 7, "h"));
    assert!(std::ptr::eq(one.node.as_str(), two.node.as_str()), "a word that repeats is one allocation");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Oracle: a reader that has met nobody before.
    #[test]
    fn whoever_was_read_before_makes_no_difference(rows in rows()) {
        let mut reader = Reader::default();
        for row in rows.workloads.iter().chain(&rows.workloads) {
            let message = workload(row);
            prop_assert_eq!(read(&mut reader, &message), read(&mut Reader::default(), &message));
        }
    }

    /// Oracle: prost. Every message that it takes for a workload is one, and the other way round, whatever the order of its fields.
    #[test]
    fn what_decodes_is_what_prost_decodes(mut bytes in proptest::collection::vec(any::<u8>(), 0..40), first in 0..4_u8) {
        if let Some(byte) = bytes.first_mut() {
            *byte = [0x0a, 0x4a, 0x88, 0xa2][usize::from(first)];
        }
        let mut shared = Vec::new();
        let ours = Own::split(&bytes, &mut shared).and_then(|own| {
            wire::Workload::decode(shared.as_slice()).map(|_| (own.name.to_owned(), own.node.to_owned(), own.uid.to_owned(), own.status)).map_err(|error| error.to_string())
        });
        let theirs = wire::Workload::decode(bytes.as_slice()).map(|workload| (workload.name, workload.node, workload.uid, workload.status));
        prop_assert_eq!(ours.as_ref().ok(), theirs.as_ref().ok(), "{:?} {:?}", &ours, &theirs);
    }
}

#[test]
fn an_address_in_pieces_is_put_together_and_a_later_kind_wins() {
    let (one, two) = (encoded(&replica("a")), encoded(&wire::Workload { hostname: "h".into(), ..wire::Workload::default() }));
    let Row::Workload(both) = Reader::default().row(&[&one[..], &two[..]].concat()).unwrap() else { panic!("a service") };
    assert_eq!((both.uid.as_str(), both.hostname.as_str()), ("c//Pod/shop/a", "h"));
    let service = wire::Service { namespace: "shop".into(), hostname: "web".into(), ..wire::Service::default() };
    let service = wire::Address { r#type: Some(wire::AddressType::Service(service)) }.encode_to_vec();
    assert!(matches!(Reader::default().row(&[&one[..], &service[..]].concat()), Ok(Row::Service(_))));
    assert_eq!(Reader::default().row(b""), Err("neither a workload nor a service".to_owned()));
}
