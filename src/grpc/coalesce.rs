//! Reading what a server says in gulps.
//!
//! One small message costs its receiver a wake-up and a way through the kernel, TLS and HTTP/2 that lies in no cache any more, many times what is done
//! with the message: 100 a second were 2 % of a core. So once a caller says that nobody waits for the next message, a socket that has just been read is
//! left alone for [`REST`], unless [`THRESHOLD`] bytes come. The first message after a silence is never late. The kernel does the waiting
//! (`SO_RCVLOWAT`): what comes meanwhile wakes nobody. The end of a connection always does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::sys::socket::set_read_threshold;

/// How long a socket rests: well below half of the 200 ms within which a changed policy must reach live connections (design §3).
const REST: Duration = Duration::from_millis(75);
/// So many bytes end a rest: what is large is read as it comes. Less than half of what the kernel's receive buffer begins with, so that it does not
/// change how that grows.
const THRESHOLD: u16 = 16 << 10;

/// Whether the messages of a connection may wait for each other. Clones are one.
#[derive(Debug, Clone, Default)]
pub struct Coalescing(Arc<AtomicBool>);

impl Coalescing {
    /// From now on a message may be read up to 75 ms after it came, if another was read that short a time ago.
    pub fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A socket that rests between reads.
#[derive(Debug)]
pub(super) struct Coalesced {
    socket: TcpStream,
    coalescing: Coalescing,
    /// Something was read since the last rest began.
    received: bool,
    resting: bool,
    rest: Pin<Box<Sleep>>,
}

impl Coalesced {
    pub(super) fn new(socket: TcpStream, coalescing: Coalescing) -> Self {
        Self { socket, coalescing, received: false, resting: false, rest: Box::pin(sleep(Duration::ZERO)) }
    }

    /// Ends a rest that is over. To lower the threshold tells of what came meanwhile.
    fn poll_rest(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.resting && self.rest.as_mut().poll(context).is_ready() {
            self.resting = false;
            set_read_threshold(&self.socket, 1)?;
        }
        Ok(())
    }
}

impl AsyncRead for Coalesced {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_rest(context)?;
        if let Poll::Ready(read) = Pin::new(&mut self.socket).poll_read(context, buffer) {
            self.received = true;
            return Poll::Ready(read);
        }
        if self.received && !self.resting && self.coalescing.is_on() {
            self.received = false;
            // A socket that cannot rest is read as it was before.
            if set_read_threshold(&self.socket, THRESHOLD).is_ok() {
                self.resting = true;
                self.rest.as_mut().reset(Instant::now() + REST);
                self.poll_rest(context)?;
            }
        }
        Poll::Pending
    }
}

impl AsyncWrite for Coalesced {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    /// A coalesced socket, its switch, and the other end.
    async fn sockets() -> (Coalesced, Coalescing, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (theirs, _) = listener.accept().await.unwrap();
        theirs.set_nodelay(true).unwrap();
        let coalescing = Coalescing::default();
        (Coalesced::new(ours, coalescing.clone()), coalescing, theirs)
    }

    /// Reads once; says how much.
    async fn read(socket: &mut Coalesced) -> usize {
        let mut buffer = vec![0; 64 << 10];
        timeout(Duration::from_secs(20), socket.read(&mut buffer)).await.expect("nothing came").unwrap()
    }

    /// Reads until nothing is there, which begins a rest.
    async fn settle(socket: &mut Coalesced) {
        let mut buffer = [0; 64];
        assert!(futures_util::poll!(std::pin::pin!(socket.read(&mut buffer))).is_pending());
    }

    #[tokio::test]
    async fn what_comes_after_a_silence_is_read_at_once_and_what_comes_soon_after_it_together() {
        let (mut ours, coalescing, mut theirs) = sockets().await;
        coalescing.begin();
        theirs.write_all(b"one").await.unwrap();
        assert_eq!(read(&mut ours).await, 3);
        assert!(!ours.resting);
        let from = Instant::now();
        settle(&mut ours).await;
        assert!(ours.resting);
        theirs.write_all(b"two").await.unwrap();
        theirs.write_all(b"three").await.unwrap();
        let mut both = [0; 8];
        timeout(Duration::from_secs(20), ours.read_exact(&mut both)).await.expect("nothing came").unwrap();
        assert!(&both == b"twothree" && from.elapsed() >= REST, "after {:?}", from.elapsed());
        settle(&mut ours).await;
        // Nothing comes: the rest ends without a word, and the next message finds it over.
        tokio::select! {
            biased;
            _ = read(&mut ours) => panic!("nothing was sent"),
            () = sleep(REST * 2) => {}
        }
        assert!(!ours.resting);
    }

    #[tokio::test]
    async fn nobody_rests_before_the_caller_says_so() {
        let (mut ours, coalescing, mut theirs) = sockets().await;
        for _ in 0..3 {
            theirs.write_all(b"one").await.unwrap();
            assert_eq!(read(&mut ours).await, 3);
            settle(&mut ours).await;
            assert!(!ours.resting);
        }
        coalescing.begin();
        settle(&mut ours).await;
        assert!(ours.resting, "what was read before counts");
    }

    #[tokio::test]
    async fn much_that_comes_and_an_end_wait_for_no_rest() {
        let (mut ours, coalescing, mut theirs) = sockets().await;
        coalescing.begin();
        theirs.write_all(b"one").await.unwrap();
        read(&mut ours).await;
        settle(&mut ours).await;
        // A rest that does not end by itself.
        ours.rest.as_mut().reset(Instant::now() + Duration::from_secs(1_000_000));
        let much = vec![7; usize::from(THRESHOLD)];
        theirs.write_all(&much).await.unwrap();
        let mut left = much.len();
        while left > 0 {
            let mut buffer = vec![0; left];
            left -= timeout(Duration::from_secs(20), ours.read(&mut buffer)).await.expect("it waits").unwrap();
        }
        assert!(ours.resting);
        drop(theirs);
        assert_eq!(read(&mut ours).await, 0, "the end");
        assert!(ours.resting);
    }
}
