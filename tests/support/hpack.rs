//! HPACK (RFC 7541) by hand: an encoder that does exactly what it is told, legal or not, and a complete decoder.

use std::collections::VecDeque;

/// An integer with a prefix of `bits`, in the low bits of a byte that starts as `pattern` (§5.1).
pub fn integer(pattern: u8, bits: u8, value: usize) -> Vec<u8> {
    let most = (1_usize << bits) - 1;
    if value < most {
        return vec![pattern | u8::try_from(value).unwrap()];
    }
    let mut bytes = vec![pattern | u8::try_from(most).unwrap()];
    let mut rest = value - most;
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).unwrap() | 0x80);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).unwrap());
    bytes
}

/// A string that is not Huffman coded (§5.2).
pub fn string(text: &[u8]) -> Vec<u8> {
    [integer(0, 7, text.len()), text.to_vec()].concat()
}

/// A field from a table (§6.1).
pub fn indexed(index: usize) -> Vec<u8> {
    integer(0x80, 7, index)
}

/// A field that is not put into the table, with a literal name (§6.2.2).
pub fn literal(name: &str, value: &[u8]) -> Vec<u8> {
    [vec![0], string(name.as_bytes()), string(value)].concat()
}

/// A field that is put into the table, with a literal name (§6.2.1).
pub fn literal_into_table(name: &str, value: &[u8]) -> Vec<u8> {
    [vec![0x40], string(name.as_bytes()), string(value)].concat()
}

/// A change of the size of the table (§6.3).
pub fn table_size(size: usize) -> Vec<u8> {
    integer(0x20, 5, size)
}

/// A whole header block of literals.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| literal(name, value.as_bytes())).collect()
}

/// The decoding side of a connection.
#[derive(Debug)]
pub struct Decoder {
    table: VecDeque<(String, String)>,
    limit: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { table: VecDeque::new(), limit: 4096 }
    }
}

impl Decoder {
    /// The fields of one header block. Panics when it is not legal.
    pub fn decode(&mut self, block: &[u8]) -> Vec<(String, String)> {
        let mut input = Input(block);
        let mut fields = Vec::new();
        while let Some(first) = input.peek() {
            if first & 0x80 != 0 {
                let index = input.integer(7);
                fields.push(self.field(index));
            } else if first & 0xe0 == 0x20 {
                self.limit = input.integer(5);
                self.evict();
            } else {
                let into_table = first & 0xc0 == 0x40;
                let index = input.integer(if into_table { 6 } else { 4 });
                let name = if index == 0 { input.string() } else { self.field(index).0 };
                let value = input.string();
                if into_table {
                    self.table.push_front((name.clone(), value.clone()));
                    self.evict();
                }
                fields.push((name, value));
            }
        }
        fields
    }

    fn field(&self, index: usize) -> (String, String) {
        match STATIC.get(index.checked_sub(1).expect("index 0")) {
            Some((name, value)) => ((*name).to_owned(), (*value).to_owned()),
            None => self.table.get(index - 1 - STATIC.len()).cloned().expect("index beyond the table"),
        }
    }

    fn evict(&mut self) {
        while self.table.iter().map(|(name, value)| name.len() + value.len() + 32).sum::<usize>() > self.limit {
            self.table.pop_back();
        }
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().expect("block ends too early");
        self.0 = rest;
        *first
    }

    fn integer(&mut self, bits: u8) -> usize {
        let most = (1_usize << bits) - 1;
        let mut value = usize::from(self.byte()) & most;
        if value == most {
            for shift in (0..28).step_by(7) {
                let byte = self.byte();
                value += usize::from(byte & 0x7f) << shift;
                if byte & 0x80 == 0 {
                    break;
                }
            }
        }
        value
    }

    fn string(&mut self) -> String {
        let coded = self.peek().expect("block ends too early") & 0x80 != 0;
        let length = self.integer(7);
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        let bytes = if coded { huffman(bytes) } else { bytes.to_vec() };
        String::from_utf8(bytes).expect("a header that is not UTF-8")
    }
}

/// Decodes a string by the code of Appendix B. It is canonical: codes of one length are consecutive numbers in the order of their symbols, so
/// that the lengths say it all.
fn huffman(bytes: &[u8]) -> Vec<u8> {
    let mut symbols: Vec<usize> = (0..LENGTHS.len()).collect();
    symbols.sort_by_key(|symbol| (LENGTHS[*symbol], *symbol));
    let mut out = Vec::new();
    let bits: Vec<u32> = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| u32::from(byte >> bit & 1))).collect();
    let mut rest = &bits[..];
    'next: while !rest.is_empty() {
        let (mut code, mut length) = (0_u32, 0_usize);
        let (mut next_code, mut at) = (0_u32, LENGTHS[symbols[0]]);
        let mut taken = rest.iter();
        for symbol in &symbols {
            next_code <<= LENGTHS[*symbol] - at;
            at = LENGTHS[*symbol];
            while length < usize::from(at) {
                let Some(bit) = taken.next() else { break 'next };
                code = code << 1 | bit;
                length += 1;
            }
            if code == next_code {
                out.push(u8::try_from(*symbol).expect("EOS inside a string"));
                rest = &rest[length..];
                continue 'next;
            }
            next_code += 1;
        }
        panic!("no such code");
    }
    assert!(rest.len() < 8 && rest.iter().all(|bit| *bit == 1), "bad padding");
    out
}

/// Lengths of the codes of Appendix B, by symbol; the last is EOS.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

/// Appendix A.
#[rustfmt::skip]
const STATIC: [(&str, &str); 61] = [
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"), (":scheme", "http"),
    (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"), (":status", "304"), (":status", "400"),
    (":status", "404"), (":status", "500"), ("accept-charset", ""), ("accept-encoding", "gzip, deflate"), ("accept-language", ""),
    ("accept-ranges", ""), ("accept", ""), ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""),
    ("cache-control", ""), ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""), ("content-length", ""),
    ("content-location", ""), ("content-range", ""), ("content-type", ""), ("cookie", ""), ("date", ""), ("etag", ""), ("expect", ""),
    ("expires", ""), ("from", ""), ("host", ""), ("if-match", ""), ("if-modified-since", ""), ("if-none-match", ""), ("if-range", ""),
    ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""), ("location", ""), ("max-forwards", ""), ("proxy-authenticate", ""),
    ("proxy-authorization", ""), ("range", ""), ("referer", ""), ("refresh", ""), ("retry-after", ""), ("server", ""), ("set-cookie", ""),
    ("strict-transport-security", ""), ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""), ("www-authenticate", ""),
];
