//! The tunnel's window towards the peer, and the part of it that is kept for streams that send little.
//!
//! The window belongs to all streams, and stalled ones can hold on to it: Envoy withholds what an application has not read from the tunnel's window as
//! from the stream's (16 MiB a stream, 24 MiB a tunnel unless told otherwise), and so does h2 and with it ztunnel (4 of 16 MiB). Two stalled uploads to
//! an Envoy would take all there is, and a neighbour's request wait for as long as they are stalled. (A peer of this house does not withhold it.)
//!
//! Hence the last sixteenth of the largest window seen, 256 KiB at most, is for streams whose last turn fitted into a record. Each may owe half of it, so that
//! one that trickles without being read leaves the others something; what the peer gives back counts for those who sent last, which it has most
//! likely read. How long that lasts is up to the peer. h2 gives back what is read as soon as it is half of what is left, so that requests go on for
//! ever. Envoy 1.40 gives nothing back before it is half of the whole window (measured): the reserve is all that streams get. So when nothing
//! came back for [`STARVED`], the pool opens no more streams on the tunnel: new connections take another, and are out of it altogether.
//!
//! What it costs: a lone stream has a sixteenth less in flight, of the windows of Envoy and ztunnel 1 and 1.6 %. A peer that gives credit only when none at
//! all is left would wait for ever. None of those that were looked at (nghttp2, oghttp2, h2, Go's, Netty's, okhttp's, 2026) waits for more than half.
//! Turns, frames and system calls are the same.

use std::time::Duration;

use super::{MAX_WINDOW, frame, transmit};

/// Without credit beside the reserve for so long, a tunnel gets no new streams. Bulk that keeps its window full gets some each round trip.
pub(in crate::hbone) const STARVED: Duration = Duration::from_secs(1);
/// A turn of a stream that sends little is no more than this, octets: the payload of a record.
const LITTLE: i64 = transmit::SLOT_PAYLOAD as i64;
/// The reserve is this part of the window.
const PART: i64 = 16;
/// And no more than this, octets.
const LARGEST: i64 = 256 << 10;
/// What one stream may owe is this part of the reserve; h2 gives a third back if nobody else owes.
const SHARE: i64 = 2;

/// What the peer lets us send, on all streams together.
#[derive(Debug, Clone)]
pub(super) struct Credit {
    /// Octets; never above 2^31 - 1 while the tunnel lives.
    window: i64,
    /// The most that this has been.
    widest: i64,
    /// Streams, by slot, and the octets of the reserve that each owes; who took last is last. While the reserve is whole, empty.
    owed: Vec<(u32, i64)>,
}

impl Default for Credit {
    fn default() -> Self {
        Self::resumed(i64::from(frame::DEFAULT_WINDOW), 0)
    }
}

impl Credit {
    /// That of a tunnel which was taken up; who owes what was left behind.
    pub(super) fn resumed(window: i64, widest: i64) -> Self {
        Self { window, widest: widest.max(window), owed: Vec::new() }
    }

    /// Octets that are left.
    pub(super) fn left(&self) -> i64 {
        self.window
    }

    /// The most that were ever left.
    pub(super) fn widest(&self) -> i64 {
        self.widest
    }

    fn reserve(&self) -> i64 {
        (self.widest / PART).min(LARGEST)
    }

    /// What is left beside the reserve.
    fn open(&self) -> i64 {
        (self.window - self.reserve()).max(0)
    }

    /// Whether nothing is left beside the reserve.
    pub(super) fn is_short(&self) -> bool {
        self.open() == 0
    }

    fn owes(&self, slot: u32) -> i64 {
        self.owed.iter().find(|(owing, _)| *owing == slot).map_or(0, |(_, octets)| *octets)
    }

    /// Octets that a stream may send now.
    pub(super) fn available(&self, slot: u32, sparse: bool) -> usize {
        let open = self.open();
        let reserved = if sparse { (self.reserve() / SHARE - self.owes(slot)).min(self.window - open).max(0) } else { 0 };
        // A turn that is more than a little shall not be rounded up out of the reserve.
        usize::try_from(open.max((open + reserved).min(LITTLE))).unwrap_or(0)
    }

    /// A stream's turn: it sent so many octets, at most what was [available](Self::available) to it. Says whether it is sparse now.
    pub(super) fn spend(&mut self, slot: u32, sparse: bool, octets: usize) -> bool {
        // What the tunnel's window cut short may not have been all: it is no sparse stream for that.
        let whole = octets < self.available(slot, sparse);
        let octets = i64::try_from(octets).unwrap_or(MAX_WINDOW);
        let of_reserve = octets - self.open();
        if of_reserve > 0 {
            let owes = self.owes(slot) + of_reserve;
            self.forget(slot);
            self.owed.push((slot, owes));
        }
        self.window -= octets;
        (whole || sparse) && octets <= LITTLE
    }

    /// The peer gives more. Whether it may: no window exceeds 2^31 - 1 (RFC 9113 §6.9.1).
    pub(super) fn give(&mut self, increment: u32) -> bool {
        let mut rest = i64::from(increment);
        self.window += rest;
        self.widest = self.widest.max(self.window);
        if self.open() > 0 {
            self.owed = Vec::new();
        }
        while let Some((_, octets)) = self.owed.last_mut().filter(|_| rest > 0) {
            let back = rest.min(*octets);
            (*octets, rest) = (*octets - back, rest - back);
            if *octets == 0 {
                self.owed.pop();
            }
        }
        self.window <= MAX_WINDOW
    }

    /// The stream is no more; its slot may be another's.
    pub(super) fn forget(&mut self, slot: u32) {
        self.owed.retain(|(owing, _)| *owing != slot);
    }
}

#[cfg(test)]
mod tests;
