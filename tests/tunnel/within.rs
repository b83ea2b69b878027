//! Tunnels within tunnels, through a gateway that passes bytes on and cannot read them (reference, dataplane §2.8).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use culvert::hbone::{Config, ConnectRequest, Endpoint, Error, Inner, PoolKey, Refusal, Role};
use culvert::model::SpiffeId;
use culvert::telemetry::Meter;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::tunnel_peers::{Application, CountingDialer, OurClient, OurServer, Realm, id, request, soon};

/// A client, the gateway of another network, and a server there. They belong to one CA and are three identities.
struct Scene {
    client: OurClient,
    server: OurServer,
    /// The authorities that the gateway was asked for.
    asked: Arc<Mutex<Vec<String>>>,
    gateway: JoinHandle<()>,
    _realm: Realm,
}

impl Scene {
    async fn new() -> Self {
        Self::leading_to("far", Config::default()).await
    }

    /// Behind the gateway is this account.
    async fn leading_to(account: &str, config: Config) -> Self {
        let realm = Realm::new();
        let server = OurServer::start(realm.credential(account).await, Arc::new(Endpoint::new(Config::default()))).await;
        let mut gateway = OurServer::with(&realm, Config::default()).await;
        let client = OurClient::with(gateway.address, &realm, Endpoint::new(config), CountingDialer::default()).await;
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let (noted, to) = (asked.clone(), server.address);
        let gateway = tokio::spawn(async move {
            while let Some(incoming) = gateway.requests.recv().await {
                noted.lock().unwrap().push(incoming.request().unwrap().authority.to_string());
                let Ok(socket) = TcpStream::connect(to).await else { return incoming.refuse(Refusal::Unavailable) };
                socket.set_nodelay(true).unwrap();
                let stream = incoming.accept(&culvert::hbone::ConnectResponse::default()).unwrap();
                tokio::spawn(async move { stream.relay(socket, Role::Server, &Arc::new(Meter::default())).await });
            }
        });
        Self { client, server, asked, gateway, _realm: realm }
    }

    async fn open(&self) -> Result<Application, Arc<Error>> {
        open(&self.client, &self.client.key, &[id("far")]).await
    }

    /// A connection and the application at its far end.
    async fn connected(&mut self) -> (Application, Application) {
        let expected = [id("far")];
        let (near, far) = tokio::join!(open(&self.client, &self.client.key, &expected), self.server.accept_one());
        (near.unwrap(), far)
    }
}

async fn open(client: &OurClient, key: &PoolKey, expected: &[SpiffeId]) -> Result<Application, Arc<Error>> {
    let outer = ConnectRequest { authority: "web.far:80".parse().unwrap(), ..request() };
    let inner = ConnectRequest { forwarded_network: Some("near".into()), ..outer.clone() };
    let inner = Inner { expected, request: &inner };
    let (stream, _, peer) = soon(client.pool.open_within(key, &client.credential, &outer, inner)).await?;
    assert_eq!(peer, id("far"));
    Ok(Application::behind(stream, Role::Client).await)
}

#[tokio::test]
async fn both_layers_ask_for_the_service_and_only_the_inner_one_names_our_network() {
    let mut scene = Scene::new().await;
    let opening = async {
        let incoming = scene.server.requests.recv().await.unwrap();
        let asked = incoming.request().unwrap().clone();
        incoming.refuse(Refusal::Denied);
        asked
    };
    let client = &scene.client;
    let expected = [id("far")];
    let (opened, asked) = tokio::join!(open(client, &client.key, &expected), opening);
    assert_eq!((asked.authority.to_string(), asked.forwarded_network.as_deref()), ("web.far:80".to_owned(), Some("near")));
    assert_eq!(*scene.asked.lock().unwrap(), ["web.far:80"]);
    // A refusal comes from behind the gateway, and says so.
    let error = opened.map(drop).unwrap_err();
    assert!(matches!(&*error, Error::Within { error, .. } if matches!(**error, Error::Status(401))), "{error}");
    assert_eq!(error.to_string(), format!("beyond gateway {}: http status: 401", client.key.next_hop));
}

#[tokio::test]
async fn bytes_and_each_end_pass_through_both_layers() {
    let mut scene = Scene::new().await;
    let (mut near, mut far) = scene.connected().await;
    let bytes: Vec<u8> = (0..3_000_000_usize).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
    let (sent, got) = (bytes.clone(), bytes.clone());
    let up = async {
        near.send(&sent).await;
        near.finish().await;
    };
    let down = async { assert!(far.read_to_end().await.unwrap() == got) };
    tokio::join!(up, down);
    // The other direction is still open.
    far.send(b"answer").await;
    far.finish().await;
    assert_eq!(near.read_to_end().await.unwrap(), b"answer");
    soon(near.relay).await.unwrap();
    assert_eq!(near.meter.totals(), (bytes.len() as u64, 6), "what the inner stream carried is what counts");
}

#[tokio::test]
async fn the_tunnel_to_the_gateway_is_shared_and_each_connection_has_a_tunnel_of_its_own_within_it() {
    let mut scene = Scene::new().await;
    let (mut first, mut first_far) = scene.connected().await;
    let (mut second, mut second_far) = scene.connected().await;
    assert_eq!(scene.client.dials(), 1);
    let tunnels = || scene.server.tunnels.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(tunnels(), 2);
    for (near, far, word) in [(&mut first, &mut first_far, b"one"), (&mut second, &mut second_far, b"two")] {
        near.send(word).await;
        far.expect(word).await;
    }
    // An inner tunnel goes with its stream, in good order, and the other one stays.
    first.finish().await;
    first_far.finish().await;
    scene.server.tunnel_end().await.unwrap();
    second_far.send(b"still").await;
    second.expect(b"still").await;
    second.finish().await;
    second_far.finish().await;
    scene.server.tunnel_end().await.unwrap();
    assert_eq!(scene.client.pool.len(), 1, "the tunnel to the gateway waits for the next connection");
}

#[tokio::test]
async fn each_layer_accepts_only_the_identities_expected_there() {
    let scene = Scene::new().await;
    for expected in [vec![], vec![id("server")]] {
        let error = open(&scene.client, &scene.client.key, &expected).await.map(drop).unwrap_err();
        assert!(matches!(&*error, Error::Within { error, .. } if matches!(**error, Error::Peer(_))), "{error}");
    }
    assert_eq!(scene.asked.lock().unwrap().len(), 2, "it is the gateway that was taken for what it is");
    // Nor may the gateway answer itself.
    let own = Scene::leading_to("server", Config::default()).await;
    let error = own.open().await.map(drop).unwrap_err();
    assert!(matches!(&*error, Error::Within { error, .. } if matches!(**error, Error::Peer(_))), "{error}");
    // A gateway that is somebody else sees no request at all.
    let client = &scene.client;
    let key = PoolKey { expected: vec![id("far")], ..client.key.clone() };
    let error = open(client, &key, &[id("far")]).await.map(drop).unwrap_err();
    assert!(matches!(*error, Error::Peer(_)), "{error}");
    assert_eq!(scene.asked.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_reset_of_either_end_reaches_the_other_through_both_layers() {
    for by_near in [true, false] {
        let mut scene = Scene::new().await;
        let (mut near, mut far) = scene.connected().await;
        near.send(b"part").await;
        far.expect(b"part").await;
        let (from, mut to) = if by_near { (near, far) } else { (far, near) };
        culvert::sys::socket::reset_on_close(&from.socket).unwrap();
        drop(from);
        assert_eq!(to.read_to_end().await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "by near: {by_near}");
        // The inner tunnel is gone with its only stream.
        scene.server.tunnel_end().await.unwrap();
    }
}

#[tokio::test]
async fn a_gateway_that_breaks_resets_what_went_through_it() {
    let mut scene = Scene::new().await;
    let (mut near, mut far) = scene.connected().await;
    near.send(b"part").await;
    far.expect(b"part").await;
    scene.client.pool.abort();
    assert_eq!(near.read_to_end().await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(far.read_to_end().await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn who_stays_silent_behind_the_gateway_costs_the_deadline_and_leaves_nothing() {
    let mut scene = Scene::leading_to("far", Config { handshake_deadline: Duration::from_millis(200), ..Config::default() }).await;
    scene.gateway.abort();
    let (listener, silent): (_, SocketAddr) = crate::tunnel_peers::listen().await;
    // The gateway leads to somebody who never says a word.
    let mut gateway = OurServer::with(&scene._realm, Config::default()).await;
    scene.client.key.next_hop = gateway.address;
    let passing = tokio::spawn(async move {
        let stream = gateway.request().await.accept(&culvert::hbone::ConnectResponse::default()).unwrap();
        let socket = TcpStream::connect(silent).await.unwrap();
        stream.relay(socket, Role::Server, &Arc::new(Meter::default())).await
    });
    let error = scene.open().await.map(drop).unwrap_err();
    assert!(matches!(&*error, Error::Within { error, .. } if matches!(**error, Error::HandshakeDeadline(_))), "{error}");
    let ended = soon(passing).await.unwrap();
    assert!(matches!(ended, culvert::forward::Ended::Disconnected(_)), "the outer stream was given up: {ended:?}");
    drop(listener);
}

#[tokio::test]
async fn a_connection_that_is_given_up_while_it_is_made_takes_both_layers_with_it() {
    let mut scene = Scene::new().await;
    let expected = [id("far")];
    let mut incoming = tokio::select! {
        _ = open(&scene.client, &scene.client.key, &expected) => panic!("nobody has answered"),
        incoming = scene.server.requests.recv() => incoming.unwrap(),
    };
    soon(incoming.abandoned()).await;
    // It may have been cut off while it said something.
    let _ = scene.server.tunnel_end().await;
    assert_eq!(scene.client.pool.len(), 1, "the tunnel to the gateway waits for the next connection");
}
