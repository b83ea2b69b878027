#![allow(clippy::unwrap_used)]

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, RData};
use proptest::prelude::*;

use super::*;

fn query_for(name: &str, kind: RecordType, edns: Option<(u16, bool)>) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(HickoryQuery::query(Name::from_ascii(name).unwrap(), kind));
    if let Some((payload, dnssec_ok)) = edns {
        let mut edns = hickory_proto::op::Edns::new();
        edns.set_max_payload(payload).set_dnssec_ok(dnssec_ok);
        message.set_edns(edns);
    }
    let mut bytes = message.to_vec().unwrap();
    // hickory writes no payload below 512.
    if let Some((payload, _)) = edns {
        let at = bytes.len() - 8;
        bytes[at..at + 2].copy_from_slice(&payload.to_be_bytes());
    }
    bytes
}

fn read(name: &str, edns: Option<(u16, bool)>) -> Query {
    Query::read(query_for(name, RecordType::A, edns)).unwrap()
}

fn ips(count: u8) -> Vec<IpAddr> {
    (1..=count).map(|last| IpAddr::from([10, 0, 0, last])).collect()
}

#[test]
fn an_answer_repeats_the_question_as_it_was_written_and_says_who_we_are() {
    let query = read("Web.Shop.svc.CLUSTER.local.", None);
    assert_eq!(query.name.as_deref(), Some("web.shop.svc.cluster.local"));
    let bytes = query.answer(&ips(2), None, 512);
    assert_eq!(bytes[12..query.question_end], query.bytes[12..query.question_end]);
    let answer = Message::from_vec(&bytes).unwrap();
    let meta = &answer.metadata;
    assert_eq!((meta.id, meta.message_type, meta.response_code), (0x1234, MessageType::Response, ResponseCode::NoError));
    assert_eq!((meta.authoritative, meta.recursion_available, meta.recursion_desired, meta.truncation), (true, true, true, false));
    assert!(answer.edns.is_none());
    let records: Vec<_> = answer.answers.iter().map(|record| (record.name.to_ascii(), record.ttl, record.data.to_string())).collect();
    let name = "Web.Shop.svc.CLUSTER.local.".to_owned();
    assert_eq!(records, [(name.clone(), 30, "10.0.0.1".to_owned()), (name, 30, "10.0.0.2".to_owned())]);
}

#[test]
fn an_owned_name_without_an_address_is_an_empty_answer_not_a_missing_name() {
    let answer = Message::from_vec(&read("web.", None).answer(&[], None, 512)).unwrap();
    assert_eq!((answer.metadata.response_code, answer.metadata.authoritative, answer.answers.len()), (ResponseCode::NoError, true, 0));
}

#[test]
fn a_stripped_search_domain_is_a_cname_to_the_rest_and_addresses_of_that() {
    let query = read("example.COM.shop.svc.cluster.local.", None);
    let answer = Message::from_vec(&query.answer(&["fd00::1".parse().unwrap(), "10.0.0.1".parse().unwrap()], Some(2), 512)).unwrap();
    let [cname, v6, v4] = answer.answers.as_slice() else { unreachable!("{answer}") };
    assert_eq!(cname.name.to_ascii(), "example.COM.shop.svc.cluster.local.");
    assert!(matches!(&cname.data, RData::CNAME(target) if target.0.to_ascii() == "example.COM."), "{answer}");
    for (record, address) in [(v6, "fd00::1"), (v4, "10.0.0.1")] {
        assert_eq!((record.name.to_ascii(), record.data.to_string()), ("example.COM.".to_owned(), address.to_owned()));
    }
}

#[test]
fn what_does_not_fit_is_left_out_and_the_tc_bit_says_so() {
    // 512 bytes: a header, the question, and 29 addresses of 16 bytes.
    let query = read("web.shop.svc.cluster.local.", None);
    let check = |bytes: Vec<u8>, limit: usize, count: usize, truncated: bool| {
        let answer = Message::from_vec(&bytes).unwrap();
        assert!(bytes.len() <= limit, "{} bytes", bytes.len());
        assert_eq!((answer.answers.len(), answer.metadata.truncation), (count, truncated));
    };
    assert_eq!(query.udp_limit(), 512);
    check(query.answer(&ips(30), None, 512), 512, 29, true);
    check(query.answer(&ips(29), None, 512), 512, 29, false);
    check(query.answer(&ips(200), None, 65_535), 65_535, 200, false);
    // With EDNS there is more room, and the OPT record is always in it.
    let query = read("web.shop.svc.cluster.local.", Some((1232, false)));
    assert_eq!(query.udp_limit(), 1232);
    let bytes = query.answer(&ips(200), None, 1232);
    assert_eq!(Message::from_vec(&bytes).unwrap().edns.unwrap().max_payload(), 1232);
    check(bytes, 1232, 73, true);
    // The longest names with the most addresses still fit into a message over TCP.
    let long = format!("{0}.{0}.{0}.{1}.", "a".repeat(63), "b".repeat(61));
    let most: Vec<IpAddr> = (0..u128::try_from(crate::proxy::dns::names::MOST_ADDRESSES).unwrap()).map(|number| IpAddr::V6(number.into())).collect();
    check(read(&long, None).answer(&most, Some(3), 65_535), 65_535, most.len() + 1, false);
    // And the longest names as CNAME without EDNS.
    let bytes = read(&long, None).answer(&most, Some(3), 512);
    assert!(bytes.len() <= 512);
    assert_eq!(Message::from_vec(&bytes).unwrap().answers.len(), 2, "the CNAME and one address");
    // Not even the CNAME fits: nothing, rather than addresses that nobody leads to.
    let longer = format!("{0}.{0}.{0}.{1}.a.b.", "a".repeat(63), "b".repeat(57));
    check(read(&longer, None).answer(&most, Some(4), 512), 512, 0, true);
}

#[test]
fn edns_comes_back_with_at_least_512_bytes_the_version_and_the_do_bit() {
    for (asked, dnssec_ok, given) in [(100, false, 512), (512, true, 512), (4096, true, 4096)] {
        let query = read("web.", Some((asked, dnssec_ok)));
        assert_eq!(query.udp_limit(), usize::from(given));
        for bytes in [query.answer(&ips(1), None, 512), query.refuse(Rcode::ServFail)] {
            let edns = Message::from_vec(&bytes).unwrap().edns.unwrap();
            assert_eq!((edns.max_payload(), edns.version(), edns.flags().dnssec_ok), (given, 0, dnssec_ok));
        }
    }
}

#[test]
fn what_is_no_query_is_refused_with_the_reason_and_less_than_a_header_is_silence() {
    let good = query_for("web.", RecordType::A, None);
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        match Query::read(bytes) {
            Err(Unreadable::Answer(answer)) => {
                assert_eq!((&answer[..2], answer[2] & QR), (&good[..2], QR));
                Some(rcode(&answer))
            }
            Err(Unreadable::Silence) => None,
            Ok(_) => Some(0),
        }
    };
    assert_eq!(refused(&|_| {}), Some(0));
    assert_eq!(refused(&|bytes| bytes[2] |= 0x80), Some(1), "a response");
    assert_eq!(refused(&|bytes| bytes[2] |= 5 << 3), Some(4), "an update");
    assert_eq!(refused(&|bytes| bytes[5] = 0), Some(1), "no question");
    assert_eq!(refused(&|bytes| bytes[5] = 2), Some(1), "two questions");
    assert_eq!(refused(&|bytes| bytes.truncate(20)), Some(1), "half a question");
    assert_eq!(refused(&|bytes| bytes.truncate(12)), Some(1));
    assert_eq!(refused(&|bytes| bytes.truncate(11)), None);
    assert_eq!(refused(&|bytes| bytes.clear()), None);
    // A name that is a pointer into the header, which reads as a name.
    assert_eq!(refused(&|bytes| drop(bytes.splice(12.., [0xc0, 4, 0, 1, 0, 1]))), Some(1));
    // What follows the question cannot be read: no answer of ours, but it may be passed on.
    let mut odd = good.clone();
    odd[11] = 1;
    odd.extend([0, 0, 41, 1]);
    let odd = Query::read(odd).unwrap();
    assert_eq!(rcode(&odd.answer(&ips(1), None, 512)), 1);
    assert_eq!(odd.udp_limit(), 512);
}

#[test]
fn only_addresses_of_the_internet_class_are_ours_and_odd_names_are_nobodys() {
    let family = |kind| Query::read(query_for("web.", kind, None)).unwrap().family();
    assert_eq!((family(RecordType::A), family(RecordType::AAAA)), (Some(Family::Ipv4), Some(Family::Ipv6)));
    for kind in [RecordType::SRV, RecordType::ANY, RecordType::PTR, RecordType::HTTPS, RecordType::TXT, RecordType::Unknown(4242)] {
        assert_eq!(family(kind), None);
    }
    let mut chaos = query_for("web.", RecordType::A, None);
    let last = chaos.len() - 1;
    chaos[last] = 3;
    assert_eq!(Query::read(chaos).unwrap().family(), None);
    // A label with a dot in it, and one with a space: neither is the name that it looks like.
    for byte in [b'.', b' ', 0, 0xff] {
        let mut bytes = query_for("a-b.", RecordType::A, None);
        bytes[14] = byte;
        assert_eq!(Query::read(bytes).unwrap().name, None);
    }
    assert_eq!(read(".", None).name.as_deref(), Some(""));
}

#[test]
fn an_upstream_answer_is_taken_as_it_is_if_it_answers_this_question() {
    let query = read("Example.com.", None);
    let answer_to = |name: &str, id: u16| {
        let mut message = Message::response(id, OpCode::Query);
        message.add_query(HickoryQuery::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.to_vec().unwrap()
    };
    let good = answer_to("example.com.", 7);
    let mut mine = good.clone();
    mine[..2].copy_from_slice(&query.bytes[..2]);
    assert_eq!(query.accept(good.clone(), 7, 512).unwrap(), mine);
    assert_eq!(query.accept(good.clone(), 8, 512), None, "another id");
    assert_eq!(query.accept(answer_to("example.org.", 7), 7, 512), None, "another name");
    assert_eq!(query.accept(query.with_id(7), 7, 512), None, "a query");
    assert_eq!(query.accept(good[..11].to_vec(), 7, 512), None);
    // Without the question only an error is believed.
    let mut short = good[..12].to_vec();
    short[5] = 0;
    assert_eq!(query.accept(short.clone(), 7, 512), None);
    short[3] = 1;
    assert_eq!(query.accept(short, 7, 512).unwrap().len(), 12);
    // Longer than the client can take: the question alone, and the TC bit.
    let mut long = good;
    long[7] = 9;
    long.resize(600, 0);
    let cut = query.accept(long.clone(), 7, 512).unwrap();
    assert_eq!((cut.len(), cut[2] & TC, cut[7]), (query.question_end, TC, 0));
    assert!(Message::from_vec(&cut).unwrap().metadata.truncation);
    assert_eq!(query.accept(long, 7, 65_535).unwrap().len(), 600);
}

proptest! {
    #[test]
    fn no_bytes_make_us_panic_and_every_answer_is_smaller_than_its_limit(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..80),
            (0_usize..60, any::<u8>(), 0_usize..70).prop_map(|(at, byte, length)| {
                let mut bytes = query_for("a.web.shop.svc.cluster.local.", RecordType::A, Some((1232, false)));
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
                bytes.truncate(length.max(12));
                bytes
            }),
        ],
        upstream in prop::collection::vec(any::<u8>(), 0..40),
        labels in 0_usize..10,
    ) {
        if let Ok(query) = Query::read(bytes) {
            let labels = Some(labels.min(query.labels.len())).filter(|labels| *labels > 0);
            let answer = query.answer(&ips(100), labels, query.udp_limit());
            prop_assert!(answer.len() <= query.udp_limit());
            if query.edns.is_ok() {
                prop_assert!(Message::from_vec(&answer).is_ok());
            }
            prop_assert!(Message::from_vec(&query.refuse(Rcode::ServFail)).is_ok());
            let _ = query.accept(upstream, 0, 512);
        }
    }
}

#[test]
fn a_question_of_our_own_is_one_that_we_would_read_and_its_answers_are_understood() {
    for (name, kind, family) in [("web.shop", RecordType::A, Family::Ipv4), ("web.shop", RecordType::AAAA, Family::Ipv6)] {
        let query = Query::about(name, family).unwrap();
        assert_eq!((query.name.as_deref(), query.kind, query.family()), (Some(name), kind, Some(family)));
        let mixed = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap(), "10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let found = addresses(&query.answer(&mixed, None, 512), family).unwrap();
        let expected: Vec<IpAddr> = mixed.into_iter().filter(|ip| ip.is_ipv4() == (family == Family::Ipv4)).collect();
        assert_eq!((found.list, found.truncated), (expected, false));
    }
    let query = Query::about("a.b", Family::Ipv4).unwrap();
    let found = addresses(&query.answer(&ips(200), None, 512), Family::Ipv4).unwrap();
    assert!(found.truncated && !found.list.is_empty());
    let refused = addresses(&query.refuse(Rcode::ServFail), Family::Ipv4).unwrap();
    assert_eq!((refused.list.len(), refused.code.as_str()), (0, "Server Failure"));
    for wrong in ["", ".", "a..b", "a.", &"a".repeat(64), &["abc"; 100].join(".")] {
        assert!(Query::about(wrong, Family::Ipv4).is_none(), "{wrong:?}");
    }
    assert_eq!(addresses(&[0; 5], Family::Ipv4), None);
}
