//! A persistent vector of rows: each has a number by which the indexes know it.

use std::sync::Arc;

use imbl::Vector;

/// The number of a row. It stays the row's as long as the row is there, and is then given to another.
pub(super) type Id = u32;

/// Bits of a number that one level decides.
const BITS: u32 = 4;
const WIDTH: usize = 1 << BITS;

/// Rows by number. An edit copies the nodes on its path: about a hundred pointers at 100,000 rows. That, and not the indexes, is where rows are
/// counted as shared, because a reference count is a place in memory that is nowhere near.
#[derive(Clone)]
pub(super) struct Table<V> {
    root: Node<V>,
    /// Bits of a number below the root.
    shift: u32,
    /// The number that was never given out.
    next: Id,
    free: Vector<Id>,
}

#[derive(Clone)]
enum Node<V> {
    Empty,
    Leaf(Arc<[Option<V>; WIDTH]>),
    Branch(Arc<[Self; WIDTH]>),
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self { root: Node::Empty, shift: 0, next: 0, free: Vector::new() }
    }
}

/// The child that a number is below.
fn slot(id: Id, shift: u32) -> usize {
    id.checked_shr(shift).unwrap_or(0) as usize % WIDTH
}

impl<V: Clone> Table<V> {
    pub(super) fn get(&self, id: Id) -> Option<&V> {
        if id >= self.next {
            return None;
        }
        let (mut node, mut shift) = (&self.root, self.shift);
        loop {
            match node {
                Node::Leaf(rows) => return rows[slot(id, 0)].as_ref(),
                Node::Branch(children) => node = &children[slot(id, shift)],
                Node::Empty => return None,
            }
            shift = shift.wrapping_sub(BITS);
        }
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut V> {
        self.place(id).as_mut()
    }

    /// Puts a row in the place of another.
    pub(super) fn set(&mut self, id: Id, row: V) {
        *self.place(id) = Some(row);
    }

    /// Adds a row; says its number.
    pub(super) fn put(&mut self, row: V) -> Id {
        let id = self.free.pop_back().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        });
        *self.place(id) = Some(row);
        id
    }

    /// Removes a row.
    pub(super) fn take(&mut self, id: Id) -> Option<V> {
        let row = self.place(id).take()?;
        self.free.push_back(id);
        if self.is_empty() {
            *self = Self::default();
        }
        Some(row)
    }

    /// How many rows there are.
    pub(super) fn len(&self) -> usize {
        self.next as usize - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every row, in the order of their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = &V> {
        (0..self.next).filter_map(|id| self.get(id))
    }

    /// Where the row of a number belongs, made if it is not there.
    fn place(&mut self, id: Id) -> &mut Option<V> {
        while id.checked_shr(self.shift + BITS).unwrap_or(0) > 0 {
            let mut below = std::mem::replace(&mut self.root, Node::Empty);
            self.root = Node::Branch(Arc::new(std::array::from_fn(|_| std::mem::replace(&mut below, Node::Empty))));
            self.shift += BITS;
        }
        let (mut node, mut shift) = (&mut self.root, self.shift);
        loop {
            if let Node::Empty = node {
                *node =
                    if shift == 0 { Node::Leaf(Arc::new([const { None }; WIDTH])) } else { Node::Branch(Arc::new([const { Node::Empty }; WIDTH])) };
            }
            match node {
                Node::Branch(children) => node = &mut Arc::make_mut(children)[slot(id, shift)],
                Node::Leaf(rows) => return &mut Arc::make_mut(rows)[slot(id, 0)],
                Node::Empty => unreachable!("it was made above"), // invariant: see there
            }
            shift -= BITS;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_order_of_edits_keeps_what_a_plain_map_keeps_and_older_tables_never_change(steps in proptest::collection::vec(any::<u16>(), 0..900)) {
            let (mut table, mut oracle, mut kept) = (Table::<u16>::default(), BTreeMap::new(), Vec::new());
            for step in steps {
                match (step % 8, oracle.keys().nth(usize::from(step) % (oracle.len() + 1)).copied()) {
                    (0, Some(id)) => prop_assert_eq!(table.take(id), oracle.remove(&id)),
                    (1, Some(id)) => {
                        *table.get_mut(id).unwrap() = step;
                        oracle.insert(id, step);
                    }
                    (2, None) => kept.push((table.clone(), oracle.clone())),
                    _ => {
                        let id = table.put(step);
                        prop_assert!(oracle.insert(id, step).is_none(), "the number of another row");
                    }
                }
                prop_assert_eq!(table.len(), oracle.len());
            }
            kept.push((table, oracle));
            for (mut table, oracle) in kept {
                prop_assert!(oracle.iter().all(|(id, row)| table.get(*id) == Some(row)));
                prop_assert!(table.iter().eq(oracle.values()));
                prop_assert!(table.get(Id::MAX).is_none() && table.get(table.next).is_none());
                prop_assert!(oracle.keys().all(|id| table.take(*id).is_some()));
                prop_assert!(table.is_empty() && table.next == 0 && matches!(table.root, Node::Empty), "nothing stays behind");
            }
        }
    }
}
