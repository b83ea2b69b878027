//! How much a peer may ask of us without moving bytes. Every kind of frame that costs us something and the peer nothing is counted; honest work
//! gives the allowance back, and one that is used up ends the connection with ENHANCE_YOUR_CALM (reference, craft-and-trust §2.2, A3–A8).
//!
//! What honest work gives back is measured by what peers send for it, so that no rate of it is a flood, 5,000 short connections a second included. An
//! end is an empty DATA frame with END_STREAM (Envoy, h2, Go), which counts for nothing. A stream may bring, beside its bytes, a PRIORITY, a
//! RST_STREAM that crosses our own end, and credit for what its reader took last, after it has ended: so each answered one gives back four frames and one empty
//! DATA frame, which peers that pass on what they read send with an end. Each turn of bytes, either way, may bring credit for the stream and for
//! the tunnel, so it gives back two. Envoy's PINGs and those of ztunnel come every 10 s.
//!
//! An application that aborts after its connection was established costs nothing here. One that aborts before, again and again, is what a rapid reset looks
//! like. A client of this house takes back [`TAKE_BACKS`] requests at once and some each second; beyond that it waits for their answers first, so that its
//! applications' haste never costs it a tunnel, here or at an Envoy, which ends one after 500 (`overload.premature_reset_total_stream_count`).

use tokio::time::Instant;

use super::frame::Reason;

/// Streams that the peer opened and reset before we answered, in a row of less than that many answered ones: rapid reset (CVE-2023-44487).
const PREMATURE_RESETS: u32 = 200;
/// Streams that we reset because of the peer's errors: "made you reset" (CVE-2025-8671).
const LOCAL_RESETS: u32 = 1000;
/// PING, SETTINGS, PRIORITY, unknown and empty frames since bytes last moved (CVE-2019-9512, -9515, -9518), and what nothing called for: credit by the
/// spoonful or for streams that are no more, resets of those, acknowledgements, goodbyes.
const IDLE_FRAMES: u32 = 1000;
/// DATA frames with nothing in them, not even an end (CVE-2019-9518).
const EMPTY_FRAMES: u32 = 100;
/// Octets of DATA that give one idle frame and one empty one back.
const OCTETS_PER_FRAME: usize = 1024;
/// Octets of DATA that give one reset back.
const OCTETS_PER_RESET: usize = 64 << 10;
/// Idle frames that a turn of bytes gives back.
const FRAMES_PER_TURN: u32 = 2;
/// Idle frames that an answered stream gives back.
const FRAMES_PER_STREAM: u32 = 4;
/// Requests that we take back at once before their answers.
const TAKE_BACKS: u32 = 100;

/// What a peer has too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flood {
    TakenBack,
    Errors,
    IdleFrames,
    EmptyFrames,
    Headers,
}

impl Flood {
    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::TakenBack => "too many requests taken back before their answers",
            Self::Errors => "too many streams that had to be refused or reset",
            Self::IdleFrames => "too many control frames that nothing called for",
            Self::EmptyFrames => "too many empty DATA frames",
            Self::Headers => "a header list too long, or in too many pieces",
        }
    }
}

/// The allowances of one connection.
#[derive(Debug, Clone)]
pub(super) struct Temper {
    pub(super) since: Instant,
    pub(super) premature: u32,
    pub(super) local: u32,
    pub(super) idle: u32,
    pub(super) empty: u32,
    pub(super) moved: usize,
    /// What we have taken back ourselves.
    taken_back: u32,
    /// The guard that ended the connection.
    flood: Option<Flood>,
}

impl Default for Temper {
    fn default() -> Self {
        Self { since: Instant::now(), premature: 0, local: 0, idle: 0, empty: 0, moved: 0, taken_back: 0, flood: None }
    }
}

impl Temper {
    /// Time gives allowances back too: a peer that asks slowly may ask for ever.
    fn cool(&mut self) {
        let seconds = self.since.elapsed().as_secs();
        if seconds > 0 {
            self.since = Instant::now();
            let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
            self.idle = self.idle.saturating_sub(seconds.saturating_mul(IDLE_FRAMES / 5));
            self.premature = self.premature.saturating_sub(seconds.saturating_mul(PREMATURE_RESETS / 4));
            self.local = self.local.saturating_sub(seconds.saturating_mul(LOCAL_RESETS / 10));
            // Peers that pass on what they read send one with every end; streams that carry little else would use the allowance up.
            self.empty = self.empty.saturating_sub(seconds.saturating_mul(EMPTY_FRAMES));
            // Half of what a peer like us forgives.
            self.taken_back = self.taken_back.saturating_sub(seconds.saturating_mul(PREMATURE_RESETS / 8));
        }
    }

    pub(super) fn premature_reset(&mut self) -> Result<(), Reason> {
        self.cool();
        self.premature += 1;
        self.within(self.premature, PREMATURE_RESETS, Flood::TakenBack)
    }

    pub(super) fn local_reset(&mut self) -> Result<(), Reason> {
        self.cool();
        self.local += 1;
        self.within(self.local, LOCAL_RESETS, Flood::Errors)
    }

    pub(super) fn idle_frame(&mut self) -> Result<(), Reason> {
        self.cool();
        self.idle += 1;
        self.within(self.idle, IDLE_FRAMES, Flood::IdleFrames)
    }

    pub(super) fn empty_frame(&mut self) -> Result<(), Reason> {
        self.cool();
        self.empty += 1;
        self.within(self.empty, EMPTY_FRAMES, Flood::EmptyFrames)
    }

    /// More of a header list than any allowance.
    pub(super) fn headers(&mut self) -> Reason {
        self.flood = Some(Flood::Headers);
        Reason::ENHANCE_YOUR_CALM
    }

    fn within(&mut self, count: u32, limit: u32, flood: Flood) -> Result<(), Reason> {
        if count <= limit {
            return Ok(());
        }
        self.flood = Some(flood);
        Err(Reason::ENHANCE_YOUR_CALM)
    }

    /// Which allowance was used up.
    pub(super) fn flood(&self) -> &'static str {
        self.flood.map_or("too much of something", Flood::name)
    }

    /// A request was answered before it was given up.
    pub(super) fn answered(&mut self) {
        self.premature = self.premature.saturating_sub(1);
        self.idle = self.idle.saturating_sub(FRAMES_PER_STREAM);
        self.empty = self.empty.saturating_sub(1);
    }

    /// So many octets of DATA came or went.
    pub(super) fn moved(&mut self, octets: usize) {
        if self.idle > 0 || self.local > 0 || self.empty > 0 {
            let before = self.moved;
            self.moved += octets;
            let earned = |unit: usize| u32::try_from(self.moved / unit - before / unit).unwrap_or(u32::MAX);
            let (frames, resets) = (earned(OCTETS_PER_FRAME), earned(OCTETS_PER_RESET));
            self.moved %= OCTETS_PER_RESET;
            self.idle = self.idle.saturating_sub(frames.saturating_add(FRAMES_PER_TURN));
            self.empty = self.empty.saturating_sub(frames);
            self.local = self.local.saturating_sub(resets);
        }
    }

    /// Whether we may take a request back before its answer.
    pub(super) fn may_take_back(&mut self) -> bool {
        self.cool();
        let may = self.taken_back < TAKE_BACKS;
        self.taken_back += u32::from(may);
        may
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    type Count = fn(&mut Temper) -> Result<(), Reason>;

    /// How many are let through at once.
    fn at_once(temper: &mut Temper, count: Count) -> usize {
        (0..10_000).take_while(|_| count(temper).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn each_guard_has_its_limit_its_name_and_its_pace() {
        let guards: [(Count, usize, usize, Flood); 4] = [
            (Temper::premature_reset, 200, 50, Flood::TakenBack),
            (Temper::local_reset, 1000, 100, Flood::Errors),
            (Temper::idle_frame, 1000, 200, Flood::IdleFrames),
            (Temper::empty_frame, 100, 100, Flood::EmptyFrames),
        ];
        for (count, limit, a_second, flood) in guards {
            let mut temper = Temper::default();
            for _ in 0..100 {
                assert!((0..a_second).all(|_| count(&mut temper).is_ok()), "{flood:?}");
                tokio::time::advance(Duration::from_secs(1)).await;
            }
            assert_eq!((at_once(&mut temper, count), temper.flood), (limit, Some(flood)));
        }
        assert_eq!((Temper::default().headers(), Temper::default().flood()), (Reason::ENHANCE_YOUR_CALM, "too much of something"));
    }

    #[test]
    fn answered_requests_give_allowances_back() {
        let mut temper = Temper::default();
        for _ in 0..5000 {
            assert_eq!((temper.premature_reset(), temper.empty_frame()), (Ok(()), Ok(())));
            assert!((0..4).all(|_| temper.idle_frame().is_ok()));
            temper.answered();
        }
        assert_eq!(at_once(&mut temper, Temper::premature_reset), 200);
        assert_eq!(at_once(&mut temper, Temper::empty_frame), 100);
        assert_eq!(at_once(&mut temper, Temper::idle_frame), 1000);
    }

    #[test]
    fn bytes_give_allowances_back() {
        let mut temper = Temper::default();
        for _ in 0..5000 {
            // A turn of one octet calls for credit twice.
            assert_eq!((temper.idle_frame(), temper.idle_frame()), (Ok(()), Ok(())));
            temper.moved(1);
        }
        assert_eq!(at_once(&mut temper, Temper::idle_frame), 1000);
        assert_eq!((at_once(&mut temper, Temper::empty_frame), at_once(&mut temper, Temper::local_reset)), (100, 1000));
        (temper.idle, temper.empty, temper.local) = (1000, 100, 1000);
        (0..64).for_each(|_| temper.moved(OCTETS_PER_FRAME));
        assert_eq!((temper.idle, temper.empty, temper.local), (1000 - 64 * 3, 36, 999), "however it is cut");
    }

    #[tokio::test(start_paused = true)]
    async fn of_our_own_requests_fewer_are_taken_back_than_a_peer_forgives() {
        let (mut ours, mut peers) = (Temper::default(), Temper::default());
        for _ in 0..100 {
            while ours.may_take_back() {
                assert_eq!(peers.premature_reset(), Ok(()));
            }
            tokio::time::advance(Duration::from_millis(700)).await;
        }
    }
}
