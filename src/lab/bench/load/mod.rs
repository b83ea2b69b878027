//! The bench's own load: a server that runs as a process of its own in a pod, and clients that run as threads of the bench inside a pod's
//! namespace. Both count every byte and look at what they get, so that a figure is of traffic that really arrived.
//!
//! A connection carries messages. The first 16 bytes say what the client wants ([`Ask`]); everything behind them is [`PATTERN`].

mod bulk;
mod client;
mod held;
mod one;
mod server;

pub(super) use client::{Job, Load, Watch, run};
pub(super) use held::Held;
pub use one::{Kind as OneKind, run_one};
pub use server::serve;

use std::io;
use std::sync::LazyLock;

use crate::sys::netns::NetNs;

/// Where clients run.
#[derive(Debug, Clone)]
pub(super) struct Seat {
    /// The client pod's namespace.
    pub(super) netns: NetNs,
    /// The only CPU they may use; `None`: all.
    pub(super) cpu: Option<usize>,
}

/// Length of the head of a message.
const HEAD: usize = HEAD_LENGTH as usize;
const HEAD_LENGTH: u32 = 16;
/// Length of a request, with its head, and of its answer.
const REQUEST: usize = REQUEST_LENGTH as usize;
const REQUEST_LENGTH: u32 = 1024;
/// What bulk is read into.
const CHUNK: usize = 256 * 1024;
/// The pattern begins again after this many bytes: a prime, so that nothing which counts in powers of two hides behind it.
const PERIOD: usize = 262_139;

/// Bytes that look random; position `p` of any content is `PATTERN[p % PERIOD]`.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..PERIOD).map(|_| next()).collect()
});

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// A message of `length` bytes (with its head) is answered with `answer` bytes; then the next message.
    Answer { length: u32, answer: u64 },
    /// Everything up to the end is counted; the count, 8 bytes, is the answer.
    Take,
    /// Bytes for so many nanoseconds, then their count, 8 bytes, then the end.
    Give { nanoseconds: u64 },
}

impl Ask {
    fn head(self) -> [u8; HEAD] {
        let (kind, length, number) = match self {
            Self::Answer { length, answer } => (1, length, answer),
            Self::Take => (2, 0, 0),
            Self::Give { nanoseconds } => (3, 0, nanoseconds),
        };
        let mut head = [0; HEAD];
        head[0] = kind;
        head[4..8].copy_from_slice(&length.to_le_bytes());
        head[8..].copy_from_slice(&number.to_le_bytes());
        head
    }

    fn parse(head: [u8; HEAD]) -> io::Result<Self> {
        let [kind, _, _, _, l0, l1, l2, l3, n0, n1, n2, n3, n4, n5, n6, n7] = head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let number = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
        match kind {
            1 if length as usize >= HEAD => Ok(Self::Answer { length, answer: number }),
            2 => Ok(Self::Take),
            3 => Ok(Self::Give { nanoseconds: number }),
            _ => Err(wrong("the head of a message")),
        }
    }
}

/// The pattern from a position on, as far as it goes in one piece.
fn pattern_at(position: u64) -> &'static [u8] {
    // The remainder is below PERIOD.
    let start = usize::try_from(position % PERIOD as u64).unwrap_or(0);
    PATTERN.get(start..).unwrap_or_default()
}

/// Whether `bytes` are the pattern from `position` on.
fn is_pattern(mut position: u64, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let expected = pattern_at(position);
        let length = expected.len().min(bytes.len());
        let (here, rest) = bytes.split_at(length);
        if expected.get(..length) != Some(here) {
            return false;
        }
        position += length as u64;
        bytes = rest;
    }
    true
}

/// A whole request with an answer of the same length.
fn request() -> Vec<u8> {
    let head = Ask::Answer { length: REQUEST_LENGTH, answer: REQUEST_LENGTH.into() }.head();
    let mut request = head.to_vec();
    request.extend_from_slice(pattern_at(0).get(..REQUEST - HEAD).unwrap_or_default());
    request
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} did not arrive as it was sent"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_head_says_what_was_asked() {
        for ask in [Ask::Answer { length: 16, answer: u64::MAX }, Ask::Take, Ask::Give { nanoseconds: 3_000_000_000 }] {
            assert_eq!(Ask::parse(ask.head()).unwrap(), ask);
        }
        assert!(Ask::parse([0; HEAD]).is_err());
        assert!(Ask::parse(Ask::Answer { length: 15, answer: 1 }.head()).is_err());
    }

    #[test]
    fn a_lost_or_moved_byte_is_not_the_pattern() {
        let position = PERIOD as u64 * 7 - 3;
        let bytes: Vec<u8> = (0..10_u64).map(|n| PATTERN[usize::try_from((position + n) % PERIOD as u64).unwrap()]).collect();
        assert!(is_pattern(position, &bytes));
        assert!(!is_pattern(position + 1, &bytes));
        let mut changed = bytes;
        changed[9] ^= 1;
        assert!(!is_pattern(position, &changed));
    }
}
