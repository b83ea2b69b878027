#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use tokio::time::advance;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn a_burst_then_the_rate() {
    let dials = RateBudget::new(100, 64);
    assert_eq!((0..1000).filter(|_| dials.take().is_ok()).count(), 64);
    assert_eq!(dials.take().unwrap_err().retry_after, Duration::from_millis(10));
    advance(Duration::from_millis(9)).await;
    assert_eq!(dials.take().unwrap_err().retry_after, Duration::from_millis(1));
    advance(Duration::from_millis(1)).await;
    assert!(dials.take().is_ok() && dials.take().is_err(), "refusals cost nothing, and one interval gives one");
    advance(SECOND * 3600).await;
    assert_eq!((0..1000).filter(|_| dials.take().is_ok()).count(), 64, "an hour of silence saves no more than a burst");
    let mut taken = 0;
    for _ in 0..10_000 {
        advance(Duration::from_millis(1)).await;
        taken += u32::from(dials.take().is_ok());
    }
    assert_eq!(taken, 1000, "100/s for 10 s");
}

#[tokio::test(start_paused = true)]
async fn odd_numbers_make_a_slow_budget_not_a_panic() {
    for (per_second, burst) in [(0, 0), (1, 1), (u32::MAX, u32::MAX), (1, u32::MAX)] {
        let budget = RateBudget::new(per_second, burst);
        assert!(budget.take().is_ok());
        advance(SECOND).await;
        assert!(budget.take().is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn each_key_has_its_own_budget_and_full_ones_are_forgotten() {
    let budgets = RateBudgets::new(10, 2, 1000);
    assert_eq!((0..9).filter(|_| budgets.take("a").is_ok()).count(), 2);
    assert!(budgets.take("b").is_ok());
    assert_eq!(budgets.keys(), 2);
    let budgets = RateBudgets::new(10, 2, 1000);
    for round in 0..100_u32 {
        for key in 0..50 {
            assert!(budgets.take(round * 50 + key).is_ok());
        }
        advance(SECOND).await;
    }
    assert!(budgets.keys() <= 150, "{} keys remembered", budgets.keys());
}

#[tokio::test(start_paused = true)]
async fn more_keys_than_can_be_remembered_are_refused_until_one_is_full_again() {
    let budgets = RateBudgets::new(10, 2, 100);
    assert_eq!((0..100_000).filter(|key| budgets.take(*key).is_ok()).count(), 100);
    assert_eq!(budgets.keys(), 100);
    assert!(budgets.take(0).is_ok(), "those who are known go on");
    let refused = budgets.take(100_000).unwrap_err();
    assert_eq!(refused.retry_after, Duration::from_millis(100));
    advance(refused.retry_after).await;
    assert!(budgets.take(100_000).is_ok());
}

proptest! {
    /// In any window of length w at most burst + w × rate are permitted, and what is refused would be permitted when promised.
    #[test]
    fn no_window_holds_more_than_burst_plus_rate(
        per_second in 1..2000_u32, burst in 1..20_u32, gaps in prop::collection::vec(0..20_000_u64, 1..200),
    ) {
        let rate = Rate::new(per_second, burst);
        let begin = Instant::now();
        let (mut now, mut bucket) = (begin, Bucket { full_at: begin });
        let mut taken = Vec::new();
        for gap in gaps {
            now += Duration::from_micros(gap);
            match bucket.take(rate, now) {
                Ok(()) => taken.push(now),
                Err(refused) => {
                    let (mut early, mut late) = (bucket, bucket);
                    prop_assert!(early.take(rate, now + refused.retry_after - Duration::from_nanos(1)).is_err());
                    prop_assert!(late.take(rate, now + refused.retry_after).is_ok());
                }
            }
        }
        for (first, from) in taken.iter().enumerate() {
            for (last, to) in taken.iter().enumerate().skip(first) {
                let refilled = (*to - *from).as_nanos() / rate.interval.as_nanos();
                prop_assert!(((last - first) as u128) < u128::from(burst) + refilled);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_check_says_what_a_take_would_and_takes_nothing() {
    let budgets = RateBudgets::new(10, 3, 100);
    assert_eq!((budgets.check(&"new"), budgets.keys()), (Ok(()), 0));
    for _ in 0..3 {
        (0..100).for_each(|_| assert_eq!(budgets.check(&"busy"), Ok(())));
        budgets.take("busy").unwrap();
    }
    assert_eq!(budgets.check(&"busy").unwrap_err(), budgets.take("busy").unwrap_err());
    advance(Duration::from_millis(100)).await;
    assert_eq!(budgets.check(&"busy"), Ok(()));
}
