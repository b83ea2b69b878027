//! One stream of a tunnel, and its relay to an application's socket. The bytes are moved by the tunnel's own task.
//!
//! How ends map (reference, dataplane §2.6, RFC 9113 §8.5): FIN ↔ END_STREAM, each direction by itself; a reset application socket ↔
//! RST_STREAM(CANCEL). The reference takes a received RST_STREAM(CANCEL) for a clean end, which makes cut-off data look complete to the
//! application; here only NO_ERROR does, and everything else resets the application's socket.

use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::dial::StreamSlot;
use super::engine::{Attach, Command, Inbox, Reason};
use crate::forward::Ended;
use crate::telemetry::Meter;

/// On which side of the tunnel the application socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The socket is the client's: bytes read from it go from client to server.
    Client,
    /// The socket is the server's.
    Server,
}

/// One open stream of a tunnel. Dropping it resets the stream with CANCEL.
pub struct TunnelStream {
    id: u32,
    inbox: Arc<Inbox<Command>>,
    over: bool,
    /// Gives the place in the pooled tunnel back when the stream is over.
    slot: Option<StreamSlot>,
}

impl TunnelStream {
    pub(super) fn new(id: u32, inbox: Arc<Inbox<Command>>, slot: Option<StreamSlot>) -> Self {
        Self { id, inbox, over: false, slot }
    }

    /// Moves bytes between the stream and the application's socket until both directions have ended. Dropping the future resets the stream
    /// with CANCEL, and the socket.
    pub async fn relay(mut self, socket: TcpStream, role: Role, meter: &Arc<Meter>) -> Ended {
        let (done, ended) = oneshot::channel();
        let attach = Box::new(Attach { id: self.id, socket, role, meter: meter.clone(), done, slot: self.slot.take() });
        let gone = || Ended::Disconnected(io::Error::new(io::ErrorKind::ConnectionReset, "the tunnel is gone"));
        if let Err(command) = self.inbox.send(Command::Attach(attach)) {
            if let Command::Attach(attach) = command {
                // The application must not take this for an end.
                let _ = crate::sys::socket::reset_on_close(&attach.socket);
            }
            self.over = true;
            return gone();
        }
        let ended = ended.await.unwrap_or_else(|_| gone());
        self.over = true;
        ended
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        if !self.over {
            // A tunnel that is gone has no streams left to reset.
            let _ = self.inbox.send(Command::Reset { id: self.id, reason: Reason::CANCEL });
        }
    }
}
