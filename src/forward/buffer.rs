//! How much to read at once.

/// Smallest read, in bytes: one request or one small record.
pub const MIN_READ: usize = 16 * 1024;
/// Largest read, in bytes: beyond this a larger read no longer saves system calls worth having.
pub const MAX_READ: usize = 256 * 1024;

/// The size of the next read: doubles when a read filled it, halves when a read used less than a quarter, so that a connection that was
/// once busy does not keep asking for large buffers.
#[derive(Debug, Clone, Copy)]
pub struct ReadSize(usize);

impl Default for ReadSize {
    fn default() -> Self {
        Self(MIN_READ)
    }
}

impl ReadSize {
    /// Bytes to ask for.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.0
    }

    /// Learns from what the last read brought.
    pub fn learn(&mut self, read: usize) {
        if read >= self.0 {
            self.0 = (self.0 * 2).min(MAX_READ);
        } else if read < self.0 / 4 {
            self.0 = (self.0 / 2).max(MIN_READ);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_size_grows_when_filled_and_shrinks_when_idle() {
        let mut size = ReadSize::default();
        for _ in 0..10 {
            size.learn(size.bytes());
        }
        assert_eq!(size.bytes(), MAX_READ);
        size.learn(MAX_READ / 2);
        assert_eq!(size.bytes(), MAX_READ);
        for _ in 0..10 {
            size.learn(100);
        }
        assert_eq!(size.bytes(), MIN_READ);
    }
}
