//! One stream of a tunnel and its relay to an application socket, on stock `h2`.
//!
//! How ends map (reference, dataplane §2.6, RFC 9113 §8.5): FIN ↔ END_STREAM, each direction by itself; a reset application socket ↔
//! RST_STREAM(CANCEL). The reference takes a received RST_STREAM(CANCEL) for a clean end, which makes cut-off data look complete to the
//! application; here only NO_ERROR does, and everything else resets the application's socket.

use std::future::poll_fn;
use std::io;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::dial::StreamSlot;
use crate::forward::{Ended, ReadSize};
use crate::sys::socket::reset_on_close;
use crate::telemetry::Meter;

/// On which side of the tunnel the application socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The socket is the client's: bytes read from it go from client to server.
    Client,
    /// The socket is the server's.
    Server,
}

/// One open stream of a tunnel.
pub struct TunnelStream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Gives the place in the pooled tunnel back when the stream is over.
    _slot: Option<StreamSlot>,
}

impl TunnelStream {
    pub(super) fn new(send: SendStream<Bytes>, receive: RecvStream, slot: Option<StreamSlot>) -> Self {
        Self { send, receive, _slot: slot }
    }

    /// Moves bytes between the stream and the application's socket until both directions have ended. Dropping the future resets the stream
    /// with CANCEL and closes the socket.
    pub async fn relay(mut self, mut socket: TcpStream, role: Role, meter: &Meter) -> Ended {
        let outcome = {
            let (read, write) = socket.split();
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
            Ok(((), ())) => Ended::Finished,
            Err(error) => {
                // A socket that refuses the option is closed all the same.
                let _ = reset_on_close(&socket);
                self.send.send_reset(Reason::CANCEL);
                Ended::from_error(error)
            }
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
            ready = read.readable() => { ready?; }
            reason = poll_fn(|context| send.poll_reset(context)) => match reason {
                Ok(reason) => return ended_by(reason),
                Err(error) => return Err(tunnel_error(error)),
            },
        }
        buffer.reserve(size.bytes());
        match read.try_read_buf(&mut buffer) {
            Ok(0) => return send.send_data(Bytes::new(), true).map_err(tunnel_error),
            Ok(bytes) => {
                size.learn(bytes);
                send_all(send, buffer.split().freeze()).await?;
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

/// Sends as the peer's window allows, so that a peer that stops reading stops us from reading the application.
async fn send_all(send: &mut SendStream<Bytes>, mut data: Bytes) -> io::Result<()> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        match poll_fn(|context| send.poll_capacity(context)).await {
            Some(Ok(capacity)) => {
                let part = data.split_to(capacity.min(data.len()));
                if !part.is_empty() {
                    send.send_data(part, false).map_err(tunnel_error)?;
                }
            }
            Some(Err(error)) => return Err(tunnel_error(error)),
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
    Ok(())
}

/// Tunnel → application. Credit is given back only when the application took the bytes.
async fn download(receive: &mut RecvStream, mut write: WriteHalf<'_>, count: impl Fn(u64)) -> io::Result<()> {
    loop {
        match receive.data().await {
            Some(Ok(data)) => {
                write.write_all(&data).await?;
                count(data.len() as u64);
                receive.flow_control().release_capacity(data.len()).map_err(tunnel_error)?;
            }
            Some(Err(error)) => {
                if error.reason() == Some(Reason::NO_ERROR) && error.is_reset() {
                    break;
                }
                return Err(tunnel_error(error));
            }
            None => break,
        }
    }
    match write.shutdown().await {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        _ => Ok(()),
    }
}

fn ended_by(reason: Reason) -> io::Result<()> {
    if reason == Reason::NO_ERROR { Ok(()) } else { Err(reset_error(reason)) }
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
