//! HEADERS and CONTINUATION: requests of the peer, answers to ours, trailers (RFC 9113 §8).

use tokio::sync::oneshot;

use super::super::{ConnectResponse, Error};
use super::Asked;
use super::command::Answered;
use super::frame::{self, Head, Reason};
use super::stream::{Phase, Stream};
use super::tunnel::{Life, Side, Tunnel};
use crate::forward::Ended;
use crate::hbone::hpack;
use crate::hbone::request::Fields;

/// Fragments of one header block; our peers need one or two (CVE-2024-27919 and its family).
const MAX_FRAGMENTS: u32 = 6;

/// Times [`Config::max_streams`](crate::hbone::Config::max_streams) that a peer may open before it knows the limit.
const BURST: usize = 4;

/// A header block whose end has not come yet.
pub(super) struct HeaderBlock {
    pub(super) stream: u32,
    pub(super) end_stream: bool,
    pub(super) fragments: u32,
    pub(super) bytes: Vec<u8>,
}

impl Tunnel {
    pub(super) fn headers(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        let mut fragment = payload;
        let mut padding = 0;
        if head.has(frame::PADDED) {
            let (length, rest) = fragment.split_first().ok_or(Reason::FRAME_SIZE_ERROR)?;
            (padding, fragment) = (usize::from(*length), rest);
        }
        if head.has(frame::WITH_PRIORITY) {
            fragment = fragment.get(5..).ok_or(Reason::FRAME_SIZE_ERROR)?;
        }
        let end = fragment.len().checked_sub(padding).ok_or(Reason::PROTOCOL_ERROR)?;
        let bytes = fragment.get(..end).unwrap_or_default().to_vec();
        let block = HeaderBlock { stream: head.stream, end_stream: head.has(frame::END_STREAM), fragments: 1, bytes };
        self.take_block(block, head.has(frame::END_HEADERS))
    }

    pub(super) fn continuation(&mut self, head: Head, payload: &[u8]) -> Result<(), Reason> {
        let Some(mut block) = self.block.take() else { return Err(Reason::PROTOCOL_ERROR) };
        if block.stream != head.stream {
            return Err(Reason::PROTOCOL_ERROR);
        }
        block.fragments += 1;
        block.bytes.extend_from_slice(payload);
        self.take_block(block, head.has(frame::END_HEADERS))
    }

    fn take_block(&mut self, block: HeaderBlock, whole: bool) -> Result<(), Reason> {
        // Twice the list, since encoding may make it longer; a peer that needs more is not one of ours.
        if block.fragments > MAX_FRAGMENTS || block.bytes.len() > 2 * self.header_list() as usize {
            return Err(self.temper.headers());
        }
        if !whole {
            self.block = Some(block);
            return Ok(());
        }
        let mut fields = Fields::default();
        let fits = self
            .decoder
            .decode(&block.bytes, self.header_list() as usize, |name, value| fields.add(name, value))
            .map_err(|error| if error == hpack::HpackError::Bomb { self.temper.headers() } else { Reason::COMPRESSION_ERROR })?;
        match self.side {
            Side::Client => self.response(&block, &fields, fits),
            Side::Server => self.request(&block, fields, fits),
        }
    }

    fn request(&mut self, block: &HeaderBlock, fields: Fields, fits: bool) -> Result<(), Reason> {
        if let Some(slot) = self.streams.slot_of(block.stream) {
            return self.trailers(slot, block.end_stream);
        }
        if block.stream.is_multiple_of(2) || block.stream <= self.last_peer_id {
            // A trailer of a stream that we reset, or an id used again (RFC 9113 §5.1.1).
            return if !block.stream.is_multiple_of(2) && block.end_stream { self.temper.idle_frame() } else { Err(Reason::PROTOCOL_ERROR) };
        }
        self.last_peer_id = block.stream;
        if matches!(self.life, Life::Draining { last: Some(_) } | Life::Closing(_)) {
            // After the goodbye: the peer knows that nothing was done (RFC 9113 §6.8).
            return self.temper.local_reset();
        }
        let refusal = if self.streams.len() >= self.most_streams(block.stream) || self.is_freezing() {
            Some(Reason::REFUSED_STREAM)
        } else {
            (!fields.well_formed_request()).then_some(Reason::PROTOCOL_ERROR)
        };
        if let Some(reason) = refusal {
            self.temper.local_reset()?;
            frame::put(&mut self.control, frame::RST_STREAM, 0, block.stream, &reason.0.to_be_bytes());
            return Ok(());
        }
        if !fits {
            // 431: the fields are larger than we take (RFC 6585 §5).
            self.temper.local_reset()?;
            let mut answer = Vec::new();
            hpack::status(431, &mut answer);
            frame::put(&mut self.control, frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, block.stream, &answer);
            frame::put(&mut self.control, frame::RST_STREAM, 0, block.stream, &Reason::NO_ERROR.0.to_be_bytes());
            return Ok(());
        }
        let (abandoned, told) = oneshot::channel();
        let mut stream = Stream::new(block.stream, Phase::Asked { _abandoned: abandoned }, self.peer.initial_window, self.stream_window);
        stream.received_end = block.end_stream;
        self.streams.insert(stream);
        let asked = Asked { id: block.stream, fields, told, inbox: self.inbox.clone() };
        self.asked.push_back(asked);
        Ok(())
    }

    /// How many streams may be open when the peer opens this one. A peer that does not know our limit yet may have more connections waiting than
    /// that, and Envoy does not try again what is refused: of its first streams more are served.
    fn most_streams(&self, id: u32) -> usize {
        let limit = self.endpoint.config.max_streams as usize;
        let burst = limit.saturating_mul(BURST);
        let number = id as usize / 2 + 1;
        if !self.limit_known && number <= burst { burst } else { limit }
    }

    fn response(&mut self, block: &HeaderBlock, fields: &Fields, fits: bool) -> Result<(), Reason> {
        if self.is_idle(block.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let Some(slot) = self.streams.slot_of(block.stream) else { return self.temper.idle_frame() };
        let Some(stream) = self.streams.at(slot) else { return Ok(()) };
        if !matches!(stream.phase, Phase::Asking(_)) {
            return self.trailers(slot, block.end_stream);
        }
        let status = fields.status();
        if let Some(100..=199) = status
            && !block.end_stream
        {
            return self.temper.idle_frame();
        }
        let accepted = status == Some(200) && fits;
        let Phase::Asking(answer) = std::mem::replace(&mut stream.phase, Phase::Open) else { return Ok(()) };
        self.temper.answered();
        stream.received_end = block.end_stream;
        if accepted {
            let id = stream.id;
            if answer.send(Answered::Open(id, ConnectResponse { baggage: fields.baggage() })).is_err() {
                self.abandon(slot, Ended::Finished, Some(Reason::CANCEL));
            }
            return Ok(());
        }
        let error = match status {
            _ if !fits => Error::Tunnel("the answer's header list is too large".into()),
            Some(status) => Error::Status(status),
            None => Error::Tunnel("an answer without status".into()),
        };
        let _ = answer.send(Answered::Failed(error));
        self.abandon(slot, Ended::Finished, Some(Reason::CANCEL));
        Ok(())
    }

    /// Trailers say nothing to a tunnel but may end it (RFC 9113 §8.1); without END_STREAM they are malformed.
    fn trailers(&mut self, slot: u32, end_stream: bool) -> Result<(), Reason> {
        let Some(stream) = self.streams.at(slot) else { return Ok(()) };
        if stream.received_end {
            return Err(Reason::STREAM_CLOSED);
        }
        if end_stream {
            let id = stream.id;
            self.end_of(id);
            return Ok(());
        }
        self.temper.local_reset()?;
        self.abandon(slot, Ended::Failed(std::io::Error::other("the peer sent trailers without an end")), Some(Reason::PROTOCOL_ERROR));
        Ok(())
    }
}
