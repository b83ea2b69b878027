//! One stream of a tunnel and its relay to an application socket, on stock `h2`.
//!
//! How ends map (reference, dataplane §2.6, RFC 9113 §8.5): FIN ↔ END_STREAM, each direction by itself; a reset application socket ↔
//! RST_STREAM(CANCEL). The reference takes a received RST_STREAM(CANCEL) for a clean end, which makes cut-off data look complete to the
//! application; here only NO_ERROR does, and everything else resets the application's socket.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::dial::StreamSlot;
use crate::forward::{Backlog, Ended, ReadSize, socket_error};
use crate::sys::socket::reset_on_close;
use crate::telemetry::Meter;

/// With this many bytes in the backlog, writing comes before reading.
const ENOUGH: usize = 256 << 10;

/// On which side of the tunnel the application socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The socket is the client's: bytes read from it go from client to server.
    Client,
    /// The socket is the server's.
    Server,
}

/// One open stream of a tunnel. Dropped before its end, it is reset with CANCEL.
pub struct TunnelStream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    finished: bool,
    /// Gives the place in the pooled tunnel back when the stream is over.
    _slot: Option<StreamSlot>,
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        if !self.finished {
            // Left alone, h2 would say NO_ERROR in some states, which reads as a clean end.
            self.send.send_reset(Reason::CANCEL);
        }
    }
}

/// An application's socket that is reset when it is dropped before its connection has ended: the application must not take a cut for an end.
struct Application {
    socket: TcpStream,
    finished: bool,
}

impl Drop for Application {
    fn drop(&mut self) {
        if !self.finished {
            // A socket that refuses the option is closed all the same.
            let _ = reset_on_close(&self.socket);
        }
    }
}

impl TunnelStream {
    pub(super) fn new(send: SendStream<Bytes>, receive: RecvStream, slot: Option<StreamSlot>) -> Self {
        Self { send, receive, finished: false, _slot: slot }
    }

    /// Moves bytes between the stream and the application's socket until both directions have ended. Dropping the future resets both.
    pub async fn relay(mut self, socket: TcpStream, role: Role, meter: &Meter) -> Ended {
        let mut application = Application { socket, finished: false };
        let outcome = {
            let (read, write) = application.socket.split();
            let to_peer = upload(read, &mut self.send, |bytes| match role {
                Role::Client => meter.received(bytes),
                Role::Server => meter.sent(bytes),
            });
            let from_peer = download(&mut self.receive, write, |bytes| match role {
                Role::Client => meter.sent(bytes),
                Role::Server => meter.received(bytes),
            });
            tokio::try_join!(to_peer, from_peer)
        };
        match outcome {
            Ok(((), ())) => {
                application.finished = true;
                self.finished = true;
                Ended::Finished
            }
            Err(error) => Ended::from_error(error),
        }
    }

    /// Resolves when the peer resets the stream.
    pub async fn reset_by_peer(&mut self) {
        // An error here means that the whole tunnel is gone, which ends the stream as well.
        let _ = poll_fn(|context| self.send.poll_reset(context)).await;
    }
}

/// Application → tunnel. A wait for the application also watches for the peer's reset, which the other direction no longer sees once it has ended.
async fn upload(read: ReadHalf<'_>, send: &mut SendStream<Bytes>, count: impl Fn(u64)) -> io::Result<()> {
    let mut size = ReadSize::default();
    let mut buffer = BytesMut::new();
    loop {
        tokio::select! {
            biased;
            reason = poll_fn(|context| send.poll_reset(context)) => return ended_by(reason),
            ready = read.readable() => { ready?; }
        }
        buffer.reserve(size.bytes());
        match read.try_read_buf(&mut buffer) {
            Ok(0) => return finish(send),
            Ok(bytes) => {
                size.learn(bytes);
                if !send_all(send, buffer.split().freeze()).await? {
                    return Ok(());
                }
                count(bytes as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Readiness was stale: an idle connection owns no buffer.
                buffer = BytesMut::new();
            }
            Err(error) => return Err(error),
        }
    }
}

/// FIN is END_STREAM on an empty DATA frame.
fn finish(send: &mut SendStream<Bytes>) -> io::Result<()> {
    match send.send_data(Bytes::new(), true) {
        Ok(()) => Ok(()),
        Err(error) => match poll_reset_now(send) {
            Some(reason) => ended_by(reason),
            None => Err(tunnel_error(error)),
        },
    }
}

/// Sends as the peer's window allows, so that a peer that stops reading stops us from reading the application. Never sends an empty frame, of
/// which h2's receiver takes 100 in a connection's life. `false` when the peer wants no more.
async fn send_all(send: &mut SendStream<Bytes>, mut data: Bytes) -> io::Result<bool> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let sent = match poll_fn(|context| send.poll_capacity(context)).await {
            Some(Ok(capacity)) => {
                let part = data.split_to(capacity.min(data.len()));
                if part.is_empty() { Ok(()) } else { send.send_data(part, false).map_err(tunnel_error) }
            }
            Some(Err(error)) => Err(tunnel_error(error)),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        if let Err(error) = sent {
            return match poll_reset_now(send) {
                Some(reason) => ended_by(reason).map(|()| false),
                None => Err(error),
            };
        }
    }
    Ok(true)
}

/// The reset that the peer has sent, if any.
fn poll_reset_now(send: &mut SendStream<Bytes>) -> Option<Result<Reason, h2::Error>> {
    match send.poll_reset(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        Poll::Ready(reason) => Some(reason),
        Poll::Pending => None,
    }
}

/// Tunnel → application. Credit is given back only when the application took the bytes, but frames are taken out of h2 at once: it keeps 256
/// bytes for each, however small, and ends the tunnel when too many wait. What waits here is bounded by the stream's window.
async fn download(receive: &mut RecvStream, mut write: WriteHalf<'_>, count: impl Fn(u64)) -> io::Result<()> {
    let mut backlog = Backlog::default();
    let mut open = true;
    loop {
        while open && backlog.len() < ENOUGH {
            match poll_fn(|context| Poll::Ready(receive.poll_data(context))).await {
                Poll::Ready(next) => open = take(next, &mut backlog)?,
                Poll::Pending => break,
            }
        }
        if !backlog.is_empty() {
            match backlog.write(|slices| write.try_write_vectored(slices)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    count(written as u64);
                    receive.flow_control().release_capacity(written).map_err(tunnel_error)?;
                    tokio::task::consume_budget().await;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        } else if !open {
            break;
        }
        tokio::select! {
            biased;
            next = receive.data(), if open => open = take(next, &mut backlog)?,
            ready = write.ready(Interest::WRITABLE), if !backlog.is_empty() => { ready?; }
            // An application that closes altogether after its FIN is noticed here and nowhere else.
            ready = write.ready(Interest::ERROR), if backlog.is_empty() => {
                ready?;
                return Err(socket_error(write.as_ref()));
            }
        }
    }
    match write.shutdown().await {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        _ => Ok(()),
    }
}

/// Keeps what came; `false` when it was the end.
fn take(next: Option<Result<Bytes, h2::Error>>, backlog: &mut Backlog) -> io::Result<bool> {
    match next {
        Some(Ok(data)) => {
            backlog.push(data);
            Ok(true)
        }
        Some(Err(error)) if error.is_reset() && error.reason() == Some(Reason::NO_ERROR) => Ok(false),
        Some(Err(error)) => Err(tunnel_error(error)),
        None => Ok(false),
    }
}

fn ended_by(reason: Result<Reason, h2::Error>) -> io::Result<()> {
    match reason {
        Ok(Reason::NO_ERROR) => Ok(()),
        Ok(reason) => Err(reset_error(reason)),
        Err(error) => Err(tunnel_error(error)),
    }
}

fn reset_error(reason: Reason) -> io::Error {
    let kind = match reason {
        Reason::NO_ERROR | Reason::CANCEL | Reason::STREAM_CLOSED | Reason::CONNECT_ERROR => io::ErrorKind::ConnectionReset,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, format!("stream reset by peer: {reason:?}"))
}

fn tunnel_error(error: h2::Error) -> io::Error {
    if let Some(reason) = error.reason()
        && error.is_reset()
    {
        return reset_error(reason);
    }
    if error.is_io() {
        let kind = error.get_io().map_or(io::ErrorKind::ConnectionReset, io::Error::kind);
        return io::Error::new(kind, format!("tunnel broke: {error}"));
    }
    io::Error::new(io::ErrorKind::ConnectionReset, format!("tunnel closed: {error}"))
}
