//! Sealing records in place.

use aws_lc_rs::aead::Aad;

use super::keys::{Direction, Keys};
use super::{Content, HEADER, MAX_PLAINTEXT, RecordError, TAG, TRAILER};

/// Records sealed with one key before it is updated: below the 2^24.5 full-size records for which AES-GCM keeps its margin (RFC 8446 §5.5).
pub const KEY_LIMIT: u64 = 1 << 24;

/// Seals what we send.
pub struct Sealer {
    state: Direction,
    keys: Keys,
    key_limit: u64,
}

impl Sealer {
    /// Continues a direction.
    pub fn new(state: Direction) -> Result<Self, RecordError> {
        let keys = Keys::derive(state.suite, &state.secret)?;
        Ok(Self { state, keys, key_limit: KEY_LIMIT })
    }

    /// Lowers the number of records per key; from 1 to [`KEY_LIMIT`].
    #[must_use]
    pub fn with_key_limit(mut self, records: u64) -> Self {
        self.key_limit = records.clamp(1, KEY_LIMIT);
        self
    }

    /// Everything needed to continue elsewhere.
    #[must_use]
    pub fn state(&self) -> &Direction {
        &self.state
    }

    /// Whether the next record should be a KeyUpdate, followed by [`Sealer::update`].
    #[must_use]
    pub fn wants_update(&self) -> bool {
        self.state.sequence >= self.key_limit
    }

    /// Octets of a record with so much plaintext.
    #[must_use]
    pub const fn sealed_length(plaintext: usize) -> usize {
        HEADER + plaintext + TRAILER
    }

    /// Seals the record that `slot` holds, laid out as it goes on the wire: 5 octets for the header, `slot.len() - 22` of plaintext, 17 for
    /// type and tag.
    pub fn seal(&mut self, slot: &mut [u8], content: Content) -> Result<(), RecordError> {
        let body = slot.len().checked_sub(HEADER).ok_or(RecordError::Overflow)?;
        if !(TRAILER..=MAX_PLAINTEXT + TRAILER).contains(&body) {
            return Err(RecordError::Overflow);
        }
        let (header, rest) = slot.split_at_mut(HEADER);
        let (plain, tag) = rest.split_at_mut(body - TAG);
        let length = u16::try_from(body).map_err(|_| RecordError::Overflow)?.to_be_bytes();
        header.copy_from_slice(&[Content::ApplicationData.code(), 3, 3, length[0], length[1]]);
        plain[body - TAG - 1] = content.code();
        let nonce = self.keys.nonce(self.state.sequence);
        self.state.sequence = self.state.sequence.checked_add(1).ok_or(RecordError::Exhausted)?;
        let sealed = self.keys.key.seal_in_place_separate_tag(nonce, Aad::from(&*header), plain).map_err(|_| RecordError::Exhausted)?;
        tag.copy_from_slice(sealed.as_ref());
        Ok(())
    }

    /// Moves on to the next key; call after a KeyUpdate was sealed with the old one.
    pub fn update(&mut self) -> Result<(), RecordError> {
        self.state = self.state.updated()?;
        self.keys = Keys::derive(self.state.suite, &self.state.secret)?;
        Ok(())
    }
}
