//! Memory of what is idle: many streams through a pair of proxies that has done nothing else, compared with the same pair before.

use std::time::Duration;

use super::figure::{Figure, Quantity};
use super::load::Held;
use super::measure::steady_memory;
use super::options::{Contestant, Kind, Options};
use super::stand::{Site, Stand, Wanted};
use super::trial::Sample;

/// Memory that does not come to rest is taken as it is after this long.
const AT_MOST: Duration = Duration::from_secs(30);
const MIB: u32 = 1 << 20;
/// Every stream has a tunnel of its own then.
const ONE_STREAM_PER_TUNNEL: &[(&str, &str)] = &[("POOL_MAX_STREAMS_PER_CONNECTION", "1")];

/// Open files of a process besides its streams.
const OTHER_FILES: u64 = 200;

/// How many files each process should be allowed to open.
pub(super) fn open_files(options: &Options) -> u64 {
    2 * options.streams as u64 + OTHER_FILES
}

/// How many files the process with the most of them opens for a figure.
pub(super) fn open_files_of(figure: Figure, contestant: &Contestant, options: &Options) -> u64 {
    let streams = if figure == Figure::MemoryStreams { options.streams } else { few(options) } as u64;
    // A connection on either side for each stream; a proxy's streams share tunnels.
    let each = if matches!(contestant.kind, Kind::Floor(_)) || figure == Figure::MemoryTunnels { 2 } else { 1 };
    each * streams + OTHER_FILES
}

fn few(options: &Options) -> usize {
    (options.streams / 10).max(1)
}

/// Bytes per stream on the client's and on the server's side.
type PerSide = [f64; 2];

/// Takes a figure of memory. The sentence says why it could not be taken.
pub(super) async fn take(figure: Figure, site: &Site, contestant: &Contestant, options: &Options) -> Result<Sample, String> {
    let mut sample = Sample::default();
    let few = few(options);
    let shared = Wanted { contestant, options, extra: &[] };
    match figure {
        Figure::MemoryStreams => note(&mut sample, hold(site, shared, options.streams, Some(MIB)).await?),
        Figure::MemoryMoved => note(&mut sample, hold(site, shared, few, Some(12 * MIB)).await?),
        Figure::MemoryTunnels => {
            let (stream, _) = hold(site, shared, few, None).await?;
            let (both, _) = hold(site, Wanted { extra: ONE_STREAM_PER_TUNNEL, ..shared }, few, None).await?;
            let [client, server] = [both[0] - stream[0], both[1] - stream[1]];
            note(&mut sample, ([client, server], None));
        }
        _ => return Err("it is not of memory".to_owned()),
    }
    Ok(sample)
}

fn note(sample: &mut Sample, (idle, moved): (PerSide, Option<PerSide>)) {
    sample.add(Quantity::IdleBytesClientSide, idle[0]);
    sample.add(Quantity::IdleBytesServerSide, idle[1]);
    if let Some(moved) = moved {
        sample.add(Quantity::MovedBytesClientSide, moved[0]);
        sample.add(Quantity::MovedBytesServerSide, moved[1]);
    }
}

/// What each of `streams` idle streams costs, after one request, and after moving bytes both ways.
async fn hold(site: &Site, wanted: Wanted<'_>, streams: usize, moves: Option<u32>) -> Result<(PerSide, Option<PerSide>), String> {
    let mut stand = Stand::build(site, wanted).await.map_err(|error| error.to_string())?;
    let outcome = hold_in(&stand, wanted.options.steady, streams, moves).await;
    let outcome = stand.ended().map_or(outcome, Err);
    stand.stop().await;
    outcome
}

async fn hold_in(stand: &Stand, steady: Duration, streams: usize, moves: Option<u32>) -> Result<(PerSide, Option<PerSide>), String> {
    let pids = stand.pids()?;
    let held = Held::start(&stand.client, stand.server);
    // The first stream brings certificates, the tunnel, and what is made on first use.
    held.open(1).await?;
    let before = steady_memory(&pids, steady, AT_MOST).await?;
    held.open(streams).await?;
    let idle = each(&before, &steady_memory(&pids, steady, AT_MOST).await?, streams)?;
    let Some(bytes) = moves else { return Ok((idle, None)) };
    held.move_each(bytes).await?;
    let moved = each(&before, &steady_memory(&pids, steady, AT_MOST).await?, streams)?;
    Ok((idle, Some(moved)))
}

#[allow(clippy::cast_precision_loss)] // Memory is far below 2^52 bytes.
fn each(before: &[u64], after: &[u64], streams: usize) -> Result<PerSide, String> {
    match (before, after) {
        ([client, server], [client_now, server_now]) => {
            Ok([(client, client_now), (server, server_now)].map(|(old, new)| (*new as f64 - *old as f64) / streams as f64))
        }
        _ => Err("there are not two processes".to_owned()),
    }
}
