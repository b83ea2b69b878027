//! Tunnels that are open when a list comes.

use std::time::{Duration, Instant};

use culvert::forward::Ended;
use culvert::hbone::{Config, ConnectResponse, Endpoint, Error, Frozen, Inner, Role, ServerTunnel, accept};
use culvert::telemetry::Meter;
use rustls::pki_types::CertificateDer;

use super::crl::list;
use super::raw_h2::{Frame, NO_ERROR, RawPeer};
use super::tunnel_peers::{Application, CountingDialer, OurClient, OurServer, PATIENCE, Realm, eventually, listen, request, soon, tls_to};
use super::*;

/// From the file's change to the cut.
const IN_TIME: Duration = Duration::from_secs(1);

fn endpoint() -> Arc<Endpoint> {
    Arc::new(Endpoint::new(Config::default()))
}

fn leaf(credential: &Credential) -> &CertificateDer<'static> {
    &credential.chain[0]
}

/// The relay of a stream ended because of a revocation, and its application was told by a reset.
async fn cut(mut application: Application) {
    match soon(application.relay).await.unwrap() {
        Ended::Failed(error) => assert!(matches!(error.downcast::<Error>().unwrap(), Error::Revoked)),
        ended => panic!("{ended:?}"),
    }
    application.relay = tokio::spawn(async { Ended::Finished });
    assert_eq!(application.read_to_end().await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_inbound_tunnel_of_a_revoked_client_is_cut_and_others_stay() {
    let root = Authority::root("root");
    // The clients have no lists.
    let clients = Ours::new(&root, &root, b"");
    let ours = Ours::new(&root, &root, list(&root.signer, &[]).as_bytes());
    let mut server = OurServer::start(ours.credential("server").await, endpoint()).await;
    let mut raw = Vec::new();
    let mut served = Vec::new();
    for account in ["bad", "good"] {
        let stream = tls_to(server.address, &*clients.credential(account).await).await;
        let mut peer = RawPeer::client(stream, &[]).await;
        peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
        served.push(server.accept_one().await);
        assert_eq!(soon(peer.expect_status(1)).await, ("200".to_owned(), false));
        raw.push(peer);
    }
    let begin = Instant::now();
    std::fs::write(&ours.file, list(&root.signer, &[leaf(&*clients.credential("bad").await)])).unwrap();
    let (mut good, mut bad) = (raw.pop().unwrap(), raw.pop().unwrap());
    // Abrupt, but with a word.
    assert_eq!(soon(bad.goaway_code()).await, Some(NO_ERROR));
    // A second where nothing else runs; that it is looked for so often is shown on a paused clock.
    assert!(begin.elapsed() < 10 * IN_TIME, "{:?}", begin.elapsed());
    assert!(matches!(server.tunnel_end().await, Err(Error::Revoked)));
    let (mut stays, ends) = (served.pop().unwrap(), served.pop().unwrap());
    cut(ends).await;
    assert_eq!((ours.counted("destination"), ours.counted("source")), (1, 0), "one for each tunnel");
    // The other does not notice.
    good.send(&Frame::data(1, *b"still here")).await;
    stays.expect(b"still here").await;
    // And the revoked one cannot come back.
    let stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(clients.credential("bad").await.client_config());
    let again = connector.connect("127.0.0.1".try_into().unwrap(), stream).await;
    assert!(matches!(server.tunnel_end().await, Err(Error::Revoked)));
    drop(again);
    assert_eq!(ours.counted("destination"), 2);
}

#[tokio::test]
async fn an_outbound_tunnel_to_a_revoked_server_is_cut_and_not_dialled_again() {
    let root = Authority::root("root");
    let servers = Ours::new(&root, &root, b"");
    let ours = Ours::new(&root, &root, b"");
    let server = OurServer::start(servers.credential("server").await, endpoint()).await.echo();
    let realm = Realm::of(ours.store.clone());
    let client = OurClient::with(server.address, &realm, Endpoint::new(Config::default()), CountingDialer::default()).await;
    let (mut one, mut two) = (client.open().await.unwrap(), client.open().await.unwrap());
    one.echoes(b"one").await;
    two.echoes(b"two").await;
    assert_eq!(client.dials(), 1);
    std::fs::write(&ours.file, list(&root.signer, &[leaf(&*servers.credential("server").await)])).unwrap();
    cut(one).await;
    cut(two).await;
    assert_eq!((ours.counted("source"), ours.counted("destination")), (1, 0), "one for each tunnel");
    let error = client.open().await.unwrap_err();
    assert!(matches!(*error, Error::Revoked), "{error}");
    assert_eq!((client.dials(), ours.counted("source")), (2, 2));
    // Taken off the list, it is served again.
    std::fs::write(&ours.file, "").unwrap();
    eventually("the list is lifted", || ours.metrics().contains("culvert_crl_loads_total{outcome=\"loaded\"} 3")).await;
    client.open().await.unwrap().echoes(b"back").await;
}

/// A client of ours, a gateway that passes bytes on, and a server behind it. Only the client has lists.
struct Beyond {
    ours: Ours,
    others: Ours,
    client: OurClient,
    gateway: JoinHandle<()>,
    _server: OurServer,
}

impl Beyond {
    async fn new(root: &Authority) -> Self {
        let (ours, others) = (Ours::new(root, root, b""), Ours::new(root, root, b""));
        let server = OurServer::start(others.credential("far").await, endpoint()).await.echo();
        let mut gateway = OurServer::start(others.credential("server").await, endpoint()).await;
        let realm = Realm::of(ours.store.clone());
        let client = OurClient::with(gateway.address, &realm, Endpoint::new(Config::default()), CountingDialer::default()).await;
        let to = server.address;
        let gateway = tokio::spawn(async move {
            while let Some(incoming) = gateway.requests.recv().await {
                let socket = tokio::net::TcpStream::connect(to).await.unwrap();
                let stream = incoming.accept(&ConnectResponse::default()).unwrap();
                tokio::spawn(async move { stream.relay(socket, Role::Server, &Arc::new(Meter::default())).await });
            }
        });
        Self { ours, others, client, gateway, _server: server }
    }

    async fn open(&self) -> Application {
        let (request, expected) = (request(), [id("far")]);
        let inner = Inner { expected: &expected, request: &request };
        let opened = soon(self.client.pool.open_within(&self.client.key, &self.client.credential, &request, inner)).await;
        let mut application = Application::behind(opened.unwrap().0, Role::Client).await;
        application.echoes(b"before").await;
        application
    }

    async fn revoke(&self, root: &Authority, account: &str) {
        std::fs::write(&self.ours.file, list(&root.signer, &[leaf(&*self.others.credential(account).await)])).unwrap();
    }
}

impl Drop for Beyond {
    fn drop(&mut self) {
        self.gateway.abort();
    }
}

#[tokio::test]
async fn a_tunnel_within_a_tunnel_is_cut_when_its_own_server_is_revoked() {
    let root = Authority::root("root");
    let beyond = Beyond::new(&root).await;
    let open = beyond.open().await;
    beyond.revoke(&root, "far").await;
    cut(open).await;
    assert_eq!((beyond.ours.counted("source"), beyond.client.dials()), (1, 1), "the inner one alone");
}

#[tokio::test]
async fn a_tunnel_within_a_tunnel_is_cut_when_the_gateway_is_revoked() {
    let root = Authority::root("root");
    let beyond = Beyond::new(&root).await;
    let open = beyond.open().await;
    beyond.revoke(&root, "server").await;
    cut(open).await;
    assert_eq!(beyond.ours.counted("source"), 1, "the outer one alone");
}

/// One tunnel, served by hand so that it can be frozen.
async fn served(
    ours: &Ours,
    client: Arc<rustls::ClientConfig>,
) -> (RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>, Frozen, Application) {
    let (listener, address) = listen().await;
    let name = "127.0.0.1".try_into().unwrap();
    let shake =
        async move { tokio_rustls::TlsConnector::from(client).connect(name, tokio::net::TcpStream::connect(address).await.unwrap()).await.unwrap() };
    let peer = tokio::spawn(async move {
        let mut peer = RawPeer::client(shake.await, &[]).await;
        peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
        assert_eq!(soon(peer.expect_status(1)).await.0, "200");
        peer
    });
    let (socket, from) = listener.accept().await.unwrap();
    let tunnel = accept(socket, from, &*ours.credential("server").await, &endpoint()).await.unwrap();
    let mover = tunnel.mover();
    let (_trigger, watcher) = culvert::lifecycle::drain::channel();
    let (give, mut requests) = tokio::sync::mpsc::unbounded_channel();
    let serving = tokio::spawn(tunnel.serve(watcher, move |incoming| drop(give.send(incoming))));
    let stream = soon(requests.recv()).await.unwrap().accept(&ConnectResponse::default()).unwrap();
    let application = Application::behind(stream, Role::Server).await;
    let peer = soon(peer).await.unwrap();
    let frozen = soon(mover.freeze(PATIENCE)).await.unwrap();
    serving.await.unwrap().unwrap();
    let (bytes, sockets) = frozen.into_parts();
    (peer, Frozen::from_parts(&bytes, sockets).unwrap(), application)
}

#[tokio::test]
async fn an_inbound_tunnel_that_was_moved_is_cut_by_a_list_that_comes_later() {
    let root = Authority::root("root");
    // The predecessor has no list, nor have the clients.
    let (clients, before, ours) = (Ours::new(&root, &root, b""), Ours::new(&root, &root, b""), Ours::new(&root, &root, b""));
    for (account, revoked) in [("good", false), ("bad", true)] {
        let (mut peer, frozen, mut application) = served(&before, clients.credential(account).await.client_config()).await;
        let with_lists = Arc::new(Endpoint { revocations: ours.store.revocations(), ..Endpoint::new(Config::default()) });
        let (tunnel, mut streams) = ServerTunnel::take_up(frozen, &*ours.credential("server").await, &with_lists).unwrap();
        let (_trigger, watcher) = culvert::lifecycle::drain::channel();
        let serving = tokio::spawn(tunnel.serve(watcher, drop));
        let relay = tokio::spawn(streams.remove(0).relay(&Arc::new(Meter::default())));
        std::fs::write(&ours.file, list(&root.signer, &[leaf(&*clients.credential("bad").await)])).unwrap();
        if revoked {
            assert_eq!(soon(peer.goaway_code()).await, Some(NO_ERROR));
            assert!(matches!(soon(serving).await.unwrap(), Err(Error::Revoked)));
            assert!(matches!(soon(relay).await.unwrap(), Ended::Failed(_)));
            assert!(application.read_to_end().await.is_err());
        } else {
            eventually("the list is in force", || ours.metrics().contains("culvert_crl_loads_total{outcome=\"loaded\"} 2")).await;
            peer.send(&Frame::data(1, *b"still here")).await;
            application.expect(b"still here").await;
            std::fs::write(&ours.file, "").unwrap();
            eventually("the list is lifted", || ours.metrics().contains("culvert_crl_loads_total{outcome=\"loaded\"} 3")).await;
            serving.abort();
        }
    }
    assert_eq!((ours.counted("destination"), before.counted("destination")), (1, 0));
    assert!(ours.metrics().contains("istio_crl_untracked_connections_total{reporter=\"destination\"} 0"), "{}", ours.metrics());
}

#[tokio::test]
async fn an_outbound_tunnel_that_was_moved_is_cut_by_a_list_that_comes_later() {
    let root = Authority::root("root");
    let (servers, before, ours) = (Ours::new(&root, &root, b""), Ours::new(&root, &root, b""), Ours::new(&root, &root, b""));
    let server = OurServer::start(servers.credential("server").await, endpoint()).await.echo();
    let client = OurClient::with(server.address, &Realm::of(before.store.clone()), Endpoint::new(Config::default()), CountingDialer::default()).await;
    let mut application = client.open().await.unwrap();
    application.echoes(b"before").await;
    let frozen = soon(client.pool.movers().remove(0).1.freeze(PATIENCE)).await.unwrap();
    let pool = culvert::hbone::Pool::new(endpoint(), Arc::new(CountingDialer::default()));
    let mut streams = pool.take_up(client.key.clone(), &*ours.credential("client").await, frozen).unwrap();
    let relay = tokio::spawn(streams.remove(0).relay(&Arc::new(Meter::default())));
    application.echoes(b"after").await;
    assert_eq!(pool.len(), 1);
    std::fs::write(&ours.file, list(&root.signer, &[leaf(&*servers.credential("server").await)])).unwrap();
    assert!(matches!(soon(relay).await.unwrap(), Ended::Failed(_)));
    assert!(application.read_to_end().await.is_err());
    eventually("it is not pooled any more", || pool.is_empty()).await;
    assert_eq!((ours.counted("source"), before.counted("source")), (1, 0));
}

#[tokio::test]
async fn a_moved_tunnel_whose_peer_has_more_certificates_than_are_kept_is_counted_as_out_of_reach_of_lists() {
    let root = Authority::root("root");
    let ours = Ours::new(&root, &root, b"");
    let mut params = pki::workload(&["spiffe://cluster.local/ns/default/sa/client"]);
    params.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![0; 17_000]));
    let (_peer, frozen, _application) = served(&ours, Arc::new(root.leaf(params).client())).await;
    let with_lists = Arc::new(Endpoint { revocations: ours.store.revocations(), ..Endpoint::new(Config::default()) });
    ServerTunnel::take_up(frozen, &*ours.credential("server").await, &with_lists).unwrap();
    assert!(ours.metrics().contains("istio_crl_untracked_connections_total{reporter=\"destination\"} 1"), "{}", ours.metrics());
}

#[tokio::test]
async fn a_list_that_revokes_nobody_here_cuts_nothing() {
    let root = Authority::root("root");
    let ours = Ours::new(&root, &root, b"");
    let server = OurServer::start(ours.credential("server").await, endpoint()).await.echo();
    let realm = Realm::of(ours.store.clone());
    let client = OurClient::with(server.address, &realm, Endpoint::new(Config::default()), CountingDialer::default()).await;
    let mut open = client.open().await.unwrap();
    open.echoes(b"before").await;
    std::fs::write(&ours.file, list(&root.signer, &[leaf(&*ours.credential("stranger").await)])).unwrap();
    eventually("the list is in force", || ours.metrics().contains("culvert_crl_loads_total{outcome=\"loaded\"} 2")).await;
    open.echoes(b"after").await;
    assert_eq!((client.dials(), ours.counted("source"), ours.counted("destination")), (1, 0, 0));
}
