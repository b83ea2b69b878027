//! The accept loop of one listener.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};

use crate::lifecycle::AcceptBackoff;
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::model::canonical_socket;
use crate::telemetry::limited;

/// Accepts until a drain begins. Errors never end the loop and never make it spin: those of one connection are passed over, lack of
/// descriptors or memory is waited out. A graceful drain first takes what already waits in the queue, since closing a listener resets it.
pub(super) async fn accept_loop(listener: TcpListener, mut drain: DrainWatcher, mut on_connection: impl FnMut(TcpStream, SocketAddr)) {
    let mut backoff = AcceptBackoff::default();
    loop {
        let accepted = tokio::select! {
            biased;
            mode = drain.signaled() => {
                if mode == DrainMode::Graceful {
                    take_queued(&listener, &mut on_connection);
                }
                return;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, peer)) => {
                backoff.succeeded();
                on_connection(socket, canonical_socket(peer));
            }
            Err(error) => {
                let pause = backoff.failed(&error);
                if !pause.is_zero() {
                    limited!(warn, "cannot accept", ?pause, "cannot accept connections: {error}");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }
}

fn take_queued(listener: &TcpListener, on_connection: &mut impl FnMut(TcpStream, SocketAddr)) {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    while let std::task::Poll::Ready(Ok((socket, peer))) = listener.poll_accept(&mut context) {
        on_connection(socket, canonical_socket(peer));
    }
}
