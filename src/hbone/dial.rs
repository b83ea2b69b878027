//! The dialling side: TCP, TLS, HTTP/2, and streams on the tunnel that results.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::accept::{cut_when_revoked, watch_moved};
use super::engine::{self, Answered, Command, Inbox, Next, STARVED, Side, Thawed, Tunnel};
use super::lifetime::Lifetime;
use super::moving::{Immovable, MovedStream, Mover, Origin};
use super::stream::{Relaying, TunnelStream};
use super::{ConnectRequest, ConnectResponse, Endpoint, Error, Frozen};
use crate::forward::Ended;
use crate::identity::{Credential, Revoked, expect_peer};
use crate::model::SpiffeId;
use crate::telemetry::Reporter;

/// How long the stream below a tunnel may take to end after the tunnel.
const FAREWELL: Duration = Duration::from_secs(1);

/// A tunnel that we opened. Dropping the last handle and the last stream closes it.
pub struct ClientTunnel {
    origin: Origin,
    inbox: Arc<Inbox<Command>>,
    state: Arc<State>,
    max_streams: usize,
}

/// Shared with the task that drives the connection and with the streams.
struct State {
    in_use: AtomicUsize,
    closed: AtomicBool,
    last_used: Mutex<Instant>,
    /// Why it ended, if not well.
    loss: OnceLock<String>,
}

/// A place among a tunnel's streams; given back when dropped.
pub(super) struct StreamSlot(Arc<State>);

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.touch();
        self.0.in_use.fetch_sub(1, Ordering::AcqRel);
    }
}

impl State {
    fn touch(&self) {
        // A poisoned lock holds a valid instant all the same.
        *self.last_used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn idle_for(&self) -> Option<Duration> {
        let last = *self.last_used.lock().unwrap_or_else(PoisonError::into_inner);
        (self.in_use.load(Ordering::Acquire) == 0).then(|| last.elapsed())
    }
}

/// What a tunnel is made on.
pub(super) struct Way {
    pub(super) socket: TcpStream,
    /// The peer, for messages.
    pub(super) address: SocketAddr,
    /// The stream of another tunnel on whose application side the socket is. It may finish when the tunnel has ended.
    pub(super) outer: Option<Relaying>,
}

/// Makes a tunnel on a connected socket: TLS with our credential within
/// [`Config::handshake_deadline`](super::Config::handshake_deadline), and the peer must be one of `expected`. Streams may be opened before the
/// peer's first SETTINGS arrive, which saves a round trip; a peer that has not sent them by the deadline loses the tunnel.
pub(super) async fn handshake(way: Way, credential: &Credential, expected: &[SpiffeId], endpoint: &Arc<Endpoint>) -> Result<ClientTunnel, Error> {
    let Way { socket, address, outer } = way;
    let deadline = endpoint.config.handshake_deadline;
    let established = match tokio::time::timeout(deadline, Box::pin(engine::connect(socket, credential))).await {
        Ok(established) => established?,
        Err(_) => return Err(Error::HandshakeDeadline(deadline)),
    };
    let peer = expect_peer(&established.chain, expected)?;
    let mut origin = Origin::new(peer, &established, credential, endpoint);
    if outer.is_some() {
        origin.immovable = Some(Immovable::Within);
    }
    let revoked = credential.watch_peer(&established.chain, Reporter::Source);
    let tunnel = Tunnel::new(established, Side::Client, endpoint.clone())?;
    Ok(ClientTunnel::start(tunnel, (origin, revoked), (address, outer), endpoint))
}

/// Takes a frozen tunnel up, with its streams; they have their places among the tunnel's again.
pub(super) fn take_up(frozen: Frozen, credential: &Credential, endpoint: &Arc<Endpoint>) -> Result<(ClientTunnel, Vec<MovedStream>), Error> {
    let Thawed { origin, address, tunnel, streams, leaving } = frozen.thaw(Side::Client, endpoint)?;
    let revoked = watch_moved(&origin, (credential, Reporter::Source), endpoint);
    let tunnel = ClientTunnel::start(tunnel, (origin, revoked), (address, None), endpoint);
    tunnel.state.closed.store(leaving, Ordering::Release);
    let (state, inbox) = (&tunnel.state, &tunnel.inbox);
    let streams = streams.into_iter().map(|(id, role, socket)| {
        state.in_use.fetch_add(1, Ordering::AcqRel);
        let slot = StreamSlot(state.clone());
        MovedStream::new(TunnelStream::new(id, inbox.clone(), Some(slot)), role, socket)
    });
    let streams = streams.collect();
    Ok((tunnel, streams))
}

/// Owns the tunnel until it ends.
async fn drive(mut tunnel: Box<Tunnel>, (lifetime, revoked): (Lifetime, Revoked), state: Arc<State>, address: SocketAddr) {
    let revoked = cut_when_revoked(revoked, tunnel.inbox().clone());
    let expired = async {
        sleep_until(lifetime.farewell).await;
        // New streams take a new tunnel, made with new certificates.
        state.closed.store(true, Ordering::Release);
        sleep_until(lifetime.end).await;
    };
    let over = poll_fn(|context| match tunnel.poll_next(context) {
        Poll::Ready(Next::Over(outcome)) => Poll::Ready(outcome),
        // A server asks nothing: the request was refused below.
        Poll::Ready(Next::Asked(_)) | Poll::Pending => Poll::Pending,
    });
    tokio::select! {
        biased;
        () = expired => tracing::warn!(peer = %address, "tunnel cut: a certificate of it expired a minute ago"),
        () = revoked => {}
        outcome = over => if let Err(error) = outcome {
            tracing::warn!(peer = %address, %error, "tunnel lost");
            // Nobody else writes it.
            let _ = state.loss.set(error.to_string());
        },
    }
    state.closed.store(true, Ordering::Release);
}

/// Drives a tunnel that is within a stream of another.
async fn drive_within(driven: impl Future<Output = ()>, mut outer: Relaying, inbox: &Inbox<Command>) {
    let mut driven = pin!(driven);
    tokio::select! {
        biased;
        ended = &mut outer => {
            // Nobody is believed who came through a revoked gateway; this tunnel is about to find its socket closed.
            if let Ended::Failed(error) = ended && error.get_ref().is_some_and(|cause| matches!(cause.downcast_ref(), Some(Error::Revoked))) {
                let _ = inbox.send(Command::Revoke);
            }
            driven.await;
        }
        () = &mut driven => {
            // The outer stream's peer has nothing left to say to us; one that does not end its direction gets a reset.
            let _ = tokio::time::timeout(FAREWELL, outer).await;
        }
    }
}

impl Drop for ClientTunnel {
    fn drop(&mut self) {
        // Closes when the last stream is done; a tunnel that has ended needs nothing.
        let _ = self.inbox.send(Command::Release);
    }
}

impl ClientTunnel {
    /// Begins to drive a tunnel.
    fn start(
        tunnel: Box<Tunnel>,
        (origin, revoked): (Origin, Revoked),
        (address, outer): (SocketAddr, Option<Relaying>),
        endpoint: &Endpoint,
    ) -> Self {
        let state = Arc::new(State {
            in_use: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            last_used: Mutex::new(Instant::now()),
            loss: OnceLock::new(),
        });
        let inbox = tunnel.inbox().clone();
        let driven = drive(tunnel, (origin.lifetime, revoked), state.clone(), address);
        let below = inbox.clone();
        tokio::spawn(async move {
            match outer {
                Some(outer) => drive_within(driven, outer, &below).await,
                None => driven.await,
            }
        });
        Self { origin, inbox, state, max_streams: usize::from(endpoint.config.pool_max_streams) }
    }

    /// Who can freeze this tunnel.
    #[must_use]
    pub fn mover(&self) -> Mover {
        Mover::new(self.inbox.clone(), self.origin.clone())
    }

    /// The verified peer.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.origin.peer
    }

    /// Whether no more streams can be opened.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.closed.load(Ordering::Acquire) || self.inbox.is_closed()
    }

    /// Why a tunnel that is closed is.
    pub(super) fn loss(&self) -> Error {
        Error::Tunnel(self.state.loss.get().map_or_else(|| "the peer closed it before it could be used".to_owned(), String::clone))
    }

    /// How long no stream has used it; `None` while one does.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        self.state.idle_for()
    }

    /// Breaks the tunnel and all of its streams at once.
    pub fn abort(&self) {
        self.state.closed.store(true, Ordering::Release);
        let _ = self.inbox.send(Command::Abort);
    }

    /// Whether the peer withholds the credit of streams that are no more.
    pub(super) fn is_spent(&self) -> bool {
        self.inbox.short_for() >= STARVED && self.state.in_use.load(Ordering::Acquire) == 0
    }

    /// Takes a place for one more stream if there is one, and bytes of it would get through.
    pub(super) fn reserve(&self) -> Option<StreamSlot> {
        if self.is_closed() || self.inbox.short_for() >= STARVED {
            return None;
        }
        let most = self.max_streams.min(self.inbox.streams()).max(1);
        let taken = self.state.in_use.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| (used < most).then_some(used + 1));
        taken.ok().map(|_| StreamSlot(self.state.clone()))
    }

    /// Sends one CONNECT and waits for its 200.
    pub(super) async fn open(&self, slot: StreamSlot, request: &ConnectRequest) -> Result<(TunnelStream, ConnectResponse), OpenError> {
        let (answer, answered) = oneshot::channel();
        let gone = || Error::Tunnel("the tunnel is gone".into());
        if self.inbox.send(Command::Open { block: request.block(), reset_is_end: request.reset_is_end, answer }).is_err() {
            return Err(self.unusable(gone()));
        }
        let waiting = Waiting(&self.inbox);
        let answered = answered.await;
        std::mem::forget(waiting);
        match answered {
            Ok(Answered::Open(id, response)) => Ok((TunnelStream::new(id, self.inbox.clone(), Some(slot)), response)),
            Ok(Answered::Unused(error)) => Err(self.unusable(error)),
            Ok(Answered::Failed(error)) => Err(OpenError::Failed(error)),
            Err(_) => Err(OpenError::Failed(gone())),
        }
    }

    fn unusable(&self, error: Error) -> OpenError {
        self.state.closed.store(true, Ordering::Release);
        OpenError::Unusable(error)
    }
}

/// Tells the tunnel when the one who asked leaves before the answer.
struct Waiting<'a>(&'a Inbox<Command>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let _ = self.0.send(Command::Sweep);
    }
}

/// Why a stream could not be opened on a tunnel.
pub(super) enum OpenError {
    /// The tunnel takes no more streams and did nothing with this one: try another.
    Unusable(Error),
    /// The request itself failed.
    Failed(Error),
}
