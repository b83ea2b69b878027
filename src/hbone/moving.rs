//! Moving live tunnels to a successor: freezing one that runs, and what its streams are until somebody relays them again.
//!
//! `Mover::freeze` → [`Frozen`] → bytes and sockets → `Frozen::from_parts` → [`ServerTunnel::take_up`](super::ServerTunnel::take_up) or
//! [`Pool::take_up`](super::Pool::take_up). Only the tunnel moves. What the proxy knows about a stream (its policy watch, the facts for the access
//! log, what it has counted) stays with the task that waits in [`TunnelStream::relay`], which ends with [`Ended::Moved`](crate::forward::Ended::Moved); that task passes it on
//! by the stream's id.
//!
//! The peer's certificates go along, so that a revocation list that comes later cuts the tunnel where it is then.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::engine::{Command, Established, Freeze, Frozen, Inbox};
use super::lifetime::Lifetime;
use super::stream::{Relaying, Role, TunnelStream};
use super::{Endpoint, Error};
use crate::identity::Credential;
use crate::model::SpiffeId;
use crate::sys::socket::reset_on_close;
use crate::telemetry::Meter;

/// Octets of a peer's certificates that are kept for a move. Those of a mesh are one to three of less than 2 KiB.
pub(super) const LARGEST_CHAIN: usize = 16 << 10;

/// What the handshake of a tunnel has shown.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) peer: SpiffeId,
    /// The peer's certificates, leaf first; none if they are larger than [`LARGEST_CHAIN`].
    pub(super) chain: Arc<[CertificateDer<'static>]>,
    pub(super) lifetime: Lifetime,
    /// Why the tunnel cannot move, if it cannot.
    pub(super) immovable: Option<Immovable>,
}

impl Origin {
    /// That of a tunnel over TCP between `credential` and the verified `peer`.
    pub(super) fn new(peer: SpiffeId, established: &Established, credential: &Credential, endpoint: &Endpoint) -> Self {
        let chain = &established.chain;
        let fits = chain.iter().map(|certificate| certificate.len()).sum::<usize>() <= LARGEST_CHAIN;
        Self {
            peer,
            chain: if fits { Arc::from(&**chain) } else { Arc::from([]) },
            lifetime: Lifetime::new(credential, chain, &endpoint.clock),
            immovable: established.older.then_some(Immovable::Older),
        }
    }
}

/// Why a tunnel cannot be moved to another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Immovable {
    /// The keys of TLS 1.2 are with a task of this process, which ends with it.
    #[error("it is of TLS 1.2, whose records a task of this process translates")]
    Older,
    /// It has no connection of its own.
    #[error("it is within a stream of another tunnel, and has no connection of its own")]
    Within,
}

/// Freezes one tunnel.
#[derive(Clone)]
pub struct Mover {
    inbox: Arc<Inbox<Command>>,
    origin: Origin,
}

impl Mover {
    pub(super) fn new(inbox: Arc<Inbox<Command>>, origin: Origin) -> Self {
        Self { inbox, origin }
    }

    /// Who the tunnel is with.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.origin.peer
    }

    /// Takes the tunnel from its task, between two records. From now on it takes no new requests: those of the peer are reset with
    /// REFUSED_STREAM, ours go to another tunnel. Requests that are not answered yet, and streams that have no application yet, get `patience` to
    /// get there; then the peer's are reset with REFUSED_STREAM, ours with CANCEL, and whoever waits for one of ours is told to try another
    /// tunnel. Streams that move bytes all come along; the relay of each ends with [`Ended::Moved`](crate::forward::Ended::Moved).
    ///
    /// Dropping the future calls it off, and the tunnel serves on (a pooled one that has sent a request of ours elsewhere takes no new streams).
    ///
    /// # Errors
    /// [`Error::Immovable`] for a tunnel that cannot move, which notices nothing. Others when the tunnel has ended or ends meanwhile, somebody else asks for the same, or (the tunnel serves on) there are no descriptors left.
    pub async fn freeze(&self, patience: Duration) -> Result<Frozen, Error> {
        if let Some(why) = self.origin.immovable {
            return Err(Error::Immovable(why));
        }
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
        let freeze = Freeze { origin: self.origin.clone(), now, give };
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::hbone::dial::{Way, handshake};
    use crate::hbone::{Config, accept};
    use crate::identity::{self, Credentials, LocalIssuer};
    use crate::lifecycle::Clock;
    use crate::sys::socket::pair;

    #[tokio::test]
    async fn a_tunnel_within_another_is_not_frozen_and_goes_on() {
        let (directory, clock) = (tempfile::tempdir().unwrap(), Clock::system());
        LocalIssuer::create(directory.path(), &clock).unwrap();
        let issuer = LocalIssuer::load(directory.path(), clock.clone()).unwrap();
        let (credentials, renewal) = Credentials::new(identity::Config::default(), Arc::new(issuer), clock);
        let renewal = tokio::spawn(renewal);
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/both".parse().unwrap();
        let credential = credentials.fetch(&id).await.unwrap();
        let endpoint = Arc::new(Endpoint::new(Config::default()));
        let sockets = || {
            let (near, far) = pair().unwrap();
            (TcpStream::from_std(near).unwrap(), TcpStream::from_std(far).unwrap())
        };
        let ((below, _beneath), (near, far)) = (sockets(), sockets());
        // A stream of a tunnel that nobody drives.
        let outer = TunnelStream::new(1, Inbox::new(), None).relay(below, Role::Client, &Arc::default());
        let address = ([10, 0, 0, 1], 15008).into();
        let way = Way { socket: near, address, outer: Some(outer) };
        let expected = [id];
        let (inner, served) = tokio::join!(handshake(way, &credential, &expected, &endpoint), accept(far, address, &credential, &endpoint));
        let (inner, _served) = (inner.unwrap(), served.unwrap());
        let refused = inner.mover().freeze(Duration::from_secs(10)).await;
        assert!(matches!(refused, Err(Error::Immovable(Immovable::Within))));
        assert!(!inner.is_closed() && inner.reserve().is_some());
        renewal.abort();
    }
}
