//! Bytes that the application has not yet taken.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::{Buf, Bytes, BytesMut};

/// Pieces under this size are joined: each piece by itself keeps the buffer alive that it was received in, and costs an entry.
const JOIN_BELOW: usize = 1024;
/// Pieces written by one system call.
const SLICES: usize = 64;

/// A queue of received pieces. It does not bound itself: whoever fills it does, by the credit that it gives.
#[derive(Debug, Default)]
pub struct Backlog {
    pieces: VecDeque<Bytes>,
    /// Small pieces after the last one of `pieces`.
    joined: BytesMut,
    bytes: usize,
}

impl Backlog {
    /// Bytes that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether none wait.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Adds to the end.
    pub fn push(&mut self, piece: Bytes) {
        self.bytes += piece.len();
        if piece.len() < JOIN_BELOW && !self.is_only(&piece) {
            self.joined.extend_from_slice(&piece);
        } else if !piece.is_empty() {
            if !self.joined.is_empty() {
                self.pieces.push_back(self.joined.split().freeze());
            }
            self.pieces.push_back(piece);
        }
    }

    /// Whether this piece, already counted, would be alone: then it will most likely be written at once, without a copy.
    fn is_only(&self, piece: &Bytes) -> bool {
        !piece.is_empty() && self.bytes == piece.len()
    }

    /// Hands the first pieces to `write` and forgets as much as it took.
    ///
    /// # Errors
    /// Those of `write`; nothing is forgotten then.
    pub fn write(&mut self, write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>) -> io::Result<usize> {
        let written = {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let pieces = self.pieces.iter().map(|piece| &**piece);
            // The small ones come after all others.
            let joined = Some(&*self.joined).filter(|joined| !joined.is_empty());
            let mut count = 0;
            for (slot, piece) in slices.iter_mut().zip(pieces.chain(joined)) {
                *slot = IoSlice::new(piece);
                count += 1;
            }
            write(&slices[..count])?
        };
        self.advance(written);
        Ok(written)
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes = self.bytes.saturating_sub(written);
        while written > 0 {
            let Some(first) = self.pieces.front_mut() else {
                self.joined.advance(written.min(self.joined.len()));
                break;
            };
            let part = written.min(first.len());
            first.advance(part);
            written -= part;
            if first.is_empty() {
                self.pieces.pop_front();
            }
        }
        if self.bytes == 0 {
            // An idle connection owns no buffer.
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ten_thousand_single_bytes_are_one_piece() {
        let mut backlog = Backlog::default();
        for _ in 0..10_000 {
            backlog.push(Bytes::from_static(b"x"));
        }
        assert_eq!((backlog.pieces.len(), backlog.len()), (1, 10_000));
        assert!(backlog.joined.capacity() < 20_000);
        backlog.write(|slices| Ok(slices.iter().map(|slice| slice.len()).sum())).unwrap();
        assert!(backlog.is_empty() && backlog.joined.capacity() == 0 && backlog.pieces.capacity() == 0);
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(steps in proptest::collection::vec((0..3000_usize, 0..4000_usize), 0..60)) {
            let (mut backlog, mut went_in, mut came_out) = (Backlog::default(), Vec::new(), Vec::new());
            let mut next = 0_u8;
            for (push, write) in steps {
                let piece: Vec<u8> = (0..push).map(|_| { next = next.wrapping_add(1); next }).collect();
                went_in.extend_from_slice(&piece);
                backlog.push(piece.into());
                let written = backlog.write(|slices| {
                    let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                    assert!(slices.len() <= SLICES);
                    let taken = write.min(all.len());
                    came_out.extend_from_slice(&all[..taken]);
                    Ok(taken)
                });
                written.unwrap();
                prop_assert_eq!(backlog.len(), went_in.len() - came_out.len());
                prop_assert!(went_in.starts_with(&came_out));
            }
            while !backlog.is_empty() {
                backlog.write(|slices| { slices.iter().for_each(|slice| came_out.extend_from_slice(slice)); Ok(slices.iter().map(|slice| slice.len()).sum()) }).unwrap();
            }
            prop_assert_eq!(went_in, came_out);
        }
    }
}
