//! HPACK, header compression for HTTP/2 (RFC 7541), as far as CONNECT needs it: a complete decoder, and an encoder that keeps no state.

mod decode;
mod encode;
mod huffman;
mod tables;

pub(super) use decode::TABLE_LIMIT;
pub use decode::{Decoder, HpackError};
pub(super) use encode::{header, status};

#[cfg(test)]
mod tests;
