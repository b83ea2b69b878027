//! The file of revocation lists, looked at four times a second. It is not watched: a look is one system call, and works wherever the file is (a
//! ConfigMap, whose directory is swapped under its name, or a network mount), while a list must cut tunnels within a second.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::list::Lists;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// A file that never stops changing is read all the same after so many looks.
const PATIENCE: u32 = 8;
/// A longer file is a mistake: a million certificates are half of it.
const LONGEST: u64 = 64 << 20;

/// Why a file cannot be used.
#[derive(Debug)]
pub(super) struct Unusable(pub(super) String);

/// What tells one content from another: length, time of change, inode. `None`: there is no such file.
type Stamp = Option<(u64, SystemTime, u64)>;

/// The file and what was last seen of it.
pub(super) struct File {
    path: PathBuf,
    loaded: Stamp,
}

impl File {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, loaded: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it as it is. `None`: there is none.
    pub(super) fn load(&mut self) -> Result<Option<Lists>, Unusable> {
        // Before the content, so that a change between the two is seen at the next look.
        self.loaded = stamp(&self.path);
        read(&self.path)
    }

    /// Waits until it has changed and stands still, so that nobody reads the half of it, and reads it.
    pub(super) async fn changed(&mut self) -> Result<Option<Lists>, Unusable> {
        let (mut candidate, mut looks) = (self.loaded, 0);
        loop {
            tokio::time::sleep(LOOK).await;
            let path = self.path.clone();
            let Ok(seen) = tokio::task::spawn_blocking(move || stamp(&path)).await else { continue };
            if seen == self.loaded {
                (candidate, looks) = (seen, 0);
                continue;
            }
            looks += 1;
            if seen != candidate && looks < PATIENCE {
                candidate = seen;
                continue;
            }
            self.loaded = seen;
            let path = self.path.clone();
            let content = tokio::task::spawn_blocking(move || read(&path)).await;
            return content.unwrap_or_else(|error| Err(Unusable(error.to_string())));
        }
    }
}

fn stamp(path: &Path) -> Stamp {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.len(), metadata.modified().ok()?, metadata.ino()))
}

fn read(path: &Path) -> Result<Option<Lists>, Unusable> {
    let unusable = |error: std::io::Error| Unusable(format!("it cannot be read: {error}"));
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unusable(error)),
    };
    if length > LONGEST {
        return Err(Unusable(format!("it has {length} bytes, more than the {LONGEST} allowed")));
    }
    let content = std::fs::read(path).map_err(unusable)?;
    Lists::parse(&content).map(Some).map_err(Unusable)
}
