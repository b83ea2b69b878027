//! A live tunnel written out and taken up again (design §4, "Movable state").
//!
//! Freezing happens at a quiet point between two turns of the tunnel's task: every whole record is opened and walked through, what it carried is
//! with its application or in a backlog, and what was read from applications is sealed. Then [`State`] is all there is, and the sockets.
//!
//! What cannot move is a CONNECT that has no answer yet, or that nobody has put an application behind. Freezing waits for those, opens and takes
//! no more, and when it may wait no longer it refuses them loudly: requests of the peer with REFUSED_STREAM, which lets the peer try elsewhere
//! (RFC 9113 §8.7), our own with CANCEL and an answer that lets the pool try elsewhere.
//!
//! Descriptors are duplicated before anything is taken apart, so that a freeze that fails (no descriptor left) changes nothing.

mod encoding;
mod state;
#[cfg(test)]
mod tests;
mod thaw;

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::sync::oneshot;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::super::Error;
use super::super::moving::Origin;
use super::clock::Watch;
use super::command::Answered;
use super::frame::{self, Reason};
use super::stream::{Phase, Stream};
use super::tunnel::{Life, Tunnel};
use crate::forward::Ended;
use crate::model::SpiffeId;
use crate::sys::socket::reset_on_close;
use encoding::List;
use state::{
    BlockState, ClockState, CurrentFrame, EntryState, FrameState, Promised, ResetState, SettingsState, State, StreamState, TableState, TemperState,
};

pub use encoding::StateError;
pub(in crate::hbone) use thaw::Thawed;

/// A tunnel that nobody drives: its state and its sockets. Its peer notices nothing until PINGs go unanswered, so it should not stay like this for
/// more than a few seconds. Dropped, it resets every connection that belongs to it: nobody must take that for an end.
pub struct Frozen {
    state: Box<State>,
    /// The tunnel's, then those of the streams in the order of [`State::streams`].
    sockets: Vec<OwnedFd>,
}

impl Frozen {
    /// The peer of the tunnel.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.state.peer
    }

    /// The ids of its streams, in the order of their sockets. Whoever owns a stream finds what else is known about it by this.
    #[must_use]
    pub fn streams(&self) -> Vec<u32> {
        self.state.streams.0.iter().map(|stream| stream.id).collect()
    }

    /// The state as bytes, which hold the keys of the connection, and the sockets: first that of the tunnel, then one for each of
    /// [`Frozen::streams`].
    #[must_use]
    pub fn into_parts(mut self) -> (Zeroizing<Vec<u8>>, Vec<OwnedFd>) {
        (encoding::seal(&*self.state), std::mem::take(&mut self.sockets))
    }

    /// What [`Frozen::into_parts`] made, maybe in another process.
    ///
    /// # Errors
    /// When the bytes are not exactly what this version writes, or the number of sockets does not fit. The sockets are reset.
    pub fn from_parts(bytes: &[u8], sockets: Vec<OwnedFd>) -> Result<Self, StateError> {
        let state = encoding::open::<State>(bytes).and_then(|state| {
            let expected = 1 + state.streams.0.len();
            let given = sockets.len();
            state.check().and(if given == expected { Ok(state) } else { Err(StateError::Sockets { expected, given }) })
        });
        match state {
            Ok(state) => Ok(Self { state: Box::new(state), sockets }),
            Err(error) => {
                reset(&sockets);
                Err(error)
            }
        }
    }
}

/// A socket that refuses the option is closed all the same.
fn reset(sockets: &[OwnedFd]) {
    for socket in sockets {
        let _ = reset_on_close(socket);
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        reset(&self.sockets);
    }
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.state.fmt(formatter)
    }
}

/// The wish to freeze a tunnel. It is off when the receiver of the result is dropped.
pub(in crate::hbone) struct Freeze {
    pub(in crate::hbone) origin: Origin,
    /// Refuses what cannot move instead of waiting for it.
    pub(in crate::hbone) now: bool,
    pub(in crate::hbone) give: oneshot::Sender<Result<Frozen, Error>>,
}

impl Tunnel {
    /// Whether requests are put off because the tunnel is about to move.
    pub(super) fn is_freezing(&self) -> bool {
        self.freezing.as_ref().is_some_and(|freeze| !freeze.give.is_closed())
    }

    /// Hands the tunnel out if that was asked for and nothing is in the way; whether it is gone. Then only dropping the tunnel is left to do.
    pub(super) fn hand_out(&mut self, busy: &mut bool) -> bool {
        let Some(freeze) = self.freezing.take() else { return false };
        // Whoever wanted it went away, or the tunnel ends: service goes on, or what is left of it.
        if freeze.give.is_closed() || matches!(self.life, Life::Closing(_)) {
            return false;
        }
        if freeze.now {
            self.refuse_unanswered();
        } else if !self.asked.is_empty() || !self.unanswered().is_empty() {
            self.freezing = Some(freeze);
            return false;
        }
        let order = self.in_order();
        let sockets = match self.duplicates(&order) {
            Ok(sockets) => sockets,
            Err(error) => {
                let _ = freeze.give.send(Err(Error::Tunnel(format!("the tunnel cannot be handed over: {error}"))));
                return false;
            }
        };
        if !self.inbox.close_if_empty() {
            // A command came meanwhile, maybe with a socket.
            self.freezing = Some(freeze);
            *busy = true;
            return false;
        }
        let state = Box::new(self.take_apart(&freeze, &order));
        // If nobody takes it by now, dropping it resets everything.
        let _ = freeze.give.send(Ok(Frozen { state, sockets }));
        true
    }

    /// Streams that cannot move: without an answer or without an application.
    fn unanswered(&mut self) -> Vec<u32> {
        let mut slots = self.streams.slots();
        slots.retain(|slot| self.streams.at(*slot).is_some_and(|stream| stream.application().is_none()));
        slots
    }

    fn refuse_unanswered(&mut self) {
        self.asked.clear();
        for slot in self.unanswered() {
            let Some(stream) = self.streams.at(slot) else { continue };
            let asked = matches!(stream.phase, Phase::Asked { .. });
            if matches!(stream.phase, Phase::Asking(_))
                && let Phase::Asking(answer) = std::mem::replace(&mut stream.phase, Phase::Open)
            {
                let _ = answer.send(Answered::Unused(Error::Tunnel("the tunnel is being handed over".into())));
            }
            let reason = if asked { Reason::REFUSED_STREAM } else { Reason::CANCEL };
            self.abandon(slot, Ended::Disconnected(io::ErrorKind::ConnectionAborted.into()), Some(reason));
        }
    }

    /// Slots of all streams: first those in the queue of senders, as they stand there.
    fn in_order(&self) -> Vec<u32> {
        let mut rest = self.streams.slots();
        rest.sort_unstable();
        let mut left: HashSet<u32> = rest.iter().copied().collect();
        self.senders.iter().chain(&self.held).chain(&rest).copied().filter(|slot| left.remove(slot)).collect()
    }

    fn duplicates(&mut self, order: &[u32]) -> io::Result<Vec<OwnedFd>> {
        let mut sockets = Vec::with_capacity(1 + order.len());
        sockets.push(self.socket.as_fd().try_clone_to_owned()?);
        for slot in order {
            let application = self.streams.at(*slot).and_then(Stream::application);
            let socket = application.map(|application| application.socket.as_fd().try_clone_to_owned());
            sockets.push(socket.ok_or_else(|| io::Error::other("a stream without its application"))??);
        }
        Ok(sockets)
    }

    /// Empties the tunnel into its state.
    fn take_apart(&mut self, freeze: &Freeze, order: &[u32]) -> State {
        let now = Instant::now();
        let streams = order.iter().filter_map(|slot| self.streams.remove(*slot)).filter_map(|stream| part_from(*stream)).collect();
        self.backlog = 0;
        let frame = self.frame_state();
        let config = &self.endpoint.config;
        State {
            side: self.side,
            peer: freeze.origin.peer.clone(),
            chain: List(freeze.origin.chain.iter().map(|certificate| certificate.to_vec()).collect()),
            farewell: freeze.origin.lifetime.farewell.saturating_duration_since(now),
            end: freeze.origin.lifetime.end.saturating_duration_since(now),
            receive: self.opener.state().clone(),
            send: self.sealer.state().clone(),
            input: bytes_of(&self.input.slab, &self.input.range),
            output: bytes_of(&self.output.slab, &self.output.range),
            control: std::mem::take(&mut self.control),
            post_handshake: std::mem::take(&mut self.post_handshake),
            preface_left: u8::try_from(self.preface_left).unwrap_or(u8::MAX),
            frame,
            block: self.block.take().map(|block| BlockState {
                stream: block.stream,
                end_stream: block.end_stream,
                fragments: block.fragments,
                bytes: block.bytes,
            }),
            table: TableState {
                max: u32::try_from(self.decoder.limit()).unwrap_or(u32::MAX),
                entries: List(self.decoder.entries().map(|(name, value)| EntryState { name: name.to_vec(), value: value.to_vec() }).collect()),
            },
            promised: Promised {
                stream_window: self.stream_window,
                frame_size: config.frame_size,
                header_list: config.header_list,
                max_streams: config.max_streams,
            },
            settings: SettingsState {
                known: self.peer.known,
                initial_window: u32::try_from(self.peer.initial_window).unwrap_or(frame::DEFAULT_WINDOW),
                max_streams: self.peer.max_streams,
            },
            send_window: self.credit.left(),
            widest_send_window: self.credit.widest(),
            receive_window: self.receive_window,
            window: self.windows.tunnel(),
            next_id: self.next_id,
            last_peer_id: self.last_peer_id,
            draining: match self.life {
                Life::Draining { last } => Some(last),
                _ => None,
            },
            released: self.released,
            goaway_received: self.goaway_received,
            clock: ClockState {
                waits_for: match self.watch {
                    Watch::Settings => 0,
                    Watch::Interval => 1,
                    Watch::Answer => 2,
                },
                timer: self.timer.deadline().saturating_duration_since(now),
                heard: now.saturating_duration_since(self.heard),
            },
            temper: TemperState {
                since: now.saturating_duration_since(self.temper.since),
                premature: self.temper.premature,
                local: self.temper.local,
                idle: self.temper.idle,
                empty: self.temper.empty,
                moved: u32::try_from(self.temper.moved).unwrap_or(0),
            },
            reset: List(self.streams.recently_reset().map(|(id, since)| ResetState { id, ago: now.saturating_duration_since(since) }).collect()),
            streams: List(streams),
        }
    }

    fn frame_state(&mut self) -> FrameState {
        let current = self.frame.take().map(|frame| CurrentFrame {
            length: u32::try_from(frame.head.length).unwrap_or(u32::MAX),
            kind: frame.head.kind,
            flags: frame.head.flags,
            stream: frame.head.stream,
            padding: frame.padding.and_then(|padding| u8::try_from(padding).ok()),
        });
        // The buffer is kept between frames, its content is not.
        let gathering = current.as_ref().is_some_and(|current| current.kind != frame::DATA);
        FrameState {
            head: self.walker.scratch.clone(),
            left: u32::try_from(self.walker.left).unwrap_or(u32::MAX),
            current,
            gathered: if gathering { std::mem::take(&mut self.gathered) } else { Vec::new() },
        }
    }
}

fn bytes_of(slab: &Option<crate::forward::slab::Slab>, range: &std::ops::Range<usize>) -> Vec<u8> {
    slab.as_ref().and_then(|slab| slab.get(range.clone())).unwrap_or_default().to_vec()
}

/// Tells whoever waits for a stream's end that it goes on elsewhere; the duplicate of the socket keeps the connection.
fn part_from(mut stream: Stream) -> Option<StreamState> {
    let role = stream.application()?.role;
    let state = StreamState {
        id: stream.id,
        role,
        send_window: stream.send_window,
        receive_window: i64::from(stream.receive_window),
        owed: stream.owed,
        target_window: stream.target_window,
        sparse: stream.sparse,
        sent_end: stream.sent_end,
        received_end: stream.received_end,
        shut_down: stream.shut_down,
        backlog: stream.backlog.front().to_vec(),
    };
    if let Some(application) = stream.application() {
        application.conclude(Ended::Moved);
    }
    Some(state)
}
