//! What there is to know about a live tunnel. The sockets are not in it.

use std::collections::HashSet;
use std::time::Duration;

use super::StateError;
use super::encoding::{List, plain};
use crate::forward::record::Direction;
use crate::forward::slab::SLAB;
use crate::hbone::Role;
use crate::hbone::engine::Side;
use crate::hbone::engine::frame::{self, Head, MAX_WINDOW, PREFACE};
use crate::hbone::hpack;
use crate::hbone::moving::LARGEST_CHAIN;
use crate::model::SpiffeId;

plain! {
    /// The whole state of a tunnel between two records. Spans of time are counted from the moment at which it was frozen: what a move takes is
    /// added to them.
    State {
        /// Which end this is.
        side: Side,
        /// The other end, as it was verified in the handshake.
        peer: SpiffeId,
        /// Its certificates, leaf first; none if they were too large to be kept.
        chain: List<Vec<u8>>,
        /// New streams may be opened for so long.
        farewell: Duration,
        /// Streams may go on for so long.
        end: Duration,
        /// Secret and counter of what we receive.
        receive: Direction,
        /// Secret and counter of what we send.
        send: Direction,
        /// Received records that are not opened; usually a part of one.
        input: Vec<u8>,
        /// Sealed records, or parts, that are not written.
        output: Vec<u8>,
        /// Frames that wait to be sealed.
        control: Vec<u8>,
        /// A part of a post-handshake message.
        post_handshake: Vec<u8>,
        /// Octets of the preface that are still to come.
        preface_left: u8,
        /// The frame that has only partly arrived.
        frame: FrameState,
        /// The header block that has only partly arrived.
        block: Option<BlockState>,
        /// The peer's dynamic table.
        table: TableState,
        /// What we told the peer in our SETTINGS.
        promised: Promised,
        /// The peer's SETTINGS.
        settings: SettingsState,
        /// Octets that we may send.
        send_window: i64,
        /// The most that this has been.
        widest_send_window: i64,
        /// Octets that the peer may send.
        receive_window: i64,
        /// What the receive window is to be.
        window: u32,
        /// Our next stream.
        next_id: u32,
        /// The peer's last one.
        last_peer_id: u32,
        /// A drain has begun, and our last GOAWAY named this stream (none: the first, which names no stream).
        draining: Option<Option<u32>>,
        /// To be closed with its last stream.
        released: bool,
        /// The peer said goodbye.
        goaway_received: bool,
        /// PINGs.
        clock: ClockState,
        /// Allowances of the peer.
        temper: TemperState,
        /// Streams that we reset a moment ago.
        reset: List<ResetState>,
        /// The streams, those with something to send first and in their order. The sockets come in the same order, behind that of the tunnel.
        streams: List<StreamState>,
    }
}

plain! {
    /// Where the frame walker stands.
    FrameState {
        /// A part of a frame's head.
        head: Vec<u8>,
        /// Octets of payload that are still to come.
        left: u32,
        /// The frame that they belong to.
        current: Option<CurrentFrame>,
        /// Its payload so far, unless it is DATA.
        gathered: Vec<u8>,
    }
}

plain! {
    /// The head of the frame that has begun.
    CurrentFrame {
        length: u32,
        kind: u8,
        flags: u8,
        stream: u32,
        /// Octets of padding, once they are known.
        padding: Option<u8>,
    }
}

plain! {
    /// A header block without its end.
    BlockState {
        stream: u32,
        end_stream: bool,
        fragments: u32,
        bytes: Vec<u8>,
    }
}

plain! {
    /// An HPACK table.
    TableState {
        /// Its size limit, octets.
        max: u32,
        /// Oldest first.
        entries: List<EntryState>,
    }
}

plain! {
    /// One field of an HPACK table.
    EntryState {
        name: Vec<u8>,
        value: Vec<u8>,
    }
}

plain! {
    /// Our SETTINGS: the peer goes by them, whatever the configuration says by now.
    Promised {
        stream_window: u32,
        frame_size: u32,
        header_list: u32,
        max_streams: u32,
    }
}

plain! {
    /// The peer's SETTINGS.
    SettingsState {
        known: bool,
        initial_window: u32,
        max_streams: u32,
    }
}

plain! {
    /// Time.
    ClockState {
        /// 0: the first SETTINGS, 1: the next PING, 2: its answer.
        waits_for: u8,
        /// The timer fires after so long.
        timer: Duration,
        /// The peer was heard so long ago.
        heard: Duration,
    }
}

plain! {
    /// The counters of the flood guards.
    TemperState {
        since: Duration,
        premature: u32,
        local: u32,
        idle: u32,
        empty: u32,
        moved: u32,
    }
}

plain! {
    /// A stream that we reset.
    ResetState {
        id: u32,
        ago: Duration,
    }
}

plain! {
    /// One stream that moves bytes.
    StreamState {
        id: u32,
        role: Role,
        send_window: i64,
        receive_window: i64,
        owed: u32,
        target_window: u32,
        /// It sent little lately.
        sparse: bool,
        sent_end: bool,
        received_end: bool,
        shut_down: bool,
        /// Received, and not yet taken by the application.
        backlog: Vec<u8>,
    }
}

impl std::fmt::Debug for State {
    /// Without secrets and without bytes.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ids: Vec<u32> = self.streams.0.iter().map(|stream| stream.id).collect();
        formatter.debug_struct("State").field("side", &self.side).field("peer", &self.peer.to_string()).field("streams", &ids).finish_non_exhaustive()
    }
}

/// Counters above this ended the connection long before.
const MOST: u32 = 1 << 30;
/// Post-handshake messages are at most 16 KiB, and come in records of 16 KiB.
const MOST_POST_HANDSHAKE: usize = 64 << 10;
/// The largest frame that can be agreed on (RFC 9113 §6.5.2).
const LARGEST_FRAME: u32 = (1 << 24) - 1;
/// Stream ids end below this.
const LAST_ID: u32 = 0x7fff_ffff;

impl State {
    /// Whether a tunnel can be in this state. What passes here is safe to go on with: nothing overflows, no slab is too small.
    pub(super) fn check(&self) -> Result<(), StateError> {
        let valid = |condition: bool, what: &'static str| if condition { Ok(()) } else { Err(StateError::Invalid(what)) };
        let window = |octets: i64| (-MAX_WINDOW..=MAX_WINDOW).contains(&octets);
        let size = |octets: u32| i64::from(octets) <= MAX_WINDOW;
        valid(self.receive.suite == self.send.suite, "two cipher suites")?;
        valid(self.chain.0.iter().map(Vec::len).sum::<usize>() <= LARGEST_CHAIN, "certificates without end")?;
        valid(self.input.len() <= SLAB && self.output.len() <= SLAB, "more bytes on their way than a slab holds")?;
        valid(self.post_handshake.len() <= MOST_POST_HANDSHAKE, "a post-handshake message without end")?;
        valid(
            usize::from(self.preface_left) <= PREFACE.len() && (self.side == Side::Server || self.preface_left == 0),
            "a preface of another length",
        )?;
        valid(window(self.send_window) && window(self.receive_window) && self.receive_window >= 0 && size(self.window), "a window out of bounds")?;
        valid((self.send_window..=MAX_WINDOW).contains(&self.widest_send_window), "a widest window that is none")?;
        valid(size(self.settings.initial_window) && size(self.promised.stream_window), "an initial window out of bounds")?;
        valid((16_384..=LARGEST_FRAME).contains(&self.promised.frame_size), "a frame size out of bounds")?;
        valid(size(self.promised.header_list), "a header list out of bounds")?;
        valid(!self.next_id.is_multiple_of(2) && self.next_id <= LAST_ID && self.last_peer_id <= LAST_ID, "a stream id out of bounds")?;
        valid(self.clock.waits_for <= 2, "a clock that waits for nothing")?;
        let temper = &self.temper;
        let counts = [temper.premature, temper.local, temper.idle, temper.empty, temper.moved];
        valid(counts.iter().all(|count| *count <= MOST), "a counter out of bounds")?;
        valid(self.table.max as usize <= hpack::TABLE_LIMIT, "a table out of bounds")?;
        self.check_frame()?;
        let mut ids = HashSet::new();
        for stream in &self.streams.0 {
            let known = match self.side {
                Side::Client => stream.id < self.next_id,
                Side::Server => stream.id <= self.last_peer_id,
            };
            valid(known && !stream.id.is_multiple_of(2) && ids.insert(stream.id), "a stream that was never opened")?;
            let windows = window(stream.send_window) && window(stream.receive_window) && stream.receive_window >= 0;
            valid(windows && size(stream.owed) && size(stream.target_window), "a stream's window out of bounds")?;
            valid(!stream.shut_down || (stream.received_end && stream.backlog.is_empty()), "an end before the last byte")?;
            valid(!(stream.shut_down && stream.sent_end), "a stream that is over")?;
        }
        Ok(())
    }

    fn check_frame(&self) -> Result<(), StateError> {
        let frame = &self.frame;
        let whole = match &frame.current {
            Some(current) => {
                frame.left > 0
                    && frame.left <= current.length
                    && current.length <= self.promised.frame_size
                    && current.stream <= LAST_ID
                    && current.padding.is_none_or(|padding| u32::from(padding) < current.length.max(1))
                    && frame.gathered.len() <= current.length as usize
                    && frame.head.is_empty()
            }
            None => frame.left == 0 && frame.gathered.is_empty(),
        };
        let block = self.block.as_ref().is_none_or(|block| block.fragments <= MOST && block.stream <= LAST_ID);
        if whole && block && frame.head.len() < frame::HEADER { Ok(()) } else { Err(StateError::Invalid("half a frame that cannot be")) }
    }
}

impl CurrentFrame {
    pub(super) fn head(&self) -> Head {
        Head::new(self.kind, self.flags, self.stream, self.length as usize)
    }
}
