//! Who wants the tunnel's attention: sockets of streams that became ready, and commands from outside. One small lock, taken once per wake-up
//! and never while bytes move.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::time::Duration;

use tokio::time::Instant;

/// Where wake-ups and commands wait for the tunnel's task.
pub(in crate::hbone) struct Inbox<C> {
    inner: Mutex<Inner<C>>,
    /// Streams that the peer serves at once, once it has said so. Until then more than 100 wait in the tunnel.
    streams: AtomicU32,
    /// Since when the tunnel has no credit beside its reserve.
    short: Mutex<Option<Instant>>,
}

struct Inner<C> {
    ready: Vec<u32>,
    commands: VecDeque<C>,
    waker: Option<Waker>,
    closed: bool,
}

impl<C: Send + 'static> Inbox<C> {
    pub(in crate::hbone) fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner { ready: Vec::new(), commands: VecDeque::new(), waker: None, closed: false }),
            streams: AtomicU32::new(u32::MAX),
            short: Mutex::new(None),
        })
    }

    pub(super) fn allow(&self, streams: u32) {
        self.streams.store(streams, Ordering::Relaxed);
    }

    pub(in crate::hbone) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed) as usize
    }

    /// Says whether the tunnel has no credit beside its reserve.
    pub(super) fn set_short(&self, short: bool) {
        *self.short.lock().unwrap_or_else(PoisonError::into_inner) = short.then(Instant::now);
    }

    /// For how long the tunnel has had no credit beside its reserve.
    pub(in crate::hbone) fn short_for(&self) -> Duration {
        // An instant is whole whoever panicked.
        self.short.lock().unwrap_or_else(PoisonError::into_inner).map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Inner<C>> {
        // Nothing panics while it holds the lock; a poisoned queue is still whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a command to the task; gives it back when the task has ended.
    pub(in crate::hbone) fn send(&self, command: C) -> Result<(), C> {
        let waker = {
            let mut inner = self.lock();
            if inner.closed {
                return Err(command);
            }
            inner.commands.push_back(command);
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    pub(in crate::hbone) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Takes what waits. When nothing does, the task is woken by the next that comes.
    pub(super) fn take(&self, ready: &mut Vec<u32>, commands: &mut VecDeque<C>, waker: &Waker) -> bool {
        let mut inner = self.lock();
        std::mem::swap(&mut inner.ready, ready);
        std::mem::swap(&mut inner.commands, commands);
        let nothing = ready.is_empty() && commands.is_empty();
        if nothing && !inner.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            inner.waker = Some(waker.clone());
        }
        !nothing
    }

    /// No more commands: those that wait are given back.
    pub(super) fn close(&self) -> VecDeque<C> {
        let mut inner = self.lock();
        inner.closed = true;
        std::mem::take(&mut inner.commands)
    }

    /// No more commands, unless some wait; whether it is closed now.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut inner = self.lock();
        inner.closed |= inner.commands.is_empty();
        inner.closed
    }

    fn mark(&self, slot: u32) {
        let waker = {
            let mut inner = self.lock();
            inner.ready.push(slot);
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The waker of one stream's socket.
pub(super) struct StreamWaker<C> {
    inbox: Arc<Inbox<C>>,
    slot: u32,
    queued: AtomicBool,
}

impl<C: Send + 'static> StreamWaker<C> {
    pub(super) fn new(inbox: &Arc<Inbox<C>>, slot: u32) -> Arc<Self> {
        Arc::new(Self { inbox: inbox.clone(), slot, queued: AtomicBool::new(false) })
    }

    /// The wake-up was seen: the next one counts again. Call it before looking at the socket.
    pub(super) fn seen(&self) {
        self.queued.store(false, Ordering::Release);
    }
}

impl<C: Send + 'static> Wake for StreamWaker<C> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.inbox.mark(self.slot);
        }
    }
}
