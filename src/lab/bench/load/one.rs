//! One trial without a bench around it, from where the process is: between two pods of a cluster, where a script is the bench.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::client::{Job, Load, perform_within};

/// What is done on each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Bytes to the server.
    BulkUp,
    /// Bytes from the server.
    BulkDown,
    /// Requests of 1 KiB with answers of 1 KiB, one after another.
    Requests,
    /// Connect, one such request, close; again and again.
    Connections,
}

/// Puts load on a server (see [`super::serve`]) and says what came of it: names with their values. Gigabytes are decimal, latencies
/// microseconds.
///
/// # Errors
/// When a connection fails, or what arrives is not what was sent.
pub fn run_one(server: SocketAddr, kind: Kind, connections: usize, lasts: Duration) -> io::Result<Vec<(&'static str, f64)>> {
    let job = match kind {
        Kind::BulkUp | Kind::BulkDown => Job::Bulk { streams: connections, up: kind == Kind::BulkUp, pace: None, lasts },
        Kind::Requests => Job::Requests { connections, lasts },
        Kind::Connections => Job::Connections { at_once: connections, lasts },
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(words(runtime.block_on(perform_within(server, job, Arc::default()))?))
}

#[allow(clippy::cast_precision_loss)] // Bytes and requests of a trial are far below 2^52.
fn words(mut load: Load) -> Vec<(&'static str, f64)> {
    let seconds = load.elapsed.as_secs_f64();
    if load.requests == 0 {
        let gigabytes = load.bytes as f64 / 1e9;
        return vec![("gigabytes", gigabytes), ("gbit_per_s", gigabytes * 8.0 / seconds)];
    }
    let requests = load.requests as f64;
    let [p50, p99] = [0.5, 0.99].map(|share| load.latencies.percentile(share));
    vec![("requests", requests), ("per_s", requests / seconds), ("p50_us", p50), ("p99_us", p99)]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn bulk_is_told_in_bytes_and_requests_in_latencies() {
        let second = Duration::from_secs(2);
        let bulk = words(Load { bytes: 500_000_000, elapsed: second, ..Load::default() });
        assert_eq!(bulk, [("gigabytes", 0.5), ("gbit_per_s", 2.0)]);
        let mut load = Load { requests: 100, elapsed: second, ..Load::default() };
        (1..=100).for_each(|micros| load.latencies.note(Duration::from_micros(micros)));
        assert_eq!(words(load), [("requests", 100.0), ("per_s", 50.0), ("p50_us", 50.0), ("p99_us", 99.0)]);
    }
}
