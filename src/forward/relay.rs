//! The relay between two plain TCP sockets. Half-closes travel in both directions; a reset of either side resets the other.

use std::io;

use tokio::io::AsyncWriteExt;
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

/// Relays between the client's socket and the server's until both directions have ended. Bytes from the client count as received, bytes to it
/// as sent (reference, dataplane §10.4).
pub async fn relay(mut client: TcpStream, mut server: TcpStream, meter: &Meter) -> Ended {
    let outcome = {
        let (client_read, client_write) = client.split();
        let (server_read, server_write) = server.split();
        let up = pump(client_read, server_write, |bytes| meter.received(bytes));
        let down = pump(server_read, client_write, |bytes| meter.sent(bytes));
        tokio::try_join!(up, down)
    };
    match outcome {
        Ok(((), ())) => Ended::Finished,
        Err(error) => {
            // The one side is gone: the other must not take a clean end for the end of the data.
            // A socket that refuses the option is closed all the same.
            let _ = reset_on_close(&client);
            let _ = reset_on_close(&server);
            Ended::from_error(error)
        }
    }
}

/// One direction: readiness first, buffer second, so that an idle direction owns none.
async fn pump(read: ReadHalf<'_>, mut write: WriteHalf<'_>, count: impl Fn(u64)) -> io::Result<()> {
    let mut size = ReadSize::default();
    loop {
        read.readable().await?;
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
