//! The store of credentials and the loop that keeps them fresh (ref §7.3).

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Config;
use super::certificate::{CertificateEntry, CertificateState};
use super::credential::Credential;
use super::error::IdentityError;
use super::issuer::{Issuer, PendingKey};
use super::metrics::{self, Requests};
use super::renewal::{Job, LookUp, Moment, Settled, Table};
use super::revocation::Revocations;
use super::tls::Shape;
use crate::lifecycle::Clock;
use crate::model::SpiffeId;
use crate::telemetry::limited;

/// The longest time between two looks at the wall clock: it may jump, and monotonic timers do not notice.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// A handle to the certificates of all identities of this node. When the last clone is dropped the renewal loop ends.
#[derive(Clone)]
pub struct Credentials {
    handle: Arc<Handle>,
}

struct Handle(Arc<Store>);

struct Store {
    config: Config,
    clock: Clock,
    shape: Arc<Shape>,
    issuer: Arc<dyn Issuer>,
    table: Mutex<Table>,
    wake: Notify,
    generation: AtomicU64,
    requests: Requests,
    /// No handle is left: the loop may end.
    released: AtomicBool,
    /// The loop has ended: nothing will be renewed.
    stopped: AtomicBool,
}

impl Credentials {
    /// Makes a store and the loop that serves it. The loop must be run (and supervised) by the caller; without it [`fetch`](Self::fetch) waits.
    /// It ends when the last handle is dropped; when it is dropped first, waiters get [`IdentityError::Stopped`].
    pub fn new(config: Config, issuer: Arc<dyn Issuer>, clock: Clock) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let shape = Arc::new(Shape::new(&config, clock.clone()));
        let store = Arc::new(Store {
            config,
            clock,
            shape,
            issuer,
            table: Mutex::default(),
            wake: Notify::new(),
            generation: AtomicU64::new(1),
            requests: Requests::default(),
            released: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        });
        let stop = StopOnDrop(store.clone());
        let renewal = async move {
            let stop = stop;
            stop.0.renew().await;
        };
        (Self { handle: Arc::new(Handle(store)) }, renewal)
    }

    /// The certificate of an identity: at once if there is a valid one, otherwise as soon as the issuer gives it.
    ///
    /// Concurrent calls share one request. The wait is bounded by [`Config::request_timeout`] once a request is sent; callers with a deadline
    /// of their own may drop the future at any time.
    ///
    /// # Errors
    /// The reason of the last failure, at once, while the issuer fails and there is no valid older certificate; [`IdentityError::Forgotten`] when
    /// the identity was forgotten meanwhile; [`IdentityError::Stopped`] during shutdown.
    pub async fn fetch(&self, identity: &SpiffeId) -> Result<Arc<Credential>, IdentityError> {
        let store = &self.handle.0;
        let (found, changed) = store.table().look_up(identity, store.moment());
        let mut outcome = match found {
            LookUp::Ready(known) => {
                if changed {
                    store.wake.notify_one();
                }
                return known;
            }
            LookUp::Wait(outcome) => outcome,
        };
        // After look_up: whoever sets the flag empties the table's waiters afterwards, so one of the two is seen.
        if store.stopped.load(Ordering::SeqCst) {
            return Err(IdentityError::Stopped);
        }
        store.wake.notify_one();
        match outcome.wait_for(Option::is_some).await {
            Ok(settled) => settled.clone().unwrap_or(Err(IdentityError::Stopped)),
            Err(_) => Err(IdentityError::Forgotten(identity.clone())),
        }
    }

    /// [`fetch`](Self::fetch) for a connection that does not wait longer than this. The request goes on for those who come later.
    ///
    /// # Errors
    /// [`IdentityError::Timeout`] with this time, and those of `fetch`.
    pub async fn fetch_within(&self, patience: Duration, identity: &SpiffeId) -> Result<Arc<Credential>, IdentityError> {
        tokio::time::timeout(patience, self.fetch(identity)).await.unwrap_or(Err(IdentityError::Timeout(patience)))
    }

    /// Asks for a certificate ahead of need and keeps it fresh until it is [forgotten](Self::forget). Beyond [`Config::prefetch_queue`] waiting
    /// ones it does nothing: the certificate is then fetched when a connection needs it.
    pub fn prefetch(&self, identity: SpiffeId) {
        let store = &self.handle.0;
        if store.table().prefetch(&identity, store.moment(), store.config.prefetch_queue) {
            store.wake.notify_one();
        } else {
            tracing::debug!(%identity, "certificate not prefetched: too many are waiting; it is fetched when first needed");
        }
    }

    /// Drops the certificate of an identity, because its last workload left this node. Connections keep what they use.
    pub fn forget(&self, identity: &SpiffeId) {
        self.handle.0.table().forget(identity);
        self.handle.0.wake.notify_one();
    }

    /// What the configuration dump shows, sorted by identity. It holds no secrets.
    #[must_use]
    pub fn dump(&self) -> Vec<CertificateState> {
        let store = &self.handle.0;
        let mut states = store.table().states(store.clock.now());
        states.sort_by_cached_key(|(identity, ..)| identity.to_string());
        let show = |(identity, state, credential): (SpiffeId, String, Option<Arc<Credential>>)| CertificateState {
            identity: identity.to_string(),
            state,
            cert_chain: credential.iter().flat_map(|credential| credential.chain.iter().map(CertificateEntry::of)).collect(),
            root_certs: credential.iter().flat_map(|credential| credential.roots.iter().map(CertificateEntry::of)).collect(),
        };
        states.into_iter().map(show).collect()
    }

    /// The revocation lists that peers are verified with.
    #[must_use]
    pub fn revocations(&self) -> Option<Revocations> {
        self.handle.0.config.revocations.clone()
    }

    /// The metric families of this room. They end with the last handle.
    #[must_use]
    pub fn collector(&self) -> Box<dyn Collector> {
        Box::new(CertificateMetrics(Arc::downgrade(&self.handle.0)))
    }
}

/// Holds no handle, or the renewal loop would never end.
struct CertificateMetrics(Weak<Store>);

impl fmt::Debug for CertificateMetrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("CertificateMetrics")
    }
}

impl Collector for CertificateMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(store) = self.0.upgrade() else { return Ok(()) };
        let now = store.clock.now();
        let census = store.table().census(now);
        metrics::encode(&mut encoder, &store.requests, (census, now))?;
        store.shape.revocations.as_ref().map_or(Ok(()), |revocations| revocations.encode(&mut encoder))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Credentials")
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.released.store(true, Ordering::SeqCst);
        self.0.wake.notify_one();
    }
}

/// Tells waiters when the loop is dropped, so that none waits for ever.
struct StopOnDrop(Arc<Store>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        self.0.table().stop();
    }
}

impl Store {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moment(&self) -> Moment {
        Moment { monotonic: Instant::now(), wall: self.clock.now() }
    }

    async fn renew(&self) {
        let mut requests = FuturesUnordered::new();
        while !self.released.load(Ordering::SeqCst) {
            let room = self.config.requests_in_flight.max(1).saturating_sub(requests.len());
            let moment = self.moment();
            let (jobs, next) = self.table().take_due(room, moment);
            requests.extend(jobs.into_iter().map(|job| self.carry_out(job)));
            let look_again = moment.monotonic + LOOK_AGAIN;
            let next = next.map_or(look_again, |next| next.min(look_again));
            tokio::select! {
                Some(()) = requests.next() => {}
                () = self.wake.notified() => {}
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }

    async fn carry_out(&self, job: Job) {
        let Job { identity, ticket, forgotten } = job;
        let answer = tokio::select! {
            answer = self.request(&identity) => answer,
            _ = forgotten => return,
        };
        let failure = answer.as_ref().err().cloned();
        self.requests.count(failure.as_ref());
        let expires = answer.as_ref().ok().map(|credential| credential.not_after);
        let now = self.moment();
        let luck = rand::random_range(-1.0..=1.0);
        match self.table().settle((&identity, ticket), answer, (now, luck), &self.config) {
            Settled::Unwanted => {}
            Settled::Installed => {
                let lifetime = expires.and_then(|at| at.duration_since(now.wall).ok()).unwrap_or_default();
                tracing::debug!(%identity, lifetime_seconds = lifetime.as_secs(), "certificate issued");
            }
            Settled::Retry { delay, serving } => {
                let error = failure.map(|error| error.to_string()).unwrap_or_default();
                let then = if serving { "the old certificate is still valid and in use" } else { "connections of this identity fail until then" };
                let retry_in_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
                limited!(warn, "certificates that were not issued", %identity, error, retry_in_ms, "certificate not issued: {then}");
            }
        }
    }

    async fn request(&self, identity: &SpiffeId) -> Result<Credential, IdentityError> {
        let pending = PendingKey::generate(identity, self.config.ttl, self.shape.provider.key_provider)?;
        let limit = self.config.request_timeout;
        let issued = tokio::time::timeout(limit, self.issuer.issue(&pending.request)).await.map_err(|_elapsed| IdentityError::Timeout(limit))??;
        Credential::verify(&self.shape, pending, &issued, self.generation.fetch_add(1, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests;
