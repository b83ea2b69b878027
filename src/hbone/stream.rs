//! One stream of a tunnel, and its relay to an application's socket. The bytes are moved by the tunnel's own task.
//!
//! How ends map (reference, dataplane §2.6, RFC 9113 §8.5): FIN ↔ END_STREAM, each direction by itself; a reset application socket ↔
//! RST_STREAM(CANCEL). The reference takes a received RST_STREAM(CANCEL) for a clean end, which makes cut-off data look complete to the
//! application; here only NO_ERROR does, and everything else resets the application's socket.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

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

    /// Its number in the tunnel.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Gives the stream its application's socket. The tunnel's task moves bytes between them until both directions have ended, which the result
    /// waits for. Dropping that resets the stream with CANCEL, and the socket.
    pub fn relay(mut self, socket: TcpStream, role: Role, meter: &Arc<Meter>) -> Relaying {
        let (done, ended) = oneshot::channel();
        let attach = Box::new(Attach { id: self.id, socket, role, meter: meter.clone(), done, slot: self.slot.take() });
        let refused = self.inbox.send(Command::Attach(attach)).err();
        if let Some(Command::Attach(attach)) = &refused {
            // The application must not take this for an end.
            let _ = crate::sys::socket::reset_on_close(&attach.socket);
        }
        // From here on the result speaks for the stream.
        self.over = true;
        Relaying { id: self.id, inbox: self.inbox.clone(), over: refused.is_some(), ended }
    }
}

/// A stream whose bytes the tunnel's task moves.
#[must_use = "dropping it resets the stream"]
pub struct Relaying {
    id: u32,
    inbox: Arc<Inbox<Command>>,
    over: bool,
    ended: oneshot::Receiver<Ended>,
}

impl Future for Relaying {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Ended> {
        let ended = ready!(Pin::new(&mut self.ended).poll(context));
        self.over = true;
        Poll::Ready(ended.unwrap_or_else(|_| Ended::Disconnected(io::Error::new(io::ErrorKind::ConnectionReset, "the tunnel is gone"))))
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        if !self.over {
            give_up(&self.inbox, self.id);
        }
    }
}

impl Drop for Relaying {
    fn drop(&mut self) {
        if !self.over {
            give_up(&self.inbox, self.id);
        }
    }
}

fn give_up(inbox: &Inbox<Command>, id: u32) {
    // A tunnel that is gone has no streams left to reset.
    let _ = inbox.send(Command::Reset { id, reason: Reason::CANCEL });
}
