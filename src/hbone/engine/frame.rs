//! HTTP/2 frames (RFC 9113 §4, §6): writing them, and walking through them in whatever pieces they arrive.

use std::ops::Range;

/// Octets of a frame header.
pub(super) const HEADER: usize = 9;
/// What a client sends first (RFC 9113 §3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The window that every stream and connection starts with (RFC 9113 §6.9.2).
pub(super) const DEFAULT_WINDOW: u32 = 65_535;
/// The largest window (RFC 9113 §6.9.1).
pub(super) const MAX_WINDOW: i64 = 0x7fff_ffff;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

pub(super) const ACK: u8 = 0x1;
pub(super) const END_STREAM: u8 = 0x1;
pub(super) const END_HEADERS: u8 = 0x4;
pub(super) const PADDED: u8 = 0x8;
pub(super) const WITH_PRIORITY: u8 = 0x20;

pub(super) const SETTINGS_ENABLE_PUSH: u16 = 2;
pub(super) const SETTINGS_MAX_CONCURRENT_STREAMS: u16 = 3;
pub(super) const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 4;
pub(super) const SETTINGS_MAX_FRAME_SIZE: u16 = 5;
pub(super) const SETTINGS_MAX_HEADER_LIST_SIZE: u16 = 6;

/// Error codes (RFC 9113 §7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hbone) struct Reason(pub(super) u32);

impl Reason {
    pub(super) const NO_ERROR: Self = Self(0);
    pub(super) const PROTOCOL_ERROR: Self = Self(1);
    pub(super) const FLOW_CONTROL_ERROR: Self = Self(3);
    pub(super) const STREAM_CLOSED: Self = Self(5);
    pub(super) const FRAME_SIZE_ERROR: Self = Self(6);
    pub(super) const REFUSED_STREAM: Self = Self(7);
    pub(in crate::hbone) const CANCEL: Self = Self(8);
    pub(super) const COMPRESSION_ERROR: Self = Self(9);
    pub(super) const CONNECT_ERROR: Self = Self(10);
    pub(super) const ENHANCE_YOUR_CALM: Self = Self(11);

    fn name(self) -> Option<&'static str> {
        const NAMES: [&str; 14] = [
            "NO_ERROR",
            "PROTOCOL_ERROR",
            "INTERNAL_ERROR",
            "FLOW_CONTROL_ERROR",
            "SETTINGS_TIMEOUT",
            "STREAM_CLOSED",
            "FRAME_SIZE_ERROR",
            "REFUSED_STREAM",
            "CANCEL",
            "COMPRESSION_ERROR",
            "CONNECT_ERROR",
            "ENHANCE_YOUR_CALM",
            "INADEQUATE_SECURITY",
            "HTTP_1_1_REQUIRED",
        ];
        usize::try_from(self.0).ok().and_then(|code| NAMES.get(code)).copied()
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name() {
            Some(name) => formatter.write_str(name),
            None => write!(formatter, "error code {}", self.0),
        }
    }
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Octets of payload.
    pub length: usize,
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// The stream that it belongs to; 0 for the connection.
    pub stream: u32,
}

impl Head {
    pub(super) fn new(kind: u8, flags: u8, stream: u32, length: usize) -> Self {
        Self { length, kind, flags, stream }
    }

    pub(super) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// As it goes on the wire. A length of 2^24 or more cannot be written and is cut; nobody asks for one.
    pub(super) fn encode(self) -> [u8; HEADER] {
        let length = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let stream = self.stream.to_be_bytes();
        [length[1], length[2], length[3], self.kind, self.flags, stream[0], stream[1], stream[2], stream[3]]
    }

    fn decode(bytes: [u8; HEADER]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = bytes;
        Self {
            length: (usize::from(l0) << 16) | (usize::from(l1) << 8) | usize::from(l2),
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff,
        }
    }
}

/// Appends a whole frame.
pub(super) fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&Head::new(kind, flags, stream, payload.len()).encode());
    out.extend_from_slice(payload);
}

/// Gives back what an empty buffer needed once and will hardly need again.
pub(super) fn thin(buffer: &mut Vec<u8>) {
    const KEPT: usize = 4 << 10;
    if buffer.is_empty() && buffer.capacity() > KEPT {
        *buffer = Vec::new();
    }
}

/// One step through a stream of frames.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// A frame begins.
    Head(Head),
    /// A part of the payload of the frame that began last; `left` octets of it are still to come.
    Payload {
        /// Where it is in the buffer.
        range: Range<usize>,
        /// Octets of the payload behind it.
        left: usize,
    },
    /// All that was there is walked through.
    Empty,
}

/// Walks through frames. What it keeps between calls is all there is to know about a frame that has only partly arrived.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Walker {
    pub(super) scratch: Vec<u8>,
    pub(super) left: usize,
}

impl Walker {
    /// Looks at `buffer[*at..end]` and moves `at` on. A frame without payload yields its head and nothing more.
    pub fn step(&mut self, buffer: &[u8], at: &mut usize, end: usize) -> Step {
        if self.left > 0 {
            let take = self.left.min(end.saturating_sub(*at));
            if take == 0 {
                return Step::Empty;
            }
            let range = *at..*at + take;
            *at += take;
            self.left -= take;
            return Step::Payload { range, left: self.left };
        }
        let input = buffer.get(*at..end).unwrap_or_default();
        let head = if self.scratch.is_empty()
            && let Some(whole) = input.first_chunk::<HEADER>()
        {
            *at += HEADER;
            Head::decode(*whole)
        } else {
            let missing = HEADER - self.scratch.len();
            let take = missing.min(input.len());
            self.scratch.extend_from_slice(&input[..take]);
            *at += take;
            let Some(whole) = self.scratch.first_chunk::<HEADER>().copied() else { return Step::Empty };
            self.scratch.clear();
            Head::decode(whole)
        };
        self.left = head.length;
        Step::Head(head)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn frames_come_out_alike_however_they_are_cut() {
        let mut wire = Vec::new();
        put(&mut wire, DATA, END_STREAM, 5, b"hello");
        put(&mut wire, SETTINGS, ACK, 0, b"");
        put(&mut wire, DATA, 0, 7, &[9; 300]);
        let walk = |cut: usize| {
            let mut walker = Walker::default();
            let (mut heads, mut bytes) = (Vec::new(), Vec::new());
            for chunk in wire.chunks(cut) {
                let mut at = 0;
                loop {
                    match walker.step(chunk, &mut at, chunk.len()) {
                        Step::Head(head) => heads.push(head),
                        Step::Payload { range, .. } => bytes.extend_from_slice(&chunk[range]),
                        Step::Empty => break,
                    }
                }
            }
            (heads, bytes)
        };
        let whole = walk(wire.len());
        assert_eq!(whole.0.len(), 3);
        assert_eq!(whole.0[2], Head::new(DATA, 0, 7, 300));
        for cut in 1..40 {
            assert_eq!(walk(cut), whole, "cut {cut}");
        }
    }
}
