//! One stream: its windows, its application's socket, and what waits for that socket.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::dial::StreamSlot;
use super::super::stream::Role;
use super::command::{Answered, Attach, Command};
use super::ready::{Inbox, StreamWaker};
use super::spare;
use crate::forward::Ended;
use crate::sys::stream_io::{self, Next};
use crate::telemetry::Meter;

/// The application's side of a stream.
pub(super) struct Application {
    pub(super) socket: Arc<TcpStream>,
    slot: Option<StreamSlot>,
    /// Resolves when an application that has finished sending closes altogether: nothing else would tell.
    vanished: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pub(super) role: Role,
    meter: Arc<Meter>,
    done: Option<oneshot::Sender<Ended>>,
    waker: Waker,
    wake: Arc<StreamWaker<Command>>,
}

impl Application {
    pub(super) fn new(attach: Attach, wake: Arc<StreamWaker<Command>>) -> Self {
        let Attach { socket, role, meter, done, slot, .. } = attach;
        let waker = Waker::from(wake.clone());
        Self { socket: Arc::new(socket), slot, vanished: None, role, meter, done: Some(done), waker, wake }
    }

    /// Begins to watch for a socket that closes altogether after its end.
    fn watch(&mut self) {
        let socket = self.socket.clone();
        self.vanished = Some(Box::pin(async move {
            // Errors of the watch itself say the same.
            let _ = socket.ready(Interest::ERROR).await;
        }));
    }

    /// Why the socket is gone, if it is.
    pub(super) fn is_gone(&mut self) -> Option<io::Error> {
        let vanished = self.vanished.as_mut()?;
        if vanished.as_mut().poll(&mut Context::from_waker(&self.waker)).is_pending() {
            return None;
        }
        self.vanished = None;
        let error = self.socket.take_error().ok().flatten();
        Some(error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
    }

    pub(super) fn count_to_peer(&self, bytes: usize) {
        match self.role {
            Role::Client => self.meter.received(bytes as u64),
            Role::Server => self.meter.sent(bytes as u64),
        }
    }

    fn count_from_peer(&self, bytes: usize) {
        match self.role {
            Role::Client => self.meter.sent(bytes as u64),
            Role::Server => self.meter.received(bytes as u64),
        }
    }

    pub(super) fn seen(&self) {
        self.wake.seen();
    }

    /// Whether the socket may have something to read; if not, the stream is woken when it does.
    pub(super) fn is_readable(&self) -> bool {
        self.socket.poll_read_ready(&mut Context::from_waker(&self.waker)).is_ready()
    }

    /// Whether the socket has bytes to read before its end; if neither has come, the stream is woken when something does.
    pub(super) fn has_more(&self) -> Poll<io::Result<bool>> {
        let mut octet = [0];
        self.socket.poll_peek(&mut Context::from_waker(&self.waker), &mut ReadBuf::new(&mut octet)).map_ok(|count| count > 0)
    }

    fn is_writable(&self) -> bool {
        self.socket.poll_write_ready(&mut Context::from_waker(&self.waker)).is_ready()
    }

    /// Tells whoever waits how it ended.
    pub(super) fn conclude(&mut self, ended: Ended) {
        if let Some(done) = self.done.take() {
            // Nobody may be waiting any more.
            let _ = done.send(ended);
        }
    }
}

/// How far a stream has come.
pub(super) enum Phase {
    /// We asked, and wait for the answer.
    Asking(oneshot::Sender<Answered>),
    /// We were asked; the sender tells whoever decides that the peer gave up.
    Asked { _abandoned: oneshot::Sender<()> },
    /// Answered with 200, no application yet.
    Open,
    /// Moving bytes.
    Relaying(Application),
}

/// One stream of a tunnel.
pub(super) struct Stream {
    pub(super) id: u32,
    pub(super) phase: Phase,
    /// Octets that the peer lets us send.
    pub(super) send_window: i64,
    /// Octets that the peer may still send: at most 2^31 - 1 (RFC 9113 §6.9.1), and after a frame too many as much below zero as a frame is long.
    pub(super) receive_window: i32,
    /// The last credit that the peer was given.
    pub(super) granted: Granted,
    /// What a reset with CONNECT_ERROR means; see [`ConnectRequest::reset_is_end`](crate::hbone::ConnectRequest::reset_is_end).
    pub(super) reset_is_end: bool,
    /// Octets that the application took and the peer has no credit for yet.
    pub(super) owed: u32,
    /// The window that we want the peer to have; grows while the application keeps up.
    pub(super) target_window: u32,
    /// We sent END_STREAM, or may not send any more.
    pub(super) sent_end: bool,
    /// The peer sent END_STREAM.
    pub(super) received_end: bool,
    /// The application was told so.
    pub(super) shut_down: bool,
    /// It is in the queue of streams that may have something to send.
    pub(super) queued: bool,
    /// It sends little: its last turn fitted into one record, unless it was cut short.
    pub(super) sparse: bool,
    /// Received and not yet taken by the application.
    pub(super) backlog: Backlog,
}

/// The two increments of a window that were sent last: the peer may not have seen them yet.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Granted([u32; 2]);

impl Granted {
    pub(super) fn note(&mut self, increment: u32) {
        self.0 = [increment, self.0[0]];
    }

    /// Whether a peer with `window` left of what we have granted may be one that waits for more: it has used exactly what it had, now or before our
    /// last words reached it.
    pub(super) fn may_be_waited_for(&self, window: i64) -> bool {
        let [last, before] = self.0.map(i64::from);
        window <= 0 || window == last || window == last + before
    }
}

/// Bytes that the application has not taken yet. Empty, it owns no memory.
#[derive(Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    taken: usize,
}

impl Backlog {
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.taken
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.bytes.capacity() == 0 && !bytes.is_empty() {
            self.bytes = spare::take();
        }
        if self.taken > 0 && self.taken >= self.bytes.len() / 2 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn front(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }

    fn take(&mut self, count: usize) {
        self.taken += count;
        if self.is_empty() {
            spare::give(std::mem::take(self).bytes);
        }
    }
}

impl Stream {
    pub(super) fn new(id: u32, phase: Phase, send_window: i64, receive_window: u32) -> Self {
        Self {
            id,
            phase,
            send_window,
            receive_window: i32::try_from(receive_window).unwrap_or(i32::MAX),
            granted: Granted::default(),
            reset_is_end: false,
            owed: 0,
            target_window: receive_window,
            sent_end: false,
            received_end: false,
            shut_down: false,
            queued: false,
            sparse: true,
            backlog: Backlog::default(),
        }
    }

    pub(super) fn application(&mut self) -> Option<&mut Application> {
        match &mut self.phase {
            Phase::Relaying(application) => Some(application),
            _ => None,
        }
    }

    /// Gives the application the spans of `buffer`; what it does not take goes to the backlog. Returns how many octets it took.
    pub(super) fn deliver(&mut self, buffer: &[u8], spans: &[Range<usize>], next: Next) -> io::Result<usize> {
        let total: usize = spans.iter().map(Range::len).sum();
        let mut taken = 0;
        if self.backlog.is_empty()
            && let Phase::Relaying(application) = &mut self.phase
            && !self.shut_down
        {
            taken = write_spans(&application.socket, buffer, spans, next)?;
            application.count_from_peer(taken);
        }
        if taken < total {
            let mut skip = taken;
            for span in spans {
                let passed = skip.min(span.len());
                skip -= passed;
                self.backlog.push(buffer.get(span.start + passed..span.end).unwrap_or_default());
            }
            // Registers for the wake-up, or finds that the socket takes more by now.
            taken += self.drain()?;
        }
        Ok(taken)
    }

    /// Writes the backlog as far as the application takes it; returns how many octets it took.
    pub(super) fn drain(&mut self) -> io::Result<usize> {
        let Phase::Relaying(application) = &mut self.phase else { return Ok(0) };
        let mut taken = 0;
        while !self.backlog.is_empty() && application.is_writable() {
            match stream_io::write(&application.socket, self.backlog.front()) {
                Ok(count) => {
                    self.backlog.take(count);
                    taken += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        application.count_from_peer(taken);
        Ok(taken)
    }

    /// Passes the peer's end on to the application once it has everything.
    pub(super) fn pass_on_end(&mut self) -> io::Result<()> {
        if !self.received_end || self.shut_down || !self.backlog.is_empty() {
            return Ok(());
        }
        let Phase::Relaying(application) = &mut self.phase else { return Ok(()) };
        self.shut_down = true;
        if self.sent_end {
            // The stream is over: who sees its end may open the next one. The socket is closed next, which says all that a shutdown would.
            application.slot = None;
            return Ok(());
        }
        application.meter.half_close();
        match socket2::SockRef::from(&application.socket).shutdown(std::net::Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(()),
        }
    }

    /// Our END_STREAM is on its way.
    pub(super) fn end_sent(&mut self) {
        self.sent_end = true;
        self.queued = false;
        if !self.shut_down
            && let Phase::Relaying(application) = &mut self.phase
        {
            application.meter.half_close();
            application.watch();
        }
    }

    /// Both directions have ended and were passed on.
    pub(super) fn is_finished(&self) -> bool {
        self.sent_end && self.shut_down
    }
}

/// At most this many pieces go into one write.
const MAX_PIECES: usize = 64;

fn write_spans(socket: &TcpStream, buffer: &[u8], spans: &[Range<usize>], next: Next) -> io::Result<usize> {
    let mut written = 0;
    for group in spans.chunks(MAX_PIECES) {
        let mut pieces = [IoSlice::new(&[]); MAX_PIECES];
        let mut asked = 0;
        for (piece, span) in pieces.iter_mut().zip(group) {
            let bytes = buffer.get(span.clone()).unwrap_or_default();
            asked += bytes.len();
            *piece = IoSlice::new(bytes);
        }
        let outcome = stream_io::write_vectored(socket, pieces.get(..group.len()).unwrap_or_default(), next);
        match outcome {
            Ok(count) => {
                written += count;
                if count < asked {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Spreads stream ids. The peer chooses half of them, but a few hundred at most are open at once: nothing to gain from collisions.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        // 2^64 over the golden ratio: neighbours end up far apart, in the high bits too.
        self.0 = (self.0 ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

/// All streams of a tunnel: slots that are used again, found by stream id.
#[derive(Default)]
pub(super) struct Streams {
    slots: Vec<Option<Box<Stream>>>,
    free: Vec<u32>,
    by_id: HashMap<u32, u32, BuildHasherDefault<IdHasher>>,
    /// Streams that we reset a moment ago: what the peer had sent by then is no error of its.
    reset: HashMap<u32, Instant>,
    /// The same in the order of their ends, so that the old ones are found without a search.
    reset_in_order: VecDeque<u32>,
}

/// Streams that we reset and whose late frames we ignore, and for how long: less when there are more of them, as when an application aborts a thousand
/// connections a second, where a round trip is what matters.
const RESET_STREAMS: usize = 1024;
const RESET_MEMORY: Duration = Duration::from_secs(10);

impl Streams {
    /// Remembers that we reset a stream.
    pub(super) fn note_reset(&mut self, id: u32) {
        while let Some(oldest) = self.reset_in_order.front().copied().filter(|oldest| !self.was_reset(*oldest)) {
            self.reset.remove(&oldest);
            self.reset_in_order.pop_front();
        }
        self.remember_reset(id, Instant::now());
    }

    /// The streams that we reset, and when.
    pub(super) fn recently_reset(&self) -> impl Iterator<Item = (u32, Instant)> {
        self.reset_in_order.iter().filter_map(|id| self.reset.get(id).map(|since| (*id, *since)))
    }

    /// Puts back what [`Streams::recently_reset`] told.
    pub(super) fn remember_reset(&mut self, id: u32, since: Instant) {
        if self.reset.insert(id, since).is_none() {
            self.reset_in_order.push_back(id);
        }
        if self.reset.len() > RESET_STREAMS
            && let Some(oldest) = self.reset_in_order.pop_front()
        {
            self.reset.remove(&oldest);
        }
    }

    pub(super) fn was_reset(&self, id: u32) -> bool {
        self.reset.get(&id).is_some_and(|since| since.elapsed() < RESET_MEMORY)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn insert(&mut self, stream: Stream) -> u32 {
        let id = stream.id;
        let boxed = Some(Box::new(stream));
        let slot = match self.free.pop() {
            Some(slot) => {
                if let Some(place) = self.slots.get_mut(slot as usize) {
                    *place = boxed;
                }
                slot
            }
            None => {
                self.slots.push(boxed);
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.by_id.insert(id, slot);
        slot
    }

    pub(super) fn slot_of(&self, id: u32) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    pub(super) fn at(&mut self, slot: u32) -> Option<&mut Stream> {
        self.slots.get_mut(slot as usize)?.as_deref_mut()
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<Box<Stream>> {
        let stream = self.slots.get_mut(slot as usize)?.take()?;
        self.by_id.remove(&stream.id);
        self.free.push(slot);
        Some(stream)
    }

    pub(super) fn slots(&self) -> Vec<u32> {
        self.by_id.values().copied().collect()
    }
}

pub(super) type Wakes = Arc<Inbox<Command>>;

#[cfg(test)]
mod tests {
    use super::*;

    /// The next size that allocators have is 192.
    #[tokio::test(start_paused = true)]
    async fn resets_are_remembered_for_ten_seconds_and_a_thousand_at_most() {
        let mut streams = Streams::default();
        let limit = u32::try_from(RESET_STREAMS).unwrap_or(u32::MAX);
        for id in 0..limit / 2 {
            streams.note_reset(id);
        }
        tokio::time::advance(RESET_MEMORY / 2).await;
        for id in limit / 2..limit + 10 {
            streams.note_reset(id);
        }
        assert!(streams.was_reset(limit + 9) && !streams.was_reset(9) && streams.was_reset(10), "the youngest are what matters");
        tokio::time::advance(RESET_MEMORY / 2).await;
        streams.note_reset(limit);
        assert!(!streams.was_reset(10) && streams.was_reset(limit / 2) && streams.was_reset(limit));
        let mut kept: Vec<u32> = streams.recently_reset().map(|(id, _)| id).collect();
        kept.sort_unstable();
        assert_eq!(kept, (limit / 2..limit + 10).collect::<Vec<_>>(), "the old ones have made room");
    }

    #[test]
    fn a_stream_fits_into_160_bytes() {
        assert!(size_of::<Stream>() <= 160, "{}", size_of::<Stream>());
    }
}
