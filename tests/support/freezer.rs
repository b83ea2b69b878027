//! A relay that can stop: connections stay open and no byte comes through, as behind a firewall that drops.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub struct Freezer {
    pub address: SocketAddr,
    generation: watch::Sender<u64>,
    task: AbortHandle,
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Freezer {
    pub async fn start(upstream: impl Fn() -> SocketAddr + Send + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (generation, frozen) = watch::channel(0);
        let task = tokio::spawn(async move {
            let mut relays = tokio::task::JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (upstream, frozen) = (upstream(), frozen.clone());
                relays.spawn(async move {
                    let Ok(server) = TcpStream::connect(upstream).await else { return };
                    let (client_read, client_write) = client.into_split();
                    let (server_read, server_write) = server.into_split();
                    tokio::join!(copy(client_read, server_write, frozen.clone()), copy(server_read, client_write, frozen));
                });
            }
        })
        .abort_handle();
        Self { address, generation, task }
    }

    /// Freezes the connections of this moment for ever; later ones work.
    pub fn freeze(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }
}

async fn copy(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, mut frozen: watch::Receiver<u64>) {
    frozen.mark_unchanged();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            biased;
            _ = frozen.changed() => std::future::pending().await,
            read = from.read(&mut buffer) => read,
        };
        match read {
            Ok(length @ 1..) if to.write_all(&buffer[..length]).await.is_ok() => {}
            _ => return,
        }
    }
}
