//! Inbound HBONE: tunnels that peers open to a pod's 15008, and the requests in them (reference, dataplane §4.1–4.4).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpStream;

use super::accept::source_of;
use super::connections::{Asked, LiveConnection, Protocol};
use super::failed_dials::FailedDials;
use super::live::{Connection, Live, Opened};
use super::pod::PodProxy;
use super::route;
use super::session::{Accepted, Client, Connected, Error, Identified, Routed};
use crate::hbone::{self, ConnectRequest, ConnectResponse, Incoming, Refusal, TunnelStream};
use crate::lifecycle::drain::DrainWatcher;
use crate::model::{Authority, Baggage, SpiffeId, canonical_socket};
use crate::telemetry::{ConnectionFacts, PeerFacts, Reporter, limited};

/// The two ends of a tunnel.
#[derive(Clone)]
struct Tunnel {
    peer: SpiffeId,
    client: SocketAddr,
    /// The pod's address that the peer connected to.
    local: SocketAddr,
}

/// Serves one tunnel from accept to close.
pub(super) async fn serve(pod: Arc<PodProxy>, socket: TcpStream, client: SocketAddr, mut drain: DrainWatcher) {
    let _open = pod.node.telemetry.socket_opened(Reporter::Destination);
    let local = match socket.local_addr() {
        Ok(local) => canonical_socket(local),
        Err(error) => return pod.refuse(Reporter::Destination, client, None, &Error::OriginalDestination(error)),
    };
    let accepted = tokio::select! {
        biased;
        _ = drain.signaled() => return,
        accepted = Box::pin(accept(&pod, socket, client)) => accepted,
    };
    let tunnel = match accepted {
        Ok(tunnel) => tunnel,
        Err(error) => return pod.refuse(Reporter::Destination, client, Some(local), &error),
    };
    let ends = Tunnel { peer: tunnel.peer().clone(), client, local };
    let identity = ends.peer.clone();
    let served = Box::pin(tunnel.serve(drain.clone(), move |incoming| {
        tokio::spawn(request(pod.clone(), ends.clone(), incoming, drain.clone()));
    }));
    if let Err(error) = served.await {
        match error {
            hbone::Error::Flood(_) => limited!(warn, "tunnel flooded", peer = %client, %identity, %error, "tunnel ended"),
            error => tracing::debug!(peer = %client, %identity, %error, "tunnel ended"),
        }
    }
}

async fn accept(pod: &PodProxy, socket: TcpStream, client: SocketAddr) -> Result<hbone::ServerTunnel, Error> {
    // Held until the peer has proven who it is, so that strangers cannot pile up handshakes.
    let _permit = pod.node.unauthenticated.acquire(source_of(client.ip())).map_err(|refused| {
        let _ = crate::sys::socket::reset_on_close(&socket);
        Error::Limit("connections that are not authenticated yet", refused)
    })?;
    let workload = pod.local_workload().await?;
    let identity = workload.identity()?;
    let credential = pod.credential(&identity).await?;
    Ok(hbone::accept(socket, client, &credential, &pod.node.hbone).await.map_err(Arc::new)?)
}

/// Serves one CONNECT.
fn request(pod: Arc<PodProxy>, tunnel: Tunnel, incoming: Incoming, drain: DrainWatcher) -> Connection {
    Connection::new(begin(pod, tunnel, incoming, drain))
}

/// Establishes a connection, or answers and records why it cannot be.
async fn begin(pod: Arc<PodProxy>, tunnel: Tunnel, incoming: Incoming, drain: DrainWatcher) -> Option<Live> {
    let (routed, asked) = match route_request(&pod, &tunnel, &incoming).await {
        Ok(decided) => decided,
        Err((refusal, error)) => {
            incoming.refuse(refusal);
            pod.refuse(Reporter::Destination, tunnel.client, Some(tunnel.local), &error);
            return None;
        }
    };
    let record = pod.node.telemetry.opened(facts(&pod, &tunnel, &routed, asked));
    let listed = pod.connections.register(LiveConnection {
        reporter: Reporter::Destination,
        source: tunnel.client,
        original: record.facts().service.clone().map(Asked::Service),
        actual: routed.target,
        protocol: Protocol::Hbone,
    });
    let mut opened = Opened { record, drain, pod, listed, _socket: None };
    match connect(&mut opened, incoming, routed, &tunnel.peer).await {
        Ok((connected, stream)) => Some(connected.flow(opened, Client::Tunnel(stream))),
        Err(error) => {
            opened.fail(&error);
            None
        }
    }
}

/// Asks policy, dials the application, and answers.
async fn connect(opened: &mut Opened, mut incoming: Incoming, routed: Routed, peer: &SpiffeId) -> Result<(Connected, TunnelStream), Error> {
    let Opened { pod, drain, .. } = opened;
    let workload = routed.identified.workload.clone();
    let target = routed.target.ip();
    let mut attempt = DialAttempt { failed: &pod.node.failed_dials, peer, target, dialed: false };
    let dialing = &mut attempt.dialed;
    let establish = async {
        let cleared = routed.permit(pod).await?;
        // One peer's dials must not take every descriptor of the node; a burst waits for its turn.
        let turn = pod.node.dials.wait(peer.clone(), pod.node.config.connect_timeout);
        let _dial = turn.await.map_err(|refused| Error::Limit("dials under way for this peer", refused))?;
        pod.node.failed_dials.check(peer, target).map_err(|refused| Error::Limit("dials for this peer that came to nothing", refused))?;
        *dialing = true;
        cleared.connect(pod).await
    };
    let established: Result<Connected, Error> = tokio::select! {
        biased;
        () = drain.forced() => Err(Error::Drained),
        established = establish => established,
        () = incoming.abandoned() => Err(Error::Abandoned),
    };
    let connected = match established {
        Ok(connected) => connected,
        Err(error) => {
            incoming.refuse(match error {
                Error::Rejected(_) | Error::Cut(_) => Refusal::Denied,
                _ => Refusal::Unavailable,
            });
            return Err(error);
        }
    };
    let response = ConnectResponse { baggage: pod.node.config.baggage.then(|| Baggage::of(&workload)) };
    let stream = incoming.accept(&response).map_err(|_| Error::Abandoned)?;
    attempt.succeeded();
    Ok((connected, stream))
}

/// Counts a dial as come to nothing unless its request was answered with 200.
struct DialAttempt<'a> {
    failed: &'a FailedDials,
    peer: &'a SpiffeId,
    target: IpAddr,
    dialed: bool,
}

impl DialAttempt<'_> {
    fn succeeded(mut self) {
        self.dialed = false;
    }
}

impl Drop for DialAttempt<'_> {
    fn drop(&mut self) {
        if self.dialed {
            self.failed.count(self.peer, self.target);
        }
    }
}

async fn route_request<'a>(pod: &PodProxy, tunnel: &Tunnel, incoming: &'a Incoming) -> Result<(Routed, &'a ConnectRequest), (Refusal, Error)> {
    let asked = incoming.request().map_err(|error| (Refusal::BadRequest, Error::from(error.clone())))?;
    let workload = pod.local_workload().await.map_err(|error| (Refusal::Unavailable, error))?;
    let world = pod.node.mesh.current();
    let validated = route::inbound::validate(&world.snapshot, &pod.node.config.route, &workload, &asked.authority, tunnel.local);
    let validated = validated.map_err(|error| (Refusal::BadRequest, error.into()))?;
    let target = validated.resolve().map_err(|error| (Refusal::Unavailable, error.into()))?;
    let identified: Identified = Accepted { source: tunnel.client, destination: tunnel.local }.identified(Some(tunnel.peer.clone()), workload);
    Ok((identified.routed(target), asked))
}

fn facts(pod: &PodProxy, tunnel: &Tunnel, routed: &Routed, asked: &ConnectRequest) -> ConnectionFacts {
    let world = pod.node.mesh.current();
    let config = &pod.node.config;
    // A request that says it comes from another network came through a gateway, whose address says nothing (reference, dataplane §4.7).
    let through_gateway = asked.forwarded_network.as_ref().is_some_and(|network| !network.eq_ignore_ascii_case(&config.route.network));
    let source = if through_gateway { None } else { world.snapshot.workload_by_address(&config.route.network, tunnel.client.ip()) };
    let known = source.is_some();
    let workload = &routed.identified.workload;
    let named = asked.forwarded.as_deref().and_then(|value| route::inbound::forwarded_host(value.as_bytes()));
    let hint = named.or(match &asked.authority {
        Authority::Host(host, _) => Some(host.as_str()),
        Authority::Address(_) => None,
    });
    ConnectionFacts {
        reporter: Reporter::Destination,
        source: PeerFacts {
            address: tunnel.client.into(),
            workload: source,
            identity: Some(tunnel.peer.clone()),
            // Nothing of it is used for a workload that we know.
            baggage: asked.baggage.clone().filter(|_| config.baggage && !known).map(Box::new),
        },
        destination: PeerFacts {
            address: routed.identified.accepted.destination.into(),
            workload: Some(workload.clone()),
            identity: workload.identity().ok(),
            baggage: None,
        },
        service: route::inbound::intended_service(&world.snapshot, workload, hint, routed.target.port()),
        hbone_target: Some(asked.authority.clone()),
        mutual_tls: true,
    }
}
