//! PINGs that find dead peers (reference, dataplane §2.2): the first after one interval, the next an interval after each answer.
//!
//! A peer is dead when it was silent for [`Config::ping_timeout`] with a PING open. Whatever it sends is a sign of life: on a slow link an
//! answer can be stuck for long behind the bytes of a transfer that is going well, and the reference cuts such tunnels.

use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, sleep, sleep_until};

use super::frames::Traffic;
use super::{Config, Error};

/// A peer that sends but has not answered for this many times the timeout is given up too: it does not read.
const PATIENCE: u32 = 4;

/// Pings until the peer is dead or the tunnel closes; returns why.
pub(super) async fn keep_alive(pings: Option<PingPong>, traffic: &Traffic, config: &Config) -> Error {
    let Some(mut pings) = pings else {
        // The handle is taken once per connection; without it there is nothing to watch.
        return std::future::pending().await;
    };
    loop {
        sleep(config.ping_interval).await;
        let sent = Instant::now();
        let mut answer = std::pin::pin!(pings.ping(Ping::opaque()));
        loop {
            let until = dead_at(sent, traffic.heard(), config);
            tokio::select! {
                biased;
                answer = &mut answer => match answer {
                    Ok(_) => break,
                    Err(error) => return Error::Tunnel(error.to_string()),
                },
                () = sleep_until(until) => if dead_at(sent, traffic.heard(), config) <= Instant::now() {
                    return Error::PingTimeout(config.ping_timeout);
                },
            }
        }
    }
}

/// When a peer is dead that does not answer the PING of `sent` and was heard last at `heard`. It has some time to answer in any case.
fn dead_at(sent: Instant, heard: Instant, config: &Config) -> Instant {
    let timeout = config.ping_timeout;
    let least = timeout.saturating_sub(config.ping_interval).max(timeout / 3).max(Duration::from_millis(1));
    (heard + timeout).max(sent + least).min(sent + timeout * PATIENCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_peer_is_dead_after_the_timeout_and_one_that_is_heard_is_not() {
        let config = Config::default();
        let (second, begin) = (Duration::from_secs(1), Instant::now());
        let sent = begin + 10 * second;
        assert_eq!(dead_at(sent, begin, &config), begin + 15 * second, "silent from the beginning");
        assert_eq!(dead_at(sent, begin + 9 * second, &config), begin + 24 * second, "silent for a second when the PING went");
        assert_eq!(dead_at(sent, begin + 30 * second, &config), begin + 45 * second, "heard since");
        assert_eq!(dead_at(sent, begin + 100 * second, &config), begin + 70 * second, "never answers");
        let config = Config { ping_interval: 60 * second, ..config };
        assert_eq!(dead_at(begin + 60 * second, begin, &config), begin + 65 * second, "a PING has a third of the timeout at least");
    }
}
