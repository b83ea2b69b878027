//! Noticing that a file may say something else. Directories are watched, not the file, so that a file renamed over it and a
//! swapped symbolic link anywhere on its path (as Kubernetes does with mounted ConfigMaps) are seen too. Where the kernel tells
//! nothing (no inotify instance left, a network file system, a bind mount) the file's metadata is looked at from time to time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

/// How often to look at a file that is watched: for changes that the watch cannot see.
const SLOW_POLL: Duration = Duration::from_secs(2);

/// A file that is never left alone is read after this time all the same.
const LONGEST_WRITE: Duration = Duration::from_secs(2);

/// A file that was written to and not closed yet gets this many quiet times.
const PATIENCE: u32 = 4;

/// As many links as the kernel follows on one path.
const MAX_LINKS: usize = 40;

/// Signals wait here; a burst beyond it says nothing new.
const MAX_SIGNALS: usize = 64;

/// Identity, size and times of a file; equal ones say that nothing was written between two looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The fingerprint of what a path leads to; `None` if it leads nowhere.
pub(super) fn fingerprint(path: &Path) -> Option<Fingerprint> {
    let found = std::fs::metadata(path).ok()?;
    Some(Fingerprint {
        device: found.dev(),
        inode: found.ino(),
        size: found.size(),
        modified: (found.mtime(), found.mtime_nsec()),
        changed: (found.ctime(), found.ctime_nsec()),
    })
}

/// Which entries of which directories decide what a path leads to. The paths of the directories are without symbolic links.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Places(BTreeMap<PathBuf, Directory>);

/// One directory of [`Places`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct Directory {
    /// Device and inode: a directory put in place of another one makes a difference.
    identity: Option<(u64, u64)>,
    names: BTreeSet<OsString>,
}

impl Places {
    pub(super) fn of(path: &Path) -> Self {
        let mut places = Self::default();
        let names = |path: &Path| -> VecDeque<OsString> {
            let kept = path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
            kept.map(|part| part.as_os_str().to_owned()).collect()
        };
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let (mut here, mut ahead, mut links) = (PathBuf::from("/"), names(&absolute), 0);
        while let Some(name) = ahead.pop_front() {
            if name == ".." {
                here.pop();
                continue;
            }
            let next = here.join(&name);
            match std::fs::symlink_metadata(&next) {
                Ok(found) if found.is_symlink() && links < MAX_LINKS => {
                    links += 1;
                    places.add(&here, name);
                    let Ok(target) = std::fs::read_link(&next) else { break };
                    if target.is_absolute() {
                        here = PathBuf::from("/");
                    }
                    let mut longer = names(&target);
                    longer.append(&mut ahead);
                    ahead = longer;
                }
                Ok(_) if !ahead.is_empty() => here = next,
                _ => {
                    places.add(&here, name);
                    break;
                }
            }
        }
        places
    }

    fn add(&mut self, directory: &Path, name: OsString) {
        let identity = || std::fs::metadata(directory).ok().map(|found| (found.dev(), found.ino()));
        self.0.entry(directory.to_owned()).or_insert_with(|| Directory { identity: identity(), names: BTreeSet::new() }).names.insert(name);
    }

    pub(super) fn concerns(&self, path: &Path) -> bool {
        let entry = || Some(self.0.get(path.parent()?)?.names.contains(path.file_name()?));
        self.0.contains_key(path) || entry().unwrap_or(false)
    }
}

/// What the kernel told about an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    /// It is being written to.
    Writing,
    /// It was closed, replaced, removed, or may have been.
    Changed,
}

fn signal_of(kind: EventKind) -> Option<Signal> {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(Signal::Changed),
        // Our own reading.
        EventKind::Access(_) => None,
        EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_)) => Some(Signal::Writing),
        _ => Some(Signal::Changed),
    }
}

/// Begins to watch places and sends signals about them until the returned guard is dropped.
pub(super) type Watch = fn(&Places, mpsc::Sender<Signal>) -> notify::Result<Box<dyn Send>>;

fn watch(places: &Places, signals: mpsc::Sender<Signal>) -> notify::Result<Box<dyn Send>> {
    let concerned = places.clone();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let signal = match event {
            Ok(event) if event.paths.is_empty() || event.paths.iter().any(|path| concerned.concerns(path)) => signal_of(event.kind),
            Ok(_) => None,
            Err(_) => Some(Signal::Changed),
        };
        if let Some(signal) = signal {
            // If the queue is full, there is enough in it to make us look.
            let _ = signals.try_send(signal);
        }
    })?;
    for directory in places.0.keys() {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
    }
    Ok(Box::new(watcher))
}

/// Follows one path.
pub(super) struct Follower {
    path: PathBuf,
    quiet: Duration,
    poll: Duration,
    watch: Watch,
    watched: Option<(Places, Box<dyn Send>)>,
    refused: Option<Places>,
    sender: mpsc::Sender<Signal>,
    signals: mpsc::Receiver<Signal>,
}

impl Follower {
    /// Begins to follow: whatever happens from now on, the next [`Follower::changed`] tells.
    pub(super) fn new(path: PathBuf, quiet: Duration, poll: Duration) -> Self {
        Self::with(path, quiet, poll, watch)
    }

    pub(super) fn with(path: PathBuf, quiet: Duration, poll: Duration, watch: Watch) -> Self {
        let (sender, signals) = mpsc::channel(MAX_SIGNALS);
        let mut follower = Self { path, quiet, poll, watch, watched: None, refused: None, sender, signals };
        follower.arm();
        follower
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Watches what the path consists of now.
    fn arm(&mut self) {
        let places = Places::of(&self.path);
        let unchanged = |known: &Places| *known == places;
        if self.watched.as_ref().is_some_and(|(known, _)| unchanged(known)) || self.refused.as_ref().is_some_and(unchanged) {
            return;
        }
        match (self.watch)(&places, self.sender.clone()) {
            Ok(guard) => {
                self.watched = Some((places, guard));
                self.refused = None;
            }
            Err(error) => {
                if self.refused.is_none() {
                    let every = self.poll.as_millis();
                    tracing::warn!(path = %self.path.display(), "cannot watch the file ({error}); looking at it every {every} ms instead");
                }
                self.watched = None;
                self.refused = Some(places);
            }
        }
    }

    /// Resolves when the file may no longer say what it said when it had the fingerprint `read`, and has been left alone for a
    /// moment.
    pub(super) async fn changed(&mut self, read: Option<Fingerprint>) {
        self.arm();
        if fingerprint(&self.path) != read {
            return self.settle(Signal::Changed).await;
        }
        loop {
            let tick = Instant::now() + if self.watched.is_some() { SLOW_POLL } else { self.poll };
            tokio::select! {
                // Never `None`: we hold a sender ourselves.
                Some(signal) = self.signals.recv() => return self.settle(signal).await,
                () = sleep_until(tick) => {
                    self.arm();
                    if fingerprint(&self.path) != read {
                        return self.settle(Signal::Changed).await;
                    }
                }
            }
        }
    }

    /// Waits until nothing happened for a moment.
    async fn settle(&mut self, mut last: Signal) {
        let latest = Instant::now() + LONGEST_WRITE;
        loop {
            let patience = if last == Signal::Writing { self.quiet * PATIENCE } else { self.quiet };
            match timeout_at(latest.min(Instant::now() + patience), self.signals.recv()).await {
                Ok(Some(signal)) if Instant::now() < latest => last = signal,
                _ => return,
            }
        }
    }
}
