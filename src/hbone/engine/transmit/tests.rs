#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::*;
use crate::forward::record::{Direction, Opener, Suite};
use crate::hbone::engine::ready::StreamWaker;
use crate::hbone::engine::reserve::Credit;
use crate::hbone::engine::stream::{Application, Stream};
use crate::hbone::engine::{Attach, Early, Established, Side};
use crate::hbone::{Config, Endpoint, Role};

fn sockets() -> (TcpStream, TcpStream) {
    let (near, far) = crate::sys::socket::pair().unwrap();
    (TcpStream::from_std(near).unwrap(), TcpStream::from_std(far).unwrap())
}

/// A serving tunnel whose peer has said its first words, and that peer's socket.
fn tunnel() -> (Box<Tunnel>, TcpStream) {
    let (socket, far) = sockets();
    let direction = || Direction { suite: Suite::Aes128Gcm, secret: vec![0; 32], sequence: 0 };
    let (opener, sealer) = (Opener::new(direction()).unwrap(), Sealer::new(direction()).unwrap());
    let established = Established { socket, opener, sealer, chain: Vec::new(), older: false, input: Early::default() };
    let mut tunnel = Tunnel::new(established, Side::Server, Arc::new(Endpoint::new(Config::default()))).unwrap();
    let mut hello = frame::PREFACE.to_vec();
    frame::put(&mut hello, frame::SETTINGS, 0, 0, &[]);
    tunnel.walk(&hello, 0..hello.len()).unwrap();
    (tunnel, far)
}

/// A stream with an application that reads and writes nothing; its slot and the other end.
fn stream(tunnel: &mut Tunnel, id: u32) -> (u32, TcpStream) {
    let (socket, far) = sockets();
    let slot = tunnel.streams.insert(Stream::new(id, Phase::Open, 65_535, 1 << 20));
    let attach = Attach { id, socket, role: Role::Server, meter: Arc::default(), done: oneshot::channel().0, slot: None };
    let wake = StreamWaker::new(tunnel.inbox(), slot);
    tunnel.streams.at(slot).unwrap().phase = Phase::Relaying(Application::new(attach, wake));
    tunnel.last_peer_id = tunnel.last_peer_id.max(id);
    tunnel.enqueue(slot);
    (slot, far)
}

/// Until the runtime has seen that the stream has something to send.
async fn until_queued(tunnel: &mut Tunnel, slot: u32) {
    loop {
        tunnel.enqueue(slot);
        tunnel.output.range = 0..0;
        tunnel.fill();
        if tunnel.streams.at(slot).unwrap().queued {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn streams_that_end_while_the_peer_gives_no_credit_leave_nothing_in_the_queues() {
    for left in [0, 1000] {
        let (mut tunnel, _far) = tunnel();
        tunnel.credit = Credit::resumed(left, 65_535);
        for number in 0..300 {
            let (slot, far) = stream(&mut tunnel, 2 * number + 1);
            far.writable().await.unwrap();
            far.try_write(b"something to send").unwrap();
            tunnel.streams.at(slot).unwrap().sparse = false;
            until_queued(&mut tunnel, slot).await;
            assert_eq!((tunnel.senders.len(), tunnel.held.len()), if left == 0 { (1, 0) } else { (0, 1) });
            tunnel.abandon(slot, Ended::Finished, None);
            assert_eq!((tunnel.senders.len(), tunnel.held.len()), (0, 0), "{number} with {left} octets left");
        }
    }
}

#[tokio::test]
async fn held_streams_have_their_turn_when_credit_comes() {
    let (mut tunnel, _far) = tunnel();
    tunnel.credit = Credit::resumed(4095, 65_535);
    let (slot, far) = stream(&mut tunnel, 1);
    far.writable().await.unwrap();
    far.try_write(&[1; 10_000]).unwrap();
    tunnel.streams.at(slot).unwrap().sparse = false;
    until_queued(&mut tunnel, slot).await;
    assert_eq!((tunnel.held.len(), tunnel.credit.left()), (1, 4095));
    let mut more = Vec::new();
    frame::put(&mut more, frame::WINDOW_UPDATE, 0, 0, &1000_u32.to_be_bytes());
    tunnel.walk(&more, 0..more.len()).unwrap();
    assert_eq!((tunnel.held.len(), tunnel.senders.len(), tunnel.credit.left()), (0, 1, 5095));
    tunnel.output.range = 0..0;
    tunnel.fill();
    assert_eq!(tunnel.credit.left(), 4095);
}

#[tokio::test]
async fn an_end_needs_no_credit() {
    let (mut tunnel, _far) = tunnel();
    tunnel.credit = Credit::resumed(4095, 65_535);
    let (slot, mut far) = stream(&mut tunnel, 1);
    tunnel.streams.at(slot).unwrap().sparse = false;
    far.shutdown().await.unwrap();
    for _ in 0..1000 {
        tunnel.enqueue(slot);
        tunnel.output.range = 0..0;
        tunnel.fill();
        tokio::task::yield_now().await;
    }
    assert!(tunnel.streams.at(slot).unwrap().sent_end);
    assert_eq!((tunnel.held.len() + tunnel.senders.len(), tunnel.credit.left()), (0, 4095));
}

#[tokio::test]
async fn what_a_peer_sent_in_small_pieces_or_asked_for_leaves_no_memory_behind() {
    let (mut tunnel, _far) = tunnel();
    let (_, _application) = stream(&mut tunnel, 1);
    let mut octets = Vec::new();
    (0..20_000).for_each(|_| frame::put(&mut octets, frame::DATA, 0, 1, b"x"));
    tunnel.walk(&octets, 0..octets.len()).unwrap();
    tunnel.flush_spans(&octets);
    assert!(tunnel.spans.capacity() <= 512, "{} spans", tunnel.spans.capacity());
    let mut asked = Vec::new();
    (0..900).for_each(|_| frame::put(&mut asked, frame::PING, 0, 0, &[0; 8]));
    frame::put(&mut asked, frame::GOAWAY, 0, 0, &[0; 16_000]);
    tunnel.walk(&asked, 0..asked.len()).unwrap();
    assert!(tunnel.control.len() > 900 * 17);
    tunnel.fill();
    assert!(tunnel.control.is_empty());
    for (what, kept) in [("control", tunnel.control.capacity()), ("gathered", tunnel.gathered.capacity())] {
        assert!(kept <= 4 << 10, "{kept} octets are kept for {what}");
    }
}
