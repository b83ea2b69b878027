//! The serving side: TLS, then the requests of one tunnel.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::engine::{self, Asked, Command, Established};
use super::stream::TunnelStream;
use super::{BadRequest, Config, ConnectRequest, ConnectResponse, Error, Refusal, hpack};
use crate::identity::{Credential, peer_identity};
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::model::SpiffeId;

/// A tunnel that a verified peer opened to us.
pub struct ServerTunnel {
    peer: SpiffeId,
    address: SocketAddr,
    established: Established,
    config: Arc<Config>,
}

/// Finishes the TLS handshake on an accepted socket within [`Config::handshake_deadline`]; the peer's first SETTINGS have as long again.
pub async fn accept(socket: TcpStream, address: SocketAddr, credential: &Credential, config: &Arc<Config>) -> Result<ServerTunnel, Error> {
    match tokio::time::timeout(config.handshake_deadline, Box::pin(engine::welcome(socket, credential))).await {
        Ok(established) => {
            let established = established?;
            let peer = peer_identity(&established.chain)?;
            Ok(ServerTunnel { peer, address, established, config: config.clone() })
        }
        Err(_) => Err(Error::HandshakeDeadline(config.handshake_deadline)),
    }
}

impl ServerTunnel {
    /// Who opened the tunnel.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// The peer's address.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the peer leaves, stops answering PINGs, or a drain ends it. A graceful drain sends GOAWAY and lets streams finish; an
    /// immediate one drops everything.
    pub async fn serve(self, mut drain: DrainWatcher, mut on_request: impl FnMut(Incoming) + Send + 'static) -> Result<(), Error> {
        let tunnel = engine::server(self.established, self.config, move |asked| on_request(Incoming::new(asked)))?;
        let inbox = tunnel.inbox().clone();
        let told = async move {
            if drain.signaled().await == DrainMode::Graceful {
                // A tunnel that has ended needs no drain.
                let _ = inbox.send(Command::Drain);
                drain.forced().await;
            }
        };
        tokio::select! {
            biased;
            () = told => Ok(()),
            outcome = tunnel => outcome,
        }
    }
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
    pub fn accept(self, response: &ConnectResponse) -> Result<TunnelStream, Error> {
        self.answer.send(response.block(), false)?;
        Ok(self.stream)
    }
}
