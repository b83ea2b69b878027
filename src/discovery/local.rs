//! The static source: a YAML file (`LOCAL_XDS_PATH`) that is loaded again whenever it changes, or a text (`LOCAL_XDS`)
//! (reference, dataplane §5.8).
//!
//! The file has the fields of the config dump: `workloads`, `services`, `policies`. Unknown fields are refused; a field that is
//! left out has the default that it has in xDS. A file with anything wrong in it is refused as a whole: half a mesh could be one
//! without its policies. At start that is an [`Error`]; later the old world stays, one line at level ERROR says why, and
//! [`ReloadStats`] counts it. Replace the file by renaming another one over it; a file that is written in place is read as soon
//! as its writer closes it.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::follow::{self, Fingerprint, Follower};
use super::form::{self, Rows};
use super::{Edit, Error, Mesh, Publisher, World};
use crate::lifecycle::Supervisor;
use crate::model::Text;

/// A larger file is refused: 100,000 workloads take about 60 MiB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Where the static configuration is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalSource {
    /// A file, followed for changes.
    Path(PathBuf),
    /// The text itself; it cannot change.
    Text(String),
}

/// How the static source is read.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this node; workloads of other nodes are then not local. Default: none, every workload is local.
    pub node: Option<Text>,
    /// How long a file must be left alone before it is read again. Default 30 ms, so that a save of several steps is one change
    /// and a policy still takes effect at once.
    pub quiet: Duration,
    /// How often to look at a file whose changes the kernel does not tell. Default 100 ms.
    pub poll: Duration,
    /// Where loads are counted.
    pub stats: Arc<ReloadStats>,
    /// Told if following the file ends while somebody still reads the mesh. Default: one that nobody listens to.
    pub supervisor: Supervisor,
}

impl Default for Config {
    fn default() -> Self {
        let (quiet, poll) = (Duration::from_millis(30), Duration::from_millis(100));
        Self { node: None, quiet, poll, stats: Arc::default(), supervisor: Supervisor::new() }
    }
}

/// How often the static configuration was read.
#[derive(Debug, Default)]
pub struct ReloadStats {
    /// Contents that were loaded, the first one included.
    pub loads: AtomicU64,
    /// Contents that were refused, and times the file could no longer be read. An unchanged bad content counts once.
    pub failures: AtomicU64,
}

/// Loads the source and, if it is a file, keeps following it in a supervised task that ends with the last [`Mesh`] handle: hold one until
/// [`Supervisor::stop`].
///
/// Fails if the source cannot be read or has anything wrong in it; the error names the line and the field.
pub async fn start(source: LocalSource, config: Config) -> Result<Mesh, Error> {
    let (mut publisher, mesh) = Publisher::fixed(config.node.clone());
    match source {
        LocalSource::Text(text) => {
            let rows = form::read(&text).map_err(|fault| refused("LOCAL_XDS", fault))?;
            publish(&mut publisher, rows, &config.stats);
        }
        LocalSource::Path(path) => {
            // Before the first look at the file, so that no change falls between the two.
            let follower = Follower::new(path.clone(), config.quiet, config.poll);
            let (reading, rows) = load(path.clone(), Reading::default()).await;
            let rows = rows.unwrap_or_else(|| Err(Error::Unreadable { path, reason: "reading it was interrupted".to_owned() }))?;
            publish(&mut publisher, rows, &config.stats);
            config.supervisor.supervise("static configuration", reload(publisher, follower, reading, config.stats));
        }
    }
    Ok(mesh)
}

/// What was read last.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Reading {
    fingerprint: Option<Fingerprint>,
    content: Option<Content>,
}

/// Content of a file, by its length and a hash, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Read(usize, u64),
    Unreadable(String),
}

impl Content {
    fn of(read: &std::io::Result<Vec<u8>>) -> Self {
        match read {
            Ok(bytes) => {
                let mut hasher = DefaultHasher::new();
                bytes.hash(&mut hasher);
                Self::Read(bytes.len(), hasher.finish())
            }
            Err(error) => Self::Unreadable(error.to_string()),
        }
    }
}

/// Publishes the file's changes until nobody reads them any more.
async fn reload(mut publisher: Publisher, mut follower: Follower, mut reading: Reading, stats: Arc<ReloadStats>) {
    loop {
        tokio::select! {
            () = publisher.abandoned() => return,
            () = follower.changed(reading.fingerprint) => {}
        }
        let rows;
        (reading, rows) = load(follower.path().to_owned(), reading).await;
        match rows {
            None => {}
            Some(Ok(rows)) => {
                // Connections are served meanwhile.
                let stats = stats.clone();
                let work = move || {
                    let changed = publish(&mut publisher, rows, &stats);
                    (publisher, changed)
                };
                let Ok((back, changed)) = tokio::task::spawn_blocking(work).await else { return };
                publisher = back;
                tracing::info!(path = %follower.path().display(), changed, "static configuration loaded again");
            }
            Some(Err(error)) => {
                stats.failures.fetch_add(1, Ordering::Relaxed);
                tracing::error!("static configuration refused, the old one stays: {error}");
            }
        }
    }
}

/// Makes the world what the rows say. Rows that are as they were cost nothing.
fn publish(publisher: &mut Publisher, rows: Rows, stats: &ReloadStats) -> bool {
    let edits = edits(&publisher.current(), rows);
    stats.loads.fetch_add(1, Ordering::Relaxed);
    publisher.publish(edits)
}

fn edits(world: &World, rows: Rows) -> Vec<Edit> {
    let uids: HashSet<Text> = rows.workloads.iter().map(|workload| workload.uid.clone()).collect();
    let services: HashSet<_> = rows.services.iter().map(|service| service.key()).collect();
    let policies: HashSet<Text> = rows.policies.iter().map(|policy| policy.key()).collect();
    let gone = world.snapshot.workloads().filter(|workload| !uids.contains(&workload.uid)).map(|workload| Edit::Remove(workload.uid.clone()));
    let gone_services = world.snapshot.services().map(|service| service.key()).filter(|key| !services.contains(key));
    let gone_policies = world.policies.iter().map(|policy| policy.key()).filter(|key| !policies.contains(key));
    gone.chain(gone_services.map(|key| Edit::Remove(key.to_string().into())))
        .chain(gone_policies.map(Edit::RemovePolicy))
        .chain(rows.workloads.into_iter().map(Edit::Workload))
        .chain(rows.services.into_iter().map(Edit::Service))
        .chain(rows.policies.into_iter().map(Edit::Policy))
        .collect()
}

/// Reads the file on a thread that may block. `None` if it says what it said last time.
async fn load(path: PathBuf, last: Reading) -> (Reading, Option<Result<Rows, Error>>) {
    let before = last.clone();
    match tokio::task::spawn_blocking(move || load_now(&path, last)).await {
        Ok(loaded) => loaded,
        // The reader panicked (a fault of ours) or the runtime is going down: what was read last stays.
        Err(error) => {
            tracing::error!("reading the static configuration stopped: {error}");
            (before, None)
        }
    }
}

fn load_now(path: &Path, last: Reading) -> (Reading, Option<Result<Rows, Error>>) {
    // The fingerprint first: a change between the two reads then shows as one.
    let fingerprint = follow::fingerprint(path);
    let read = read_bounded(path);
    // What could not be read was not seen, and is tried again although nobody touches it: this process may have been out of descriptors.
    let reading = Reading { fingerprint: fingerprint.filter(|_| read.is_ok()), content: Some(Content::of(&read)) };
    if reading.content == last.content {
        return (reading, None);
    }
    let rows = match read {
        Ok(bytes) => parse(path, &bytes),
        Err(error) => Err(Error::Unreadable { path: path.to_owned(), reason: error.to_string() }),
    };
    (reading, Some(rows))
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::{Error, Read};
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::other(format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20)));
    }
    Ok(bytes)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Rows, Error> {
    let origin = path.display().to_string();
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let lines = bytes.iter().take(error.valid_up_to()).filter(|byte| **byte == b'\n').count();
        let reason = "this line is not UTF-8 text".to_owned();
        refused(&origin, form::Fault { line: lines as u64 + 1, column: 1, field: "document".to_owned(), reason })
    })?;
    form::read(text).map_err(|fault| refused(&origin, fault))
}

fn refused(origin: &str, fault: form::Fault) -> Error {
    Error::Refused { origin: origin.to_owned(), line: fault.line, column: fault.column, field: fault.field, reason: fault.reason }
}
