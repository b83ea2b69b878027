//! The serving side: TLS, the HTTP/2 handshake, and the requests of one tunnel.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::keepalive::keep_alive;
use super::stream::TunnelStream;
use super::{BadRequest, Config, ConnectRequest, ConnectResponse, Error, Refusal};
use crate::identity::{Credential, peer_identity};
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::model::SpiffeId;

/// Bytes that may wait per stream for the peer's window before the relay stops reading the application.
const SEND_BUFFER: usize = 400 << 10;
/// h2 charges each unread DATA frame under 256 bytes against this budget and closes the whole tunnel when it is spent. One slow reader of
/// small writes must not take its neighbours down, so the budget allows every stream of a full tunnel 128 KiB of one-byte frames' charge.
const SMALL_FRAME_BUDGET: usize = 32 << 20;

/// A tunnel that a verified peer opened to us.
pub struct ServerTunnel {
    peer: SpiffeId,
    address: SocketAddr,
    connection: h2::server::Connection<TlsStream<TcpStream>, Bytes>,
    config: Arc<Config>,
}

/// Finishes the TLS and HTTP/2 handshakes on an accepted socket, both within [`Config::handshake_deadline`].
pub async fn accept(socket: TcpStream, address: SocketAddr, credential: &Credential, config: &Arc<Config>) -> Result<ServerTunnel, Error> {
    let handshake = async {
        let stream = TlsAcceptor::from(credential.server_config())
            .accept(socket)
            .await
            .map_err(|error| Error::Tls(crate::identity::explain_io(&error).to_string()))?;
        let peer = peer_identity(stream.get_ref().1.peer_certificates().unwrap_or_default())?;
        let connection = builder(config).handshake(stream).await.map_err(|error| Error::Handshake(error.to_string()))?;
        Ok(ServerTunnel { peer, address, connection, config: config.clone() })
    };
    match tokio::time::timeout(config.handshake_deadline, Box::pin(handshake)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::HandshakeDeadline(config.handshake_deadline)),
    }
}

fn builder(config: &Config) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.connection_window)
        .max_frame_size(config.frame_size)
        .max_header_list_size(config.header_list)
        .max_concurrent_streams(config.max_streams)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(SMALL_FRAME_BUDGET);
    builder
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
    pub async fn serve(mut self, mut drain: DrainWatcher, mut on_request: impl FnMut(Incoming)) -> Result<(), Error> {
        let pings = self.connection.ping_pong();
        let config = self.config.clone();
        let mut dead = std::pin::pin!(keep_alive(pings, &config));
        let mut draining = false;
        loop {
            tokio::select! {
                biased;
                mode = drain.signaled(), if !draining => match mode {
                    DrainMode::Immediate => return Ok(()),
                    DrainMode::Graceful => {
                        draining = true;
                        self.connection.graceful_shutdown();
                    }
                },
                error = &mut dead => {
                    self.connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                    return Err(error);
                }
                request = self.connection.accept() => match request {
                    Some(Ok((request, respond))) => on_request(Incoming::new(request, respond)),
                    Some(Err(error)) => return quiet(&error),
                    None => return Ok(()),
                },
            }
        }
    }
}

/// A peer that hangs up or says goodbye is not an error.
fn quiet(error: &h2::Error) -> Result<(), Error> {
    let goodbye = error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
    if goodbye || error.is_io() { Ok(()) } else { Err(Error::Tunnel(error.to_string())) }
}

/// One CONNECT that waits for its answer. Dropped without one, its stream is reset.
pub struct Incoming {
    request: Result<ConnectRequest, BadRequest>,
    body: h2::RecvStream,
    respond: h2::server::SendResponse<Bytes>,
}

impl Incoming {
    fn new(request: http::Request<h2::RecvStream>, respond: h2::server::SendResponse<Bytes>) -> Self {
        let (head, body) = request.into_parts();
        Self { request: ConnectRequest::from_http(&head), body, respond }
    }

    /// What is asked, or why it is no proper CONNECT.
    pub fn request(&self) -> Result<&ConnectRequest, &BadRequest> {
        self.request.as_ref()
    }

    /// Resolves when the peer gave the request up, so that work for it can stop.
    pub async fn abandoned(&mut self) {
        // Both outcomes mean that nobody waits for the answer any more.
        let _ = poll_fn(|context| self.respond.poll_reset(context)).await;
    }

    /// Answers without opening the tunnel stream: HEADERS with END_STREAM, no body.
    pub fn refuse(mut self, refusal: Refusal) {
        let mut response = http::Response::new(());
        *response.status_mut() = refusal.status();
        // A peer that has left needs no answer.
        let _ = self.respond.send_response(response, true);
    }

    /// Answers 200 and hands over the stream.
    pub fn accept(mut self, response: &ConnectResponse) -> Result<TunnelStream, Error> {
        let send = self.respond.send_response(response.to_http(), false).map_err(|error| Error::Tunnel(error.to_string()))?;
        Ok(TunnelStream::new(send, self.body, None))
    }
}
