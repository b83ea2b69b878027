//! The journey of a connection, `Accepted → Identified → Routed → Permitted → Connected → Relaying → Closed`, as types: each step takes the
//! one before, and [`Connected::flow`] exists only for a journey that carries a [`Permitted`]. Forgetting the policy check does not compile.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tracing::Level;

use super::announcement;
use super::guard::LiveGuard;
use super::live::{Live, Opened, Transfer};
use super::pod::PodProxy;
use super::route::RouteError;
use super::route::inbound::Target;
use super::socks::HandshakeError;
use crate::discovery::xds::Unanswered;
use crate::forward::Ended;
use crate::hbone::{self, Role, TunnelStream};
use crate::identity::IdentityError;
use crate::lifecycle::PermitRefused;
use crate::model::{SpiffeError, SpiffeId, Text, Workload};
use crate::policy::{Action, Denial, DryRunMatch, Facts, Permitted};
use crate::telemetry::{ConnectionEnd, RefusalReason, ResponseFlag};

/// Why a connection was not served, or ended early. The wording is that of the reference (dataplane §10.5) where it has one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pod is not in the mesh's state.
    #[error("local workload {0} is not known")]
    LocalWorkloadUnknown(String),
    /// No way to the destination.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// The mesh is asked on demand, and did not say what the destination is.
    #[error("unknown destination: {0}")]
    Unanswered(#[from] Unanswered),
    /// No certificate for the pod.
    #[error("identity error: {0}")]
    Identity(#[from] IdentityError),
    /// The pod's names do not make an identity.
    #[error("identity error: {0}")]
    Name(#[from] SpiffeError),
    /// The tunnel failed.
    #[error(transparent)]
    Tunnel(#[from] Arc<hbone::Error>),
    /// The request is no proper CONNECT.
    #[error(transparent)]
    BadRequest(#[from] hbone::BadRequest),
    /// Policy refused a new connection.
    #[error("connection closed due to policy rejection: {0}")]
    Rejected(#[source] Denial),
    /// Policy no longer permits a live connection.
    #[error("connection closed due to policy change: {0}")]
    Cut(#[source] Denial),
    /// The destination could not be reached.
    #[error("connection failed: {0}")]
    Connect(#[source] io::Error),
    /// The peer gave up before the connection was established.
    #[error("the client left before the connection was established")]
    Abandoned,
    /// A limit was reached.
    #[error("too many {0}: {1}")]
    Limit(&'static str, #[source] PermitRefused),
    /// The proxy or the pod is going away.
    #[error("connection closed due to connection drain")]
    Drained,
    /// One direction had ended, and nothing moved in the other.
    #[error("one direction had ended, and in the other nothing moved for {0:?}")]
    HalfClosed(Duration),
    /// Moving bytes failed.
    #[error("io error: {0}")]
    Relay(#[source] io::Error),
    /// A SOCKS client did not say where it wants to go, or wants what is not served.
    #[error(transparent)]
    Socks(#[from] HandshakeError),
    /// The host name by which alone the destination is known, or that a SOCKS client asked for, has no address.
    #[error("DNS resolution produced no addresses: {name} cannot be resolved: {reason}")]
    Unresolved {
        /// The name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The original destination cannot be read.
    #[error("original destination unknown: {0}")]
    OriginalDestination(#[source] io::Error),
}

impl Error {
    /// The `response_flags` of metrics (reference, dataplane §10.4).
    #[must_use]
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::Rejected(_) | Self::Cut(_) => ResponseFlag::Denied,
            Self::Identity(_) | Self::Name(_) => ResponseFlag::IdentityError,
            Self::Drained | Self::HalfClosed(_) => ResponseFlag::Ok,
            Self::Tunnel(error) => tunnel_flag(error),
            _ => ResponseFlag::Connect,
        }
    }

    /// The category of a refusal that came before anything was known.
    pub(super) fn refusal_reason(&self) -> RefusalReason {
        match self {
            Self::LocalWorkloadUnknown(_) => RefusalReason::UnknownWorkload,
            Self::Route(RouteError::RecursiveCall(_)) => RefusalReason::Loop,
            Self::Route(RouteError::IpMismatch { .. }) => RefusalReason::BadDestination,
            Self::Route(_) | Self::Unanswered(_) | Self::Unresolved { .. } => RefusalReason::NoRoute,
            Self::Socks(HandshakeError::Late(_)) => RefusalReason::Handshake,
            Self::Socks(HandshakeError::Io(_)) => RefusalReason::Io,
            Self::Socks(_) => RefusalReason::BadRequest,
            Self::Identity(_) | Self::Name(_) => RefusalReason::Identity,
            Self::Tunnel(_) => RefusalReason::Handshake,
            Self::BadRequest(_) => RefusalReason::BadRequest,
            Self::Limit(..) => RefusalReason::Overload,
            Self::OriginalDestination(_) | Self::Connect(_) | Self::Relay(_) => RefusalReason::Io,
            Self::Rejected(_) | Self::Cut(_) | Self::Abandoned | Self::Drained | Self::HalfClosed(_) => RefusalReason::Other,
        }
    }

    /// How the connection's record is closed.
    #[must_use]
    pub fn end(&self) -> ConnectionEnd {
        let policy = match self {
            Self::Rejected(denial) | Self::Cut(denial) => denial.policy().cloned(),
            _ => None,
        };
        ConnectionEnd { flag: self.flag(), error: Some(self.to_string()), policy }
    }
}

fn tunnel_flag(error: &hbone::Error) -> ResponseFlag {
    match error {
        hbone::Error::Tls(_) | hbone::Error::Peer(_) => ResponseFlag::TlsFailure,
        hbone::Error::Revoked => ResponseFlag::Revoked,
        hbone::Error::Handshake(_)
        | hbone::Error::Tunnel(_)
        | hbone::Error::HandshakeDeadline(_)
        | hbone::Error::PingTimeout(_)
        | hbone::Error::Flood(_)
        | hbone::Error::Immovable(_) => ResponseFlag::H2Failure,
        hbone::Error::ConnectTimeout(_) => ResponseFlag::NetworkPolicy,
        hbone::Error::Connect(_) | hbone::Error::Status(_) | hbone::Error::Draining => ResponseFlag::Connect,
        hbone::Error::Within { error, .. } => tunnel_flag(error),
    }
}

/// A connection that arrived.
pub(super) struct Accepted {
    /// The client, canonical.
    pub(super) source: SocketAddr,
    /// Where it arrived, canonical.
    pub(super) destination: SocketAddr,
}

/// Who is on both ends.
pub(super) struct Identified {
    pub(super) accepted: Accepted,
    /// The client as its certificate names it.
    pub(super) identity: Option<SpiffeId>,
    /// The pod that it wants.
    pub(super) workload: Arc<Workload>,
}

/// Where it goes.
pub(super) struct Routed {
    pub(super) identified: Identified,
    /// The address on the pod, as policy sees it.
    pub(super) target: SocketAddr,
    /// What the client wanted to reach, if the application shall be told.
    announce: Option<SocketAddr>,
}

/// Policy said yes.
pub(super) struct Cleared {
    routed: Routed,
    permitted: Permitted,
    guard: LiveGuard,
}

/// The application took the connection.
pub(super) struct Connected {
    socket: TcpStream,
    permitted: Permitted,
    guard: LiveGuard,
}

impl Accepted {
    pub(super) fn identified(self, identity: Option<SpiffeId>, workload: Arc<Workload>) -> Identified {
        Identified { accepted: self, identity, workload }
    }
}

impl Identified {
    pub(super) fn routed(self, target: Target) -> Routed {
        Routed { identified: self, target: target.address, announce: target.announce }
    }
}

impl Routed {
    /// Asks policy.
    pub(super) async fn permit(self, pod: &PodProxy) -> Result<Cleared, Error> {
        let decision = pod.guard.permit(self.facts()).await;
        if let Some(decision) = &decision {
            self.log(decision.as_ref().map(|(permitted, _)| permitted), pod.node.config.policy_info);
        }
        let unknown = || Error::LocalWorkloadUnknown(self.identified.workload.uid.to_string());
        let (permitted, guard) = decision.ok_or_else(unknown)?.map_err(Error::Rejected)?;
        Ok(Cleared { routed: self, permitted, guard })
    }

    /// What policy may know.
    fn facts(&self) -> Facts {
        Facts {
            identity: self.identified.identity.clone(),
            source_ip: self.identified.accepted.source.ip(),
            destination_ip: self.target.ip(),
            destination_port: self.target.port(),
        }
    }

    async fn dial(&self, pod: &PodProxy) -> io::Result<TcpStream> {
        let source = self.identified.accepted.source;
        let Some(announce) = self.announce else { return deliver(pod, self.target, Some(source)).await };
        let mut socket = if pod.node.config.localhost_app_tunnel {
            let loopback = if self.target.is_ipv4() { IpAddr::from(Ipv4Addr::LOCALHOST) } else { Ipv6Addr::LOCALHOST.into() };
            deliver(pod, SocketAddr::new(loopback, self.target.port()), None).await?
        } else {
            deliver(pod, self.target, Some(source)).await?
        };
        // Before the 200, so that a peer is told if it fails.
        socket.write_all(&announcement::header(source, announce, self.identified.identity.as_ref())).await?;
        Ok(socket)
    }

    /// What policy said, and what policies on trial would have said, at DEBUG or as configured at INFO (reference, dataplane §6.4).
    fn log(&self, decision: Result<&Permitted, &Denial>, info: bool) {
        macro_rules! say {
            ($($event:tt)*) => {
                if info { tracing::event!(target: "policy", Level::INFO, $($event)*) } else { tracing::event!(target: "policy", Level::DEBUG, $($event)*) }
            };
        }
        let Accepted { source, .. } = &self.identified.accepted;
        let (target, identity) = (&self.target, self.identified.identity.as_ref().map(tracing::field::display));
        let (verdict, decided_by, on_trial) = match decision {
            Ok(permitted) => ("permitted", permitted.policy(), permitted.dry_run()),
            Err(denial) => ("denied", denial.policy(), denial.dry_run()),
        };
        for DryRunMatch { policy, action } in on_trial {
            let effect = match action {
                Action::Deny => "would deny",
                Action::Allow => "would allow",
            };
            say!(src.addr = %source, src.identity = identity.as_ref(), dst.addr = %target, policy = policy.as_str(), effect, "dry-run policy matches");
        }
        let policy = decided_by.map(Text::as_str);
        say!(src.addr = %source, src.identity = identity, dst.addr = %target, policy, verdict, "policy decision");
    }
}

/// Connects to the application, and counts if it does not see the client's address.
async fn deliver(pod: &PodProxy, target: SocketAddr, source: Option<SocketAddr>) -> io::Result<TcpStream> {
    let (socket, lost) = pod.sockets.deliver(target, source).await?;
    if lost {
        pod.node.telemetry.source_lost();
    }
    Ok(socket)
}

impl Cleared {
    /// Dials the application, which shall see the client's address: as the source of the connection, or in a PROXY header in front of its bytes.
    pub(super) async fn connect(self, pod: &PodProxy) -> Result<Connected, Error> {
        let Self { routed, permitted, mut guard } = self;
        let facts = routed.facts();
        tokio::select! {
            biased;
            denial = guard.denied(&facts) => Err(Error::Cut(denial)),
            socket = routed.dial(pod) => {
                let socket = socket.map_err(Error::Connect)?;
                Ok(Connected { socket, permitted, guard })
            }
        }
    }
}

/// The side that the client is on.
pub(super) enum Client {
    /// A plain socket.
    Plain(TcpStream),
    /// A stream of a tunnel.
    Tunnel(TunnelStream),
}

impl Connected {
    /// Lets the bytes flow.
    pub(super) fn flow(self, opened: Opened, client: Client) -> Live {
        let Self { socket, permitted, guard } = self;
        let meter = opened.record.meter();
        let transfer = match client {
            Client::Plain(client) => Transfer::plain(client, socket, meter),
            Client::Tunnel(stream) => Transfer::Tunnel(stream.relay(socket, Role::Server, &meter)),
        };
        Live::new(opened, transfer, Some((permitted, guard)))
    }
}

/// A peer that hangs up ends the connection but is no failure (reference, dataplane §2.6).
pub(super) fn closed(ended: Ended) -> Result<(), Error> {
    match ended {
        Ended::Finished | Ended::Moved | Ended::Disconnected(_) => Ok(()),
        // A tunnel says so why it cut its streams.
        Ended::Failed(error) => Err(error.downcast::<hbone::Error>().map_or_else(Error::Relay, |error| Error::Tunnel(Arc::new(error)))),
    }
}

#[cfg(test)]
mod tests;
