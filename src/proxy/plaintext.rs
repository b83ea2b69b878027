//! Inbound plaintext: connections from outside the mesh, caught on 15006 (reference, dataplane §4.5). They carry no identity.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::connections::{LiveConnection, Protocol};
use super::live::{Connection, Live, Opened};
use super::pod::PodProxy;
use super::route::inbound::Target;
use super::route::{self, Entry};
use super::session::{Accepted, Client, Error};
use crate::lifecycle::drain::DrainWatcher;
use crate::model::Workload;
use crate::sys::socket::{original_destination, reset_on_close};
use crate::telemetry::{ConnectionFacts, PeerFacts, Reporter};

/// Serves one captured connection from accept to close.
pub(super) fn serve(pod: Arc<PodProxy>, socket: TcpStream, client: SocketAddr, drain: DrainWatcher) -> Connection {
    Connection::new(begin(pod, socket, client, drain))
}

/// Establishes a connection, or records why it cannot be.
async fn begin(pod: Arc<PodProxy>, socket: TcpStream, client: SocketAddr, mut drain: DrainWatcher) -> Option<Live> {
    let socket_open = pod.node.telemetry.socket_opened(Reporter::Destination);
    let decided = tokio::select! {
        biased;
        () = drain.forced() => Err((None, Error::Drained)),
        decided = decide(&pod, &socket) => decided,
    };
    let (target, workload) = match decided {
        Ok(decided) => decided,
        Err((target, error)) => {
            close(&socket);
            pod.refuse(Reporter::Destination, client, target, &error);
            return None;
        }
    };
    let record = pod.node.telemetry.opened(facts(&pod, client, target, &workload));
    let live = LiveConnection { reporter: Reporter::Destination, source: client, original: None, actual: target, protocol: Protocol::Tcp };
    let listed = pod.connections.register(live);
    let routed = Accepted { source: client, destination: target }.identified(None, workload).routed(Target { address: target, announce: None });
    let connect = async { routed.permit(&pod).await?.connect(&pod).await };
    let connected = tokio::select! {
        biased;
        () = drain.forced() => Err(Error::Drained),
        connected = connect => connected,
    };
    let opened = Opened { record, drain, pod, listed, _socket: Some(socket_open) };
    match connected {
        Ok(connected) => Some(connected.flow(opened, Client::Plain(socket))),
        Err(error) => {
            close(&socket);
            opened.fail(&error);
            None
        }
    }
}

fn facts(pod: &PodProxy, client: SocketAddr, target: SocketAddr, workload: &Arc<Workload>) -> ConnectionFacts {
    let world = pod.node.mesh.current();
    ConnectionFacts {
        reporter: Reporter::Destination,
        source: PeerFacts {
            address: client.into(),
            workload: world.snapshot.workload_by_address(&pod.node.config.route.network, client.ip()),
            identity: None,
            baggage: None,
        },
        destination: PeerFacts { address: target.into(), workload: Some(workload.clone()), identity: workload.identity().ok(), baggage: None },
        service: route::inbound::intended_service(&world.snapshot, workload, None, target.port()),
        hbone_target: None,
        mutual_tls: false,
    }
}

/// Where the client wants to go, and the pod that it wants.
async fn decide(pod: &PodProxy, socket: &TcpStream) -> Result<(SocketAddr, Arc<Workload>), (Option<SocketAddr>, Error)> {
    let target = original_destination(socket).map_err(|error| (None, Error::OriginalDestination(error)))?;
    // Before the wait for the workload: a loop must end at once.
    route::refuse_recursion(Entry::Plaintext, target, &pod.node.config.route).map_err(|error| (Some(target), error.into()))?;
    let workload = pod.local_workload().await.map_err(|error| (Some(target), error))?;
    Ok((target, workload))
}

/// The client must not take a refusal for an empty answer.
fn close(socket: &TcpStream) {
    // A socket that refuses the option is closed all the same.
    let _ = reset_on_close(socket);
}
