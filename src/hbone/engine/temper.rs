//! How much a peer may ask of us without moving bytes. Every kind of frame that costs us something and the peer nothing is counted; honest work
//! gives the allowance back, and one that is used up ends the connection with ENHANCE_YOUR_CALM (reference, craft-and-trust §2.2, A3–A8).

use tokio::time::Instant;

use super::frame::Reason;

/// Streams that the peer opened and reset before we answered, in a row of less than that many answered ones: rapid reset (CVE-2023-44487).
const PREMATURE_RESETS: u32 = 200;
/// Streams that we reset because of the peer's errors: "made you reset" (CVE-2025-8671).
const LOCAL_RESETS: u32 = 1000;
/// PING, SETTINGS, PRIORITY, unknown and empty frames since bytes last moved (CVE-2019-9512, -9515, -9518).
const IDLE_FRAMES: u32 = 1000;
/// DATA frames with nothing in them, not even an end (CVE-2019-9518).
const EMPTY_FRAMES: u32 = 100;
/// Octets of DATA that give one idle frame back.
const OCTETS_PER_FRAME: usize = 1024;

/// The allowances of one connection.
#[derive(Debug, Clone)]
pub(super) struct Temper {
    pub(super) since: Instant,
    pub(super) premature: u32,
    pub(super) local: u32,
    pub(super) idle: u32,
    pub(super) empty: u32,
    pub(super) moved: usize,
}

impl Default for Temper {
    fn default() -> Self {
        Self { since: Instant::now(), premature: 0, local: 0, idle: 0, empty: 0, moved: 0 }
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
        }
    }

    pub(super) fn premature_reset(&mut self) -> Result<(), Reason> {
        self.cool();
        self.premature += 1;
        within(self.premature, PREMATURE_RESETS)
    }

    pub(super) fn local_reset(&mut self) -> Result<(), Reason> {
        self.cool();
        self.local += 1;
        within(self.local, LOCAL_RESETS)
    }

    pub(super) fn idle_frame(&mut self) -> Result<(), Reason> {
        self.cool();
        self.idle += 1;
        within(self.idle, IDLE_FRAMES)
    }

    pub(super) fn empty_frame(&mut self) -> Result<(), Reason> {
        self.cool();
        self.empty += 1;
        within(self.empty, EMPTY_FRAMES)
    }

    /// A request was answered before it was given up.
    pub(super) fn answered(&mut self) {
        self.premature = self.premature.saturating_sub(1);
    }

    /// So many octets of DATA came or went.
    pub(super) fn moved(&mut self, octets: usize) {
        if self.idle > 0 || self.local > 0 || self.empty > 0 {
            self.moved += octets;
            let earned = u32::try_from(self.moved / OCTETS_PER_FRAME).unwrap_or(u32::MAX);
            self.moved %= OCTETS_PER_FRAME;
            self.idle = self.idle.saturating_sub(earned);
            self.empty = self.empty.saturating_sub(earned);
            self.local = self.local.saturating_sub(earned / 64);
        }
    }
}

fn within(count: u32, limit: u32) -> Result<(), Reason> {
    if count > limit { Err(Reason::ENHANCE_YOUR_CALM) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_before_the_answer_end_the_connection_and_answered_requests_give_the_allowance_back() {
        let mut temper = Temper::default();
        for _ in 0..10 * PREMATURE_RESETS {
            assert_eq!(temper.premature_reset(), Ok(()));
            temper.answered();
        }
        assert_eq!((0..=PREMATURE_RESETS).find_map(|_| temper.premature_reset().err()), Some(Reason::ENHANCE_YOUR_CALM));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_may_send_a_hundred_empty_frames_a_second_for_ever_and_no_more_at_once() {
        let mut temper = Temper::default();
        for _ in 0..100 {
            assert_eq!((0..EMPTY_FRAMES).find_map(|_| temper.empty_frame().err()), None);
            tokio::time::advance(std::time::Duration::from_secs(1)).await;
        }
        assert_eq!((0..=EMPTY_FRAMES).find_map(|_| temper.empty_frame().err()), Some(Reason::ENHANCE_YOUR_CALM));
    }

    #[test]
    fn frames_without_bytes_are_limited_and_bytes_give_the_allowance_back() {
        let mut temper = Temper::default();
        for _ in 0..10 * IDLE_FRAMES {
            assert_eq!(temper.idle_frame(), Ok(()));
            temper.moved(OCTETS_PER_FRAME);
        }
        assert_eq!((0..=IDLE_FRAMES).find_map(|_| temper.idle_frame().err()), Some(Reason::ENHANCE_YOUR_CALM));
    }
}
