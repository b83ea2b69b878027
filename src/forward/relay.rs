//! The relay between two plain TCP sockets. Half-closes travel in both directions; a reset of either side resets the other.

use std::io;

use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::ReadSize;
use crate::sys::socket::reset_on_close;
use crate::telemetry::Meter;

/// How a relay ended.
#[derive(Debug)]
pub enum Ended {
    /// Both directions saw the end of their stream.
    Finished,
    /// One side reset or vanished; the other was reset too. Not a failure of ours.
    Disconnected(io::Error),
    /// Something else went wrong.
    Failed(io::Error),
}

impl Ended {
    /// Sorts an I/O error into "the peer went away" and "failed" (reference, dataplane §2.6).
    #[must_use]
    pub fn from_error(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotConnected | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                Self::Disconnected(error)
            }
            _ => Self::Failed(error),
        }
    }
}

/// Two sockets that are reset when they are dropped before their connection has ended: neither side must take a cut for an end.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    finished: bool,
}

impl Drop for Pair {
    fn drop(&mut self) {
        if !self.finished {
            // A socket that refuses the option is closed all the same.
            let _ = reset_on_close(&self.client);
            let _ = reset_on_close(&self.server);
        }
    }
}

/// Relays between the client's socket and the server's until both directions have ended. Bytes from the client count as received, bytes to it
/// as sent (reference, dataplane §10.4). Dropping the future resets both.
pub async fn relay(client: TcpStream, server: TcpStream, meter: &Meter) -> Ended {
    let mut pair = Pair { client, server, finished: false };
    let outcome = {
        let (client_read, client_write) = pair.client.split();
        let (server_read, server_write) = pair.server.split();
        let up = pump(client_read, server_write, |bytes| meter.received(bytes));
        let down = pump(server_read, client_write, |bytes| meter.sent(bytes));
        tokio::try_join!(up, down)
    };
    match outcome {
        Ok(((), ())) => {
            pair.finished = true;
            Ended::Finished
        }
        Err(error) => Ended::from_error(error),
    }
}

/// One direction: readiness first, buffer second, so that an idle direction owns none.
async fn pump(read: ReadHalf<'_>, mut write: WriteHalf<'_>, count: impl Fn(u64)) -> io::Result<()> {
    let mut size = ReadSize::default();
    loop {
        tokio::select! {
            biased;
            ready = read.readable() => { ready?; }
            // A receiver that closes altogether after its FIN is noticed here and nowhere else.
            ready = write.ready(Interest::ERROR) => {
                ready?;
                return Err(socket_error(write.as_ref()));
            }
        }
        let mut buffer = Vec::with_capacity(size.bytes());
        match read.try_read_buf(&mut buffer) {
            Ok(0) => {
                return match write.shutdown().await {
                    Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
                    _ => Ok(()),
                };
            }
            Ok(bytes) => {
                size.learn(bytes);
                write.write_all(&buffer).await?;
                count(bytes as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Why a socket is ready to report an error.
pub fn socket_error(socket: &TcpStream) -> io::Error {
    match socket.take_error() {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

#[cfg(test)]
mod tests;
