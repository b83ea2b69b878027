//! Policy decisions against a slow evaluator written from the text of the reference (D11), and what must hold of any policies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/policy_oracle.rs"]
mod policy_oracle;

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use culvert::model::{SpiffeId, Text};
use culvert::policy::{
    Action, Authorization, Clause, CompiledPolicy, Facts, Match, PolicySet, Rule, Scope, ServiceAccountMatch, StringMatch, Validity,
};
use policy_oracle::Verdict;
use proptest::prelude::*;
use proptest::sample::select;

/// Worlds × facts per world × 2 (the second time from the decision cache): 125,000 random decisions, 250,000 compared.
const WORLDS: u32 = 2_500;
const FACTS: usize = 50;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn principal() -> impl Strategy<Value = StringMatch> {
    use StringMatch::{Exact, Prefix, Presence, Suffix};
    prop_oneof![
        6 => (select(vec!["cluster.local", "td"]), select(vec!["a", "b", "ab"]), select(vec!["x", "y", "xy"]))
            .prop_map(|(td, namespace, account)| Exact(format!("{td}/ns/{namespace}/sa/{account}").into())),
        3 => select(vec!["cluster.local/ns/a", "cluster.local/ns/a/", "cluster.local/ns/ab/sa/x", "t", "td/ns/b", "spiffe://"])
            .prop_map(|text| Prefix(text.into())),
        3 => select(vec!["/sa/x", "x", "y", "/ns/b/sa/y", "ab/sa/xy", "-"]).prop_map(|text| Suffix(text.into())),
        1 => Just(Presence),
        1 => Just(Exact("spiffe://td/ns/a/sa/x".into())),
    ]
}

fn namespace() -> impl Strategy<Value = StringMatch> {
    use StringMatch::{Exact, Prefix, Presence, Suffix};
    prop_oneof![
        4 => select(vec!["a", "b", "ab", "A"]).prop_map(|text| Exact(text.into())),
        2 => select(vec!["a", "b", "ab", "abc"]).prop_map(|text| Prefix(text.into())),
        2 => select(vec!["a", "b", "ab", "bab"]).prop_map(|text| Suffix(text.into())),
        1 => Just(Presence),
    ]
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    (select(vec!["a", "b", "ab"]), select(vec!["x", "y", "xy"])).prop_map(|(namespace, account)| accounts(namespace, account))
}

fn accounts(namespace: &str, account: &str) -> ServiceAccountMatch {
    ServiceAccountMatch { namespace: namespace.into(), service_account: account.into() }
}

fn net() -> impl Strategy<Value = ipnet::IpNet> {
    let nets = ["10.0.0.1/32", "10.0.0.3/31", "10.0.0.0/24", "10.0.1.0/24", "10.9.9.9/8", "0.0.0.0/0"];
    let more = ["::/0", "fd00::1/128", "fd00::/64", "fd00::/16", "::ffff:10.0.0.0/120", "::ffff:10.0.1.1/128", "::ffff:0:0/90"];
    select([nets.as_slice(), &more].concat()).prop_map(|text| text.parse().unwrap())
}

fn port() -> impl Strategy<Value = u16> {
    select(vec![80, 443, 8080])
}

/// Mostly empty, as in real policies.
fn some<T: std::fmt::Debug + Clone + 'static>(item: impl Strategy<Value = T> + 'static) -> BoxedStrategy<Vec<T>> {
    prop_oneof![5 => Just(Vec::new()), 1 => prop::collection::vec(item, 1..=3)].boxed()
}

fn a_match() -> BoxedStrategy<Match> {
    let identity = (some(namespace()), some(namespace()), some(principal()), some(principal()), some(account()), some(account()));
    let addresses = (some(net()), some(net()), some(net()), some(net()), some(port()), some(port()));
    let whole = (identity, addresses).prop_map(|(identity, addresses)| Match {
        namespaces: identity.0,
        not_namespaces: identity.1,
        principals: identity.2,
        not_principals: identity.3,
        service_accounts: identity.4,
        not_service_accounts: identity.5,
        source_ips: addresses.0,
        not_source_ips: addresses.1,
        destination_ips: addresses.2,
        not_destination_ips: addresses.3,
        destination_ports: addresses.4,
        not_destination_ports: addresses.5,
    });
    // Words that cannot be meant, seldom, so that not every world is dead.
    let blank = select(vec![
        Match { not_namespaces: vec![StringMatch::Exact(Text::default())], ..Match::default() },
        Match { principals: vec![StringMatch::Prefix(Text::default())], ..Match::default() },
        Match { service_accounts: vec![accounts("", "x")], ..Match::default() },
        Match { not_service_accounts: vec![accounts("a", "")], ..Match::default() },
    ]);
    prop_oneof![400 => whole, 1 => blank].boxed()
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    let clause = prop::collection::vec(a_match(), 0..=2).prop_map(|matches| Clause { matches });
    let rule = prop_oneof![1 => Just(Vec::new()), 9 => prop::collection::vec(clause, 1..=2)].prop_map(|clauses| Rule { clauses });
    prop_oneof![1 => Just(Vec::new()), 9 => prop::collection::vec(rule, 1..=3)]
}

fn policy() -> impl Strategy<Value = Authorization> {
    let name = (0..60_u8, select(vec!["a", "b", "root"]));
    let scope = select(vec![Scope::Global, Scope::Namespace, Scope::WorkloadSelector]);
    let action = select(vec![Action::Allow, Action::Deny]);
    let flags = (prop::bool::weighted(0.15), prop::bool::weighted(0.01));
    (name, scope, action, rules(), flags).prop_map(|((name, namespace), scope, action, rules, (dry_run, invalid))| Authorization {
        dry_run,
        validity: if invalid { Validity::Invalid("unknown field 9".into()) } else { Validity::Valid },
        ..Authorization::new(format!("p{name}"), namespace, scope, action, rules)
    })
}

/// Few policies, where each counts, or many, where the index and the cache come in.
fn policies() -> impl Strategy<Value = Vec<Authorization>> {
    prop_oneof![4 => prop::collection::vec(policy(), 0..=4), 1 => prop::collection::vec(policy(), 8..=30)]
}

/// Indices of policies to name, and whether to name one that nobody has sent.
fn names() -> impl Strategy<Value = (Vec<prop::sample::Index>, bool)> {
    (prop::collection::vec(any::<prop::sample::Index>(), 0..=4), prop::bool::weighted(0.05))
}

fn resolve(policies: &[Authorization], (chosen, unknown): &(Vec<prop::sample::Index>, bool)) -> Vec<Text> {
    let mut names: Vec<Text> = Vec::new();
    if !policies.is_empty() {
        names.extend(chosen.iter().map(|index| index.get(policies).key()));
    }
    if *unknown {
        names.insert(names.len() / 2, "b/not-sent-yet".into());
    }
    names
}

fn identity() -> impl Strategy<Value = Option<SpiffeId>> {
    let some = (select(vec!["cluster.local", "td"]), select(vec!["a", "b", "ab"]), select(vec!["x", "y", "xy"]))
        .prop_map(|(td, namespace, account)| Some(SpiffeId::new(td, namespace, account).unwrap()));
    prop_oneof![1 => Just(None), 3 => some]
}

fn facts() -> impl Strategy<Value = Facts> {
    let address = || select(["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.168.0.1", "fd00::1", "fd01::1", "::ffff:10.0.0.1"].map(ip).to_vec());
    let port = prop_oneof![9 => port(), 1 => Just(15008_u16)];
    (identity(), address(), address(), port).prop_map(|(identity, source_ip, destination_ip, destination_port)| Facts {
        identity,
        source_ip,
        destination_ip,
        destination_port,
    })
}

fn set_of(policies: &[Authorization]) -> PolicySet {
    let mut set = PolicySet::new();
    policies.iter().for_each(|policy| set.insert(policy.clone()));
    set
}

fn verdict(compiled: &CompiledPolicy, facts: &Facts) -> Verdict {
    let named = |matches: &[culvert::policy::DryRunMatch]| matches.iter().map(|found| (found.policy.to_string(), found.action)).collect();
    match compiled.permit(facts) {
        Ok(permitted) => Verdict { outcome: Ok(permitted.policy().map(ToString::to_string)), dry_run: named(permitted.dry_run()) },
        Err(denial) => Verdict { outcome: Err(denial.to_string()), dry_run: named(denial.dry_run()) },
    }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 20_000, ..ProptestConfig::default() }
}

#[test]
fn every_decision_is_the_one_the_text_of_the_reference_gives() {
    let seen: [AtomicUsize; 6] = Default::default();
    let count = |verdict: &Verdict| {
        let kind = match &verdict.outcome {
            Ok(None) => 0,
            Ok(Some(_)) => 1,
            Err(text) if text.starts_with("explicitly") => 2,
            Err(text) if text.starts_with("allow policies") => 3,
            Err(_) => 4,
        };
        seen[kind].fetch_add(1, Ordering::Relaxed);
        seen[5].fetch_add(usize::from(!verdict.dry_run.is_empty()), Ordering::Relaxed);
    };
    let worlds = (policies(), select(vec!["a", "b", "ab"]), names(), prop::collection::vec(facts(), FACTS));
    proptest!(config(WORLDS), |((policies, namespace, chosen, all_facts) in worlds)| {
        let names = resolve(&policies, &chosen);
        let compiled = set_of(&policies).compile(namespace, &names);
        for facts in all_facts.iter().chain(&all_facts) {
            let expected = policy_oracle::decide(&policies, (namespace, &names), facts);
            count(&expected);
            prop_assert_eq!(verdict(&compiled, facts), expected, "{:?}", facts);
        }
    });
    let seen = seen.map(AtomicUsize::into_inner);
    assert!(seen.iter().all(|count| *count > 5_000), "some kind of verdict hardly occurs: {seen:?}");
}

/// The truth table of D11: each matcher alone, positive and negated × ALLOW and DENY × plaintext and mutual TLS, on facts that it
/// names and facts that it does not. The expectations here are written by hand, not computed.
#[test]
fn each_matcher_alone_has_the_verdict_of_the_truth_table() {
    let texts = |text: &str| vec![StringMatch::Exact(text.into())];
    let prefix = |text: &str| vec![StringMatch::Prefix(text.into())];
    let suffix = |text: &str| vec![StringMatch::Suffix(text.into())];
    let nets = |text: &str| vec![text.parse().unwrap()];
    let m = Match::default;
    // (positive, negated, depends on identity): all name the peer cluster.local/ns/a/sa/x, 10.0.0.1 → 10.0.1.1:80.
    let table: Vec<(&str, Match, Match, bool)> = vec![
        ("namespace exact", Match { namespaces: texts("a"), ..m() }, Match { not_namespaces: texts("a"), ..m() }, true),
        ("namespace prefix", Match { namespaces: prefix("a"), ..m() }, Match { not_namespaces: prefix("a"), ..m() }, true),
        ("namespace suffix", Match { namespaces: suffix("a"), ..m() }, Match { not_namespaces: suffix("a"), ..m() }, true),
        (
            "principal exact",
            Match { principals: texts("cluster.local/ns/a/sa/x"), ..m() },
            Match { not_principals: texts("cluster.local/ns/a/sa/x"), ..m() },
            true,
        ),
        (
            "principal prefix",
            Match { principals: prefix("cluster.local/ns/a/"), ..m() },
            Match { not_principals: prefix("cluster.local/ns/a/"), ..m() },
            true,
        ),
        ("principal suffix", Match { principals: suffix("/ns/a/sa/x"), ..m() }, Match { not_principals: suffix("/ns/a/sa/x"), ..m() }, true),
        (
            "service account",
            Match { service_accounts: vec![accounts("a", "x")], ..m() },
            Match { not_service_accounts: vec![accounts("a", "x")], ..m() },
            true,
        ),
        ("source address", Match { source_ips: nets("10.0.0.1/32"), ..m() }, Match { not_source_ips: nets("10.0.0.1/32"), ..m() }, false),
        ("source range", Match { source_ips: nets("10.0.0.0/24"), ..m() }, Match { not_source_ips: nets("10.0.0.0/24"), ..m() }, false),
        (
            "destination address",
            Match { destination_ips: nets("10.0.1.1/32"), ..m() },
            Match { not_destination_ips: nets("10.0.1.1/32"), ..m() },
            false,
        ),
        (
            "destination range",
            Match { destination_ips: nets("10.0.1.0/24"), ..m() },
            Match { not_destination_ips: nets("10.0.1.0/24"), ..m() },
            false,
        ),
        ("destination port", Match { destination_ports: vec![80], ..m() }, Match { not_destination_ports: vec![80], ..m() }, false),
    ];
    let facts = |identity: Option<(&str, &str)>, named: bool| Facts {
        identity: identity.map(|(namespace, account)| SpiffeId::new("cluster.local", namespace, account).unwrap()),
        source_ip: ip(if named { "10.0.0.1" } else { "10.2.0.1" }),
        destination_ip: ip(if named { "10.0.1.1" } else { "10.2.1.1" }),
        destination_port: if named { 80 } else { 81 },
    };
    let named_peer = facts(Some(("a", "x")), true);
    let other_peer = facts(Some(("b", "y")), false);
    let (named_plain, other_plain) = (facts(None, true), facts(None, false));
    let matches = |action: Action, found: &Match, facts: &Facts| {
        let rules = vec![Rule { clauses: vec![Clause { matches: vec![found.clone()] }] }];
        let compiled = set_of(&[Authorization::new("p", "n", Scope::Global, action, rules)]).compile("n", &[]);
        compiled.permit(facts).is_ok() == (action == Action::Allow)
    };
    let presence = || vec![StringMatch::Presence];
    for action in [Action::Allow, Action::Deny] {
        for (what, positive, negated, identity) in &table {
            let says = |found: &Match, facts: &Facts| matches(action, found, facts);
            assert!(says(positive, &named_peer), "{action:?} {what}: the peer that it names");
            assert!(!says(positive, &other_peer), "{action:?} {what}: another peer");
            assert!(!says(negated, &named_peer), "{action:?} not {what}: the peer that it names");
            assert!(says(negated, &other_peer), "{action:?} not {what}: another peer");
            // Plaintext: addresses and ports speak as before; identities are absent.
            assert_eq!(says(positive, &named_plain), !identity, "{action:?} {what}: plaintext from the named address");
            assert!(!says(positive, &other_plain), "{action:?} {what}: plaintext from elsewhere");
            let absent_but_denied = *identity && action == Action::Deny;
            assert_eq!(says(negated, &named_plain), absent_but_denied, "{action:?} not {what}: plaintext from the named address");
            assert_eq!(says(negated, &other_plain), absent_but_denied || !identity, "{action:?} not {what}: plaintext from elsewhere");
        }
        for (positive, negated) in [
            (Match { principals: presence(), ..m() }, Match { not_principals: presence(), ..m() }),
            (Match { namespaces: presence(), ..m() }, Match { not_namespaces: presence(), ..m() }),
        ] {
            assert!(matches(action, &positive, &named_peer) && matches(action, &positive, &other_peer));
            assert!(!matches(action, &negated, &named_peer) && !matches(action, &negated, &other_peer));
            assert!(!matches(action, &positive, &named_plain), "nobody has no name");
            assert_eq!(matches(action, &negated, &named_plain), action == Action::Deny, "STRICT is a DENY, and never a grant");
        }
    }
}

/// Rules that say who is not meant, so many that those which the facts rule out are not looked at, and mostly of ports that the facts have.
fn many_negations() -> impl Strategy<Value = Vec<Authorization>> {
    let ports = || select(vec![vec![80, 443, 8080], vec![80, 443, 8080], vec![80, 443], vec![8080], vec![]]);
    let negation = || {
        (a_match(), ports()).prop_map(|(found, not_destination_ports)| Match {
            not_destination_ports,
            namespaces: vec![],
            principals: vec![],
            service_accounts: vec![],
            destination_ports: vec![],
            ..found
        })
    };
    let clause = prop_oneof![9 => prop::collection::vec(negation(), 1), 1 => prop::collection::vec(negation(), 0..=2)];
    let rule = prop::collection::vec(clause.prop_map(|matches| Clause { matches }), 1..=2).prop_map(|clauses| Rule { clauses });
    let rules = prop::collection::vec(rule, 40..=150);
    let policy = (policy(), rules).prop_map(|(policy, rules)| Authorization { rules, scope: Scope::Global, validity: Validity::Valid, ..policy });
    prop::collection::vec(policy, 1..=3)
}

#[test]
fn many_rules_of_negations_are_decided_as_the_text_of_the_reference_says() {
    proptest!(config(300), |(policies in many_negations(), all_facts in prop::collection::vec(facts(), 20))| {
        let compiled = set_of(&policies).compile("a", &[]);
        for facts in &all_facts {
            prop_assert_eq!(verdict(&compiled, facts), policy_oracle::decide(&policies, ("a", &[]), facts), "{:?}", facts);
        }
    });
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn adding_a_deny_never_grants(policies in policies(), extra in policy(), chosen in names(), all_facts in prop::collection::vec(facts(), 20)) {
        let names = resolve(&policies, &chosen);
        let extra = Authorization { action: Action::Deny, name: "added".into(), ..extra };
        let (before, mut edited) = (set_of(&policies), set_of(&policies));
        edited.insert(extra);
        let (before, after) = (before.compile("a", &names), edited.compile("a", &names));
        for facts in &all_facts {
            prop_assert!(before.permit(facts).is_ok() || after.permit(facts).is_err());
        }
    }

    #[test]
    fn a_policy_that_is_not_understood_never_grants(policies in policies(), extra in policy(), all_facts in prop::collection::vec(facts(), 20)) {
        let named = [extra.key()];
        let mut edited = set_of(&policies);
        edited.insert(Authorization { dry_run: false, validity: Validity::Invalid("unknown field 9".into()), ..extra });
        for facts in &all_facts {
            prop_assert!(edited.compile("a", &named).permit(facts).is_err());
        }
    }

    #[test]
    fn naming_a_policy_that_is_not_known_never_grants(policies in policies(), all_facts in prop::collection::vec(facts(), 20)) {
        let compiled = set_of(&policies).compile("a", &["b/not-sent-yet".into()]);
        prop_assert!(all_facts.iter().all(|facts| compiled.permit(facts).is_err()));
    }

    #[test]
    fn losing_its_identity_never_grants_under_allow(policies in policies(), chosen in names(), all_facts in prop::collection::vec(facts(), 20)) {
        let policies: Vec<_> = policies.into_iter().map(|policy| Authorization { action: Action::Allow, ..policy }).collect();
        let compiled = set_of(&policies).compile("a", &resolve(&policies, &chosen));
        for facts in &all_facts {
            let anonymous = Facts { identity: None, ..facts.clone() };
            prop_assert!(compiled.permit(facts).is_ok() || compiled.permit(&anonymous).is_err());
        }
    }

    #[test]
    fn dry_run_policies_change_no_verdict(policies in policies(), chosen in names(), all_facts in prop::collection::vec(facts(), 20)) {
        let names = resolve(&policies, &chosen);
        let mut with_more = set_of(&policies);
        for (at, policy) in policies.iter().enumerate() {
            with_more.insert(Authorization { name: format!("dry{at}").into(), dry_run: true, ..policy.clone() });
        }
        let (plain, more) = (set_of(&policies).compile("a", &names), with_more.compile("a", &names));
        for facts in &all_facts {
            prop_assert_eq!(verdict(&plain, facts).outcome, verdict(&more, facts).outcome);
        }
    }

    /// Edits in any order, asked in between (so that layers and decisions are remembered), end like the same policies inserted afresh.
    #[test]
    fn what_was_remembered_never_shows(
        edits in prop::collection::vec((policy(), prop::bool::weighted(0.3), any::<bool>()), 1..20),
        all_facts in prop::collection::vec(facts(), 10),
    ) {
        let names: Vec<Text> = vec!["a/p1".into(), "b/p2".into(), "root/p3".into()];
        let mut set = PolicySet::new();
        let mut held = Vec::new();
        for (policy, remove, branch) in edits {
            let policy = Authorization { name: format!("p{}", policy.rules.len()).into(), ..policy };
            let mut next = set.clone();
            if remove { next.remove(&policy.key()); } else { next.insert(policy); }
            let names = &names[..all_facts[0].destination_port as usize % 4];
            let compiled = next.compile("a", names);
            let policies: Vec<Authorization> = next.iter().map(|policy| (**policy).clone()).collect();
            let afresh = set_of(&policies).compile("a", names);
            prop_assert_eq!(&compiled, &afresh);
            for facts in &all_facts {
                let expected = policy_oracle::decide(&policies, ("a", names), facts);
                prop_assert_eq!(verdict(&compiled, facts), expected.clone());
                prop_assert_eq!(verdict(&afresh, facts), expected);
            }
            held.push(compiled);
            // An abandoned edit must not leak into the set that it branched from.
            if branch { set = next; }
        }
    }
}
