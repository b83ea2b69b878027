#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;

use super::*;

fn with(conditions: wire::Match) -> wire::Authorization {
    let clause = wire::Clause { matches: vec![conditions] };
    wire::Authorization {
        name: "allow".into(),
        namespace: "shop".into(),
        scope: wire::Scope::WorkloadSelector.into(),
        action: wire::Action::Allow.into(),
        rules: vec![wire::Rule { clauses: vec![clause] }],
        ..wire::Authorization::default()
    }
}

fn read(from: &wire::Authorization) -> Authorization {
    policy("shop/allow", &from.encode_to_vec())
}

fn reason(of: &Authorization) -> &str {
    match &of.validity {
        Validity::Invalid(reason) => reason,
        Validity::Valid => panic!("valid: {of:?}"),
    }
}

#[test]
fn a_condition_that_is_not_understood_makes_the_policy_one_that_denies_its_targets() {
    let word = |match_type| vec![wire::StringMatch { match_type }];
    let range = |bytes: &'static [u8], length| vec![wire::Address { address: Bytes::from_static(bytes), length }];
    let extension = crate::wire::workload::Extension { name: "other".into(), config: None };
    let account = |namespace: &str, name: &str| vec![wire::ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() }];
    for (field, conditions) in [
        ("namespaces", wire::Match { namespaces: word(None), ..wire::Match::default() }),
        ("not_principals", wire::Match { not_principals: word(Some(wire::MatchType::Exact(String::new()))), ..wire::Match::default() }),
        ("source_ips", wire::Match { source_ips: range(&[1, 2, 3], 8), ..wire::Match::default() }),
        ("not_source_ips", wire::Match { not_source_ips: range(&[1, 2, 3, 4], 33), ..wire::Match::default() }),
        ("destination_ips", wire::Match { destination_ips: range(&[], 0), ..wire::Match::default() }),
        ("not_destination_ips", wire::Match { not_destination_ips: range(&[1, 2, 3, 4], 300), ..wire::Match::default() }),
        ("destination_ports", wire::Match { destination_ports: vec![80, 65616], ..wire::Match::default() }),
        ("not_destination_ports", wire::Match { not_destination_ports: vec![65536], ..wire::Match::default() }),
        ("service_accounts", wire::Match { service_accounts: account("", "a"), ..wire::Match::default() }),
        ("not_service_accounts", wire::Match { not_service_accounts: account("a", ""), ..wire::Match::default() }),
        ("extensions", wire::Match { extensions: vec![extension], ..wire::Match::default() }),
    ] {
        let read = read(&with(conditions));
        let expected = format!("rules[0]: clauses[0]: matches[0]: {field}: ");
        assert!(reason(&read).starts_with(&expected), "{}", reason(&read));
        assert_eq!((read.scope, read.key().as_str()), (Scope::WorkloadSelector, "shop/allow"), "only its own targets are denied");
    }
}

#[test]
fn a_policy_of_an_unknown_action_or_field_denies_its_targets_and_of_an_unknown_scope_everybody() {
    let action = read(&wire::Authorization { action: 7, ..with(wire::Match::default()) });
    assert_eq!((reason(&action), action.scope), ("action has the unknown value 7", Scope::WorkloadSelector));
    let scope = read(&wire::Authorization { scope: 7, ..with(wire::Match::default()) });
    assert_eq!((reason(&scope), scope.scope), ("scope has the unknown value 7", Scope::Global));
    let mut encoded = with(wire::Match::default()).encode_to_vec();
    encoded.extend([0x40, 1]);
    let field = policy("shop/allow", &encoded);
    assert_eq!((reason(&field), field.scope), ("it has a field that is not known here: 8", Scope::WorkloadSelector));
}

#[test]
fn a_policy_that_does_not_decode_denies_those_that_its_outline_names() {
    // Scope is Namespace; then a rule that is no message.
    let broken = policy("shop/allow", b"\x18\x01\x2a\x02\x0a\x05");
    assert!(reason(&broken).starts_with("not a policy: "), "{}", reason(&broken));
    assert_eq!((broken.scope, broken.dry_run, broken.key().as_str()), (Scope::Namespace, false, "shop/allow"));
    let nothing = policy("shop/allow", b"\xff\xff");
    assert_eq!(nothing.scope, Scope::Global);
    assert!(policy("shop/allow", b"\x30\x01\x2a\x02\x0a\x05").dry_run);
}

#[test]
fn a_policy_is_kept_under_the_name_of_its_resource_and_denies_if_it_has_another() {
    let valid = with(wire::Match { destination_ports: vec![80], ..wire::Match::default() });
    let other = policy("shop/other", &valid.encode_to_vec());
    assert_eq!((other.key().as_str(), reason(&other), other.scope), ("shop/other", "it says that it is shop/allow", Scope::WorkloadSelector));
    let elsewhere = policy("bank/allow", &wire::Authorization { scope: 1, ..valid.clone() }.encode_to_vec());
    assert_eq!(elsewhere.scope, Scope::Global, "two namespaces may be meant");
    assert_eq!((key("shop/allow").as_str(), key("allow").as_str()), ("shop/allow", "/allow"));
    assert_eq!(policy("allow", &valid.encode_to_vec()).key(), key("allow"));
    assert_eq!(read(&valid).validity, Validity::Valid);
}
