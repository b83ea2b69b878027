#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

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
