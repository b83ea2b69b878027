//! Workloads that the mesh knows by a host name only, as service entries with DNS resolution are: their names are resolved when a connection needs
//! them (reference, dataplane §3.6), where the proxy itself is, and as every other program there would do it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::seq::IndexedRandom;
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::{Instant, timeout};

use crate::model::Text;

/// Names that are remembered at once, as many as in the reference.
const MOST_NAMES: usize = 4096;
/// How long an answer counts. The system's resolver tells nothing of the lifetimes of records.
const FOUND: Duration = Duration::from_secs(5);
/// How long it counts that there was none.
const NOT_FOUND: Duration = Duration::from_secs(1);
/// Look-ups under way at once: each holds a thread for as long as its nameservers are silent.
const LOOK_UPS: usize = 16;
/// How long a connection waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks for the addresses of a name; blocks.
type Ask = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// The addresses of a name, or why there are none.
type Answer = Result<Vec<IpAddr>, String>;

/// An answer, once it is there, and until when it counts. Who asks meanwhile waits for it.
type Cell = Arc<OnceCell<(Answer, Instant)>>;

/// Resolves host names of the mesh, and remembers the answers for some seconds.
pub struct HostNames {
    ask: Arc<Ask>,
    known: Mutex<HashMap<Text, Cell>>,
    look_ups: Arc<Semaphore>,
}

impl HostNames {
    /// Asks the system's resolver: `/etc/hosts`, then the nameservers of `/etc/resolv.conf`. Without `ipv6`, only IPv4 addresses count.
    #[must_use]
    pub fn new(ipv6: bool) -> Self {
        Self::with(move |name| {
            let found = (name, 0).to_socket_addrs()?.map(|address| address.ip().to_canonical());
            Ok(found.filter(|ip| ipv6 || ip.is_ipv4()).collect())
        })
    }

    fn with(ask: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Self {
        Self { ask: Arc::new(ask), known: Mutex::default(), look_ups: Arc::new(Semaphore::new(LOOK_UPS)) }
    }

    /// One of the addresses of a name, drawn for each connection, of the family of `like` if there is one.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub(super) async fn resolve(&self, name: &Text, like: IpAddr) -> Result<IpAddr, String> {
        let cell = self.cell(name);
        let answered = timeout(PATIENCE, cell.get_or_init(|| self.look_up(name))).await;
        let (answer, _) = answered.map_err(|_| format!("no answer within {PATIENCE:?}"))?;
        let addresses = answer.as_ref().map_err(String::clone)?;
        let alike: Vec<&IpAddr> = addresses.iter().filter(|ip| ip.is_ipv4() == like.is_ipv4()).collect();
        let mut random = rand::rng();
        let drawn = alike.choose(&mut random).copied().or_else(|| addresses.choose(&mut random));
        drawn.copied().ok_or_else(|| "it has no address".to_owned())
    }

    /// Where the answer about a name is, or will be.
    fn cell(&self, name: &Text) -> Cell {
        let now = Instant::now();
        let counts = |cell: &Cell| cell.get().is_none_or(|(_, until)| now < *until);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cell) = known.get(name).filter(|cell| counts(cell)) {
            return cell.clone();
        }
        if known.len() >= MOST_NAMES {
            known.retain(|_, cell| counts(cell));
        }
        let cell = Cell::default();
        // Beyond that a name is asked for by each connection anew.
        if known.len() < MOST_NAMES {
            known.insert(name.clone(), cell.clone());
        }
        cell
    }

    async fn look_up(&self, name: &Text) -> (Answer, Instant) {
        let permit = self.look_ups.clone().acquire_owned().await;
        let (ask, asked) = (self.ask.clone(), name.clone());
        let found = tokio::task::spawn_blocking(move || {
            // Kept until the thread is free, also when nobody waits for it any more.
            let _permit = permit;
            ask(&asked)
        });
        let answer = match found.await {
            Ok(Ok(addresses)) if addresses.is_empty() => Err("it has no address".to_owned()),
            Ok(found) => found.map_err(|error| error.to_string()),
            Err(_) => Err("the look-up was given up".to_owned()),
        };
        let counts = if answer.is_ok() { FOUND } else { NOT_FOUND };
        (answer, Instant::now() + counts)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    /// Counts what it is asked; `both.test` has an address of each family, `none.test` none, and others do not exist.
    fn counting() -> (HostNames, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let names = HostNames::with(move |name| {
            count.fetch_add(1, Ordering::SeqCst);
            match name {
                "both.test" => Ok(vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]),
                "four.test" => Ok(vec!["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()]),
                "none.test" => Ok(Vec::new()),
                _ => Err(io::Error::other("no such name")),
            }
        });
        (names, asked)
    }

    const V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    #[tokio::test(start_paused = true)]
    async fn an_address_of_the_family_that_was_asked_for_is_drawn_else_any() {
        let (names, _) = counting();
        assert_eq!(names.resolve(&"both.test".into(), V4).await.unwrap().to_string(), "10.0.0.1");
        assert_eq!(names.resolve(&"both.test".into(), V6).await.unwrap().to_string(), "fd00::1");
        let drawn = join_all((0..64).map(|_| async { names.resolve(&"four.test".into(), V6).await.unwrap() })).await;
        assert!(["10.0.0.1", "10.0.0.2"].iter().all(|ip| drawn.contains(&ip.parse().unwrap())), "{drawn:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn connections_share_a_look_up_and_its_answer_for_some_seconds() {
        let (names, asked) = counting();
        let name: Text = "both.test".into();
        let resolve = || async { names.resolve(&name, V4).await };
        assert!(join_all((0..100).map(|_| resolve())).await.iter().all(Result::is_ok));
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        tokio::time::advance(FOUND - Duration::from_millis(1)).await;
        resolve().await.unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        tokio::time::advance(Duration::from_millis(2)).await;
        resolve().await.unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_has_its_reason_and_counts_for_a_second() {
        let (names, asked) = counting();
        for (name, reason) in [("gone.test", "no such name"), ("none.test", "it has no address")] {
            for _ in 0..3 {
                assert_eq!(names.resolve(&name.into(), V4).await.unwrap_err(), reason);
            }
        }
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        tokio::time::advance(NOT_FOUND).await;
        names.resolve(&"gone.test".into(), V4).await.unwrap_err();
        assert_eq!(asked.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn silent_nameservers_hold_a_bounded_number_of_threads_and_connections_for_a_bounded_time() {
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (gate, under_way) = (Mutex::new(gate), Arc::new(AtomicUsize::new(0)));
        let count = under_way.clone();
        let names = HostNames::with(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            let _ = gate.lock().unwrap().recv();
            Ok(vec![V4])
        });
        let names = Arc::new(names);
        let waiting: Vec<_> = (0..3 * LOOK_UPS)
            .map(|number| {
                let names = names.clone();
                tokio::spawn(async move { names.resolve(&format!("n{number}.test").as_str().into(), V4).await })
            })
            .collect();
        while under_way.load(Ordering::SeqCst) < LOOK_UPS {
            tokio::task::yield_now().await;
        }
        tokio::time::pause();
        tokio::time::advance(PATIENCE).await;
        for waiting in waiting {
            assert_eq!(waiting.await.unwrap().unwrap_err(), "no answer within 5s");
        }
        assert_eq!(under_way.load(Ordering::SeqCst), LOOK_UPS);
        drop(release);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_names_are_remembered_than_the_limit() {
        let (names, asked) = counting();
        for number in 0..MOST_NAMES + 10 {
            names.resolve(&format!("{number}.test").as_str().into(), V4).await.unwrap_err();
        }
        assert!(names.known.lock().unwrap().len() <= MOST_NAMES);
        assert_eq!(asked.load(Ordering::SeqCst), MOST_NAMES + 10);
    }

    #[tokio::test]
    async fn the_systems_own_names_are_found() {
        assert!(HostNames::new(true).resolve(&"localhost".into(), V4).await.unwrap().is_loopback());
        assert_eq!(HostNames::new(false).resolve(&"localhost".into(), V6).await.unwrap(), V4);
    }
}
