//! A message in the pieces in which it came.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

/// Pieces of together less than this become one.
const SMALL: usize = 2048;

/// Bytes as they came.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// None is empty.
    pieces: VecDeque<Bytes>,
    length: usize,
}

impl Pieces {
    pub(super) fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        match self.pieces.back_mut() {
            _ if piece.is_empty() => {}
            // However small the frames are, a message is not many times as large as its bytes.
            Some(last) if last.len() + piece.len() <= SMALL => *last = [&**last, &*piece].concat().into(),
            _ => self.pieces.push_back(piece),
        }
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.length
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn advance(&mut self, count: usize) {
        let mut count = count.min(self.length);
        self.length -= count;
        while let Some(first) = self.pieces.front_mut() {
            if count < first.len() {
                return first.advance(count);
            }
            count -= first.len();
            self.pieces.pop_front();
        }
    }

    /// Copies only what lies in more than one piece.
    fn copy_to_bytes(&mut self, length: usize) -> Bytes {
        let length = length.min(self.length);
        match self.pieces.front_mut() {
            Some(first) if length < first.len() => {
                self.length -= length;
                first.split_to(length)
            }
            _ => {
                let mut whole = BytesMut::with_capacity(length);
                let mut left = length;
                while left > 0 {
                    let part = self.chunk();
                    let part = part.get(..left).unwrap_or(part);
                    left -= part.len();
                    whole.extend_from_slice(part);
                    self.advance(part.len());
                }
                whole.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_read_as_the_bytes_they_are_pieces_of(sizes in proptest::collection::vec(0..3000_usize, 0..20), reads in proptest::collection::vec((0..5000_usize, any::<bool>()), 0..30)) {
            let whole: Vec<u8> = (0..sizes.iter().sum()).map(|index: usize| index.to_le_bytes()[index % 2]).collect();
            let (mut pieces, mut from) = (Pieces::default(), 0);
            for size in sizes {
                pieces.push(Bytes::copy_from_slice(&whole[from..from + size]));
                from += size;
            }
            let mut oracle = Bytes::from(whole);
            prop_assert!(pieces.pieces.len() <= 1 + 2 * oracle.len() / SMALL);
            for (length, copy) in reads {
                prop_assert_eq!(pieces.remaining(), oracle.len());
                prop_assert!(oracle.starts_with(pieces.chunk()) && pieces.has_remaining() != pieces.chunk().is_empty());
                // Often just the first piece: where one ends is where mistakes are.
                let length = if length % 4 == 0 { pieces.chunk().len() } else { length.min(oracle.len()) };
                let expected = oracle.split_to(length);
                if copy {
                    prop_assert_eq!(pieces.copy_to_bytes(length), expected);
                } else {
                    pieces.advance(length);
                }
            }
        }
    }

    #[test]
    fn what_lies_in_one_piece_is_not_copied() {
        let piece = Bytes::from(vec![7; 4096]);
        let mut pieces = Pieces::default();
        pieces.push(piece.clone());
        pieces.advance(10);
        assert!(piece.as_ptr_range().contains(&pieces.copy_to_bytes(100).as_ptr()));
        pieces.advance(usize::MAX);
        assert_eq!((pieces.remaining(), pieces.pieces.len()), (0, 0), "no more than there is");
    }
}
