//! Every frame but the payload of DATA: SETTINGS, HEADERS, PING, GOAWAY, RST_STREAM, WINDOW_UPDATE (RFC 9113 §6).

use std::ops::Range;

use super::super::Error;
use super::MAX_WINDOW;
use super::command::Answered;
use super::frame::{self, Head, Reason};
use super::stream::Phase;
use super::tunnel::{Side, Tunnel};
use crate::forward::Ended;
use crate::forward::record::{Content, Sealer};
use crate::sys::stream_io::Next;

/// Decoded header list that we take of an answer, octets.
const RESPONSE_HEADER_LIST: u32 = 16 << 10;

/// The frame that is being walked through.
pub(super) struct Frame {
    pub(super) head: Head,
    /// Octets of padding, once they are known.
    pub(super) padding: Option<usize>,
}

/// What the peer said about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PeerSettings {
    /// Its first SETTINGS have come.
    pub(super) known: bool,
    pub(super) initial_window: i64,
    pub(super) max_streams: u32,
}

impl Default for PeerSettings {
    fn default() -> Self {
        // 100 streams until the peer says otherwise, as the reference assumes (dataplane §2.2).
        Self { known: false, initial_window: i64::from(frame::DEFAULT_WINDOW), max_streams: 100 }
    }
}

impl Tunnel {
    /// Our first frames.
    pub(super) fn greet(&mut self) {
        let mut settings = match self.side {
            Side::Client => vec![(frame::SETTINGS_ENABLE_PUSH, 0)],
            Side::Server => vec![(frame::SETTINGS_MAX_CONCURRENT_STREAMS, self.endpoint.config.max_streams)],
        };
        settings.extend([
            (frame::SETTINGS_INITIAL_WINDOW_SIZE, self.stream_window),
            (frame::SETTINGS_MAX_FRAME_SIZE, self.endpoint.config.frame_size),
            (frame::SETTINGS_MAX_HEADER_LIST_SIZE, self.header_list()),
        ]);
        let payload: Vec<u8> = settings.iter().flat_map(|(id, value)| id.to_be_bytes().into_iter().chain(value.to_be_bytes())).collect();
        frame::put(&mut self.control, frame::SETTINGS, 0, 0, &payload);
        self.credit_connection();
    }

    /// Decoded header list that we take, octets.
    pub(super) fn header_list(&self) -> u32 {
        match self.side {
            Side::Client => RESPONSE_HEADER_LIST,
            Side::Server => self.endpoint.config.header_list,
        }
    }

    /// A frame begins.
    pub(super) fn begin(&mut self, buffer: &[u8], head: Head) -> Result<(), Reason> {
        if head.length > self.endpoint.config.frame_size as usize {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        // A block in pieces is followed by nothing else (RFC 9113 §6.10), and SETTINGS come first (§3.4).
        if self.block.is_some() != (head.kind == frame::CONTINUATION) || (!self.peer.known && head.kind != frame::SETTINGS) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if head.kind == frame::DATA {
            return self.begin_data(buffer, head);
        }
        // Bytes before this frame reach their application before the frame takes effect.
        self.flush_spans(buffer);
        check_shape(head)?;
        if matches!(head.kind, frame::HEADERS | frame::CONTINUATION) && head.length > 2 * self.header_list() as usize {
            return Err(self.temper.headers());
        }
        self.gathered.clear();
        self.frame = Some(Frame { head, padding: None });
        if head.length == 0 { self.finish(head) } else { Ok(()) }
    }

    fn begin_data(&mut self, buffer: &[u8], head: Head) -> Result<(), Reason> {
        if head.stream == 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        self.account(head)?;
        match self.streams.slot_of(head.stream) {
            Some(slot) if self.streams.at(slot).is_some_and(|stream| stream.received_end) => return Err(Reason::STREAM_CLOSED),
            Some(_) => {}
            None if self.is_idle(head.stream) => return Err(Reason::PROTOCOL_ERROR),
            // Of what was on its way, one end at most is empty.
            None if self.streams.was_reset(head.stream) && head.length == 0 => self.temper.idle_frame()?,
            None if self.streams.was_reset(head.stream) => {}
            None => self.temper.local_reset()?,
        }
        if head.length == 0 && !head.has(frame::END_STREAM) {
            self.temper.empty_frame()?;
        }
        let padding = if head.has(frame::PADDED) { None } else { Some(0) };
        if padding.is_none() && head.length == 0 {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        self.frame = Some(Frame { head, padding });
        if head.length == 0 { self.finish_data(buffer, head) } else { Ok(()) }
    }

    pub(super) fn is_idle(&self, id: u32) -> bool {
        match self.side {
            Side::Client => id.is_multiple_of(2) || id >= self.next_id,
            Side::Server => id.is_multiple_of(2) || id > self.last_peer_id,
        }
    }

    /// A part of a payload.
    pub(super) fn payload(&mut self, buffer: &[u8], mut range: Range<usize>, left: usize) -> Result<(), Reason> {
        let Some(frame) = &mut self.frame else { return Err(Reason::PROTOCOL_ERROR) };
        let head = frame.head;
        if head.kind == frame::DATA {
            if frame.padding.is_none() {
                let padding = buffer.get(range.start).copied().map_or(0, usize::from);
                if padding >= head.length {
                    return Err(Reason::PROTOCOL_ERROR);
                }
                frame.padding = Some(padding);
                if padding + 1 == head.length && !head.has(frame::END_STREAM) {
                    self.temper.empty_frame()?;
                }
                range.start += 1;
                self.return_padding(head.stream, 1 + padding);
            }
            let padding = self.frame.as_ref().and_then(|frame| frame.padding).unwrap_or(0);
            // What is left of payload in this piece: all but the padding that may already have begun.
            let beyond = padding.saturating_sub(left).min(range.len());
            range.end -= beyond;
            if !range.is_empty() {
                self.data(buffer, head.stream, range);
            }
            return if left == 0 { self.finish_data(buffer, head) } else { Ok(()) };
        }
        if is_known(head.kind) {
            self.gathered.extend_from_slice(buffer.get(range).unwrap_or_default());
        }
        if left == 0 { self.finish(head) } else { Ok(()) }
    }

    /// Padding counts for flow control and is given back at once.
    fn return_padding(&mut self, id: u32, octets: usize) {
        if let Some(slot) = self.streams.slot_of(id) {
            self.credit(slot, octets);
        }
    }

    fn finish_data(&mut self, buffer: &[u8], head: Head) -> Result<(), Reason> {
        self.frame = None;
        if head.has(frame::END_STREAM) {
            let next = if self.streams.slot_of(head.stream) == Some(self.span_slot) { Next::End } else { Next::Unknown };
            self.flush(buffer, next);
            self.end_of(head.stream);
        }
        if self.streams.slot_of(head.stream).is_none() {
            // Bytes of a stream that is gone used the tunnel's window too, and no application gives that credit back.
            self.credit_connection();
        }
        Ok(())
    }

    /// A whole frame other than DATA is here.
    fn finish(&mut self, head: Head) -> Result<(), Reason> {
        self.frame = None;
        let mut payload = std::mem::take(&mut self.gathered);
        let outcome = match head.kind {
            frame::HEADERS => self.headers(head, &payload),
            frame::CONTINUATION => self.continuation(head, &payload),
            frame::SETTINGS => self.settings(head, &payload),
            frame::PING => self.ping(head, &payload),
            frame::RST_STREAM => self.rst_stream(head, &payload),
            frame::WINDOW_UPDATE => self.window_update(head, &payload),
            frame::GOAWAY => self.goaway_from_peer(&payload),
            frame::PUSH_PROMISE => Err(Reason::PROTOCOL_ERROR),
            // PRIORITY and what we do not know (RFC 9113 §4.1, §5.5).
            _ => self.temper.idle_frame(),
        };
        payload.clear();
        frame::thin(&mut payload);
        self.gathered = payload;
        outcome
    }

    fn settings(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if head.has(frame::ACK) {
            if !self.peer.known {
                return Err(Reason::PROTOCOL_ERROR);
            }
            // In our only SETTINGS is how many streams we serve at once.
            return if std::mem::replace(&mut self.limit_known, true) { self.temper.idle_frame() } else { Ok(()) };
        }
        if self.peer.known {
            self.temper.idle_frame()?;
        } else {
            self.peer.known = true;
            self.settled();
            if matches!(self.side, Side::Client) {
                self.peer.max_streams = u32::MAX;
            }
        }
        for entry in payload.chunks_exact(6) {
            let Some([i0, i1, v0, v1, v2, v3]) = entry.first_chunk::<6>().copied() else { break };
            let (id, value) = (u16::from_be_bytes([i0, i1]), u32::from_be_bytes([v0, v1, v2, v3]));
            match id {
                frame::SETTINGS_INITIAL_WINDOW_SIZE => self.resize_windows(value)?,
                frame::SETTINGS_MAX_CONCURRENT_STREAMS => self.peer.max_streams = value,
                frame::SETTINGS_MAX_FRAME_SIZE if !(16_384..=16_777_215).contains(&value) => return Err(Reason::PROTOCOL_ERROR),
                frame::SETTINGS_ENABLE_PUSH if value > 1 => return Err(Reason::PROTOCOL_ERROR),
                // Our frames fit into the smallest limit, our encoder keeps no table, our lists are short.
                _ => {}
            }
        }
        self.inbox.allow(self.peer.max_streams);
        frame::put(&mut self.control, frame::SETTINGS, frame::ACK, 0, &[]);
        self.open_waiting();
        Ok(())
    }

    /// A new initial window moves those of all streams, possibly below zero (RFC 9113 §6.9.2).
    fn resize_windows(&mut self, value: u32) -> Result<(), Reason> {
        let value = i64::from(value);
        if value > MAX_WINDOW {
            return Err(Reason::FLOW_CONTROL_ERROR);
        }
        let change = value - self.peer.initial_window;
        self.peer.initial_window = value;
        for slot in self.streams.slots() {
            if let Some(stream) = self.streams.at(slot) {
                stream.send_window += change;
                if stream.send_window > MAX_WINDOW {
                    return Err(Reason::FLOW_CONTROL_ERROR);
                }
            }
            self.enqueue(slot);
        }
        Ok(())
    }

    fn ping(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if head.has(frame::ACK) {
            return if self.answered_ping(payload) { Ok(()) } else { self.temper.idle_frame() };
        }
        self.temper.idle_frame()?;
        frame::put(&mut self.control, frame::PING, frame::ACK, 0, payload);
        Ok(())
    }

    fn window_update(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        let increment = payload.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes) & 0x7fff_ffff);
        if head.stream == 0 {
            if increment == 0 {
                return Err(Reason::PROTOCOL_ERROR);
            }
            if is_spoonful(increment, self.credit.left()) {
                self.temper.idle_frame()?;
            }
            self.release_held();
            let fits = self.credit.give(increment);
            self.note_shortage();
            return if fits { Ok(()) } else { Err(Reason::FLOW_CONTROL_ERROR) };
        }
        if self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        // A reader may take the last of a stream after its end.
        let Some(slot) = self.streams.slot_of(head.stream) else { return self.temper.idle_frame() };
        let Some(stream) = self.streams.at(slot) else { return Ok(()) };
        if is_spoonful(increment, stream.send_window) {
            self.temper.idle_frame()?;
        }
        stream.send_window += i64::from(increment);
        let reason =
            if increment == 0 { Some(Reason::PROTOCOL_ERROR) } else { (stream.send_window > MAX_WINDOW).then_some(Reason::FLOW_CONTROL_ERROR) };
        if let Some(reason) = reason {
            self.temper.local_reset()?;
            self.abandon(slot, Ended::Failed(std::io::Error::other(format!("the peer broke flow control: {reason}"))), Some(reason));
            return Ok(());
        }
        self.enqueue(slot);
        Ok(())
    }

    fn rst_stream(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        if self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let reason = Reason(payload.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes)));
        let Some(slot) = self.streams.slot_of(head.stream) else { return self.temper.idle_frame() };
        let tunnel_is_used_up = self.granted.may_be_waited_for(self.receive_window);
        let Some(stream) = self.streams.at(slot) else { return Ok(()) };
        match &stream.phase {
            Phase::Asked { .. } => {
                // Dropping the stream tells whoever decides about it.
                self.abandon(slot, Ended::Finished, None);
                return self.temper.premature_reset();
            }
            Phase::Asking(_) => {
                let Some(mut stream) = self.streams.remove(slot) else { return Ok(()) };
                if let Phase::Asking(answer) = std::mem::replace(&mut stream.phase, Phase::Open) {
                    let error = Error::Tunnel(format!("stream reset by peer: {reason}"));
                    let answered = if reason == Reason::REFUSED_STREAM { Answered::Unused(error) } else { Answered::Failed(error) };
                    let _ = answer.send(answered);
                }
                self.open_waiting();
                return Ok(());
            }
            Phase::Open | Phase::Relaying(_) => {}
        }
        let is_used_up = tunnel_is_used_up || stream.granted.may_be_waited_for(i64::from(stream.receive_window));
        if reason == Reason::NO_ERROR || (reason == Reason::CONNECT_ERROR && stream.reset_is_end && !is_used_up) {
            // A whole answer came, and the peer wants no more of ours (RFC 9113 §8.1).
            stream.received_end = true;
            stream.sent_end = true;
            self.settle(slot);
            return Ok(());
        }
        let error = std::io::Error::new(std::io::ErrorKind::ConnectionReset, format!("stream reset by peer: {reason}"));
        let ended = match reason {
            Reason::CANCEL | Reason::STREAM_CLOSED | Reason::CONNECT_ERROR => Ended::Disconnected(error),
            _ => Ended::Failed(error),
        };
        self.abandon(slot, ended, None);
        Ok(())
    }

    /// Streams above the last that the peer handled were not touched and may go elsewhere (RFC 9113 §6.8).
    fn goaway_from_peer(&mut self, payload: &[u8]) -> Result<(), Reason> {
        let last = payload.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes) & 0x7fff_ffff);
        let reason = payload.get(4..).and_then(|rest| rest.first_chunk::<4>()).map_or(Reason::NO_ERROR, |bytes| Reason(u32::from_be_bytes(*bytes)));
        if std::mem::replace(&mut self.goaway_received, true) {
            // Two are usual (RFC 9113 §6.8).
            self.temper.idle_frame()?;
        }
        for slot in self.streams.slots() {
            let untouched = self.streams.at(slot).is_some_and(|stream| matches!(self.side, Side::Client) && stream.id > last);
            if !untouched {
                continue;
            }
            if let Some(stream) = self.streams.at(slot)
                && matches!(stream.phase, Phase::Asking(_))
                && let Phase::Asking(answer) = std::mem::replace(&mut stream.phase, Phase::Open)
            {
                let _ = answer.send(Answered::Unused(Error::Tunnel("the peer is going away".into())));
            }
            // One that it had answered after all is cut off, which must not look like an end.
            self.abandon(slot, Ended::Disconnected(std::io::ErrorKind::ConnectionReset.into()), None);
        }
        self.open_waiting();
        if reason == Reason::NO_ERROR {
            return Ok(());
        }
        self.close(Reason::NO_ERROR, Some(Error::Tunnel(format!("the peer ended the connection: {reason}"))));
        Ok(())
    }

    pub(super) fn goaway(&mut self, last: u32, reason: Reason) {
        let mut payload = last.to_be_bytes().to_vec();
        payload.extend_from_slice(&reason.0.to_be_bytes());
        frame::put(&mut self.control, frame::GOAWAY, 0, 0, &payload);
    }

    /// Answers a KeyUpdate with our own (RFC 8446 §4.6.3).
    pub(super) fn update_key(&mut self) {
        self.seal_message(&[24, 0, 0, 1, 0], Content::Handshake);
        if let Err(error) = self.sealer.update() {
            self.close(Reason::NO_ERROR, Some(Error::Tunnel(error.to_string())));
        }
    }

    pub(super) fn alert(&mut self, description: u8) {
        self.seal_message(&[2, description], Content::Alert);
    }

    /// Puts a small record behind what is already sealed.
    pub(super) fn seal_message(&mut self, message: &[u8], content: Content) {
        let mut record = vec![0; Sealer::sealed_length(message.len())];
        if let Some(room) = record.get_mut(5..5 + message.len()) {
            room.copy_from_slice(message);
        }
        if self.sealer.seal(&mut record, content).is_ok() {
            self.append_sealed(&record);
        }
    }
}

/// Credit of a few octets where there is plenty.
fn is_spoonful(increment: u32, window: i64) -> bool {
    increment < 1024 && window > i64::from(frame::DEFAULT_WINDOW)
}

/// What a frame's head alone can show to be wrong.
fn check_shape(head: Head) -> Result<(), Reason> {
    let on_stream = head.stream != 0;
    let (stream_ok, length_ok) = match head.kind {
        frame::HEADERS | frame::CONTINUATION => (on_stream, true),
        frame::PRIORITY => (on_stream, head.length == 5),
        frame::RST_STREAM => (on_stream, head.length == 4),
        frame::SETTINGS => (!on_stream, head.length.is_multiple_of(6) && head.length <= 600 && (!head.has(frame::ACK) || head.length == 0)),
        frame::PING => (!on_stream, head.length == 8),
        frame::GOAWAY => (!on_stream, (8..=16_384).contains(&head.length)),
        frame::WINDOW_UPDATE => (true, head.length == 4),
        _ => (true, true),
    };
    match (stream_ok, length_ok) {
        (false, _) => Err(Reason::PROTOCOL_ERROR),
        (true, false) => Err(Reason::FRAME_SIZE_ERROR),
        (true, true) => Ok(()),
    }
}

/// Frames whose payload we look at; that of others is passed over.
fn is_known(kind: u8) -> bool {
    matches!(kind, frame::HEADERS | frame::CONTINUATION | frame::RST_STREAM | frame::SETTINGS | frame::PING | frame::GOAWAY | frame::WINDOW_UPDATE)
}
