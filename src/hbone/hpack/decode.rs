//! The decoder.

use super::huffman;
use super::tables::{Dynamic, STATIC};

/// Why a header block ends the connection with COMPRESSION_ERROR (RFC 9113 §4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HpackError {
    /// The block ends in the middle of a field.
    #[error("header block is cut off")]
    Truncated,
    /// An integer that no field can need.
    #[error("integer too large")]
    Integer,
    /// An index that names no entry (RFC 7541 §2.3.3).
    #[error("index without an entry")]
    Index,
    /// A malformed Huffman string (RFC 7541 §5.2).
    #[error("malformed Huffman string")]
    Huffman,
    /// Far more decoded than any list may have (CVE-2026-47774): reading on would only cost.
    #[error("header list too large")]
    Bomb,
    /// A table size update above what we allow, or not at the start of the block (RFC 7541 §4.2, §6.3).
    #[error("bad table size update")]
    TableSize,
}

/// The table size that applies until the peer changes it, and the most that it may use: the default of SETTINGS_HEADER_TABLE_SIZE.
pub(in crate::hbone) const TABLE_LIMIT: usize = 4096;
/// Integers above this cannot be meant seriously: no block is that long.
const INTEGER_LIMIT: usize = 1 << 20;

/// A list this many times larger than what is taken ends the connection.
const BOMB: usize = 4;

/// Decodes header blocks; holds at most 4 KiB of table.
#[derive(Debug, Clone)]
pub struct Decoder {
    table: Dynamic,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { table: Dynamic::new(TABLE_LIMIT), name: Vec::new(), value: Vec::new() }
    }
}

impl Decoder {
    /// Continues with a table of `max` octets; `entries` come oldest first.
    pub(in crate::hbone) fn with_table<'a>(max: usize, entries: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut table = Dynamic::new(max.min(TABLE_LIMIT));
        entries.for_each(|(name, value)| table.insert(name, value));
        Self { table, ..Self::default() }
    }

    /// The present size limit of the table, octets.
    pub(in crate::hbone) fn limit(&self) -> usize {
        self.table.max()
    }

    /// The table's entries, oldest first.
    pub(in crate::hbone) fn entries(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.table.oldest_first()
    }

    /// Decodes one whole block. Fields go to `visit` as long as their decoded size, counted as in RFC 9113 §6.5.2 (32 octets more than name
    /// and value), stays within `budget`; returns whether all of them did. The rest is still decoded, since it changes the table.
    ///
    /// # Errors
    /// Why the block is malformed, or decodes to more than four times `budget`. The decoder must not be used any more.
    pub fn decode(&mut self, mut block: &[u8], budget: usize, mut visit: impl FnMut(&[u8], &[u8])) -> Result<bool, HpackError> {
        let mut left = Some(budget);
        let mut total = 0;
        let mut spend = |name: &[u8], value: &[u8]| {
            total += name.len() + value.len() + 32;
            left = left.and_then(|left| left.checked_sub(name.len() + value.len() + 32));
            if left.is_some() {
                visit(name, value);
            }
            if total > BOMB * budget { Err(HpackError::Bomb) } else { Ok(()) }
        };
        let mut at_start = true;
        while let Some(first) = block.first().copied() {
            if first & 0x80 != 0 {
                let index = integer(&mut block, 7)?;
                let (name, value) = entry(&self.table, index)?;
                spend(name, value)?;
            } else if first & 0x40 != 0 {
                self.literal(&mut block, 6)?;
                spend(&self.name, &self.value)?;
                self.table.insert(&self.name, &self.value);
            } else if first & 0x20 != 0 {
                let size = integer(&mut block, 5)?;
                if !at_start || size > TABLE_LIMIT {
                    return Err(HpackError::TableSize);
                }
                self.table.resize(size);
                continue;
            } else {
                self.literal(&mut block, 4)?;
                spend(&self.name, &self.value)?;
            }
            at_start = false;
        }
        Ok(left.is_some())
    }

    fn literal(&mut self, block: &mut &[u8], prefix: u32) -> Result<(), HpackError> {
        self.name.clear();
        self.value.clear();
        match integer(block, prefix)? {
            0 => string(block, &mut self.name)?,
            index => self.name.extend_from_slice(entry(&self.table, index)?.0),
        }
        string(block, &mut self.value)
    }
}

fn entry(table: &Dynamic, index: usize) -> Result<(&[u8], &[u8]), HpackError> {
    let index = index.checked_sub(1).ok_or(HpackError::Index)?;
    match STATIC.get(index) {
        Some((name, value)) => Ok((name.as_bytes(), value.as_bytes())),
        None => table.at(index - STATIC.len()).ok_or(HpackError::Index),
    }
}

/// An integer with a prefix of so many bits (RFC 7541 §5.1).
fn integer(block: &mut &[u8], prefix: u32) -> Result<usize, HpackError> {
    let (first, mut rest) = block.split_first().ok_or(HpackError::Truncated)?;
    let mask = (1usize << prefix) - 1;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (byte, after) = rest.split_first().ok_or(HpackError::Truncated)?;
            rest = after;
            value += usize::from(byte & 0x7f) << shift;
            if value > INTEGER_LIMIT || shift > 21 {
                return Err(HpackError::Integer);
            }
            if byte & 0x80 == 0 {
                break;
            }
            shift += 7;
        }
    }
    *block = rest;
    Ok(value)
}

/// A string, plain or Huffman-coded (RFC 7541 §5.2).
fn string(block: &mut &[u8], out: &mut Vec<u8>) -> Result<(), HpackError> {
    let coded = block.first().ok_or(HpackError::Truncated)? & 0x80 != 0;
    let length = integer(block, 7)?;
    if length > block.len() {
        return Err(HpackError::Truncated);
    }
    let (text, rest) = block.split_at(length);
    *block = rest;
    if coded {
        huffman::decode(text, out).map_err(|huffman::Malformed| HpackError::Huffman)
    } else {
        out.extend_from_slice(text);
        Ok(())
    }
}
