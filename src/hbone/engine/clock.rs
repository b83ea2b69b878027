//! Time: the peer's first SETTINGS, PINGs that find dead peers (reference, dataplane §2.2), the two steps of a drain, the end of a linger.

use std::future::Future as _;
use std::task::Context;

use tokio::time::Instant;

use super::super::Error;
use super::frame::{self, Reason};
use super::tunnel::{Life, Side, Tunnel};

/// The PING behind the first GOAWAY of a drain.
pub(super) const LAST_CALL: &[u8; 8] = b"lastcall";

/// What the timer waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    /// The peer's first SETTINGS.
    Settings,
    /// Time for the next PING.
    Interval,
    /// The answer to a PING.
    Answer,
}

impl Tunnel {
    /// The peer's first SETTINGS have come.
    pub(super) fn settled(&mut self) {
        self.watch = Watch::Interval;
        self.timer.as_mut().reset(Instant::now() + self.endpoint.config.ping_interval);
    }

    /// Watches the clock; whether it did something.
    pub(super) fn watch_clock(&mut self, context: &mut Context<'_>) -> bool {
        if self.timer.as_mut().poll(context).is_pending() {
            return false;
        }
        let next = match self.watch {
            _ if matches!(self.life, Life::Closing(_)) => {
                // Nobody reads what is left.
                self.output.range = 0..0;
                self.control.clear();
                return true;
            }
            Watch::Settings if self.side == Side::Client => {
                self.close(Reason::PROTOCOL_ERROR, Some(Error::HandshakeDeadline(self.endpoint.config.handshake_deadline)));
                return true;
            }
            Watch::Settings | Watch::Interval => {
                frame::put(&mut self.control, frame::PING, 0, 0, b"culvert!");
                self.sweep();
                self.watch = Watch::Answer;
                self.endpoint.config.ping_timeout
            }
            // Whoever sends something is alive.
            Watch::Answer if self.heard.elapsed() < self.endpoint.config.ping_timeout => {
                self.endpoint.config.ping_timeout.saturating_sub(self.heard.elapsed())
            }
            Watch::Answer => {
                self.close(Reason::NO_ERROR, Some(Error::PingTimeout(self.endpoint.config.ping_timeout)));
                return true;
            }
        };
        self.timer.as_mut().reset(Instant::now() + next);
        true
    }

    /// The peer answered a PING. Whether there was one to answer.
    pub(super) fn answered_ping(&mut self, payload: &[u8]) -> bool {
        if payload == LAST_CALL && self.life == (Life::Draining { last: None }) {
            self.life = Life::Draining { last: Some(self.last_peer_id) };
            self.goaway(self.last_peer_id, Reason::NO_ERROR);
            return true;
        }
        let expected = self.watch == Watch::Answer;
        if expected {
            self.watch = Watch::Interval;
            self.timer.as_mut().reset(Instant::now() + self.endpoint.config.ping_interval);
        }
        expected
    }
}
