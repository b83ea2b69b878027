//! Inbound plaintext: connections from outside the mesh, caught on 15006 (reference, dataplane §4.5). They carry no identity.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::connections::{LiveConnection, Protocol};
use super::pod::PodProxy;
use super::route::{self, Entry};
use super::session::{Accepted, Client, Error, Routed, service_facts};
use crate::lifecycle::drain::DrainWatcher;
use crate::model::Workload;
use crate::sys::socket::{original_destination, reset_on_close};
use crate::telemetry::{ConnectionEnd, ConnectionFacts, OpenConnection, PeerFacts, Reporter};

/// Serves one captured connection from accept to close.
pub(super) async fn serve(pod: Arc<PodProxy>, socket: TcpStream, client: SocketAddr, mut drain: DrainWatcher) {
    let _open = pod.node.telemetry.socket_opened(Reporter::Destination);
    let decided = tokio::select! {
        biased;
        () = drain.forced() => Err((None, Error::Drained)),
        decided = decide(&pod, &socket) => decided,
    };
    let (target, workload) = match decided {
        Ok(decided) => decided,
        Err((target, error)) => {
            close(&socket);
            return pod.refuse(Reporter::Destination, client, target, &error);
        }
    };
    let world = pod.node.mesh.current();
    let facts = ConnectionFacts {
        reporter: Reporter::Destination,
        source: PeerFacts {
            address: client,
            workload: world.snapshot.workload_by_address(&pod.node.config.route.network, client.ip()),
            identity: None,
            baggage: None,
        },
        destination: PeerFacts { address: target, workload: Some(workload.clone()), identity: workload.identity().ok(), baggage: None },
        service: service_facts(route::inbound::intended_service(&world.snapshot, &workload, None, target.port())),
        hbone_target: None,
        mutual_tls: false,
    };
    let record = pod.node.telemetry.opened(facts);
    let live = LiveConnection { reporter: Reporter::Destination, source: client, original: None, actual: target, protocol: Protocol::Tcp };
    let _live = pod.connections.register(live);
    let routed = Accepted { source: client, destination: target }.identified(None, workload).routed(target);
    let end = Box::pin(carry(&pod, socket, routed, &record, &mut drain)).await;
    record.close(end);
}

async fn carry(pod: &PodProxy, socket: TcpStream, routed: Routed, record: &OpenConnection, drain: &mut DrainWatcher) -> ConnectionEnd {
    let connect = async { routed.permit(pod).await?.connect(&pod.sockets).await };
    let connected = tokio::select! {
        biased;
        () = drain.forced() => Err(Error::Drained),
        connected = connect => connected,
    };
    match connected {
        Ok(connected) => connected.relay(Client::Plain(socket), &record.meter(), drain).await,
        Err(error) => {
            close(&socket);
            error.end()
        }
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
