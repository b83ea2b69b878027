//! An open stream between an application and a raw peer, in either role.

use culvert::hbone::{ConnectResponse, Endpoint, Role};
use std::sync::Arc;

use crate::raw_h2::{self, Frame, RawPeer};
use crate::raw_tls::RawTls;
use crate::tunnel_peers::{Application, CountingDialer, OurClient, OurServer, Realm, connect, listen, soon};

pub(crate) const ROLES: [Role; 2] = [Role::Client, Role::Server];

/// Bytes in which every place can be told from every other.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 31 + at / 251 + at / 65_521) % 256).unwrap()).collect()
}

/// Stream 1 is open: the application is on our side, the raw peer on the other.
pub(crate) struct Opened {
    pub(crate) application: Application,
    pub(crate) peer: RawPeer<RawTls>,
    /// Keeps our side alive.
    _keep: Box<dyn std::any::Any>,
}

/// Whichever side of a tunnel the raw peer is on. `role` is that of our application.
pub(crate) async fn open(realm: &Realm, role: Role, endpoint: Endpoint) -> Opened {
    match role {
        Role::Server => {
            let mut server = OurServer::start(realm.credential("server").await, Arc::new(endpoint)).await;
            let tls = RawTls::client(connect(server.address).await, &*realm.credential("client").await).await;
            let mut peer = RawPeer::client(tls, &[]).await;
            peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
            let stream = server.request().await.accept(&ConnectResponse::default()).unwrap();
            let application = Application::behind(stream, Role::Server).await;
            assert_eq!(soon(peer.expect_status(1)).await.0, "200");
            Opened { application, peer, _keep: Box::new(server) }
        }
        Role::Client => {
            let (listener, address) = listen().await;
            let client = OurClient::with(address, realm, endpoint, CountingDialer::default()).await;
            let credential = realm.credential("server").await;
            let serve = async {
                let tls = RawTls::server(listener.accept().await.unwrap().0, &credential).await;
                let mut peer = RawPeer::server(tls, &[]).await;
                peer.expect_headers(1).await;
                peer.send(&Frame::status(1, "200")).await;
                peer
            };
            let (application, peer) = tokio::join!(client.open(), soon(serve));
            Opened { application: application.unwrap(), peer, _keep: Box::new(client) }
        }
    }
}

/// How a tunnel ended for the raw peer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Farewell {
    /// The first alert.
    pub(crate) alert: Option<u8>,
    /// The code of the GOAWAY, if one came before the alert or after it.
    pub(crate) goaway: Option<u32>,
}

impl Opened {
    /// Bytes come through in both directions.
    pub(crate) async fn works(&mut self) {
        self.application.send(b"over").await;
        let frame = soon(self.peer.expect(raw_h2::DATA, 1)).await;
        assert_eq!(frame.payload, b"over");
        self.peer.send(&Frame::data(1, *b"and out")).await;
        self.application.expect(b"and out").await;
    }

    /// Our side ends the tunnel: the application gets a reset, never a clean end.
    pub(crate) async fn ends(mut self) -> Farewell {
        let mut goaway = None;
        while let Some(frame) = soon(self.peer.next()).await {
            if frame.kind == raw_h2::GOAWAY {
                goaway = Some(frame.code());
            }
        }
        let end = self.application.read_to_end().await;
        assert!(end.is_err(), "the application took it for a clean end");
        Farewell { alert: self.peer.io.alerts.first().map(|alert| alert.1), goaway }
    }
}
