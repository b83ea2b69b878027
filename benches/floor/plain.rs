//! C1 and C2: bytes as they are.

use std::io;

use tokio::io::Interest;
use tokio::net::TcpStream;

use culvert::sys::splice::Pipe;

use crate::duplex::{Loaded, Pump, receive, send};
use crate::place::{give_pipe, give_slab, take_pipe, take_slab};

const ROOM: usize = 512 * 1024;
const BATCH: usize = 256 * 1024;

/// C1: page references through a pipe, which the direction keeps until the connection ends.
#[derive(Default)]
pub(crate) struct Splice(Option<Pipe>);

impl Splice {
    fn pipe(&mut self) -> io::Result<&mut Pipe> {
        if self.0.is_none() {
            self.0 = Some(take_pipe(ROOM)?);
        }
        self.0.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Pump for Splice {
    fn load(&mut self, from: &TcpStream) -> io::Result<Loaded> {
        from.try_io(Interest::READABLE, || Ok(if self.pipe()?.fill(from)? == 0 { Loaded::End } else { Loaded::Some }))
    }

    fn unload(&mut self, to: &TcpStream) -> io::Result<bool> {
        to.try_io(Interest::WRITABLE, || {
            let pipe = self.pipe()?;
            pipe.drain(to)?;
            Ok(pipe.bytes() == 0)
        })
    }
}

impl Drop for Splice {
    fn drop(&mut self) {
        if let Some(pipe) = self.0.take() {
            give_pipe(pipe);
        }
    }
}

/// C2: one read, one write.
#[derive(Default)]
pub(crate) struct Copy {
    held: Option<Box<[u8]>>,
    sent: usize,
    end: usize,
}

impl Pump for Copy {
    fn load(&mut self, from: &TcpStream) -> io::Result<Loaded> {
        let mut slab = take_slab(BATCH);
        let result = receive(from, BATCH, || from.try_read(&mut slab));
        match result {
            Ok(0) | Err(_) => give_slab(slab),
            Ok(bytes) => (self.held, self.sent, self.end) = (Some(slab), 0, bytes),
        }
        result.map(|bytes| if bytes == 0 { Loaded::End } else { Loaded::Some })
    }

    fn unload(&mut self, to: &TcpStream) -> io::Result<bool> {
        let Some(slab) = &self.held else { return Ok(true) };
        let rest = &slab[self.sent..self.end];
        self.sent += send(to, rest.len(), || to.try_write(rest))?;
        if self.sent < self.end {
            return Ok(false);
        }
        self.held.take().into_iter().for_each(give_slab);
        Ok(true)
    }
}
