#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// A bulk stream takes all it may.
fn drain(credit: &mut Credit, slot: u32) -> usize {
    let sent = credit.available(slot, false);
    assert!(!credit.spend(slot, false, sent), "cut short, it is bulk still");
    sent
}

#[test]
fn a_lone_bulk_stream_may_use_everything_but_the_reserve() {
    for (window, reserve) in [(65_535, 4_095), (1 << 20, 64 << 10), (24 << 20, 256 << 10)] {
        let mut credit = Credit::default();
        assert!(credit.give(window - 65_535));
        assert_eq!(drain(&mut credit, 0), usize::try_from(window).unwrap() - reserve);
        assert_eq!((drain(&mut credit, 0), credit.left()), (0, i64::try_from(reserve).unwrap()));
        // The reserve is of the largest window, whatever is left of it.
        assert!(credit.give(1000));
        assert_eq!(drain(&mut credit, 0), 1000);
    }
}

#[test]
fn a_stream_is_sparse_when_its_turn_fits_into_a_record_and_was_not_cut_short() {
    let mut credit = Credit::default();
    assert!(credit.spend(0, false, 16_375));
    assert!(!credit.spend(0, true, 16_376));
    // Bulk that finds a hundred octets.
    let mut short = Credit::resumed(4_195, 65_535);
    assert_eq!(short.available(0, false), 100);
    assert!(!short.spend(0, false, 100));
    assert!(Credit::resumed(4_195, 65_535).spend(0, false, 99));
    // Much that happens to end where the reserve begins.
    let mut much = Credit::default();
    assert_eq!(much.available(0, true), 61_440);
    assert!(!much.spend(0, true, 61_440));
}

#[test]
fn two_streams_share_the_reserve_and_have_again_what_is_given_back() {
    let mut credit = Credit::default();
    credit.give(128 << 10);
    drain(&mut credit, 9);
    let reserve = (65_535 + (128 << 10)) / 16;
    let share = reserve / 2;
    for slot in 0..2 {
        assert_eq!(credit.available(slot, true), share);
        assert!(credit.spend(slot, true, share), "cut short, it is sparse still");
        assert_eq!(credit.available(slot, true), 0);
    }
    assert_eq!(credit.available(2, true), reserve % 2, "there is no more");
    // The last was read, and asks again, and again.
    for _ in 0..1000 {
        credit.give(100);
        assert_eq!([0, 1, 9].map(|slot| credit.available(slot, slot < 9)), [0, 100, 0]);
        credit.spend(1, true, 100);
    }
    // A stream that is no more owes nothing, nor does the next in its slot; what it took is not there all the same.
    credit.forget(0);
    assert_eq!((credit.available(0, true), credit.is_short()), (reserve % 2, true));
    credit.give(u32::try_from(reserve).unwrap());
    assert_eq!((credit.owed.len(), credit.is_short()), (0, false), "the reserve is whole");
}

#[test]
fn the_window_has_a_limit() {
    let mut credit = Credit::default();
    assert!(credit.give(0x7fff_ffff - 65_535));
    assert!(!credit.give(1));
}

/// The same rules, slowly: every octet of the reserve that is out, by whom, in the order in which they went.
struct Slow {
    window: i64,
    widest: i64,
    out: Vec<u32>,
    /// How many of these are each stream's.
    owed: [i64; 6],
}

impl Slow {
    fn reserve(&self) -> i64 {
        (self.widest / 16).min(256 << 10)
    }

    fn send_one(&mut self, slot: u32, sparse: bool, sent: usize) -> bool {
        if self.window <= self.reserve() {
            let owes = &mut self.owed[usize::try_from(slot).unwrap()];
            if self.window == 0 || !sparse || sent >= 16_375 || *owes >= (self.widest / 16).min(256 << 10) / 2 {
                return false;
            }
            *owes += 1;
            if self.out.last() != Some(&slot) {
                // All of a stream's octets are as young as its last.
                self.out.sort_by_key(|out| *out == slot);
            }
            self.out.push(slot);
        }
        self.window -= 1;
        true
    }

    fn give(&mut self, octets: u32) {
        self.window += i64::from(octets);
        self.widest = self.widest.max(self.window);
        let kept = if self.window > self.reserve() { 0 } else { self.out.len().saturating_sub(octets as usize) };
        for slot in self.out.drain(kept..) {
            self.owed[usize::try_from(slot).unwrap()] -= 1;
        }
    }
}

#[derive(Debug, Clone)]
struct Other {
    /// Octets that it wants to send in each round.
    wants: usize,
    read: bool,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn turns_take_what_the_slow_rules_let_them(
        first in 0..100_000_u32,
        steps in proptest::collection::vec((0..6_u32, any::<bool>(), prop_oneof![0..300_usize, 0..40_000_usize], prop_oneof![0..200_u32, 0..20_000_u32]), 1..40),
    ) {
        let mut credit = Credit::default();
        credit.give(first);
        let mut slow = Slow { window: credit.left(), widest: credit.left(), out: Vec::new(), owed: [0; 6] };
        for (slot, sparse, wanted, given) in steps {
            let sent = credit.available(slot, sparse).min(wanted);
            let slowly = (0..wanted).take_while(|sent| slow.send_one(slot, sparse, *sent)).count();
            prop_assert_eq!(sent, slowly);
            credit.spend(slot, sparse, sent);
            credit.give(given);
            slow.give(given);
            prop_assert_eq!(credit.left(), slow.window);
            prop_assert!(credit.owed.len() <= 6);
        }
    }

    /// Beside any bulk streams and one that trickles, read or stalled: a request goes at once, again and again, if its peer gives back what it has
    /// read. And what is read goes on.
    #[test]
    fn requests_pass_stalled_streams_for_ever_and_what_is_read_is_never_left_waiting(
        window in 0..400_000_u32,
        bulk in proptest::collection::vec(any::<bool>(), 0..3),
        trickle in (1..20_000_usize, any::<bool>()),
        request in 1..2_000_usize,
    ) {
        let mut credit = Credit::default();
        credit.give(window);
        let others = bulk.into_iter().map(|read| (usize::MAX, read)).chain([trickle]);
        let others: Vec<Other> = others.map(|(wants, read)| Other { wants, read }).collect();
        // Bulk that is new takes its share once; this has sent before.
        let mut sparse = [0, 1, 2, 3].map(|at| others.get(at).is_none_or(|other| other.wants < usize::MAX));
        let mut moved = [0; 4];
        for round in 0..300 {
            let mut back = request;
            for (slot, other) in (0..).zip(&others) {
                let at = usize::try_from(slot).unwrap();
                let sent = credit.available(slot, sparse[at]).min(other.wants);
                sparse[at] = credit.spend(slot, sparse[at], sent);
                moved[at] += sent;
                back += if other.read { sent } else { 0 };
            }
            prop_assert!(credit.available(3, sparse[3]) >= request, "round {}", round);
            sparse[3] = credit.spend(3, sparse[3], request);
            // A peer that gives back at once what is read.
            credit.give(u32::try_from(back).unwrap());
        }
        let stalled = others.iter().any(|other| !other.read);
        if !stalled {
            // Who is first takes most here; the turns of the queue are not part of this.
            let least = if others.iter().any(|other| other.wants == usize::MAX) { 40_000 } else { 1 };
            prop_assert!(moved.iter().sum::<usize>() >= 300 * least, "{:?} moved {:?}", others, moved);
        }
    }
}
