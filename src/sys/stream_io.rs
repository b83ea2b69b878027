//! Vectored reads and writes on tokio's sockets that know when the kernel has no more: a short transfer clears the readiness at once, which
//! saves the call that would only have said EAGAIN.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::AsFd;

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

/// Writes `buffers` in order, as much as the kernel takes.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when it takes nothing; wait for readiness then.
pub fn write_vectored(socket: &TcpStream, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
    let all: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    let mut short = None;
    let outcome = socket.try_io(Interest::WRITABLE, || {
        let written = (&mut Raw(socket)).write_vectored(buffers)?;
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
        let written = (&mut Raw(socket)).write(buffer)?;
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

/// `sendmsg` with MSG_NOSIGNAL: Rust ignores SIGPIPE, and a library should not depend on that.
struct Raw<'a>(&'a TcpStream);

impl Write for &mut Raw<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        socket2::SockRef::from(self.0).send_with_flags(buffer, libc::MSG_NOSIGNAL)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        socket2::SockRef::from(self.0).send_vectored_with_flags(buffers, libc::MSG_NOSIGNAL)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
