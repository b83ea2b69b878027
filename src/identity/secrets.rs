//! The traffic secrets of a handshake, taken as they are made.
//!
//! rustls derives keys from the secrets and hands out keys alone. The forwarding core needs the secrets themselves: to update keys on its own, and to
//! move a live tunnel to another process. rustls offers them through its key log; this one writes nothing anywhere, it puts them where the
//! handshake that is being polled on this thread asked for them.

use std::cell::RefCell;
use std::fmt;

use rustls::KeyLog;
use zeroize::Zeroizing;

/// The first application traffic secrets (RFC 8446 §7.1). Wiped from memory when dropped.
#[derive(Default)]
pub struct TrafficSecrets {
    /// What the client seals with.
    pub client: Zeroizing<Vec<u8>>,
    /// What the server seals with.
    pub server: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for TrafficSecrets {
    /// Without the secrets.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("TrafficSecrets").finish_non_exhaustive()
    }
}

thread_local! {
    static CAPTURE: RefCell<Option<TrafficSecrets>> = const { RefCell::new(None) };
}

/// Runs one synchronous step of a handshake; traffic secrets that it makes go to `secrets`.
pub fn capture_secrets<T>(secrets: &mut TrafficSecrets, step: impl FnOnce() -> T) -> T {
    CAPTURE.set(Some(std::mem::take(secrets)));
    let outcome = step();
    *secrets = CAPTURE.take().unwrap_or_default();
    outcome
}

/// The key log of every configuration of this room.
#[derive(Debug)]
pub(super) struct Capture;

impl KeyLog for Capture {
    fn will_log(&self, label: &str) -> bool {
        matches!(label, "CLIENT_TRAFFIC_SECRET_0" | "SERVER_TRAFFIC_SECRET_0")
    }

    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        CAPTURE.with_borrow_mut(|capture| {
            let Some(secrets) = capture else { return };
            match label {
                "CLIENT_TRAFFIC_SECRET_0" => secrets.client = Zeroizing::new(secret.to_vec()),
                "SERVER_TRAFFIC_SECRET_0" => secrets.server = Zeroizing::new(secret.to_vec()),
                _ => {}
            }
        });
    }
}
