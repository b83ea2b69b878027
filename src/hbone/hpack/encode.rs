//! The encoder: literals that no table remembers, so it has no state to keep, to bound or to move (RFC 7541 §6.2.2).

use super::tables::STATIC;

/// Appends a `:status` (RFC 9113 §8.3.2).
pub(in crate::hbone) fn status(code: u16, out: &mut Vec<u8>) {
    let text = code.to_string();
    match STATIC.iter().position(|(name, value)| *name == ":status" && *value == text) {
        Some(index) => integer(index + 1, 7, 0x80, out),
        None => header(":status", text.as_bytes(), out),
    }
}

/// Appends a field without indexing; the name comes from the static table where it is listed.
pub(in crate::hbone) fn header(name: &str, value: &[u8], out: &mut Vec<u8>) {
    match STATIC.iter().position(|(listed, _)| *listed == name) {
        Some(index) => integer(index + 1, 4, 0, out),
        None => {
            out.push(0);
            string(name.as_bytes(), out);
        }
    }
    string(value, out);
}

fn string(text: &[u8], out: &mut Vec<u8>) {
    integer(text.len(), 7, 0, out);
    out.extend_from_slice(text);
}

fn integer(value: usize, prefix: u32, pattern: u8, out: &mut Vec<u8>) {
    let mask = (1usize << prefix) - 1;
    let low = |value: usize, bits: usize| u8::try_from(value & bits).unwrap_or(u8::MAX);
    if value < mask {
        out.push(pattern | low(value, mask));
        return;
    }
    out.push(pattern | low(mask, mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(0x80 | low(rest, 0x7f));
        rest >>= 7;
    }
    out.push(low(rest, 0x7f));
}
