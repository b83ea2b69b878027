//! A client of a control plane, written from the wire documents alone (dataplane §5 and §7.1): its messages are its own, so that a mistake in ours is
//! not shared.
#![allow(dead_code, unreachable_pub)]

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tonic::client::Grpc;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// How long anything that must happen may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaRequest {
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    #[prost(string, tag = "2")]
    pub type_url: String,
    #[prost(string, repeated, tag = "3")]
    pub subscribe: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub unsubscribe: Vec<String>,
    #[prost(map = "string, string", tag = "5")]
    pub versions: HashMap<String, String>,
    #[prost(string, tag = "6")]
    pub nonce: String,
    #[prost(message, optional, tag = "7")]
    pub error: Option<Error>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Error {
    #[prost(int32, tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Node {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<Struct>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Struct {
    #[prost(map = "string, message", tag = "1")]
    pub fields: HashMap<String, Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Value {
    #[prost(string, optional, tag = "3")]
    pub text: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaResponse {
    #[prost(string, tag = "1")]
    pub system_version: String,
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    #[prost(string, tag = "4")]
    pub type_url: String,
    #[prost(string, tag = "5")]
    pub nonce: String,
    #[prost(string, repeated, tag = "6")]
    pub removed: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Resource {
    #[prost(string, tag = "1")]
    pub version: String,
    #[prost(message, optional, tag = "2")]
    pub content: Option<Any>,
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Any {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// What this client looks at of an `istio.workload.Address`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Address {
    #[prost(message, optional, tag = "1")]
    pub workload: Option<Workload>,
    #[prost(message, optional, tag = "2")]
    pub service: Option<Service>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Workload {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub addresses: Vec<Vec<u8>>,
    #[prost(int32, tag = "5")]
    pub tunnel_protocol: i32,
    #[prost(string, tag = "9")]
    pub node: String,
    #[prost(string, repeated, tag = "16")]
    pub policies: Vec<String>,
    #[prost(string, tag = "20")]
    pub uid: String,
    #[prost(message, optional, tag = "27")]
    pub capacity: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Service {
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(string, tag = "3")]
    pub hostname: String,
}

/// What this client looks at of an `istio.security.Authorization`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Authorization {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(int32, tag = "3")]
    pub scope: i32,
    #[prost(int32, tag = "4")]
    pub action: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    #[prost(string, tag = "1")]
    pub csr: String,
    #[prost(int64, tag = "3")]
    pub validity: i64,
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateResponse {
    #[prost(string, repeated, tag = "1")]
    pub chain: Vec<String>,
}

pub fn text_members<const N: usize>(members: [(&str, &str); N]) -> Option<Struct> {
    let fields = members.into_iter().map(|(name, text)| (name.to_owned(), Value { text: Some(text.to_owned()) })).collect();
    Some(Struct { fields })
}

/// A first request of a type.
pub fn first(type_url: &str, node: &str) -> DeltaRequest {
    let id = "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local".to_owned();
    DeltaRequest {
        node: Some(Node { id, metadata: text_members([("NAME", "ztunnel-x"), ("NODE_NAME", node)]) }),
        type_url: type_url.to_owned(),
        ..DeltaRequest::default()
    }
}

/// One HTTP/2 connection.
#[derive(Clone)]
pub struct Connection {
    sender: hyper::client::conn::http2::SendRequest<tonic::body::Body>,
    token: Option<String>,
}

impl tower_service::Service<http::Request<tonic::body::Body>> for Connection {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}

/// Connects and believes only the roots of `ca`, for the name `name`.
pub async fn connect(address: SocketAddr, ca: &Path, name: &str, token: Option<&str>) -> Result<Connection, String> {
    connect_with(address, ca, name, token, 1 << 20).await
}

/// The same, with a receive window of so many bytes.
pub async fn connect_with(address: SocketAddr, ca: &Path, name: &str, token: Option<&str>, window: u32) -> Result<Connection, String> {
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(ca.join("root-cert.pem")).unwrap();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).map(Result::unwrap));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let socket = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await.map_err(|error| error.to_string())?;
    let (sender, driver) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(window)
        .initial_connection_window_size(window)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    tokio::spawn(driver);
    Ok(Connection { sender, token: token.map(str::to_owned) })
}

impl Connection {
    fn grpc(&self) -> Grpc<Self> {
        Grpc::with_origin(self.clone(), http::Uri::from_static("https://control")).max_decoding_message_size(200 << 20)
    }

    fn with_token<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        request
    }

    pub async fn call<Q, A>(&self, path: &'static str, message: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc();
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = http::uri::PathAndQuery::from_static(path);
        let answer = tokio::time::timeout(PATIENCE, grpc.unary(self.with_token(message), path, ProstCodec::<Q, A>::default())).await;
        answer.expect("no answer in time").map(tonic::Response::into_inner)
    }

    pub async fn certificate(&self, csr: &str, identity: Option<&str>, validity: i64) -> Result<CertificateResponse, Status> {
        let metadata = identity.and_then(|identity| text_members([("ImpersonatedIdentity", identity)]));
        let request = CertificateRequest { csr: csr.to_owned(), validity, metadata };
        self.call("/istio.v1.auth.IstioCertificateService/CreateCertificate", request).await
    }

    /// Opens a delta stream.
    pub async fn stream(&self) -> Result<Stream, Status> {
        let (sender, mut requests) = mpsc::unbounded_channel();
        let requests = futures_util::stream::poll_fn(move |context| requests.poll_recv(context));
        let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
        let path = http::uri::PathAndQuery::from_static(path);
        let mut grpc = self.grpc();
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let answers = grpc.streaming(self.with_token(requests), path, ProstCodec::<DeltaRequest, DeltaResponse>::default()).await?;
        Ok(Stream { sender, answers: answers.into_inner() })
    }

    /// Opens a delta stream and subscribes to everything of both types, with what `view` has.
    pub async fn subscribe(&self, node: &str, view: &View) -> Result<Stream, Status> {
        let stream = self.stream().await?;
        for type_url in [ADDRESS, AUTHORIZATION] {
            stream.say(DeltaRequest { versions: view.versions(type_url), ..first(type_url, node) });
        }
        Ok(stream)
    }
}

/// A delta stream.
pub struct Stream {
    sender: mpsc::UnboundedSender<DeltaRequest>,
    answers: Streaming<DeltaResponse>,
}

impl Stream {
    pub fn say(&self, request: DeltaRequest) {
        self.sender.send(request).ok();
    }

    pub fn ask(&self, names: &[&str]) {
        let subscribe = names.iter().map(|name| (*name).to_owned()).collect();
        self.say(DeltaRequest { type_url: ADDRESS.to_owned(), subscribe, ..DeltaRequest::default() });
    }

    pub fn acknowledge(&self, response: &DeltaResponse) {
        self.say(DeltaRequest { type_url: response.type_url.clone(), nonce: response.nonce.clone(), ..DeltaRequest::default() });
    }

    /// The next response; `None` at a good end.
    pub async fn response(&mut self) -> Result<Option<DeltaResponse>, Status> {
        tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("no response in time")
    }

    /// The next response, which must come, acknowledged.
    pub async fn next(&mut self) -> DeltaResponse {
        let response = self.response().await.expect("an error").expect("the end");
        self.acknowledge(&response);
        response
    }

    /// Whether nothing comes for a while.
    pub async fn is_quiet(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.answers.message()).await.is_err()
    }

    /// Applies responses until the view is as wanted.
    pub async fn until(&mut self, view: &mut View, wanted: impl Fn(&View) -> bool) {
        while !wanted(view) {
            let response = self.next().await;
            view.apply(&response);
        }
    }
}

/// What a client believes: by type, name to version and content.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View(pub BTreeMap<String, BTreeMap<String, (String, Vec<u8>)>>);

impl View {
    pub fn apply(&mut self, response: &DeltaResponse) {
        let of = self.0.entry(response.type_url.clone()).or_default();
        for name in &response.removed {
            of.remove(name);
        }
        for resource in &response.resources {
            let content = resource.content.as_ref().unwrap();
            assert_eq!(content.type_url, response.type_url);
            of.insert(resource.name.clone(), (resource.version.clone(), content.value.clone()));
        }
    }

    pub fn names(&self, type_url: &str) -> Vec<String> {
        self.0.get(type_url).into_iter().flat_map(BTreeMap::keys).cloned().collect()
    }

    pub fn versions(&self, type_url: &str) -> HashMap<String, String> {
        self.0.get(type_url).into_iter().flatten().map(|(name, (version, _))| (name.clone(), version.clone())).collect()
    }

    /// A resource decoded.
    pub fn get<M: prost::Message + Default>(&self, type_url: &str, name: &str) -> Option<M> {
        let (_, content) = self.0.get(type_url)?.get(name)?;
        Some(M::decode(&content[..]).unwrap())
    }

    pub fn workload(&self, name: &str) -> Option<Workload> {
        self.get::<Address>(ADDRESS, name)?.workload
    }
}
