//! The relay between two plain TCP sockets. Half-closes travel in both directions; a reset of either side resets the other.
//!
//! Each direction is driven by readiness: it owns neither a buffer nor a pipe until its socket has something, and gives it back as soon as
//! the other socket has taken all of it. Both directions of a connection run in its one task.

use std::future::{Future, poll_fn};
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use super::ReadSize;
use super::buffer::Buffer;
use super::splice::{Conduit, Filled, Pace};
use crate::sys::socket::reset_on_close;
use crate::telemetry::Meter;

/// Bytes that one direction moves before the other connections of its thread get their turn: some 50 to 100 µs of work.
const TURN: usize = 512 * 1024;

/// How a relay ended.
#[derive(Debug)]
pub enum Ended {
    /// Both directions saw the end of their stream.
    Finished,
    /// One side reset or vanished; the other was reset too. Not a failure of ours.
    Disconnected(io::Error),
    /// Something else went wrong.
    Failed(io::Error),
    /// The connection goes on elsewhere: its state and its sockets were handed out.
    Moved,
}

impl Ended {
    /// Sorts an I/O error into "the peer went away" and "failed" (reference, dataplane §2.6).
    #[must_use]
    pub fn from_error(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotConnected | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                Self::Disconnected(error)
            }
            _ => Self::Failed(error),
        }
    }
}

/// Two sockets that are reset when they are dropped before their connection has ended: neither side must take a cut for an end.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    finished: bool,
}

impl Drop for Pair {
    fn drop(&mut self) {
        if !self.finished {
            // A socket that refuses the option is closed all the same.
            let _ = reset_on_close(&self.client);
            let _ = reset_on_close(&self.server);
        }
    }
}

/// Relays between the client's socket and the server's until both directions have ended. Bytes from the client count as received, bytes to it
/// as sent (reference, dataplane §10.4), when the other socket has taken them. Dropping the future resets both.
///
/// A direction starts with read and write, and splices once it has shown bulk (64 KiB in large chunks in a row); without a pipe to be had
/// it goes on with read and write. Urgent data is not carried as such: the kernel takes the urgent byte out of the stream, and bytes that
/// arrived right after it may wait until the next segment.
pub async fn relay(client: TcpStream, server: TcpStream, meter: &Meter) -> Ended {
    let mut pair = Pair { client, server, finished: false };
    match both_ways(&pair, meter).await {
        Ok(()) => {
            pair.finished = true;
            Ended::Finished
        }
        Err(error) => Ended::from_error(error),
    }
}

async fn both_ways(pair: &Pair, meter: &Meter) -> io::Result<()> {
    let (client, server) = (&pair.client, &pair.server);
    let (mut up, mut down) = (Flow::default(), Flow::default());
    // Made once and kept: bulk is blocked over and over again.
    let (mut client_fails, mut server_fails) = (Failure::default(), Failure::default());
    loop {
        let (one, other) = poll_fn(|context| {
            let one = up.step(context, client, server, |bytes| meter.received(bytes))?;
            let other = down.step(context, server, client, |bytes| meter.sent(bytes))?;
            if !(one.waits() && other.waits()) {
                return Poll::Ready(io::Result::Ok((one, other)));
            }
            // A receiver that resets is noticed by whoever reads from it or writes to it; here, when nobody does.
            if one == Step::Hungry && other != Step::Hungry {
                server_fails.look(context, server)?;
            }
            if other == Step::Hungry && one != Step::Hungry {
                client_fails.look(context, client)?;
            }
            Poll::Pending
        })
        .await?;
        match (one, other) {
            // The last end is told by the close that follows.
            (Step::Ended | Step::Over, Step::Ended | Step::Over) => return Ok(()),
            (Step::Ended, _) => {
                meter.half_close();
                up.tell(server)?;
            }
            (_, Step::Ended) => {
                meter.half_close();
                down.tell(client)?;
            }
            // Not a bare wake-up: this one lets the driver look for events of others first.
            _ => tokio::task::yield_now().await,
        }
    }
}

/// Waits for a socket to fail; takes memory only once it is asked, because most connections never need it.
#[derive(Default)]
struct Failure<'a>(Option<Pin<Box<dyn Future<Output = io::Result<Ready>> + Send + 'a>>>);

impl<'a> Failure<'a> {
    fn look(&mut self, context: &mut Context<'_>, socket: &'a TcpStream) -> io::Result<()> {
        let failure = self.0.get_or_insert_with(|| Box::pin(socket.ready(Interest::ERROR)));
        if failure.as_mut().poll(context)?.is_ready() { Err(socket_error(socket)) } else { Ok(()) }
    }
}

/// Why a socket is ready to report an error.
pub fn socket_error(socket: &TcpStream) -> io::Error {
    match socket.take_error() {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

/// What a direction can do for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing until there is something to read.
    Hungry,
    /// Nothing until there is room to write.
    Blocked,
    /// More, but others come first.
    Tired,
    /// Pass on the end of its stream.
    Ended,
    /// Nothing any more: its end was passed on.
    Over,
}

impl Step {
    /// A socket wakes it, or nothing does.
    fn waits(self) -> bool {
        matches!(self, Self::Hungry | Self::Blocked | Self::Over)
    }
}

/// Bytes that were taken from one socket, but not yet by the other.
#[derive(Default)]
enum Cargo {
    #[default]
    None,
    Buffer {
        buffer: Buffer,
        sent: usize,
        end: usize,
    },
    Pipe(Conduit),
}

/// One direction.
#[derive(Default)]
struct Flow {
    cargo: Cargo,
    size: ReadSize,
    pace: Pace,
    /// The end of the stream was read.
    ended: bool,
    /// The end was passed on.
    over: bool,
}

impl Flow {
    /// Moves what can be moved.
    fn step(&mut self, context: &mut Context<'_>, from: &TcpStream, to: &TcpStream, count: impl Fn(u64)) -> io::Result<Step> {
        let mut moved = 0;
        loop {
            match self.unload(context, to, &count)? {
                Poll::Ready(bytes) => moved += bytes,
                Poll::Pending => return Ok(Step::Blocked),
            }
            if self.over {
                return Ok(Step::Over);
            }
            if self.ended {
                return Ok(Step::Ended);
            }
            if moved >= TURN {
                return Ok(Step::Tired);
            }
            if self.load(context, from, moved > 0)?.is_pending() {
                return Ok(Step::Hungry);
            }
        }
    }

    /// Passes the end on.
    fn tell(&mut self, to: &TcpStream) -> io::Result<()> {
        self.over = true;
        match socket2::SockRef::from(to).shutdown(Shutdown::Write) {
            // A socket that is no longer connected has nothing to be told.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(()),
        }
    }

    /// Gives `to` all cargo, and its place back to the pool. Ready: there is none left; so many bytes have moved.
    fn unload(&mut self, context: &mut Context<'_>, to: &TcpStream, count: impl Fn(u64)) -> io::Result<Poll<usize>> {
        let mut moved = 0;
        loop {
            let result = match &mut self.cargo {
                Cargo::None => return Ok(Poll::Ready(moved)),
                Cargo::Buffer { buffer, sent, end } => {
                    let rest = &buffer[*sent..*end];
                    short_clears(to, Interest::WRITABLE, rest.len(), || to.try_write(rest)).map(|bytes| {
                        *sent += bytes;
                        (bytes, sent >= end)
                    })
                }
                // Here a short count is not the answer "full": only that answer is.
                Cargo::Pipe(pipe) => pipe.drain(to).map(|bytes| (bytes, pipe.is_empty())),
            };
            match result {
                Ok((0, _)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok((bytes, empty)) => {
                    moved += bytes;
                    count(bytes as u64);
                    if empty {
                        self.cargo = Cargo::None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match to.poll_write_ready(context)? {
                    Poll::Ready(()) => {}
                    Poll::Pending => return Ok(Poll::Pending),
                },
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes cargo from `from`, or learns that its stream has ended. `progress`: bytes did move since the last wake-up, so that finding no
    /// more of them is nothing to wonder about.
    fn load(&mut self, context: &mut Context<'_>, from: &TcpStream, progress: bool) -> io::Result<Poll<()>> {
        if from.poll_read_ready(context)?.is_pending() {
            return Ok(Poll::Pending);
        }
        if self.pace.splices() {
            match Conduit::lend() {
                Ok(mut pipe) => match pipe.fill(from, progress)? {
                    Filled::Bytes(bytes) => {
                        self.pace.learn(bytes);
                        self.cargo = Cargo::Pipe(pipe);
                    }
                    Filled::Nothing => {}
                    Filled::Unclear => self.pace.doubt(),
                },
                Err(_) => self.pace.refused(),
            }
            return Ok(Poll::Ready(()));
        }
        let mut buffer = Buffer::lend(self.size.bytes());
        match short_clears(from, Interest::READABLE, buffer.len(), || from.try_read(&mut buffer)) {
            Ok(0) => self.ended = true,
            Ok(end) => {
                self.size.learn(end);
                self.pace.learn(end);
                self.cargo = Cargo::Buffer { buffer, sent: 0, end };
            }
            // Its readiness is cleared now: the next look waits for an event.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(Poll::Ready(()))
    }
}

/// A read or write of less than was asked for says that the socket is empty, or full: its readiness is cleared without another system call
/// to learn the same. What comes next is a new event.
fn short_clears(socket: &TcpStream, interest: Interest, asked: usize, mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    let mut short = None;
    let whole = socket.try_io(interest, || match call()? {
        bytes if 0 < bytes && bytes < asked => {
            short = Some(bytes);
            Err(io::ErrorKind::WouldBlock.into())
        }
        bytes => Ok(bytes),
    });
    short.map_or(whole, Ok)
}

#[cfg(test)]
mod tests;
