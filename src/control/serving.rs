//! The server's own certificate: signed by the CA it serves, renewed before it is half used, and at once when there is another CA.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::signer::Signer;
use crate::identity::IdentityError;
use crate::lifecycle::Clock;
use crate::telemetry::limited;

/// A server certificate's lifetime. Not long: it costs nothing to make another.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// After a failure the CA is not asked again before this.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// Gives every handshake a certificate that has time left.
pub(super) struct Serving {
    issuer: Arc<Signer>,
    names: Vec<String>,
    clock: Clock,
    current: Mutex<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    renew_at: SystemTime,
    until: SystemTime,
    /// The CA that signed it, by its number; that of a new one which could not, so that it is not asked at every handshake.
    generation: u64,
}

impl Serving {
    pub(super) fn new(issuer: Arc<Signer>, names: Vec<String>, clock: Clock) -> Result<Self, IdentityError> {
        let current = Mutex::new(Current::new(&issuer, &names)?);
        Ok(Self { issuer, names, clock, current })
    }

    fn certificate(&self) -> Option<Arc<CertifiedKey>> {
        let now = self.clock.now();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = self.issuer.generation();
        if now >= current.renew_at || generation != current.generation {
            match Current::new(&self.issuer, &self.names) {
                Ok(new) => *current = new,
                Err(error) => {
                    limited!(error, "the server's own certificate", "the control plane's own certificate cannot be renewed: {error}");
                    (current.renew_at, current.generation) = (now + TRY_AGAIN, generation);
                }
            }
        }
        (now < current.until).then(|| current.key.clone())
    }
}

impl Current {
    fn new(issuer: &Signer, names: &[String]) -> Result<Self, IdentityError> {
        // First: a CA that comes in between makes another certificate.
        let generation = issuer.generation();
        let certificate = issuer.current().issue_server(names, LIFETIME)?;
        let half = certificate.until.duration_since(certificate.from).unwrap_or_default() / 2;
        Ok(Self { key: Arc::new(certificate.certified), renew_at: certificate.from + half, until: certificate.until, generation })
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certificate()
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Serving").field("names", &self.names).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::identity::LocalIssuer;
    use crate::lifecycle::SettableTime;

    #[test]
    fn the_certificate_is_kept_for_half_its_life_and_never_shown_after_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let time = SettableTime::new(SystemTime::now());
        let clock = Clock::fixed(time.clone());
        LocalIssuer::create(directory.path(), &clock).unwrap();
        let issuer = Arc::new(Signer::load(directory.path(), clock.clone()).unwrap());
        let serving = Serving::new(issuer, vec!["localhost".into(), "127.0.0.1".into()], clock).unwrap();
        let first = serving.certificate().unwrap();
        assert!(Arc::ptr_eq(&first, &serving.certificate().unwrap()));
        time.advance(LIFETIME / 2 + Duration::from_secs(1));
        let second = serving.certificate().unwrap();
        assert!(!Arc::ptr_eq(&first, &second), "not renewed at half its life");
        // Long after the CA itself has ended nothing can be renewed.
        time.advance(Duration::from_secs(20 * 365 * 24 * 60 * 60));
        assert!(serving.certificate().is_none(), "an expired certificate is shown");
    }
}
