//! What processes have used, from `/proc`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// CPU of some processes, and of the machine, up to a moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Reading {
    /// Nanoseconds on a CPU of each thread that lives.
    threads: BTreeMap<(i32, u64), u64>,
    /// Clock ticks in user and in system mode of the whole processes.
    user: u64,
    system: u64,
    machine: Machine,
}

#[derive(Debug, Clone, Copy, Default)]
struct Machine {
    total: u64,
    stolen: u64,
}

/// CPU between two readings.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Used {
    /// Seconds; exact (`schedstat`), but for threads that have ended in between.
    pub(super) seconds: f64,
    /// The share of it in user mode, 0 to 1, sampled by the kernel's clock.
    pub(super) user_share: f64,
    /// Per cent of the machine's time that the hypervisor gave to others.
    pub(super) stolen_percent: f64,
}

impl Reading {
    /// Reads now. The sentence says which process cannot be read.
    pub(super) fn now(pids: &[i32]) -> Result<Self, String> {
        let mut reading = Self::default();
        for pid in pids {
            let gone = |error: std::io::Error| format!("cannot read the CPU time of process {pid}: {error}");
            for entry in std::fs::read_dir(format!("/proc/{pid}/task")).map_err(gone)? {
                let path = entry.map_err(gone)?.path();
                let thread = path.file_name().and_then(|name| name.to_str()?.parse().ok()).unwrap_or(0);
                // A thread may end while we look.
                let Ok(text) = std::fs::read_to_string(path.join("schedstat")) else { continue };
                let nanoseconds = text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
                reading.threads.insert((*pid, thread), nanoseconds);
            }
            let (user, system) = ticks(&std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(gone)?);
            reading.user += user;
            reading.system += system;
        }
        reading.machine = machine(&std::fs::read_to_string("/proc/stat").map_err(|error| format!("cannot read /proc/stat: {error}"))?);
        Ok(reading)
    }

    /// What was used since an earlier reading of the same processes.
    #[allow(clippy::cast_precision_loss)] // Nanoseconds of a trial are far below 2^52.
    pub(super) fn since(&self, earlier: &Self) -> Used {
        let nanoseconds: u64 = self.threads.iter().map(|(thread, now)| now.saturating_sub(earlier.threads.get(thread).copied().unwrap_or(0))).sum();
        let (user, system) = (self.user.saturating_sub(earlier.user), self.system.saturating_sub(earlier.system));
        let total = self.machine.total.saturating_sub(earlier.machine.total).max(1);
        let stolen = self.machine.stolen.saturating_sub(earlier.machine.stolen);
        Used {
            seconds: nanoseconds as f64 / 1e9,
            user_share: user as f64 / (user + system).max(1) as f64,
            stolen_percent: stolen as f64 / total as f64 * 100.0,
        }
    }
}

/// Waits, for at most `limit`, until these processes hardly do anything: what a trial has left behind is still its own.
pub(super) async fn quiet(pids: &[i32], limit: Duration) -> Result<Reading, String> {
    /// Of each look's 20 ms.
    const HARDLY: f64 = 0.000_2;
    let deadline = Instant::now() + limit;
    let mut last = Reading::now(pids)?;
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = Reading::now(pids)?;
        if now.since(&last).seconds <= HARDLY || Instant::now() >= deadline {
            return Ok(now);
        }
        last = now;
    }
}

/// Proportional set size of a process in bytes: what memory is its own, and its share of what it shares.
pub(super) fn memory(pid: i32) -> Result<u64, String> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))?;
    pss(&text).ok_or_else(|| format!("{path} has no line Pss"))
}

/// Memory of each process, when all of it has stayed the same (within 1 % or 128 KiB) for a while; when that does not happen within
/// `limit`, the last values.
pub(super) async fn steady_memory(pids: &[i32], steady: Duration, limit: Duration) -> Result<Vec<u64>, String> {
    const CLOSE: u64 = 128 * 1024;
    let read = || pids.iter().map(|pid| memory(*pid)).collect::<Result<Vec<u64>, String>>();
    let near = |old: &u64, new: &u64| old.abs_diff(*new) <= CLOSE.max(old / 100);
    let began = Instant::now();
    let (mut held, mut since) = (read()?, Instant::now());
    loop {
        tokio::time::sleep((steady / 8).min(Duration::from_millis(250))).await;
        let now = read()?;
        if !held.iter().zip(&now).all(|(old, new)| near(old, new)) {
            (held, since) = (now, Instant::now());
        } else if since.elapsed() >= steady || began.elapsed() >= limit {
            return Ok(now);
        }
    }
}

/// utime and stime of `/proc/PID/stat`.
fn ticks(stat: &str) -> (u64, u64) {
    // The name may contain anything, so count from its closing bracket: field 3 is the first word after it.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().skip(11).map(|word| word.parse().unwrap_or(0));
    (fields.next().unwrap_or(0), fields.next().unwrap_or(0))
}

/// All time and stolen time of the first line of `/proc/stat`.
fn machine(stat: &str) -> Machine {
    // user nice system idle iowait irq softirq steal; guest time is part of user time.
    let first: Vec<u64> = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8).map(|word| word.parse().unwrap_or(0)).collect();
    Machine { total: first.iter().sum(), stolen: first.get(7).copied().unwrap_or(0) }
}

fn pss(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_kernels_files_are_read_as_they_are_written() {
        assert_eq!(ticks("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 111 222 0 0 20"), (111, 222));
        let seen = machine("cpu  10 1 20 60 2 3 4 5 99 98\ncpu0 1 1 1 1 1 1 1 1\n");
        assert_eq!((seen.total, seen.stolen), (105, 5));
        assert_eq!(pss("00400000-7fff ---p 0 00:00 0 [rollup]\nRss: 9 kB\nPss:   12 kB\nPss_Dirty: 3 kB\n"), Some(12 * 1024));
        assert_eq!(pss("Rss: 9 kB\n"), None);
    }

    #[test]
    fn work_of_this_process_is_seen_and_a_missing_process_is_an_error() {
        let own = i32::try_from(std::process::id()).unwrap();
        let before = Reading::now(&[own]).unwrap();
        let (start, mut word) = (Instant::now(), 1_u64);
        while start.elapsed() < Duration::from_millis(50) {
            word = std::hint::black_box(word.wrapping_mul(3));
        }
        let used = Reading::now(&[own]).unwrap().since(&before);
        // Other tests run beside; this thread alone had up to 50 ms.
        assert!(used.seconds > 0.005, "{used:?}");
        assert!((0.0..=1.0).contains(&used.user_share), "{used:?}");
        assert!(memory(own).unwrap() > 1 << 20);
        assert!(Reading::now(&[i32::MAX]).unwrap_err().contains("2147483647"));
    }

    #[test]
    fn a_thread_that_began_in_between_counts_in_full_and_one_that_ended_not_at_all() {
        let reading =
            |threads: &[(u64, u64)]| Reading { threads: threads.iter().map(|(id, time)| ((1, *id), *time)).collect(), ..Reading::default() };
        let before = reading(&[(1, 1_000_000_000), (2, 5_000_000_000)]);
        let after = reading(&[(1, 1_500_000_000), (3, 250_000_000)]);
        assert_eq!(after.since(&before).seconds, 0.75);
    }
}
