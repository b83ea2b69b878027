//! The TLS 1.3 record layer (RFC 8446 §5) on AEAD in place: no copy, no allocation per record.
//!
//! rustls does the handshake and hands over the traffic secrets; from then on sealing and opening happen here. The whole state of a direction
//! is its traffic secret and a counter ([`Direction`]), so that a live connection can be written out and taken up again.

mod keys;
mod open;
mod seal;
#[cfg(test)]
mod tests;

pub use keys::{Direction, Suite};
pub use open::{Opened, Opener};
pub use seal::{KEY_LIMIT, Sealer};

/// Octets before the ciphertext: type, legacy version, length.
pub const HEADER: usize = 5;
/// Octets after the plaintext: the inner content type and the tag.
pub const TRAILER: usize = 1 + TAG;
/// Octets of the AEAD tag.
pub const TAG: usize = 16;
/// Most plaintext in a record (RFC 8446 §5.1).
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// Most octets after the header of a record that we accept (RFC 8446 §5.2).
pub const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;

/// What a record carries (RFC 8446 §5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes of the application.
    ApplicationData,
    /// A post-handshake message, or a part of one.
    Handshake,
    /// An alert.
    Alert,
}

impl Content {
    fn code(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::ApplicationData => 23,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            21 => Some(Self::Alert),
            22 => Some(Self::Handshake),
            23 => Some(Self::ApplicationData),
            _ => None,
        }
    }
}

/// Why a record ends the connection; each has the alert that RFC 8446 §6.2 asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It does not decrypt: bad_record_mac.
    #[error("a record does not decrypt")]
    BadMac,
    /// It is longer than the protocol allows: record_overflow.
    #[error("a record is too long")]
    Overflow,
    /// It is not of a type that may come after the handshake: unexpected_message.
    #[error("a record of an unexpected type")]
    Unexpected,
    /// A post-handshake message has a field with a value that does not exist: illegal_parameter.
    #[error("a post-handshake message with an illegal value")]
    Illegal,
    /// A post-handshake message or an alert does not have the length of its kind: decode_error.
    #[error("a malformed post-handshake message")]
    Malformed,
    /// The sequence number ran out; keys should have been updated long before: internal_error.
    #[error("the record counter is used up")]
    Exhausted,
}

impl RecordError {
    /// The alert description (RFC 8446 §6).
    #[must_use]
    pub fn alert(self) -> u8 {
        match self {
            Self::Unexpected => 10,
            Self::BadMac => 20,
            Self::Overflow => 22,
            Self::Illegal => 47,
            Self::Malformed => 50,
            Self::Exhausted => 80,
        }
    }
}
