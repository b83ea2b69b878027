//! Both sides of a tunnel in stock tokio-rustls and `h2`, with applications on sockets: the oracle of what our sides do. Ends map as in
//! `culvert::hbone::TunnelStream`: FIN to END_STREAM and back, a reset to RST_STREAM(CANCEL) and back.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use culvert::identity::Credential;
use socket2::SockRef;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::tunnel_peers::{StockStream, listen, stock_send};

/// One side broke the stream, or the tunnel is gone.
struct Cut;

/// Moves bytes between a stream of stock `h2` and an application.
pub(crate) async fn relay(mut socket: TcpStream, stream: StockStream) {
    let StockStream { mut send, receive } = stream;
    let outcome = {
        let (read, write) = socket.split();
        tokio::try_join!(outbound(read, &mut send), inbound(receive, write))
    };
    if outcome.is_err() {
        send.send_reset(h2::Reason::CANCEL);
        // It may be gone already.
        let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
    }
}

async fn outbound(mut read: ReadHalf<'_>, send: &mut h2::SendStream<Bytes>) -> Result<(), Cut> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = tokio::select! {
            count = read.read(&mut buffer) => count.map_err(|_| Cut)?,
            _ = poll_fn(|context| send.poll_reset(context)) => return Err(Cut),
        };
        if count == 0 {
            return send.send_data(Bytes::new(), true).map_err(|_| Cut);
        }
        stock_send(send, Bytes::copy_from_slice(&buffer[..count])).await.map_err(|_| Cut)?;
    }
}

async fn inbound(mut body: h2::RecvStream, mut write: WriteHalf<'_>) -> Result<(), Cut> {
    while let Some(data) = body.data().await {
        let data = data.map_err(|_| Cut)?;
        write.write_all(&data).await.map_err(|_| Cut)?;
        let _ = body.flow_control().release_capacity(data.len());
    }
    write.shutdown().await.map_err(|_| Cut)
}

/// A stock server that gives each stream's application to `arrived`, with the port that was asked for.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start(credential: Arc<Credential>, arrived: impl Fn(u16, TcpStream) + Clone + Send + 'static) -> Self {
        let (listener, address) = listen().await;
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let acceptor = TlsAcceptor::from(credential.server_config());
                let arrived = arrived.clone();
                connections.spawn(async move {
                    // An accident may have happened to the handshake.
                    let Ok(stream) = acceptor.accept(socket).await else { return };
                    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                    let mut relays = JoinSet::new();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        let Ok(send) = respond.send_response(http::Response::new(()), false) else { continue };
                        let port = request.uri().port_u16().unwrap();
                        let (near, far) = crate::tunnel_peers::connected().await;
                        SockRef::from(&far).set_send_buffer_size(crate::transport::NARROW).unwrap();
                        relays.spawn(relay(far, StockStream { send, receive: request.into_body() }));
                        arrived(port, near);
                    }
                    drop(connection);
                    relays.join_all().await;
                });
            }
        });
        Self { address, task }
    }
}
