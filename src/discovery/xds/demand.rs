//! Names that somebody needs now: subscribed when they are looked up and not there (reference, dataplane §3.8).
//!
//! Two things are better than in the reference: a name that is only an alias of what comes counts as answered, and nobody waits for ever.
//! A connection that got no answer is refused: what the control plane did not say is not "not in the mesh".

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use crate::discovery::LocalName;
use crate::model::Text;

/// So many names may wait for an answer at once: what pods call must not fill our memory.
const MAX_WAITING: usize = 1024;
/// So many of them for one pod: one that calls every address there is must leave places to its neighbours.
const MAX_WAITING_OF_POD: usize = MAX_WAITING / 4;
/// So many names are remembered as being nothing of the mesh.
const MAX_MISSING: usize = 4096;
/// For this long an answer is taken as it is; after it, a name that is still not there is asked for anew. (What is in the world is kept up to
/// date by the server, and never asked for again.)
const FRESH: Duration = Duration::from_secs(2);

/// Why nothing is known about a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// The control plane was silent.
    #[error("the control plane did not say within {limit:?} what {name} is")]
    Late {
        /// The name.
        name: Text,
        /// How long we waited.
        limit: Duration,
    },
    /// Too many names wait already.
    #[error("{MAX_WAITING} other names wait for the control plane, so {name} was not asked for")]
    TooMany {
        /// The name.
        name: Text,
    },
    /// This pod has too many names that wait.
    #[error("{MAX_WAITING_OF_POD} names that {pod} asks for wait for the control plane, as many as one pod may, so {name} was not asked for")]
    Share {
        /// The pod.
        pod: Box<LocalName>,
        /// The name.
        name: Text,
    },
    /// There is no client any more.
    #[error("nobody asks the control plane any more what {name} is")]
    Over {
        /// The name.
        name: Text,
    },
}

/// The names of one client. Clones are one.
#[derive(Debug, Clone)]
pub(crate) struct Demand(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit: Duration,
    names: Mutex<Names>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Names {
    entries: HashMap<Text, Entry>,
    /// Names that there was nothing for, the oldest first. May list what is no longer so.
    missing: VecDeque<Text>,
    waiting: usize,
    /// For whom they wait: the names of each pod, with how many of its connections wait for each.
    pods: HashMap<LocalName, HashMap<Text, usize>>,
    /// What the server has not been told; only while there is a stream.
    news: Option<News>,
}

#[derive(Debug)]
enum Entry {
    /// Dropped with the answer.
    Waiting(watch::Sender<()>),
    /// There is something of this name, since then.
    Found(Instant),
    /// There is nothing of this name, since then.
    Missing(Instant),
}

/// Names to tell the server of: first what is given up, then what is wanted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct News {
    pub(crate) unsubscribe: HashSet<Text>,
    pub(crate) subscribe: HashSet<Text>,
}

impl Names {
    fn forget(&mut self, name: &Text) {
        if let Some(Entry::Waiting(_)) = self.entries.remove(name) {
            self.waiting -= 1;
        }
        if let Some(news) = &mut self.news
            && !news.subscribe.remove(name)
        {
            news.unsubscribe.insert(name.clone());
        }
    }

    fn want(&mut self, name: &Text) -> watch::Receiver<()> {
        // A server answers for a name that is new to it, so one that it has heard is given up first.
        if self.entries.contains_key(name) {
            self.forget(name);
        }
        let (answer, waiter) = watch::channel(());
        self.entries.insert(name.clone(), Entry::Waiting(answer));
        self.waiting += 1;
        if let Some(news) = &mut self.news {
            news.subscribe.insert(name.clone());
        }
        waiter
    }

    fn answer(&mut self, name: &str, entry: Entry) {
        let Some((name, old)) = self.entries.remove_entry(name) else { return };
        if matches!(old, Entry::Waiting(_)) {
            self.waiting -= 1;
        }
        if matches!(entry, Entry::Missing(_)) && !matches!(old, Entry::Missing(_)) {
            self.missing.push_back(name.clone());
        }
        self.entries.insert(name, entry);
        while self.missing.len() > MAX_MISSING {
            let Some(oldest) = self.missing.pop_front() else { break };
            if matches!(self.entries.get(&oldest), Some(Entry::Missing(_))) {
                self.forget(&oldest);
            }
        }
    }

    /// One more of a pod's connections waits for a name.
    fn enter(&mut self, pod: &LocalName, name: &Text) -> Result<(), Unanswered> {
        match self.pods.get_mut(pod) {
            Some(own) if own.len() >= MAX_WAITING_OF_POD && !own.contains_key(name) => {
                return Err(Unanswered::Share { pod: Box::new(pod.clone()), name: name.clone() });
            }
            Some(own) => *own.entry(name.clone()).or_default() += 1,
            None => drop(self.pods.insert(pod.clone(), HashMap::from([(name.clone(), 1)]))),
        }
        Ok(())
    }

    /// It waits no longer.
    fn leave(&mut self, pod: &LocalName, name: &Text) {
        let Some(own) = self.pods.get_mut(pod) else { return };
        if let Some(connections) = own.get_mut(name) {
            *connections -= 1;
            if *connections == 0 {
                own.remove(name);
            }
        }
        if own.is_empty() {
            self.pods.remove(pod);
        }
    }

    /// Gives up names that nobody waits for any more.
    fn sweep(&mut self) {
        let left = |entry: &Entry| matches!(entry, Entry::Waiting(answer) if answer.receiver_count() == 0);
        let left: Vec<Text> = self.entries.iter().filter(|(_, entry)| left(entry)).map(|(name, _)| name.clone()).collect();
        left.iter().for_each(|name| self.forget(name));
    }
}

/// A connection that waits, for as long as it does: it may end at any time.
struct Place<'a> {
    demand: &'a Demand,
    pod: &'a LocalName,
    name: Text,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.demand.names().leave(self.pod, &self.name);
    }
}

impl Demand {
    /// Nobody waits longer than `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self(Arc::new(Shared { limit, names: Mutex::default(), changed: Notify::new() }))
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the server has said what `name`, which a connection of `pod` needs, is, so that the world has it if it is anything.
    pub(crate) async fn ask(&self, pod: &LocalName, name: Text) -> Result<(), Unanswered> {
        let (mut waiter, place) = {
            let mut names = self.names();
            if matches!(names.entries.get(&name), Some(Entry::Found(at) | Entry::Missing(at)) if at.elapsed() < FRESH) {
                return Ok(());
            }
            // First the limit that names a culprit.
            names.enter(pod, &name)?;
            let waiter = match names.entries.get(&name) {
                Some(Entry::Waiting(answer)) => answer.subscribe(),
                Some(Entry::Found(_) | Entry::Missing(_)) | None => {
                    if names.waiting >= MAX_WAITING {
                        names.sweep();
                    }
                    if names.waiting >= MAX_WAITING {
                        names.leave(pod, &name);
                        return Err(Unanswered::TooMany { name });
                    }
                    names.want(&name)
                }
            };
            (waiter, Place { demand: self, pod, name: name.clone() })
        };
        self.0.changed.notify_one();
        if timeout(self.0.limit, waiter.changed()).await.is_ok() {
            return Ok(());
        }
        drop((waiter, place));
        let mut names = self.names();
        if matches!(names.entries.get(&name), Some(Entry::Waiting(answer)) if answer.receiver_count() == 0) {
            names.forget(&name);
            self.0.changed.notify_one();
        }
        Err(Unanswered::Late { name, limit: self.0.limit })
    }

    /// Whether the server has just said what `name` is, so that nobody needs to be asked.
    pub(crate) fn is_fresh(&self, name: &str) -> bool {
        matches!(self.names().entries.get(name), Some(Entry::Found(at) | Entry::Missing(at)) if at.elapsed() < FRESH)
    }

    /// A stream begins: the names that somebody waits for, to be asked with its first request. What was answered on an earlier stream is
    /// either held or forgotten.
    pub(crate) fn begin(&self) -> Vec<Text> {
        let mut names = self.names();
        names.entries.retain(|_, entry| matches!(entry, Entry::Waiting(_)));
        names.missing.clear();
        names.sweep();
        names.news = Some(News::default());
        names.entries.keys().cloned().collect()
    }

    /// The stream is over.
    pub(super) fn end(&self) {
        self.names().news = None;
    }

    /// The next news, when there are any. Cancel safe.
    pub(crate) async fn news(&self) -> News {
        loop {
            {
                let mut names = self.names();
                if let Some(news) = &mut names.news
                    && *news != News::default()
                {
                    return std::mem::take(news);
                }
            }
            self.0.changed.notified().await;
        }
    }

    /// The server has answered.
    pub(crate) fn answered(&self, found: &[String], gone: &[String]) {
        let (mut names, now) = (self.names(), Instant::now());
        gone.iter().for_each(|name| names.answer(name, Entry::Missing(now)));
        found.iter().for_each(|name| names.answer(name, Entry::Found(now)));
        drop(names);
        // Names may have been given up.
        self.0.changed.notify_one();
    }

    /// Whether the server's answers matter to anybody.
    pub(super) fn is_empty(&self) -> bool {
        self.names().entries.is_empty()
    }
}

#[cfg(test)]
mod tests;
