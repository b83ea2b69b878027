//! The serving side: TLS, then the requests of one tunnel.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;

use tokio::net::TcpStream;
use tokio::time::sleep_until;

use super::engine::{self, Asked, Command, Next, Side, Thawed, Tunnel};
use super::moving::{MovedStream, Mover, Origin};
use super::stream::TunnelStream;
use super::{BadRequest, ConnectRequest, ConnectResponse, Endpoint, Error, Frozen, Refusal, hpack};
use crate::identity::{Credential, Revoked, peer_identity};
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::model::SpiffeId;
use crate::telemetry::Reporter;

/// A tunnel that a verified peer opened to us.
pub struct ServerTunnel {
    origin: Origin,
    address: SocketAddr,
    revoked: Revoked,
    tunnel: Box<Tunnel>,
    /// Requests that came together with the peer's first SETTINGS.
    first: Vec<Asked>,
}

/// Finishes the handshakes on an accepted socket: TLS, the HTTP/2 preface and the peer's first SETTINGS, all within
/// [`Config::handshake_deadline`](super::Config::handshake_deadline).
///
/// # Errors
/// Why the peer is not served. The socket is closed.
pub async fn accept(socket: TcpStream, address: SocketAddr, credential: &Credential, endpoint: &Arc<Endpoint>) -> Result<ServerTunnel, Error> {
    let handshake = async {
        let established = engine::welcome(socket, credential).await?;
        let peer = peer_identity(&established.chain)?;
        let origin = Origin::new(peer, &established, credential, endpoint);
        let revoked = credential.watch_peer(&established.chain, Reporter::Destination);
        let mut tunnel = Tunnel::new(established, Side::Server, endpoint.clone())?;
        let first = first_settings(&mut tunnel).await?;
        Ok(ServerTunnel { origin, address, revoked, tunnel, first })
    };
    let deadline = endpoint.config.handshake_deadline;
    match tokio::time::timeout(deadline, Box::pin(handshake)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::HandshakeDeadline(deadline)),
    }
}

/// A peer that stays silent must not be taken for one that is alive.
async fn first_settings(tunnel: &mut Tunnel) -> Result<Vec<Asked>, Error> {
    let mut first = Vec::new();
    poll_fn(|context| {
        loop {
            match tunnel.poll_next(context) {
                Poll::Ready(Next::Asked(asked)) => first.push(asked),
                Poll::Ready(Next::Over(Err(error))) => return Poll::Ready(Err(Error::Handshake(error.to_string()))),
                Poll::Ready(Next::Over(Ok(()))) => return Poll::Ready(Err(Error::Handshake("the peer closed the connection".to_owned()))),
                Poll::Pending if tunnel.is_settled() => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await?;
    Ok(first)
}

impl ServerTunnel {
    /// Who opened the tunnel.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.origin.peer
    }

    /// The peer's address.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.address
    }

    /// Who can freeze this tunnel while it is served. [`ServerTunnel::serve`] then returns as if the peer had left.
    #[must_use]
    pub fn mover(&self) -> Mover {
        Mover::new(self.tunnel.inbox().clone(), self.origin.clone())
    }

    /// Takes a frozen tunnel up, with its streams. Nothing moves before [`ServerTunnel::serve`]. Its peer is watched for by the revocation lists of
    /// `credential`, that of the identity that the peer dialled. Must be called within a runtime.
    ///
    /// # Errors
    /// When it is not of the serving side, or its sockets cannot be registered. Its connections are reset.
    pub fn take_up(frozen: Frozen, credential: &Credential, endpoint: &Arc<Endpoint>) -> Result<(Self, Vec<MovedStream>), Error> {
        let Thawed { origin, address, tunnel, streams, .. } = frozen.thaw(Side::Server, endpoint)?;
        let revoked = watch_moved(&origin, (credential, Reporter::Destination), endpoint);
        let streams =
            streams.into_iter().map(|(id, role, socket)| MovedStream::new(TunnelStream::new(id, tunnel.inbox().clone(), None), role, socket));
        let streams = streams.collect();
        Ok((Self { origin, address, revoked, tunnel, first: Vec::new() }, streams))
    }

    /// Serves until the peer leaves, stops answering PINGs, misbehaves, or a drain or the end of a certificate ends it. A graceful drain sends
    /// GOAWAY and lets streams finish; an immediate one drops everything.
    ///
    /// # Errors
    /// Why the tunnel ended, unless the peer or a drain ended it in good order.
    pub async fn serve(self, mut drain: DrainWatcher, mut on_request: impl FnMut(Incoming)) -> Result<(), Error> {
        let Self { mut tunnel, origin: Origin { lifetime, .. }, revoked, first, .. } = self;
        let inbox = tunnel.inbox().clone();
        for asked in first {
            on_request(Incoming::new(asked));
        }
        let told = async {
            if drain.signaled().await == DrainMode::Graceful {
                // A tunnel that has ended needs no drain.
                let _ = inbox.send(Command::Drain);
                drain.forced().await;
            }
        };
        let expired = async {
            sleep_until(lifetime.farewell).await;
            let _ = inbox.send(Command::Drain);
            sleep_until(lifetime.end).await;
        };
        let revoked = cut_when_revoked(revoked, inbox.clone());
        let over = poll_fn(|context| {
            loop {
                match tunnel.poll_next(context) {
                    Poll::Ready(Next::Asked(asked)) => on_request(Incoming::new(asked)),
                    Poll::Ready(Next::Over(outcome)) => return Poll::Ready(outcome),
                    Poll::Pending => return Poll::Pending,
                }
            }
        });
        tokio::select! {
            biased;
            () = told => Ok(()),
            () = expired => Err(Error::Tunnel("a certificate of the tunnel expired a minute ago".to_owned())),
            () = revoked => Ok(()),
            outcome = over => outcome,
        }
    }
}

/// Watches over the peer of a tunnel that was taken up, as over one that has just been made.
pub(super) fn watch_moved(origin: &Origin, (credential, reporter): (&Credential, Reporter), endpoint: &Endpoint) -> Revoked {
    if origin.chain.is_empty() {
        endpoint.revocations.iter().for_each(|lists| lists.untracked(reporter));
        return None;
    }
    credential.watch_peer(&origin.chain, reporter)
}

/// Has the tunnel closed when a certificate of its peer is revoked; the tunnel's own end is then its outcome. Never resolves.
pub(super) async fn cut_when_revoked(revoked: Revoked, inbox: Arc<engine::Inbox<Command>>) {
    if let Some(revoked) = revoked {
        revoked.await;
        // One that has ended needs no cut.
        let _ = inbox.send(Command::Revoke);
    }
    std::future::pending().await
}

/// One CONNECT that waits for its answer. Dropped without one, its stream is reset.
pub struct Incoming {
    request: Result<ConnectRequest, BadRequest>,
    told: tokio::sync::oneshot::Receiver<()>,
    stream: TunnelStream,
    answer: Answer,
}

/// Where the answer goes.
struct Answer {
    id: u32,
    inbox: Arc<engine::Inbox<Command>>,
}

impl Answer {
    fn send(&self, block: Vec<u8>, end: bool) -> Result<(), Error> {
        let command = Command::Answer { id: self.id, block, end };
        self.inbox.send(command).map_err(|_| Error::Tunnel("the tunnel is gone".into()))
    }
}

impl Incoming {
    fn new(asked: Asked) -> Self {
        let Asked { id, fields, told, inbox } = asked;
        let stream = TunnelStream::new(id, inbox.clone(), None);
        Self { request: fields.into_request(), told, stream, answer: Answer { id, inbox } }
    }

    /// What is asked, or why it is no proper CONNECT.
    pub fn request(&self) -> Result<&ConnectRequest, &BadRequest> {
        self.request.as_ref()
    }

    /// Resolves when the peer gave the request up, so that work for it can stop.
    pub async fn abandoned(&mut self) {
        // The sender goes with the stream.
        let _ = (&mut self.told).await;
    }

    /// Answers without opening the tunnel stream: HEADERS with END_STREAM, no body.
    pub fn refuse(self, refusal: Refusal) {
        let mut block = Vec::new();
        hpack::status(refusal.status(), &mut block);
        // A peer that has left needs no answer.
        let _ = self.answer.send(block, true);
    }

    /// Answers 200 and hands over the stream.
    pub fn accept(mut self, response: &ConnectResponse) -> Result<TunnelStream, Error> {
        if matches!(self.told.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Closed)) {
            return Err(Error::Tunnel("the peer took the request back".to_owned()));
        }
        self.answer.send(response.block(), false)?;
        Ok(self.stream)
    }
}
