//! When a direction splices, and the pipes for it: lent by a pool of each thread while bytes are in flight, and only then.
//!
//! A splice costs two system calls for a chunk like a read and a write do, but no copy; it pays from about 16 KiB a chunk. So a direction
//! reads and writes until it has shown bulk, and goes back when its chunks have become small.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::sys::splice::Pipe;

/// Room of a pipe in bytes, where the kernel grants it; and the least that is worth having (what a pipe is born with).
const ROOM: usize = 512 * 1024;
const LEAST_ROOM: usize = 64 * 1024;
/// Pipes that this process may have, lent and idle. The kernel memory that stalled receivers can pin is this times [`ROOM`]: 64 MiB, what the
/// kernel grants an unprivileged user (`fs.pipe-user-pages-soft`).
const MOST_PIPES: usize = 128;
/// Idle pipes that one thread keeps.
const KEPT_PIPES: usize = 8;

/// A chunk from this size on counts as bulk.
const BULK_CHUNK: usize = 16 * 1024;
/// Bulk in a row that makes a direction splice.
const BULK: usize = 64 * 1024;
/// Small chunks in a row that make it read and write again.
const PATIENCE: u8 = 8;
/// Bulk that passes by read and write before a pipe is asked for again, after none was to be had.
const REFUSED: usize = 16 * 1024 * 1024;

static PIPES: AtomicUsize = AtomicUsize::new(0);

#[derive(Default)]
struct Rack {
    idle: Vec<Counted>,
    /// Loans made here minus loans returned here; negative when others' loans came back here.
    lent: isize,
}

thread_local! {
    static RACK: RefCell<Rack> = RefCell::default();
}

/// A pipe that counts towards [`MOST_PIPES`] while it exists.
#[derive(Debug)]
struct Counted(Pipe);

impl Counted {
    fn open() -> io::Result<Self> {
        if PIPES.fetch_add(1, Ordering::Relaxed) >= MOST_PIPES {
            PIPES.fetch_sub(1, Ordering::Relaxed);
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "all pipes of this process are in use"));
        }
        Pipe::open(ROOM, LEAST_ROOM).map(Self).inspect_err(|_| {
            PIPES.fetch_sub(1, Ordering::Relaxed);
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A pipe on loan. Dropped empty, it goes to the pool of the thread that drops it; dropped with bytes in it, it is closed, and they are lost.
#[derive(Debug)]
pub(super) struct Conduit(Option<Counted>);

impl Conduit {
    /// Borrows an empty pipe.
    ///
    /// # Errors
    /// When there is none: descriptors, the kernel's limits or our own are used up. The caller reads and writes instead.
    pub(super) fn lend() -> io::Result<Self> {
        let pipe = with_rack(|rack| rack.idle.pop()).flatten().map_or_else(Counted::open, Ok)?;
        with_rack(|rack| rack.lent += 1);
        Ok(Self(Some(pipe)))
    }

    /// Pipes on loan from this thread's pool, for tests and for whoever looks for a leak: none while no byte is in flight.
    #[cfg(test)]
    pub(super) fn lent() -> isize {
        with_rack(|rack| rack.lent).unwrap_or_default()
    }

    fn pipe(&mut self) -> io::Result<&mut Pipe> {
        self.0.as_mut().map(|counted| &mut counted.0).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(|counted| counted.0.bytes() == 0)
    }

    /// Takes what `from` has received. With `certain`, "nothing there" clears the socket's readiness; without, the caller will ask again
    /// by a plain read, which must find it set.
    pub(super) fn fill(&mut self, from: &TcpStream, certain: bool) -> io::Result<Filled> {
        let pipe = self.pipe()?;
        let result = from.try_io(Interest::READABLE, || match pipe.fill(from) {
            Ok(0) => Ok(Filled::Unclear),
            Ok(bytes) => Ok(Filled::Bytes(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !certain => Ok(Filled::Unclear),
            Err(error) => Err(error),
        });
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Filled::Nothing),
            result => result,
        }
    }

    /// Gives what it holds to `to`; `WouldBlock` clears the socket's readiness.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let pipe = self.pipe()?;
        to.try_io(Interest::WRITABLE, || pipe.drain(to))
    }
}

impl Drop for Conduit {
    fn drop(&mut self) {
        let Some(pipe) = self.0.take() else { return };
        with_rack(|rack| {
            rack.lent -= 1;
            if pipe.0.bytes() == 0 && rack.idle.len() < KEPT_PIPES {
                rack.idle.push(pipe);
            }
        });
    }
}

/// What a fill brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes are in the pipe.
    Bytes(usize),
    /// The socket has nothing; its next event wakes the reader.
    Nothing,
    /// The end, or a state that a splice cannot tell from it (urgent data): a plain read decides.
    Unclear,
}

/// `None` while the thread ends and its pool is gone.
fn with_rack<T>(act: impl FnOnce(&mut Rack) -> T) -> Option<T> {
    RACK.try_with(|rack| act(&mut rack.borrow_mut())).ok()
}

/// Watches the chunks of one direction and decides whether it splices.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pace {
    /// Reads and writes; splices once this many more bytes have passed in large chunks in a row.
    Chatty(usize),
    /// Splices; so many small chunks have passed in a row.
    Bulk(u8),
}

impl Default for Pace {
    fn default() -> Self {
        Self::Chatty(BULK)
    }
}

impl Pace {
    pub(super) fn splices(self) -> bool {
        matches!(self, Self::Bulk(_))
    }

    /// Learns from the chunk that just arrived.
    pub(super) fn learn(&mut self, chunk: usize) {
        *self = match (*self, chunk >= BULK_CHUNK) {
            (Self::Chatty(left), true) if left <= chunk => Self::Bulk(0),
            (Self::Chatty(left), true) => Self::Chatty(left - chunk),
            // What a refusal asks for stays asked for.
            (Self::Chatty(left), false) => Self::Chatty(left.max(BULK)),
            (Self::Bulk(_), true) => Self::Bulk(0),
            (Self::Bulk(small), false) if small + 1 >= PATIENCE => Self::default(),
            (Self::Bulk(small), false) => Self::Bulk(small + 1),
        };
    }

    /// A plain read is needed now.
    pub(super) fn doubt(&mut self) {
        *self = Self::default();
    }

    /// No pipe was to be had.
    pub(super) fn refused(&mut self) {
        *self = Self::Chatty(REFUSED);
    }
}

/// Held for writing by a test that takes all pipes of the process, for reading by those that need one.
#[cfg(test)]
pub(super) static ALL_PIPES: std::sync::RwLock<()> = std::sync::RwLock::new(());

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn bulk_splices_and_chat_does_not() {
        let mut pace = Pace::default();
        for _ in 0..1000 {
            pace.learn(1024);
        }
        assert!(!pace.splices());
        for _ in 0..4 {
            assert!(!pace.splices());
            pace.learn(BULK_CHUNK);
        }
        assert!(pace.splices());
        for _ in 0..PATIENCE {
            assert!(pace.splices());
            pace.learn(100);
        }
        assert!(!pace.splices());
    }

    #[test]
    fn one_large_answer_among_small_ones_does_not_splice() {
        let mut pace = Pace::default();
        for _ in 0..1000 {
            pace.learn(BULK_CHUNK * 3);
            pace.learn(500);
        }
        assert!(!pace.splices());
    }

    #[test]
    fn after_a_refusal_a_pipe_is_not_asked_for_at_once() {
        let mut pace = Pace::Bulk(0);
        pace.refused();
        for _ in 0..(REFUSED / MAX) {
            assert!(!pace.splices());
            pace.learn(MAX);
        }
        assert!(pace.splices());
    }
    const MAX: usize = super::super::MAX_READ;

    #[test]
    fn an_empty_pipe_is_lent_again_and_a_full_thread_keeps_few() {
        let _shared = ALL_PIPES.read().unwrap();
        let many: Vec<Conduit> = (0..20).map(|_| Conduit::lend().unwrap()).collect();
        assert_eq!(Conduit::lent(), 20);
        drop(many);
        assert_eq!(Conduit::lent(), 0);
        assert_eq!(with_rack(|rack| rack.idle.len()), Some(KEPT_PIPES));
    }
}
