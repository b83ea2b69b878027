//! From worlds to catalogs: what changes within a moment is published as one.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::catalog::{Catalog, Kind};
use super::stats::Stats;
use crate::discovery::World;

/// How long changes are gathered.
#[derive(Debug, Clone, Copy)]
pub struct Debounce {
    /// A change is published when none has followed it for this long. Default 100 ms (reference, node-and-control §B.4).
    pub quiet: Duration,
    /// It is published after this long even if others keep coming. Default 1 s.
    pub longest: Duration,
}

impl Default for Debounce {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(100), longest: Duration::from_secs(1) }
    }
}

/// The catalog of the first world, and where later ones are found.
pub(super) fn first(world: &World, stats: &Stats) -> watch::Sender<Arc<Catalog>> {
    let empty = Catalog::default();
    // An empty mesh has a catalog as well.
    let first = empty.next(world).unwrap_or(Catalog { epoch: 1, ..empty });
    stats.published(&first);
    watch::Sender::new(Arc::new(first))
}

/// Publishes a catalog for every world, until the source or the last reader is gone.
pub(super) async fn follow(mut worlds: watch::Receiver<Arc<World>>, catalogs: watch::Sender<Arc<Catalog>>, debounce: Debounce, stats: Arc<Stats>) {
    loop {
        tokio::select! {
            () = catalogs.closed() => return,
            changed = worlds.changed() => if changed.is_err() { return },
        }
        gather(&mut worlds, debounce).await;
        let world = worlds.borrow_and_update().clone();
        let began = std::time::Instant::now();
        let current = catalogs.borrow().clone();
        // A large mesh takes a while to encode, and calls are served meanwhile.
        let next = tokio::task::spawn_blocking(move || current.next(&world)).await;
        let Ok(Some(next)) = next else { continue };
        stats.published(&next);
        let count = |kind| next.set(kind).entries.len();
        let (epoch, addresses, policies) = (next.epoch, count(Kind::Address), count(Kind::Authorization));
        tracing::info!(epoch, addresses, policies, took = ?began.elapsed(), "published");
        catalogs.send_replace(Arc::new(next));
    }
}

/// Waits until nothing changes any more, or for long enough.
async fn gather(worlds: &mut watch::Receiver<Arc<World>>, debounce: Debounce) {
    let latest = Instant::now() + debounce.longest;
    loop {
        worlds.mark_unchanged();
        let quiet = latest.min(Instant::now() + debounce.quiet);
        match timeout_at(quiet, worlds.changed()).await {
            Ok(Ok(())) if Instant::now() < latest => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::time::sleep;

    use super::*;
    use crate::discovery::{Edit, Publisher};
    use crate::model::Workload;

    fn workload(uid: &str) -> Edit {
        Edit::Workload(Workload {
            uid: uid.into(),
            name: "n".into(),
            addresses: Default::default(),
            node: "left".into(),
            hostname: "".into(),
            status: Default::default(),
            capacity: 1,
            profile: Arc::default(),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_one_catalog_and_a_steady_stream_is_one_a_second() {
        let (mut publisher, mesh) = Publisher::new(None);
        let stats = Arc::new(Stats::default());
        let sender = first(&mesh.current(), &stats);
        let mut catalogs = sender.subscribe();
        assert_eq!(catalogs.borrow_and_update().epoch, 1, "an empty mesh has a catalog as well");
        tokio::spawn(follow(mesh.subscribe(), sender, Debounce::default(), stats));
        tokio::task::yield_now().await;
        for uid in ["a", "b", "c"] {
            publisher.publish([workload(uid)]);
            sleep(Duration::from_millis(50)).await;
        }
        let from = Instant::now();
        catalogs.changed().await.unwrap();
        assert!(from.elapsed() <= Duration::from_millis(60), "{:?}", from.elapsed());
        assert_eq!(catalogs.borrow_and_update().addresses.entries.len(), 3);
        assert_eq!(catalogs.borrow().epoch, 2);
        let from = Instant::now();
        for number in 0..60 {
            publisher.publish([workload(&format!("steady-{number}"))]);
            sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(catalogs.borrow_and_update().epoch, 4, "{:?}", from.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_was_taken_back_publishes_nothing() {
        let (mut publisher, mesh) = Publisher::new(None);
        let stats = Arc::new(Stats::default());
        let sender = first(&mesh.current(), &stats);
        let catalogs = sender.subscribe();
        tokio::spawn(follow(mesh.subscribe(), sender, Debounce::default(), stats));
        tokio::task::yield_now().await;
        publisher.publish([workload("a")]);
        publisher.publish([Edit::Remove("a".into())]);
        sleep(Duration::from_secs(5)).await;
        assert_eq!(catalogs.borrow().epoch, 1);
    }
}
