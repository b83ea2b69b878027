//! Verdicts of facts already seen, without a lock.

use std::hash::BuildHasher;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;
use foldhash::quality::RandomState;

use super::Facts;
use super::decision::Decision;
use super::prepare::Uses;

/// Slots of one cache: at most 512 × ~250 bytes, whatever a peer tries. It exists once per distinct compiled policy.
const SLOTS: usize = 512;

/// A direct-mapped table: each fact set has one slot, and the last one to use it wins. An attacker who fills it costs
/// his neighbours one evaluation each, and no memory. Hashes are keyed, so slots are hard to aim at.
#[derive(Debug)]
pub(super) struct DecisionCache {
    uses: Uses,
    hashing: RandomState,
    /// Made at the first connection; most policies never see one on this node.
    slots: OnceLock<Box<[ArcSwapOption<Entry>]>>,
}

#[derive(Debug)]
struct Entry {
    facts: Facts,
    decision: Arc<Decision>,
}

impl DecisionCache {
    pub(super) fn new(uses: Uses) -> Self {
        Self { uses, hashing: RandomState::default(), slots: OnceLock::new() }
    }

    /// The decision for these (canonical) facts, evaluated if it is not here.
    pub(super) fn decide(&self, facts: Facts, evaluate: impl FnOnce(&Facts) -> Decision) -> Arc<Decision> {
        let facts = self.relevant(facts);
        let slots = self.slots.get_or_init(|| (0..SLOTS).map(|_| ArcSwapOption::empty()).collect());
        // The remainder fits whatever type it is narrowed to.
        let at = usize::try_from(self.hashing.hash_one(&facts) % SLOTS as u64).unwrap_or(0);
        let Some(slot) = slots.get(at) else { return Arc::new(evaluate(&facts)) };
        if let Some(entry) = slot.load().as_ref()
            && entry.facts == facts
        {
            return Arc::clone(&entry.decision);
        }
        let decision = Arc::new(evaluate(&facts));
        slot.store(Some(Arc::new(Entry { facts, decision: Arc::clone(&decision) })));
        decision
    }

    /// The facts without those that no policy looks at: a policy that knows no addresses need not be asked again for each.
    fn relevant(&self, facts: Facts) -> Facts {
        let any = Facts::anything();
        Facts {
            identity: facts.identity.filter(|_| self.uses.identity),
            source_ip: if self.uses.source_ip { facts.source_ip } else { any.source_ip },
            destination_ip: if self.uses.destination_ip { facts.destination_ip } else { any.destination_ip },
            destination_port: if self.uses.destination_port { facts.destination_port } else { any.destination_port },
        }
    }
}
