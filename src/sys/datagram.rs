//! UDP sockets of the DNS proxy: those that listen in a pod, and those that ask on.
//!
//! Everything acts on the namespace of the calling thread; for a pod's sockets call inside [`NetNs::run`](super::netns::NetNs::run).

use std::io;
use std::net::{SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::socket::{named, set_freebind, set_mark};

/// Opens a UDP socket on an address, non-blocking; the address may come later, as those of loopback do in a pod that is being made. With `reuse_port` a second proxy may bind the same port during an upgrade.
///
/// # Errors
/// `AddrInUse` when another socket holds the port; `PermissionDenied` when the mark is not allowed. The error names the address or the option.
pub fn listen_udp(address: SocketAddr, mark: Option<u32>, reuse_port: bool) -> io::Result<UdpSocket> {
    let socket = open(address)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    set_mark(&socket, mark)?;
    set_freebind(&socket, address.is_ipv6())?;
    socket.bind(&address.into()).map_err(|error| named(&format!("bind {address} (UDP)"), &error))?;
    Ok(socket.into())
}

/// Opens a UDP socket that talks to `target` only, non-blocking: the kernel picks a random port, drops what others send, and reports that nobody
/// listens there.
///
/// # Errors
/// When the mark is not allowed, no route leads to the target, or no descriptors or ports are left.
pub fn dial_udp(target: SocketAddr, mark: Option<u32>) -> io::Result<UdpSocket> {
    let socket = open(target)?;
    set_mark(&socket, mark)?;
    socket.connect(&target.into())?;
    Ok(socket.into())
}

fn open(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))
}
