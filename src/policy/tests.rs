#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
//! Single rules, named as the reference names its tests (dataplane §12.4).

use std::sync::Arc;

use super::*;
use crate::model::{SpiffeId, Text};

fn facts(identity: Option<&str>, source: &str, destination: &str) -> Facts {
    let (ip, port) = destination.rsplit_once(':').unwrap();
    Facts {
        identity: identity.map(|id| format!("spiffe://{id}").parse::<SpiffeId>().unwrap()),
        source_ip: source.parse().unwrap(),
        destination_ip: ip.parse().unwrap(),
        destination_port: port.parse().unwrap(),
    }
}

/// From td/ns/namespace/sa/account, 127.0.0.1, to 127.0.0.2:8080.
fn usual() -> Facts {
    facts(Some("td/ns/namespace/sa/account"), "127.0.0.1", "127.0.0.2:8080")
}

fn plaintext() -> Facts {
    Facts { identity: None, ..usual() }
}

fn one(found: Match) -> Vec<Rule> {
    vec![Rule { clauses: vec![Clause { matches: vec![found] }] }]
}

fn global(name: &str, action: Action, rules: Vec<Rule>) -> Authorization {
    Authorization::new(name, "root", Scope::Global, action, rules)
}

fn set_of(policies: impl IntoIterator<Item = Authorization>) -> PolicySet {
    let mut set = PolicySet::new();
    policies.into_iter().for_each(|policy| set.insert(policy));
    set
}

/// Whether an ALLOW policy with these rules matches; a DENY policy with the same rules must agree unless identities are absent.
fn allows(rules: Vec<Rule>, facts: &Facts) -> bool {
    let allowed = set_of([global("p", Action::Allow, rules.clone())]).compile("n", &[]).permit(facts).is_ok();
    if facts.identity.is_some() {
        assert_eq!(denies(rules, facts), allowed, "ALLOW and DENY must match alike");
    }
    allowed
}

fn denies(rules: Vec<Rule>, facts: &Facts) -> bool {
    set_of([global("p", Action::Deny, rules)]).compile("n", &[]).permit(facts).is_err()
}

fn exact(text: &str) -> Vec<StringMatch> {
    vec![StringMatch::Exact(text.into())]
}

fn from_namespace(namespace: &str) -> Match {
    Match { namespaces: exact(namespace), ..Match::default() }
}

fn to_port(port: u16) -> Match {
    Match { destination_ports: vec![port], ..Match::default() }
}

#[test]
fn rbac_empty_policy() {
    let empty_match = || Clause { matches: vec![Match::default(), Match::default()] };
    let real = || Clause { matches: vec![to_port(8080)] };
    assert!(!allows(vec![], &usual()), "no rules: never");
    assert!(allows(vec![Rule::default()], &usual()), "a rule without clauses: always");
    assert!(allows(vec![Rule { clauses: vec![Clause::default()] }], &usual()), "a clause without matches: true");
    assert!(!allows(vec![Rule { clauses: vec![empty_match()] }], &usual()), "a clause of empty matches only: false");
    assert!(!allows(vec![Rule { clauses: vec![real(), empty_match()] }], &usual()), "such a clause fails its whole rule");
    assert!(allows(vec![Rule { clauses: vec![empty_match()] }, Rule::default()], &usual()), "and no other rule");
    let mixed = Clause { matches: vec![Match::default(), to_port(8080)] };
    assert!(allows(vec![Rule { clauses: vec![mixed] }], &usual()), "an empty match beside one that holds does no harm");
    let no_rules = |action| set_of([global("p", action, vec![])]).compile("n", &[]);
    assert!(no_rules(Action::Deny).permit(&usual()).is_ok(), "DENY without rules is a no-op");
    assert_eq!(no_rules(Action::Allow).permit(&usual()).unwrap_err().to_string(), "allow policies exist, but none allowed");
    assert_eq!(PolicySet::new().compile("n", &[]).permit(&plaintext()).unwrap().policy(), None);
}

#[test]
fn rbac_nesting() {
    // (namespace is a or b) and (port is 80 or 8080).
    let rule = Rule {
        clauses: vec![Clause { matches: vec![from_namespace("a"), from_namespace("b")] }, Clause { matches: vec![to_port(80), to_port(8080)] }],
    };
    let passes = |namespace: &str, port: u16| {
        allows(vec![rule.clone()], &facts(Some(&format!("td/ns/{namespace}/sa/x")), "127.0.0.1", &format!("127.0.0.2:{port}")))
    };
    assert!(passes("a", 80) && passes("a", 8080) && passes("b", 80) && passes("b", 8080));
    assert!(!passes("c", 80) && !passes("a", 81) && !passes("c", 81));
    // Inside one match all kinds must hold.
    let both = Match { destination_ports: vec![80], ..from_namespace("a") };
    assert!(allows(one(both.clone()), &facts(Some("td/ns/a/sa/x"), "127.0.0.1", "127.0.0.2:80")));
    assert!(!allows(one(both.clone()), &facts(Some("td/ns/b/sa/x"), "127.0.0.1", "127.0.0.2:80")));
    assert!(!allows(one(both), &facts(Some("td/ns/a/sa/x"), "127.0.0.1", "127.0.0.2:81")));
    // Positive and negative list of one kind must both pass.
    let narrowed =
        Match { namespaces: vec![StringMatch::Prefix("name".into())], not_namespaces: vec![StringMatch::Suffix("space".into())], ..Match::default() };
    assert!(!allows(one(narrowed.clone()), &usual()));
    assert!(allows(one(narrowed), &facts(Some("td/ns/named/sa/x"), "127.0.0.1", "127.0.0.2:80")));
}

#[test]
fn rbac_multi_rule() {
    let rules = || [one(from_namespace("a")), one(to_port(8080))].concat();
    assert!(allows(rules(), &facts(Some("td/ns/a/sa/x"), "127.0.0.1", "127.0.0.2:1")), "the first rule suffices");
    assert!(allows(rules(), &facts(Some("td/ns/b/sa/x"), "127.0.0.1", "127.0.0.2:8080")), "so does the second");
    assert!(!allows(rules(), &facts(Some("td/ns/b/sa/x"), "127.0.0.1", "127.0.0.2:1")));
}

/// One attribute: `yes` must hold of the usual facts and `no` must not; negated the other way round.
fn attribute(positive: impl Fn(&str) -> Match, negated: impl Fn(&str) -> Match, yes: &[&str], no: &[&str]) {
    for word in yes {
        assert!(allows(one(positive(word)), &usual()), "{word}");
        assert!(!allows(one(negated(word)), &usual()), "not {word}");
    }
    for word in no {
        assert!(!allows(one(positive(word)), &usual()), "{word}");
        assert!(allows(one(negated(word)), &usual()), "not {word}");
    }
}

#[test]
fn rbac_namespaces() {
    attribute(
        |word| Match { namespaces: exact(word), ..Match::default() },
        |word| Match { not_namespaces: exact(word), ..Match::default() },
        &["namespace"],
        &["bad", "namespac", "namespacee", "Namespace"],
    );
    assert!(!allows(one(Match { namespaces: vec![StringMatch::Presence], ..Match::default() }), &plaintext()), "no identity, no namespace");
}

#[test]
fn rbac_principals() {
    attribute(
        |word| Match { principals: exact(word), ..Match::default() },
        |word| Match { not_principals: exact(word), ..Match::default() },
        &["td/ns/namespace/sa/account"],
        &["td/ns/namespace/sa/other", "spiffe://td/ns/namespace/sa/account", "other/ns/namespace/sa/account", "account"],
    );
    assert!(!allows(one(Match { principals: vec![StringMatch::Presence], ..Match::default() }), &plaintext()), "absent is not present");
}

#[test]
fn rbac_service_accounts() {
    let account = |word: &str| {
        let (namespace, service_account) = word.split_once('/').unwrap();
        vec![ServiceAccountMatch { namespace: namespace.into(), service_account: service_account.into() }]
    };
    attribute(
        |word| Match { service_accounts: account(word), ..Match::default() },
        |word| Match { not_service_accounts: account(word), ..Match::default() },
        &["namespace/account"],
        &["namespace/other", "other/account", "namespace/accoun"],
    );
    let elsewhere = facts(Some("other.domain/ns/namespace/sa/account"), "127.0.0.1", "127.0.0.2:8080");
    assert!(allows(one(Match { service_accounts: account("namespace/account"), ..Match::default() }), &elsewhere), "in any trust domain");
}

#[test]
fn rbac_source_ips() {
    let nets = |word: &str| vec![word.parse().unwrap()];
    attribute(
        |word| Match { source_ips: nets(word), ..Match::default() },
        |word| Match { not_source_ips: nets(word), ..Match::default() },
        &["127.0.0.1/32", "127.0.0.0/8", "0.0.0.0/0", "127.255.0.1/8"],
        &["127.0.0.2/32", "128.0.0.0/8", "::/0"],
    );
}

#[test]
fn rbac_destination_ips() {
    let nets = |word: &str| vec![word.parse().unwrap()];
    attribute(
        |word| Match { destination_ips: nets(word), ..Match::default() },
        |word| Match { not_destination_ips: nets(word), ..Match::default() },
        &["127.0.0.2/32", "127.0.0.0/24"],
        &["127.0.0.1/32", "::/0"],
    );
}

#[test]
fn rbac_destination_ports() {
    let ports = |word: &str| vec![word.parse().unwrap(), 1];
    attribute(
        |word| Match { destination_ports: ports(word), ..Match::default() },
        |word| Match { not_destination_ports: ports(word), ..Match::default() },
        &["8080"],
        &["80", "15008"],
    );
}

#[test]
fn rbac_cidr_range() {
    let within = |nets: &[&str], source: &str| {
        let source_ips = nets.iter().map(|net| net.parse().unwrap()).collect();
        allows(one(Match { source_ips, ..Match::default() }), &facts(Some("td/ns/a/sa/x"), source, "127.0.0.2:80"))
    };
    let nested = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "192.168.0.0/30"];
    assert!(within(&nested, "10.0.0.0") && within(&nested, "10.255.255.255") && within(&nested, "10.1.2.3") && within(&nested, "10.1.2.4"));
    assert!(!within(&nested, "9.255.255.255") && !within(&nested, "11.0.0.0"));
    assert!(within(&nested, "192.168.0.3") && !within(&nested, "192.168.0.4") && !within(&nested, "192.167.255.255"));
    assert!(within(&["fd00::/8"], "fdff::1") && !within(&["fd00::/8"], "fe00::1") && !within(&["fd00::/8"], "10.0.0.1"));
    // A mapped address or prefix is an IPv4 one; a wider IPv6 prefix is not.
    assert!(within(&["10.0.0.0/8"], "::ffff:10.0.0.1") && within(&["::ffff:10.0.0.0/104"], "10.0.0.1"));
    assert!(within(&["::ffff:0.0.0.0/96"], "10.0.0.1") && !within(&["::/0"], "10.0.0.1") && !within(&["::/0"], "::ffff:10.0.0.1"));
}

#[test]
fn string_match() {
    use StringMatch::{Exact, Prefix, Presence, Suffix};
    let text = |text: &str| Text::from(text);
    let table: [(StringMatch, &[&str], &[&str]); 4] = [
        (Exact(text("ns-1")), &["ns-1"], &["ns-", "ns-12", "NS-1", "xns-1"]),
        (Prefix(text("ns-")), &["ns-", "ns-1", "ns-x"], &["ns", "xns-1", "Ns-1"]),
        (Suffix(text("-1")), &["-1", "ns-1", "x-1"], &["1", "ns-12", "-1x"]),
        (Presence, &["x", "ns-1"], &[]),
    ];
    for (matcher, yes, no) in table {
        let says = |namespace: &&&str| {
            let peer = facts(Some(&format!("td/ns/{namespace}/sa/x")), "127.0.0.1", "127.0.0.2:80");
            allows(one(Match { namespaces: vec![matcher.clone()], ..Match::default() }), &peer)
        };
        assert!(yes.iter().all(|value| says(&value)), "{matcher:?}");
        assert!(!no.iter().any(|value| says(&value)), "{matcher:?}");
    }
    // Many at once, also where one begins or ends with another.
    let many: Vec<StringMatch> =
        (0..20).map(|n| Exact(format!("e{n}").into())).chain(["p", "pp", "pq", "p-", "q"].map(|p| Prefix(p.into()))).collect();
    let many = [many, ["s", "ss", "-s", "ts"].map(|s| Suffix(s.into())).to_vec()].concat();
    let says = |namespace: &str| {
        allows(
            one(Match { namespaces: many.clone(), ..Match::default() }),
            &facts(Some(&format!("td/ns/{namespace}/sa/x")), "127.0.0.1", "127.0.0.2:80"),
        )
    };
    assert!(["e0", "e19", "p", "pa", "ppp", "pz", "q1", "s", "xs", "x-s", "xts"].into_iter().all(says));
    assert!(!["e", "e20", "o", "r", "xp", "sx", "e1x"].into_iter().any(says));
}

#[test]
fn an_absent_identity_never_passes_a_negated_allow_and_always_meets_a_negated_deny() {
    let strict = || Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    assert!(denies(one(strict()), &plaintext()), "STRICT");
    assert!(!denies(one(strict()), &usual()));
    for found in [
        strict(),
        Match { not_principals: exact("td/ns/a/sa/x"), ..Match::default() },
        Match { not_namespaces: exact("a"), ..Match::default() },
        Match { not_namespaces: vec![StringMatch::Presence], ..Match::default() },
        Match { not_service_accounts: vec![ServiceAccountMatch { namespace: "a".into(), service_account: "x".into() }], ..Match::default() },
    ] {
        assert!(!allows(one(found.clone()), &plaintext()), "{found:?}");
        assert!(denies(one(found.clone()), &plaintext()), "{found:?}");
    }
    // STRICT on one port only.
    let one_port = || Match { destination_ports: vec![8080], ..strict() };
    assert!(denies(one(one_port()), &plaintext()));
    assert!(!denies(one(one_port()), &facts(None, "127.0.0.1", "127.0.0.2:80")));
}

#[test]
fn a_policy_named_but_not_known_denies_until_it_is_known() {
    let mut set = PolicySet::new();
    let names = [Text::from("n/later")];
    let denial = set.compile("n", &names).permit(&usual()).unwrap_err();
    assert_eq!(denial.to_string(), "policy n/later is named by the workload but not known");
    assert_eq!(denial.policy(), Some(&names[0]));
    assert_eq!(set.compile("n", &names).unknown(), names);
    assert!(set.compile("n", &[]).permit(&usual()).is_ok(), "it concerns nobody else");
    set.insert(Authorization::new("later", "n", Scope::WorkloadSelector, Action::Allow, one(to_port(8080))));
    assert_eq!(set.compile("n", &names).permit(&usual()).unwrap().policy(), Some(&names[0]));
    assert!(set.remove("n/later") && !set.remove("n/later"));
    assert!(set.compile("n", &names).permit(&usual()).is_err(), "removed, but still named");
}

#[test]
fn a_policy_that_is_not_understood_denies_its_targets_and_nobody_else() {
    for action in [Action::Allow, Action::Deny] {
        let invalid = |scope| Authorization::invalid("odd", "n", scope, action, "unknown field 9");
        let denial = set_of([invalid(Scope::Global)]).compile("other", &[]).permit(&usual()).unwrap_err();
        assert_eq!(denial.to_string(), "policy n/odd cannot be enforced: unknown field 9");
        assert_eq!(denial.policy().map(Text::as_str), Some("n/odd"));
        let namespaced = set_of([invalid(Scope::Namespace)]);
        assert!(namespaced.compile("n", &[]).permit(&usual()).is_err() && namespaced.compile("other", &[]).permit(&usual()).is_ok());
        let selected = set_of([invalid(Scope::WorkloadSelector)]);
        assert!(selected.compile("n", &["n/odd".into()]).permit(&usual()).is_err() && selected.compile("n", &[]).permit(&usual()).is_ok());
        let dry_run = set_of([Authorization { dry_run: true, ..invalid(Scope::Global) }]);
        assert!(dry_run.compile("n", &[]).permit(&usual()).is_ok(), "dry run is dry run");
    }
}

#[test]
fn words_that_cannot_be_meant_make_a_policy_invalid() {
    let blank = || vec![StringMatch::Exact("b".into()), StringMatch::Suffix(Text::default())];
    let account = |namespace: &str, name: &str| vec![ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() }];
    for found in [
        Match { namespaces: blank(), ..Match::default() },
        Match { not_namespaces: blank(), ..Match::default() },
        Match { principals: blank(), ..Match::default() },
        Match { not_principals: blank(), ..Match::default() },
        Match { service_accounts: account("", "x"), ..Match::default() },
        Match { not_service_accounts: account("a", ""), ..Match::default() },
    ] {
        for action in [Action::Allow, Action::Deny] {
            let rules = [vec![Rule::default()], one(found.clone())].concat();
            let set = set_of([global("p", action, rules)]);
            assert!(matches!(set.get("root/p").unwrap().validity, Validity::Invalid(_)), "{found:?}");
            let denial = set.compile("n", &[]).permit(&usual()).unwrap_err();
            assert!(matches!(denial.reason(), DenialReason::Unenforceable { .. }), "{found:?}");
        }
    }
}

#[test]
fn deny_wins_in_every_scope() {
    let deny = |scope| Authorization::new("deny", "n", scope, Action::Deny, one(to_port(8080)));
    for scope in [Scope::Global, Scope::Namespace, Scope::WorkloadSelector] {
        for allow_scope in [Scope::Global, Scope::Namespace, Scope::WorkloadSelector] {
            let allow = Authorization::new(
                "allow",
                "n",
                allow_scope,
                Action::Allow,
                one(Match { principals: exact("td/ns/namespace/sa/account"), ..to_port(8080) }),
            );
            let denial = set_of([allow, deny(scope)]).compile("n", &["n/allow".into(), "n/deny".into()]).permit(&usual()).unwrap_err();
            assert_eq!(denial.to_string(), "explicitly denied by: n/deny");
        }
    }
}

#[test]
fn scopes_and_namespaces_do_not_leak() {
    // Two policies of one name in two namespaces, and a selector policy that nobody names.
    let deny = |namespace: &str, scope, port| Authorization::new("same", namespace, scope, Action::Deny, one(to_port(port)));
    let set = set_of([
        deny("a", Scope::Namespace, 1),
        deny("b", Scope::Namespace, 2),
        Authorization::new("selector", "a", Scope::WorkloadSelector, Action::Deny, vec![Rule::default()]),
    ]);
    let passes = |namespace: &str, port: u16| set.compile(namespace, &[]).permit(&facts(None, "127.0.0.1", &format!("127.0.0.2:{port}"))).is_ok();
    assert!(!passes("a", 1) && passes("a", 2) && passes("b", 1) && !passes("b", 2) && passes("c", 1) && passes("c", 2));
    // The newer version of a policy replaces the older one.
    let mut newer = set.clone();
    newer.insert(deny("a", Scope::Namespace, 3));
    assert!(newer.compile("a", &[]).permit(&facts(None, "127.0.0.1", "127.0.0.2:1")).is_ok());
    assert!(newer.compile("a", &[]).permit(&facts(None, "127.0.0.1", "127.0.0.2:3")).is_err());
    assert!(!passes("a", 1), "the set it was edited from stays as it was");
}

#[test]
fn rbac_change_scope() {
    let policy = |scope| Authorization::new("p", "n", scope, Action::Deny, vec![Rule::default()]);
    let mut set = PolicySet::new();
    let names = [Text::from("n/p")];
    let denied = |set: &PolicySet| {
        let at = |namespace: &str, names: &[Text]| set.compile(namespace, names).permit(&usual()).is_err();
        [at("n", &[]), at("other", &[]), at("other", &names)]
    };
    let scopes = [Scope::Global, Scope::Namespace, Scope::WorkloadSelector];
    let expected = [[true, true, true], [true, false, true], [false, false, true]];
    for (from, _) in scopes.iter().zip(expected) {
        for (to, expected) in scopes.iter().zip(expected) {
            set.insert(policy(*from));
            set.insert(policy(*to));
            assert_eq!(denied(&set), expected, "{from:?} to {to:?}");
            assert_eq!(set.len(), 1);
        }
    }
    set.remove("n/p");
    assert!(set.is_empty() && set.compile("n", &[]).permit(&usual()).is_ok());
}

#[test]
fn assert_rbac_dry_run_with_real_policies() {
    let dry = |name: &str, action| Authorization { dry_run: true, ..global(name, action, one(to_port(8080))) };
    let found = |name: &str, action| DryRunMatch { policy: format!("root/{name}").into(), action };
    let both = || {
        vec![dry("dry-allow", Action::Allow), dry("dry-deny", Action::Deny), Authorization { dry_run: true, ..global("quiet", Action::Deny, vec![]) }]
    };
    let permitted = set_of(both()).compile("n", &[]).permit(&usual()).unwrap();
    assert_eq!(permitted.policy(), None, "a dry-run ALLOW does not make the default a denial");
    assert_eq!(permitted.dry_run(), [found("dry-deny", Action::Deny), found("dry-allow", Action::Allow)]);
    let denied = set_of(both().into_iter().chain([global("real", Action::Deny, one(to_port(8080)))])).compile("n", &[]).permit(&usual()).unwrap_err();
    assert_eq!(denied.to_string(), "explicitly denied by: root/real");
    assert_eq!(denied.dry_run(), [found("dry-deny", Action::Deny)], "evaluation ends at the denial");
    let unmatched =
        set_of(both().into_iter().chain([global("real", Action::Allow, one(to_port(1)))])).compile("n", &[]).permit(&usual()).unwrap_err();
    assert_eq!(unmatched.reason(), &DenialReason::NotAllowed, "a dry-run ALLOW grants nothing");
    assert_eq!(unmatched.dry_run().len(), 2);
}

#[test]
fn compile_results_are_equal_exactly_if_the_same_policies_apply() {
    let policy = |name: &str, namespace: &str, scope| Authorization::new(name, namespace, scope, Action::Allow, one(to_port(8080)));
    let mut set = set_of([policy("g", "root", Scope::Global), policy("a", "a", Scope::Namespace), policy("s", "a", Scope::WorkloadSelector)]);
    let names = [Text::from("a/s")];
    let before = set.compile("a", &names);
    assert!(Arc::ptr_eq(&before.0, &set.compile("a", &names).0), "asked twice, made once");
    assert!(Arc::ptr_eq(&before.0, &set.clone().compile("a", &names).0));
    assert_ne!(before, set.compile("a", &[]));
    assert_ne!(before, set.compile("b", &names));
    assert_ne!(set.compile("a", &[]), set.compile("a", &["a/unknown".into()]));
    set.insert(policy("elsewhere", "b", Scope::Namespace));
    set.insert(policy("unnamed", "a", Scope::WorkloadSelector));
    set.insert(policy("g", "root", Scope::Global));
    assert!(Arc::ptr_eq(&before.0, &set.compile("a", &names).0), "what concerns others, or changes nothing, leaves it in place");
    set.insert(Authorization { rules: one(to_port(1)), ..policy("s", "a", Scope::WorkloadSelector) });
    assert_ne!(before, set.compile("a", &names));
    set.insert(policy("s", "a", Scope::WorkloadSelector));
    assert_eq!(before, set.compile("a", &names), "the same words again are the same policy");
    let again = set.compile("a", &[names[0].clone(), names[0].clone(), "root/g".into(), "a/a".into()]);
    assert_eq!(before, again, "naming what applies anyway, or twice, changes nothing");
    assert_eq!(before.policies().map(|policy| policy.key().to_string()).collect::<Vec<_>>(), ["root/g", "a/a", "a/s"]);
}

#[test]
fn a_live_connection_is_rechecked_against_what_holds_now() {
    let mut set = set_of([global("allow", Action::Allow, one(to_port(8080)))]);
    let at_first = set.compile("n", &[]);
    assert!(at_first.recheck(&usual()).is_ok());
    set.insert(global("deny", Action::Deny, one(to_port(8080))));
    let now = set.compile("n", &[]);
    assert_ne!(at_first, now);
    assert_eq!(now.recheck(&usual()).unwrap_err().to_string(), "explicitly denied by: root/deny");
    assert!(at_first.recheck(&usual()).is_ok(), "a compiled policy never changes under its holder");
}

#[test]
fn facts_that_no_policy_looks_at_share_a_decision_and_others_do_not() {
    let rules: Vec<Rule> = (1..=20).flat_map(|port| one(to_port(port))).collect();
    let compiled = set_of([global("p", Action::Allow, rules)]).compile("n", &[]);
    for port in (1..=30).chain(1..=30) {
        for source in ["127.0.0.1", "127.0.0.9", "::1"] {
            let answer = compiled.permit(&facts(None, source, &format!("127.0.0.2:{port}")));
            assert_eq!(answer.is_ok(), port <= 20);
        }
    }
}
