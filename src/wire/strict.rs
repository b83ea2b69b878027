//! Finding fields that our structs do not have. Decoders skip them, which is right for everything but conditions.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// The fields of one message: number, name, and the fields of the message in it; `None` for what is not looked into.
pub(super) struct Fields(pub(super) &'static [(u32, &'static str, Option<&'static Self>)]);

/// The path of the first field of `encoded` that `fields` does not list, its last step a number. What cannot be read counts as unknown.
pub(super) fn first_unknown(mut encoded: &[u8], fields: &Fields) -> Option<String> {
    while !encoded.is_empty() {
        let Ok((number, wire_type)) = decode_key(&mut encoded) else { return Some("?".to_owned()) };
        let Some((_, name, inner)) = fields.0.iter().find(|(known, _, _)| *known == number) else { return Some(number.to_string()) };
        if wire_type == WireType::LengthDelimited {
            let Some((value, rest)) = decode_varint(&mut encoded).ok().and_then(|length| encoded.split_at_checked(usize::try_from(length).ok()?))
            else {
                return Some(number.to_string());
            };
            encoded = rest;
            if let Some(unknown) = inner.and_then(|inner| first_unknown(value, inner)) {
                return Some(format!("{name}.{unknown}"));
            }
        } else if skip_field(wire_type, number, &mut encoded, DecodeContext::default()).is_err() {
            return Some(number.to_string());
        }
    }
    None
}
