//! The sealing side: applications are read straight into the slots of the records to come, `[5 TLS][9 DATA][payload][1 type][16 tag]`, sealed
//! where they lie, and everything goes out with one write.

use std::io::{self, IoSliceMut};
use std::task::{Context, Poll};

use super::super::Error;
use super::frame::{self, Head, Reason};
use super::stream::Phase;
use super::tunnel::{Life, Tunnel};
use crate::forward::Ended;
use crate::forward::record::{self, Content, MAX_PLAINTEXT, Sealer};
use crate::forward::slab::Slab;
use crate::sys::stream_io;

/// Payload of a full slot: a record holds the head of a DATA frame and this.
pub(super) const SLOT_PAYLOAD: usize = MAX_PLAINTEXT - frame::HEADER;
/// Octets of a full slot.
const SLOT: usize = record::HEADER + MAX_PLAINTEXT + record::TRAILER;
/// Where the payload begins in a slot.
const PAYLOAD_AT: usize = record::HEADER + frame::HEADER;
/// Octets of a slab that are kept for small records that cannot wait until it is written: answers to KeyUpdates, an alert.
const RESERVED: usize = 1024;
/// Slots of one read.
const MAX_SLOTS: usize = 16;
/// Slabs that are filled before the other direction gets its turn.
const FILLS: usize = 2;
/// Octets that a stream may send before the next one's turn, when several have something (deficit round robin with equal shares): a slab, since
/// quarters of one cost bulk a third more CPU at 16 streams. Streams that send little do not wait for such turns, they go first.
const QUANTUM: usize = MAX_SLOTS * SLOT_PAYLOAD;

impl Tunnel {
    /// Seals and writes what there is; whether something moved.
    pub(super) fn transmit(&mut self, context: &mut Context<'_>) -> bool {
        let mut moved = false;
        let mut fills = 0;
        loop {
            if self.output.range.is_empty() {
                self.output.range = 0..0;
                if fills == FILLS {
                    // The other direction gets its turn.
                    return true;
                }
                fills += 1;
                self.fill();
                if self.output.range.is_empty() {
                    // An idle connection owns no buffer.
                    self.output.slab = None;
                    return moved;
                }
            }
            if self.socket.poll_write_ready(context).is_pending() {
                return moved;
            }
            let sealed = self.output.slab.as_ref().and_then(|slab| slab.get(self.output.range.clone())).unwrap_or_default();
            match stream_io::write(&self.socket, sealed) {
                Ok(count) => {
                    self.output.range.start += count;
                    moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.output.range = 0..0;
                    self.close(Reason::NO_ERROR, Some(Error::Tunnel(format!("connection lost: {error}"))));
                    // Nothing more can be written.
                    self.control.clear();
                    return true;
                }
            }
        }
    }

    /// Fills the empty slab: control frames first, then a share of each stream that has something.
    fn fill(&mut self) {
        let closing = matches!(self.life, Life::Closing(_));
        if self.control.is_empty() && (self.senders.is_empty() || self.credit.left() <= 0) {
            return;
        }
        let mut slab = self.output.slab.take().unwrap_or_else(Slab::take);
        if self.sealer.wants_update() {
            self.output.slab = Some(slab);
            self.output.range = 0..0;
            self.update_key();
            slab = self.output.slab.take().unwrap_or_else(Slab::take);
        }
        let mut end = self.output.range.end;
        end = self.seal_control(&mut slab, end);
        if !closing {
            end = self.seal_streams(&mut slab, end);
            // What the streams' turns brought besides DATA, such as an END_STREAM: it goes with them, since nothing would wake the task for it.
            end = self.seal_control(&mut slab, end);
        } else if self.control.is_empty() {
            end = self.seal_close_notify(&mut slab, end);
        }
        self.output.range.end = end;
        self.output.slab = Some(slab);
    }

    fn seal_control(&mut self, slab: &mut Slab, mut end: usize) -> usize {
        let mut taken = 0;
        while let Some(rest) = self.control.get(taken..).filter(|rest| !rest.is_empty()) {
            let size = rest.len().min(MAX_PLAINTEXT);
            let most = slab.len() - RESERVED;
            let Some(slot) = slab.get_mut(..most).and_then(|slab| slab.get_mut(end..end + Sealer::sealed_length(size))) else { break };
            if let (Some(room), Some(bytes)) = (slot.get_mut(record::HEADER..record::HEADER + size), rest.get(..size)) {
                room.copy_from_slice(bytes);
            }
            if self.sealer.seal(slot, Content::ApplicationData).is_err() {
                break;
            }
            end += Sealer::sealed_length(size);
            taken += size;
        }
        self.control.drain(..taken);
        frame::thin(&mut self.control);
        end
    }

    /// The last record of a connection (RFC 8446 §6.1).
    fn seal_close_notify(&mut self, slab: &mut Slab, end: usize) -> usize {
        let Some(slot) = slab.get_mut(end..end + Sealer::sealed_length(2)) else { return end };
        if let Some(room) = slot.get_mut(record::HEADER..record::HEADER + 2) {
            room.copy_from_slice(&[1, 0]);
        }
        match self.sealer.seal(slot, Content::Alert) {
            Ok(()) => end + Sealer::sealed_length(2),
            Err(_) => end,
        }
    }

    /// Puts a stream into the queue of those that may have something to send.
    pub(super) fn enqueue(&mut self, slot: u32) {
        if let Some(stream) = self.streams.at(slot)
            && !stream.queued
            && !stream.sent_end
            && stream.send_window > 0
            && stream.application().is_some()
        {
            stream.queued = true;
            self.queue(slot);
        }
    }

    /// Who sends little goes first, and so never waits for a bulk stream's turn; who sends much loses that at once.
    fn queue(&mut self, slot: u32) {
        if self.streams.at(slot).is_some_and(|stream| stream.sparse) { self.senders.push_front(slot) } else { self.senders.push_back(slot) }
    }

    /// Takes a stream that is no more out of the queue. It would otherwise stay there while the peer gives no credit, and many could follow it.
    pub(super) fn unqueue(&mut self, slot: u32) {
        self.senders.retain(|queued| *queued != slot);
        self.held.retain(|queued| *queued != slot);
    }

    /// Tells the pool when nothing but the reserve is left, and when there is more again.
    pub(super) fn note_shortage(&mut self) {
        if self.credit.is_short() != self.short {
            self.short = self.credit.is_short();
            self.inbox.set_short(self.short);
        }
    }

    /// The peer gave credit for the whole tunnel: streams that had to leave it to others have their turns again.
    pub(super) fn release_held(&mut self) {
        let mut held = std::mem::take(&mut self.held);
        held.drain(..).for_each(|slot| self.queue(slot));
        self.held = held;
    }

    fn seal_streams(&mut self, slab: &mut Slab, mut end: usize) -> usize {
        // Each stream gets one turn per slab; a lone one gets all of it.
        let mut turns = self.senders.len();
        let share = if turns == 1 { usize::MAX } else { QUANTUM };
        while turns > 0 && self.credit.left() > 0 && slab.len() - RESERVED >= end + SLOT {
            turns -= 1;
            let Some(slot) = self.senders.pop_front() else { break };
            match self.seal_stream(slab, end, slot, share) {
                Turn::More(new_end) => {
                    end = new_end;
                    self.senders.push_back(slot);
                }
                Turn::Held => self.held.push_back(slot),
                Turn::Nothing(new_end) => {
                    end = new_end;
                    if let Some(stream) = self.streams.at(slot) {
                        stream.queued = false;
                    }
                }
            }
        }
        end
    }

    /// Reads one stream's application into slots from `end` on, and seals what came.
    fn seal_stream(&mut self, slab: &mut Slab, end: usize, slot: u32, share: usize) -> Turn {
        let Some(stream) = self.streams.at(slot) else { return Turn::Nothing(end) };
        let window = usize::try_from(stream.send_window).unwrap_or(0);
        if window == 0 || stream.sent_end {
            return Turn::Nothing(end);
        }
        let id = stream.id;
        let Phase::Relaying(application) = &stream.phase else { return Turn::Nothing(end) };
        let credit = self.credit.available(slot, stream.sparse);
        let allowed = share.min(window).min(credit);
        let read = loop {
            let outcome = match allowed {
                // An end needs no credit.
                0 => match application.has_more() {
                    Poll::Ready(Ok(true)) => return Turn::Held,
                    Poll::Ready(outcome) => outcome.map(|_| 0),
                    Poll::Pending => return Turn::Nothing(end),
                },
                _ => read_into_slots(&application.socket, slab, end, allowed),
            };
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !application.is_readable() {
                        return Turn::Nothing(end);
                    }
                }
                other => break other,
            }
        };
        match read {
            Ok(0) => {
                frame::put(&mut self.control, frame::DATA, frame::END_STREAM, id, &[]);
                if let Some(stream) = self.streams.at(slot) {
                    stream.end_sent();
                }
                self.settle(slot);
                self.check_gone(slot);
                Turn::Nothing(end)
            }
            Ok(count) => {
                application.count_to_peer(count);
                let more = application.is_readable();
                self.temper.moved(count);
                let moved = i64::try_from(count).unwrap_or(0);
                if let Some(stream) = self.streams.at(slot) {
                    stream.sparse = self.credit.spend(slot, stream.sparse, count);
                    stream.send_window -= moved;
                }
                self.note_shortage();
                let new_end = self.seal_slots(slab, end, id, count);
                if more { Turn::More(new_end) } else { Turn::Nothing(new_end) }
            }
            Err(error) => {
                self.abandon(slot, Ended::from_error(error), Some(Reason::CANCEL));
                Turn::Nothing(end)
            }
        }
    }

    /// Heads, types and tags for so many octets that lie in slots from `end` on.
    fn seal_slots(&mut self, slab: &mut Slab, mut end: usize, id: u32, mut count: usize) -> usize {
        while count > 0 {
            let size = count.min(SLOT_PAYLOAD);
            let length = Sealer::sealed_length(frame::HEADER + size);
            let Some(slot) = slab.get_mut(end..end + length) else { break };
            if let Some(room) = slot.get_mut(record::HEADER..PAYLOAD_AT) {
                room.copy_from_slice(&Head::new(frame::DATA, 0, id, size).encode());
            }
            if let Err(error) = self.sealer.seal(slot, Content::ApplicationData) {
                self.close(Reason::NO_ERROR, Some(Error::Tunnel(error.to_string())));
                break;
            }
            end += length;
            count -= size;
        }
        end
    }

    /// Puts a record that was sealed by itself behind the others.
    pub(super) fn append_sealed(&mut self, record: &[u8]) {
        let mut slab = self.output.slab.take().unwrap_or_else(Slab::take);
        if self.output.range.is_empty() {
            self.output.range = 0..0;
        }
        let end = self.output.range.end;
        if let Some(room) = slab.get_mut(end..end + record.len()) {
            room.copy_from_slice(record);
            self.output.range.end += record.len();
        } else {
            // No room for it: the peer would miss a record number. Only a peer that reads nothing and asks for ever more gets here.
            self.close(Reason::ENHANCE_YOUR_CALM, Some(Error::Flood("more is asked than answers are read")));
        }
        self.output.slab = Some(slab);
    }
}

/// What a stream's turn brought.
enum Turn {
    /// It has more, and is to wait for its next turn.
    More(usize),
    /// What is left of the tunnel's window is not for it.
    Held,
    /// It has nothing now, and will say when it has.
    Nothing(usize),
}

/// One vectored read into the payload parts of the slots from `end` on, at most `allowed` octets.
fn read_into_slots(socket: &tokio::net::TcpStream, slab: &mut Slab, end: usize, allowed: usize) -> io::Result<usize> {
    let mut pieces: [IoSliceMut<'_>; MAX_SLOTS] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
    let mut used = 0;
    let mut left = allowed;
    let most = slab.len() - RESERVED;
    let Some(room) = slab.get_mut(end..most) else { return Err(io::ErrorKind::WouldBlock.into()) };
    for (piece, slot) in pieces.iter_mut().zip(room.chunks_exact_mut(SLOT)) {
        if left == 0 {
            break;
        }
        let size = left.min(SLOT_PAYLOAD);
        if let Some(payload) = slot.get_mut(PAYLOAD_AT..PAYLOAD_AT + size) {
            *piece = IoSliceMut::new(payload);
            used += 1;
            left -= size;
        }
    }
    stream_io::read_vectored(socket, pieces.get_mut(..used).unwrap_or_default())
}

#[cfg(test)]
mod tests;
