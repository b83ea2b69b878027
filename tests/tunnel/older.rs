//! TLS 1.2 where it is permitted (`TLS12_ENABLED`; reference, dataplane §2.1), against stock rustls and `h2` that speak nothing newer.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert::hbone::{Config, Endpoint, Error, Refusal};
use culvert::identity::{self, Credentials, LocalIssuer};
use culvert::lifecycle::Clock;
use culvert::lifecycle::drain::DrainMode;
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suite};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ProtocolVersion, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::pki::{Authority, Presented, workload};
use crate::raw_h2::{Frame, GOAWAY, PREFACE, RawPeer};
use crate::tunnel_peers::{
    Answer, CountingDialer, OurClient, OurServer, PATIENCE, Realm, StockClient, StockServer, StockStream, connect, eventually, listen, quiet, soon,
    stock_send,
};

static OLD: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];
static BOTH: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12, &rustls::version::TLS13];
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";

/// A CA, our own proxies under it, and whoever else it signs for.
struct Ground {
    root: Authority,
    realm: Realm,
    _directory: tempfile::TempDir,
}

impl Ground {
    fn with(config: identity::Config) -> Self {
        let (root, directory) = (Authority::root("of both"), tempfile::tempdir().unwrap());
        root.write(directory.path(), &root);
        let issuer = LocalIssuer::load(directory.path(), Clock::system()).unwrap();
        let (credentials, renewal) = Credentials::new(config, Arc::new(issuer), Clock::system());
        tokio::spawn(renewal);
        Self { root, realm: Realm::of(credentials), _directory: directory }
    }

    fn new() -> Self {
        Self::with(identity::Config { tls12: true, ..identity::Config::default() })
    }

    fn presented(&self, name: &str) -> Presented {
        self.root.leaf(workload(&[name]))
    }

    fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
        self.presented(CLIENT).client_with(aws_lc_rs::default_provider(), versions)
    }

    /// A client of 1.2 and one cipher suite.
    fn client_with(&self, suite: SupportedCipherSuite) -> ClientConfig {
        let provider = rustls::crypto::CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() };
        self.presented(CLIENT).client_with(provider, OLD)
    }

    fn server(&self) -> ServerConfig {
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(OLD)
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(self.presented(SERVER).certified)));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

async fn shake(address: SocketAddr, config: ClientConfig) -> std::io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from("127.0.0.1").unwrap();
    soon(TlsConnector::from(Arc::new(config)).connect(name, connect(address).await)).await
}

fn version(stream: &TlsStream<TcpStream>) -> ProtocolVersion {
    stream.get_ref().1.protocol_version().unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_of_tls12_is_served_like_any_other_in_each_suite() {
    let ground = Ground::new();
    let server = OurServer::with(&ground.realm, Config::default()).await.echo();
    for one in [suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384] {
        let stream = shake(server.address, ground.client_with(one)).await.unwrap();
        assert_eq!(version(&stream), ProtocolVersion::TLSv1_2);
        let client = StockClient::over(stream).await;
        // Several at once, more than any window, to the end in each direction.
        let streams = (0..4).map(|_| async {
            let (status, mut stream) = client.open("10.0.0.2:80").await.unwrap();
            assert_eq!(status, 200);
            stream.send(b"hello").await;
            assert_eq!(&stream.receive().await.unwrap().unwrap()[..], b"hello");
            let sent = pattern(6 << 20);
            let StockStream { mut send, mut receive } = stream;
            let sending = async {
                stock_send(&mut send, sent.clone().into()).await.unwrap();
                send.send_data(bytes::Bytes::new(), true).unwrap();
            };
            let receiving = async {
                let mut got = Vec::new();
                while let Some(data) = receive.data().await {
                    let data = data.unwrap();
                    receive.flow_control().release_capacity(data.len()).unwrap();
                    got.extend_from_slice(&data);
                }
                got
            };
            let ((), got) = tokio::join!(sending, receiving);
            assert!(got == sent);
        });
        soon(futures_util::future::join_all(streams)).await;
    }
}

#[tokio::test]
async fn a_server_of_tls12_is_dialled_and_must_be_who_it_should_be() {
    let ground = Ground::new();
    let server = StockServer::speaking(ground.server(), Answer::Echo, |_| {}).await;
    let client = OurClient::to(server.address, &ground.realm, Config::default()).await;
    let mut first = client.open().await.unwrap();
    let mut second = client.open().await.unwrap();
    let sent = pattern(1 << 20);
    for application in [&mut first, &mut second] {
        application.echoes(b"hello").await;
        let (mut read, mut write) = application.socket.split();
        let mut got = vec![0; sent.len()];
        let (sending, receiving) = soon(async { tokio::join!(write.write_all(&sent), read.read_exact(&mut got)) }).await;
        sending.unwrap();
        receiving.unwrap();
        assert!(got == sent);
    }
    first.finish().await;
    assert_eq!(first.read_to_end().await.unwrap(), b"");
    second.echoes(b"still there").await;
    assert_eq!((client.dials(), server.connections()), (1, 1), "one tunnel for both");
    // When nobody needs the tunnel any more, its connection ends too.
    drop((first, second, client));
    eventually("the connection has ended", || server.ended.load(std::sync::atomic::Ordering::SeqCst) == 1).await;

    let mut config = ground.server();
    let other = ground.presented("spiffe://cluster.local/ns/default/sa/other");
    config.cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(other.certified));
    let server = StockServer::speaking(config, Answer::Echo, |_| {}).await;
    let error = OurClient::to(server.address, &ground.realm, Config::default()).await.open().await.unwrap_err();
    assert!(matches!(&*error, Error::Peer(_)), "{error}");
}

#[tokio::test]
async fn tls12_is_a_choice_and_never_taken_by_who_can_do_better() {
    let ground = Ground::new();
    let server = OurServer::with(&ground.realm, Config::default()).await;
    assert_eq!(version(&shake(server.address, ground.client(BOTH)).await.unwrap()), ProtocolVersion::TLSv1_3);
    assert_eq!(version(&shake(server.address, ground.client(OLD)).await.unwrap()), ProtocolVersion::TLSv1_2);
    for config in [
        identity::Config::default(),
        // There is no post-quantum key exchange in 1.2.
        identity::Config { tls12: true, post_quantum_only: true, ..identity::Config::default() },
    ] {
        let ground = Ground::with(config);
        let server = OurServer::with(&ground.realm, Config::default()).await;
        shake(server.address, ground.client(OLD)).await.unwrap_err();
        shake(server.address, ground.client(BOTH)).await.unwrap();
        let server = StockServer::speaking(ground.server(), Answer::Echo, |_| {}).await;
        let error = OurClient::to(server.address, &ground.realm, Config::default()).await.open().await.unwrap_err();
        assert!(matches!(&*error, Error::Tls(_)), "{error}");
    }
}

#[tokio::test]
async fn who_is_not_a_workload_of_our_own_gets_no_tunnel_over_tls12_either() {
    let ground = Ground::new();
    let mut server = OurServer::with(&ground.realm, Config::default()).await;
    let provider = aws_lc_rs::default_provider;
    let anonymous = crate::pki::credulous(provider(), OLD).with_no_client_auth();
    let foreign = ground.presented("spiffe://other.example/ns/default/sa/client").client_with(provider(), OLD);
    let unsigned = Authority::root("of nobody").leaf(workload(&[CLIENT])).client_with(provider(), OLD);
    let mut no_alpn = ground.client(OLD);
    no_alpn.alpn_protocols.clear();
    for (who, config) in [("anonymous", anonymous), ("foreign", foreign), ("unsigned", unsigned), ("without ALPN", no_alpn)] {
        // The last of them gets through the handshake itself.
        let _ = shake(server.address, config).await;
        assert!(matches!(server.tunnel_end().await, Err(Error::Tls(_) | Error::Handshake(_))), "{who}");
    }
    assert_eq!(server.tunnels.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test]
async fn the_core_changes_its_keys_below_and_the_peer_notices_nothing() {
    let ground = Ground::new();
    let server = StockServer::speaking(ground.server(), Answer::Echo, |_| {}).await;
    let endpoint = Endpoint { records_per_key: 5, ..quiet(Config::default()) };
    let client = OurClient::with(server.address, &ground.realm, endpoint, CountingDialer::default()).await;
    let mut application = client.open().await.unwrap();
    for round in 0..100_u8 {
        application.echoes(&[round; 100]).await;
    }
}

#[tokio::test]
async fn a_broken_connection_is_a_broken_tunnel_and_a_drain_tells_the_peer() {
    let ground = Ground::new();
    // A record that does not decrypt, behind a good beginning; in the clear, below TLS.
    let mut server = OurServer::with(&ground.realm, Config::default()).await;
    let mut stream = shake(server.address, ground.client(OLD)).await.unwrap();
    stream.write_all(&[PREFACE, &Frame::settings(&[]).encode(), &Frame::connect(1, "10.0.0.2:80").encode()].concat()).await.unwrap();
    let mut application = server.accept_one().await;
    let (socket, _) = stream.get_mut();
    let forged = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
    socket.write_all(&forged).await.unwrap();
    server.tunnel_end().await.unwrap_err();
    application.read_to_end().await.unwrap_err();
    let mut rest = Vec::new();
    // Whatever was on its way, then the end.
    let _ = soon(stream.read_to_end(&mut rest)).await;

    // Who hangs up hears the tunnel's goodbye.
    let mut stream = shake(server.address, ground.client(OLD)).await.unwrap();
    stream.write_all(&[PREFACE, &Frame::settings(&[]).encode()].concat()).await.unwrap();
    eventually("it is a tunnel", || server.tunnels.load(std::sync::atomic::Ordering::SeqCst) == 2).await;
    stream.shutdown().await.unwrap();
    soon(stream.read_to_end(&mut rest)).await.expect("the end is a close_notify, or this would be an error");
    assert!(server.tunnel_end().await.is_ok());

    let mut peer = RawPeer::client(shake(server.address, ground.client(OLD)).await.unwrap(), &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    server.request().await.refuse(Refusal::Unavailable);
    let _drained = server.drain(DrainMode::Graceful, std::time::Duration::from_secs(60));
    let mut goodbyes = 0;
    soon(async {
        while let Some(frame) = peer.next().await {
            goodbyes += usize::from(frame.kind == GOAWAY);
        }
    })
    .await;
    assert!(goodbyes > 0);
    assert_eq!(peer.io.read(&mut [0]).await.unwrap(), 0, "the end is a close_notify, or this would be an error");
    assert!(server.tunnel_end().await.is_ok());
}

#[tokio::test]
async fn a_tunnel_of_tls12_is_not_frozen_and_goes_on() {
    use culvert::hbone::{ConnectResponse, Immovable, accept};
    let immovable = |error: &Error| matches!(error, Error::Immovable(Immovable::Older)) && error.to_string().contains("TLS 1.2");
    let ground = Ground::new();
    let server = StockServer::speaking(ground.server(), Answer::Echo, |_| {}).await;
    let client = OurClient::to(server.address, &ground.realm, Config::default()).await;
    let mut open = client.open().await.unwrap();
    let refused = soon(client.pool.movers().remove(0).1.freeze(PATIENCE)).await.unwrap_err();
    assert!(immovable(&refused), "{refused}");
    open.echoes(b"still there").await;
    client.open().await.unwrap().echoes(b"and takes new ones").await;
    assert_eq!(client.dials(), 1);

    let (listener, address) = listen().await;
    let shaking = shake(address, ground.client(OLD));
    let accepting = async {
        let (socket, from) = listener.accept().await.unwrap();
        let tunnel = accept(socket, from, &*ground.realm.credential("server").await, &Arc::new(quiet(Config::default()))).await.unwrap();
        let (_trigger, watcher) = culvert::lifecycle::drain::channel();
        let mover = tunnel.mover();
        tunnel
            .serve(watcher, move |incoming| {
                let mover = mover.clone();
                tokio::spawn(async move {
                    let refused = mover.freeze(PATIENCE).await.unwrap_err();
                    assert!(immovable(&refused), "{refused}");
                    incoming.accept(&ConnectResponse::default()).unwrap();
                });
            })
            .await
    };
    let asking = async {
        let mut peer = RawPeer::client(shaking.await.unwrap(), &[]).await;
        for stream in [1, 3] {
            peer.send(&Frame::connect(stream, "10.0.0.2:80")).await;
            assert_eq!(soon(peer.expect_status(stream)).await.0, "200");
            // Its stream was dropped.
            soon(peer.expect(crate::raw_h2::RST_STREAM, stream)).await;
        }
    };
    tokio::select! {
        served = accepting => panic!("{served:?}"),
        () = asking => {}
    }
}
