//! What to do when `accept` fails.

use std::io;
use std::time::Duration;

/// Whose fault a failed `accept` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AcceptErrorKind {
    /// Of the connection that would have been accepted; the next one may be fine (accept(2), "Error handling").
    Connection,
    /// Of the machine or the process: out of descriptors, buffers or memory. It passes, but not by trying harder.
    Resource,
    /// Of the listener: closed, or not a listener. It will not pass.
    Listener,
}

impl AcceptErrorKind {
    /// Sorts an error of `accept`.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Self::Resource,
            Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EFAULT) => Self::Listener,
            _ => Self::Connection,
        }
    }
}

/// How long an accept loop waits after an error: not at all when only one connection was lost, and 1 ms to 1 s, doubling, when
/// resources are short or the listener is broken, so that the loop cannot spin. Not jittered: loops do not share a queue.
#[derive(Debug, Clone, Default)]
pub struct AcceptBackoff {
    failures: u32,
    connection_failures: u32,
}

impl AcceptBackoff {
    /// The first wait.
    pub const SHORTEST: Duration = Duration::from_millis(1);
    /// The longest wait.
    pub const LONGEST: Duration = Duration::from_secs(1);
    /// So many lost connections in a row are no accident any more; from then on the loop waits as for resources.
    pub const SUSPICIOUS: u32 = 128;

    /// Nothing failed yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How long to wait before the next `accept`.
    pub fn failed(&mut self, error: &io::Error) -> Duration {
        if AcceptErrorKind::of(error) == AcceptErrorKind::Connection {
            self.connection_failures = self.connection_failures.saturating_add(1);
            if self.connection_failures <= Self::SUSPICIOUS {
                return Duration::ZERO;
            }
        }
        let wait = Self::SHORTEST.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(Self::LONGEST);
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// A connection was accepted: start over.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: i32) -> io::Error {
        io::Error::from_raw_os_error(code)
    }

    #[test]
    fn a_lost_connection_is_no_reason_to_wait() {
        for code in [libc::ECONNABORTED, libc::EINTR, libc::EPROTO, libc::EPERM, libc::ENETDOWN, libc::EHOSTUNREACH, libc::ECONNRESET] {
            assert_eq!(AcceptErrorKind::of(&error(code)), AcceptErrorKind::Connection);
            assert_eq!(AcceptBackoff::new().failed(&error(code)), Duration::ZERO, "{}", error(code));
        }
    }

    #[test]
    fn short_resources_wait_from_a_millisecond_to_a_second_until_a_success() {
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM] {
            assert_eq!(AcceptErrorKind::of(&error(code)), AcceptErrorKind::Resource);
            let mut backoff = AcceptBackoff::new();
            for millis in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000] {
                assert_eq!(backoff.failed(&error(code)), Duration::from_millis(millis));
                assert_eq!(backoff.failed(&error(libc::ECONNABORTED)), Duration::ZERO);
            }
            assert!((0..100).all(|_| backoff.failed(&error(code)) == AcceptBackoff::LONGEST));
            backoff.succeeded();
            assert_eq!(backoff.failed(&error(code)), AcceptBackoff::SHORTEST);
        }
    }

    #[test]
    fn no_error_can_make_the_loop_spin() {
        assert_eq!(AcceptErrorKind::of(&error(libc::EBADF)), AcceptErrorKind::Listener);
        assert_eq!(AcceptBackoff::new().failed(&error(libc::EBADF)), AcceptBackoff::SHORTEST);
        for odd in [error(libc::ECONNABORTED), io::Error::other("not from the kernel")] {
            let mut backoff = AcceptBackoff::new();
            let waited: Duration = (0..1000).map(|_| backoff.failed(&odd)).sum();
            assert!(waited > Duration::from_secs(100));
        }
    }
}
