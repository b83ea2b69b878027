//! A connection whose bytes flow. What established it was large and is gone by now; what is kept here is kept for every idle connection of the
//! node, so it is little: its record, what may end it, and the relay.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::connections::Registration;
use super::guard::LiveGuard;
use super::pod::PodProxy;
use super::session::{Error, closed};
use crate::forward::{self, Ended};
use crate::hbone::Relaying;
use crate::lifecycle::drain::{DrainHold, DrainWatcher};
use crate::policy::{Facts, Permitted};
use crate::telemetry::{ConnectionEnd, ConnectionFacts, Meter, OpenConnection, ResponseFlag, SocketGuard};

/// What a connection has from its opening to its end.
pub(super) struct Opened {
    pub(super) record: OpenConnection,
    pub(super) drain: DrainWatcher,
    pub(super) pod: Arc<PodProxy>,
    pub(super) listed: Registration,
    /// Counts its socket as open; a stream has none of its own.
    pub(super) _socket: Option<SocketGuard>,
}

impl Opened {
    /// It ends before its bytes could flow.
    pub(super) fn fail(self, error: &Error) {
        self.record.close(error.end());
    }
}

/// What is left of it while its bytes flow.
struct Kept {
    record: OpenConnection,
    drain: DrainHold,
    pod: Arc<PodProxy>,
    listed: Registration,
    _socket: Option<SocketGuard>,
}

impl Kept {
    /// What policy was asked about at the destination, from what is kept of the connection anyway. (A registered connection has a row, so that the
    /// other address is never looked at.)
    fn facts(&self) -> Facts {
        let ConnectionFacts { source, destination, .. } = self.record.facts();
        let target = self.listed.actual().unwrap_or(destination.address);
        Facts { identity: source.identity.clone(), source_ip: source.address.ip(), destination_ip: target.ip(), destination_port: target.port() }
    }
}

/// The relay of a connection.
pub(super) enum Transfer {
    /// Both sides are plain.
    Plain(Pin<Box<dyn Future<Output = Ended> + Send>>),
    /// One is a stream of a tunnel, whose task moves the bytes.
    Tunnel(Relaying),
    /// None any more.
    Over,
}

impl Transfer {
    pub(super) fn plain(client: TcpStream, server: TcpStream, meter: Arc<Meter>) -> Self {
        Self::Plain(Box::pin(async move { forward::relay(client, server, &meter).await }))
    }
}

impl Future for Transfer {
    type Output = Ended;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Ended> {
        match self.get_mut() {
            Self::Plain(relay) => relay.as_mut().poll(context),
            Self::Tunnel(relaying) => Pin::new(relaying).poll(context),
            Self::Over => Poll::Pending,
        }
    }
}

/// A connection whose bytes flow. It resolves when both ends are done, policy changes its mind, or a drain ends it; its end is recorded then.
pub(super) struct Live {
    kept: Option<Kept>,
    transfer: Transfer,
    /// Policy's permission and the watch over it, where policy is asked: at the destination.
    permission: Option<(Permitted, LiveGuard)>,
}

impl Live {
    pub(super) fn new(opened: Opened, transfer: Transfer, permission: Option<(Permitted, LiveGuard)>) -> Self {
        let Opened { record, drain, pod, listed, _socket } = opened;
        listed.flows(record.meter());
        Self { kept: Some(Kept { record, drain: drain.into_hold(), pod, listed, _socket }), transfer, permission }
    }

    /// Pending, the task is woken by the relay and by the pod's connection table: one place in a list for each connection, rather than one
    /// waiting future for each thing that may end it.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if let Some(kept) = &self.kept {
            // Before the looks, so that no change falls between.
            if kept.listed.listen(context) {
                return Poll::Ready(Err(Error::HalfClosed(kept.pod.node.config.half_closed)));
            }
            if let Some((_, guard)) = &mut self.permission
                && let Poll::Ready(denial) = guard.poll_denied(context, || kept.facts())
            {
                return Poll::Ready(Err(Error::Cut(denial)));
            }
            if kept.drain.is_forced() {
                return Poll::Ready(Err(Error::Drained));
            }
        }
        Pin::new(&mut self.transfer).poll(context).map(closed)
    }
}

impl Future for Live {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let live = self.get_mut();
        let outcome = ready!(live.poll_end(context));
        // The sockets go first: bytes that are counted after the end appear nowhere.
        live.transfer = Transfer::Over;
        if let Some(kept) = live.kept.take() {
            let policy = || live.permission.as_ref().and_then(|(permitted, _)| permitted.policy().cloned());
            kept.record.close(match outcome {
                Ok(()) => ConnectionEnd { flag: ResponseFlag::Ok, error: None, policy: policy() },
                Err(error) => error.end(),
            });
        }
        Poll::Ready(())
    }
}

/// One connection from accept to close. What establishes it is boxed and gone when the bytes flow.
#[expect(clippy::large_enum_variant, reason = "the larger one is the lasting one; in a box it would cost every idle connection an allocation more")]
pub(super) enum Connection {
    /// Being established.
    Beginning(Pin<Box<dyn Future<Output = Option<Live>> + Send>>),
    /// Established.
    Live(Live),
}

impl Connection {
    /// A connection that `begin` establishes, or records as refused.
    pub(super) fn new(begin: impl Future<Output = Option<Live>> + Send + 'static) -> Self {
        Self::Beginning(Box::pin(begin))
    }
}

impl Future for Connection {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut *self {
                Self::Beginning(begin) => match ready!(begin.as_mut().poll(context)) {
                    Some(live) => *self = Self::Live(live),
                    None => return Poll::Ready(()),
                },
                Self::Live(live) => return Pin::new(live).poll(context),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The task of a connection is `Connection` and 104 bytes of the runtime's, rounded up to the next 128: with more, every idle connection of the
    /// node would cost 128 bytes more.
    #[test]
    fn the_task_of_a_live_connection_fits_into_384_bytes() {
        assert!(size_of::<Connection>() <= 280, "{}", size_of::<Connection>());
    }
}
