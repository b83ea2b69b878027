#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const FULL: u32 = 16 << 20;
const FULL_STREAM: u32 = 4 << 20;

fn windows(budget: &ReceiveBudget) -> Windows {
    Windows::new(budget, (FULL, FULL_STREAM), false)
}

/// Receives `bytes` at the speed of a peer that is stopped by its window only, in steps of a stream window.
fn rush(windows: &mut Windows, bytes: u64) {
    let end = windows.seen + bytes;
    while windows.seen < end {
        let next = windows.seen + u64::from(windows.stream());
        windows.observe_at(next, windows.measured_from.1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_busy_tunnel_on_a_quiet_node_has_its_full_windows_after_four_mebibytes() {
    let budget = ReceiveBudget::new(64 * MIB);
    let mut tunnel = windows(&budget);
    assert_eq!((tunnel.tunnel(), tunnel.stream()), (1 << 20, 256 << 10));
    rush(&mut tunnel, 4 * MIB);
    assert_eq!((tunnel.tunnel(), tunnel.stream()), (FULL, FULL_STREAM));
}

#[tokio::test(start_paused = true)]
async fn a_slow_tunnel_takes_nothing_from_the_budget() {
    let budget = ReceiveBudget::new(64 * MIB);
    let mut tunnel = windows(&budget);
    for _ in 0..1000 {
        tokio::time::advance(Duration::from_millis(200)).await;
        assert_eq!(tunnel.observe_at(tunnel.seen + 20_000, Instant::now()), None);
    }
    assert_eq!(tunnel.tunnel(), START);
}

#[tokio::test(start_paused = true)]
async fn every_tunnel_has_the_floor_when_the_budget_is_spent() {
    let budget = ReceiveBudget::new(64 * MIB);
    let mut tunnels: Vec<Windows> = (0..500).map(|_| windows(&budget)).collect();
    assert_eq!((tunnels[499].tunnel(), tunnels[499].stream()), (FLOOR, MIN_STREAM + 1));
    for tunnel in &mut tunnels {
        rush(tunnel, 32 * MIB);
    }
    assert!(tunnels.iter().all(|tunnel| tunnel.tunnel() >= FLOOR && tunnel.stream() < tunnel.tunnel()));
    assert!(budget.promised() <= 64 * MIB);
    drop(tunnels);
    assert_eq!(budget.promised(), 0);
}

#[tokio::test(start_paused = true)]
async fn greedy_tunnels_make_room_for_a_new_one_as_they_use_their_promise_up() {
    let budget = ReceiveBudget::new(64 * MIB);
    let mut greedy: Vec<Windows> = (0..5).map(|_| windows(&budget)).collect();
    for tunnel in &mut greedy {
        rush(tunnel, 8 * MIB);
    }
    let mut late = windows(&budget);
    assert_eq!(late.tunnel(), FLOOR);
    for _ in 0..20 {
        tokio::time::advance(SHRINK_EVERY).await;
        for tunnel in greedy.iter_mut().chain([&mut late]) {
            tunnel.measured_from.1 = Instant::now();
            rush(tunnel, 64 * MIB);
        }
    }
    assert!(late.tunnel() >= 4 << 20, "{}", late.tunnel());
    assert!(budget.promised() <= 64 * MIB);
}

#[tokio::test(start_paused = true)]
async fn a_window_that_shrinks_stays_promised_until_the_peer_has_used_it() {
    let budget = ReceiveBudget::new(16 * MIB);
    let mut tunnel = windows(&budget);
    rush(&mut tunnel, 8 * MIB);
    assert_eq!(tunnel.tunnel(), 16 << 20);
    let before = budget.promised();
    tokio::time::advance(SHRINK_EVERY).await;
    // One byte in a second: idle, and others need it.
    assert_eq!(tunnel.observe_at(tunnel.seen + 1, Instant::now()), Some(8 << 20));
    assert_eq!(budget.promised(), before);
    // Slow enough not to grow again.
    for used in 1..=20 {
        tokio::time::advance(2 * MEASURE).await;
        assert_eq!(tunnel.observe_at(tunnel.seen + MIB, Instant::now()), None);
        assert_eq!(budget.promised(), before - used.min(8) * MIB);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Open,
    Close(usize),
    Receive(usize, u32),
    Wait(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        Just(Step::Open),
        any::<usize>().prop_map(Step::Close),
        (any::<usize>(), 1..40_000_000_u32).prop_map(|(which, bytes)| Step::Receive(which, bytes)),
        (any::<usize>(), 1..2_000_000_u32).prop_map(|(which, bytes)| Step::Receive(which, bytes)),
        (0..3000_u16).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 1..200)
}

proptest! {
    #[test]
    fn the_budget_is_never_exceeded_and_always_adds_up(steps in steps(), total in 1..64_u64) {
        let budget = ReceiveBudget::new(total * MIB);
        let mut now = Instant::now();
        let mut tunnels: Vec<Windows> = Vec::new();
        for step in steps {
            match step {
                Step::Open => tunnels.push(windows(&budget)),
                Step::Close(which) if !tunnels.is_empty() => drop(tunnels.swap_remove(which % tunnels.len())),
                Step::Receive(which, bytes) if !tunnels.is_empty() => {
                    let index = which % tunnels.len();
                    let tunnel = &mut tunnels[index];
                    tunnel.observe_at(tunnel.seen + u64::from(bytes), now);
                }
                Step::Wait(millis) => now += Duration::from_millis(u64::from(millis)),
                Step::Close(_) | Step::Receive(..) => {}
            }
            let promised: u64 = tunnels.iter().map(|tunnel| beyond_floor(tunnel.share.promised)).sum();
            prop_assert_eq!(budget.promised(), promised);
            prop_assert!(promised <= total * MIB);
            let large = tunnels.iter().filter(|tunnel| tunnel.share.window > FLOOR).count() as u64;
            prop_assert_eq!(budget.given().large, large);
            for tunnel in &tunnels {
                prop_assert!(tunnel.tunnel() >= FLOOR && tunnel.tunnel() <= FULL);
                prop_assert!(tunnel.stream() < tunnel.tunnel() && tunnel.share.promised >= tunnel.tunnel());
            }
        }
        drop(tunnels);
        prop_assert_eq!(budget.promised(), 0);
    }
}

#[test]
fn a_tunnel_that_we_open_begins_with_more_while_three_quarters_of_the_budget_are_free() {
    let budget = ReceiveBudget::new(64 << 20);
    let open = |opened| Windows::new(&budget, (FULL, FULL_STREAM), opened);
    let first: Vec<Windows> = (0..5).map(|_| open(true)).collect();
    let windows: Vec<u32> = first.iter().map(Windows::tunnel).collect();
    assert_eq!(windows, [START_OPENED, START_OPENED, START_OPENED, START_OPENED, START]);
    assert_eq!((first[0].stream(), open(false).tunnel()), (1 << 20, START));
    assert_eq!(budget.promised(), 4 * u64::from(START_OPENED - FLOOR) + u64::from(START - FLOOR));
    drop(first);
    assert_eq!((budget.promised(), open(true).tunnel()), (0, START_OPENED));
}
