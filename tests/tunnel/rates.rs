//! Rates of honest work that no guard against floods may take for one, on one tunnel.

use std::time::Duration;

use culvert::hbone::{Config, ConnectResponse, Refusal};
use futures_util::future::join_all;
use tokio::net::TcpStream;

use crate::raw_h2::{CANCEL, Frame, HEADERS, PRIORITY, RST_STREAM, RawPeer};
use crate::tunnel_peers::{OurClient, OurServer, Realm, StockClient, connect, connected, soon, tls_connect, tls_to};

type RawClient = RawPeer<tokio_rustls::client::TlsStream<TcpStream>>;

async fn raw(realm: &Realm, server: &OurServer) -> RawClient {
    RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await
}

/// The tunnel is there, and none has ended.
async fn still_there(peer: &mut RawClient, server: &mut OurServer, stream: u32) {
    peer.send(&Frame::connect(stream, "10.0.0.2:80")).await;
    loop {
        let frame = soon(peer.next()).await.expect("the tunnel ended");
        if frame.kind == HEADERS && frame.stream == stream {
            break;
        }
    }
    assert!(server.ended.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_short_connections_of_stock_clients_in_a_row_are_no_flood() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await.echo();
    let stock = StockClient::over(tls_connect(connect(server.address).await, &*realm.credential("stock").await).await).await;
    for _ in 0..5000 / 100 {
        let one = || async {
            let (status, mut stream) = stock.open("10.0.0.2:80").await.unwrap();
            assert_eq!(status, 200);
            stream.send(b"hello").await;
            stream.finish();
            assert_eq!(stream.read_to_end().await.unwrap(), b"hello");
        };
        soon(join_all((0..100).map(|_| one()))).await;
    }
    assert!(server.ended.try_recv().is_err());
}

/// Everything that may come with a stream besides its bytes: PRIORITY, an empty DATA frame before the end, credit after the end, a reset after that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_honest_peers_send_with_a_stream_is_no_flood_however_many_there_are() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await.echo();
    let mut peer = raw(&realm, &server).await;
    let mut id = 1;
    for _ in 0..50 {
        let ids: Vec<u32> = (0..100).map(|number| id + 2 * number).collect();
        id += 200;
        let begin = ids.iter().flat_map(|id| {
            [
                Frame::new(PRIORITY, 0, *id, [0, 0, 0, 0, 1]),
                Frame::connect(*id, "10.0.0.2:80"),
                Frame::data(*id, *b"hello"),
                Frame::data(*id, []),
                Frame::data(*id, []).ends(),
            ]
        });
        peer.send_all(&begin.collect::<Vec<_>>()).await;
        let mut ended = 0;
        while ended < ids.len() {
            ended += usize::from(soon(peer.next()).await.expect("the tunnel ended").end_stream());
        }
        let after = ids.iter().flat_map(|id| [Frame::window_update(0, 5), Frame::window_update(*id, 5), Frame::reset(*id, CANCEL)]);
        peer.send_all(&after.collect::<Vec<_>>()).await;
    }
    still_there(&mut peer, &mut server, id).await;
}

#[tokio::test]
async fn a_thousand_refused_connections_whose_resets_cross_the_answer_are_no_flood() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = raw(&realm, &server).await;
    for number in 0..3000 {
        let id = 2 * number + 1;
        peer.send(&Frame::connect(id, "10.0.0.2:80")).await;
        server.request().await.refuse(Refusal::Denied);
        assert_eq!(soon(peer.expect_status(id)).await.0, "401");
        peer.send(&Frame::reset(id, CANCEL)).await;
        soon(peer.expect(RST_STREAM, id)).await;
    }
    peer.send(&Frame::connect(9001, "10.0.0.2:80")).await;
    server.request().await.refuse(Refusal::Denied);
    assert_eq!(soon(peer.expect_status(9001)).await.0, "401");
}

/// An application of ours aborts downloads whose bytes are on their way.
#[tokio::test]
async fn late_bytes_of_thousands_of_connections_that_our_applications_aborted_are_no_flood() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = raw(&realm, &server).await;
    for round in 0..30 {
        let ids: Vec<u32> = (0..100).map(|number| round * 200 + 2 * number + 1).collect();
        peer.send_all(&ids.iter().map(|id| Frame::connect(*id, "10.0.0.2:80")).collect::<Vec<_>>()).await;
        for _ in &ids {
            drop(server.request().await.accept(&ConnectResponse::default()).unwrap());
        }
        let mut resets = 0;
        while resets < ids.len() {
            resets += usize::from(soon(peer.next()).await.expect("the tunnel ended").kind == RST_STREAM);
        }
        let late = ids.iter().flat_map(|id| [Frame::data(*id, [1; 16]), Frame::data(*id, [2; 16]), Frame::data(*id, []).ends()]);
        peer.send_all(&late.collect::<Vec<_>>()).await;
    }
    peer.send(&Frame::connect(9001, "10.0.0.2:80")).await;
    server.request().await.refuse(Refusal::Denied);
    while soon(peer.next()).await.expect("the tunnel ended").kind != HEADERS {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_that_abort_thousands_of_open_connections_cost_no_tunnel() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await.echo();
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let mut neighbour = client.open().await.unwrap();
    for _ in 0..30 {
        let abort = || async {
            let application = client.open().await.unwrap();
            socket2::SockRef::from(&application.socket).set_linger(Some(Duration::ZERO)).unwrap();
            drop(application.socket);
            application.relay.await.unwrap();
        };
        soon(join_all((0..100).map(|_| abort()))).await;
        // Its place comes back with its end.
        neighbour.echoes(b"still here").await;
    }
    assert_eq!(client.dials(), 2, "one for the neighbour's 99, one for the hundredth");
    assert!(server.ended.try_recv().is_err());
}

#[tokio::test]
async fn applications_that_abort_a_thousand_connections_before_their_answer_cost_no_tunnel() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let (near, mut far) = tokio::join!(client.open(), server.accept_one());
    let mut near = near.unwrap();
    for _ in 0..50 {
        // Twenty connections whose requests have arrived when their applications go.
        let mut asked = Vec::new();
        {
            let opens = join_all((0..20).map(|_| client.open()));
            let arrive = async {
                while asked.len() < 20 {
                    asked.push(server.requests.recv().await.unwrap());
                }
            };
            tokio::select! {
                _ = opens => unreachable!("nobody has answered"),
                () = soon(arrive) => {}
            }
        }
        tokio::task::yield_now().await;
        for incoming in asked {
            // Some were taken back, the others are answered, and reset then.
            if let Ok(stream) = incoming.accept(&ConnectResponse::default()) {
                let (_application, socket) = connected().await;
                let _ = tokio::time::timeout(Duration::from_millis(1), stream.relay(socket, culvert::hbone::Role::Server, &Default::default())).await;
            }
        }
        near.send(b"x").await;
        far.expect(b"x").await;
    }
    assert_eq!(client.dials(), 1);
    assert!(server.ended.try_recv().is_err());
    // Of those that wait no more, none is left behind.
    let (near, mut far) = tokio::join!(client.open(), server.accept_one());
    near.unwrap().send(b"last").await;
    far.expect(b"last").await;
}
