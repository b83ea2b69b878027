//! The serving side: TLS, the HTTP/2 handshake, and the requests of one tunnel.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::sleep_until;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::budget::Windows;
use super::frames::{FrameWatch, Traffic, Violation};
use super::keepalive::keep_alive;
use super::lifetime::Lifetime;
use super::stream::TunnelStream;
use super::{BadRequest, ConnectRequest, ConnectResponse, Endpoint, Error, Limits, Refusal};
use crate::identity::{Credential, peer_identity};
use crate::lifecycle::RateBudget;
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::model::SpiffeId;

/// Requests that a peer may take back before they are answered, at once. Applications that give up, or a client that is killed, do so
/// honestly; a rapid reset (CVE-2023-44487) does it by the ten thousand.
const TAKEN_BACK_BURST: u32 = 200;
/// The same, per second in the long run.
const TAKEN_BACK_PER_SECOND: u32 = 50;
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);

type Connection = h2::server::Connection<FrameWatch<TlsStream<TcpStream>>, Bytes>;
type Request = (http::Request<h2::RecvStream>, h2::server::SendResponse<Bytes>);

/// A tunnel that a verified peer opened to us.
pub struct ServerTunnel {
    peer: SpiffeId,
    address: SocketAddr,
    connection: Connection,
    traffic: Arc<Traffic>,
    windows: Windows,
    lifetime: Lifetime,
    endpoint: Arc<Endpoint>,
    /// A request that came together with the peer's first SETTINGS.
    first: Option<Request>,
}

/// Finishes the handshakes on an accepted socket: TLS, the HTTP/2 preface and the peer's first SETTINGS, all within
/// [`Config::handshake_deadline`](super::Config::handshake_deadline).
///
/// # Errors
/// Why the peer is not served. The socket is closed.
pub async fn accept(socket: TcpStream, address: SocketAddr, credential: &Credential, endpoint: &Arc<Endpoint>) -> Result<ServerTunnel, Error> {
    let handshake = async {
        let stream = TlsAcceptor::from(credential.server_config())
            .accept(socket)
            .await
            .map_err(|error| Error::Tls(crate::identity::explain_io(&error).to_string()))?;
        let session = stream.get_ref().1;
        super::require_alpn(session.alpn_protocol())?;
        let chain = session.peer_certificates().unwrap_or_default();
        let peer = peer_identity(chain)?;
        let lifetime = Lifetime::new(credential, chain, &endpoint.clock);
        let config = &endpoint.config;
        let windows = Windows::new(&endpoint.budget, config.connection_window, config.stream_window);
        let watch = FrameWatch::of_client(stream);
        let traffic = watch.traffic();
        let failed = |error: h2::Error| Error::Handshake(error.to_string());
        let mut connection: Connection = builder(endpoint, &windows).handshake(watch).await.map_err(failed)?;
        let first = first_settings(&mut connection, &traffic).await?;
        Ok(ServerTunnel { peer, address, connection, traffic, windows, lifetime, endpoint: endpoint.clone(), first })
    };
    let deadline = endpoint.config.handshake_deadline;
    match tokio::time::timeout(deadline, Box::pin(handshake)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::HandshakeDeadline(deadline)),
    }
}

fn builder(endpoint: &Endpoint, windows: &Windows) -> h2::server::Builder {
    let config = &endpoint.config;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(windows.stream())
        .initial_connection_window_size(windows.tunnel())
        .max_frame_size(config.frame_size)
        .max_header_list_size(config.header_list)
        .max_concurrent_streams(config.max_streams)
        .max_pending_accept_reset_streams(TAKEN_BACK_BURST as usize)
        .max_local_error_reset_streams(Some(Limits::ERRORS_OF_PEER))
        .max_concurrent_reset_streams(Limits::RESET_STREAMS)
        .reset_stream_duration(Limits::RESET_MEMORY)
        .max_send_buffer_size(Limits::SEND_BUFFER)
        .data_frame_budget(Limits::SMALL_FRAMES);
    builder
}

/// h2 ends its handshake before the peer has sent SETTINGS; a peer that stays silent would be taken for authenticated and alive.
async fn first_settings(connection: &mut Connection, traffic: &Traffic) -> Result<Option<Request>, Error> {
    let failed = |error: h2::Error| Error::Handshake(error.to_string());
    poll_fn(|context| match connection.poll_accept(context) {
        _ if traffic.violation().is_some() => {
            let violation = traffic.violation().map_or_else(String::new, |violation| violation.to_string());
            Poll::Ready(Err(Error::Handshake(violation)))
        }
        Poll::Ready(Some(Ok(request))) => Poll::Ready(Ok(Some(request))),
        Poll::Ready(Some(Err(error))) => Poll::Ready(Err(failed(error))),
        Poll::Ready(None) => Poll::Ready(Err(Error::Handshake("the peer closed the connection".to_owned()))),
        Poll::Pending if traffic.settled() => Poll::Ready(Ok(None)),
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// Why there are no more requests.
enum Over {
    Failed(h2::Error),
    Violation(Violation),
    Closed,
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

    /// Serves until the peer leaves, stops answering PINGs, misbehaves, or a drain or the end of a certificate ends it. A graceful drain sends
    /// GOAWAY and lets streams finish; an immediate one drops everything.
    ///
    /// # Errors
    /// Why the tunnel ended, unless the peer or a drain ended it in good order.
    pub async fn serve(mut self, mut drain: DrainWatcher, mut on_request: impl FnMut(Incoming)) -> Result<(), Error> {
        let pings = self.connection.ping_pong();
        let (traffic, endpoint) = (self.traffic.clone(), self.endpoint.clone());
        let mut dead = pin!(keep_alive(pings, &traffic, &endpoint.config));
        let (mut farewell, mut end) = (pin!(sleep_until(self.lifetime.farewell)), pin!(sleep_until(self.lifetime.end)));
        let patience = Arc::new(Patience::new(endpoint.config.max_streams as usize));
        if let Some(request) = self.first.take() {
            on_request(Incoming::new(request, &patience));
        }
        let mut leaving = false;
        loop {
            let told = async {
                if leaving {
                    drain.forced().await;
                    DrainMode::Immediate
                } else {
                    drain.signaled().await
                }
            };
            tokio::select! {
                biased;
                mode = told => {
                    if mode == DrainMode::Immediate {
                        return Ok(());
                    }
                    leaving = true;
                    self.connection.graceful_shutdown();
                }
                () = &mut farewell, if !leaving => {
                    leaving = true;
                    self.connection.graceful_shutdown();
                }
                () = &mut end => return Err(Error::Tunnel("a certificate of the tunnel expired a minute ago".to_owned())),
                error = &mut dead => return Err(error),
                () = patience.lost.notified() => return self.calm("requests taken back before they were answered").await,
                next = poll_fn(|context| self.poll(context)) => match next {
                    Ok(request) => on_request(Incoming::new(request, &patience)),
                    Err(Over::Failed(error)) => return quiet(&error),
                    Err(Over::Violation(violation)) => return self.calm(&violation.to_string()).await,
                    Err(Over::Closed) => return Ok(()),
                },
            }
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Request, Over>> {
        let polled = self.connection.poll_accept(context);
        if let Some(violation) = self.traffic.violation() {
            return Poll::Ready(Err(Over::Violation(violation)));
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
        polled.map(|accepted| match accepted {
            Some(Ok(request)) => Ok(request),
            Some(Err(error)) => Err(Over::Failed(error)),
            None => Err(Over::Closed),
        })
    }

    /// Ends the tunnel because of what the peer does.
    async fn calm(mut self, why: &str) -> Result<(), Error> {
        self.connection.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
        // A peer that does not read does not hear it; the connection is dropped either way.
        let _ = tokio::time::timeout(GOODBYE, poll_fn(|context| self.connection.poll_closed(context))).await;
        Err(Error::Tunnel(format!("closed with ENHANCE_YOUR_CALM: {why}")))
    }
}

/// A peer that hangs up or says goodbye is not an error.
fn quiet(error: &h2::Error) -> Result<(), Error> {
    let goodbye = error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
    if goodbye || error.is_io() { Ok(()) } else { Err(Error::Tunnel(error.to_string())) }
}

/// Counts the requests that the peer took back. h2 counts only those that wait to be accepted, and we accept at once.
struct Patience {
    budget: RateBudget,
    /// Requests without an answer, those taken back included: our tasks for them. h2 bounds only those not taken back.
    unanswered: AtomicUsize,
    most: usize,
    /// The peer went too far.
    lost: Notify,
}

impl Patience {
    fn new(max_streams: usize) -> Self {
        Self {
            budget: RateBudget::new(TAKEN_BACK_PER_SECOND, TAKEN_BACK_BURST),
            unanswered: AtomicUsize::new(0),
            most: max_streams.saturating_add(TAKEN_BACK_BURST as usize),
            lost: Notify::new(),
        }
    }

    fn asked(&self) {
        if self.unanswered.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.lost.notify_one();
        }
    }

    fn answered(&self, taken_back: bool) {
        self.unanswered.fetch_sub(1, Ordering::Relaxed);
        if taken_back && self.budget.take().is_err() {
            self.lost.notify_one();
        }
    }
}

/// One CONNECT that waits for its answer. Dropped without one, its stream is reset.
pub struct Incoming {
    request: Result<ConnectRequest, BadRequest>,
    /// Until it is answered.
    open: Option<(h2::RecvStream, h2::server::SendResponse<Bytes>)>,
    patience: Arc<Patience>,
}

impl Incoming {
    fn new((request, respond): Request, patience: &Arc<Patience>) -> Self {
        let (head, body) = request.into_parts();
        patience.asked();
        Self { request: ConnectRequest::from_http(&head), open: Some((body, respond)), patience: patience.clone() }
    }

    /// What is asked, or why it is no proper CONNECT.
    ///
    /// # Errors
    /// Why the request must be answered with [`Refusal::BadRequest`].
    pub fn request(&self) -> Result<&ConnectRequest, &BadRequest> {
        self.request.as_ref()
    }

    /// Resolves when the peer gave the request up, so that work for it can stop.
    pub async fn abandoned(&mut self) {
        let Some((_, respond)) = &mut self.open else { return };
        // Both outcomes mean that nobody waits for the answer any more.
        let _ = poll_fn(|context| respond.poll_reset(context)).await;
    }

    /// Answers without opening the tunnel stream: HEADERS with END_STREAM, no body.
    pub fn refuse(mut self, refusal: Refusal) {
        let mut response = http::Response::new(());
        *response.status_mut() = refusal.status();
        if let Some((_body, mut respond)) = self.close() {
            // A peer that has left needs no answer.
            let _ = respond.send_response(response, true);
        }
    }

    /// Answers 200 and hands over the stream.
    ///
    /// # Errors
    /// The peer took the request back, or the tunnel is gone.
    pub fn accept(mut self, response: &ConnectResponse) -> Result<TunnelStream, Error> {
        let (body, mut respond) = self.close().ok_or_else(|| Error::Tunnel("the peer took the request back".to_owned()))?;
        let send = respond.send_response(response.to_http(), false).map_err(|error| Error::Tunnel(error.to_string()))?;
        Ok(TunnelStream::new(send, body, None))
    }

    /// Takes the stream if the peer still wants it.
    fn close(&mut self) -> Option<(h2::RecvStream, h2::server::SendResponse<Bytes>)> {
        let (body, mut respond) = self.open.take()?;
        let gone = respond.poll_reset(&mut Context::from_waker(Waker::noop()));
        self.patience.answered(matches!(gone, Poll::Ready(Ok(_))));
        gone.is_pending().then_some((body, respond))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // The stream is reset by being dropped.
        drop(self.close());
    }
}
