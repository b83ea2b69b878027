//! The dialling side: TLS, HTTP/2, and streams on the tunnel that results.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::budget::Windows;
use super::frames::{FrameWatch, Traffic};
use super::keepalive::keep_alive;
use super::lifetime::Lifetime;
use super::stream::TunnelStream;
use super::{ConnectRequest, ConnectResponse, Endpoint, Error, Limits};
use crate::identity::{Credential, expect_peer};
use crate::model::SpiffeId;

/// Decoded header list that we accept of an answer, bytes.
const RESPONSE_HEADER_LIST: u32 = 16 << 10;

type Connection = h2::client::Connection<FrameWatch<TlsStream<TcpStream>>, Bytes>;

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
        if self.in_use.load(Ordering::Acquire) > 0 {
            return None;
        }
        Some(self.last_used.lock().unwrap_or_else(PoisonError::into_inner).elapsed())
    }
}

/// Makes a tunnel on a connected socket: TLS with our credential, the peer must be one of `expected`, then HTTP/2; all within
/// [`Config::handshake_deadline`](super::Config::handshake_deadline). Streams may be opened before the peer's first SETTINGS arrive, which saves
/// a round trip; a peer that has not sent them by the deadline loses the tunnel.
pub(super) async fn handshake(
    socket: TcpStream,
    credential: &Credential,
    expected: &[SpiffeId],
    endpoint: &Arc<Endpoint>,
) -> Result<ClientTunnel, Error> {
    let address = socket.peer_addr().map_err(Error::Connect)?;
    let config = &endpoint.config;
    let deadline = Instant::now() + config.handshake_deadline;
    let handshake = async {
        // The name is never sent (SNI is off) and never checked (the SPIFFE ID is): rustls only wants one.
        let name = ServerName::IpAddress(address.ip().into());
        let connector = TlsConnector::from(credential.client_config());
        let stream = connector.connect(name, socket).await.map_err(|error| Error::Tls(crate::identity::explain_io(&error).to_string()))?;
        let session = stream.get_ref().1;
        let chain = session.peer_certificates().unwrap_or_default();
        let peer = expect_peer(chain, expected)?;
        super::require_alpn(session.alpn_protocol())?;
        let lifetime = Lifetime::new(credential, chain, &endpoint.clock);
        let windows = Windows::new(&endpoint.budget, config.connection_window, config.stream_window);
        let watch = FrameWatch::of_server(stream);
        let traffic = watch.traffic();
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(windows.stream())
            .initial_connection_window_size(windows.tunnel())
            .max_frame_size(config.frame_size)
            .max_header_list_size(RESPONSE_HEADER_LIST)
            .max_local_error_reset_streams(Some(Limits::ERRORS_OF_PEER))
            .max_concurrent_reset_streams(Limits::RESET_STREAMS)
            .reset_stream_duration(Limits::RESET_MEMORY)
            .max_send_buffer_size(Limits::SEND_BUFFER)
            .data_frame_budget(Limits::SMALL_FRAMES)
            .enable_push(false);
        let (requests, connection) = builder.handshake::<_, Bytes>(watch).await.map_err(|error| Error::Handshake(error.to_string()))?;
        Ok::<_, Error>((peer, requests, Driver { connection, traffic, windows, lifetime, deadline }))
    };
    let (peer, requests, driver) = match tokio::time::timeout_at(deadline, Box::pin(handshake)).await {
        Ok(outcome) => outcome?,
        Err(_) => return Err(Error::HandshakeDeadline(config.handshake_deadline)),
    };
    let state =
        Arc::new(State { in_use: AtomicUsize::new(0), closed: AtomicBool::new(false), last_used: Mutex::new(Instant::now()), stop: Notify::new() });
    let max_streams = usize::from(config.pool_max_streams);
    tokio::spawn(driver.drive(state.clone(), endpoint.clone(), address));
    Ok(ClientTunnel { peer, requests, state, max_streams })
}

/// Owns the connection's input and output until it ends.
struct Driver {
    connection: Connection,
    traffic: Arc<Traffic>,
    windows: Windows,
    lifetime: Lifetime,
    /// For the peer's first SETTINGS.
    deadline: Instant,
}

impl Driver {
    async fn drive(mut self, state: Arc<State>, endpoint: Arc<Endpoint>, address: SocketAddr) {
        let pings = self.connection.ping_pong();
        let traffic = self.traffic.clone();
        let mut dead = pin!(keep_alive(pings, &traffic, &endpoint.config));
        let mut unsettled = pin!(first_settings(&traffic, self.deadline));
        let (mut farewell, mut end) = (pin!(sleep_until(self.lifetime.farewell)), pin!(sleep_until(self.lifetime.end)));
        loop {
            tokio::select! {
                biased;
                () = state.stop.notified() => break,
                () = &mut farewell, if !state.closed.load(Ordering::Acquire) => {
                    // New streams take a new tunnel, made with new certificates.
                    state.closed.store(true, Ordering::Release);
                    continue;
                }
                () = &mut end => tracing::warn!(peer = %address, "tunnel cut: a certificate of it expired a minute ago"),
                error = &mut dead => tracing::warn!(peer = %address, %error, "tunnel lost"),
                () = &mut unsettled => {
                    let error = Error::HandshakeDeadline(endpoint.config.handshake_deadline);
                    tracing::warn!(peer = %address, %error, "tunnel lost");
                }
                outcome = poll_fn(|context| self.poll(context)) => if let Err(error) = outcome {
                    tracing::debug!(peer = %address, %error, "tunnel ended");
                },
            }
            break;
        }
        state.closed.store(true, Ordering::Release);
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let polled = Pin::new(&mut self.connection).poll(context);
        if let Some(violation) = self.traffic.violation() {
            return Poll::Ready(Err(Error::Tunnel(violation.to_string())));
        }
        if let Some(window) = self.windows.observe(self.traffic.data()) {
            self.connection.set_target_window_size(window);
            context.waker().wake_by_ref();
        }
        if let Some(stream) = self.windows.stream_changed() {
            // Refused while the last SETTINGS are not acknowledged: it is tried again.
            if self.connection.set_initial_window_size(stream).is_ok() {
                self.windows.tell(stream);
                context.waker().wake_by_ref();
            }
        }
        polled.map_err(|error| Error::Tunnel(error.to_string()))
    }
}

/// Resolves if the peer's first SETTINGS have not arrived by the deadline.
async fn first_settings(traffic: &Traffic, deadline: Instant) {
    sleep_until(deadline).await;
    if traffic.settled() {
        std::future::pending().await
    }
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

    /// Takes a place for one more stream if there is one: of ours, and of what the peer allows (100 until it says).
    pub(super) fn reserve(&self) -> Option<StreamSlot> {
        if self.is_closed() {
            return None;
        }
        let most = self.max_streams.min(self.requests.current_max_send_streams()).max(1);
        let taken = self.state.in_use.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| (used < most).then_some(used + 1));
        taken.ok().map(|_| StreamSlot(self.state.clone()))
    }

    /// Sends one CONNECT and waits for its 200. No byte of the stream is sent before.
    pub(super) async fn open(&self, slot: StreamSlot, request: &ConnectRequest) -> Result<(TunnelStream, ConnectResponse), OpenError> {
        let head = request.to_http().map_err(|error| OpenError::Failed(Error::Tunnel(error.to_string())))?;
        // Nothing was sent so far: another tunnel may be tried.
        let mut requests = self.requests.clone().ready().await.map_err(|error| self.unusable(&error))?;
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
