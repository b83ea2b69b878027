#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::super::tests::{ip, pod, service};
use super::*;
use crate::model::IpFamilies;

#[test]
fn the_asked_address_then_a_permitted_one_of_its_family_then_any_permitted() {
    const DUAL: [&str; 4] = ["10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::2"];
    type Case = (&'static str, &'static [&'static str], Option<IpFamilies>, Option<&'static str>);
    let cases: [Case; 12] = [
        ("10.0.0.2", &DUAL, None, Some("10.0.0.2")),
        ("2001:db8::2", &DUAL, Some(IpFamilies::Ipv4), Some("2001:db8::2")),
        ("10.1.0.1", &DUAL, None, Some("10.0.0.1")),
        ("fd00::1", &DUAL, None, Some("2001:db8::1")),
        ("fd00::1", &DUAL, Some(IpFamilies::Dual), Some("2001:db8::1")),
        ("fd00::1", &DUAL, Some(IpFamilies::Ipv4), Some("10.0.0.1")),
        ("10.1.0.1", &DUAL, Some(IpFamilies::Ipv6), Some("2001:db8::1")),
        ("fd00::1", &["10.0.0.1"], None, Some("10.0.0.1")),
        ("10.1.0.1", &["2001:db8::1"], Some(IpFamilies::Dual), Some("2001:db8::1")),
        ("10.1.0.1", &["2001:db8::1"], Some(IpFamilies::Ipv4), None),
        ("fd00::1", &["10.0.0.1"], Some(IpFamilies::Ipv6), None),
        ("10.1.0.1", &[], None, None),
    ];
    for (original, addresses, ip_families, expected) in cases {
        let service = Service { ip_families, ..service("h", &[], &[]) };
        let picked = address(&pod("a", addresses), Some(&service), ip(original), &[]);
        assert_eq!(picked.ok(), expected.map(ip), "{original} of {addresses:?} for {ip_families:?}");
    }
}

#[test]
fn a_workload_that_is_known_by_name_only_has_the_address_that_was_resolved_for_it() {
    let by_name = Workload { hostname: "db.example".into(), ..pod("db", &[]) };
    let resolved = [("other.example".into(), ip("10.0.0.8")), ("db.example".into(), ip("10.0.0.9"))];
    assert_eq!(address(&by_name, None, ip("10.1.0.1"), &resolved), Ok(ip("10.0.0.9")));
    // An address of its own comes before a name.
    let both = Workload { hostname: "db.example".into(), ..pod("db", &["10.0.0.1"]) };
    assert_eq!(address(&both, None, ip("10.1.0.1"), &resolved), Ok(ip("10.0.0.1")));
    assert!(
        matches!(address(&by_name, None, ip("10.1.0.1"), &resolved[..1]), Err(RouteError::NeedsDns { hostname, .. }) if hostname == "db.example")
    );
    assert!(matches!(address(&pod("a", &[]), None, ip("10.1.0.1"), &resolved), Err(RouteError::NoValidDestination(_))));
}
