//! Pipes for `splice(2)`: bytes go from socket to socket as page references, without a copy through this process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// A pipe that remembers how many bytes are in it.
///
/// `splice` answers EAGAIN both when the socket has nothing and when the pipe has no room (its room is counted in pages, and one byte can
/// take a page). So a pipe is filled only while it is empty, and drained before it is filled again: then the answer has one meaning.
///
/// Urgent data (`MSG_OOB`) stops a splice as if the socket were empty or at its end: who needs to be certain of either asks with a plain read.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    bytes: usize,
}

impl Pipe {
    /// Opens a pipe with room for `wanted` bytes (a power of two), or less where the kernel's limits leave less, but not below `least`.
    ///
    /// # Errors
    /// One that names the limits when there are no descriptors left; `QuotaExceeded` when the limits (`fs.pipe-max-size`, and
    /// `fs.pipe-user-pages-soft` for a process without `CAP_SYS_RESOURCE`) leave less than `least`.
    pub fn open(wanted: usize, least: usize) -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|errno| {
            let text = format!("no pipe can be opened: {} (limits: RLIMIT_NOFILE, fs.file-max)", errno.desc());
            io::Error::new(io::Error::from(errno).kind(), text)
        })?;
        let mut size = wanted;
        let capacity = loop {
            match fcntl(&write, FcntlArg::F_SETPIPE_SZ(i32::try_from(size).unwrap_or(i32::MAX))) {
                Ok(granted) => break usize::try_from(granted).unwrap_or(0),
                Err(Errno::EPERM | Errno::EBUSY | Errno::ENOMEM) if size / 2 >= least => size /= 2,
                // The size it was born with may do: 64 KiB, or one or two pages for a user beyond the soft limit.
                Err(_) => break fcntl(&write, FcntlArg::F_GETPIPE_SZ).map_or(0, |born| usize::try_from(born).unwrap_or(0)),
            }
        };
        if capacity < least {
            let text = format!("a pipe of {least} bytes is refused, {capacity} are allowed (fs.pipe-max-size, fs.pipe-user-pages-soft)");
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        }
        Ok(Self { read, write, capacity, bytes: 0 })
    }

    /// Bytes that fit when every page is full.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that are in it now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes what `socket` has received, as far as there is room. `Ok(0)` is the end of its stream.
    ///
    /// # Errors
    /// `WouldBlock` when the socket has nothing; `InvalidInput` when this pipe is not empty; else the socket's error.
    pub fn fill(&mut self, socket: &impl AsFd) -> io::Result<usize> {
        if self.bytes != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the pipe still holds bytes"));
        }
        self.bytes = moved(|| splice(socket, None, &self.write, None, self.capacity, SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK))?;
        Ok(self.bytes)
    }

    /// Gives what it holds to `socket`, as far as its send buffer has room. A short count does not mean that the socket is full: only
    /// `WouldBlock` does. Must not be called on an empty pipe.
    ///
    /// The kernel signals SIGPIPE for a socket that was closed; Rust programs ignore that signal, and get the error.
    ///
    /// # Errors
    /// `WouldBlock` when the socket takes nothing; `InvalidInput` when this pipe is empty; else the socket's error.
    pub fn drain(&mut self, socket: &impl AsFd) -> io::Result<usize> {
        if self.bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the pipe holds nothing"));
        }
        let sent = moved(|| splice(&self.read, None, socket, None, self.bytes, SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK))?;
        self.bytes = self.bytes.saturating_sub(sent);
        Ok(sent)
    }
}

/// A `splice` that a signal interrupted is asked again.
fn moved(call: impl Fn() -> nix::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_nonblocking(true).unwrap();
        (near, far)
    }

    fn wait_filled(pipe: &mut Pipe, socket: &TcpStream) -> usize {
        loop {
            match pipe.fill(socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                result => return result.unwrap(),
            }
        }
    }

    #[test]
    fn bytes_pass_from_socket_to_socket() {
        let ((mut client, from), (mut server, to)) = (pair(), pair());
        let mut pipe = Pipe::open(256 * 1024, 64 * 1024).unwrap();
        assert!(pipe.capacity() >= 64 * 1024);
        client.write_all(b"hello").unwrap();
        assert_eq!(wait_filled(&mut pipe, &from), 5);
        assert_eq!(pipe.fill(&from).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(pipe.drain(&to).unwrap(), 5);
        assert_eq!(pipe.bytes(), 0);
        let mut got = [0; 5];
        server.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(wait_filled(&mut pipe, &from), 0);
        assert_eq!(pipe.drain(&to).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn an_empty_socket_and_a_full_one_would_block() {
        let ((mut client, from), (_server, to)) = (pair(), pair());
        let mut pipe = Pipe::open(64 * 1024, 4096).unwrap();
        assert_eq!(pipe.fill(&from).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        client.set_nonblocking(true).unwrap();
        let blocked = loop {
            while client.write(&[7; 65536]).is_ok() {}
            if pipe.bytes() == 0 {
                wait_filled(&mut pipe, &from);
            }
            if let Err(error) = pipe.drain(&to) {
                break error;
            }
        };
        assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
        assert!(pipe.bytes() > 0);
    }

    #[test]
    fn a_gone_peer_is_an_error_and_no_signal() {
        let ((mut client, from), (server, to)) = (pair(), pair());
        let mut pipe = Pipe::open(64 * 1024, 4096).unwrap();
        crate::sys::socket::reset_on_close(&server).unwrap();
        drop(server);
        client.write_all(b"lost").unwrap();
        wait_filled(&mut pipe, &from);
        let kind = pipe.drain(&to).unwrap_err().kind();
        assert!(matches!(kind, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{kind:?}");
    }

    #[test]
    fn a_pipe_that_is_too_small_is_refused_with_the_limits_named() {
        let error = Pipe::open(1 << 30, 1 << 30).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        assert!(error.to_string().contains("fs.pipe-max-size"), "{error}");
    }
}
