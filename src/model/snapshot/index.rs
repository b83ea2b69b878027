//! A persistent multimap: the numbers of rows by the hash of one of their properties.

use std::iter::once;
use std::slice::Iter;
use std::sync::Arc;

use super::table::Id;

/// Bits of a key that one branch decides.
const BITS: u32 = 4;
/// Children of a branch.
const WIDTH: usize = 1 << BITS;
/// Slots that a leaf holds before it becomes a branch.
const LEAF: usize = 64;
/// Bits of a key that [`Index::under`] compares: those of whole branches.
const PREFIX: u32 = 8 * BITS;

/// Numbers of rows by a hash of one of the rows' properties; each number once under a key. Two rows under one key are either equal in that property (two workloads with one
/// address) or a collision, and the index cannot tell: every reader compares the rows themselves.
///
/// A radix tree over the hash, of branches with all their children and leaves of exactly their slots, in order. Slots own nothing: to copy a leaf is to copy
/// a few hundred bytes. 13 to 18 bytes a row, and three steps at 100,000 rows.
#[derive(Clone)]
pub(super) struct Index {
    root: Node,
}

#[derive(Clone)]
enum Node {
    Leaf(Arc<[Slot]>),
    Branch(Arc<[Self; WIDTH]>),
}

/// A key, in two halves so that a slot has 12 bytes, and the number of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    key: [u32; 2],
    id: Id,
}

impl Slot {
    #[allow(clippy::cast_possible_truncation, reason = "halves of a key")]
    pub(super) fn new(key: u64, id: Id) -> Self {
        Self { key: [key as u32, (key >> 32) as u32], id }
    }

    fn key(&self) -> u64 {
        // The halves lie as the whole would, so that this is one load.
        u64::from(self.key[1]) << 32 | u64::from(self.key[0])
    }

    fn order(&self) -> (u64, Id) {
        (self.key(), self.id)
    }
}

/// A key whose first bits are those of `group` and whose other bits are those of `member`, for [`Index::under`].
pub(super) fn grouped(group: u64, member: u64) -> u64 {
    let rest = u64::MAX >> PREFIX;
    (group & !rest) | (member & rest)
}

/// The child that a key is below, when `depth` of its bits are decided.
fn child(key: u64, depth: u32) -> usize {
    ((key << depth) >> (u64::BITS - BITS)) as usize
}

/// Where the slots of a key are, or would be, in a leaf whose keys have `depth` bits in common. Keys are hashes, so it is looked for where it should be if
/// the others are spread evenly, and that is nearly always in the first piece of memory that is read.
fn first_of(leaf: &[Slot], key: u64, depth: u32) -> usize {
    let before = |slot: &Slot| slot.key() < key;
    let expected = usize::try_from((u128::from(key.checked_shl(depth).unwrap_or(0)) * leaf.len() as u128) >> u64::BITS).unwrap_or(0);
    let (lower, upper) = leaf.split_at(expected.min(leaf.len()));
    match upper.iter().position(|slot| !before(slot)) {
        Some(0) => lower.iter().rposition(before).map_or(0, |last| last + 1),
        Some(more) => lower.len() + more,
        None if upper.is_empty() => lower.iter().rposition(before).map_or(0, |last| last + 1),
        None => leaf.len(),
    }
}

impl Default for Index {
    fn default() -> Self {
        Self { root: Node::Leaf(Arc::default()) }
    }
}

impl Index {
    /// All rows of a key; the caller compares.
    pub(super) fn rows(&self, key: u64) -> impl Iterator<Item = Id> {
        let (mut node, mut depth) = (&self.root, 0);
        let leaf = loop {
            match node {
                Node::Leaf(slots) => break slots,
                Node::Branch(children) => {
                    node = &children[child(key, depth)];
                    depth += BITS;
                }
            }
        };
        let first = first_of(leaf, key, depth);
        leaf.iter().skip(first).take_while(move |slot| slot.key() == key).map(|slot| slot.id)
    }

    /// All rows whose keys were [`grouped`] under this one; the caller compares.
    pub(super) fn under(&self, group: u64) -> impl Iterator<Item = Id> {
        let mut node = &self.root;
        for step in 0..PREFIX / BITS {
            let Node::Branch(children) = node else { break };
            node = &children[child(group, step * BITS)];
        }
        Slots::of(node).filter(move |slot| (slot.key() ^ group) >> (u64::BITS - PREFIX) == 0).map(|slot| slot.id)
    }

    /// Every row, in no useful order.
    pub(super) fn iter(&self) -> impl Iterator<Item = Id> {
        Slots::of(&self.root).map(|slot| slot.id)
    }

    /// Whether there is no row.
    pub(super) fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// Adds a row.
    pub(super) fn put(&mut self, key: u64, id: Id) {
        self.root.extend(&[Slot::new(key, id)], 0);
    }

    /// Adds many: each leaf is written once, however many of them belong there.
    pub(super) fn extend(&mut self, mut slots: Vec<Slot>) {
        slots.sort_unstable_by_key(Slot::order);
        self.root.extend(&slots, 0);
    }

    /// Removes a row from under a key; says whether it was there.
    pub(super) fn take(&mut self, key: u64, id: Id) -> bool {
        // Looked for first, so that a row that is not there copies nothing.
        let known = self.rows(key).any(|other| other == id);
        if known {
            self.root.take(Slot::new(key, id), 0);
        }
        known
    }
}

impl Node {
    /// A node of these slots, in order of their keys, of which `depth` bits are decided.
    fn of(slots: &[Slot], depth: u32) -> Self {
        let alike = slots.first().map(Slot::key) == slots.last().map(Slot::key);
        if slots.len() <= LEAF || alike {
            return Self::Leaf(slots.into());
        }
        let mut parts = Parts { rest: slots, depth };
        Self::Branch(Arc::new(std::array::from_fn(|number| Self::of(parts.next(number), depth + BITS))))
    }

    /// Adds slots in order of their keys, of which `depth` bits are decided.
    fn extend(&mut self, more: &[Slot], depth: u32) {
        match self {
            _ if more.is_empty() => {}
            Self::Branch(children) => {
                let mut parts = Parts { rest: more, depth };
                for (number, node) in Arc::make_mut(children).iter_mut().enumerate() {
                    node.extend(parts.next(number), depth + BITS);
                }
            }
            Self::Leaf(slots) => {
                if let [one] = more
                    && slots.len() < LEAF
                {
                    let (before, after) = slots.split_at(slots.partition_point(|slot| slot.order() < one.order()));
                    if after.first() != Some(one) {
                        *slots = before.iter().chain(once(one)).chain(after).copied().collect();
                    }
                    return;
                }
                let mut all = [&**slots, more].concat();
                all.sort_unstable_by_key(Slot::order);
                all.dedup();
                *self = Self::of(&all, depth);
            }
        }
    }

    fn take(&mut self, gone: Slot, depth: u32) {
        match self {
            Self::Leaf(slots) => *slots = slots.iter().copied().filter(|slot| *slot != gone).collect(),
            Self::Branch(children) => {
                let children = Arc::make_mut(children);
                children[child(gone.key(), depth)].take(gone, depth + BITS);
                // A branch that could well be a leaf becomes one: a mesh that shrinks gives its memory back.
                let left = children.iter().map(|child| if let Self::Leaf(slots) = child { slots.len() } else { LEAF });
                if left.sum::<usize>() <= LEAF / 2 {
                    *self = Self::Leaf(Slots::of(self).copied().collect());
                }
            }
        }
    }
}

/// Slots in order of their keys, cut into those of each child in turn.
struct Parts<'a> {
    rest: &'a [Slot],
    depth: u32,
}

impl<'a> Parts<'a> {
    fn next(&mut self, number: usize) -> &'a [Slot] {
        let end = self.rest.partition_point(|slot| child(slot.key(), self.depth) <= number);
        let (part, rest) = self.rest.split_at(end);
        self.rest = rest;
        part
    }
}

/// The slots below a node. Allocates only below a branch.
struct Slots<'a> {
    leaf: Iter<'a, Slot>,
    waiting: Vec<Iter<'a, Node>>,
}

impl<'a> Slots<'a> {
    fn of(node: &'a Node) -> Self {
        match node {
            Node::Leaf(slots) => Self { leaf: slots.iter(), waiting: Vec::new() },
            Node::Branch(children) => Self { leaf: [].iter(), waiting: vec![children.iter()] },
        }
    }
}

impl<'a> Iterator for Slots<'a> {
    type Item = &'a Slot;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(slot) = self.leaf.next() {
                return Some(slot);
            }
            match self.waiting.last_mut()?.next() {
                Some(Node::Leaf(slots)) => self.leaf = slots.iter(),
                Some(Node::Branch(children)) => self.waiting.push(children.iter()),
                None => drop(self.waiting.pop()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_that_share_a_key_are_kept_apart_however_many() {
        let mut index = Index::default();
        for id in 0..100 {
            index.put(7, id);
            index.put(8, id);
        }
        let before = index.clone();
        assert!(!index.take(7, 100) && !index.take(9, 5) && index.take(7, 5));
        index.extend((100..200).map(|id| Slot::new(7, id)).collect());
        assert_eq!((index.rows(7).count(), index.rows(8).count(), index.rows(9).count()), (199, 100, 0));
        assert!(before.rows(7).eq(0..100), "an older copy never changes");
    }

    /// Keys that share many first bits as well as keys that share none.
    fn any_key() -> impl Strategy<Value = u64> {
        (0..64_u64, 0..3_u32).prop_map(|(low, turn)| (low | 1 << 9).rotate_right(turn * 28))
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take(u64, Id),
        Put(u64, Id),
        Extend(Vec<(u64, Id)>),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => (any_key(), 0..3_u32).prop_map(|(key, id)| Step::Take(key, id)),
            9 => (any_key(), 0..3_u32).prop_map(|(key, id)| Step::Put(key, id)),
            1 => proptest::collection::vec((any_key(), 0..3_u32), 0..300).prop_map(Step::Extend),
        ]
    }

    proptest! {
        #[test]
        fn any_order_of_edits_keeps_what_a_plain_set_keeps(steps in proptest::collection::vec(any_step(), 0..400)) {
            let (mut index, mut oracle) = (Index::default(), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Take(key, id) => prop_assert_eq!(index.take(key, id), oracle.remove(&(key, id))),
                    Step::Put(key, id) => {
                        oracle.insert((key, id));
                        index.put(key, id);
                    }
                    Step::Extend(more) => {
                        oracle.extend(more.iter().copied());
                        index.extend(more.into_iter().map(|(key, id)| Slot::new(key, id)).collect());
                    }
                }
            }
            for (key, _) in &oracle {
                let mut found: Vec<_> = index.rows(*key).collect();
                found.sort_unstable();
                prop_assert_eq!(found, oracle.range((*key, 0)..=(*key, Id::MAX)).map(|(_, id)| *id).collect::<Vec<_>>());
                let group = grouped(*key, 0);
                prop_assert_eq!(index.under(*key).count(), oracle.iter().filter(|(other, _)| grouped(*other, 0) == group).count());
            }
            let mut all: Vec<_> = Slots::of(&index.root).map(Slot::order).collect();
            prop_assert!(all.is_sorted(), "readers search");
            all.dedup();
            prop_assert_eq!(all.len(), oracle.len());
            for (key, id) in oracle {
                prop_assert!(index.take(key, id));
            }
            prop_assert!(index.is_empty() && matches!(index.root, Node::Leaf(_)));
        }
    }
}
