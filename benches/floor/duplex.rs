//! Both directions of a connection, in its one task.

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::task::{Context, Poll, ready};

use culvert::sys::socket::reset_on_close;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// One direction of a floor: takes bytes, changes them, gives them on.
pub(crate) trait Pump {
    /// Takes what has arrived. `Ok(None)`: nothing to send came of it yet. `Ok(Some(false))`: the end of the stream.
    fn load(&mut self, from: &TcpStream) -> io::Result<Loaded>;

    /// Gives on as much as the socket takes. `Ok(true)`: all of it. Must ask again after a short count, or clear the readiness.
    fn unload(&mut self, to: &TcpStream) -> io::Result<bool>;
}

/// What a load brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loaded {
    /// Something to unload.
    Some,
    /// Part of something; more is needed.
    Part,
    /// The end of the stream.
    End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Load,
    Unload,
    Shutdown,
    Over,
}

/// Relays until both directions have ended, or one failed.
pub(crate) async fn duplex(client: TcpStream, server: TcpStream, mut up: impl Pump, mut down: impl Pump) {
    let (mut rising, mut falling) = (Stage::Load, Stage::Load);
    let result: io::Result<()> = poll_fn(|context| {
        let others_over = falling == Stage::Over;
        let one = advance(&mut up, &mut rising, context, (&client, &server), others_over)?;
        let other = advance(&mut down, &mut falling, context, (&server, &client), rising == Stage::Over)?;
        if one.is_ready() && other.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await;
    if result.is_err() {
        let _ = reset_on_close(&client);
        let _ = reset_on_close(&server);
    }
}

fn advance(
    pump: &mut impl Pump,
    stage: &mut Stage,
    context: &mut Context<'_>,
    (from, to): (&TcpStream, &TcpStream),
    last: bool,
) -> io::Result<Poll<()>> {
    match step(pump, stage, context, (from, to), last) {
        Poll::Pending => Ok(Poll::Pending),
        Poll::Ready(result) => result.map(Poll::Ready),
    }
}

fn step(
    pump: &mut impl Pump,
    stage: &mut Stage,
    context: &mut Context<'_>,
    (from, to): (&TcpStream, &TcpStream),
    last: bool,
) -> Poll<io::Result<()>> {
    loop {
        match stage {
            Stage::Load => match pump.load(from) {
                Ok(Loaded::Some) => *stage = Stage::Unload,
                Ok(Loaded::Part) => {}
                Ok(Loaded::End) => *stage = Stage::Shutdown,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(from.poll_read_ready(context))?,
                Err(error) => return Poll::Ready(Err(error)),
            },
            Stage::Unload => match pump.unload(to) {
                Ok(true) => *stage = Stage::Load,
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(to.poll_write_ready(context))?,
                Err(error) => return Poll::Ready(Err(error)),
            },
            Stage::Shutdown => {
                // When the other direction is over too, the close that follows says the same.
                if !last {
                    SockRef::from(to)
                        .shutdown(Shutdown::Write)
                        .or_else(|error| if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) })?;
                }
                *stage = Stage::Over;
            }
            Stage::Over => return Poll::Ready(Ok(())),
        }
    }
}

/// Calls `receive`, which has room for `room` bytes. A short count says that the socket is empty now, so its readiness is cleared without
/// another system call to learn the same; its next bytes are a new event.
pub(crate) fn receive(from: &TcpStream, room: usize, mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    short_clears(from, Interest::READABLE, room, &mut call)
}

/// The same for sending `length` bytes: a short count says that the socket is full.
pub(crate) fn send(to: &TcpStream, length: usize, mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    short_clears(to, Interest::WRITABLE, length, &mut call)
}

fn short_clears(socket: &TcpStream, interest: Interest, whole: usize, call: &mut dyn FnMut() -> io::Result<usize>) -> io::Result<usize> {
    let mut short = None;
    let result = socket.try_io(interest, || match call()? {
        bytes if 0 < bytes && bytes < whole => {
            short = Some(bytes);
            Err(io::ErrorKind::WouldBlock.into())
        }
        bytes => Ok(bytes),
    });
    short.map_or(result, Ok)
}
