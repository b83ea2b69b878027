#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const LONG: Duration = Duration::from_secs(60);

#[test]
fn the_total_and_the_share_of_each_key_are_kept() {
    let permits = Permits::new(PermitLimits { total: 3, per_key: 2 });
    let first = permits.acquire("a").unwrap();
    let second = permits.acquire("a").unwrap();
    assert_eq!(permits.acquire("a").unwrap_err(), PermitRefused::PerKey(2));
    let third = permits.clone().acquire("b").unwrap();
    assert_eq!(permits.acquire("c").unwrap_err(), PermitRefused::Total(3));
    assert_eq!(permits.acquire("a").unwrap_err(), PermitRefused::PerKey(2), "the culprit is named");
    assert_eq!((permits.held(), permits.keys()), (3, 2));
    drop(first);
    let fourth = permits.acquire("c").unwrap();
    assert_eq!(fourth.key(), &"c");
    drop((second, third, fourth));
    assert_eq!((permits.held(), permits.keys()), (0, 0), "a key that holds nothing is forgotten");
}

#[test]
fn a_permit_comes_back_when_its_holder_panics() {
    let permits = Permits::new(PermitLimits { total: 1, per_key: 1 });
    let held = permits.acquire(1).unwrap();
    let thread = std::thread::spawn(move || {
        let _held = held;
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    assert!(thread.join().is_err());
    assert!(permits.acquire(1).is_ok());
}

#[test]
fn limits_hold_among_threads() {
    let permits = Permits::new(PermitLimits { total: 4, per_key: 3 });
    std::thread::scope(|scope| {
        for key in 0..4_u8 {
            let permits = permits.clone();
            scope.spawn(move || {
                for _ in 0..2000 {
                    let held: Vec<_> = (0..4).filter_map(|_| permits.acquire(key % 2).ok()).collect();
                    assert!(held.len() <= 3 && permits.held() <= 4);
                }
            });
        }
    });
    assert_eq!((permits.held(), permits.keys()), (0, 0));
}

#[tokio::test]
async fn those_who_wait_get_their_turn_in_order_and_may_give_up() {
    let permits = Permits::new(PermitLimits { total: 8, per_key: 1 });
    let first = permits.wait("a", LONG).await.unwrap();
    let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(permits.wait("a", LONG))).collect();
    for one in &mut waiting {
        assert!(futures_util::poll!(one).is_pending());
    }
    let other = permits.wait("b", LONG).await.unwrap();
    // The first gives up before its turn, the second when it has it already.
    drop(waiting.remove(0));
    drop(first);
    drop(waiting.remove(0));
    let third = waiting.remove(0).await.unwrap();
    assert!(futures_util::poll!(&mut waiting[0]).is_pending());
    assert_eq!((permits.held(), permits.keys()), (2, 2));
    drop(third);
    drop(waiting.remove(0).await.unwrap());
    drop(other);
    assert_eq!((permits.held(), permits.keys()), (0, 0));
}

#[tokio::test]
async fn the_total_is_not_waited_for_and_those_who_wait_are_bounded() {
    let permits = Permits::new(PermitLimits { total: 1, per_key: 1 });
    let held = permits.acquire(1).unwrap();
    assert_eq!(permits.wait(2, LONG).await.unwrap_err(), PermitRefused::Total(1));
    let mut waiting: Vec<_> = (0..MOST_WAITING).map(|_| Box::pin(permits.wait(1, LONG))).collect();
    for one in &mut waiting {
        assert!(futures_util::poll!(one).is_pending());
    }
    assert_eq!(permits.wait(1, LONG).await.unwrap_err(), PermitRefused::PerKey(1));
    // Whoever gave up makes room; giving a permit to a thousand who are gone takes no stack.
    drop(waiting.split_off(1));
    let mut late = Box::pin(permits.wait(1, LONG));
    assert!(futures_util::poll!(&mut late).is_pending());
    drop(waiting);
    drop(held);
    drop(late.await.unwrap());
    assert_eq!(permits.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn patience_ends() {
    let permits = Permits::new(PermitLimits { total: 8, per_key: 1 });
    let held = permits.acquire(1).unwrap();
    let since = tokio::time::Instant::now();
    assert_eq!(permits.wait(1, LONG).await.unwrap_err(), PermitRefused::PerKey(1));
    assert_eq!(since.elapsed(), LONG);
    drop(held);
    assert_eq!(permits.held(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_among_those_who_wait() {
    let permits = Permits::new(PermitLimits { total: usize::MAX, per_key: 3 });
    let tasks: Vec<_> = (0..64_u8)
        .map(|number| {
            let permits = permits.clone();
            tokio::spawn(async move {
                for round in 0..50_u8 {
                    let turn = permits.wait(number % 2, LONG);
                    if (number ^ round) % 5 == 0 {
                        // Gives up, sometimes at the moment of its turn.
                        let _ = tokio::time::timeout(Duration::ZERO, turn).await;
                        continue;
                    }
                    let held = turn.await.unwrap();
                    assert!(permits.held() <= 6);
                    tokio::task::yield_now().await;
                    drop(held);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!((permits.held(), permits.keys()), (0, 0));
}

proptest! {
    #[test]
    fn any_sequence_counts_like_a_list(
        total in 0..6_usize, per_key in 0..4_usize, steps in prop::collection::vec((any::<bool>(), 0..4_u8, any::<prop::sample::Index>()), 0..60),
    ) {
        let permits = Permits::new(PermitLimits { total, per_key });
        let mut held: Vec<Permit<u8>> = Vec::new();
        for (acquire, key, which) in steps {
            if acquire {
                let of_key = held.iter().filter(|permit| *permit.key() == key).count();
                match permits.acquire(key) {
                    Ok(permit) => {
                        prop_assert!(of_key < per_key && held.len() < total);
                        held.push(permit);
                    }
                    Err(PermitRefused::PerKey(_)) => prop_assert_eq!(of_key, per_key),
                    Err(PermitRefused::Total(_)) => prop_assert_eq!(held.len(), total),
                }
            } else if !held.is_empty() {
                drop(held.swap_remove(which.index(held.len())));
            }
            let keys: BTreeMap<u8, ()> = held.iter().map(|permit| (*permit.key(), ())).collect();
            prop_assert_eq!((permits.held(), permits.keys()), (held.len(), keys.len()));
        }
    }
}
