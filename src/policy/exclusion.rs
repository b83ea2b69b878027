//! Which of many rules of negations some facts rule out.
//!
//! A rule that only says who is not meant cannot be filed under words that facts must have (see `index`): nearly everybody has none of the words that
//! it excludes, and it matches. The costly case is the other one, facts that very many rules exclude, because all of them were evaluated in vain. So
//! these rules are filed under the words that exclude them, with one bit each where a word excludes many, and what is left is evaluated in full, of
//! which the first usually matches. To be ruled out by mistake would open a door: words are compared, not only their hashes, and a rule is filed only
//! where one word is enough, as in a clause of one match.

use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use ipnet::IpNet;

use super::index::{Comparison, Field, Probe, Side, Word, each_word};
use super::prepare::Subject;
use super::rule::{Action, Rule};
use crate::model::Text;

/// What excludes which of some rules, by their places among them.
#[derive(Debug, Default)]
pub(super) struct Exclusion {
    rules: usize,
    /// By the hashes of words.
    words: HashMap<u64, Vec<(OwnWord, Places)>, RandomState>,
    /// Which words of the facts exclude anything.
    probes: Box<[Probe]>,
    /// Those of ALLOW policies that never match somebody without identity, whomever they exclude.
    nameless: Option<Places>,
}

/// Places in ascending order.
#[derive(Debug)]
enum Places {
    Few(Box<[u32]>),
    /// A bit each.
    Many(Box<[u64]>),
}

/// A [`Word`] that is kept.
#[derive(Debug)]
enum OwnWord {
    Text(Field, Comparison, Text),
    Account(Text, Text),
    Net(Side, IpNet),
    Port(u16),
}

impl Exclusion {
    /// Files rules with the actions of their policies, in the order of their places.
    pub(super) fn new<'a>(rules: impl Iterator<Item = (&'a Rule, Action)>) -> Self {
        let mut words = HashMap::<u64, Vec<(OwnWord, Vec<u32>)>, RandomState>::default();
        let (mut probes, mut nameless, mut count) = (BTreeSet::new(), Vec::new(), 0);
        for (place, (rule, action)) in (0_u32..).zip(rules) {
            count += 1;
            let matches = rule.clauses.iter().map(|clause| clause.matches.iter().filter(|found| !found.is_empty()));
            for found in matches.filter_map(|mut matches| matches.next().filter(|_| matches.next().is_none())) {
                each_word(found, true, &mut |_, word| {
                    // Whether a value is there at all is not a word.
                    if matches!(word, Word::Text(_, Comparison::Presence, _)) {
                        return;
                    }
                    probes.insert(word.probe());
                    let hash = words.hasher().hash_one(word);
                    let alike = words.entry(hash).or_default();
                    match alike.iter_mut().find(|(known, _)| known.word() == word) {
                        Some((_, places)) => places.push(place),
                        None => alike.push((OwnWord::of(word), vec![place])),
                    }
                });
                let of_identity = !(found.not_principals.is_empty() && found.not_namespaces.is_empty() && found.not_service_accounts.is_empty());
                if of_identity && action == Action::Allow {
                    nameless.push(place);
                }
            }
        }
        let filed = |alike: Vec<(OwnWord, Vec<u32>)>| alike.into_iter().map(|(word, places)| (word, Places::new(places, count))).collect();
        // With the same seed: a map that grows anew would have another.
        let mut kept = HashMap::with_capacity_and_hasher(words.len(), words.hasher().clone());
        kept.extend(words.into_iter().map(|(hash, alike)| (hash, filed(alike))));
        let nameless = (!nameless.is_empty()).then(|| Places::new(nameless, count));
        Self { rules: count, words: kept, probes: probes.into_iter().collect(), nameless }
    }

    /// The places of the rules that these facts do not rule out, in ascending order.
    pub(super) fn left(&self, subject: &Subject<'_>) -> impl Iterator<Item = usize> + use<> {
        let mut excluded = vec![0_u64; self.rules.div_ceil(64)];
        for word in self.probes.iter().filter_map(|probe| probe.word(subject)) {
            let alike = self.words.get(&self.words.hasher().hash_one(word)).into_iter().flatten();
            alike.filter(|(known, _)| known.word() == word).for_each(|(_, places)| places.mark(&mut excluded));
        }
        if let Some(nameless) = self.nameless.as_ref().filter(|_| subject.identity.is_none()) {
            nameless.mark(&mut excluded);
        }
        let rules = self.rules;
        let places = excluded.into_iter().enumerate().flat_map(|(block, excluded)| Bits(!excluded).map(move |bit| block * 64 + bit));
        places.take_while(move |place| *place < rules)
    }
}

impl Places {
    fn new(mut places: Vec<u32>, rules: usize) -> Self {
        places.dedup();
        if places.len() * u32::BITS as usize <= rules {
            return Self::Few(places.into());
        }
        let mut bits = vec![0; rules.div_ceil(64)];
        Self::Few(places.into()).mark(&mut bits);
        Self::Many(bits.into())
    }

    fn mark(&self, all: &mut [u64]) {
        match self {
            Self::Few(places) => {
                for place in places {
                    if let Some(block) = all.get_mut(*place as usize / 64) {
                        *block |= 1 << (place % 64);
                    }
                }
            }
            Self::Many(bits) => all.iter_mut().zip(bits).for_each(|(all, bits)| *all |= bits),
        }
    }
}

impl OwnWord {
    fn of(word: Word<'_>) -> Self {
        match word {
            Word::Text(field, comparison, text) => Self::Text(field, comparison, text.into()),
            Word::Account(namespace, account) => Self::Account(namespace.into(), account.into()),
            Word::Net(side, net) => Self::Net(side, net),
            Word::Port(port) => Self::Port(port),
        }
    }

    fn word(&self) -> Word<'_> {
        match self {
            Self::Text(field, comparison, text) => Word::Text(*field, *comparison, text),
            Self::Account(namespace, account) => Word::Account(namespace, account),
            Self::Net(side, net) => Word::Net(*side, *net),
            Self::Port(port) => Word::Port(*port),
        }
    }
}

/// The ones of a number, from the lowest.
struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let bit = self.0.trailing_zeros();
        self.0 &= self.0.wrapping_sub(1);
        (bit < u64::BITS).then_some(bit as usize)
    }
}
