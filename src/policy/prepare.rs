//! One policy made ready for matching: every list in the form that answers "is it in there?" fastest.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use crate::model::{SpiffeId, Text};

use super::rule::{Action, Authorization, Clause, Match, Rule, StringMatch, Validity};
use super::{Facts, ServiceAccountMatch};

/// Up to this many exact words are compared one by one; a hash set pays only above.
const FEW: usize = 8;

/// The facts of one connection with what matching needs of them; addresses are canonical.
pub(super) struct Subject<'a> {
    pub(super) identity: Option<&'a SpiffeId>,
    /// As policies write it, without the scheme; "" if there is no identity.
    pub(super) principal: &'a str,
    pub(super) source_ip: IpAddr,
    pub(super) destination_ip: IpAddr,
    pub(super) destination_port: u16,
}

impl<'a> Subject<'a> {
    /// The facts must be canonical.
    pub(super) fn of(facts: &'a Facts) -> Self {
        Self {
            identity: facts.identity.as_ref(),
            principal: facts.identity.as_ref().map_or("", SpiffeId::principal),
            source_ip: facts.source_ip,
            destination_ip: facts.destination_ip,
            destination_port: facts.destination_port,
        }
    }
}

/// Which facts a policy looks at at all; the rest need not be part of a cache key.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Uses {
    pub(super) identity: bool,
    pub(super) source_ip: bool,
    pub(super) destination_ip: bool,
    pub(super) destination_port: bool,
}

impl Uses {
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            identity: self.identity | other.identity,
            source_ip: self.source_ip | other.source_ip,
            destination_ip: self.destination_ip | other.destination_ip,
            destination_port: self.destination_port | other.destination_port,
        }
    }
}

/// One policy, ready for matching. Prepared once, when it is received.
#[derive(Debug)]
pub(super) struct Prepared {
    /// `namespace/name`.
    pub(super) key: Text,
    pub(super) authorization: Arc<Authorization>,
    /// The rules that can match at all.
    pub(super) rules: Box<[PreparedRule]>,
    pub(super) uses: Uses,
}

/// One rule: all clauses must hold, in each any match.
#[derive(Debug)]
pub(super) struct PreparedRule {
    /// Its place in [`Authorization::rules`].
    pub(super) origin: usize,
    clauses: Box<[Box<[PreparedMatch]>]>,
}

/// One match: all checks must hold, cheapest first.
#[derive(Debug)]
struct PreparedMatch(Box<[Check]>);

#[derive(Debug)]
struct Check {
    /// None of the set, instead of any.
    negated: bool,
    set: Set,
}

#[derive(Debug)]
enum Set {
    Ports(Box<[u16]>),
    SourceIps(NetSet),
    DestinationIps(NetSet),
    Namespaces(Box<StringSet>),
    ServiceAccounts(Box<[ServiceAccountMatch]>),
    Principals(Box<StringSet>),
}

impl Prepared {
    /// Makes a policy ready. Words that cannot be meant turn it into an invalid one, which then shows in every dump.
    pub(super) fn new(mut authorization: Authorization) -> Self {
        if authorization.validity == Validity::Valid
            && let Some(problem) = authorization.problem()
        {
            authorization.validity = Validity::Invalid(problem.into());
        }
        let rules = match authorization.validity {
            Validity::Valid => authorization.rules.iter().enumerate().filter_map(|(origin, rule)| PreparedRule::new(origin, rule)).collect(),
            Validity::Invalid(_) => Box::default(),
        };
        let mut prepared = Self { key: authorization.key(), authorization: Arc::new(authorization), rules, uses: Uses::default() };
        for check in prepared.rules.iter().flat_map(|rule| &rule.clauses).flatten().flat_map(|found| &found.0) {
            match check.set {
                Set::Ports(_) => prepared.uses.destination_port = true,
                Set::SourceIps(_) => prepared.uses.source_ip = true,
                Set::DestinationIps(_) => prepared.uses.destination_ip = true,
                Set::Namespaces(_) | Set::ServiceAccounts(_) | Set::Principals(_) => prepared.uses.identity = true,
            }
        }
        prepared
    }

    /// Why it cannot be enforced, if so.
    pub(super) fn problem(&self) -> Option<&Text> {
        match &self.authorization.validity {
            Validity::Valid => None,
            Validity::Invalid(reason) => Some(reason),
        }
    }

    /// Whether one of its rules matches.
    pub(super) fn rule_matches(&self, rule: usize, subject: &Subject<'_>) -> bool {
        self.rules.get(rule).is_some_and(|rule| rule.matches(subject, self.authorization.action))
    }
}

impl PreparedRule {
    /// `None` for a rule that can never match, because a clause consists of empty matches only.
    fn new(origin: usize, rule: &Rule) -> Option<Self> {
        let mut clauses = Vec::with_capacity(rule.clauses.len());
        for Clause { matches } in rule.clauses.iter().filter(|clause| !clause.matches.is_empty()) {
            let alternatives: Box<[PreparedMatch]> = matches.iter().filter(|found| !found.is_empty()).map(PreparedMatch::new).collect();
            if alternatives.is_empty() {
                return None;
            }
            clauses.push(alternatives);
        }
        Some(Self { origin, clauses: clauses.into() })
    }

    fn matches(&self, subject: &Subject<'_>, action: Action) -> bool {
        self.clauses.iter().all(|clause| clause.iter().any(|found| found.0.iter().all(|check| check.holds(subject, action))))
    }
}

impl PreparedMatch {
    fn new(found: &Match) -> Self {
        let mut checks = Vec::new();
        let mut add = |negated, empty: bool, set: &dyn Fn() -> Set| {
            if !empty {
                checks.push(Check { negated, set: set() });
            }
        };
        for (negated, ports) in [(false, &found.destination_ports), (true, &found.not_destination_ports)] {
            add(negated, ports.is_empty(), &|| Set::Ports(sorted(ports.iter().copied())));
        }
        for (negated, nets) in [(false, &found.source_ips), (true, &found.not_source_ips)] {
            add(negated, nets.is_empty(), &|| Set::SourceIps(NetSet::new(nets)));
        }
        for (negated, nets) in [(false, &found.destination_ips), (true, &found.not_destination_ips)] {
            add(negated, nets.is_empty(), &|| Set::DestinationIps(NetSet::new(nets)));
        }
        for (negated, texts) in [(false, &found.namespaces), (true, &found.not_namespaces)] {
            add(negated, texts.is_empty(), &|| Set::Namespaces(Box::new(StringSet::new(texts))));
        }
        for (negated, accounts) in [(false, &found.service_accounts), (true, &found.not_service_accounts)] {
            add(negated, accounts.is_empty(), &|| Set::ServiceAccounts(sorted(accounts.iter().cloned())));
        }
        for (negated, texts) in [(false, &found.principals), (true, &found.not_principals)] {
            add(negated, texts.is_empty(), &|| Set::Principals(Box::new(StringSet::new(texts))));
        }
        Self(checks.into())
    }
}

impl Check {
    /// An absent identity satisfies no positive identity matcher. A negated one it satisfies in DENY only: "not from
    /// namespace a" must not open the door to somebody who shows no name at all (ISTIO-SECURITY-2021-004).
    fn holds(&self, subject: &Subject<'_>, action: Action) -> bool {
        let contained = match (&self.set, subject.identity) {
            (Set::Ports(ports), _) => ports.binary_search(&subject.destination_port).is_ok(),
            (Set::SourceIps(nets), _) => nets.contains(subject.source_ip),
            (Set::DestinationIps(nets), _) => nets.contains(subject.destination_ip),
            (_, None) => return self.negated && action == Action::Deny,
            (Set::Namespaces(texts), Some(identity)) => texts.contains(identity.namespace()),
            (Set::Principals(texts), Some(_)) => texts.contains(subject.principal),
            (Set::ServiceAccounts(accounts), Some(identity)) => accounts
                .binary_search_by(|account| {
                    (account.namespace.as_str(), account.service_account.as_str()).cmp(&(identity.namespace(), identity.service_account()))
                })
                .is_ok(),
        };
        contained != self.negated
    }
}

fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Box<[T]> {
    let mut items: Vec<T> = items.collect();
    items.sort_unstable();
    items.dedup();
    items.into()
}

/// A set of string matchers. Prefixes and suffixes are sorted and none begins with another, so that the greatest one not
/// above a value is the only one that the value can begin with.
#[derive(Debug)]
struct StringSet {
    present: bool,
    exact: Exact,
    prefixes: Box<[Box<[u8]>]>,
    /// Back to front.
    suffixes: Box<[Box<[u8]>]>,
}

#[derive(Debug)]
enum Exact {
    Few(Box<[Text]>),
    Many(HashSet<Text>),
}

impl StringSet {
    fn new(matchers: &[StringMatch]) -> Self {
        let (mut present, mut exact, mut prefixes, mut suffixes) = (false, Vec::new(), Vec::new(), Vec::new());
        for matcher in matchers {
            match matcher {
                StringMatch::Presence => present = true,
                StringMatch::Exact(text) => exact.push(text.clone()),
                StringMatch::Prefix(text) => prefixes.push(text.bytes().collect()),
                StringMatch::Suffix(text) => suffixes.push(text.bytes().rev().collect()),
            }
        }
        let exact = if exact.len() <= FEW { Exact::Few(exact.into()) } else { Exact::Many(exact.into_iter().collect()) };
        Self { present, exact, prefixes: shortest(prefixes), suffixes: shortest(suffixes) }
    }

    fn contains(&self, value: &str) -> bool {
        let exact = match &self.exact {
            Exact::Few(texts) => texts.iter().any(|text| text == value),
            Exact::Many(texts) => texts.contains(value),
        };
        exact
            || (self.present && !value.is_empty())
            || begins_with_any(&self.prefixes, value.bytes())
            || begins_with_any(&self.suffixes, value.bytes().rev())
    }
}

/// Sorted, without those that begin with another one and so add nothing.
fn shortest(mut beginnings: Vec<Box<[u8]>>) -> Box<[Box<[u8]>]> {
    beginnings.sort_unstable();
    beginnings.dedup_by(|longer, shorter| longer.starts_with(shorter));
    beginnings.into()
}

fn begins_with_any(beginnings: &[Box<[u8]>], value: impl Iterator<Item = u8> + Clone) -> bool {
    let after = beginnings.partition_point(|beginning| beginning.iter().copied().le(value.clone()));
    let nearest = after.checked_sub(1).and_then(|index| beginnings.get(index));
    nearest.is_some_and(|beginning| value.take(beginning.len()).eq(beginning.iter().copied()))
}

/// A set of prefixes as sorted address ranges that do not overlap.
#[derive(Debug)]
struct NetSet {
    v4: Box<[(u32, u32)]>,
    v6: Box<[(u128, u128)]>,
}

impl NetSet {
    fn new(nets: &[IpNet]) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for net in nets {
            match canonical_net(*net) {
                IpNet::V4(net) => v4.push((u32::from(net.network()), u32::from(net.broadcast()))),
                IpNet::V6(net) => v6.push((u128::from(net.network()), u128::from(net.broadcast()))),
            }
        }
        Self { v4: disjoint(v4), v6: disjoint(v6) }
    }

    fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => in_ranges(&self.v4, u32::from(ip)),
            IpAddr::V6(ip) => in_ranges(&self.v6, u128::from(ip)),
        }
    }
}

/// The form in which a prefix is compared with a canonical address: `::ffff:10.0.0.0/104` is `10.0.0.0/8`. A shorter
/// IPv6 prefix stays one, and holds no IPv4 address.
pub(super) fn canonical_net(net: IpNet) -> IpNet {
    if let IpNet::V6(v6) = net
        && let Some(mapped) = v6.addr().to_ipv4_mapped()
        && let Some(length) = v6.prefix_len().checked_sub(96)
        && let Ok(v4) = Ipv4Net::new(mapped, length)
    {
        return IpNet::V4(v4.trunc());
    }
    net.trunc()
}

/// Prefixes either contain each other or do not touch: drop the contained ones.
fn disjoint<T: Ord + Copy>(mut ranges: Vec<(T, T)>) -> Box<[(T, T)]> {
    ranges.sort_unstable_by(|left, right| left.0.cmp(&right.0).then(right.1.cmp(&left.1)));
    ranges.dedup_by(|inner, outer| inner.1 <= outer.1);
    ranges.into()
}

fn in_ranges<T: Ord + Copy>(ranges: &[(T, T)], value: T) -> bool {
    let after = ranges.partition_point(|range| range.0 <= value);
    after.checked_sub(1).and_then(|index| ranges.get(index)).is_some_and(|range| value <= range.1)
}
