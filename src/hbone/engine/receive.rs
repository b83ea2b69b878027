//! The opening side: one read, records opened in place, frames walked, payload handed on in one vectored write per stream, at once and without
//! waiting for whole frames.

use std::ops::Range;
use std::task::Context;

use super::super::Error;
use super::MAX_WINDOW;
use super::frame::{self, Head, Reason, Step};
use super::stream::Phase;
use super::tunnel::{Life, Side, Tunnel};
use crate::forward::Ended;
use crate::forward::record::{self, Content, Opened, RecordError};
use crate::forward::slab::Slab;
use crate::sys::stream_io::{self, Next};

/// With more than this many octets of answers unsent, the peer is not read: it does not take what it asks for.
const CONTROL_LIMIT: usize = 64 << 10;
/// Post-handshake messages that may be buffered until they are whole.
const POST_HANDSHAKE_LIMIT: usize = 16 << 10;
/// Pieces of payload that are collected for one application before it gets them: what a peer sends octet by octet shall not cost a multiple of it.
const MOST_SPANS: usize = 256;
/// Octets of a full record on the wire.
const FULL_RECORD: usize = record::HEADER + record::MAX_PLAINTEXT + record::TRAILER;

impl Tunnel {
    /// Reads and handles what the tunnel has; whether there was something.
    pub(super) fn receive(&mut self, context: &mut Context<'_>) -> bool {
        if matches!(self.life, Life::Closing(_)) || self.input.ended || self.control.len() > CONTROL_LIMIT {
            return false;
        }
        // Early records may wait from the handshake.
        let mut read = std::mem::take(&mut self.input.early);
        loop {
            if self.socket.poll_read_ready(context).is_pending() {
                break;
            }
            let mut slab = self.input.slab.take().unwrap_or_else(Slab::take);
            make_room(&mut slab, &mut self.input.range);
            let limit = self.input.range.end + whole_records(&slab, &self.input.range);
            let outcome = stream_io::read(&self.socket, slab.get_mut(self.input.range.end..limit).unwrap_or_default());
            self.input.slab = Some(slab);
            match outcome {
                Ok(0) => {
                    self.ended();
                    return true;
                }
                Ok(count) => {
                    self.input.range.end += count;
                    self.heard = tokio::time::Instant::now();
                    read = true;
                    break;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.input.ended = true;
                    self.close(Reason::NO_ERROR, Some(Error::Tunnel(format!("connection lost: {error}"))));
                    return true;
                }
            }
        }
        if !read {
            if self.input.range.is_empty() {
                self.input.slab = None;
            }
            return false;
        }
        self.open_records();
        true
    }

    /// The peer closed the connection.
    fn ended(&mut self) {
        self.input.ended = true;
        let failure = (self.streams.len() > 0).then(|| Error::Tunnel("the peer closed the connection".into()));
        self.close(Reason::NO_ERROR, failure);
    }

    fn open_records(&mut self) {
        let Some(mut slab) = self.input.slab.take() else { return };
        let mut at = self.input.range.start;
        let end = self.input.range.end;
        loop {
            let outcome = match slab.get_mut(..end).map(|filled| self.opener.open(filled, at)) {
                Some(Ok(Some(opened))) => {
                    at = opened.end;
                    self.take_record(&mut slab, opened)
                }
                Some(Ok(None)) | None => break,
                Some(Err(error)) => Err(Broken::Record(error)),
            };
            if let Err(broken) = outcome {
                self.flush_spans(&slab);
                self.broken(broken);
                break;
            }
            if matches!(self.life, Life::Closing(_)) {
                break;
            }
        }
        self.flush_spans(&slab);
        self.input.range = at..end;
        // An idle connection owns no buffer.
        self.input.slab = if self.input.range.is_empty() { None } else { Some(slab) };
        if self.input.slab.is_none() {
            self.input.range = 0..0;
        }
    }

    fn broken(&mut self, broken: Broken) {
        match broken {
            Broken::Record(error) => {
                self.alert(error.alert());
                self.close(Reason::NO_ERROR, Some(Error::Tunnel(error.to_string())));
            }
            Broken::Protocol(Reason::ENHANCE_YOUR_CALM) => {
                self.close(Reason::ENHANCE_YOUR_CALM, Some(Error::Flood(self.temper.flood())));
            }
            Broken::Protocol(reason) => self.close(reason, Some(Error::Tunnel(format!("the peer broke the protocol: {reason}")))),
            Broken::Alert(description) => {
                let description = rustls::AlertDescription::from(description);
                self.close(Reason::NO_ERROR, Some(Error::Tunnel(format!("the peer ended the connection with alert {description:?}"))));
            }
            Broken::Closed => self.ended(),
        }
    }

    fn take_record(&mut self, slab: &mut Slab, opened: Opened) -> Result<(), Broken> {
        // Nothing comes between the pieces of a handshake message, and only application data may be empty (RFC 8446 §5.1, §5.4).
        let interleaved = !self.post_handshake.is_empty() && opened.content != Content::Handshake;
        if interleaved || (opened.plaintext.is_empty() && opened.content != Content::ApplicationData) {
            return Err(Broken::Record(RecordError::Unexpected));
        }
        match opened.content {
            Content::ApplicationData if opened.plaintext.is_empty() => self.temper.idle_frame().map_err(Broken::Protocol),
            Content::ApplicationData => self.walk(slab, opened.plaintext).map_err(Broken::Protocol),
            Content::Alert => match slab.get(opened.plaintext) {
                // close_notify, user_canceled (RFC 8446 §6.1)
                Some([_, 0 | 90]) => Err(Broken::Closed),
                Some([_, description]) => Err(Broken::Alert(*description)),
                _ => Err(Broken::Record(RecordError::Malformed)),
            },
            Content::Handshake => {
                let message = slab.get(opened.plaintext).unwrap_or_default().to_vec();
                self.take_post_handshake(&message)
            }
        }
    }

    /// KeyUpdate and NewSessionTicket (RFC 8446 §4.6).
    fn take_post_handshake(&mut self, message: &[u8]) -> Result<(), Broken> {
        const NEW_SESSION_TICKET: u8 = 4;
        const KEY_UPDATE: u8 = 24;
        self.temper.idle_frame().map_err(Broken::Protocol)?;
        self.post_handshake.extend_from_slice(message);
        while let Some([kind, high, middle, low]) = self.post_handshake.first_chunk::<4>().copied() {
            let length = (usize::from(high) << 16) | (usize::from(middle) << 8) | usize::from(low);
            if length > POST_HANDSHAKE_LIMIT {
                return Err(Broken::Record(RecordError::Unexpected));
            }
            if self.post_handshake.len() < 4 + length {
                return Ok(());
            }
            let body: Vec<u8> = self.post_handshake.drain(..4 + length).skip(4).collect();
            match (kind, body.as_slice()) {
                // We never resume a session. Only servers give tickets.
                (NEW_SESSION_TICKET, _) if self.side == Side::Client => {}
                // Keys may change only between records (RFC 8446 §5.1).
                (KEY_UPDATE, [asked @ (0 | 1)]) if self.post_handshake.is_empty() => {
                    self.opener.update().map_err(Broken::Record)?;
                    if *asked == 1 {
                        self.update_key();
                    }
                }
                (KEY_UPDATE, [_]) if self.post_handshake.is_empty() => return Err(Broken::Record(RecordError::Illegal)),
                (KEY_UPDATE, body) if body.len() != 1 => return Err(Broken::Record(RecordError::Malformed)),
                _ => return Err(Broken::Record(RecordError::Unexpected)),
            }
        }
        frame::thin(&mut self.post_handshake);
        Ok(())
    }

    /// Walks through plaintext.
    pub(super) fn walk(&mut self, buffer: &[u8], range: Range<usize>) -> Result<(), Reason> {
        let mut at = range.start;
        if self.preface_left > 0 {
            let from = frame::PREFACE.len() - self.preface_left;
            let expected = frame::PREFACE.get(from..).unwrap_or_default();
            let have = buffer.get(at..range.end).unwrap_or_default();
            let count = expected.len().min(have.len());
            if expected.get(..count) != have.get(..count) {
                return Err(Reason::PROTOCOL_ERROR);
            }
            self.preface_left -= count;
            at += count;
        }
        loop {
            match self.walker.step(buffer, &mut at, range.end) {
                Step::Head(head) => self.begin(buffer, head)?,
                Step::Payload { range, left } => self.payload(buffer, range, left)?,
                Step::Empty => return Ok(()),
            }
        }
    }

    /// A part of the payload of a DATA frame; padding is already gone.
    pub(super) fn data(&mut self, buffer: &[u8], id: u32, range: Range<usize>) {
        self.temper.moved(range.len());
        // Of a stream that we reset, nobody wants it.
        let Some(slot) = self.streams.slot_of(id) else { return };
        if self.streams.at(slot).is_some_and(|stream| matches!(stream.phase, Phase::Asking(_))) {
            // Bytes before the answer (RFC 9113 §8.1).
            return self.abandon(slot, Ended::Failed(std::io::Error::other("bytes before the answer")), Some(Reason::PROTOCOL_ERROR));
        }
        if self.span_slot != slot || self.spans.len() == MOST_SPANS {
            self.flush_spans(buffer);
        }
        self.span_slot = slot;
        self.spans.push(range);
    }

    /// Hands the collected spans to their application.
    pub(super) fn flush_spans(&mut self, buffer: &[u8]) {
        self.flush(buffer, Next::Unknown);
    }

    /// The same when it is known what follows.
    pub(super) fn flush(&mut self, buffer: &[u8], next: Next) {
        if self.spans.is_empty() {
            return;
        }
        let spans = std::mem::take(&mut self.spans);
        let slot = self.span_slot;
        if let Some(stream) = self.streams.at(slot) {
            let before = stream.backlog.len();
            let outcome = stream.deliver(buffer, &spans, next);
            self.backlog = self.backlog + stream.backlog.len() - before;
            self.took(slot, outcome);
        }
        self.spans = spans;
        self.spans.clear();
    }

    /// The application took so many octets of a stream: the peer may send as many more. While it keeps up, its window grows.
    pub(super) fn credit(&mut self, slot: u32, taken: usize) {
        if taken == 0 {
            return;
        }
        let taken = u32::try_from(taken).unwrap_or(u32::MAX);
        self.credit_connection();
        let largest = self.windows.stream().max(self.stream_window);
        let Some(stream) = self.streams.at(slot) else { return };
        stream.owed += taken;
        if stream.received_end || stream.owed < stream.target_window / 2 {
            return;
        }
        let mut increment = stream.owed;
        if stream.backlog.is_empty() && stream.target_window < largest {
            let more = stream.target_window.min(largest - stream.target_window);
            stream.target_window += more;
            increment += more;
        }
        stream.owed = 0;
        stream.receive_window = stream.receive_window.saturating_add_unsigned(increment);
        stream.granted.note(increment);
        let id = stream.id;
        frame::put(&mut self.control, frame::WINDOW_UPDATE, 0, id, &increment.to_be_bytes());
    }

    /// What the peer may send and what waits for applications is together the tunnel's window. A stream that nobody reads holds a quarter of it
    /// at most, so that it does not stop its neighbours.
    pub(super) fn credit_connection(&mut self) {
        let window = i64::from(self.windows.tunnel());
        let increment = window - i64::try_from(self.backlog).unwrap_or(MAX_WINDOW) - self.receive_window;
        if increment >= window / 4
            && let Ok(increment) = u32::try_from(increment)
        {
            self.receive_window += i64::from(increment);
            self.granted.note(increment);
            frame::put(&mut self.control, frame::WINDOW_UPDATE, 0, 0, &increment.to_be_bytes());
        }
    }

    /// Flow control of an arriving DATA frame, padding included (RFC 9113 §6.9).
    pub(super) fn account(&mut self, head: Head) -> Result<(), Reason> {
        let length = i64::try_from(head.length).unwrap_or(MAX_WINDOW);
        self.receive_window -= length;
        if self.receive_window < 0 {
            return Err(Reason::FLOW_CONTROL_ERROR);
        }
        self.data += head.length as u64;
        self.windows.observe(self.data);
        if let Some(stream) = self.streams.slot_of(head.stream).and_then(|slot| self.streams.at(slot)) {
            stream.receive_window = stream.receive_window.saturating_sub_unsigned(u32::try_from(head.length).unwrap_or(u32::MAX));
            if stream.receive_window < 0 {
                self.temper.local_reset()?;
                let slot = self.streams.slot_of(head.stream).unwrap_or_default();
                let error = std::io::Error::other("the peer sent more than its window");
                self.abandon(slot, Ended::Failed(error), Some(Reason::FLOW_CONTROL_ERROR));
            }
        }
        Ok(())
    }

    /// END_STREAM of the peer.
    pub(super) fn end_of(&mut self, id: u32) {
        if let Some(slot) = self.streams.slot_of(id) {
            if let Some(stream) = self.streams.at(slot) {
                stream.received_end = true;
                if matches!(stream.phase, Phase::Asking(_)) {
                    return;
                }
            }
            self.settle(slot);
        }
    }
}

/// Why reading stopped.
enum Broken {
    Record(RecordError),
    Protocol(Reason),
    /// An alert of the peer.
    Alert(u8),
    Closed,
}

/// How much to read behind `filled`, so that in bulk, where all records are full, a read ends where a record does: nothing is left to move to the
/// front before the next.
fn whole_records(slab: &Slab, filled: &Range<usize>) -> usize {
    let room = slab.len() - filled.end;
    let partial = slab.get(filled.clone()).unwrap_or_default();
    let expected = match partial.get(3..record::HEADER) {
        Some(&[high, low]) => record::HEADER + usize::from(u16::from_be_bytes([high, low])),
        _ => FULL_RECORD,
    };
    match expected.checked_sub(partial.len()) {
        Some(rest) if (1..=room).contains(&rest) => rest + (room - rest) / FULL_RECORD * FULL_RECORD,
        // Not a partial record, or a hostile length: opening it says so.
        _ => room,
    }
}

/// Moves a partial record to the front when the slab is half used, so that reads stay large and moves rare.
fn make_room(slab: &mut Slab, range: &mut Range<usize>) {
    if range.start >= range.end {
        *range = 0..0;
    } else if range.start > slab.len() / 2 || slab.len() - range.end < slab.len() / 4 {
        slab.copy_within(range.clone(), 0);
        *range = 0..range.len();
    }
}
