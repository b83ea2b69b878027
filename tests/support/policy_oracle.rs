//! A slow policy evaluator that follows the text of the reference (dataplane §6.2 – 6.4) sentence by sentence and shares no
//! code with the fast one. Where our design is stricter, the comment names the test of the attack list (D9 – D13).

use std::collections::BTreeMap;
use std::net::IpAddr;

use culvert::model::{SpiffeId, Text};
use culvert::policy::{Action, Authorization, Clause, Facts, Match, Rule, Scope, ServiceAccountMatch, StringMatch, Validity};
use ipnet::IpNet;

/// What must come out: the ALLOW policy that matched or the message of the denial, and the dry-run policies that matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) outcome: Result<Option<String>, String>,
    pub(crate) dry_run: Vec<(String, Action)>,
}

/// Decides for a workload of `namespace` that names `names`, when `received` came in this order.
pub(crate) fn decide(received: &[Authorization], (namespace, names): (&str, &[Text]), facts: &Facts) -> Verdict {
    // Two versions of one policy: the last one counts (D13).
    let mut known: BTreeMap<String, &Authorization> = BTreeMap::new();
    for policy in received {
        known.insert(name_of(policy), policy);
    }
    // §6.2: global, of the namespace, named.
    let mut applicable: Vec<&Authorization> = Vec::new();
    applicable.extend(known.values().filter(|policy| policy.scope == Scope::Global));
    applicable.extend(known.values().filter(|policy| policy.scope == Scope::Namespace && &*policy.namespace == namespace));
    for (name, policy) in &known {
        if names.iter().any(|named| named.as_str() == name) && !applicable.iter().any(|other| name_of(other) == *name) {
            applicable.push(policy);
        }
    }
    let applies = |action: Action, dry_run: bool| {
        let applicable = applicable.clone();
        move || {
            let of_kind = applicable.clone().into_iter().filter(move |policy| policy.action == action && policy.dry_run == dry_run);
            of_kind.collect::<Vec<_>>()
        }
    };
    let mut dry_run = Vec::new();
    // §6.4 step 1.
    for policy in applies(Action::Deny, true)() {
        if policy_matches(policy, facts) {
            dry_run.push((name_of(policy), Action::Deny));
        }
    }
    // Step 2.
    for policy in applies(Action::Deny, false)() {
        if policy_matches(policy, facts) {
            return Verdict { outcome: Err(format!("explicitly denied by: {}", name_of(policy))), dry_run };
        }
    }
    // D10: what cannot be enforced denies.
    for policy in &applicable {
        if let (Some(problem), false) = (problem(policy), policy.dry_run) {
            return Verdict { outcome: Err(format!("policy {} cannot be enforced: {problem}", name_of(policy))), dry_run };
        }
    }
    // D9: what is named but not known denies.
    for name in names {
        if !known.contains_key(name.as_str()) {
            return Verdict { outcome: Err(format!("policy {name} is named by the workload but not known")), dry_run };
        }
    }
    // Step 3.
    for policy in applies(Action::Allow, true)() {
        if policy_matches(policy, facts) {
            dry_run.push((name_of(policy), Action::Allow));
        }
    }
    // Steps 4 – 6.
    let allows = applies(Action::Allow, false)();
    if allows.is_empty() {
        return Verdict { outcome: Ok(None), dry_run };
    }
    for policy in allows {
        if policy_matches(policy, facts) {
            return Verdict { outcome: Ok(Some(name_of(policy))), dry_run };
        }
    }
    Verdict { outcome: Err("allow policies exist, but none allowed".to_owned()), dry_run }
}

fn name_of(policy: &Authorization) -> String {
    format!("{}/{}", policy.namespace, policy.name)
}

/// D10.
fn problem(policy: &Authorization) -> Option<String> {
    if let Validity::Invalid(reason) = &policy.validity {
        return Some(reason.to_string());
    }
    for rule in &policy.rules {
        for clause in &rule.clauses {
            for found in &clause.matches {
                for matcher in found.namespaces.iter().chain(&found.not_namespaces).chain(&found.principals).chain(&found.not_principals) {
                    if matches!(matcher, StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text) if text.is_empty()) {
                        return Some("a namespace or principal matcher is an empty string".to_owned());
                    }
                }
                for account in found.service_accounts.iter().chain(&found.not_service_accounts) {
                    if account.namespace.is_empty() || account.service_account.is_empty() {
                        return Some("a service account matcher lacks its namespace or its name".to_owned());
                    }
                }
            }
        }
    }
    None
}

/// "Policy matches if any rule matches."
fn policy_matches(policy: &Authorization, facts: &Facts) -> bool {
    problem(policy).is_none() && policy.rules.iter().any(|rule| rule_matches(rule, policy.action, facts))
}

/// "Rule matches if all clauses match. Zero clauses: always matches."
fn rule_matches(rule: &Rule, action: Action, facts: &Facts) -> bool {
    rule.clauses.iter().all(|clause| clause_matches(clause, action, facts))
}

/// "Clause matches if any match matches. Zero matches: true."
fn clause_matches(clause: &Clause, action: Action, facts: &Facts) -> bool {
    clause.matches.is_empty() || clause.matches.iter().any(|found| match_matches(found, action, facts))
}

/// "All populated attribute kinds must hold; positive list any-of, negative list none-of; empty match = no match."
fn match_matches(found: &Match, action: Action, facts: &Facts) -> bool {
    if *found == Match::default() {
        return false;
    }
    let id = facts.identity.as_ref();
    let namespace = |matcher: &StringMatch| id.is_some_and(|id| text_matches(matcher, id.namespace()));
    let principal = |matcher: &StringMatch| id.is_some_and(|id| text_matches(matcher, &stripped(id)));
    let account =
        |matcher: &ServiceAccountMatch| id.is_some_and(|id| *id.namespace() == matcher.namespace && *id.service_account() == matcher.service_account);
    // D12: without an identity a negated identity list grants nothing, and denies what it says.
    let negated_identity = !(found.not_namespaces.is_empty() && found.not_principals.is_empty() && found.not_service_accounts.is_empty());
    if negated_identity && id.is_none() && action == Action::Allow {
        return false;
    }
    any_of(&found.namespaces, namespace)
        && none_of(&found.not_namespaces, namespace)
        && any_of(&found.principals, principal)
        && none_of(&found.not_principals, principal)
        && any_of(&found.service_accounts, account)
        && none_of(&found.not_service_accounts, account)
        && any_of(&found.source_ips, |net| net_holds(*net, facts.source_ip))
        && none_of(&found.not_source_ips, |net| net_holds(*net, facts.source_ip))
        && any_of(&found.destination_ips, |net| net_holds(*net, facts.destination_ip))
        && none_of(&found.not_destination_ips, |net| net_holds(*net, facts.destination_ip))
        && any_of(&found.destination_ports, |port| *port == facts.destination_port)
        && none_of(&found.not_destination_ports, |port| *port == facts.destination_port)
}

fn any_of<T>(list: &[T], holds: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(holds)
}

fn none_of<T>(list: &[T], holds: impl Fn(&T) -> bool) -> bool {
    !list.iter().any(holds)
}

fn stripped(id: &SpiffeId) -> String {
    id.to_string().trim_start_matches("spiffe://").to_owned()
}

fn text_matches(matcher: &StringMatch, value: &str) -> bool {
    match matcher {
        StringMatch::Exact(text) => value == text.as_str(),
        StringMatch::Prefix(text) => value.starts_with(text.as_str()),
        StringMatch::Suffix(text) => value.ends_with(text.as_str()),
        StringMatch::Presence => !value.is_empty(),
    }
}

/// Compared bit by bit; an IPv4-mapped address or prefix is an IPv4 one (D8).
fn net_holds(net: IpNet, ip: IpAddr) -> bool {
    let (net_bits, length) = match (net.addr(), usize::from(net.prefix_len())) {
        (IpAddr::V6(v6), length) if length >= 96 && v6.to_ipv4_mapped().is_some() => (bits(net.addr()), length - 96),
        (IpAddr::V6(v6), length) => (v6.octets().iter().flat_map(|byte| byte_bits(*byte)).collect(), length),
        (IpAddr::V4(_), length) => (bits(net.addr()), length),
    };
    let ip_bits = bits(ip);
    net_bits.len() == ip_bits.len() && net_bits[..length] == ip_bits[..length]
}

fn bits(ip: IpAddr) -> Vec<bool> {
    match ip {
        IpAddr::V4(v4) => v4.octets().iter().flat_map(|byte| byte_bits(*byte)).collect(),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => bits(IpAddr::V4(v4)),
            None => v6.octets().iter().flat_map(|byte| byte_bits(*byte)).collect(),
        },
    }
}

fn byte_bits(byte: u8) -> [bool; 8] {
    std::array::from_fn(|bit| byte & (0x80 >> bit) != 0)
}
