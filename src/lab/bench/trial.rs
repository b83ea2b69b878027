//! One trial: load through a stand, and what its proxies used for it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::figure::{Figure, Quantity};
use super::load::{Job, Load, Watch, run};
use super::measure::{Reading, Used, quiet};
use super::stand::Stand;

/// What a trial leaves to do may go on for at most this long.
const AFTERWARDS: Duration = Duration::from_secs(1);
/// A bulk stream is under way once it has sent this much.
const UNDER_WAY: u64 = 4 << 20;
/// What a paced stream keeps to, bytes per second: 2 Gbit/s, far below what two CPUs carry.
const PACE: u64 = 250_000_000;
/// Decimal gigabyte.
const GB: f64 = 1e9;

/// The numbers of one trial.
#[derive(Debug, Default)]
pub(super) struct Sample {
    pub(super) values: Vec<(Quantity, f64)>,
    /// Per cent of the machine that was given to others meanwhile.
    pub(super) stolen_percent: f64,
}

impl Sample {
    pub(super) fn add(&mut self, quantity: Quantity, value: f64) {
        self.values.push((quantity, value));
    }
}

/// Takes a figure once; not one of memory. The sentence says why it could not be taken.
pub(super) async fn take(figure: Figure, stand: &Stand, lasts: Duration) -> Result<Sample, String> {
    let sample = match figure {
        Figure::Bulk { streams, up } => bulk(stand, stand.server, Job::Bulk { streams: streams.into(), up, pace: None, lasts }).await,
        Figure::PassthroughBulk { up } => bulk(stand, stand.outside, Job::Bulk { streams: 1, up, pace: None, lasts }).await,
        Figure::Requests { connections } => requests(stand, stand.server, Job::Requests { connections: connections.into(), lasts }).await,
        Figure::PassthroughRequests => requests(stand, stand.outside, Job::Requests { connections: 1, lasts }).await,
        Figure::Connections => requests(stand, stand.server, Job::Connections { at_once: 16, lasts }).await,
        Figure::Beside { paced } => beside(stand, lasts, paced.then_some(PACE)).await,
        Figure::MemoryStreams | Figure::MemoryMoved | Figure::MemoryTunnels => Err("it is not taken in trials".to_owned()),
    };
    // Why the connections failed is then a consequence.
    stand.ended().map_or(sample, Err)
}

async fn measured(stand: &Stand, server: SocketAddr, job: Job) -> Result<(Load, Used), String> {
    let pids = stand.pids()?;
    let before = Reading::now(&pids)?;
    let load = run(&stand.client, server, job, Arc::default()).await?;
    let used = quiet(&pids, AFTERWARDS).await?.since(&before);
    Ok((load, used))
}

#[allow(clippy::cast_precision_loss)] // Bytes of a trial are far below 2^52.
async fn bulk(stand: &Stand, server: SocketAddr, job: Job) -> Result<Sample, String> {
    let (load, used) = measured(stand, server, job).await?;
    let gigabytes = load.bytes as f64 / GB;
    if gigabytes <= 0.0 {
        return Err("not one byte arrived".to_owned());
    }
    let mut sample = Sample { stolen_percent: used.stolen_percent, ..Sample::default() };
    sample.add(Quantity::GbitPerSecond, gigabytes * 8.0 / load.elapsed.as_secs_f64());
    if stand.has_proxies() {
        let each = used.seconds / gigabytes;
        sample.add(Quantity::CpuSecondsPerGb, each);
        sample.add(Quantity::UserSecondsPerGb, each * used.user_share);
        sample.add(Quantity::SystemSecondsPerGb, each * (1.0 - used.user_share));
    }
    Ok(sample)
}

#[allow(clippy::cast_precision_loss)] // Requests of a trial are far below 2^52.
async fn requests(stand: &Stand, server: SocketAddr, job: Job) -> Result<Sample, String> {
    let (mut load, used) = measured(stand, server, job).await?;
    if load.requests == 0 {
        return Err("not one request was answered".to_owned());
    }
    let mut sample = Sample { stolen_percent: used.stolen_percent, ..Sample::default() };
    sample.add(Quantity::PerSecond, load.requests as f64 / load.elapsed.as_secs_f64());
    sample.add(Quantity::P50Microseconds, load.latencies.percentile(0.5));
    sample.add(Quantity::P99Microseconds, load.latencies.percentile(0.99));
    if stand.has_proxies() {
        let each = used.seconds / load.requests as f64 * 1000.0;
        sample.add(Quantity::CpuSecondsPer1000, each);
        sample.add(Quantity::UserSecondsPer1000, each * used.user_share);
        sample.add(Quantity::SystemSecondsPer1000, each * (1.0 - used.user_share));
    }
    Ok(sample)
}

/// Requests alone, then the same requests while a bulk stream goes on.
async fn beside(stand: &Stand, lasts: Duration, pace: Option<u64>) -> Result<Sample, String> {
    let job = Job::Requests { connections: 1, lasts };
    let before = Reading::now(&[])?;
    let mut alone = run(&stand.client, stand.server, job, Arc::default()).await?;
    let watch = Arc::new(Watch::default());
    let stream = Job::Bulk { streams: 1, up: true, pace, lasts: lasts * 10 + AFTERWARDS * 10 };
    let (with, stream) = tokio::join!(
        async {
            let outcome = match under_way(&watch).await {
                Ok(()) => run(&stand.client, stand.server, job, Arc::default()).await,
                Err(sentence) => Err(sentence),
            };
            watch.stop.store(true, Ordering::Relaxed);
            outcome
        },
        run(&stand.client, stand.server, stream, Arc::clone(&watch)),
    );
    let stream = stream.map_err(|sentence| format!("the bulk stream: {sentence}"))?;
    let mut with = with?;
    if alone.requests == 0 || with.requests == 0 {
        return Err("not one request was answered".to_owned());
    }
    let mut sample = Sample { stolen_percent: Reading::now(&[])?.since(&before).stolen_percent, ..Sample::default() };
    let [p50, p99] = [0.5, 0.99].map(|share| (with.latencies.percentile(share), alone.latencies.percentile(share)));
    sample.add(Quantity::P50Microseconds, p50.0);
    sample.add(Quantity::P99Microseconds, p99.0);
    sample.add(Quantity::P50AloneMicroseconds, p50.1);
    sample.add(Quantity::P99AloneMicroseconds, p99.1);
    sample.add(Quantity::P50TimesAlone, p50.0 / p50.1.max(0.1));
    sample.add(Quantity::P99TimesAlone, p99.0 / p99.1.max(0.1));
    #[allow(clippy::cast_precision_loss)] // Bytes of a trial are far below 2^52.
    sample.add(Quantity::GbitPerSecond, stream.bytes as f64 * 8.0 / GB / stream.elapsed.as_secs_f64());
    Ok(sample)
}

async fn under_way(watch: &Watch) -> Result<(), String> {
    let deadline = Instant::now() + AFTERWARDS * 10;
    while watch.sent.load(Ordering::Relaxed) < UNDER_WAY {
        if Instant::now() > deadline {
            return Err("the bulk stream does not get under way".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}
