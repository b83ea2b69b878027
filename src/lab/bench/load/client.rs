//! The asking end of the load: one trial is one thread, born inside the client pod's namespace.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::super::statistics::Latencies;
use super::bulk::{Received, send};
use super::{Ask, REQUEST, Seat, is_pattern, request, wrong};
use crate::sys::process::pin;

/// Beyond a trial's own time, connecting and the last bytes may take this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// What one trial does.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Job {
    /// Bytes one way on so many connections.
    Bulk {
        /// Connections.
        streams: usize,
        /// To the server, or from it.
        up: bool,
        /// Bytes per second that each connection to the server keeps to.
        pace: Option<u64>,
        /// How long.
        lasts: Duration,
    },
    /// Requests one after another on each of so many connections.
    Requests {
        /// Connections.
        connections: usize,
        /// How long.
        lasts: Duration,
    },
    /// Connect, one request, its answer, close; so many at once.
    Connections {
        /// At once.
        at_once: usize,
        /// How long.
        lasts: Duration,
    },
}

impl Job {
    fn lasts(&self) -> Duration {
        match self {
            Self::Bulk { lasts, .. } | Self::Requests { lasts, .. } | Self::Connections { lasts, .. } => *lasts,
        }
    }
}

/// What one trial did.
#[derive(Debug, Default)]
pub(in super::super) struct Load {
    /// Bytes of bulk that arrived.
    pub(in super::super) bytes: u64,
    /// Requests that were answered.
    pub(in super::super) requests: u64,
    /// From the first byte on until everything had arrived; connecting is not in it, but for new connections.
    pub(in super::super) elapsed: Duration,
    /// Of every request; of a new connection with its connecting.
    pub(in super::super) latencies: Latencies,
}

/// A look at a trial that goes on, and its early end.
#[derive(Debug, Default)]
pub(in super::super) struct Watch {
    /// Bytes of bulk that were written.
    pub(in super::super) sent: AtomicU64,
    /// Sending bulk stops.
    pub(in super::super) stop: AtomicBool,
}

/// Runs a job from inside a namespace against a server; the sentence says what did not work.
pub(in super::super) async fn run(seat: &Seat, server: SocketAddr, job: Job, watch: Arc<Watch>) -> Result<Load, String> {
    on_own_thread(seat, "load", perform_within(server, job, watch)).await?.map_err(|error| error.to_string())
}

/// Runs a job from where the calling thread is; it ends, with or without the server.
pub(super) async fn perform_within(server: SocketAddr, job: Job, watch: Arc<Watch>) -> io::Result<Load> {
    let outcome = tokio::time::timeout(job.lasts() + PATIENCE, perform(server, job, watch)).await;
    outcome.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the connections do not end")))
}

/// Runs work on a thread that is inside a namespace from its birth to its end, on a runtime of its own.
pub(super) async fn on_own_thread<T, F>(seat: &Seat, name: &str, work: F) -> Result<T, String>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let Seat { netns, cpu } = seat.clone();
    let (tell, told) = oneshot::channel();
    let body = move || {
        let pinned = cpu.map_or(Ok(()), |cpu| pin(0, cpu));
        let inside = || pinned.and_then(|()| Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)));
        tell.send(netns.run(inside).and_then(|outcome: io::Result<T>| outcome)).ok();
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|error| format!("cannot start a thread: {error}"))?;
    let outcome = told.await.map_err(|_| "the load's thread has ended without a word".to_owned())?;
    outcome.map_err(|error| format!("cannot run load in the pod: {error}"))
}

async fn perform(server: SocketAddr, job: Job, watch: Arc<Watch>) -> io::Result<Load> {
    match job {
        Job::Bulk { streams, up, pace, lasts } => {
            let open = connect_all(server, streams).await?;
            let start = Instant::now();
            let deadline = start + lasts;
            if up {
                all(start, open.into_iter().map(|stream| upload(stream, deadline, pace, Arc::clone(&watch)))).await
            } else {
                all(start, open.into_iter().map(|stream| download(stream, deadline))).await
            }
        }
        Job::Requests { connections, lasts } => {
            let open = connect_all(server, connections).await?;
            let start = Instant::now();
            all(start, open.into_iter().map(|stream| requests(stream, start + lasts))).await
        }
        Job::Connections { at_once, lasts } => {
            let start = Instant::now();
            all(start, (0..at_once).map(|_| connections(server, start + lasts))).await
        }
    }
}

/// Runs every part at once and adds up what they did.
async fn all<F>(start: Instant, parts: impl Iterator<Item = F>) -> io::Result<Load>
where
    F: Future<Output = io::Result<Load>> + Send + 'static,
{
    let mut running: JoinSet<io::Result<Load>> = parts.collect();
    let mut sum = Load::default();
    while let Some(ended) = running.join_next().await {
        let part = ended.map_err(io::Error::other)??;
        sum.bytes += part.bytes;
        sum.requests += part.requests;
        sum.latencies.extend(part.latencies);
    }
    sum.elapsed = start.elapsed();
    Ok(sum)
}

pub(super) async fn connect(server: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(server).await.map_err(|error| io::Error::new(error.kind(), format!("cannot connect to {server}: {error}")))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn connect_all(server: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    let mut open = Vec::with_capacity(count);
    for _ in 0..count {
        open.push(connect(server).await?);
    }
    Ok(open)
}

async fn download(mut stream: TcpStream, deadline: Instant) -> io::Result<Load> {
    let nanoseconds = u64::try_from(deadline.saturating_duration_since(Instant::now()).as_nanos()).unwrap_or(u64::MAX);
    stream.write_all(&Ask::Give { nanoseconds }.head()).await?;
    let bytes = Received::default().all(&mut stream).await?.counted()?;
    Ok(Load { bytes, ..Load::default() })
}

async fn upload(mut stream: TcpStream, deadline: Instant, pace: Option<u64>, watch: Arc<Watch>) -> io::Result<Load> {
    stream.write_all(&Ask::Take.head()).await?;
    let mut before = 0;
    let go_on = |sent: u64| {
        watch.sent.fetch_add(sent - before, Ordering::Relaxed);
        before = sent;
        Instant::now() < deadline && !watch.stop.load(Ordering::Relaxed)
    };
    let bytes = send(&mut stream, pace, go_on).await?;
    stream.shutdown().await?;
    let mut count = [0; 8];
    stream.read_exact(&mut count).await?;
    if u64::from_le_bytes(count) == bytes { Ok(Load { bytes, ..Load::default() }) } else { Err(wrong("bulk")) }
}

/// One request and its answer; the answer must be right.
pub(super) async fn exchange(stream: &mut TcpStream, request: &[u8], answer: &mut [u8]) -> io::Result<()> {
    stream.write_all(request).await?;
    stream.read_exact(answer).await.map_err(|error| io::Error::new(error.kind(), format!("a request was not answered: {error}")))?;
    if is_pattern(0, answer) { Ok(()) } else { Err(wrong("an answer")) }
}

async fn requests(mut stream: TcpStream, deadline: Instant) -> io::Result<Load> {
    let (request, mut answer) = (request(), vec![0; REQUEST]);
    let mut load = Load::default();
    loop {
        let before = Instant::now();
        if before >= deadline {
            load.requests = load.latencies.count();
            return Ok(load);
        }
        exchange(&mut stream, &request, &mut answer).await?;
        load.latencies.note(before.elapsed());
    }
}

async fn connections(server: SocketAddr, deadline: Instant) -> io::Result<Load> {
    let (request, mut answer) = (request(), vec![0; REQUEST]);
    let mut load = Load::default();
    loop {
        let before = Instant::now();
        if before >= deadline {
            load.requests = load.latencies.count();
            return Ok(load);
        }
        let mut stream = connect(server).await?;
        exchange(&mut stream, &request, &mut answer).await?;
        load.latencies.note(before.elapsed());
        // In good order: our end, then the server's.
        stream.shutdown().await?;
        if stream.read(&mut answer).await? != 0 {
            return Err(wrong("the end of a connection"));
        }
    }
}

#[cfg(test)]
mod tests;
