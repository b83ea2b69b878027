//! A delta xDS server that does what a test says, written from the reference alone (dataplane §5, node-and-control B.4). Like a gRPC server in Go
//! it sends no headers before its first answer.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use culvert::wire::google::Any;
use culvert::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use culvert::wire::{authorization, workload};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use rcgen::SanType;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tonic::metadata::MetadataMap;
use tonic::server::StreamingService;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::pki::{Authority, Presented, pem, workload as leaf};

/// Nothing that is expected takes so long.
pub const SOON: Duration = Duration::from_secs(60);

type Answer = Result<DeltaDiscoveryResponse, Status>;

/// Certificates of a control plane.
pub struct Trust {
    root: Authority,
    pub server: Presented,
}

impl Trust {
    /// For these host names and 127.0.0.1.
    pub fn new(names: &[&str]) -> Self {
        let root = Authority::root("control plane");
        let mut params = leaf(&[]);
        params.subject_alt_names = names.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())).collect();
        if names.is_empty() {
            params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        }
        let server = root.leaf(params);
        Self { root, server }
    }

    pub fn root_pem(&self) -> String {
        pem("CERTIFICATE", self.root.signer.der())
    }

    pub fn write_root(&self, path: &Path) {
        std::fs::write(path, self.root_pem()).unwrap();
    }
}

/// A listening server. Dropping it cuts every connection.
pub struct Server {
    pub address: SocketAddr,
    streams: mpsc::UnboundedReceiver<ServerStream>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Cuts every connection; nobody listens when it returns.
    pub async fn stop(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    pub async fn start(trust: &Trust) -> Self {
        Self::at(([127, 0, 0, 1], 0).into(), trust).await
    }

    pub async fn at(address: SocketAddr, trust: &Trust) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(trust.server.server()));
        let (sender, streams) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let (acceptor, sender) = (acceptor.clone(), sender.clone());
                connections.spawn(async move {
                    let Ok(tls) = acceptor.accept(socket).await else { return };
                    let service = hyper::service::service_fn(move |request| {
                        let handler = Handler(sender.clone());
                        async move {
                            assert_eq!(http::Request::uri(&request).path(), culvert::wire::xds::DELTA_METHOD);
                            let codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
                            let mut grpc = tonic::server::Grpc::new(codec).max_decoding_message_size(MAX_REQUEST);
                            Ok::<_, std::convert::Infallible>(grpc.streaming(handler, request).await)
                        }
                    });
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(tls), service).await;
                });
            }
        });
        Self { address, streams, task }
    }

    /// The next stream that a client opens.
    pub async fn accept(&mut self) -> ServerStream {
        timeout(SOON, self.streams.recv()).await.expect("no client came").unwrap()
    }

    /// The next stream, its two first requests read and answered with what is given; ACKs are read.
    pub async fn synced(&mut self, addresses: Vec<Resource>, policies: Vec<Resource>) -> ServerStream {
        let mut stream = self.accept().await;
        stream.request().await;
        stream.request().await;
        stream.push(ADDRESS_TYPE, addresses, &[]).await;
        stream.acked().await;
        stream.push(AUTHORIZATION_TYPE, policies, &[]).await;
        stream.acked().await;
        stream
    }

    /// Whether a client has opened a stream that nobody accepted yet.
    pub fn has_stream(&self) -> bool {
        !self.streams.is_empty()
    }
}

/// As in servers in Go.
const MAX_REQUEST: usize = 4 << 20;

struct Handler(mpsc::UnboundedSender<ServerStream>);

impl StreamingService<DeltaDiscoveryRequest> for Handler {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = BoxStream<'static, Answer>;
    type Future = futures_util::future::BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let (metadata, _, requests) = request.into_parts();
        let (answers, mut receiver) = mpsc::channel(64);
        let _ = self.0.send(ServerStream { metadata, requests, answers, nonce: 0 });
        Box::pin(async move {
            let first = match receiver.recv().await {
                Some(Ok(first)) => first,
                Some(Err(status)) => return Err(status),
                None => return Ok(Response::new(stream::empty().boxed())),
            };
            let rest = stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|answer| (answer, receiver)) });
            Ok(Response::new(stream::once(async { Ok(first) }).chain(rest).boxed()))
        })
    }
}

/// The server's end of one stream. Dropping it ends the stream well.
pub struct ServerStream {
    pub metadata: MetadataMap,
    requests: Streaming<DeltaDiscoveryRequest>,
    answers: mpsc::Sender<Answer>,
    nonce: u64,
}

impl ServerStream {
    /// The client's next request.
    pub async fn request(&mut self) -> DeltaDiscoveryRequest {
        timeout(SOON, self.requests.message()).await.expect("no request came").unwrap().expect("the client ended the stream")
    }

    /// The client's next request, or why there is none.
    pub async fn next(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        timeout(SOON, self.requests.message()).await.expect("neither a request nor an end came")
    }

    /// Sends a push; says its nonce.
    pub async fn push(&mut self, type_url: &str, resources: Vec<Resource>, gone: &[&str]) -> String {
        self.nonce += 1;
        let nonce = format!("n{}", self.nonce);
        let push = DeltaDiscoveryResponse {
            system_version_info: "test".into(),
            resources,
            type_url: type_url.into(),
            nonce: nonce.clone(),
            removed_resources: gone.iter().map(|name| (*name).to_owned()).collect(),
        };
        self.answers.send(Ok(push)).await.unwrap();
        nonce
    }

    /// Reads the ACK of the push before.
    pub async fn acked(&mut self) {
        let answer = self.request().await;
        assert_eq!((answer.response_nonce, answer.error_detail), (format!("n{}", self.nonce), None));
    }

    /// Reads the NACK of the push before; says its message.
    pub async fn nacked(&mut self) -> String {
        let answer = self.request().await;
        assert_eq!(answer.response_nonce, format!("n{}", self.nonce));
        answer.error_detail.expect("an ACK").message
    }

    /// Ends the stream with a status.
    pub async fn fail(self, code: Code, message: &str) {
        let _ = self.answers.send(Err(Status::new(code, message))).await;
    }
}

pub fn resource(name: &str, version: &str, type_url: &str, content: &impl Message) -> Resource {
    let any = Any { type_url: type_url.into(), value: content.encode_to_vec().into() };
    Resource { version: version.into(), resource: Some(any), name: name.into(), aliases: Vec::new() }
}

/// A pod of namespace `shop` with an address.
pub fn pod(name: &str, ip: [u8; 4]) -> workload::Workload {
    workload::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![ip.to_vec().into()],
        tunnel_protocol: workload::TunnelProtocol::Hbone.into(),
        ..workload::Workload::default()
    }
}

pub fn pod_resource(from: &workload::Workload, version: &str) -> Resource {
    let address = workload::Address { r#type: Some(workload::AddressType::Workload(from.clone())) };
    resource(&from.uid, version, ADDRESS_TYPE, &address)
}

/// A service of namespace `shop` with a virtual address.
pub fn service_resource(host: &str, vip: [u8; 4]) -> Resource {
    service(host, vip, Vec::new())
}

/// The same with `backend` behind a port of it.
pub fn service_resource_with(host: &str, vip: [u8; 4], backend: &mut workload::Workload, (service_port, target_port): (u32, u32)) -> Resource {
    let ports = vec![workload::Port { service_port, target_port, ..Default::default() }];
    backend.services.insert(format!("shop/{host}"), workload::PortList { ports: ports.clone() });
    service(host, vip, ports)
}

fn service(host: &str, vip: [u8; 4], ports: Vec<workload::Port>) -> Resource {
    let at = workload::NetworkAddress { network: String::new(), address: vip.to_vec().into(), length: None };
    let (name, addresses) = (host.to_owned(), vec![at]);
    let service = workload::Service { namespace: "shop".into(), hostname: name.clone(), name, addresses, ports, ..Default::default() };
    let address = workload::Address { r#type: Some(workload::AddressType::Service(service)) };
    resource(&format!("shop/{host}"), "s1", ADDRESS_TYPE, &address)
}

/// A policy without rules: ALLOW permits nobody, DENY denies nobody.
pub fn policy_resource(name: &str, scope: authorization::Scope, action: i32) -> Resource {
    let policy = authorization::Authorization { name: name.into(), namespace: "shop".into(), scope: scope.into(), action, ..Default::default() };
    resource(&format!("shop/{name}"), "", AUTHORIZATION_TYPE, &policy)
}
