//! Limits of this process: how many files it may open, and how many it has open.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit and returns both, `(soft, hard)`. Every connection of a node's pods costs
/// two or three descriptors; the usual soft limit of 1024 would be reached at once.
///
/// # Errors
/// Those of `getrlimit(2)` and `setrlimit(2)`.
pub fn raise_nofile() -> io::Result<(u64, u64)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok((hard, hard))
}

/// Raises the soft limit of open files to `wanted`, and the hard limit too where this process may; children inherit both. Returns what the
/// soft limit is now: less than `wanted` without `CAP_SYS_RESOURCE` and with a lower hard limit.
///
/// # Errors
/// Those of `getrlimit(2)`.
pub fn raise_nofile_towards(wanted: u64) -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// How many descriptors this process has open, from `/proc/self/fd`; 0 if that cannot be read.
#[must_use]
pub fn open_files() -> usize {
    // The directory being read is itself one of them.
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_limit() {
        let (soft, hard) = raise_nofile().unwrap();
        assert_eq!(soft, hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }

    #[test]
    fn a_wish_within_the_hard_limit_is_granted_and_never_lowers_it() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(raise_nofile_towards(hard).unwrap() >= hard);
        assert!(raise_nofile_towards(64).unwrap() >= hard);
    }

    #[test]
    fn open_files_are_counted() {
        assert!(open_files() >= 3);
    }
}
