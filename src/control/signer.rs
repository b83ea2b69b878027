//! The CA that signs, followed while its directory changes: a root or an issuer is replaced without a restart.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::stats::Stats;
use super::tokens::{Fingerprint, fingerprint};
use crate::identity::{IdentityError, LocalIssuer};
use crate::lifecycle::Clock;

/// The files of a CA as they were last looked at.
type Stamps = [Option<Fingerprint>; LocalIssuer::FILES.len()];

/// The CA of a directory. What was signed before a change stays valid as long as its peers know its root: a root is replaced by putting both into
/// root-cert.pem first.
pub struct Signer {
    directory: PathBuf,
    clock: Clock,
    loaded: Stamps,
    current: ArcSwap<LocalIssuer>,
    generation: AtomicU64,
}

impl Signer {
    /// Reads the directory, as [`LocalIssuer::load`] does.
    ///
    /// # Errors
    /// [`IdentityError::LocalCa`] names the file, what is wrong with it and what to do.
    pub fn load(directory: &Path, clock: Clock) -> Result<Self, IdentityError> {
        // Before the content, so that a change between the two is seen at the next look.
        let loaded = stamps(directory);
        let current = ArcSwap::from_pointee(LocalIssuer::load(directory, clock.clone())?);
        Ok(Self { directory: directory.to_owned(), clock, loaded, current, generation: AtomicU64::new(0) })
    }

    /// The CA in force.
    pub(super) fn current(&self) -> Arc<LocalIssuer> {
        self.current.load_full()
    }

    /// Counts the CAs that were in force.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Looks at the directory this often and takes what has changed and then stood still for one look, so that nobody signs with the half of it. What
    /// cannot be used is complained about once and changes nothing. Never ends.
    pub(super) async fn follow(self: Arc<Self>, look: Duration, stats: Arc<Stats>) {
        let (mut loaded, mut candidate) = (self.loaded, self.loaded);
        loop {
            tokio::time::sleep(look).await;
            let directory = self.directory.clone();
            let Ok(seen) = tokio::task::spawn_blocking(move || stamps(&directory)).await else { continue };
            if seen == loaded || seen != candidate {
                candidate = seen;
                continue;
            }
            loaded = seen;
            let (directory, clock) = (self.directory.clone(), self.clock.clone());
            let Ok(outcome) = tokio::task::spawn_blocking(move || LocalIssuer::load(&directory, clock)).await else { continue };
            stats.ca_loaded(outcome.is_ok());
            match outcome {
                Ok(issuer) => {
                    tracing::info!(ca = ?issuer, "the CA was loaded again");
                    self.current.store(Arc::new(issuer));
                    self.generation.fetch_add(1, Ordering::Release);
                }
                Err(error) => tracing::error!("the CA's files were refused, the CA before stays: {error}"),
            }
        }
    }
}

fn stamps(directory: &Path) -> Stamps {
    LocalIssuer::FILES.map(|name| fingerprint(&directory.join(name)))
}

impl fmt::Debug for Signer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Signer").field("directory", &self.directory).field("current", &self.current()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_directory_in_the_middle_of_a_change_is_left_alone_until_it_stands_still() {
        let [directory, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for directory in [&directory, &other] {
            LocalIssuer::create(directory.path(), &Clock::system()).unwrap();
        }
        let signer = Arc::new(Signer::load(directory.path(), Clock::system()).unwrap());
        let stats = Arc::new(Stats::default());
        let seen = || (stats.ca_loads(), signer.generation());
        let second = Duration::from_secs(1);
        let following = tokio::spawn(signer.clone().follow(second, stats.clone()));
        tokio::time::sleep(second / 2).await;
        for name in LocalIssuer::FILES {
            std::fs::copy(other.path().join(name), directory.path().join(name)).unwrap();
            tokio::time::sleep(second).await;
        }
        assert_eq!(seen(), ((0, 0), 0), "half of it was read");
        tokio::time::sleep(second).await;
        assert_eq!(seen(), ((1, 0), 1));
        // Half of it for good: once, whatever the number of looks.
        std::fs::remove_file(directory.path().join(LocalIssuer::FILES[1])).unwrap();
        tokio::time::sleep(20 * second).await;
        assert_eq!(seen(), ((1, 1), 1));
        following.abort();
    }
}
