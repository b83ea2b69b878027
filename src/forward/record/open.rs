//! Opening records in place.

use std::ops::Range;

use aws_lc_rs::aead::Aad;

use super::keys::{Direction, Keys};
use super::{Content, HEADER, MAX_CIPHERTEXT, MAX_PLAINTEXT, RecordError, TAG};

/// Opens what we receive.
pub struct Opener {
    state: Direction,
    keys: Keys,
}

/// One opened record, in terms of the buffer that it was opened in.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    /// What it carries.
    pub content: Content,
    /// Where the plaintext is.
    pub plaintext: Range<usize>,
    /// Where the next record begins.
    pub end: usize,
}

impl Opener {
    /// Continues a direction.
    pub fn new(state: Direction) -> Result<Self, RecordError> {
        let keys = Keys::derive(state.suite, &state.secret)?;
        Ok(Self { state, keys })
    }

    /// Everything needed to continue elsewhere.
    #[must_use]
    pub fn state(&self) -> &Direction {
        &self.state
    }

    /// Octets that the record at the start of `buffer` takes, once its header is there.
    ///
    /// # Errors
    /// When the header is not one that may come after the handshake, or the record is too long.
    pub fn record_length(buffer: &[u8]) -> Result<Option<usize>, RecordError> {
        let Some([kind, _, _, high, low]) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
        if *kind != Content::ApplicationData.code() {
            return Err(RecordError::Unexpected);
        }
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length > MAX_CIPHERTEXT {
            return Err(RecordError::Overflow);
        }
        if length < TAG + 1 {
            return Err(RecordError::BadMac);
        }
        Ok(Some(HEADER + length))
    }

    /// Opens the record that starts at `start`; `None` while it is incomplete.
    pub fn open(&mut self, buffer: &mut [u8], start: usize) -> Result<Option<Opened>, RecordError> {
        let record = buffer.get_mut(start..).ok_or(RecordError::Overflow)?;
        let Some(length) = Self::record_length(record)? else { return Ok(None) };
        let Some(record) = record.get_mut(..length) else { return Ok(None) };
        let (header, body) = record.split_at_mut(HEADER);
        let nonce = self.keys.nonce(self.state.sequence);
        self.state.sequence = self.state.sequence.checked_add(1).ok_or(RecordError::Exhausted)?;
        let plain = self.keys.key.open_in_place(nonce, Aad::from(&*header), body).map_err(|_| RecordError::BadMac)?;
        // Padding is zeros behind the type (RFC 8446 §5.4).
        let kind = plain.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Unexpected)?;
        if kind > MAX_PLAINTEXT {
            return Err(RecordError::Overflow);
        }
        let content = plain.get(kind).copied().and_then(Content::from_code).ok_or(RecordError::Unexpected)?;
        Ok(Some(Opened { content, plaintext: start + HEADER..start + HEADER + kind, end: start + length }))
    }

    /// Moves on to the next key; call after the peer's KeyUpdate.
    pub fn update(&mut self) -> Result<(), RecordError> {
        self.state = self.state.updated()?;
        self.keys = Keys::derive(self.state.suite, &self.state.secret)?;
        Ok(())
    }
}
