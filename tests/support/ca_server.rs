//! A certificate authority over gRPC, written from the wire documents alone (dataplane §7.1, node-and-control B.9): its messages are its own, so that
//! a mistake in ours is not shared. It signs, or does what its mood is.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertificateSigningRequestParams, PublicKey};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower_service::Service;

use crate::pki::{Authority, HOUR, pem, workload};

const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

#[derive(Clone, PartialEq, prost::Message)]
pub struct IstioCertificateRequest {
    #[prost(string, tag = "1")]
    pub csr: String,
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    #[prost(map = "string, message", tag = "1")]
    pub fields: std::collections::HashMap<String, MetadataValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct MetadataValue {
    #[prost(string, optional, tag = "3")]
    pub text: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct IstioCertificateResponse {
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub message: IstioCertificateRequest,
    pub headers: http::HeaderMap,
}

impl Asked {
    pub fn impersonated(&self) -> Option<String> {
        self.message.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?.text.clone()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        Some(self.headers.get(name)?.to_str().unwrap())
    }
}

/// Makes an answer of a request: the CA, the key to certify, the identity asked for.
pub type Answer = Arc<dyn Fn(&Authority, &PublicKey, &str) -> Vec<String> + Send + Sync>;

#[derive(Clone)]
pub enum Mood {
    Sign,
    Slow(Duration),
    Hang,
    Refuse(tonic::Code, &'static str),
    Lie(Answer),
}

pub struct Desk {
    pub ca: Authority,
    /// PEM of the roots that go with every right answer.
    roots: String,
    pub mood: Mutex<Mood>,
    pub asked: Mutex<Vec<Asked>>,
    pub busy: AtomicUsize,
    pub busiest: AtomicUsize,
    /// Sockets that were accepted, and those of them that finished TLS.
    pub sockets: AtomicUsize,
    pub connections: AtomicUsize,
    tls: Mutex<Arc<ServerConfig>>,
    close: watch::Sender<()>,
}

/// The server; it ends when dropped.
pub struct CaServer {
    pub address: SocketAddr,
    pub desk: Arc<Desk>,
    task: JoinHandle<()>,
}

impl Drop for CaServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The server's own certificate, for these host names.
pub fn serving(root: &Authority, names: &[&str]) -> Arc<ServerConfig> {
    let mut params = workload(&[]);
    params.subject_alt_names = names
        .iter()
        .map(|name| match name.parse() {
            Ok(address) => rcgen::SanType::IpAddress(address),
            Err(_) => rcgen::SanType::DnsName((*name).try_into().unwrap()),
        })
        .collect();
    Arc::new(root.leaf(params).server())
}

/// The answer that is right: the leaf, one text for each intermediate, and the roots in one.
pub fn signed(ca: &Authority, key: &PublicKey, params: &rcgen::CertificateParams, roots: &str) -> Vec<String> {
    let mut chain = vec![params.signed_by(key, &ca.signer).unwrap().pem()];
    chain.extend(ca.chain.iter().map(|der| pem("CERTIFICATE", der)));
    chain.push(roots.to_owned());
    chain
}

impl CaServer {
    /// A root CA that also signed the server's certificate for `localhost`.
    pub async fn start(root: Authority) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (tls, roots) = (serving(&root, &["localhost"]), root.signer.pem());
        Self::start_on(listener, root, roots, tls)
    }

    pub fn start_on(listener: TcpListener, ca: Authority, roots: String, tls: Arc<ServerConfig>) -> Self {
        let address = listener.local_addr().unwrap();
        let desk = Arc::new(Desk {
            ca,
            roots,
            mood: Mutex::new(Mood::Sign),
            asked: Mutex::default(),
            busy: AtomicUsize::new(0),
            busiest: AtomicUsize::new(0),
            sockets: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            tls: Mutex::new(tls),
            close: watch::Sender::new(()),
        });
        let task = tokio::spawn(serve(listener, desk.clone()));
        Self { address, desk, task }
    }

    pub fn mood(&self, mood: Mood) {
        *self.desk.mood.lock().unwrap() = mood;
    }

    pub fn lie(&self, answer: impl Fn(&Authority, &PublicKey, &str) -> Vec<String> + Send + Sync + 'static) {
        self.mood(Mood::Lie(Arc::new(answer)));
    }

    /// New connections get this certificate.
    pub fn present(&self, tls: Arc<ServerConfig>) {
        *self.desk.tls.lock().unwrap() = tls;
    }

    /// Closes every connection.
    pub fn close(&self) {
        self.desk.close.send_replace(());
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.desk.asked.lock().unwrap().clone()
    }
}

async fn serve(listener: TcpListener, desk: Arc<Desk>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        desk.sockets.fetch_add(1, Ordering::SeqCst);
        let desk = desk.clone();
        connections.spawn(async move {
            let tls = desk.tls.lock().unwrap().clone();
            let Ok(stream) = TlsAcceptor::from(tls).accept(socket).await else { return };
            desk.connections.fetch_add(1, Ordering::SeqCst);
            let mut close = desk.close.subscribe();
            let service = hyper::service::service_fn(move |request| {
                let desk = desk.clone();
                async move { Ok::<_, std::convert::Infallible>(answer(desk, request).await) }
            });
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                _ = close.changed() => {}
            }
        });
    }
}

async fn answer(desk: Arc<Desk>, request: http::Request<hyper::body::Incoming>) -> http::Response<tonic::body::Body> {
    if request.uri().path() != PATH {
        return Status::unimplemented("").into_http();
    }
    let headers = request.headers().clone();
    tonic::server::Grpc::new(ProstCodec::default()).unary(Signing { desk, headers }, request).await
}

struct Signing {
    desk: Arc<Desk>,
    headers: http::HeaderMap,
}

struct Busy(Arc<Desk>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Service<Request<IstioCertificateRequest>> for Signing {
    type Response = Response<IstioCertificateResponse>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        let (desk, headers) = (self.desk.clone(), self.headers.clone());
        Box::pin(async move {
            let asked = Asked { message: request.into_inner(), headers };
            desk.asked.lock().unwrap().push(asked.clone());
            let busy = desk.busy.fetch_add(1, Ordering::SeqCst) + 1;
            let _busy = Busy(desk.clone());
            desk.busiest.fetch_max(busy, Ordering::SeqCst);
            let mood = desk.mood.lock().unwrap().clone();
            let key = CertificateSigningRequestParams::from_pem(&asked.message.csr).map_err(|error| Status::invalid_argument(error.to_string()))?;
            let identity = asked.impersonated().unwrap_or_else(|| "spiffe://cluster.local/ns/own/sa/caller".to_owned());
            let sign = || {
                let mut params = workload(&[&identity]);
                let lifetime = Duration::from_secs(u64::try_from(asked.message.validity_duration).unwrap());
                params.not_before = (std::time::SystemTime::now() - HOUR.min(lifetime / 10)).into();
                params.not_after = (std::time::SystemTime::now() + lifetime).into();
                signed(&desk.ca, &key.public_key, &params, &desk.roots)
            };
            let cert_chain = match mood {
                Mood::Sign => sign(),
                Mood::Slow(delay) => {
                    tokio::time::sleep(delay).await;
                    sign()
                }
                Mood::Hang => std::future::pending().await,
                Mood::Refuse(code, message) => return Err(Status::new(code, message)),
                Mood::Lie(answer) => answer(&desk.ca, &key.public_key, &identity),
            };
            Ok(Response::new(IstioCertificateResponse { cert_chain }))
        })
    }
}
