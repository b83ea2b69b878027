//! The accept loop of one listener.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

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

/// Whose share of a limit a client's connections count against. All of loopback is one source: any process in a pod has sixteen million
/// addresses there, and could otherwise take the places of a whole node.
pub(super) fn source_of(client: IpAddr) -> IpAddr {
    let client = client.to_canonical();
    if client.is_loopback() { Ipv4Addr::LOCALHOST.into() } else { client }
}

fn take_queued(listener: &TcpListener, on_connection: &mut impl FnMut(TcpStream, SocketAddr)) {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    while let std::task::Poll::Ready(Ok((socket, peer))) = listener.poll_accept(&mut context) {
        on_connection(socket, canonical_socket(peer));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::lifecycle::drain;

    #[test]
    fn every_address_is_a_source_and_loopback_is_one() {
        let source = |text: &str| source_of(text.parse().unwrap()).to_string();
        for (client, counted) in [
            ("10.0.0.1", "10.0.0.1"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
            ("fd00::1", "fd00::1"),
            ("127.0.0.1", "127.0.0.1"),
            ("127.9.8.7", "127.0.0.1"),
            ("::ffff:127.9.8.7", "127.0.0.1"),
            ("::1", "127.0.0.1"),
        ] {
            assert_eq!(source(client), counted, "{client}");
        }
    }

    #[tokio::test]
    async fn a_graceful_drain_first_takes_what_waits_in_the_queue_and_an_immediate_one_leaves_it() {
        for (mode, taken) in [(DrainMode::Graceful, 3), (DrainMode::Immediate, 0)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let clients: Vec<_> = (0..3).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
            let (trigger, watcher) = drain::channel();
            let drained = tokio::spawn(trigger.start(mode, std::time::Duration::from_secs(60)));
            let mut accepted = Vec::new();
            watcher.clone().signaled().await;
            accept_loop(listener, watcher, |_socket, client| accepted.push(client)).await;
            let expected: Vec<_> = clients.iter().map(|client| client.local_addr().unwrap()).take(taken).collect();
            assert_eq!(accepted, expected, "{mode:?}");
            assert!(drained.await.unwrap());
        }
    }
}
