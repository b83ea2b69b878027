//! In-process peers of tunnels over loopback TCP: certificates of one local CA, stock tokio-rustls and `h2` on either side as the oracle, our
//! own two sides, and applications.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use culvert::hbone::{Config, ConnectRequest, ConnectResponse, Dialer, Endpoint, Error, Incoming, Pool, PoolKey, Role, TunnelStream, accept};
use culvert::identity::{Credential, Credentials, LocalIssuer};
use culvert::lifecycle::Clock;
use culvert::lifecycle::drain::{self, DrainMode, DrainTrigger};
use culvert::model::SpiffeId;
use culvert::telemetry::Meter;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// Nothing in these tests takes longer unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// An endpoint without the usual PINGs: one would take along what was left behind, and hide a wake-up that was lost.
pub fn quiet(mut config: Config) -> Endpoint {
    if config.ping_interval == Config::default().ping_interval {
        config.ping_interval = 6 * PATIENCE;
    }
    Endpoint::new(config)
}

/// Fails loudly instead of hanging.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("took too long")
}

/// Waits until a condition holds.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Whoever has a certificate of one CA.
pub struct Realm {
    pub credentials: Credentials,
    _renewal: Option<JoinHandle<()>>,
    _directory: Option<tempfile::TempDir>,
}

pub fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap()
}

impl Realm {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::system();
        LocalIssuer::create(directory.path(), &clock).unwrap();
        let issuer = LocalIssuer::load(directory.path(), clock.clone()).unwrap();
        let (credentials, renewal) = Credentials::new(culvert::identity::Config::default(), Arc::new(issuer), clock);
        Self { credentials, _renewal: Some(tokio::spawn(renewal)), _directory: Some(directory) }
    }

    /// The certificates of a store that somebody else runs.
    pub fn of(credentials: Credentials) -> Self {
        Self { credentials, _renewal: None, _directory: None }
    }

    /// The certificate of a service account.
    pub async fn credential(&self, account: &str) -> Arc<Credential> {
        self.credentials.fetch(&id(account)).await.unwrap()
    }

    /// A new certificate of the same account.
    pub async fn renewed(&self, account: &str) -> Arc<Credential> {
        self.credentials.forget(&id(account));
        self.credential(account).await
    }
}

/// Like our own listeners and dialled sockets, all of these have TCP_NODELAY.
pub async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // Accepted sockets inherit it.
    socket2::SockRef::from(&listener).set_tcp_nodelay(true).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

pub async fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    socket
}

/// Two ends of a connection.
pub async fn connected() -> (TcpStream, TcpStream) {
    let (listener, address) = listen().await;
    let (near, far) = tokio::join!(connect(address), listener.accept());
    (near, far.unwrap().0)
}

/// A stock TLS handshake as client, with the configuration of a credential.
pub async fn tls_connect(socket: TcpStream, credential: &Credential) -> client::TlsStream<TcpStream> {
    let name = ServerName::try_from("127.0.0.1").unwrap();
    TlsConnector::from(credential.client_config()).connect(name, socket).await.unwrap()
}

/// A stock TLS handshake as server.
pub async fn tls_accept(socket: TcpStream, credential: &Credential) -> server::TlsStream<TcpStream> {
    TlsAcceptor::from(credential.server_config()).accept(socket).await.unwrap()
}

/// A TLS connection to an address.
pub async fn tls_to(address: SocketAddr, credential: &Credential) -> client::TlsStream<TcpStream> {
    tls_connect(connect(address).await, credential).await
}

/// What the stock server does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// 200, then every byte back, and the end after the end.
    Echo,
    /// Another status.
    Status(u16),
    /// Nothing, for ever.
    Silence,
}

/// A server of stock tokio-rustls and `h2`.
pub struct StockServer {
    pub address: SocketAddr,
    /// Connections that finished their handshakes.
    pub connections: Arc<AtomicUsize>,
    /// Requests seen.
    pub requests: Arc<AtomicUsize>,
    /// Connections that have ended.
    pub ended: Arc<AtomicUsize>,
    /// The authorities that each connection asked for.
    pub seen: Arc<Mutex<BTreeMap<usize, Vec<String>>>>,
    goaway: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for StockServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl StockServer {
    pub async fn start(credential: Arc<Credential>, answer: Answer) -> Self {
        Self::with(credential, answer, |_| {}).await
    }

    pub async fn with(credential: Arc<Credential>, answer: Answer, configure: impl FnOnce(&mut h2::server::Builder)) -> Self {
        Self::speaking((*credential.server_config()).clone(), answer, configure).await
    }

    /// With a configuration of TLS that is not one of ours.
    pub async fn speaking(tls: rustls::ServerConfig, answer: Answer, configure: impl FnOnce(&mut h2::server::Builder)) -> Self {
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let (listener, address) = listen().await;
        let mut builder = h2::server::Builder::new();
        configure(&mut builder);
        let (connections, requests, ended) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let goaway = Arc::new(Notify::new());
        let seen = Arc::<Mutex<BTreeMap<usize, Vec<String>>>>::default();
        let noted = seen.clone();
        let (counted, counted_requests, counted_ends, told) = (connections.clone(), requests.clone(), ended.clone(), goaway.clone());
        let task = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let (acceptor, builder) = (acceptor.clone(), builder.clone());
                let (connections, requests, ended, goaway) = (counted.clone(), counted_requests.clone(), counted_ends.clone(), told.clone());
                let noted = noted.clone();
                tokio::spawn(async move {
                    // The client may refuse us.
                    let Ok(stream) = acceptor.accept(socket).await else { return };
                    let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
                    let number = connections.fetch_add(1, Ordering::SeqCst);
                    loop {
                        let request = tokio::select! {
                            request = connection.accept() => request,
                            () = goaway.notified() => {
                                connection.graceful_shutdown();
                                continue;
                            }
                        };
                        let Some(Ok((request, respond))) = request else { break };
                        requests.fetch_add(1, Ordering::SeqCst);
                        noted.lock().unwrap().entry(number).or_default().push(request.uri().to_string());
                        tokio::spawn(answer_request(request, respond, answer));
                    }
                    ended.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, connections, requests, ended, seen, goaway, task }
    }

    /// Every connection says goodbye gracefully.
    pub fn goaway(&self) {
        self.goaway.notify_waiters();
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn answer_request(request: http::Request<h2::RecvStream>, mut respond: h2::server::SendResponse<Bytes>, answer: Answer) {
    let mut response = http::Response::new(());
    match answer {
        Answer::Silence => drop(poll_fn(|context| respond.poll_reset(context)).await),
        Answer::Status(status) => {
            *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
            let _ = respond.send_response(response, true);
        }
        Answer::Echo => {
            let Ok(mut send) = respond.send_response(response, false) else { return };
            let mut body = request.into_body();
            while let Some(Ok(data)) = body.data().await {
                let _ = body.flow_control().release_capacity(data.len());
                if stock_send(&mut send, data).await.is_err() {
                    return;
                }
            }
            let _ = send.send_data(Bytes::new(), true);
        }
    }
}

/// Sends as the window allows, with stock `h2`.
pub async fn stock_send(send: &mut h2::SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let capacity = match poll_fn(|context| send.poll_capacity(context)).await {
            Some(capacity) => capacity?,
            None => return Err(h2::Reason::STREAM_CLOSED.into()),
        };
        let part = data.split_to(capacity.min(data.len()));
        send.send_data(part, false)?;
    }
    Ok(())
}

/// A client of stock tokio-rustls and `h2`.
pub struct StockClient {
    requests: h2::client::SendRequest<Bytes>,
    task: JoinHandle<Result<(), h2::Error>>,
}

impl Drop for StockClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A stream of the stock client.
pub struct StockStream {
    pub send: h2::SendStream<Bytes>,
    pub receive: h2::RecvStream,
}

impl StockClient {
    pub async fn connect(address: SocketAddr, credential: &Credential) -> Self {
        Self::over(tls_to(address, credential).await).await
    }

    /// Over a connection whose handshake is done.
    pub async fn over(stream: client::TlsStream<TcpStream>) -> Self {
        let (requests, connection) = h2::client::Builder::new().enable_push(false).handshake(stream).await.unwrap();
        Self { requests, task: tokio::spawn(connection) }
    }

    /// The same over a connection that may break.
    pub async fn try_connect(address: SocketAddr, credential: &Credential) -> Option<Self> {
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = TlsConnector::from(credential.client_config()).connect(name, connect(address).await).await.ok()?;
        let (requests, connection) = h2::client::Builder::new().enable_push(false).handshake(stream).await.ok()?;
        Some(Self { requests, task: tokio::spawn(connection) })
    }

    /// The status, and the stream when it is 200.
    pub async fn open(&self, authority: &str) -> Result<(u16, StockStream), h2::Error> {
        let uri = http::Uri::builder().authority(authority).build().unwrap();
        let request = http::Request::builder().method(http::Method::CONNECT).uri(uri).body(()).unwrap();
        let (response, send) = self.requests.clone().ready().await?.send_request(request, false)?;
        let response = response.await?;
        Ok((response.status().as_u16(), StockStream { send, receive: response.into_body() }))
    }
}

impl StockStream {
    pub async fn send(&mut self, bytes: &[u8]) {
        stock_send(&mut self.send, Bytes::copy_from_slice(bytes)).await.unwrap();
    }

    pub fn finish(&mut self) {
        self.send.send_data(Bytes::new(), true).unwrap();
    }

    /// The next bytes; `None` at the end.
    pub async fn receive(&mut self) -> Option<Result<Bytes, h2::Error>> {
        let data = self.receive.data().await?;
        if let Ok(data) = &data {
            self.receive.flow_control().release_capacity(data.len()).unwrap();
        }
        Some(data)
    }

    pub async fn read_to_end(&mut self) -> Result<Vec<u8>, h2::Error> {
        let mut bytes = Vec::new();
        while let Some(data) = self.receive().await {
            bytes.extend_from_slice(&data?);
        }
        Ok(bytes)
    }
}

/// Our serving side. Requests come out of a channel; the test decides about them.
pub struct OurServer {
    pub address: SocketAddr,
    pub requests: mpsc::UnboundedReceiver<Incoming>,
    /// How each tunnel ended, refused handshakes included.
    pub ended: mpsc::UnboundedReceiver<Result<(), Error>>,
    pub tunnels: Arc<AtomicUsize>,
    trigger: Option<DrainTrigger>,
    task: JoinHandle<()>,
}

impl Drop for OurServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl OurServer {
    pub async fn start(credential: Arc<Credential>, endpoint: Arc<Endpoint>) -> Self {
        let (listener, address) = listen().await;
        let (give, requests) = mpsc::unbounded_channel();
        let (end, ended) = mpsc::unbounded_channel();
        let (trigger, watcher) = drain::channel();
        let tunnels = Arc::<AtomicUsize>::default();
        let counted = tunnels.clone();
        let task = tokio::spawn(async move {
            loop {
                let (socket, peer) = listener.accept().await.unwrap();
                let (credential, endpoint, give, end) = (credential.clone(), endpoint.clone(), give.clone(), end.clone());
                let (watcher, counted) = (watcher.clone(), counted.clone());
                tokio::spawn(async move {
                    let outcome = match accept(socket, peer, &credential, &endpoint).await {
                        Ok(tunnel) => {
                            counted.fetch_add(1, Ordering::SeqCst);
                            // A test that is over takes no more requests.
                            tunnel.serve(watcher, |incoming| drop(give.send(incoming))).await
                        }
                        Err(error) => Err(error),
                    };
                    let _ = end.send(outcome);
                });
            }
        });
        Self { address, requests, ended, tunnels, trigger: Some(trigger), task }
    }

    pub async fn with(realm: &Realm, config: Config) -> Self {
        Self::start(realm.credential("server").await, Arc::new(quiet(config))).await
    }

    /// The next request.
    pub async fn request(&mut self) -> Incoming {
        soon(self.requests.recv()).await.unwrap()
    }

    /// Accepts the next request; the test is the application behind it.
    pub async fn accept_one(&mut self) -> Application {
        Application::behind(self.request().await.accept(&ConnectResponse::default()).unwrap(), Role::Server).await
    }

    /// How the next tunnel to end did so.
    pub async fn tunnel_end(&mut self) -> Result<(), Error> {
        soon(self.ended.recv()).await.unwrap()
    }

    /// Starts a drain. The result is whether everything finished by itself.
    pub fn drain(&mut self, mode: DrainMode, deadline: Duration) -> JoinHandle<bool> {
        let trigger = self.trigger.take().unwrap();
        tokio::spawn(trigger.start(mode, deadline))
    }

    /// Accepts every request from now on and sends every byte back.
    pub fn echo(mut self) -> Self {
        let (_, empty) = mpsc::unbounded_channel();
        let mut requests = std::mem::replace(&mut self.requests, empty);
        tokio::spawn(async move {
            while let Some(incoming) = requests.recv().await {
                tokio::spawn(async move {
                    let Ok(stream) = incoming.accept(&ConnectResponse::default()) else { return };
                    let (mut application, socket) = connected().await;
                    tokio::spawn(async move {
                        let (mut read, mut write) = application.split();
                        // The other side may cut it.
                        if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                            let _ = write.shutdown().await;
                        }
                    });
                    stream.relay(socket, Role::Server, &Arc::new(Meter::default())).await;
                });
            }
        });
        self
    }
}

/// An application on the far side of a relay: what it writes goes into the tunnel.
#[derive(Debug)]
pub struct Application {
    pub socket: TcpStream,
    pub meter: Arc<Meter>,
    pub relay: JoinHandle<culvert::forward::Ended>,
}

impl Application {
    pub async fn behind(stream: TunnelStream, role: Role) -> Self {
        Self::on(connected().await, stream, role)
    }

    /// The kernel holds next to nothing for it: what the application does not read stays in the relay.
    pub async fn with_small_buffers(stream: TunnelStream, role: Role) -> Self {
        let (socket, relayed) = connected().await;
        socket2::SockRef::from(&socket).set_recv_buffer_size(16 << 10).unwrap();
        socket2::SockRef::from(&relayed).set_send_buffer_size(16 << 10).unwrap();
        Self::on((socket, relayed), stream, role)
    }

    fn on((socket, relayed): (TcpStream, TcpStream), stream: TunnelStream, role: Role) -> Self {
        let meter = Arc::new(Meter::default());
        let counted = meter.clone();
        let relay = tokio::spawn(async move { stream.relay(relayed, role, &counted).await });
        Self { socket, meter, relay }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        soon(self.socket.write_all(bytes)).await.unwrap();
    }

    pub async fn finish(&mut self) {
        self.socket.shutdown().await.unwrap();
    }

    pub async fn expect(&mut self, bytes: &[u8]) {
        let mut got = vec![0; bytes.len()];
        soon(self.socket.read_exact(&mut got)).await.unwrap();
        assert_eq!(got, bytes);
    }

    pub async fn read_to_end(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        soon(self.socket.read_to_end(&mut bytes)).await.map(|_| bytes)
    }

    /// Sends bytes through an echo and gets them back.
    pub async fn echoes(&mut self, bytes: &[u8]) {
        self.send(bytes).await;
        self.expect(bytes).await;
    }
}

/// Dials loopback, counts, and can be held up or made to fail.
#[derive(Default)]
pub struct CountingDialer {
    pub dials: AtomicUsize,
    pub error: Option<io::ErrorKind>,
    /// Dials wait until this is notified.
    pub gate: Option<Notify>,
}

impl Dialer for CountingDialer {
    fn dial(&self, target: SocketAddr) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send + '_>> {
        Box::pin(async move {
            self.dials.fetch_add(1, Ordering::SeqCst);
            if let Some(gate) = &self.gate {
                gate.notified().await;
            }
            match self.error {
                Some(kind) => Err(kind.into()),
                None => TcpStream::connect(target).await.and_then(|socket| socket.set_nodelay(true).map(|()| socket)),
            }
        })
    }
}

/// Our dialling side: a pool and what it is asked with.
pub struct OurClient {
    pub pool: Arc<Pool>,
    pub dialer: Arc<CountingDialer>,
    pub credential: Arc<Credential>,
    pub key: PoolKey,
}

impl OurClient {
    pub async fn to(address: SocketAddr, realm: &Realm, config: Config) -> Self {
        Self::with(address, realm, quiet(config), CountingDialer::default()).await
    }

    pub async fn with(address: SocketAddr, realm: &Realm, endpoint: Endpoint, dialer: CountingDialer) -> Self {
        let credential = realm.credential("client").await;
        let dialer = Arc::new(dialer);
        let pool = Arc::new(Pool::new(Arc::new(endpoint), dialer.clone()));
        let key = PoolKey {
            source: id("client"),
            source_ip: "10.0.0.1".parse().unwrap(),
            expected: vec![id("server")],
            next_hop: address,
            destination: "cluster//Pod/default/server".into(),
            generation: credential.generation,
        };
        Self { pool, dialer, credential, key }
    }

    pub fn dials(&self) -> usize {
        self.dialer.dials.load(Ordering::SeqCst)
    }

    pub async fn open(&self) -> Result<Application, Arc<Error>> {
        self.open_with(&self.key).await
    }

    pub async fn open_with(&self, key: &PoolKey) -> Result<Application, Arc<Error>> {
        let (stream, _, peer) = soon(self.pool.open(key, &self.credential, &request())).await?;
        assert!(key.expected.contains(&peer));
        Ok(Application::behind(stream, Role::Client).await)
    }
}

pub fn request() -> ConnectRequest {
    ConnectRequest {
        authority: "10.0.0.2:80".parse().unwrap(),
        baggage: None,
        forwarded: None,
        traceparent: None,
        forwarded_network: None,
        reset_is_end: false,
    }
}
