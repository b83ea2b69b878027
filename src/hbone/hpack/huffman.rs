//! The Huffman code of RFC 7541 Appendix B. It is canonical (codes of one length ascend with the symbol), so the lengths alone define it.

/// Bits of each symbol's code; the last is EOS.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12,
    13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14,
    13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21,
    20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23,
    22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22,
    25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

const LONGEST: usize = 30;

/// The canonical code by length: the first code, and where its symbols begin in [`Code::symbols`].
struct Code {
    first: [u32; LONGEST + 1],
    count: [u16; LONGEST + 1],
    offset: [u16; LONGEST + 1],
    symbols: [u16; 257],
}

const CODE: Code = build();

#[expect(clippy::cast_possible_truncation, reason = "symbols are below 257")]
const fn build() -> Code {
    let mut code = Code { first: [0; LONGEST + 1], count: [0; LONGEST + 1], offset: [0; LONGEST + 1], symbols: [0; 257] };
    let (mut length, mut next, mut placed) = (1, 0u32, 0u16);
    while length <= LONGEST {
        next <<= 1;
        code.first[length] = next;
        code.offset[length] = placed;
        let mut symbol = 0;
        while symbol < 257 {
            if LENGTHS[symbol] as usize == length {
                code.symbols[placed as usize] = symbol as u16;
                code.count[length] += 1;
                placed += 1;
                next += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    code
}

/// Why a Huffman-coded string is malformed (RFC 7541 §5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Appends the decoded octets to `out`. A padding of 8 bits or more, one that is not all ones, and EOS itself are errors.
pub(super) fn decode(coded: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let (mut code, mut length) = (0u32, 0usize);
    for byte in coded {
        for bit in (0..8).rev() {
            code = (code << 1) | u32::from((byte >> bit) & 1);
            length += 1;
            if length > LONGEST {
                return Err(Malformed);
            }
            let index = code.wrapping_sub(CODE.first[length]);
            if code >= CODE.first[length] && index < u32::from(CODE.count[length]) {
                let symbol = CODE.symbols[CODE.offset[length] as usize + index as usize];
                // EOS is the one symbol that is no octet.
                out.push(u8::try_from(symbol).map_err(|_| Malformed)?);
                (code, length) = (0, 0);
            }
        }
    }
    // What is left must be a prefix of EOS, which is all ones, shorter than a byte.
    if length >= 8 || code != (1 << length) - 1 { Err(Malformed) } else { Ok(()) }
}
