//! A persistent multimap: rows by the hash of one of their properties.

use std::iter::once;
use std::slice::Iter;
use std::sync::Arc;

/// Bits of a key that one branch decides.
const BITS: u32 = 5;
/// Children of a branch.
const WIDTH: usize = 1 << BITS;
/// Rows that a leaf holds before it becomes a branch.
const LEAF: usize = 32;
/// Bits of a key that [`Index::under`] compares: those of whole branches.
const PREFIX: u32 = 6 * BITS;

/// Rows by a hash of one of their properties. Two rows under one key are either equal in that property (two workloads with
/// one address) or a collision, and the index cannot tell: every reader compares the rows themselves.
///
/// A radix tree over the hash, of branches with all their children and leaves of exactly their rows: about 30 bytes a row and
/// three steps at 100,000 rows. In `benches/lookup.rs` imbl's B-tree, as compact, took two to three times as long; its hash
/// trie has nodes of a fixed width, which at this size would be mostly empty.
#[derive(Clone)]
pub(super) struct Index<V> {
    root: Node<V>,
}

#[derive(Clone)]
enum Node<V> {
    Leaf(Arc<[Slot<V>]>),
    Branch(Arc<[Self; WIDTH]>),
}

/// A row of a leaf. It is there in every leaf that anybody can see; a leaf that is being replaced has given its rows away, because moving them
/// costs nothing, and to copy them means to touch the reference count of each. (`Option` takes no room: rows are pointers.)
type Slot<V> = (u64, Option<V>);

/// A key whose first bits are those of `group` and whose other bits are those of `member`, for [`Index::under`].
pub(super) fn grouped(group: u64, member: u64) -> u64 {
    let rest = u64::MAX >> PREFIX;
    (group & !rest) | (member & rest)
}

/// Where in a leaf a row is.
fn position<V>(leaf: &[Slot<V>], key: u64, same: impl Fn(&V) -> bool) -> Option<usize> {
    leaf.iter().position(|(other, row)| *other == key && row.as_ref().is_some_and(&same))
}

/// The child that the first bits of what is left of a key choose.
fn slot(rest: u64) -> usize {
    (rest >> (u64::BITS - BITS)) as usize
}

impl<V> Default for Index<V> {
    fn default() -> Self {
        Self { root: Node::Leaf(Arc::default()) }
    }
}

impl<V: Clone> Index<V> {
    /// All rows of a key; the caller compares.
    pub(super) fn rows(&self, key: u64) -> impl Iterator<Item = &V> {
        let (mut node, mut rest) = (&self.root, key);
        let leaf = loop {
            match node {
                Node::Leaf(rows) => break rows,
                Node::Branch(children) => {
                    node = &children[slot(rest)];
                    rest <<= BITS;
                }
            }
        };
        leaf.iter().filter(move |(other, _)| *other == key).filter_map(|(_, row)| row.as_ref())
    }

    /// All rows whose keys were [`grouped`] under this one; the caller compares.
    pub(super) fn under(&self, group: u64) -> impl Iterator<Item = &V> {
        let (mut node, mut rest) = (&self.root, group);
        for _ in 0..PREFIX / BITS {
            let Node::Branch(children) = node else { break };
            node = &children[slot(rest)];
            rest <<= BITS;
        }
        Rows::of(node).filter(move |(key, _)| (*key ^ group) >> (u64::BITS - PREFIX) == 0).filter_map(|(_, row)| row.as_ref())
    }

    /// Every row, in no useful order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &V> {
        Rows::of(&self.root).filter_map(|(_, row)| row.as_ref())
    }

    /// Whether there is no row.
    pub(super) fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// A row to change in place.
    pub(super) fn row_mut(&mut self, key: u64, same: impl Fn(&V) -> bool) -> Option<&mut V> {
        let (mut node, mut rest) = (&mut self.root, key);
        let leaf = loop {
            match node {
                Node::Leaf(rows) => break rows,
                Node::Branch(children) => {
                    node = &mut Arc::make_mut(children)[slot(rest)];
                    rest <<= BITS;
                }
            }
        };
        let position = position(leaf, key, same)?;
        Arc::make_mut(leaf).get_mut(position).and_then(|(_, row)| row.as_mut())
    }

    /// Adds a row, in place of the one that is the same.
    pub(super) fn put(&mut self, key: u64, row: V, same: impl Fn(&V) -> bool) {
        self.root.put(key, 0, row, &same);
    }

    /// Removes the row that is the same.
    pub(super) fn take(&mut self, key: u64, same: impl Fn(&V) -> bool) -> Option<V> {
        // Looked for first, so that a row that is not there copies nothing.
        let known = self.rows(key).any(&same);
        if known { self.root.take(key, 0, &same) } else { None }
    }
}

impl<V: Clone> Node<V> {
    /// A node of these rows, of whose keys `depth` bits are decided.
    fn of(rows: Vec<Slot<V>>, depth: u32) -> Self {
        let alike = rows.windows(2).all(|pair| matches!(pair, [(left, _), (right, _)] if left == right));
        if rows.len() <= LEAF || alike {
            return Self::Leaf(rows.into());
        }
        let mut parts: [Vec<Slot<V>>; WIDTH] = std::array::from_fn(|_| Vec::new());
        for row in rows {
            parts[slot(row.0 << depth)].push(row);
        }
        Self::Branch(Arc::new(parts.map(|part| Self::of(part, depth + BITS))))
    }

    /// Adds or replaces a row below this node, for whose place `depth` bits of the key are decided.
    fn put(&mut self, key: u64, depth: u32, row: V, same: &impl Fn(&V) -> bool) {
        let rows = match self {
            Self::Branch(children) => return Arc::make_mut(children)[slot(key << depth)].put(key, depth + BITS, row, same),
            Self::Leaf(rows) => rows,
        };
        match position(rows, key, same) {
            Some(position) => {
                if let Some((_, known)) = Arc::make_mut(rows).get_mut(position) {
                    *known = Some(row);
                }
            }
            None if rows.len() < LEAF => {
                *rows = match Arc::get_mut(rows) {
                    Some(own) => own.iter_mut().map(|(key, row)| (*key, row.take())).chain(once((key, Some(row)))).collect(),
                    None => rows.iter().cloned().chain(once((key, Some(row)))).collect(),
                }
            }
            None => *self = Self::of(rows.iter().cloned().chain(once((key, Some(row)))).collect(), depth),
        }
    }

    fn take(&mut self, key: u64, depth: u32, same: &impl Fn(&V) -> bool) -> Option<V> {
        match self {
            Self::Leaf(rows) => {
                let position = position(rows, key, same)?;
                let (_, row) = rows.get(position)?.clone();
                *rows = rows.iter().enumerate().filter(|(index, _)| *index != position).map(|(_, row)| row.clone()).collect();
                row
            }
            Self::Branch(children) => {
                let children = Arc::make_mut(children);
                let row = children[slot(key << depth)].take(key, depth + BITS, same);
                // A branch that could well be a leaf becomes one: a mesh that shrinks gives its memory back.
                let left = children.iter().map(|child| if let Self::Leaf(rows) = child { rows.len() } else { LEAF });
                if left.sum::<usize>() <= LEAF / 2 {
                    *self = Self::Leaf(Rows::of(self).cloned().collect());
                }
                row
            }
        }
    }
}

/// The rows below a node. Allocates only below a branch.
struct Rows<'a, V> {
    leaf: Iter<'a, Slot<V>>,
    waiting: Vec<Iter<'a, Node<V>>>,
}

impl<'a, V> Rows<'a, V> {
    fn of(node: &'a Node<V>) -> Self {
        match node {
            Node::Leaf(rows) => Self { leaf: rows.iter(), waiting: Vec::new() },
            Node::Branch(children) => Self { leaf: [].iter(), waiting: vec![children.iter()] },
        }
    }
}

impl<'a, V> Iterator for Rows<'a, V> {
    type Item = &'a Slot<V>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.leaf.next() {
                return Some(row);
            }
            match self.waiting.last_mut()?.next() {
                Some(Node::Leaf(rows)) => self.leaf = rows.iter(),
                Some(Node::Branch(children)) => self.waiting.push(children.iter()),
                None => drop(self.waiting.pop()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_that_share_a_key_are_kept_apart_however_many() {
        let mut index = Index::<(usize, char)>::default();
        for id in 0..100 {
            index.put(7, (id, 'a'), |known| known.0 == id);
            index.put(8, (id, 'a'), |known| known.0 == id);
        }
        let before = index.clone();
        index.put(7, (3, 'b'), |known| known.0 == 3);
        index.row_mut(7, |row| row.0 == 4).unwrap().1 = 'c';
        assert_eq!(index.take(7, |row| row.0 == 100), None);
        assert_eq!(index.take(7, |row| row.0 == 5), Some((5, 'a')));
        assert_eq!(index.rows(7).filter(|row| row.1 != 'a').collect::<Vec<_>>(), [&(3, 'b'), &(4, 'c')]);
        assert_eq!((index.rows(7).count(), index.rows(8).count()), (99, 100));
        assert!(before.rows(7).all(|row| row.1 == 'a') && before.rows(7).count() == 100, "an older copy never changes");
    }

    /// Keys that share many first bits as well as keys that share none.
    fn any_key() -> impl Strategy<Value = u64> {
        (0..64_u64, 0..3_u32).prop_map(|(low, turn)| (low | 1 << 9).rotate_right(turn * 28))
    }

    proptest! {
        #[test]
        fn any_order_of_edits_keeps_what_a_plain_map_keeps(steps in proptest::collection::vec((any::<u8>(), any_key(), 0..2_u8), 0..600)) {
            let (mut index, mut oracle) = (Index::<(u64, u8, u8)>::default(), BTreeMap::new());
            for (value, key, id) in steps {
                let same = |row: &(u64, u8, u8)| (row.0, row.1) == (key, id);
                if value < 90 {
                    prop_assert_eq!(index.take(key, same).map(|row| row.2), oracle.remove(&(key, id)));
                } else {
                    index.put(key, (key, id, value), same);
                    oracle.insert((key, id), value);
                }
                prop_assert_eq!(index.rows(key).count(), oracle.range((key, 0)..=(key, u8::MAX)).count());
            }
            let found: BTreeMap<_, _> = index.iter().map(|row| ((row.0, row.1), row.2)).collect();
            prop_assert_eq!(&found, &oracle);
            for (key, _) in oracle.keys() {
                let group = grouped(*key, 0);
                let expected = oracle.keys().filter(|(other, _)| grouped(*other, 0) == group).count();
                prop_assert_eq!(index.under(*key).count(), expected);
            }
            for (key, id) in oracle.keys() {
                index.take(*key, |row| row.1 == *id);
            }
            prop_assert!(index.is_empty() && matches!(index.root, Node::Leaf(_)));
        }
    }
}
