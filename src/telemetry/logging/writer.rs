//! The thread that writes the log.
//!
//! The reference blocks whoever logs when its queue is full, so one reader of its output that stops reading stops the mesh of a node.
//! Here a full queue drops the line and counts it (`culvert_log_lines_dropped_total`): the data path never waits for a log
//! (reference, craft-and-trust F10). When there is room again, one line says how many are missing.

use std::io::{ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use crate::telemetry::{TelemetryError, report_suppressed};

/// Lines are written together up to about this many bytes.
const BATCH: usize = 64 * 1024;
/// How often suppressed and dropped lines are reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Lines dropped since the process started, whatever the reason.
static DROPPED: AtomicU64 = AtomicU64::new(0);

pub(super) fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

enum Message {
    Line(String),
    Flush(SyncSender<()>),
}

/// The sending end, held by whoever logs.
#[derive(Debug, Clone)]
pub(super) struct LineSender {
    queue: SyncSender<Message>,
    lost: Arc<Lost>,
}

/// Lines of one writer that nobody was told of yet.
#[derive(Debug, Default)]
struct Lost {
    lines: AtomicU64,
}

impl Lost {
    fn add(&self, lines: u64) {
        self.lines.fetch_add(lines, Ordering::Relaxed);
        DROPPED.fetch_add(lines, Ordering::Relaxed);
    }
}

impl LineSender {
    /// Hands a line to the thread, or drops and counts it. Never waits.
    pub(super) fn send(&self, line: String) {
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.lost.add(1);
        }
    }

    /// Waits until every line sent so far is written; gives up after `patience`. For the end of the process.
    pub(super) fn flush(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let (done, wait) = sync_channel(1);
        let mut message = Message::Flush(done);
        loop {
            match self.queue.try_send(message) {
                Ok(()) => return wait.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok(),
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(back)) if Instant::now() < deadline => {
                    message = back;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TrySendError::Full(_)) => return false,
            }
        }
    }
}

/// Starts the thread. It ends when every sender is gone. Only the log of the process reports what was suppressed and dropped.
pub(super) fn start(queue: usize, sink: Box<dyn Write + Send>, reports: bool) -> Result<LineSender, TelemetryError> {
    let (sender, receiver) = sync_channel(queue);
    let lost = Arc::new(Lost::default());
    let writer = Writer { receiver, sink, lost: Arc::clone(&lost), batch: String::with_capacity(BATCH), lines: 0, healthy: true, reports };
    std::thread::Builder::new().name("log".into()).spawn(move || writer.run()).map_err(TelemetryError::LogThread)?;
    Ok(LineSender { queue: sender, lost })
}

struct Writer {
    receiver: Receiver<Message>,
    sink: Box<dyn Write + Send>,
    lost: Arc<Lost>,
    batch: String,
    lines: u64,
    /// Whether the sink took the last batch.
    healthy: bool,
    reports: bool,
}

impl Writer {
    fn run(mut self) {
        let mut reported = Instant::now();
        loop {
            match self.receiver.recv_timeout(REPORT_EVERY) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while self.batch.len() < BATCH {
                let Ok(message) = self.receiver.try_recv() else { break };
                self.take(message);
            }
            self.write();
            if self.reports && reported.elapsed() >= REPORT_EVERY {
                reported = Instant::now();
                report_suppressed();
                self.report_lost();
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Line(line) => {
                self.batch.push_str(&line);
                self.lines += 1;
            }
            Message::Flush(done) => {
                self.write();
                // Whoever asked may have given up waiting.
                let _ = done.try_send(());
            }
        }
    }

    /// Writes the batch. Lines that the sink refuses (closed pipe, full disk) are lost and counted; the next batch tries again.
    fn write(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        self.healthy = write_all(&mut *self.sink, self.batch.as_bytes()).is_ok();
        if !self.healthy {
            self.lost.add(self.lines);
        }
        self.batch.clear();
        self.lines = 0;
    }

    /// Says how many lines are missing, once the sink takes lines again.
    fn report_lost(&self) {
        let lost = if self.healthy { self.lost.lines.swap(0, Ordering::Relaxed) } else { 0 };
        if lost > 0 {
            tracing::warn!(target: "culvert::telemetry", lines = lost, "log lines were dropped: their reader was too slow or gone");
        }
    }
}

/// `write_all` and `flush` that wait out a sink in non-blocking mode, which standard output is when another process made it so.
fn write_all(sink: &mut dyn Write, mut bytes: &[u8]) -> std::io::Result<()> {
    let pause = |error: std::io::Error| match error.kind() {
        ErrorKind::Interrupted => Ok(()),
        ErrorKind::WouldBlock => {
            std::thread::sleep(Duration::from_millis(10));
            Ok(())
        }
        _ => Err(error),
    };
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) => pause(error)?,
        }
    }
    loop {
        match sink.flush() {
            Ok(()) => return Ok(()),
            Err(error) => pause(error)?,
        }
    }
}
