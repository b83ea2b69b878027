//! From sockets to calls: TLS, HTTP/2, who calls, and which call it is.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, header};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rand::RngExt;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio_rustls::TlsAcceptor;
use tonic::Status;

use super::authority::Authority;
use super::catalog::Catalog;
use super::message::{Answer, Outgoing, Requests, Room};
use super::session::Session;
use super::stats::Stats;
use super::tokens::{Caller, Tokens};
use super::{Config, Error};
use crate::lifecycle::drain::DrainWatcher;
use crate::lifecycle::{AcceptBackoff, PermitLimits, Permits};
use crate::telemetry::limited;
use crate::wire::ca::{CREATE_CERTIFICATE, CertificateRequest};
use crate::wire::xds::DELTA_METHOD;

/// A certificate request is about 1 KiB.
const LARGEST_CERTIFICATE_REQUEST: usize = 64 << 10;

/// TLS, and then the first call with a valid token, must have come by then.
const PROVE_WITHIN: Duration = Duration::from_secs(10);

/// Streams of one connection: a proxy has one for xDS and short ones for certificates.
const STREAMS: u32 = 128;

/// What one stream and one connection may send before we have read it.
const WINDOWS: (u32, u32) = (256 << 10, 1 << 20);

/// A client is asked for a sign of life after this much silence, and is dead after that much more.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// Bytes of answers that HTTP/2 holds for a stream whose client does not read.
const SEND_BUFFER: usize = 128 << 10;

const HEADER_LIST: u32 = 16 << 10;

/// Everything that a call may need.
pub(super) struct Server {
    pub(super) config: Config,
    pub(super) tokens: Arc<Tokens>,
    pub(super) authority: Authority,
    pub(super) catalogs: watch::Receiver<Arc<Catalog>>,
    pub(super) stats: Arc<Stats>,
    pub(super) room: Room,
}

/// What all connections share.
struct Gate {
    acceptor: TlsAcceptor,
    all: Permits<()>,
    strangers: Permits<IpAddr>,
}

/// The TLS configuration of a server whose certificate `resolver` chooses.
pub(super) fn tls(resolver: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.map_err(|error| Error::Tls(error.to_string()))?.with_no_client_auth().with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

impl Server {
    /// Accepts until the drain begins; connections then finish their calls.
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener, tls: ServerConfig, mut drain: DrainWatcher) {
        let (all, strangers, of_source) = (self.config.connections, self.config.strangers.0, self.config.strangers.1);
        let gate = Arc::new(Gate {
            acceptor: TlsAcceptor::from(Arc::new(tls)),
            all: Permits::new(PermitLimits { total: all, per_key: all }),
            strangers: Permits::new(PermitLimits { total: strangers, per_key: of_source }),
        });
        let mut backoff = AcceptBackoff::new();
        loop {
            let accepted = tokio::select! {
                _ = drain.signaled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, peer)) => {
                    backoff.succeeded();
                    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                    tokio::spawn(self.clone().connection(gate.clone(), socket, peer, drain.clone()));
                }
                Err(error) => {
                    limited!(warn, "failed to accept", %error, "cannot accept a connection of a client");
                    tokio::time::sleep(backoff.failed(&error)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, gate: Arc<Gate>, socket: TcpStream, peer: SocketAddr, drain: DrainWatcher) {
        let permits = gate.all.acquire(()).and_then(|all| Ok((all, gate.strangers.acquire(peer.ip())?)));
        let (_all, stranger) = match permits {
            Ok(permits) => permits,
            Err(error) => {
                limited!(warn, "connection limit", %peer, "connection refused: {error}");
                return;
            }
        };
        let stream = match tokio::time::timeout(PROVE_WITHIN, shake(&gate.acceptor, socket)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                limited!(info, "TLS handshakes", %peer, %error, "a client did not finish the TLS handshake");
                return;
            }
            Err(_) => {
                limited!(info, "TLS handshakes", %peer, "a client did not finish the TLS handshake within {PROVE_WITHIN:?}");
                return;
            }
        };
        let _held = self.stats.connected();
        let proven = Arc::new(Notify::new());
        let service = service_fn(|request| {
            let (server, proven, drain) = (self.clone(), proven.clone(), drain.clone());
            async move { Ok::<_, Infallible>(server.call(request, peer, &proven, drain).await) }
        });
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(HEADER_LIST)
            .max_send_buf_size(SEND_BUFFER)
            .keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let mut stranger = Some(stranger);
        let prove = tokio::time::sleep(PROVE_WITHIN);
        tokio::pin!(prove);
        let mut draining = false;
        let mut told = drain.clone();
        loop {
            tokio::select! {
                // How a client ends its connection is nobody's concern.
                _ = connection.as_mut() => return,
                () = &mut prove, if stranger.is_some() => {
                    limited!(info, "connections without a token", %peer, "closed: no call with a valid token within {PROVE_WITHIN:?}");
                    return;
                }
                // Now it is somebody's.
                () = proven.notified(), if stranger.is_some() => stranger = None,
                () = told_to_end(&mut told, draining) => {
                    if draining {
                        return;
                    }
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    async fn call(self: Arc<Self>, request: Request<Incoming>, peer: SocketAddr, proven: &Notify, drain: DrainWatcher) -> Response<Answer> {
        let path = request.uri().path();
        let grpc = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        if !grpc {
            return Answer::of(Err(Status::unimplemented("only gRPC is spoken here")));
        }
        let caller = match self.tokens.caller(request.headers()) {
            Ok(caller) => caller,
            Err(error) => {
                self.stats.unauthenticated();
                limited!(warn, "calls without a valid token", %peer, path = super::session::quote(path), "refused: {error}");
                return Answer::of(Err(Status::unauthenticated(error.to_string())));
            }
        };
        proven.notify_one();
        match path {
            DELTA_METHOD => self.stream(caller, request.into_body(), drain),
            CREATE_CERTIFICATE => Answer::of(self.certificate(caller, peer, request.into_body()).await),
            _ => Answer::of(Err(Status::unimplemented(
                "there is no such method; this control plane serves DeltaAggregatedResources and CreateCertificate",
            ))),
        }
    }

    fn stream(&self, caller: Caller, body: Incoming, drain: DrainWatcher) -> Response<Answer> {
        let (says, answer) = Answer::streaming();
        let longest = self.config.longest_stream.mul_f64(rand::rng().random_range(0.9..1.1));
        let tokens = (self.tokens.clone(), self.config.token_check);
        let session = Session { caller, catalogs: self.catalogs.clone(), says, stats: self.stats.clone(), drain, tokens, longest };
        tokio::spawn(session.run(Requests::new(body, self.config.largest_request, self.room.clone())));
        answer
    }

    async fn certificate(&self, caller: Caller, peer: SocketAddr, body: Incoming) -> Result<Outgoing, Status> {
        let mut requests = Requests::new(body, LARGEST_CERTIFICATE_REQUEST, self.room.clone());
        let request = tokio::time::timeout(PROVE_WITHIN, requests.next::<CertificateRequest>()).await;
        let request = request.map_err(|_| Status::deadline_exceeded("the request did not come"))??;
        let request = request.ok_or_else(|| Status::invalid_argument("the call has no request"))?;
        let answer = self.authority.create(&caller, peer, &request.message).await?;
        Ok(Outgoing::single(&answer))
    }
}

async fn shake(acceptor: &TlsAcceptor, socket: TcpStream) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    socket.set_nodelay(true)?;
    let stream = acceptor.accept(socket).await?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(io::Error::other("the client does not speak HTTP/2 (ALPN h2)"));
    }
    Ok(stream)
}

/// Waits for the drain to begin, or when it has, for its end.
async fn told_to_end(drain: &mut DrainWatcher, draining: bool) {
    if draining {
        drain.forced().await;
    } else {
        drain.signaled().await;
    }
}
