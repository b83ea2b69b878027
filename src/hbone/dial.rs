//! The dialling side: TCP, TLS, HTTP/2, and streams on the tunnel that results.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::keepalive::keep_alive;
use super::stream::TunnelStream;
use super::{Config, ConnectRequest, ConnectResponse, Error};
use crate::identity::{Credential, expect_peer};
use crate::model::SpiffeId;

/// h2 charges small unread DATA frames against this budget, see `accept`.
const SMALL_FRAME_BUDGET: usize = 32 << 20;
/// Decoded header list that we accept of an answer, bytes.
const RESPONSE_HEADER_LIST: u32 = 16 << 10;

/// A tunnel that we opened. Dropping the last handle and the last stream closes it.
pub struct ClientTunnel {
    peer: SpiffeId,
    requests: h2::client::SendRequest<Bytes>,
    state: Arc<State>,
    max_streams: usize,
}

/// Shared with the task that drives the connection and with the streams.
struct State {
    in_use: AtomicUsize,
    closed: AtomicBool,
    last_used: Mutex<Instant>,
    stop: Notify,
}

/// A place among a tunnel's streams; given back when dropped.
pub(super) struct StreamSlot(Arc<State>);

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.in_use.fetch_sub(1, Ordering::AcqRel);
        self.0.touch();
    }
}

impl State {
    fn touch(&self) {
        // A poisoned lock holds a valid instant all the same.
        *self.last_used.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Instant::now();
    }

    fn idle_for(&self) -> Option<Duration> {
        let last = *self.last_used.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (self.in_use.load(Ordering::Acquire) == 0).then(|| last.elapsed())
    }
}

/// Makes a tunnel on a connected socket: TLS with our credential, the peer must be one of `expected`, then HTTP/2; all within
/// [`Config::handshake_deadline`].
pub(super) async fn handshake(
    socket: TcpStream,
    credential: &Credential,
    expected: &[SpiffeId],
    config: &Arc<Config>,
) -> Result<ClientTunnel, Error> {
    let address = socket.peer_addr().map_err(Error::Connect)?;
    let handshake = async {
        // The name is never sent (SNI is off) and never checked (the SPIFFE ID is): rustls only wants one.
        let name = ServerName::IpAddress(address.ip().into());
        let connector = TlsConnector::from(credential.client_config());
        let stream = connector.connect(name, socket).await.map_err(|error| Error::Tls(crate::identity::explain_io(&error).to_string()))?;
        let peer = expect_peer(stream.get_ref().1.peer_certificates().unwrap_or_default(), expected)?;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(config.stream_window)
            .initial_connection_window_size(config.connection_window)
            .max_frame_size(config.frame_size)
            .max_header_list_size(RESPONSE_HEADER_LIST)
            .max_send_buffer_size(config.stream_window as usize)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .enable_push(false);
        let (requests, connection) = builder.handshake::<_, Bytes>(stream).await.map_err(|error| Error::Handshake(error.to_string()))?;
        Ok::<_, Error>((peer, requests, connection))
    };
    let (peer, requests, connection) = match tokio::time::timeout(config.handshake_deadline, Box::pin(handshake)).await {
        Ok(outcome) => outcome?,
        Err(_) => return Err(Error::HandshakeDeadline(config.handshake_deadline)),
    };
    let state =
        Arc::new(State { in_use: AtomicUsize::new(0), closed: AtomicBool::new(false), last_used: Mutex::new(Instant::now()), stop: Notify::new() });
    let max_streams = usize::from(config.pool_max_streams).min(requests.current_max_send_streams()).max(1);
    tokio::spawn(drive(connection, state.clone(), config.clone(), address));
    Ok(ClientTunnel { peer, requests, state, max_streams })
}

/// Owns the connection's input and output until it ends.
async fn drive(
    mut connection: h2::client::Connection<tokio_rustls::client::TlsStream<TcpStream>, Bytes>,
    state: Arc<State>,
    config: Arc<Config>,
    address: SocketAddr,
) {
    let pings = connection.ping_pong();
    tokio::select! {
        biased;
        () = state.stop.notified() => {}
        error = keep_alive(pings, &config) => tracing::warn!(peer = %address, %error, "tunnel lost"),
        outcome = &mut connection => {
            if let Err(error) = outcome {
                tracing::debug!(peer = %address, %error, "tunnel ended");
            }
        }
    }
    state.closed.store(true, Ordering::Release);
}

impl ClientTunnel {
    /// The verified peer.
    #[must_use]
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Whether no more streams can be opened.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.closed.load(Ordering::Acquire)
    }

    /// How long no stream has used it; `None` while one does.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        self.state.idle_for()
    }

    /// Breaks the tunnel and all of its streams at once.
    pub fn abort(&self) {
        self.state.closed.store(true, Ordering::Release);
        self.state.stop.notify_one();
    }

    /// Takes a place for one more stream if there is one.
    pub(super) fn reserve(&self) -> Option<StreamSlot> {
        if self.is_closed() {
            return None;
        }
        let taken = self.state.in_use.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| (used < self.max_streams).then_some(used + 1));
        taken.ok().map(|_| StreamSlot(self.state.clone()))
    }

    /// Sends one CONNECT and waits for its 200.
    pub(super) async fn open(&self, slot: StreamSlot, request: &ConnectRequest) -> Result<(TunnelStream, ConnectResponse), OpenError> {
        // Nothing was sent so far: another tunnel may be tried.
        let mut requests = self.requests.clone().ready().await.map_err(|error| self.unusable(&error))?;
        let head = request.to_http().map_err(|error| OpenError::Failed(Error::Tunnel(error.to_string())))?;
        let (response, send) = requests.send_request(head, false).map_err(|error| self.unusable(&error))?;
        let response = response.await.map_err(|error| {
            // GOAWAY below our stream, and REFUSED_STREAM, promise that the peer did nothing (RFC 9113 §8.7).
            if error.reason() == Some(h2::Reason::REFUSED_STREAM) || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR)) {
                self.unusable(&error)
            } else {
                OpenError::Failed(Error::Tunnel(error.to_string()))
            }
        })?;
        let (head, receive) = response.into_parts();
        if head.status != http::StatusCode::OK {
            return Err(OpenError::Failed(Error::Status(head.status.as_u16())));
        }
        Ok((TunnelStream::new(send, receive, Some(slot)), ConnectResponse::from_http(&head.headers)))
    }

    fn unusable(&self, error: &h2::Error) -> OpenError {
        self.state.closed.store(true, Ordering::Release);
        OpenError::Unusable(Error::Tunnel(error.to_string()))
    }
}

/// Why a stream could not be opened on a tunnel.
pub(super) enum OpenError {
    /// The tunnel takes no more streams and did nothing with this one: try another.
    Unusable(Error),
    /// The request itself failed.
    Failed(Error),
}
