#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;

fn decode(decoder: &mut Decoder, block: &str) -> Result<Vec<(String, String)>, HpackError> {
    let bytes: Vec<u8> = (0..block.len()).step_by(2).map(|i| u8::from_str_radix(&block[i..i + 2], 16).unwrap()).collect();
    let mut fields = Vec::new();
    decoder.decode(&bytes, 1 << 16, |name, value| fields.push((String::from_utf8_lossy(name).into(), String::from_utf8_lossy(value).into())))?;
    Ok(fields)
}

fn pair(name: &str, value: &str) -> (String, String) {
    (name.into(), value.into())
}

#[test]
fn the_examples_of_rfc_7541_appendix_c_decode() {
    // C.2.1, C.2.2, C.2.3, C.2.4
    let mut decoder = Decoder::default();
    assert_eq!(decode(&mut decoder, "400a637573746f6d2d6b65790d637573746f6d2d686561646572").unwrap(), [pair("custom-key", "custom-header")]);
    assert_eq!(decode(&mut decoder, "040c2f73616d706c652f70617468").unwrap(), [pair(":path", "/sample/path")]);
    assert_eq!(decode(&mut decoder, "100870617373776f726406736563726574").unwrap(), [pair("password", "secret")]);
    assert_eq!(decode(&mut decoder, "82").unwrap(), [pair(":method", "GET")]);
    // C.4.1 - C.4.3: Huffman and the dynamic table over three blocks
    let mut decoder = Decoder::default();
    let first = [pair(":method", "GET"), pair(":scheme", "http"), pair(":path", "/"), pair(":authority", "www.example.com")];
    assert_eq!(decode(&mut decoder, "828684418cf1e3c2e5f23a6ba0ab90f4ff").unwrap(), first);
    let mut second = first.to_vec();
    second.push(pair("cache-control", "no-cache"));
    assert_eq!(decode(&mut decoder, "828684be5886a8eb10649cbf").unwrap(), second);
    let third = [
        pair(":method", "GET"),
        pair(":scheme", "https"),
        pair(":path", "/index.html"),
        pair(":authority", "www.example.com"),
        pair("custom-key", "custom-value"),
    ];
    assert_eq!(decode(&mut decoder, "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf").unwrap(), third);
}

#[test]
fn malformed_blocks_are_refused() {
    for (block, error) in [
        ("80", HpackError::Index),
        ("be", HpackError::Index),
        ("ff80808080808001", HpackError::Integer),
        ("00", HpackError::Truncated),
        ("0003616263", HpackError::Truncated),
        ("3fe21f", HpackError::TableSize),
        ("8220", HpackError::TableSize),
        ("0084ffffffff00", HpackError::Huffman),
        ("00821fff00", HpackError::Huffman),
        ("0081fe00", HpackError::Huffman),
    ] {
        assert_eq!(decode(&mut Decoder::default(), block), Err(error), "{block}");
    }
}

#[test]
fn a_list_beyond_its_budget_is_decoded_but_not_delivered() {
    let mut decoder = Decoder::default();
    let mut block = Vec::new();
    for _ in 0..20 {
        header("x", &[b'a'; 100], &mut block);
    }
    let mut seen = 0;
    assert_eq!(decoder.decode(&block, 1000, |_, _| seen += 1), Ok(false));
    assert_eq!(seen, 7);
}

#[test]
fn what_is_encoded_decodes() {
    let mut block = Vec::new();
    status(200, &mut block);
    status(503, &mut block);
    header(":authority", b"10.0.0.1:80", &mut block);
    header("baggage", &[b'x'; 300], &mut block);
    let mut fields = Vec::new();
    assert_eq!(Decoder::default().decode(&block, 1 << 16, |name, value| fields.push((name.to_vec(), value.to_vec()))), Ok(true));
    let names: Vec<&[u8]> = fields.iter().map(|(name, _)| name.as_slice()).collect();
    assert_eq!(names, [b":status".as_slice(), b":status", b":authority", b"baggage"]);
    assert_eq!(fields[1].1, b"503");
    assert_eq!(fields[3].1, [b'x'; 300]);
}

proptest::proptest! {
    #[test]
    fn no_block_makes_the_decoder_panic_or_its_table_outgrow_its_limit(blocks in proptest::collection::vec(proptest::collection::vec(proptest::prelude::any::<u8>(), 0..120), 1..8)) {
        let mut decoder = Decoder::default();
        for block in blocks {
            if decoder.decode(&block, 8192, |_, _| {}).is_err() {
                break;
            }
        }
    }

    #[test]
    fn any_list_of_fields_decodes_as_it_was_encoded(fields in proptest::collection::vec(("[a-z-]{1,20}", "[ -~]{0,300}"), 0..20)) {
        let mut block = Vec::new();
        for (name, value) in &fields {
            header(name, value.as_bytes(), &mut block);
        }
        let mut got = Vec::new();
        let fits = Decoder::default().decode(&block, 1 << 20, |name, value| got.push((String::from_utf8_lossy(name).into_owned(), String::from_utf8_lossy(value).into_owned())));
        proptest::prop_assert_eq!(fits, Ok(true));
        proptest::prop_assert_eq!(got, fields);
    }
}
