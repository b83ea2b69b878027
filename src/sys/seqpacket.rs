//! Unix `SOCK_SEQPACKET` sockets that carry file descriptors: one message per packet, order kept, descriptors beside the bytes.
//!
//! Received descriptors are owned from the first moment: whatever goes wrong afterwards, dropping the [`Packet`] closes them. They are
//! close-on-exec from birth, so that a process started meanwhile cannot inherit a pod's namespace.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most descriptors taken from one packet; more than that arrive as [`Packet::truncated`] and are closed.
pub const MAX_FDS: usize = 8;

/// Room for one `SCM_RIGHTS` message of [`MAX_FDS`] descriptors, aligned as the kernel's header wants it.
const CONTROL_WORDS: usize = 6;

/// One received packet.
#[derive(Debug)]
pub struct Packet {
    /// Bytes written into the caller's buffer.
    pub len: usize,
    /// The packet was longer than the buffer, or carried more descriptors than fit (or than this process may open).
    pub truncated: bool,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// A connected socket.
#[derive(Debug)]
pub struct SeqPacket {
    socket: AsyncFd<Socket>,
}

impl SeqPacket {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` when nobody listens; `WouldBlock` when the listener's backlog is full; outside a tokio runtime.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = unix_socket()?;
        socket.connect(&SockAddr::unix(path)?)?;
        Self::over(socket)
    }

    /// Two sockets connected to each other.
    ///
    /// # Errors
    /// Out of descriptors, or outside a tokio runtime.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (left, right) = Socket::pair(Domain::UNIX, Type::SEQPACKET.nonblocking().cloexec(), None)?;
        Ok((Self::over(left)?, Self::over(right)?))
    }

    fn over(socket: Socket) -> io::Result<Self> {
        Ok(Self { socket: register(socket)? })
    }

    /// Sends one packet with `fds` beside it. Cancel safe: the packet goes out whole or not at all.
    ///
    /// # Errors
    /// `BrokenPipe` when the peer is gone; `EMSGSIZE` above the socket's send buffer.
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let one_packet = |socket: &Socket| {
            let sent = sendmsg::<()>(socket.as_raw_fd(), &[io::IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
            debug_assert_eq!(sent, bytes.len(), "a packet socket sends all or nothing");
            Ok(())
        };
        self.socket.async_io(Interest::WRITABLE, one_packet).await
    }

    /// Waits for one packet; `None` when the peer has closed (an empty packet counts as that: no message of ours is empty).
    /// Cancel safe: a packet is either returned or still queued.
    ///
    /// # Errors
    /// `ConnectionReset` when the peer closed with packets of ours unread, and the other errors of `recvmsg(2)`.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Packet>> {
        let packet = self.socket.async_io(Interest::READABLE, |socket| receive_now(socket.as_fd(), buffer)).await?;
        Ok(if packet.len == 0 && !packet.truncated { None } else { Some(packet) })
    }
}

/// A socket that accepts [`SeqPacket`] connections. Dropping it stops listening; the file stays until the next [`bind`](Self::bind).
#[derive(Debug)]
pub struct SeqPacketListener {
    socket: AsyncFd<Socket>,
}

impl SeqPacketListener {
    /// Listens at `path`. A socket file left there by an earlier process is removed first (any other kind of file is not), and
    /// the new one can be opened by its owner only.
    ///
    /// # Errors
    /// Those of `bind(2)`, or when `path` is too long for a socket name (107 bytes).
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
            _ => {}
        }
        let socket = unix_socket()?;
        socket.bind(&SockAddr::unix(path)?)?;
        // Between bind and listen nobody can connect, so the mode is right before the first connection.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        socket.listen(16)?;
        Ok(Self { socket: register(socket)? })
    }

    /// Waits for the next connection. Cancel safe.
    ///
    /// # Errors
    /// Out of descriptors, mostly; the caller backs off and tries again.
    pub async fn accept(&self) -> io::Result<SeqPacket> {
        let (accepted, _) = self.socket.async_io(Interest::READABLE, Socket::accept).await?;
        accepted.set_nonblocking(true)?;
        SeqPacket::over(accepted)
    }
}

fn register(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: a `Socket` owns one open descriptor, answers with that same one from `as_raw_fd`, and closes it only when it is dropped,
    // which the `AsyncFd` that owns it does last.
    unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)
}

fn unix_socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking().cloexec(), None)
}

/// One non-blocking `recvmsg`. Written on libc because nix answers a truncated control message with an error and thereby leaks the
/// descriptors that did arrive (which happens at the descriptor limit, when a leak hurts most).
fn receive_now(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Packet> {
    let mut control = [0_u64; CONTROL_WORDS];
    let mut bytes = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is a plain C structure for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut bytes;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: every pointer in `message` is to a live local or to the caller's buffer, with its true length, for the whole call.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let truncated = message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    // SAFETY: recvmsg has just filled `message` and `control`, and neither is touched again before this returns.
    Ok(Packet { len, truncated, fds: unsafe { take_fds(&message) } })
}

/// # Safety
/// `message` was filled by a successful `recvmsg`, its control buffer is alive, and nobody has taken its descriptors yet.
unsafe fn take_fds(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: CMSG_* walk the control buffer within the length the kernel stored in `message` (caller's promise).
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let payload = ((*header).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                let first = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..payload / size_of::<RawFd>() {
                    // The kernel made this descriptor for us a moment ago, so it has no other owner.
                    fds.push(OwnedFd::from_raw_fd(first.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    fds
}

#[cfg(test)]
mod tests;
