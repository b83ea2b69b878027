//! SOCKS5 (port 15080 of each pod's loopback, off by default; reference, dataplane §2.11): a pod's application names its destination itself instead of
//! having its connection captured; from there on it is an outbound connection like any other. Host names mean what the pod's DNS says they do.
//!
//! The reference reports success before it dials. Here a client is told when the way to its destination stands, or why it does not.

mod handshake;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use handshake::HandshakeError;
use handshake::{Destination, Reply};

use super::dns::{self, Dns};
use super::live::{Connection, Live};
use super::outbound::{self, Caller};
use super::pod::PodProxy;
use super::route::RouteError;
use super::session::Error;
use crate::hbone;
use crate::lifecycle::PermitRefused;
use crate::lifecycle::drain::DrainWatcher;
use crate::sys::socket::reset_on_close;
use crate::telemetry::Reporter;

/// How long a handshake may take, as long as that of a tunnel.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a client may take to take a reply, and to close after a refusal.
const FAREWELL: Duration = Duration::from_secs(1);
/// Handshakes that the processes of one pod may have under way; further connections are reset.
const MOST_HANDSHAKES: usize = 64;

impl PodProxy {
    /// Serves 15080 until a drain begins. Without `dns` only addresses are taken.
    pub fn serve_socks(self: &Arc<Self>, listener: TcpListener, dns: Option<&Arc<Dns>>, drain: DrainWatcher) {
        let (pod, dns, handshakes) = (self.clone(), dns.cloned(), Arc::new(Semaphore::new(MOST_HANDSHAKES)));
        self.serve(listener, drain, move |socket, client, drain| {
            let Ok(permit) = handshakes.clone().try_acquire_owned() else {
                // A socket that refuses the option is closed all the same.
                let _ = reset_on_close(&socket);
                let refused = PermitRefused::PerKey(MOST_HANDSHAKES);
                return pod.refuse(Reporter::Source, client, None, &Error::Limit("SOCKS handshakes under way", refused));
            };
            tokio::spawn(Connection::new(begin((pod.clone(), dns.clone()), (socket, client), permit, drain)));
        });
    }
}

/// Takes the client's wish and goes on as with a captured connection, or records why not.
async fn begin(
    (pod, dns): (Arc<PodProxy>, Option<Arc<Dns>>),
    (mut socket, client): (TcpStream, SocketAddr),
    permit: OwnedSemaphorePermit,
    mut drain: DrainWatcher,
) -> Option<Live> {
    let socket_open = pod.node.telemetry.socket_opened(Reporter::Source);
    let asked = tokio::select! {
        biased;
        () = drain.forced() => Err(Error::Drained),
        asked = ask(&pod, dns.as_ref(), &mut socket) => asked,
    };
    drop(permit);
    match asked {
        Ok(target) => outbound::carry(pod, Caller::Socks { socket, client, target }, socket_open, drain).await,
        Err(error) => {
            refuse(socket, &error).await;
            pod.refuse(Reporter::Source, client, None, &error);
            None
        }
    }
}

/// The address that the client wants to reach.
async fn ask(pod: &Arc<PodProxy>, dns: Option<&Arc<Dns>>, socket: &mut TcpStream) -> Result<SocketAddr, Error> {
    match handshake::handshake(socket, PATIENCE).await? {
        Destination::Address(address) => Ok(address),
        Destination::Name(name, port) => Ok(SocketAddr::new(resolve(pod, dns, name).await?, port)),
    }
}

async fn resolve(pod: &Arc<PodProxy>, dns: Option<&Arc<Dns>>, name: String) -> Result<IpAddr, Error> {
    let found = match dns {
        Some(dns) => dns::resolve(pod, dns, &name).await,
        None => Err("DNS capture is off, so names mean nothing here".to_owned()),
    };
    found.map_err(|reason| Error::Unresolved { name, reason })
}

/// Tells the client that the way to its destination stands.
pub(super) async fn succeed(socket: &mut TcpStream) -> io::Result<()> {
    send(socket, Reply::Succeeded).await
}

/// Tells the client why there is no way to its destination.
pub(super) async fn refuse(mut socket: TcpStream, error: &Error) {
    let Some(reply) = reply(error) else { return };
    // A client that is gone needs no answer, and one that takes none gets none.
    if send(&mut socket, reply).await.is_ok() && socket.shutdown().await.is_ok() {
        // What a hasty client has sent already would make a reset of the end, which may overtake the reply.
        tokio::spawn(tokio::time::timeout(FAREWELL, take_the_rest(socket)));
    }
}

async fn take_the_rest(mut socket: TcpStream) {
    let mut buffer = [0; 512];
    while matches!(socket.read(&mut buffer).await, Ok(count) if count > 0) {}
}

/// A reply is ten bytes into an empty buffer; nobody is waited for.
async fn send(socket: &mut TcpStream, reply: Reply) -> io::Result<()> {
    tokio::time::timeout(FAREWELL, socket.write_all(&reply.message())).await?
}

fn reply(error: &Error) -> Option<Reply> {
    Some(match error {
        Error::Socks(error) => return error.reply(),
        Error::Route(RouteError::RecursiveCall(_)) | Error::Rejected(_) | Error::Cut(_) => Reply::NotAllowed,
        Error::Route(_) | Error::Unanswered(_) | Error::Unresolved { .. } => Reply::HostUnreachable,
        Error::Connect(error) => io_reply(error),
        Error::Tunnel(error) => tunnel_reply(error),
        _ => Reply::GeneralFailure,
    })
}

fn tunnel_reply(error: &hbone::Error) -> Reply {
    match error {
        hbone::Error::Connect(error) => io_reply(error),
        hbone::Error::ConnectTimeout(_) => Reply::HostUnreachable,
        // The other side's policy said no, or its application did not take the connection.
        hbone::Error::Status(401 | 403) => Reply::NotAllowed,
        hbone::Error::Status(503) => Reply::Refused,
        hbone::Error::Within { error, .. } => tunnel_reply(error),
        _ => Reply::GeneralFailure,
    }
}

fn io_reply(error: &io::Error) -> Reply {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Reply::Refused,
        io::ErrorKind::NetworkUnreachable => Reply::NetworkUnreachable,
        io::ErrorKind::HostUnreachable | io::ErrorKind::TimedOut => Reply::HostUnreachable,
        _ => Reply::GeneralFailure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_client_is_told_what_kind_of_failure_it_was() {
        let address: SocketAddr = ([10, 0, 0, 1], 80).into();
        let io = |kind: io::ErrorKind| io::Error::from(kind);
        let tunnel = |error: hbone::Error| Error::Tunnel(Arc::new(error));
        let within = |error: hbone::Error| tunnel(hbone::Error::Within { gateway: address, error: Box::new(error) });
        for (error, expected) in [
            (Error::Route(RouteError::RecursiveCall(address)), Reply::NotAllowed),
            (Error::Route(RouteError::NoHealthyUpstream(address)), Reply::HostUnreachable),
            (Error::Unresolved { name: "nobody".into(), reason: "no such name".into() }, Reply::HostUnreachable),
            (Error::Connect(io(io::ErrorKind::ConnectionRefused)), Reply::Refused),
            (Error::Connect(io(io::ErrorKind::NetworkUnreachable)), Reply::NetworkUnreachable),
            (Error::Connect(io(io::ErrorKind::HostUnreachable)), Reply::HostUnreachable),
            (Error::Connect(io(io::ErrorKind::TimedOut)), Reply::HostUnreachable),
            (Error::Connect(io(io::ErrorKind::OutOfMemory)), Reply::GeneralFailure),
            (tunnel(hbone::Error::Status(401)), Reply::NotAllowed),
            (within(hbone::Error::Status(401)), Reply::NotAllowed),
            (tunnel(hbone::Error::Status(503)), Reply::Refused),
            (tunnel(hbone::Error::Status(400)), Reply::GeneralFailure),
            (tunnel(hbone::Error::Connect(io(io::ErrorKind::ConnectionRefused))), Reply::Refused),
            (tunnel(hbone::Error::ConnectTimeout(address)), Reply::HostUnreachable),
            (tunnel(hbone::Error::Tls("no".into())), Reply::GeneralFailure),
            (Error::LocalWorkloadUnknown("pod".into()), Reply::GeneralFailure),
            (Error::Drained, Reply::GeneralFailure),
            (Error::Socks(HandshakeError::Command(2)), Reply::CommandUnsupported),
        ] {
            assert_eq!(reply(&error), Some(expected), "{error}");
        }
        assert_eq!(reply(&Error::Socks(HandshakeError::Version(4))), None, "whoever speaks something else is told nothing");
    }
}
