//! How the state of a tunnel is written: numbers big-endian, lists and byte strings behind their 32-bit length, structs field by field in the
//! order of their declaration, around it a frame with a version and a checksum. Reading never takes more memory than a small multiple of what
//! is there to read, and never panics.

use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use zeroize::Zeroizing;

use crate::forward::record::{Direction, Suite};
use crate::hbone::Role;
use crate::hbone::engine::Side;
use crate::model::SpiffeId;

/// The first bytes of every state.
const MAGIC: &[u8; 8] = b"CVTUNNEL";
/// The format that this build writes, and the only one that it reads.
const VERSION: u16 = 2;
/// Magic, version, length of the body.
const HEAD: usize = 8 + 2 + 4;
const CHECKSUM: usize = 32;
/// Longer spans of time mean nothing in a tunnel, and shorter ones overflow no clock.
const LONGEST: Duration = Duration::from_secs(20 * 365 * 24 * 3600);

/// Why the state of a tunnel is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It begins like something else.
    #[error("this is not the state of a tunnel")]
    Foreign,
    /// Another build wrote it.
    #[error("the state of a tunnel has version {0}, this build reads version {VERSION}")]
    Version(u16),
    /// Bytes are missing, or there are too many.
    #[error("the state of a tunnel is cut off or too long")]
    Length,
    /// Some byte is not what was written.
    #[error("the state of a tunnel is corrupted: its checksum is wrong")]
    Checksum,
    /// A value that no tunnel can have.
    #[error("the state of a tunnel is impossible: {0}")]
    Invalid(&'static str),
    /// There must be one socket for the tunnel and one for each stream.
    #[error("the state of a tunnel needs {expected} sockets, {given} came with it")]
    Sockets {
        /// One more than it has streams.
        expected: usize,
        /// What there was.
        given: usize,
    },
}

/// Where the bytes of a state go: counted first, so that secrets lie in one piece of memory that never moves, and then written.
pub(super) trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

#[derive(Default)]
struct Count(usize);

impl Sink for Count {
    fn put(&mut self, bytes: &[u8]) {
        self.0 += bytes.len();
    }
}

impl Sink for Zeroizing<Vec<u8>> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// What is left to read.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(StateError::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        self.take(N)?.try_into().map_err(|_| StateError::Length)
    }

    fn length(&mut self) -> Result<usize, StateError> {
        u32::read(self).map(|length| length as usize)
    }
}

/// Something that can be written and read again.
pub(super) trait Plain: Sized {
    fn write(&self, out: &mut dyn Sink);
    fn read(input: &mut Reader<'_>) -> Result<Self, StateError>;
}

/// A struct of plain fields, written in the order in which they stand.
macro_rules! plain {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$about])*
        pub(in crate::hbone) struct $name {
            $($(#[$doc])* pub(in crate::hbone) $field: $kind,)*
        }

        impl $crate::hbone::engine::frozen::encoding::Plain for $name {
            fn write(&self, out: &mut dyn $crate::hbone::engine::frozen::encoding::Sink) {
                $($crate::hbone::engine::frozen::encoding::Plain::write(&self.$field, out);)*
            }

            fn read(input: &mut $crate::hbone::engine::frozen::encoding::Reader<'_>) -> Result<Self, $crate::hbone::engine::frozen::StateError> {
                Ok(Self { $($field: $crate::hbone::engine::frozen::encoding::Plain::read(input)?,)* })
            }
        }
    };
}
pub(super) use plain;

macro_rules! numbers {
    ($($kind:ty),*) => {$(
        impl Plain for $kind {
            fn write(&self, out: &mut dyn Sink) {
                out.put(&self.to_be_bytes());
            }

            fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
                input.array().map(Self::from_be_bytes)
            }
        }
    )*};
}
numbers!(u8, u16, u32, u64, i64);

impl Plain for bool {
    fn write(&self, out: &mut dyn Sink) {
        out.put(&[u8::from(*self)]);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        match u8::read(input)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(StateError::Invalid("neither yes nor no")),
        }
    }
}

/// In milliseconds.
impl Plain for Duration {
    fn write(&self, out: &mut dyn Sink) {
        u64::try_from(self.as_millis()).unwrap_or(u64::MAX).write(out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        let span = Self::from_millis(u64::read(input)?);
        if span <= LONGEST { Ok(span) } else { Err(StateError::Invalid("a time too far away")) }
    }
}

fn put_bytes(bytes: &[u8], out: &mut dyn Sink) {
    // Longer ones cannot be: windows are below 2^31. If one were, its reader would refuse it.
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).write(out);
    out.put(bytes);
}

impl Plain for Vec<u8> {
    fn write(&self, out: &mut dyn Sink) {
        put_bytes(self, out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        let length = input.length()?;
        input.take(length).map(<[u8]>::to_vec)
    }
}

/// A list of structs. (Bytes go in one piece.)
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::hbone) struct List<T>(pub(in crate::hbone) Vec<T>);

impl<T: Plain> Plain for List<T> {
    fn write(&self, out: &mut dyn Sink) {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX).write(out);
        self.0.iter().for_each(|item| item.write(out));
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        // Nothing is reserved for what may not be there.
        let count = input.length()?;
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(T::read(input)?);
        }
        Ok(Self(items))
    }
}

impl<T: Plain> Plain for Option<T> {
    fn write(&self, out: &mut dyn Sink) {
        self.is_some().write(out);
        if let Some(value) = self {
            value.write(out);
        }
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        if bool::read(input)? { T::read(input).map(Some) } else { Ok(None) }
    }
}

impl Plain for SpiffeId {
    fn write(&self, out: &mut dyn Sink) {
        put_bytes(self.to_string().as_bytes(), out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        let name = String::from_utf8(Vec::read(input)?).ok().and_then(|name| name.parse().ok());
        name.ok_or(StateError::Invalid("the peer has no SPIFFE name"))
    }
}

impl Plain for Side {
    fn write(&self, out: &mut dyn Sink) {
        (*self == Self::Server).write(out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(if bool::read(input)? { Self::Server } else { Self::Client })
    }
}

impl Plain for Role {
    fn write(&self, out: &mut dyn Sink) {
        (*self == Self::Server).write(out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        Ok(if bool::read(input)? { Self::Server } else { Self::Client })
    }
}

/// Cipher suites by their numbers in TLS (RFC 8446 §B.4).
impl Plain for Direction {
    fn write(&self, out: &mut dyn Sink) {
        let suite: u16 = match self.suite {
            Suite::Aes128Gcm => 0x1301,
            Suite::Aes256Gcm => 0x1302,
        };
        suite.write(out);
        put_bytes(&self.secret, out);
        self.sequence.write(out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, StateError> {
        let suite = match u16::read(input)? {
            0x1301 => Suite::Aes128Gcm,
            0x1302 => Suite::Aes256Gcm,
            _ => return Err(StateError::Invalid("an unknown cipher suite")),
        };
        let length = input.length()?;
        if length != suite.secret_length() {
            return Err(StateError::Invalid("a secret of a wrong length"));
        }
        let secret = input.take(length)?.to_vec();
        Ok(Self { suite, secret, sequence: u64::read(input)? })
    }
}

/// The frame around a state.
pub(super) fn seal(state: &impl Plain) -> Zeroizing<Vec<u8>> {
    let mut body = Count::default();
    state.write(&mut body);
    let mut out = Zeroizing::new(Vec::with_capacity(HEAD + body.0 + CHECKSUM));
    out.put(MAGIC);
    VERSION.write(&mut out);
    u32::try_from(body.0).unwrap_or(u32::MAX).write(&mut out);
    state.write(&mut out);
    let checksum = digest(&SHA256, &out);
    out.put(checksum.as_ref());
    out
}

/// What [`seal`] made.
pub(super) fn open<T: Plain>(bytes: &[u8]) -> Result<T, StateError> {
    let mut input = Reader(bytes);
    let magic = input.take(MAGIC.len().min(bytes.len()))?;
    if !MAGIC.starts_with(magic) {
        return Err(StateError::Foreign);
    }
    if magic.len() < MAGIC.len() {
        return Err(StateError::Length);
    }
    let version = u16::read(&mut input)?;
    if version != VERSION {
        return Err(StateError::Version(version));
    }
    let length = input.length()?;
    let mut body = Reader(input.take(length)?);
    let checksum: [u8; CHECKSUM] = input.array()?;
    if !input.0.is_empty() {
        return Err(StateError::Length);
    }
    if digest(&SHA256, bytes.get(..HEAD + length).unwrap_or_default()).as_ref() != checksum {
        return Err(StateError::Checksum);
    }
    let state = T::read(&mut body)?;
    if body.0.is_empty() { Ok(state) } else { Err(StateError::Length) }
}
