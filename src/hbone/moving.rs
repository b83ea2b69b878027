//! Moving live tunnels to a successor: freezing one that runs, and what its streams are until somebody relays them again.
//!
//! `Mover::freeze` → [`Frozen`] → bytes and sockets → `Frozen::from_parts` → [`ServerTunnel::take_up`](super::ServerTunnel::take_up) or
//! [`Pool::take_up`](super::Pool::take_up). Only the tunnel moves. What the proxy knows about a stream (its policy watch, the facts for the access
//! log, what it has counted) stays with the task that waits in [`TunnelStream::relay`], which ends with [`Ended::Moved`](crate::forward::Ended::Moved); that task passes it on
//! by the stream's id.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::Error;
use super::engine::{Command, Freeze, Frozen, Inbox};
use super::lifetime::Lifetime;
use super::stream::{Relaying, Role, TunnelStream};
use crate::model::SpiffeId;
use crate::sys::socket::reset_on_close;
use crate::telemetry::Meter;

/// Freezes one tunnel.
#[derive(Clone)]
pub struct Mover {
    inbox: Arc<Inbox<Command>>,
    peer: SpiffeId,
    lifetime: Lifetime,
}

impl Mover {
    pub(super) fn new(inbox: Arc<Inbox<Command>>, peer: SpiffeId, lifetime: Lifetime) -> Self {
        Self { inbox, peer, lifetime }
    }

    /// Who the tunnel is with.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Takes the tunnel from its task, between two records. From now on it takes no new requests: those of the peer are reset with
    /// REFUSED_STREAM, ours go to another tunnel. Requests that are not answered yet, and streams that have no application yet, get `patience` to
    /// get there; then the peer's are reset with REFUSED_STREAM, ours with CANCEL, and whoever waits for one of ours is told to try another
    /// tunnel. Streams that move bytes all come along; the relay of each ends with [`Ended::Moved`](crate::forward::Ended::Moved).
    ///
    /// Dropping the future calls it off, and the tunnel serves on (a pooled one that has sent a request of ours elsewhere takes no new streams).
    ///
    /// # Errors
    /// When the tunnel has ended or ends meanwhile, somebody else asks for the same, or (the tunnel serves on) there are no descriptors left.
    pub async fn freeze(&self, patience: Duration) -> Result<Frozen, Error> {
        let mut given = self.ask(false)?;
        match tokio::time::timeout(patience, &mut given).await {
            Ok(outcome) => return outcome.unwrap_or_else(|_| Err(gone())),
            Err(_) => given.close(),
        }
        // It may have been given at the last moment.
        match given.try_recv() {
            Ok(outcome) => outcome,
            Err(_) => self.ask(true)?.await.unwrap_or_else(|_| Err(gone())),
        }
    }

    fn ask(&self, now: bool) -> Result<oneshot::Receiver<Result<Frozen, Error>>, Error> {
        let (give, given) = oneshot::channel();
        let freeze = Freeze { peer: self.peer.clone(), lifetime: self.lifetime, now, give };
        self.inbox.send(Command::Freeze(Box::new(freeze))).map_err(|_| gone())?;
        Ok(given)
    }
}

fn gone() -> Error {
    Error::Tunnel("the tunnel is gone".into())
}

/// A stream of a tunnel that was taken up, with its application's socket. Dropped, it is reset on both sides.
pub struct MovedStream {
    stream: TunnelStream,
    socket: TcpStream,
    role: Role,
}

impl MovedStream {
    pub(super) fn new(stream: TunnelStream, role: Role, socket: TcpStream) -> Self {
        // Until it is relayed again. A socket that refuses the option is closed all the same.
        let _ = reset_on_close(&socket);
        Self { stream, socket, role }
    }

    /// The id that it had in [`Frozen::streams`].
    #[must_use]
    pub fn id(&self) -> u32 {
        self.stream.id()
    }

    /// On which side of the tunnel its application is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Goes on with the relay, see [`TunnelStream::relay`]. `meter` counts from here on.
    pub fn relay(self, meter: &Arc<Meter>) -> Relaying {
        let _ = socket2::SockRef::from(&self.socket).set_linger(None);
        self.stream.relay(self.socket, self.role, meter)
    }
}
