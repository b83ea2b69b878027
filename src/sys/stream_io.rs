//! Vectored reads and writes on tokio's sockets that know when the kernel has no more: a short transfer clears the readiness at once, which
//! saves the call that would only have said EAGAIN.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsFd;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Reads into `buffers` in order. `Ok(0)` is the end of the stream.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when nothing is there; wait for readiness then.
pub fn read_vectored(socket: &TcpStream, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let room: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    let mut short = None;
    let outcome = socket.try_io(Interest::READABLE, || {
        let read = nix::sys::uio::readv(socket.as_fd(), buffers)?;
        settle(read, room, &mut short)
    });
    short.map_or(outcome, Ok)
}

/// Reads into one buffer, see [`read_vectored`].
///
/// # Errors
/// Those of [`read_vectored`].
pub fn read(socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let room = buffer.len();
    let mut short = None;
    let outcome = socket.try_io(Interest::READABLE, || {
        let read = nix::unistd::read(socket.as_fd(), buffer)?;
        settle(read, room, &mut short)
    });
    short.map_or(outcome, Ok)
}

/// What follows on a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Perhaps nothing for a long time.
    Unknown,
    /// The end, at once: a shutdown or a close. The last segment waits for it and carries its FIN, one packet instead of two.
    End,
}

/// Writes `buffers` in order, as much as the kernel takes.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when it takes nothing; wait for readiness then.
pub fn write_vectored(socket: &TcpStream, buffers: &[IoSlice<'_>], next: Next) -> io::Result<usize> {
    let all: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    let flags = match next {
        Next::Unknown => libc::MSG_NOSIGNAL,
        Next::End => libc::MSG_NOSIGNAL | libc::MSG_MORE,
    };
    let mut short = None;
    let outcome = socket.try_io(Interest::WRITABLE, || {
        let written = SockRef::from(socket).send_vectored_with_flags(buffers, flags)?;
        settle(written, all, &mut short)
    });
    short.map_or(outcome, Ok)
}

/// Writes one buffer, see [`write_vectored`].
///
/// # Errors
/// Those of [`write_vectored`].
pub fn write(socket: &TcpStream, buffer: &[u8]) -> io::Result<usize> {
    let mut short = None;
    let outcome = socket.try_io(Interest::WRITABLE, || {
        // Without a signal: Rust ignores SIGPIPE, and a library should not depend on that.
        let written = SockRef::from(socket).send_with_flags(buffer, libc::MSG_NOSIGNAL)?;
        settle(written, buffer.len(), &mut short)
    });
    short.map_or(outcome, Ok)
}

/// Tells tokio "would block" after a short transfer; the caller gets the count all the same. An end of stream or an error that is pending
/// behind it stays visible, since tokio never clears the closed bits.
fn settle(moved: usize, asked: usize, short: &mut Option<usize>) -> io::Result<usize> {
    if moved > 0 && moved < asked {
        *short = Some(moved);
        return Err(io::ErrorKind::WouldBlock.into());
    }
    Ok(moved)
}
