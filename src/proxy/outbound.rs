//! Outbound: connections that a pod opens, caught on 15001 or asked for over SOCKS (reference, dataplane §3.3). No policy is asked here: the
//! destination's side decides.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::net::TcpStream;

use super::connections::{Asked, LiveConnection, Protocol};
use super::demand;
use super::live::{Connection, Live, Opened, Transfer};
use super::pod::PodProxy;
use super::route::{self, Entry, Route, RouteError};
use super::session::Error;
use super::socks;
use crate::hbone::{ConnectRequest, Inner, PoolKey, Role, TunnelStream};
use crate::identity::Credential;
use crate::lifecycle::drain::DrainWatcher;
use crate::model::{Authority, Baggage, Service, SpiffeId, Text, Workload, canonical_socket};
use crate::sys::socket::{original_destination, reset_on_close};
use crate::telemetry::{ConnectionFacts, PeerFacts, Reporter, SocketGuard};

/// Serves one captured connection from accept to close.
pub(super) fn serve(pod: Arc<PodProxy>, socket: TcpStream, client: SocketAddr, drain: DrainWatcher) -> Connection {
    Connection::new(begin(pod, socket, client, drain))
}

/// Establishes a connection, or records why it cannot be.
async fn begin(pod: Arc<PodProxy>, socket: TcpStream, client: SocketAddr, drain: DrainWatcher) -> Option<Live> {
    let socket_open = pod.node.telemetry.socket_opened(Reporter::Source);
    match original_destination(&socket) {
        Ok(target) => carry(pod, Caller::Captured { socket, client, target }, socket_open, drain).await,
        Err(error) => {
            fail(&socket);
            pod.refuse(Reporter::Source, client, None, &Error::OriginalDestination(error));
            None
        }
    }
}

/// A connection of a pod's application, and how it came to us.
pub(super) enum Caller {
    /// The pod's rules brought it; the application knows nothing of us.
    Captured { socket: TcpStream, client: SocketAddr, target: SocketAddr },
    /// The application asked for it over SOCKS, and waits for a reply.
    Socks { socket: TcpStream, client: SocketAddr, target: SocketAddr },
}

impl Caller {
    fn ends(&self) -> (SocketAddr, SocketAddr) {
        match self {
            Self::Captured { client, target, .. } | Self::Socks { client, target, .. } => (*client, *target),
        }
    }

    /// The socket, with the application told that its bytes may flow.
    async fn accept(self) -> Result<TcpStream, Error> {
        match self {
            Self::Captured { socket, .. } => Ok(socket),
            Self::Socks { mut socket, .. } => socks::succeed(&mut socket).await.map(|()| socket).map_err(Error::Relay),
        }
    }

    /// Tells the application that there is no way to its destination.
    async fn refuse(self, error: &Error) {
        match self {
            Self::Captured { socket, .. } => fail(&socket),
            Self::Socks { socket, .. } => socks::refuse(socket, error).await,
        }
    }
}

/// Establishes a connection to where the caller wants to go, or records why it cannot be.
pub(super) async fn carry(pod: Arc<PodProxy>, caller: Caller, socket_open: SocketGuard, mut drain: DrainWatcher) -> Option<Live> {
    let (client, target) = caller.ends();
    let decided = tokio::select! {
        biased;
        () = drain.forced() => Err(Error::Drained),
        decided = decide(&pod, target) => decided,
    };
    let (source, route) = match decided {
        Ok(decided) => decided,
        Err(error) => {
            caller.refuse(&error).await;
            pod.refuse(Reporter::Source, client, Some(target), &error);
            return None;
        }
    };
    let mut record = pod.node.telemetry.opened(facts(&source, client, &route));
    let listed = pod.connections.register(LiveConnection {
        reporter: Reporter::Source,
        source: client,
        original: Some(Asked::Address(target)),
        actual: next_hop(&route),
        protocol: match route {
            Route::Hbone { .. } => Protocol::Hbone,
            Route::Beyond { .. } => Protocol::DoubleHbone,
            _ => Protocol::Tcp,
        },
    });
    let journey = Journey { client, source, route };
    let established = tokio::select! {
        biased;
        () = drain.forced() => Err(Error::Drained),
        established = establish(&pod, &journey) => established,
    };
    if let Ok(Upstream::Tunnel(_, Some(beyond))) = &established {
        // Only now is it known who answers behind the gateway (reference, dataplane §2.8).
        record.amend(|facts| facts.destination = PeerFacts { address: facts.destination.address, ..beyond.clone() });
    }
    let opened = Opened { record, drain, pod, listed, _socket: Some(socket_open) };
    let accepted = match established {
        Ok(upstream) => caller.accept().await.map(|socket| (socket, upstream)),
        Err(error) => {
            caller.refuse(&error).await;
            Err(error)
        }
    };
    match accepted {
        Ok((socket, upstream)) => {
            let meter = opened.record.meter();
            let transfer = match upstream {
                Upstream::Plain(upstream) => Transfer::plain(socket, upstream, meter),
                Upstream::Tunnel(stream, _) => Transfer::Tunnel(stream.relay(socket, Role::Client, &meter)),
            };
            Some(Live::new(opened, transfer, None))
        }
        Err(error) => {
            opened.fail(&error);
            None
        }
    }
}

/// The address that is dialled.
fn next_hop(route: &Route) -> SocketAddr {
    match route {
        Route::Passthrough { destination, .. } => *destination,
        Route::Tcp { address, .. } => *address,
        Route::Hbone { next_hop, .. } | Route::Beyond { next_hop, .. } => *next_hop,
    }
}

/// The service that the client meant.
fn service(route: &Route) -> Option<&Arc<Service>> {
    match route {
        Route::Passthrough { service, .. } | Route::Tcp { service, .. } | Route::Hbone { service, .. } => service.as_ref(),
        Route::Beyond { service, .. } => Some(service),
    }
}

struct Journey {
    client: SocketAddr,
    source: Arc<Workload>,
    route: Route,
}

async fn decide(pod: &PodProxy, target: SocketAddr) -> Result<(Arc<Workload>, Route), Error> {
    // Before the wait for the workload: a loop must end at once.
    let config = &pod.node.config.route;
    route::refuse_recursion(Entry::Outbound, target, config)?;
    // The mesh may not know all addresses of the pod, or none yet. Taken for somebody else's, one would lead back here, and so on without end.
    if route::is_own_port(target.port(), config) && pod.sockets.are_at(target.ip()) {
        return Err(RouteError::RecursiveCall(target).into());
    }
    let source = pod.local_workload().await?;
    demand::prepare(&pod.node.mesh, &pod.node.config.route, (&pod.name, &source), target).await?;
    let world = pod.node.mesh.current();
    let mut config = Cow::Borrowed(&pod.node.config.route);
    // Asked again with a name resolved, it makes the same choices.
    let random = SmallRng::from_rng(&mut rand::rng());
    loop {
        match route::outbound(&world.snapshot, &config, &source, target, &mut random.clone()) {
            Err(RouteError::NeedsDns { hostname, .. }) => {
                pod.node.telemetry.name_used(&source, &hostname);
                let resolved = pod.node.host_names.resolve(&hostname, target.ip()).await;
                let ip = resolved.map_err(|reason| Error::Unresolved { name: hostname.to_string(), reason })?;
                config.to_mut().resolved.push((hostname, ip));
            }
            decided => return Ok((source, decided?)),
        }
    }
}

/// The way to the destination, established.
enum Upstream {
    Plain(TcpStream),
    /// With what is known of the other end since it has answered, if that is more than before.
    Tunnel(TunnelStream, Option<PeerFacts>),
}

/// The application's connection was accepted before its destination was known: it must not take a failure for an empty answer.
fn fail(socket: &TcpStream) {
    // A socket that refuses the option is closed all the same.
    let _ = reset_on_close(socket);
}

async fn establish(pod: &PodProxy, journey: &Journey) -> Result<Upstream, Error> {
    match &journey.route {
        Route::Passthrough { .. } | Route::Tcp { .. } => {
            pod.sockets.connect(next_hop(&journey.route)).await.map(Upstream::Plain).map_err(Error::Connect)
        }
        Route::Hbone { workload, authority, expected, waypoint, .. } => {
            let (key, credential, request) = prepare(pod, journey, (workload, expected, authority)).await?;
            let request = ConnectRequest { reset_is_end: *waypoint, ..request };
            let (stream, _answer, _peer) = pod.pool.open(&key, &credential, &request).await?;
            Ok(Upstream::Tunnel(stream, None))
        }
        Route::Beyond { gateway, authority, gateway_expected, expected, next_hop, waypoint, .. } => {
            let (key, credential, outer) = prepare(pod, journey, (gateway, gateway_expected, authority)).await?;
            let network = pod.node.config.route.network.to_string();
            let request = ConnectRequest { forwarded_network: Some(network), reset_is_end: *waypoint, ..outer.clone() };
            let (stream, answer, peer) = pod.pool.open_within(&key, &credential, &outer, Inner { expected, request: &request }).await?;
            let baggage = answer.baggage.filter(|_| pod.node.config.baggage).map(Box::new);
            Ok(Upstream::Tunnel(stream, Some(PeerFacts { address: (*next_hop).into(), workload: None, identity: Some(peer), baggage })))
        }
    }
}

/// What a tunnel to a workload is opened with.
async fn prepare(
    pod: &PodProxy,
    journey: &Journey,
    (workload, expected, authority): (&Workload, &[SpiffeId], &Authority),
) -> Result<(PoolKey, Arc<Credential>, ConnectRequest), Error> {
    let identity = journey.source.identity()?;
    let credential = pod.credential(&identity).await?;
    let key = PoolKey {
        source: identity,
        source_ip: journey.client.ip(),
        expected: expected.to_vec(),
        next_hop: next_hop(&journey.route),
        destination: workload.uid.clone(),
        generation: credential.generation,
    };
    let request = ConnectRequest {
        authority: authority.clone(),
        baggage: Some(Baggage::of(&journey.source)),
        forwarded: Some(forwarded(journey.client, service(&journey.route).map(|service| &service.hostname))),
        traceparent: Some(traceparent(&mut rand::rng())),
        forwarded_network: None,
        reset_is_end: false,
    };
    Ok((key, credential, request))
}

fn facts(source: &Arc<Workload>, client: SocketAddr, route: &Route) -> ConnectionFacts {
    let (destination, hbone_target, mutual_tls) = match route {
        Route::Passthrough { .. } => (None, None, false),
        Route::Tcp { workload, .. } => (Some(workload.clone()), None, false),
        Route::Hbone { workload, authority, .. } => (Some(workload.clone()), Some(authority.clone()), true),
        Route::Beyond { gateway, authority, .. } => (Some(gateway.clone()), Some(authority.clone()), true),
    };
    let identity = |workload: &Workload| -> Option<SpiffeId> { workload.identity().ok() };
    let destination_identity = destination.as_deref().and_then(identity);
    ConnectionFacts {
        reporter: Reporter::Source,
        source: PeerFacts {
            address: client.into(),
            workload: Some(source.clone()),
            identity: identity(source).filter(|_| mutual_tls),
            baggage: None,
        },
        destination: PeerFacts { address: next_hop(route).into(), workload: destination, identity: destination_identity, baggage: None },
        service: service(route).cloned(),
        hbone_target,
        mutual_tls,
    }
}

/// `for="<client>"` with `;host=<service>` when the service is known (reference, dataplane §2.3).
fn forwarded(client: SocketAddr, host: Option<&Text>) -> String {
    let client = canonical_socket(client);
    match host {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    }
}

/// A fresh W3C trace context, not sampled.
fn traceparent(random: &mut impl rand::Rng) -> String {
    format!("00-{:032x}-{:016x}-00", random.next_u64() as u128 | (u128::from(random.next_u64()) << 64), random.next_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_names_the_client_and_the_service() {
        let v4: SocketAddr = ([10, 0, 0, 1], 80).into();
        let v6: SocketAddr = (std::net::Ipv6Addr::LOCALHOST, 80).into();
        assert_eq!(forwarded(v4, None), "for=\"10.0.0.1:80\"");
        assert_eq!(forwarded(v6, Some(&"web.default.svc.cluster.local".into())), "for=\"[::1]:80\";host=web.default.svc.cluster.local");
    }

    #[test]
    fn traceparent_is_55_characters_of_w3c_form() {
        let value = traceparent(&mut rand::rng());
        assert_eq!(value.len(), 55);
        assert!(value.starts_with("00-") && value.ends_with("-00"));
    }
}
