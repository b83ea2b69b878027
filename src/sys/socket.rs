//! TCP sockets with the options of a transparent proxy: marks, shared ports, foreign source addresses, keepalive, original destinations.
//!
//! Everything acts on the namespace of the calling thread; for a pod's sockets call inside [`NetNs::run`](super::netns::NetNs::run).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

/// The bit of `SO_MARK` by which rules tell the connections of a borrowed source address from those of its owner.
pub const BORROWED_MARK_BIT: u32 = 0x1000;

/// TCP keepalive of one socket (reference, dataplane §1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe; whole seconds.
    pub idle: Duration,
    /// Time between probes; whole seconds.
    pub interval: Duration,
    /// Probes without an answer until the connection is given up.
    pub retries: u32,
}

impl Default for Keepalive {
    /// 180 s, 180 s, 9 probes: the reference's defaults.
    fn default() -> Self {
        Self { idle: Duration::from_secs(180), interval: Duration::from_secs(180), retries: 9 }
    }
}

impl Keepalive {
    /// The user timeout that goes with these probes: idle + retries × interval (reference, dataplane §1.3).
    #[must_use]
    pub fn user_timeout(&self) -> Duration {
        self.idle.saturating_add(self.interval.saturating_mul(self.retries))
    }
}

/// Whether a listener may later stand for addresses that are not its own (reference, dataplane §1.6, `ENABLE_ORIG_SRC`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transparency {
    /// Try, and remember whether it worked.
    #[default]
    Try,
    /// Fail if it does not work.
    Must,
    /// Do not ask for it.
    Never,
}

/// Options of a listening socket. Accepted sockets inherit mark, no-delay, keepalive and user timeout from it.
#[derive(Debug, Clone)]
pub struct ListenOptions {
    /// `SO_MARK`; needs `CAP_NET_ADMIN` or `CAP_NET_RAW`. `None` leaves sockets unmarked.
    pub mark: Option<u32>,
    /// `SO_REUSEPORT`: a second proxy may bind the same port during an upgrade.
    pub reuse_port: bool,
    /// `IP_TRANSPARENT` / `IPV6_TRANSPARENT`.
    pub transparent: Transparency,
    /// `IP_FREEBIND` / `IPV6_FREEBIND`: the address may come later, as those of loopback do in a pod that is being made.
    pub freebind: bool,
    /// Keepalive of accepted sockets; `None` switches it off.
    pub keepalive: Option<Keepalive>,
    /// `TCP_USER_TIMEOUT` of accepted sockets; `None` leaves the kernel's.
    pub user_timeout: Option<Duration>,
    /// Connections that may wait to be accepted; the kernel cuts it to `net.core.somaxconn`.
    pub backlog: u16,
}

impl Default for ListenOptions {
    /// No mark, no shared port, transparency tried, the usual keepalive, backlog 1024. (The reference uses 128, which a burst of
    /// short connections overflows while the process is busy.)
    fn default() -> Self {
        Self {
            mark: None,
            reuse_port: false,
            transparent: Transparency::Try,
            freebind: false,
            keepalive: Some(Keepalive::default()),
            user_timeout: None,
            backlog: 1024,
        }
    }
}

/// A listening socket, non-blocking, and whether it got transparency.
#[derive(Debug)]
pub struct Listener {
    /// Ready for `tokio::net::TcpListener::from_std`.
    pub socket: TcpListener,
    /// Whether dialled sockets of the same pod can take a foreign source address.
    pub transparent: bool,
}

/// The wildcard address for a listener: `[::]`, which also takes IPv4 peers (as mapped addresses), or `0.0.0.0`.
#[must_use]
pub fn wildcard(port: u16, ipv6: bool) -> SocketAddr {
    if ipv6 { SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)) } else { SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)) }
}

/// Whether a socket could not be made because this kernel has no such address family (IPv6 switched off at boot).
#[must_use]
pub fn is_unknown_family(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Opens a listening TCP socket in the calling thread's namespace.
///
/// # Errors
/// `AddrInUse` when another socket holds the port; `PermissionDenied` when the mark or [`Transparency::Must`] is not allowed.
/// The error names the address or the option.
pub fn listen_tcp(address: SocketAddr, options: &ListenOptions) -> io::Result<Listener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // Both families through one socket, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    set_mark(&socket, options.mark)?;
    let transparent = match options.transparent {
        Transparency::Never => false,
        Transparency::Try => set_transparent(&socket, address.is_ipv6()).is_ok(),
        Transparency::Must => {
            set_transparent(&socket, address.is_ipv6()).map_err(|error| named("IP_TRANSPARENT (needs CAP_NET_ADMIN)", &error))?;
            true
        }
    };
    if options.freebind {
        set_freebind(&socket, address.is_ipv6())?;
    }
    tune(&socket, options.keepalive, options.user_timeout)?;
    socket.bind(&address.into()).map_err(|error| named(&format!("bind {address}"), &error))?;
    socket.listen(i32::from(options.backlog)).map_err(|error| named(&format!("listen on {address}"), &error))?;
    Ok(Listener { socket: socket.into(), transparent })
}

/// Options of a socket that is about to connect.
#[derive(Debug, Clone, Copy, Default)]
pub struct DialOptions {
    /// `SO_MARK`; without the mark, a pod's rules would redirect the connection back to the proxy.
    pub mark: Option<u32>,
    /// The same for sockets that borrow a source address, so that rules can tell their connections from those of its owner.
    pub borrowed_mark: Option<u32>,
    /// TCP keepalive; `None` switches it off.
    pub keepalive: Option<Keepalive>,
    /// `TCP_USER_TIMEOUT`; `None` leaves the kernel's.
    pub user_timeout: Option<Duration>,
}

/// Makes a non-blocking, not yet connected socket for `target`, and says whether it will appear to come from `source`'s IP.
///
/// Rules (reference, dataplane §1.6): no `source`, or the same IP as the target: an ordinary socket. Otherwise the socket is
/// made transparent and bound to `source`'s IP with a port the kernel picks at connect time. If that is refused, the answer is
/// an ordinary socket and `false`: availability before the address; the caller counts it.
///
/// # Errors
/// When a socket cannot be made or marked at all.
pub fn dial_socket(target: SocketAddr, source: Option<SocketAddr>, options: &DialOptions) -> io::Result<(Socket, bool)> {
    let target_ip = target.ip().to_canonical();
    if let Some(source_ip) = source.map(|source| source.ip().to_canonical())
        && source_ip != target_ip
        && source_ip.is_ipv4() == target_ip.is_ipv4()
    {
        let socket = plain_socket(target_ip, &DialOptions { mark: options.borrowed_mark, ..*options })?;
        if bind_foreign(&socket, source_ip).is_ok() {
            return Ok((socket, true));
        }
    }
    Ok((plain_socket(target_ip, options)?, false))
}

/// Two ends of a connection within this process, non-blocking: what is written to one is read from the other, and the end of one is the end of the
/// other. They do what connected TCP sockets do but for having addresses; a reset is an end to the other side.
///
/// # Errors
/// When no descriptors are left.
pub fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let (one, other) = Socket::pair(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    Ok((one.into(), other.into()))
}

fn plain_socket(target: IpAddr, options: &DialOptions) -> io::Result<Socket> {
    let domain = if target.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    set_mark(&socket, options.mark)?;
    tune(&socket, options.keepalive, options.user_timeout)?;
    Ok(socket)
}

fn bind_foreign(socket: &Socket, source: IpAddr) -> io::Result<()> {
    // A transparent socket may bind to any address; IP_FREEBIND, which the reference sets too, adds nothing (ip(7), IP_TRANSPARENT).
    set_transparent(socket, source.is_ipv6())?;
    // Without this, bind would reserve a local port for the whole (source IP, *) pair and run out of them after 28,000 connections.
    setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))
}

pub(super) fn set_mark(socket: &Socket, mark: Option<u32>) -> io::Result<()> {
    mark.map_or(Ok(()), |mark| socket.set_mark(mark).map_err(|error| named("SO_MARK (needs CAP_NET_ADMIN)", &error)))
}

fn set_transparent(socket: &Socket, ipv6: bool) -> io::Result<()> {
    if ipv6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

pub(super) fn set_freebind(socket: &Socket, ipv6: bool) -> io::Result<()> {
    if ipv6 { socket.set_freebind_v6(true) } else { socket.set_freebind_v4(true) }
}

fn tune(socket: &Socket, keepalive: Option<Keepalive>, user_timeout: Option<Duration>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    if let Some(keepalive) = keepalive {
        let probes = TcpKeepalive::new().with_time(keepalive.idle).with_interval(keepalive.interval).with_retries(keepalive.retries);
        socket.set_tcp_keepalive(&probes)?;
    }
    if user_timeout.is_some() {
        socket.set_tcp_user_timeout(user_timeout)?;
    }
    Ok(())
}

pub(super) fn named(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Where the client of an accepted, redirected connection wanted to go, canonical (reference, dataplane §1.5): the IPv4 answer of
/// connection tracking, else the IPv6 one, else the socket's own local address, which is right for connections that were not
/// redirected and for TPROXY.
///
/// # Errors
/// When even the local address cannot be read.
pub fn original_destination(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let socket = SockRef::from(socket);
    let asked = socket.original_dst_v4().or_else(|_| socket.original_dst_v6()).or_else(|_| socket.local_addr())?;
    let address = asked.as_socket().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the original destination is not an IP address"))?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// Makes the coming `close` send RST instead of FIN: the peer learns that the connection failed rather than ended.
///
/// # Errors
/// Those of `setsockopt(2)`.
pub fn reset_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// From how many bytes on a socket counts as readable (`SO_RCVLOWAT`); 1 is the kernel's own. Its end, and an error, count always. What is there
/// already counts at once when the threshold sinks.
///
/// # Errors
/// Those of `setsockopt(2)`.
#[allow(unsafe_code, clippy::cast_possible_truncation, reason = "the size of an integer")]
pub fn set_read_threshold(socket: &impl AsFd, bytes: u16) -> io::Result<()> {
    let (socket, value) = (socket.as_fd().as_raw_fd(), libc::c_int::from(bytes));
    // SAFETY: the descriptor is open as long as it is borrowed; the value lives through the call, and its size is what is said.
    let code =
        unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const value).cast(), size_of_val(&value) as libc::socklen_t) };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Checks at start-up that this process may set `SO_MARK`.
///
/// # Errors
/// One sentence that names the missing capability.
pub fn check_may_mark(mark: u32) -> io::Result<()> {
    set_mark(&Socket::new(Domain::IPV4, Type::STREAM, None)?, Some(mark))
}

#[cfg(test)]
mod tests;
