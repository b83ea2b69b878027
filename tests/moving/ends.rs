//! Both ends of a tunnel, each of which can be moved while it runs.

use std::sync::{Arc, Mutex};

use culvert::forward::Ended;
use culvert::hbone::{
    Config, ConnectResponse, Dialer, Endpoint, Error, Frozen, Incoming, MovedStream, Mover, Pool, PoolKey, Role, ServerTunnel, accept,
};
use culvert::lifecycle::drain::{self, DrainTrigger, DrainWatcher};
use culvert::telemetry::Meter;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use crate::tunnel_peers::{Application, OurClient, PATIENCE, Realm, listen, quiet, soon};

/// Out and in again, with the bytes as long as they are asked for.
pub fn through_bytes(frozen: Frozen) -> (Frozen, usize) {
    let ids = frozen.streams();
    let (bytes, sockets) = frozen.into_parts();
    assert_eq!(sockets.len(), 1 + ids.len());
    let taken = Frozen::from_parts(&bytes, sockets).unwrap();
    assert_eq!(taken.streams(), ids);
    (taken, bytes.len())
}

/// Relays of moved streams, and how they ended.
#[derive(Default)]
pub struct Relays(JoinSet<Ended>);

impl Relays {
    fn adopt(&mut self, streams: Vec<MovedStream>) {
        for stream in streams {
            self.0.spawn(async move { stream.relay(&Arc::new(Meter::default())).await });
        }
    }
}

/// Our serving end of one tunnel.
pub struct Server {
    pub address: std::net::SocketAddr,
    listener: TcpListener,
    realm_credential: Arc<culvert::identity::Credential>,
    pub endpoint: Arc<Endpoint>,
    mover: Mutex<Option<Mover>>,
    give: mpsc::UnboundedSender<Incoming>,
    pub requests: mpsc::UnboundedReceiver<Incoming>,
    watcher: DrainWatcher,
    pub trigger: Option<DrainTrigger>,
    pub served: Vec<JoinHandle<Result<(), Error>>>,
    pub relays: Relays,
}

impl Server {
    pub async fn new(realm: &Realm, config: Config) -> Self {
        let (listener, address) = listen().await;
        let (give, requests) = mpsc::unbounded_channel();
        let (trigger, watcher) = drain::channel();
        Self {
            address,
            listener,
            realm_credential: realm.credential("server").await,
            endpoint: Arc::new(quiet(config)),
            mover: Mutex::default(),
            give,
            requests,
            watcher,
            trigger: Some(trigger),
            served: Vec::new(),
            relays: Relays::default(),
        }
    }

    /// Tunnels accepted from now on have next to no room for what is sent.
    pub fn small_send_buffers(self) -> Self {
        socket2::SockRef::from(&self.listener).set_send_buffer_size(16 << 10).unwrap();
        self
    }

    /// Takes the next tunnel and its first stream.
    pub async fn accept_with_stream(&mut self) -> Application {
        self.accept().await;
        self.accept_stream().await
    }

    /// Takes the next tunnel.
    pub async fn accept(&mut self) {
        let (socket, peer) = soon(self.listener.accept()).await.unwrap();
        let tunnel = soon(accept(socket, peer, &self.realm_credential, &self.endpoint)).await.unwrap();
        self.serve(tunnel);
    }

    fn serve(&mut self, tunnel: ServerTunnel) {
        *self.mover.lock().unwrap() = Some(tunnel.mover());
        let (give, watcher) = (self.give.clone(), self.watcher.clone());
        self.served.push(tokio::spawn(tunnel.serve(watcher, move |incoming| drop(give.send(incoming)))));
    }

    pub fn mover(&self) -> Mover {
        self.mover.lock().unwrap().clone().unwrap()
    }

    pub async fn freeze(&self) -> Frozen {
        soon(self.mover().freeze(PATIENCE)).await.unwrap()
    }

    pub fn take_up(&mut self, frozen: Frozen) {
        let (tunnel, streams) = ServerTunnel::take_up(frozen, &self.realm_credential, &self.endpoint).unwrap();
        self.serve(tunnel);
        self.relays.adopt(streams);
    }

    /// Moves the tunnel; how long its state was.
    pub async fn move_it(&mut self) -> usize {
        let (frozen, length) = through_bytes(self.freeze().await);
        self.take_up(frozen);
        length
    }

    pub async fn request(&mut self) -> Incoming {
        soon(self.requests.recv()).await.unwrap()
    }

    pub async fn accept_stream(&mut self) -> Application {
        let stream = self.request().await.accept(&ConnectResponse::default()).unwrap();
        Application::behind(stream, Role::Server).await
    }

    pub async fn accept_stalled(&mut self) -> Application {
        let stream = self.request().await.accept(&ConnectResponse::default()).unwrap();
        Application::with_small_buffers(stream, Role::Server).await
    }
}

/// Our dialling end; every move goes to a pool of its own, as in another process.
pub struct Client {
    pub pool: Arc<Pool>,
    pub key: PoolKey,
    pub inner: OurClient,
    dialer: Arc<dyn Dialer>,
    config: Config,
    pub relays: Relays,
}

impl Client {
    pub async fn to(address: std::net::SocketAddr, realm: &Realm, config: Config) -> Self {
        let inner = OurClient::to(address, realm, config.clone()).await;
        Self { pool: inner.pool.clone(), key: inner.key.clone(), dialer: inner.dialer.clone(), inner, config, relays: Relays::default() }
    }

    pub async fn open(&self) -> Application {
        let request = crate::tunnel_peers::request();
        let (stream, _, _) = soon(self.pool.open(&self.key, &self.inner.credential, &request)).await.unwrap();
        Application::behind(stream, Role::Client).await
    }

    pub fn mover(&self) -> Mover {
        let mut movers = self.pool.movers();
        assert_eq!(movers.len(), 1);
        movers.remove(0).1
    }

    pub async fn freeze(&self) -> Frozen {
        soon(self.mover().freeze(PATIENCE)).await.unwrap()
    }

    pub fn take_up(&mut self, frozen: Frozen) {
        self.pool = Arc::new(Pool::new(Arc::new(quiet(self.config.clone())), self.dialer.clone()));
        self.relays.adopt(self.pool.take_up(self.key.clone(), &self.inner.credential, frozen).unwrap());
    }

    pub async fn move_it(&mut self) -> usize {
        let (frozen, length) = through_bytes(self.freeze().await);
        self.take_up(frozen);
        length
    }
}

/// Numbers that look random and are the same every time.
#[derive(Clone)]
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) >> 1).unwrap() % below
    }
}

/// Passes everything on in pieces of random sizes, so that hardly any record arrives whole; behind [`Pieces::hold`] nothing any more.
pub struct Pieces {
    pub address: std::net::SocketAddr,
}

impl Pieces {
    pub async fn before(target: std::net::SocketAddr, seed: u64) -> Self {
        let (listener, address) = listen().await;
        tokio::spawn(async move {
            let (near, _) = listener.accept().await.unwrap();
            let far = TcpStream::connect(target).await.unwrap();
            far.set_nodelay(true).unwrap();
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            tokio::spawn(in_pieces(near_read, far_write, Dice(seed)));
            tokio::spawn(in_pieces(far_read, near_write, Dice(seed + 1)));
        });
        Self { address }
    }
}

async fn in_pieces(mut from: tokio::net::tcp::OwnedReadHalf, mut to: tokio::net::tcp::OwnedWriteHalf, mut dice: Dice) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = vec![0; 40_000];
    loop {
        let most = 1 + dice.roll(40_000);
        let Ok(count) = from.read(&mut buffer[..most]).await else { return };
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        for _ in 0..dice.roll(3) {
            tokio::task::yield_now().await;
        }
    }
}
