#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::AtomicUsize;
use std::time::SystemTime;

use tokio::task::JoinHandle;

use super::*;
use crate::identity::{AnswerProblem, Issued, IssuerFuture, LocalIssuer, SigningRequest};
use crate::lifecycle::SettableTime;

const SECOND: Duration = Duration::from_secs(1);
const TTL: Duration = Duration::from_secs(1000);

/// What the issuer does next.
#[derive(Clone)]
enum Mood {
    Sign,
    Fail,
    Hang,
    /// Signs for somebody else.
    Lie,
}

/// An issuer with a real CA, a delay, moods, and a memory.
struct Script {
    ca: LocalIssuer,
    mood: Mutex<Mood>,
    latency: Duration,
    asked: Mutex<Vec<String>>,
    busy: AtomicUsize,
    busiest: AtomicUsize,
}

struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Issuer for Script {
    fn issue<'a>(&'a self, request: &'a SigningRequest) -> IssuerFuture<'a> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(request.identity.service_account().to_string());
            let busy = self.busy.fetch_add(1, Ordering::SeqCst) + 1;
            let _busy = Busy(&self.busy);
            self.busiest.fetch_max(busy, Ordering::SeqCst);
            tokio::time::sleep(self.latency).await;
            let mood = self.mood.lock().unwrap().clone();
            match mood {
                Mood::Sign => self.ca.issue(request).await,
                Mood::Fail => Err(IdentityError::Issuer("out of ink".to_owned())),
                Mood::Hang => std::future::pending::<Result<Issued, IdentityError>>().await,
                Mood::Lie => {
                    let other = PendingKey::generate(&id("liar"), TTL, rustls::crypto::aws_lc_rs::default_provider().key_provider)?;
                    self.ca.issue(&other.request).await
                }
            }
        })
    }
}

/// A store whose wall clock follows tokio's paused time.
struct Bench {
    store: Credentials,
    issuer: Arc<Script>,
    wall: SettableTime,
    renewal: JoinHandle<()>,
    ticker: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

fn id(name: &str) -> SpiffeId {
    SpiffeId::new("test", "test", name).unwrap()
}

fn bench(requests_in_flight: usize) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let wall = SettableTime::new(SystemTime::now());
    let clock = Clock::fixed(wall.clone());
    LocalIssuer::create(dir.path(), &clock).unwrap();
    let ca = LocalIssuer::load(dir.path(), clock.clone()).unwrap();
    // The CA is older than all that follows, so that the clock can be set back.
    wall.advance(3600 * SECOND);
    let issuer = Arc::new(Script {
        ca,
        mood: Mutex::new(Mood::Sign),
        latency: SECOND,
        asked: Mutex::default(),
        busy: AtomicUsize::new(0),
        busiest: AtomicUsize::new(0),
    });
    let config = Config { ttl: TTL, requests_in_flight, ..Config::default() };
    let (store, renewal) = Credentials::new(config, issuer.clone(), clock);
    let cell = wall.clone();
    let ticker = tokio::spawn(async move {
        loop {
            tokio::time::sleep(SECOND / 4).await;
            cell.advance(SECOND / 4);
        }
    });
    Bench { store, issuer, wall, renewal: tokio::spawn(renewal), ticker, _dir: dir }
}

impl Bench {
    fn asked(&self) -> Vec<String> {
        self.issuer.asked.lock().unwrap().clone()
    }

    fn mood(&self, mood: Mood) {
        *self.issuer.mood.lock().unwrap() = mood;
    }

    fn state(&self, name: &str) -> Option<String> {
        self.store.dump().into_iter().find(|state| state.identity == id(name).to_string()).map(|state| state.state)
    }

    fn fetch(&self, name: &str) -> JoinHandle<Result<Arc<Credential>, IdentityError>> {
        let (store, identity) = (self.store.clone(), id(name));
        tokio::spawn(async move { store.fetch(&identity).await })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.ticker.abort();
        self.renewal.abort();
    }
}

/// Lets everything that is ready run, without letting time pass.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn many_fetches_of_one_identity_share_one_request_and_one_credential() {
    let bench = bench(8);
    let waiting: Vec<_> = (0..20).map(|_| bench.fetch("one")).collect();
    let mut generations = Vec::new();
    for fetch in waiting {
        generations.push(fetch.await.unwrap().unwrap());
    }
    assert_eq!(bench.asked(), ["one"]);
    assert!(generations.iter().all(|credential| Arc::ptr_eq(credential, &generations[0])));
    let again = bench.store.fetch(&id("one")).await.unwrap();
    assert!(Arc::ptr_eq(&again.server_config(), &generations[0].server_config()), "one configuration per generation");
    assert!(Arc::ptr_eq(&again.client_config(), &generations[0].client_config()));
}

#[tokio::test(start_paused = true)]
async fn a_hundred_identities_fetched_by_many_are_asked_for_once_each() {
    let bench = bench(8);
    let waiting: Vec<_> = (0..800).map(|n| bench.fetch(&format!("id{}", n % 100))).collect();
    for fetch in waiting {
        fetch.await.unwrap().unwrap();
    }
    assert_eq!(bench.asked().len(), 100);
    assert_eq!(bench.store.dump().len(), 100);
    assert_eq!(bench.issuer.busiest.load(Ordering::SeqCst), 8, "never more in flight than allowed, and all places used");
}

#[tokio::test(start_paused = true)]
async fn connections_come_before_warm_up() {
    let bench = bench(1);
    let first = bench.fetch("first");
    settle().await;
    bench.store.prefetch(id("warm1"));
    settle().await;
    bench.store.prefetch(id("warm2"));
    settle().await;
    let urgent = bench.fetch("urgent");
    settle().await;
    // A waiting connection lifts what was only prefetched.
    let lifted = bench.fetch("warm2");
    for fetch in [first, urgent, lifted] {
        fetch.await.unwrap().unwrap();
    }
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(bench.asked()[0], "first");
    assert_eq!(bench.asked()[3], "warm1");
    assert!(bench.asked()[1..3].contains(&"urgent".to_owned()) && bench.asked()[1..3].contains(&"warm2".to_owned()));
}

/// All three are due at once: one place comes free after a machine slept.
#[tokio::test(start_paused = true)]
async fn warm_up_comes_before_renewal() {
    let bench = bench(1);
    bench.store.prefetch(id("old"));
    tokio::time::sleep(2 * SECOND).await;
    bench.mood(Mood::Hang);
    let blocker = bench.fetch("blocker");
    settle().await;
    bench.wall.advance(TTL.mul_f64(0.6));
    bench.store.prefetch(id("new"));
    assert!(blocker.await.unwrap().is_err());
    bench.mood(Mood::Sign);
    tokio::time::sleep(5 * SECOND).await;
    let asked = bench.asked();
    assert_eq!(asked[..2], ["old", "blocker"]);
    let position = |name: &str| asked.iter().skip(2).position(|asked| asked == name).unwrap();
    assert!(position("new") < position("old"), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_there_or_on_its_way_is_not_fetched_ahead_again() {
    let bench = bench(1);
    bench.store.prefetch(id("one"));
    settle().await;
    bench.store.prefetch(id("one"));
    let there = bench.store.fetch(&id("one")).await.unwrap();
    bench.store.prefetch(id("one"));
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(bench.asked(), ["one"]);
    assert_eq!(bench.store.fetch(&id("one")).await.unwrap().generation, there.generation);
}

#[tokio::test(start_paused = true)]
async fn renewals_wait_while_a_connection_needs_a_place() {
    let bench = bench(1);
    bench.store.prefetch(id("old"));
    tokio::time::sleep(2 * SECOND).await;
    bench.mood(Mood::Hang);
    let blocker = bench.fetch("blocker");
    tokio::time::sleep(20 * SECOND).await;
    // The clock jumps to where the old one is due, and both are due when the blocker times out.
    bench.wall.advance(TTL.mul_f64(0.6));
    let urgent = bench.fetch("urgent");
    assert!(blocker.await.unwrap().is_err());
    bench.mood(Mood::Sign);
    urgent.await.unwrap().unwrap();
    tokio::time::sleep(5 * SECOND).await;
    let asked = bench.asked();
    let position = |name: &str| asked.iter().skip(2).position(|asked| asked == name).unwrap();
    assert!(position("urgent") < position("old"), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn certificates_are_renewed_at_half_life_without_a_gap() {
    let bench = bench(8);
    bench.store.prefetch(id("one"));
    let mut generations = std::collections::BTreeSet::new();
    for _ in 0..4000 {
        let credential = bench.store.fetch(&id("one")).await.unwrap();
        assert!(credential.is_valid(bench.wall.now()));
        generations.insert(credential.generation);
        tokio::time::sleep(SECOND).await;
    }
    // Half a life is 500 s less the backdating (100 s of 1,100): 450 s, ±5 % of the life, over 4,000 s.
    assert!((7..=11).contains(&generations.len()), "{generations:?}");
    assert_eq!(bench.asked().len(), generations.len());
}

#[tokio::test(start_paused = true)]
async fn an_old_certificate_serves_while_renewal_fails_and_no_longer() {
    let bench = bench(8);
    let first = bench.store.fetch(&id("one")).await.unwrap();
    bench.store.prefetch(id("one"));
    bench.mood(Mood::Fail);
    let mut shortly_before = 0;
    loop {
        let now = bench.wall.now();
        if now + 3 * SECOND <= first.not_after {
            shortly_before = bench.asked().len();
        }
        match bench.store.fetch(&id("one")).await {
            Ok(credential) => {
                assert_eq!(credential.generation, first.generation);
                assert!(now < first.not_after, "an expired certificate is never handed out");
                assert_eq!(bench.state("one").unwrap(), "Available");
            }
            Err(error) => {
                assert!(now >= first.not_after && now < first.not_after + SECOND, "fails closed within a second");
                assert_eq!(error, IdentityError::Issuer("out of ink".to_owned()));
                assert_eq!(bench.state("one").unwrap(), "Unavailable: the issuer gave no certificate: out of ink");
                break;
            }
        }
        tokio::time::sleep(SECOND / 2).await;
    }
    tokio::time::sleep(2 * SECOND).await;
    assert!(bench.asked().len() > shortly_before, "it is tried once more at the latest when the old one expires");
    let failures = bench.asked().len() - 1;
    assert!((8..=16).contains(&failures), "{failures} tries in 550 s: 1, 2, 4 … 150 s");
    // The issuer is back: so is the identity, within the longest delay.
    bench.mood(Mood::Sign);
    tokio::time::sleep(152 * SECOND).await;
    assert!(bench.store.fetch(&id("one")).await.unwrap().generation > first.generation);
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_told_at_once_until_a_later_try_succeeds_and_then_delays_start_anew() {
    let bench = bench(8);
    bench.mood(Mood::Fail);
    bench.store.fetch(&id("one")).await.unwrap_err();
    for _ in 0..200 {
        let before = Instant::now();
        bench.store.fetch(&id("one")).await.unwrap_err();
        assert_eq!(Instant::now(), before, "no waiting while it is unavailable");
        tokio::time::sleep(SECOND).await;
    }
    let tries = bench.asked().len();
    assert!((7..=9).contains(&tries), "{tries} tries in 200 s");
    bench.mood(Mood::Sign);
    tokio::time::sleep(160 * SECOND).await;
    bench.store.fetch(&id("one")).await.unwrap();
    assert_eq!(bench.state("one").unwrap(), "Available");
    // After a success the next failure waits a second again, not minutes.
    bench.mood(Mood::Fail);
    bench.wall.advance(TTL);
    bench.store.fetch(&id("one")).await.unwrap_err();
    let tries = bench.asked().len();
    tokio::time::sleep(Duration::from_millis(2300)).await;
    assert_eq!(bench.asked().len(), tries + 1);
}

#[tokio::test(start_paused = true)]
async fn one_failing_identity_does_not_delay_another() {
    let bench = bench(1);
    bench.mood(Mood::Fail);
    bench.store.fetch(&id("bad")).await.unwrap_err();
    bench.mood(Mood::Sign);
    let before = Instant::now();
    bench.store.fetch(&id("good")).await.unwrap();
    assert!(Instant::now() - before < Duration::from_millis(2300));
}

#[tokio::test(start_paused = true)]
async fn a_slow_issuer_is_waited_for_and_a_silent_one_is_not() {
    let bench = bench(8);
    bench.mood(Mood::Hang);
    let slow = bench.fetch("slow");
    tokio::time::sleep(20 * SECOND).await;
    assert!(!slow.is_finished());
    assert_eq!(bench.state("slow").unwrap(), "Initializing");
    let before = Instant::now();
    assert_eq!(slow.await.unwrap().unwrap_err(), IdentityError::Timeout(30 * SECOND));
    assert!(Instant::now() - before <= 10 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_as_long_as_it_may_and_the_request_goes_on_without_it() {
    let bench = bench(8);
    bench.mood(Mood::Hang);
    let before = Instant::now();
    let impatient = bench.store.fetch_within(5 * SECOND, &id("one")).await;
    assert_eq!((impatient.unwrap_err(), Instant::now() - before), (IdentityError::Timeout(5 * SECOND), 5 * SECOND));
    assert_eq!(bench.state("one").unwrap(), "Initializing");
    let patient = bench.fetch("one");
    settle().await;
    assert_eq!(bench.asked(), ["one"], "it waits for the same request");
    // That one fails in its own time, and the next is answered.
    assert_eq!(patient.await.unwrap().unwrap_err(), IdentityError::Timeout(30 * SECOND));
    bench.mood(Mood::Sign);
    tokio::time::sleep(3 * SECOND).await;
    bench.store.fetch_within(5 * SECOND, &id("one")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_wrong_answer_is_never_installed() {
    let bench = bench(8);
    let good = bench.store.fetch(&id("one")).await.unwrap();
    bench.store.prefetch(id("one"));
    bench.mood(Mood::Lie);
    tokio::time::sleep(TTL.mul_f64(0.6)).await;
    assert!(bench.asked().len() > 1);
    assert_eq!(bench.store.fetch(&id("one")).await.unwrap().generation, good.generation);
    let refused = bench.store.fetch(&id("two")).await.unwrap_err();
    assert_eq!(refused, IdentityError::Answer { identity: id("two"), problem: AnswerProblem::WrongIdentity(id("liar")) });
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_forgotten_identity_is_told() {
    let bench = bench(1);
    let (running, queued) = (bench.fetch("running"), bench.fetch("queued"));
    tokio::time::sleep(SECOND / 2).await;
    bench.store.forget(&id("queued"));
    bench.store.forget(&id("running"));
    let before = Instant::now();
    assert_eq!(running.await.unwrap().unwrap_err(), IdentityError::Forgotten(id("running")));
    assert!(queued.await.unwrap().unwrap_err().to_string().contains("no longer needed"));
    assert_eq!(Instant::now(), before);
    assert!(bench.store.dump().is_empty());
    settle().await;
    assert_eq!(bench.issuer.busy.load(Ordering::SeqCst), 0, "its request is given up");
    tokio::time::sleep(5 * SECOND).await;
    assert!(bench.store.dump().is_empty(), "a late answer does not bring it back");
}

#[tokio::test(start_paused = true)]
async fn forget_and_fetch_again_asks_again() {
    let bench = bench(1);
    bench.store.fetch(&id("one")).await.unwrap();
    bench.store.forget(&id("one"));
    bench.store.fetch(&id("one")).await.unwrap();
    assert_eq!(bench.asked(), ["one", "one"]);
    bench.store.forget(&id("never-seen"));
}

#[tokio::test(start_paused = true)]
async fn prefetched_certificates_are_kept_fresh_and_unused_others_lapse() {
    let bench = bench(8);
    bench.store.prefetch(id("kept"));
    bench.store.fetch(&id("lapses")).await.unwrap();
    tokio::time::sleep(3 * TTL).await;
    assert_eq!(bench.state("kept").unwrap(), "Available");
    assert_eq!(bench.state("lapses"), None);
    assert_eq!(bench.asked().iter().filter(|name| *name == "lapses").count(), 1);
    bench.store.fetch(&id("lapses")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_only_fails_and_nobody_wants_is_dropped() {
    let bench = bench(8);
    bench.mood(Mood::Fail);
    bench.store.fetch(&id("one")).await.unwrap_err();
    tokio::time::sleep(1000 * SECOND).await;
    assert_eq!(bench.state("one"), None);
    assert_eq!(bench.asked().len(), 8);
}

#[tokio::test(start_paused = true)]
async fn prefetches_beyond_the_queue_are_dropped_and_fetched_when_needed() {
    let bench = bench(1);
    for n in 0..300 {
        bench.store.prefetch(id(&format!("id{n}")));
    }
    assert_eq!(bench.store.dump().len(), 256);
    bench.store.fetch(&id("id299")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_back_before_the_certificate_renews_it() {
    let bench = bench(8);
    bench.store.prefetch(id("one"));
    tokio::time::sleep(10 * SECOND).await;
    bench.wall.set(bench.wall.now() - 300 * SECOND);
    tokio::time::sleep(32 * SECOND).await;
    assert_eq!(bench.asked(), ["one", "one"]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_over_the_expiry_waits_for_a_new_certificate() {
    let bench = bench(8);
    let old = bench.store.fetch(&id("one")).await.unwrap();
    bench.wall.advance(2 * TTL);
    let new = bench.store.fetch(&id("one")).await.unwrap();
    assert!(new.generation > old.generation);
}

#[tokio::test(start_paused = true)]
async fn sixty_second_certificates_never_fail() {
    let dir = tempfile::tempdir().unwrap();
    let wall = SettableTime::new(SystemTime::now());
    let clock = Clock::fixed(wall.clone());
    LocalIssuer::create(dir.path(), &clock).unwrap();
    let issuer = Arc::new(LocalIssuer::load(dir.path(), clock.clone()).unwrap());
    let (store, renewal) = Credentials::new(Config { ttl: 60 * SECOND, ..Config::default() }, issuer, clock);
    let renewal = tokio::spawn(renewal);
    let mut generations = std::collections::BTreeSet::new();
    for _ in 0..3600 {
        let credential = store.fetch(&id("one")).await.unwrap();
        assert!(credential.is_valid(wall.now()));
        generations.insert(credential.generation);
        tokio::time::sleep(SECOND / 2).await;
        wall.advance(SECOND / 2);
    }
    assert!((50..=90).contains(&generations.len()), "{} certificates in 30 min", generations.len());
    drop(store);
    renewal.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_loop_ends_with_the_last_handle() {
    let mut bench = bench(1);
    let renewal = std::mem::replace(&mut bench.renewal, tokio::spawn(async {}));
    let last = bench.store.clone();
    drop(bench);
    settle().await;
    assert!(!renewal.is_finished());
    drop(last);
    renewal.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn waiters_are_told_when_renewal_stops() {
    let bench = bench(1);
    let valid = bench.store.fetch(&id("valid")).await.unwrap();
    let waiting = bench.fetch("waiting");
    settle().await;
    bench.renewal.abort();
    assert_eq!(waiting.await.unwrap().unwrap_err(), IdentityError::Stopped);
    assert_eq!(bench.store.fetch(&id("late")).await.unwrap_err(), IdentityError::Stopped);
    assert_eq!(bench.store.fetch(&id("valid")).await.unwrap().generation, valid.generation);
}

#[tokio::test(start_paused = true)]
async fn the_dump_has_the_shape_of_the_reference() {
    let bench = bench(1);
    bench.store.fetch(&id("b")).await.unwrap();
    bench.store.prefetch(id("a"));
    let dump = serde_json::to_value(bench.store.dump()).unwrap();
    assert_eq!((&dump[0]["identity"], &dump[0]["state"]), (&"spiffe://test/ns/test/sa/a".into(), &"Initializing".into()));
    assert_eq!(dump[0]["certChain"], serde_json::json!([]));
    let available = &dump[1];
    assert_eq!(available["state"], "Available");
    assert_eq!((available["certChain"].as_array().unwrap().len(), available["rootCerts"].as_array().unwrap().len()), (2, 1));
    let leaf = &available["certChain"][0];
    assert_eq!(leaf.as_object().unwrap().keys().collect::<Vec<_>>(), ["expirationTime", "pem", "serialNumber", "validFrom"]);
    assert!(leaf["serialNumber"].as_str().unwrap().bytes().all(|byte| byte.is_ascii_digit()));
    let time = leaf["validFrom"].as_str().unwrap();
    assert!(time.len() == 20 && time.ends_with('Z') && &time[10..11] == "T", "{time}");
    use base64::Engine;
    let pem = base64::prelude::BASE64_STANDARD.decode(leaf["pem"].as_str().unwrap()).unwrap();
    assert!(pem.starts_with(b"-----BEGIN CERTIFICATE-----\n"));
}
