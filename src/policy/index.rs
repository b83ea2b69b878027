//! Which of many rules can match some facts at all.
//!
//! A rule can only match if one of its clauses does, and a clause only through one of its matches, each of which needs one of
//! the words in each of its positive lists. So every rule is filed under the words of one list per match of one clause: the
//! rarest, so that few rules share a drawer. To decide, look into the drawers of the words that the facts have, and evaluate
//! what is found in full. Rules without such words (only negations) are evaluated always; if they are many, but for those
//! that the facts rule out (see `exclusion`). Drawers are found by the hash of their word: a collision costs one evaluation
//! more and nothing else.

use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use ipnet::IpNet;

use super::exclusion::Exclusion;
use super::prepare::{Prepared, Subject, canonical_net};
use super::rule::{Match, Rule, StringMatch};

/// Up to this many rules are evaluated one by one; filing pays only above.
const FEW: usize = 8;

/// Up to this many rules that are evaluated always are, whomever they exclude: it takes 2 µs.
const FEW_ALWAYS: usize = 64;

/// The rules of some policies, filed.
#[derive(Debug, Default)]
pub(super) struct RuleIndex {
    /// (policy, rule of that policy), in the order of the policies.
    rules: Box<[(usize, usize)]>,
    /// Rules that are evaluated always.
    always: Box<[usize]>,
    /// If there are many of these.
    exclusion: Option<Box<Exclusion>>,
    /// Drawer of a word's hash: first and last + 1 in `filed`.
    drawers: HashMap<u64, (usize, usize), RandomState>,
    filed: Box<[usize]>,
    /// Which words of the facts have drawers.
    probes: Box<[Probe]>,
    hashing: RandomState,
}

/// A word that a match needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Word<'a> {
    Text(Field, Comparison, &'a str),
    Account(&'a str, &'a str),
    Net(Side, IpNet),
    Port(u16),
}

/// How to get words of one kind out of facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Probe {
    Text(Field, Comparison, usize),
    Account,
    Net(Side, bool, u8),
    Port,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Field {
    Principal,
    Namespace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Comparison {
    Exact,
    Prefix,
    Suffix,
    Presence,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Side {
    Source,
    Destination,
}

impl RuleIndex {
    /// Files the rules of those `policies` that `wanted` selects.
    pub(super) fn new(policies: &[Arc<Prepared>], wanted: impl Fn(&Prepared) -> bool) -> Self {
        let chosen = policies.iter().enumerate().filter(|(_, policy)| wanted(policy));
        let rules: Box<[(usize, usize)]> = chosen.flat_map(|(at, policy)| (0..policy.rules.len()).map(move |rule| (at, rule))).collect();
        if rules.len() <= FEW {
            return Self { always: (0..rules.len()).collect(), rules, ..Self::default() };
        }
        let hashing = RandomState::default();
        let words_of = |&(policy, rule): &(usize, usize)| {
            let prepared = policies.get(policy)?;
            prepared.authorization.rules.get(prepared.rules.get(rule)?.origin)
        };
        let action_of = |&(policy, _): &(usize, usize)| policies.get(policy).map(|policy| policy.authorization.action);
        let mut popularity: HashMap<u64, usize, RandomState> = HashMap::default();
        for found in rules.iter().filter_map(words_of).flat_map(|rule| &rule.clauses).flat_map(|clause| &clause.matches) {
            each_word(found, false, &mut |_, word| *popularity.entry(hashing.hash_one(word)).or_default() += 1);
        }
        let popularity = |word: &Word<'_>| popularity.get(&hashing.hash_one(word)).copied().unwrap_or(usize::MAX);
        let (mut always, mut filed, mut probes) = (Vec::new(), Vec::new(), BTreeSet::new());
        for (id, rule) in rules.iter().enumerate() {
            match words_of(rule).and_then(|rule| rarest_words(rule, &popularity)) {
                None => always.push(id),
                Some(words) => {
                    for word in words {
                        probes.insert(word.probe());
                        filed.push((hashing.hash_one(word), id));
                    }
                }
            }
        }
        filed.sort_unstable();
        filed.dedup();
        let mut drawers: HashMap<u64, (usize, usize), RandomState> = HashMap::default();
        for (at, (word, _)) in filed.iter().enumerate() {
            drawers.entry(*word).or_insert((at, at)).1 = at + 1;
        }
        let filed = filed.into_iter().map(|(_, id)| id).collect();
        let unfiled = || always.iter().map(|id| rules.get(*id).and_then(|rule| Some((words_of(rule)?, action_of(rule)?))));
        // All of them or none, so that places are those in the list.
        let unfiled = if always.len() > FEW_ALWAYS { unfiled().collect::<Option<Vec<_>>>() } else { None };
        let exclusion = unfiled.map(|unfiled| Box::new(Exclusion::new(unfiled.into_iter())));
        Self { rules, always: always.into(), exclusion, drawers, filed, probes: probes.into_iter().collect(), hashing }
    }

    /// The first policy that matches, in the order of the policies.
    pub(super) fn first(&self, policies: &[Arc<Prepared>], subject: &Subject<'_>) -> Option<usize> {
        let mut first = self.rules.len();
        self.candidates(subject, |drawer| {
            let mut earlier = drawer.take_while(|id| *id < first);
            first = earlier.find(|id| self.matches(policies, *id, subject)).unwrap_or(first);
        });
        self.rules.get(first).map(|(policy, _)| *policy)
    }

    /// Every policy that matches.
    pub(super) fn all(&self, policies: &[Arc<Prepared>], subject: &Subject<'_>) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        self.candidates(subject, |drawer| {
            let matching = drawer.filter(|id| self.matches(policies, *id, subject));
            found.extend(matching.filter_map(|id| self.rules.get(id)).map(|(policy, _)| *policy));
        });
        found
    }

    fn candidates(&self, subject: &Subject<'_>, mut visit: impl FnMut(&mut dyn Iterator<Item = usize>)) {
        match &self.exclusion {
            None => visit(&mut self.always.iter().copied()),
            Some(exclusion) => visit(&mut exclusion.left(subject).filter_map(|place| self.always.get(place).copied())),
        }
        for word in self.probes.iter().filter_map(|probe| probe.word(subject)) {
            let drawer = self.drawers.get(&self.hashing.hash_one(word)).and_then(|(first, last)| self.filed.get(*first..*last));
            if let Some(drawer) = drawer {
                visit(&mut drawer.iter().copied());
            }
        }
    }

    fn matches(&self, policies: &[Arc<Prepared>], id: usize, subject: &Subject<'_>) -> bool {
        let Some((policy, rule)) = self.rules.get(id) else { return false };
        policies.get(*policy).is_some_and(|policy| policy.rule_matches(*rule, subject))
    }
}

/// The words to file a rule under: those of the clause whose most popular word is the least popular. `None` if every clause
/// has a match without positive lists.
fn rarest_words<'a>(rule: &'a Rule, popularity: &dyn Fn(&Word<'_>) -> usize) -> Option<Vec<Word<'a>>> {
    let clauses = rule.clauses.iter().filter(|clause| !clause.matches.is_empty());
    let choices = clauses.filter_map(|clause| {
        let (mut worst, mut words) = (0, Vec::new());
        for found in clause.matches.iter().filter(|found| !found.is_empty()) {
            let (popular, list) = rarest_list(found, popularity)?;
            worst = worst.max(popular);
            each_word(found, false, &mut |at, word| words.extend((at == list).then_some(word)));
        }
        Some((worst, words))
    });
    choices.min_by_key(|(worst, words)| (*worst, words.len())).map(|(_, words)| words)
}

/// The positive list whose most popular word is the least popular, with that popularity.
fn rarest_list(found: &Match, popularity: &dyn Fn(&Word<'_>) -> usize) -> Option<(usize, usize)> {
    let mut lists: [Option<usize>; 6] = [None; 6];
    each_word(found, false, &mut |list, word| {
        if let Some(worst) = lists.get_mut(list) {
            *worst = Some(worst.unwrap_or(0).max(popularity(&word)));
        }
    });
    lists.iter().enumerate().filter_map(|(list, worst)| worst.map(|worst| (worst, list))).min()
}

/// Visits the words of the lists of a match, the positive or the negated ones, with the number of the list.
pub(super) fn each_word<'a>(found: &'a Match, negated: bool, visit: &mut dyn FnMut(usize, Word<'a>)) {
    let texts = match negated {
        false => [(0, Field::Principal, &found.principals), (1, Field::Namespace, &found.namespaces)],
        true => [(0, Field::Principal, &found.not_principals), (1, Field::Namespace, &found.not_namespaces)],
    };
    for (list, field, matchers) in texts {
        for matcher in matchers {
            let (comparison, text) = match matcher {
                StringMatch::Exact(text) => (Comparison::Exact, text.as_str()),
                StringMatch::Prefix(text) => (Comparison::Prefix, text.as_str()),
                StringMatch::Suffix(text) => (Comparison::Suffix, text.as_str()),
                StringMatch::Presence => (Comparison::Presence, ""),
            };
            visit(list, Word::Text(field, comparison, text));
        }
    }
    for account in if negated { &found.not_service_accounts } else { &found.service_accounts } {
        visit(2, Word::Account(&account.namespace, &account.service_account));
    }
    let nets = match negated {
        false => [(3, Side::Source, &found.source_ips), (4, Side::Destination, &found.destination_ips)],
        true => [(3, Side::Source, &found.not_source_ips), (4, Side::Destination, &found.not_destination_ips)],
    };
    for (list, side, nets) in nets {
        for net in nets {
            visit(list, Word::Net(side, canonical_net(*net)));
        }
    }
    for port in if negated { &found.not_destination_ports } else { &found.destination_ports } {
        visit(5, Word::Port(*port));
    }
}

impl Word<'_> {
    /// How to find this word in facts.
    pub(super) fn probe(&self) -> Probe {
        match self {
            Self::Text(field, comparison @ (Comparison::Prefix | Comparison::Suffix), text) => Probe::Text(*field, *comparison, text.len()),
            Self::Text(field, comparison, _) => Probe::Text(*field, *comparison, 0),
            Self::Account(..) => Probe::Account,
            Self::Net(side, net) => Probe::Net(*side, matches!(net, IpNet::V6(_)), net.prefix_len()),
            Self::Port(_) => Probe::Port,
        }
    }
}

impl Probe {
    /// The word of these facts that a rule could be filed under, if they have one.
    pub(super) fn word<'a>(&self, subject: &'a Subject<'_>) -> Option<Word<'a>> {
        match *self {
            Self::Text(field, comparison, length) => {
                let identity = subject.identity?;
                let value = match field {
                    Field::Principal => subject.principal,
                    Field::Namespace => identity.namespace().as_str(),
                };
                let part = match comparison {
                    Comparison::Exact => value,
                    Comparison::Prefix => value.get(..length)?,
                    Comparison::Suffix => value.get(value.len().checked_sub(length)?..)?,
                    Comparison::Presence => "",
                };
                Some(Word::Text(field, comparison, part))
            }
            Self::Account => subject.identity.map(|identity| Word::Account(identity.namespace(), identity.service_account())),
            Self::Net(side, v6, length) => {
                let ip = match side {
                    Side::Source => subject.source_ip,
                    Side::Destination => subject.destination_ip,
                };
                if matches!(ip, IpAddr::V6(_)) != v6 {
                    return None;
                }
                IpNet::new(ip, length).ok().map(|net| Word::Net(side, net.trunc()))
            }
            Self::Port => Some(Word::Port(subject.destination_port)),
        }
    }
}
