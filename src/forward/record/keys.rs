//! The key schedule after the handshake (RFC 8446 §7.2, §7.3).

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Algorithm, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, HKDF_SHA384, KeyType, Prk};

use zeroize::{Zeroize as _, Zeroizing};

use super::RecordError;

/// The cipher suites that the core serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// TLS_AES_128_GCM_SHA256.
    Aes128Gcm,
    /// TLS_AES_256_GCM_SHA384.
    Aes256Gcm,
}

impl Suite {
    fn aead(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm => &AES_128_GCM,
            Self::Aes256Gcm => &AES_256_GCM,
        }
    }

    fn hkdf(self) -> hkdf::Algorithm {
        match self {
            Self::Aes128Gcm => HKDF_SHA256,
            Self::Aes256Gcm => HKDF_SHA384,
        }
    }

    /// Octets of a traffic secret: the output of the suite's hash.
    #[must_use]
    pub fn secret_length(self) -> usize {
        match self {
            Self::Aes128Gcm => 32,
            Self::Aes256Gcm => 48,
        }
    }
}

/// The state of one direction, complete: everything else is derived from it.
#[derive(Clone)]
pub struct Direction {
    /// Cipher suite.
    pub suite: Suite,
    /// The current traffic secret; [`Suite::secret_length`] octets.
    pub secret: Vec<u8>,
    /// Records already sealed or opened with it.
    pub sequence: u64,
}

/// The secret is wiped from memory.
impl Drop for Direction {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

impl std::fmt::Debug for Direction {
    /// Without the secret.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Direction").field("suite", &self.suite).field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// The keys of a direction, ready for use.
pub(super) struct Keys {
    pub(super) key: LessSafeKey,
    iv: [u8; 12],
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand-Label with an empty context (RFC 8446 §7.1).
fn expand_label(suite: Suite, secret: &[u8], label: &str, out: &mut [u8]) -> Result<(), RecordError> {
    let length = u16::try_from(out.len()).map_err(|_| RecordError::Exhausted)?.to_be_bytes();
    let full = 6 + label.len();
    let full = [u8::try_from(full).map_err(|_| RecordError::Exhausted)?];
    let info = [&length[..], &full, b"tls13 ", label.as_bytes(), &[0]];
    Prk::new_less_safe(suite.hkdf(), secret).expand(&info, Length(out.len())).and_then(|okm| okm.fill(out)).map_err(|_| RecordError::Exhausted)
}

impl Keys {
    pub(super) fn derive(suite: Suite, secret: &[u8]) -> Result<Self, RecordError> {
        let mut key = Zeroizing::new([0; 32]);
        let key = &mut key[..suite.aead().key_len()];
        expand_label(suite, secret, "key", key)?;
        let mut iv = [0; 12];
        expand_label(suite, secret, "iv", &mut iv)?;
        let key = UnboundKey::new(suite.aead(), key).map(LessSafeKey::new).map_err(|_| RecordError::Exhausted)?;
        Ok(Self { key, iv })
    }

    /// The nonce of a record: its number, XORed into the IV (RFC 8446 §5.3).
    pub(super) fn nonce(&self, sequence: u64) -> Nonce {
        let mut nonce = self.iv;
        for (byte, counter) in nonce[4..].iter_mut().zip(sequence.to_be_bytes()) {
            *byte ^= counter;
        }
        Nonce::assume_unique_for_key(nonce)
    }
}

impl Direction {
    /// The state after a KeyUpdate (RFC 8446 §7.2).
    pub(super) fn updated(&self) -> Result<Self, RecordError> {
        let mut secret = vec![0; self.suite.secret_length()];
        expand_label(self.suite, &self.secret, "traffic upd", &mut secret)?;
        Ok(Self { suite: self.suite, secret, sequence: 0 })
    }
}
