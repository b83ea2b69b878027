//! A tunnel must not outlive the certificates that it was made with by more than a minute.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use tokio::time::Instant;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::Credential;
use crate::lifecycle::Clock;

/// How long streams may go on after a certificate expired.
const GRACE: Duration = Duration::from_secs(60);
/// As good as for ever, and no timer overflows.
const LONG: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// When a tunnel takes no new streams any more and when it is cut. Worked out once, on the monotonic clock: a jump of the wall clock cuts
/// nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    /// One of the certificates expires: no new streams.
    pub(super) farewell: Instant,
    /// The streams that are left are cut.
    pub(super) end: Instant,
}

impl Lifetime {
    /// The lifetime of a tunnel between `credential` and a peer that presented `chain`: the shorter of both.
    pub(super) fn new(credential: &Credential, chain: &[CertificateDer<'_>], clock: &Clock) -> Self {
        let expires = chain.iter().filter_map(not_after).fold(credential.not_after, SystemTime::min);
        Self::until(expires, clock.now())
    }

    fn until(expires: SystemTime, now: SystemTime) -> Self {
        let left = |grace: Duration| expires.checked_add(grace).and_then(|end| end.duration_since(now).ok()).unwrap_or_default().min(LONG);
        let begin = Instant::now();
        Self { farewell: begin + left(Duration::ZERO), end: begin + left(GRACE) }
    }
}

/// What does not parse was not accepted in the handshake either, so that leaving it out shortens nothing.
fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_ends_a_minute_after_the_first_certificate_expires() {
        let (now, begin) = (SystemTime::now(), Instant::now());
        let lifetime = Lifetime::until(now + Duration::from_secs(100), now);
        assert_eq!((lifetime.farewell - begin, lifetime.end - begin), (Duration::from_secs(100), Duration::from_secs(160)));
        let late = Lifetime::until(now - Duration::from_secs(59), now);
        assert_eq!((late.farewell - begin, late.end - begin), (Duration::ZERO, Duration::from_secs(1)));
        let never = Lifetime::until(now + LONG * 100, now);
        assert_eq!((never.farewell - begin, never.end - begin), (LONG, LONG));
    }
}
