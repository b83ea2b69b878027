//! The task that owns a tunnel and the sockets of its streams. Nothing hops: it reads the tunnel, opens records in place, hands the payload to
//! the applications with one vectored write, reads applications straight into the slots of the records to come, seals them in place and
//! writes them with one call.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

use super::super::budget::Windows;
use super::super::{Endpoint, Error};
use super::clock::{LAST_CALL, Watch};
use super::command::{self, Answered, Command};
use super::control::{Frame, PeerSettings};
use super::frame::{self, Reason, Walker};
use super::frozen::Freeze;
use super::headers::HeaderBlock;
use super::ready::Inbox;
use super::reserve::Credit;
use super::stream::{Application, Granted, Phase, Stream, Streams, Wakes};
use super::temper::Temper;
use super::{Asked, Established, INITIAL_WINDOW, INITIAL_WINDOW_OPENED};
use crate::forward::Ended;
use crate::forward::record::{Opener, Sealer};
use crate::forward::slab::Slab;
use crate::hbone::hpack::Decoder;

/// Turns of the loop before the task lets others run.
const TURNS: usize = 16;

/// Which end of the tunnel we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hbone) enum Side {
    /// We opened it.
    Client,
    /// The peer did.
    Server,
}

/// What driving a tunnel brings.
pub(in crate::hbone) enum Next {
    /// The peer asks.
    Asked(Asked),
    /// The tunnel has ended, in good order or not.
    Over(Result<(), Error>),
}

/// Received bytes that are not yet walked through.
#[derive(Default)]
pub(super) struct Input {
    pub(super) slab: Option<Slab>,
    pub(super) range: Range<usize>,
    pub(super) ended: bool,
    /// There is something from the handshake.
    pub(super) early: bool,
}

/// Sealed bytes that are not yet written.
#[derive(Default)]
pub(super) struct Output {
    pub(super) slab: Option<Slab>,
    pub(super) range: Range<usize>,
}

/// Where the connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// Serving.
    Live,
    /// GOAWAY was sent: running streams finish. First one that closes nothing, then, when the peer has heard it, one with the last stream.
    Draining { last: Option<u32> },
    /// Only what is already queued is still written, until then.
    Closing(Instant),
}

/// One tunnel with all that belongs to it.
pub(in crate::hbone) struct Tunnel {
    pub(super) socket: TcpStream,
    pub(super) side: Side,
    pub(super) endpoint: Arc<Endpoint>,
    /// Receive windows, as the node's budget allows.
    pub(super) windows: Windows,
    /// Octets of DATA that have come.
    pub(super) data: u64,
    /// The receive window of each new stream.
    pub(super) stream_window: u32,
    /// When the peer was heard last.
    pub(super) heard: Instant,
    /// Requests that nobody has looked at yet.
    pub(super) asked: VecDeque<Asked>,
    pub(super) opener: Opener,
    pub(super) sealer: Sealer,
    pub(super) input: Input,
    pub(super) output: Output,
    /// Frames other than DATA that wait to be sealed.
    pub(super) control: Vec<u8>,
    pub(super) preface_left: usize,
    pub(super) walker: Walker,
    pub(super) frame: Option<Frame>,
    pub(super) gathered: Vec<u8>,
    pub(super) block: Option<HeaderBlock>,
    pub(super) decoder: Decoder,
    pub(super) peer: PeerSettings,
    /// The peer has acknowledged our SETTINGS.
    pub(super) limit_known: bool,
    /// What the peer lets us send.
    pub(super) credit: Credit,
    /// Nothing but the reserve of that is left, as the pool was told.
    pub(super) short: bool,
    pub(super) receive_window: i64,
    /// The last credit that the peer was given for the tunnel.
    pub(super) granted: Granted,
    /// Octets that wait for applications, of all streams.
    pub(super) backlog: usize,
    pub(super) streams: Streams,
    /// Streams whose application may have something to read.
    pub(super) senders: VecDeque<u32>,
    /// Those of them that wait for more of the tunnel's window.
    pub(super) held: VecDeque<u32>,
    pub(super) waiting: VecDeque<(Vec<u8>, bool, oneshot::Sender<Answered>)>,
    pub(super) next_id: u32,
    pub(super) last_peer_id: u32,
    pub(super) temper: Temper,
    pub(super) post_handshake: Vec<u8>,
    pub(super) inbox: Wakes,
    pub(super) spans: Vec<Range<usize>>,
    pub(super) span_slot: u32,
    pub(super) life: Life,
    pub(super) released: bool,
    pub(super) goaway_received: bool,
    pub(super) failure: Option<Error>,
    pub(super) freezing: Option<Box<Freeze>>,
    pub(super) timer: Pin<Box<Sleep>>,
    pub(super) watch: Watch,
    ready: Vec<u32>,
    commands: VecDeque<Command>,
}

impl Tunnel {
    /// In a box: a thousand bytes that would otherwise be moved from future to future, each keeping room for them.
    pub(in crate::hbone) fn new(established: Established, side: Side, endpoint: Arc<Endpoint>) -> Result<Box<Self>, Error> {
        let Established { socket, opener, sealer, input, .. } = established;
        let (control, preface_left) = match side {
            Side::Client => (frame::PREFACE.to_vec(), 0),
            Side::Server => (Vec::new(), frame::PREFACE.len()),
        };
        let timer = Box::pin(tokio::time::sleep(endpoint.config.handshake_deadline));
        let full = (endpoint.config.connection_window, endpoint.config.stream_window);
        let windows = Windows::new(&endpoint.budget, full, side == Side::Client);
        let most = if side == Side::Client { INITIAL_WINDOW_OPENED } else { INITIAL_WINDOW };
        let stream_window = windows.stream().min(most);
        let sealer = sealer.with_key_limit(endpoint.records_per_key);
        let mut tunnel = Box::new(Self {
            socket,
            endpoint,
            windows,
            data: 0,
            stream_window,
            heard: Instant::now(),
            asked: VecDeque::new(),
            opener,
            sealer,
            input: Input::default(),
            output: Output::default(),
            control,
            preface_left,
            walker: Walker::default(),
            frame: None,
            gathered: Vec::new(),
            block: None,
            decoder: Decoder::default(),
            peer: PeerSettings::default(),
            limit_known: false,
            credit: Credit::default(),
            short: false,
            receive_window: i64::from(frame::DEFAULT_WINDOW),
            granted: Granted::default(),
            backlog: 0,
            streams: Streams::default(),
            senders: VecDeque::new(),
            held: VecDeque::new(),
            waiting: VecDeque::new(),
            next_id: 1,
            last_peer_id: 0,
            temper: Temper::default(),
            post_handshake: Vec::new(),
            inbox: Inbox::new(),
            spans: Vec::new(),
            span_slot: 0,
            life: Life::Live,
            released: false,
            goaway_received: false,
            failure: None,
            freezing: None,
            timer,
            watch: Watch::Settings,
            ready: Vec::new(),
            commands: VecDeque::new(),
            side,
        });
        tunnel.greet();
        tunnel.take_early(&input.plaintext, &input.records)?;
        Ok(tunnel)
    }

    /// What arrived together with the end of the handshake.
    fn take_early(&mut self, plaintext: &[u8], records: &[u8]) -> Result<(), Error> {
        if !plaintext.is_empty() {
            let walked = self.walk(plaintext, 0..plaintext.len());
            self.flush_spans(plaintext);
            walked.map_err(|reason| Error::Handshake(format!("the peer's first frames: {reason}")))?;
        }
        if !records.is_empty() {
            let mut slab = Slab::take();
            let room = slab.get_mut(..records.len()).ok_or_else(|| Error::Handshake("more early data than a slab holds".into()))?;
            room.copy_from_slice(records);
            self.input.slab = Some(slab);
            self.input.range = 0..records.len();
            self.input.early = true;
        }
        Ok(())
    }

    pub(in crate::hbone) fn inbox(&self) -> &Wakes {
        &self.inbox
    }

    /// Takes commands and wake-ups; whether there were any.
    fn attend(&mut self, context: &Context<'_>) -> bool {
        let (mut ready, mut commands) = (std::mem::take(&mut self.ready), std::mem::take(&mut self.commands));
        let any = self.inbox.take(&mut ready, &mut commands, context.waker());
        for slot in ready.drain(..) {
            self.woken(slot);
        }
        for command in commands.drain(..) {
            self.obey(command);
        }
        (self.ready, self.commands) = (ready, commands);
        any
    }

    /// The socket of a stream became ready.
    fn woken(&mut self, slot: u32) {
        let Some(stream) = self.streams.at(slot) else { return };
        if let Some(application) = stream.application() {
            application.seen();
        }
        self.drain_backlog(slot);
        self.check_gone(slot);
        self.enqueue(slot);
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Open { block, reset_is_end, answer } => self.waiting.push_back((block, reset_is_end, answer)),
            Command::Answer { id, block, end } => self.answer(id, &block, end),
            Command::Attach(attach) => self.attach(*attach),
            Command::Reset { id, reason } => {
                if let Some(slot) = self.streams.slot_of(id) {
                    self.abandon(slot, Ended::Disconnected(io::ErrorKind::ConnectionAborted.into()), Some(reason));
                }
            }
            Command::Sweep => self.sweep(),
            Command::Drain => self.drain(),
            Command::Freeze(freeze) => self.freezing = Some(freeze),
            Command::Release => self.released = true,
            Command::Abort => self.close(Reason::NO_ERROR, None),
            Command::Revoke => self.close(Reason::NO_ERROR, Some(Error::Revoked)),
        }
        self.open_waiting();
    }

    /// Opens what waits, as far as the peer's limit allows.
    pub(super) fn open_waiting(&mut self) {
        while let Some((block, reset_is_end, answer)) = self.waiting.pop_front() {
            if answer.is_closed() {
                continue;
            }
            if self.life != Life::Live || self.goaway_received || self.next_id > 0x7fff_fff0 || self.is_freezing() {
                let _ = answer.send(Answered::Unused(Error::Tunnel("the tunnel takes no more streams".into())));
                continue;
            }
            if self.streams.len() >= self.peer.max_streams as usize {
                self.waiting.push_front((block, reset_is_end, answer));
                return;
            }
            let id = self.next_id;
            self.next_id += 2;
            frame::put(&mut self.control, frame::HEADERS, frame::END_HEADERS, id, &block);
            let mut stream = Stream::new(id, Phase::Asking(answer), self.peer.initial_window, self.stream_window);
            stream.reset_is_end = reset_is_end;
            self.streams.insert(stream);
        }
    }

    fn answer(&mut self, id: u32, block: &[u8], end: bool) {
        let Some(slot) = self.streams.slot_of(id) else { return };
        let Some(stream) = self.streams.at(slot) else { return };
        if !matches!(stream.phase, Phase::Asked { .. }) {
            return;
        }
        stream.phase = Phase::Open;
        self.temper.answered();
        let flags = if end { frame::END_HEADERS | frame::END_STREAM } else { frame::END_HEADERS };
        frame::put(&mut self.control, frame::HEADERS, flags, id, block);
        if end {
            let received_end = self.streams.at(slot).is_some_and(|stream| stream.received_end);
            if !received_end {
                // The peer need not send what nobody reads (RFC 9113 §8.1).
                frame::put(&mut self.control, frame::RST_STREAM, 0, id, &Reason::NO_ERROR.0.to_be_bytes());
                self.streams.note_reset(id);
            }
            self.forget(slot);
        }
    }

    /// Gives an application more of what waits for it.
    pub(super) fn drain_backlog(&mut self, slot: u32) {
        let Some(stream) = self.streams.at(slot) else { return };
        let before = stream.backlog.len();
        if before > 0 {
            let drained = stream.drain();
            self.backlog = self.backlog + stream.backlog.len() - before;
            self.took(slot, drained);
            self.credit_connection();
        }
    }

    /// The application took so many octets, or failed.
    pub(super) fn took(&mut self, slot: u32, outcome: io::Result<usize>) {
        match outcome {
            Ok(taken) => {
                self.credit(slot, taken);
                self.settle(slot);
            }
            Err(error) => self.abandon(slot, Ended::from_error(error), Some(Reason::CANCEL)),
        }
    }

    /// Passes an end on, and removes the stream when both directions are over.
    pub(super) fn settle(&mut self, slot: u32) {
        let Some(stream) = self.streams.at(slot) else { return };
        if let Err(error) = stream.pass_on_end() {
            return self.abandon(slot, Ended::from_error(error), Some(Reason::CANCEL));
        }
        if stream.is_finished() {
            if let Some(application) = stream.application() {
                application.conclude(Ended::Finished);
            }
            self.forget(slot);
        }
    }

    /// Ends a stream before its time: the application gets a reset, the peer too if `reason` says so.
    pub(super) fn abandon(&mut self, slot: u32, ended: Ended, reason: Option<Reason>) {
        let Some(mut stream) = self.streams.remove(slot) else { return };
        if let Some(reason) = reason {
            frame::put(&mut self.control, frame::RST_STREAM, 0, stream.id, &reason.0.to_be_bytes());
            self.streams.note_reset(stream.id);
        }
        self.let_go(&stream, slot);
        if let Phase::Relaying(application) = &mut stream.phase {
            let _ = crate::sys::socket::reset_on_close(&*application.socket);
            application.conclude(ended);
        }
        self.open_waiting();
    }

    fn forget(&mut self, slot: u32) {
        if let Some(stream) = self.streams.remove(slot) {
            self.let_go(&stream, slot);
        }
        self.open_waiting();
    }

    /// A stream is no more.
    fn let_go(&mut self, stream: &Stream, slot: u32) {
        if stream.queued {
            self.unqueue(slot);
        }
        self.credit.forget(slot);
        self.backlog -= stream.backlog.len();
        self.credit_connection();
    }

    /// No new streams; those that run may finish.
    fn drain(&mut self) {
        if self.life == Life::Live {
            // Streams that are on their way are still served (RFC 9113 §6.8); the answer to the PING says that no more are.
            self.life = Life::Draining { last: None };
            self.goaway(0x7fff_ffff, Reason::NO_ERROR);
            frame::put(&mut self.control, frame::PING, 0, 0, LAST_CALL);
        }
    }

    /// Whether an application that had finished sending is gone.
    pub(super) fn check_gone(&mut self, slot: u32) {
        let gone = self.streams.at(slot).and_then(Stream::application).and_then(Application::is_gone);
        if let Some(error) = gone {
            self.abandon(slot, Ended::from_error(error), Some(Reason::CANCEL));
        }
    }

    /// The end of the connection: says why, writes what it can, and lets go of every stream.
    pub(super) fn close(&mut self, reason: Reason, failure: Option<Error>) {
        if matches!(self.life, Life::Closing(_)) {
            return;
        }
        self.goaway(self.last_peer_id, reason);
        self.life = Life::Closing(Instant::now() + super::LINGER);
        self.timer.as_mut().reset(Instant::now() + super::LINGER);
        let revoked = matches!(failure, Some(Error::Revoked));
        self.failure = failure;
        for slot in self.streams.slots() {
            let cut = || Ended::Disconnected(io::ErrorKind::ConnectionAborted.into());
            self.abandon(slot, if revoked { Ended::Failed(io::Error::other(Error::Revoked)) } else { cut() }, None);
        }
        self.waiting.clear();
        command::refuse(self.inbox.close());
    }

    /// Whether nothing is left to do.
    fn is_over(&mut self) -> bool {
        let silent = self.output.range.is_empty() && self.control.is_empty();
        match self.life {
            Life::Closing(_) => silent,
            Life::Draining { last: Some(_) } if self.streams.len() == 0 => {
                self.close(Reason::NO_ERROR, None);
                false
            }
            Life::Live if (self.released || self.goaway_received) && self.streams.len() == 0 && self.waiting.is_empty() => {
                self.close(Reason::NO_ERROR, None);
                false
            }
            _ => false,
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        command::refuse(self.inbox.close());
        for slot in self.streams.slots() {
            self.abandon(slot, Ended::Disconnected(io::ErrorKind::ConnectionAborted.into()), None);
        }
    }
}

impl Tunnel {
    /// Whether the peer's first SETTINGS have come.
    pub(in crate::hbone) fn is_settled(&self) -> bool {
        self.peer.known
    }

    /// Moves everything on that can move.
    pub(in crate::hbone) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Next> {
        for _ in 0..TURNS {
            let mut busy = self.attend(context);
            if self.hand_out(&mut busy) {
                return Poll::Ready(Next::Over(Ok(())));
            }
            busy |= self.receive(context);
            busy |= self.transmit(context);
            if let Some(asked) = self.asked.pop_front() {
                return Poll::Ready(Next::Asked(asked));
            }
            if self.is_over() {
                return Poll::Ready(Next::Over(self.failure.take().map_or(Ok(()), Err)));
            }
            busy |= self.watch_clock(context);
            if !busy {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}
