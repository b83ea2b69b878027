//! A look at the head of every frame that arrives, below h2: what the peer's first frame is, how much DATA comes, when the peer was heard last,
//! and floods that h2 leaves alone.
//!
//! What h2 bounds by itself, as tests show: the output that a peer's PINGs and SETTINGS cause (it stops reading), CONTINUATION frames,
//! decoded header lists, resets that it has to send, empty DATA frames. What it does not bound, and this does: the bytes of an encoded header
//! block (six frames of [`super::Config::frame_size`]), and control frames without end from a peer that reads the answers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::lifecycle::RateBudget;

/// Length of a frame's head (RFC 9113 §4.1).
const HEAD: usize = 9;
/// Length of what a client sends before its first frame (RFC 9113 §3.4).
const PREFACE: usize = 24;
/// Longest encoded header block, bytes: eight times the decoded list that we accept by default.
const MAX_HEADER_BLOCK: u32 = 64 << 10;
/// Control frames that a peer may send per second in the long run: a PING per round trip of 5 ms.
const CONTROL_PER_SECOND: u32 = 200;
/// Control frames that a peer may send at once.
const CONTROL_BURST: u32 = 1000;

const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;
const SETTINGS: u8 = 0x4;
const PUSH_PROMISE: u8 = 0x5;
const WINDOW_UPDATE: u8 = 0x8;
const CONTINUATION: u8 = 0x9;
const ACK: u8 = 0x1;

/// What a peer must not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    /// RFC 9113 §3.4.
    #[error("the peer's first frame is not SETTINGS")]
    NotSettings,
    /// A header block far beyond what any CONNECT needs.
    #[error("a header block of more than 64 KiB")]
    HeaderBlock,
    /// PING, SETTINGS, PRIORITY and the like without end.
    #[error("too many control frames")]
    ControlFlood,
}

/// What has arrived on one tunnel. Written by its connection, read by whoever watches over it.
#[derive(Debug)]
pub(super) struct Traffic {
    began: Instant,
    /// Milliseconds from the beginning to the last byte.
    heard: AtomicU64,
    data: AtomicU64,
    settled: AtomicBool,
    violation: AtomicU8,
}

impl Traffic {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            heard: AtomicU64::new(0),
            data: AtomicU64::new(0),
            settled: AtomicBool::new(false),
            violation: AtomicU8::new(0),
        }
    }

    /// When the peer was heard last.
    pub(super) fn heard(&self) -> Instant {
        self.began + Duration::from_millis(self.heard.load(Ordering::Relaxed))
    }

    /// Bytes of DATA frames, padding included: what windows are used up by.
    pub(super) fn data(&self) -> u64 {
        self.data.load(Ordering::Relaxed)
    }

    /// Whether the peer's first SETTINGS have arrived.
    pub(super) fn settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// What the peer did wrong. From then on nothing of it is read; whoever polls the connection looks here after each poll.
    pub(super) fn violation(&self) -> Option<Violation> {
        match self.violation.load(Ordering::Relaxed) {
            1 => Some(Violation::NotSettings),
            2 => Some(Violation::HeaderBlock),
            3 => Some(Violation::ControlFlood),
            _ => None,
        }
    }

    fn violated(&self, violation: Violation) {
        let code = match violation {
            Violation::NotSettings => 1,
            Violation::HeaderBlock => 2,
            Violation::ControlFlood => 3,
        };
        self.violation.store(code, Ordering::Relaxed);
    }

    fn note(&self, data: u64, settled: bool) {
        let heard = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(heard, Ordering::Relaxed);
        // There is one writer.
        self.data.store(self.data().saturating_add(data), Ordering::Relaxed);
        if settled {
            self.settled.store(true, Ordering::Release);
        }
    }
}

/// A connection whose arriving frames are looked at.
#[derive(Debug)]
pub(super) struct FrameWatch<S> {
    inner: S,
    scanner: Scanner,
    traffic: Arc<Traffic>,
}

impl<S> FrameWatch<S> {
    /// Watches what a client sends: its preface, then frames.
    pub(super) fn of_client(inner: S) -> Self {
        Self { inner, scanner: Scanner::new(PREFACE), traffic: Arc::new(Traffic::new()) }
    }

    /// Watches what a server sends: frames.
    pub(super) fn of_server(inner: S) -> Self {
        Self { inner, scanner: Scanner::new(0), traffic: Arc::new(Traffic::new()) }
    }

    pub(super) fn traffic(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }
}

/// Finds the heads of frames in bytes that come in any pieces.
#[derive(Debug)]
struct Scanner {
    /// Bytes of preface or payload until the next head.
    skip: usize,
    head: [u8; HEAD],
    filled: usize,
    /// Heads seen, up to two.
    frames: u8,
    /// Bytes of the header block under way.
    block: u32,
    control: RateBudget,
    data: u64,
}

impl Scanner {
    fn new(preface: usize) -> Self {
        let control = RateBudget::new(CONTROL_PER_SECOND, CONTROL_BURST);
        Self { skip: preface, head: [0; HEAD], filled: 0, frames: 0, block: 0, control, data: 0 }
    }

    fn scan(&mut self, mut bytes: &[u8]) -> Result<(), Violation> {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let (_, rest) = bytes.split_at(self.skip.min(bytes.len()));
                self.skip -= bytes.len() - rest.len();
                bytes = rest;
                continue;
            }
            let (part, rest) = bytes.split_at((HEAD - self.filled).min(bytes.len()));
            self.head[self.filled..self.filled + part.len()].copy_from_slice(part);
            self.filled += part.len();
            bytes = rest;
            if self.filled == HEAD {
                self.filled = 0;
                self.frame()?;
            }
        }
        Ok(())
    }

    fn frame(&mut self) -> Result<(), Violation> {
        let [a, b, c, kind, flags, ..] = self.head;
        let length = u32::from_be_bytes([0, a, b, c]);
        self.skip = length as usize;
        if self.frames == 0 && (kind != SETTINGS || flags & ACK != 0) {
            return Err(Violation::NotSettings);
        }
        self.frames = (self.frames + 1).min(2);
        match kind {
            DATA => self.data += u64::from(length),
            HEADERS | PUSH_PROMISE | CONTINUATION => {
                self.block = if kind == CONTINUATION { self.block.saturating_add(length) } else { length };
                if self.block > MAX_HEADER_BLOCK {
                    return Err(Violation::HeaderBlock);
                }
            }
            // Bounded by what they answer to, or by streams (see `accept::Patience`).
            WINDOW_UPDATE | RST_STREAM => {}
            // SETTINGS, PING, PRIORITY, GOAWAY and what nobody knows.
            _ => self.control.take().map_err(|_exceeded| Violation::ControlFlood)?,
        }
        Ok(())
    }

    /// Whether the whole of the first frame was seen.
    fn settled(&self) -> bool {
        self.frames == 2 || (self.frames == 1 && self.skip == 0)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameWatch<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.traffic.violation().is_some() {
            // No waker: see `Traffic::violation`.
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        let this = &mut *self;
        match this.scanner.scan(&buffer.filled()[before..]) {
            Ok(()) => {
                let settled = this.traffic.settled() || this.scanner.settled();
                this.traffic.note(std::mem::take(&mut this.scanner.data), settled);
                Poll::Ready(Ok(()))
            }
            Err(violation) => {
                this.traffic.violated(violation);
                buffer.set_filled(before);
                Poll::Pending
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FrameWatch<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests;
