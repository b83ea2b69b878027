//! Peers driven by hand: HBONE as anybody could speak it, TLS with any identity that the lab's CA signs and stock `h2` underneath, so that a
//! test can send what no proxy of ours would. Everything here blocks the test's thread; a runtime of its own does the work.
#![allow(dead_code, unreachable_pub)]

use std::future::{Future, poll_fn};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bytes::Bytes;
use culvert::identity::{Config, Credential, Credentials, LocalIssuer, peer_identity};
use culvert::lifecycle::Clock;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response, Uri};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::mesh::PATIENCE;

/// Certificates of whomever the test wants to be.
pub struct Ca {
    runtime: Runtime,
    credentials: Credentials,
}

impl Ca {
    /// Signs with the files of a directory: the lab's own CA, or a stranger's.
    pub fn load(directory: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let issuer = LocalIssuer::load(directory, Clock::system()).unwrap();
        let (credentials, renewal) = Credentials::new(Config::default(), Arc::new(issuer), Clock::system());
        runtime.spawn(renewal);
        Self { runtime, credentials }
    }

    /// The certificate of an identity, `spiffe://…`.
    pub fn credential(&self, identity: &str) -> Arc<Credential> {
        let identity = identity.parse().unwrap();
        self.runtime.block_on(self.credentials.fetch(&identity)).unwrap()
    }

    /// A tunnel over a connected socket as this identity. `Err`: what the peer had against it.
    pub fn dial(&self, socket: TcpStream, identity: &str) -> Result<Caller, String> {
        self.dial_with(socket, self.credential(identity).client_config())
    }

    /// The same with any TLS client. Returns only when the peer has taken the certificate: it has answered a PING.
    pub fn dial_with(&self, socket: TcpStream, config: Arc<rustls::ClientConfig>) -> Result<Caller, String> {
        socket.set_nonblocking(true).unwrap();
        let address = socket.peer_addr().unwrap();
        let (told, ended) = watch::channel(None);
        let handshake = async {
            let socket = tokio::net::TcpStream::from_std(socket).unwrap();
            let name = ServerName::IpAddress(address.ip().into());
            let stream = TlsConnector::from(config).connect(name, socket).await.map_err(|error| error.to_string())?;
            let (requests, mut connection) = h2::client::handshake(stream).await.map_err(|error| error.to_string())?;
            let mut pings = connection.ping_pong().unwrap();
            tokio::spawn(async move {
                let end = connection.await.map_or_else(|error| error.to_string(), |()| "closed".to_owned());
                told.send_replace(Some(end));
            });
            pings.ping(h2::Ping::opaque()).await.map_err(|error| error.to_string())?;
            Ok::<_, String>(requests)
        };
        let requests = within(self.runtime.handle(), handshake)?;
        Ok(Caller { runtime: self.runtime.handle().clone(), requests, ended })
    }

    /// Serves tunnels as this identity. Each request is told to the [`Peer`] and answered with what `answer` makes of it; on a 200 the
    /// stream echoes.
    pub fn serve(&self, listener: TcpListener, identity: &str, answer: impl Fn(&Asked) -> Response<()> + Send + Sync + 'static) -> Peer {
        self.serve_with(listener, identity, Service { answer: Box::new(answer), connect: None })
    }

    /// The same for a gateway: the bytes of each stream go to a connection that `connect` makes, unread. When it fails, the answer is 503.
    pub fn forward(
        &self,
        listener: TcpListener,
        identity: &str,
        connect: impl Fn(&Asked) -> std::io::Result<TcpStream> + Send + Sync + 'static,
    ) -> Peer {
        self.serve_with(listener, identity, Service { answer: Box::new(welcome), connect: Some(Box::new(connect)) })
    }

    fn serve_with(&self, listener: TcpListener, identity: &str, service: Service) -> Peer {
        listener.set_nonblocking(true).unwrap();
        let acceptor = TlsAcceptor::from(self.credential(identity).server_config());
        let (tell, asked) = mpsc::channel();
        let (goaway, wanted) = watch::channel(0);
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = connections.clone();
        let service = Arc::new((Mutex::new(tell), service));
        self.runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((socket, from)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                let (acceptor, service, wanted) = (acceptor.clone(), service.clone(), wanted.clone());
                tokio::spawn(async move {
                    // Whoever does not like us hangs up.
                    let Ok(stream) = acceptor.accept(socket).await else { return };
                    let identity = peer_identity(stream.get_ref().1.peer_certificates().unwrap_or_default()).unwrap().to_string();
                    let Ok(connection) = h2::server::handshake(stream).await else { return };
                    service.1.serve(connection, &service.0, (from, identity), wanted).await;
                });
            }
        });
        Peer { asked, connections, goaway }
    }
}

/// Waits for something, for as long as anything may take.
fn within<T>(runtime: &Handle, future: impl Future<Output = T>) -> T {
    runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await }).expect("no answer in time")
}

/// A tunnel that was dialled.
pub struct Caller {
    runtime: Handle,
    requests: h2::client::SendRequest<Bytes>,
    ended: watch::Receiver<Option<String>>,
}

impl Caller {
    /// A CONNECT without headers.
    pub fn connect(&self, authority: &str) -> Answer {
        self.ask(connect(authority, &[])).unwrap()
    }

    /// Any request. The stream stays open from this side.
    pub fn ask(&self, request: Request<()>) -> Result<Answer, h2::Error> {
        let mut requests = self.requests.clone();
        within(&self.runtime, async {
            requests = requests.ready().await?;
            let (response, send) = requests.send_request(request, false)?;
            let (head, receive) = response.await?.into_parts();
            let stream = Stream { runtime: self.runtime.clone(), send, receive };
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, stream })
        })
    }

    /// Waits until the tunnel has ended, and says how.
    pub fn end(&mut self) -> String {
        let mut ended = self.ended.clone();
        within(&self.runtime, async { ended.wait_for(Option::is_some).await.unwrap().clone().unwrap() })
    }

    pub fn is_open(&self) -> bool {
        self.ended.borrow().is_none()
    }
}

/// A CONNECT to an authority.
pub fn connect(authority: &str, headers: &[(&str, &str)]) -> Request<()> {
    let uri = Uri::builder().authority(authority).build().unwrap();
    let mut request = Request::builder().method(Method::CONNECT).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// What a CONNECT was answered.
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub stream: Stream,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

/// One end of a stream.
pub struct Stream {
    runtime: Handle,
    send: SendStream<Bytes>,
    receive: RecvStream,
}

impl Stream {
    pub fn write(&mut self, bytes: &[u8]) {
        self.send.send_data(Bytes::copy_from_slice(bytes), false).unwrap();
    }

    pub fn finish(&mut self) {
        self.send.send_data(Bytes::new(), true).unwrap();
    }

    pub fn reset(&mut self, reason: Reason) {
        self.send.send_reset(reason);
    }

    /// The next bytes; `None` is the end of the stream.
    pub fn read(&mut self) -> Option<Result<Bytes, h2::Error>> {
        let read = async {
            let data = self.receive.data().await?;
            if let Ok(data) = &data {
                self.receive.flow_control().release_capacity(data.len()).unwrap();
            }
            Some(data)
        };
        within(&self.runtime, read)
    }

    /// All bytes until the end of the stream.
    pub fn read_to_end(&mut self) -> Result<Vec<u8>, h2::Error> {
        let mut all = Vec::new();
        while let Some(data) = self.read() {
            all.extend_from_slice(&data?);
        }
        Ok(all)
    }

    /// Sends bytes and expects the same back.
    pub fn echo(&mut self, bytes: &[u8]) {
        self.write(bytes);
        let mut answer = Vec::new();
        while answer.len() < bytes.len() {
            answer.extend_from_slice(&self.read().expect("an echo").unwrap());
        }
        assert_eq!(answer, bytes);
    }
}

/// A request that reached a [`Peer`].
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: Method,
    pub authority: String,
    pub scheme: Option<String>,
    pub path: String,
    pub headers: HeaderMap,
    /// The other end of the tunnel.
    pub from: SocketAddr,
    /// Who is there.
    pub identity: String,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        let mut all = self.headers.get_all(name).iter();
        let value = all.next().unwrap_or_else(|| panic!("no header {name} in {:?}", self.headers));
        assert!(all.next().is_none(), "{name} comes twice");
        value.to_str().unwrap()
    }
}

type Answerer = dyn Fn(&Asked) -> Response<()> + Send + Sync;
type Connector = dyn Fn(&Asked) -> std::io::Result<TcpStream> + Send + Sync;

struct Service {
    answer: Box<Answerer>,
    connect: Option<Box<Connector>>,
}

impl Service {
    async fn serve<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(
        &self,
        mut connection: h2::server::Connection<T, Bytes>,
        tell: &Mutex<mpsc::Sender<Asked>>,
        (from, identity): (SocketAddr, String),
        mut goaway: watch::Receiver<u32>,
    ) {
        goaway.mark_unchanged();
        loop {
            let accepted = tokio::select! {
                Ok(()) = goaway.changed() => {
                    connection.graceful_shutdown();
                    continue;
                }
                accepted = connection.accept() => accepted,
            };
            let Some(Ok((request, mut respond))) = accepted else { return };
            let (head, body) = request.into_parts();
            let asked = Asked {
                method: head.method,
                authority: head.uri.authority().map(ToString::to_string).unwrap_or_default(),
                scheme: head.uri.scheme_str().map(str::to_owned),
                path: head.uri.path().to_owned(),
                headers: head.headers,
                from,
                identity: identity.clone(),
            };
            let mut response = (self.answer)(&asked);
            let onward = self.connect.as_ref().map(|connect| connect(&asked));
            if let Some(Err(_)) = &onward {
                *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            }
            let refused = response.status() != http::StatusCode::OK;
            // The test may have lost interest.
            let _ = tell.lock().unwrap().send(asked);
            if let Ok(send) = respond.send_response(response, refused)
                && !refused
            {
                match onward {
                    Some(Ok(socket)) => tokio::spawn(pass_on(body, send, socket)),
                    _ => tokio::spawn(echo(body, send)),
                };
            }
        }
    }
}

async fn echo(mut receive: RecvStream, mut send: SendStream<Bytes>) {
    while let Some(Ok(data)) = receive.data().await {
        let _ = receive.flow_control().release_capacity(data.len());
        // Small enough to be buffered whole.
        if send.send_data(data, false).is_err() {
            return;
        }
    }
    let _ = send.send_data(Bytes::new(), true);
    let _ = poll_fn(|context| send.poll_reset(context)).await;
}

async fn pass_on(mut receive: RecvStream, mut send: SendStream<Bytes>, socket: TcpStream) {
    socket.set_nonblocking(true).unwrap();
    let (mut read, mut write) = tokio::net::TcpStream::from_std(socket).unwrap().into_split();
    // What breaks one direction breaks the other.
    let up = async {
        while let Some(data) = receive.data().await {
            let data = data.map_err(drop)?;
            let _ = receive.flow_control().release_capacity(data.len());
            write.write_all(&data).await.map_err(drop)?;
        }
        write.shutdown().await.map_err(drop)
    };
    let down = async {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match read.read(&mut buffer).await.map_err(drop)? {
                0 => return send.send_data(Bytes::new(), true).map_err(drop),
                count => send.send_data(Bytes::copy_from_slice(&buffer[..count]), false).map_err(drop)?,
            }
        }
    };
    if tokio::try_join!(up, down).is_err() {
        send.send_reset(Reason::CANCEL);
        // It must not look like an end.
        socket2::SockRef::from(write.as_ref()).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

/// A server of tunnels.
pub struct Peer {
    asked: mpsc::Receiver<Asked>,
    connections: Arc<AtomicUsize>,
    goaway: watch::Sender<u32>,
}

impl Peer {
    /// The next request.
    pub fn asked(&self) -> Asked {
        self.asked.recv_timeout(PATIENCE).expect("a request")
    }

    /// The next request that has come already.
    pub fn try_asked(&self) -> Option<Asked> {
        self.asked.try_recv().ok()
    }

    /// Whether nobody asks anything for a moment.
    pub fn is_silent(&self) -> bool {
        self.asked.recv_timeout(Duration::from_millis(100)).is_err()
    }

    /// TCP connections so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Says GOAWAY on all tunnels; streams may finish.
    pub fn say_goaway(&self) {
        self.goaway.send_modify(|times| *times += 1);
    }
}

/// A 200 without headers.
pub fn welcome(_: &Asked) -> Response<()> {
    Response::new(())
}
