//! The well-known messages of `google.protobuf` and `google.rpc` that other protocols carry.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

/// `google.protobuf.Any`: a message of a type that its URL names.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Any {
    /// `type.googleapis.com/` and the full name of the type.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message. Shares its memory with the message that brought it.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Status {
    /// A gRPC status code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `google.protobuf.Struct`: a JSON object.
#[derive(Clone, PartialEq, Message)]
pub struct Struct {
    /// Its members.
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, Value>,
}

/// `google.protobuf.Value`: a JSON value.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    /// Absent is not valid JSON; read it as null.
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6")]
    pub kind: Option<Kind>,
}

/// The kinds of [`Value`].
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Kind {
    /// Null; the number is always 0.
    #[prost(int32, tag = "1")]
    Null(i32),
    /// A number.
    #[prost(double, tag = "2")]
    Number(f64),
    /// A text.
    #[prost(string, tag = "3")]
    Text(String),
    /// True or false.
    #[prost(bool, tag = "4")]
    Bool(bool),
    /// An object.
    #[prost(message, tag = "5")]
    Struct(Struct),
    /// An array.
    #[prost(message, tag = "6")]
    List(ListValue),
}

/// `google.protobuf.ListValue`: a JSON array.
#[derive(Clone, PartialEq, Message)]
pub struct ListValue {
    /// Its elements.
    #[prost(message, repeated, tag = "1")]
    pub values: Vec<Value>,
}

impl Struct {
    /// The text of a member; `None` if it is absent or not a text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        match &self.fields.get(name)?.kind {
            Some(Kind::Text(text)) => Some(text),
            _ => None,
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self { kind: Some(Kind::Text(text)) }
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Struct {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(members: I) -> Self {
        Self { fields: members.into_iter().map(|(name, value)| (name.into(), value.into())).collect() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn every_kind_of_value_has_its_golden_bytes() {
        let list = ListValue { values: vec![Kind::Bool(true)].into_iter().map(|kind| Value { kind: Some(kind) }).collect() };
        let golden: [(Kind, &[u8]); 6] = [
            (Kind::Null(0), b"\x08\x00"),
            (Kind::Number(1.5), b"\x11\x00\x00\x00\x00\x00\x00\xf8\x3f"),
            (Kind::Text("x".into()), b"\x1a\x01x"),
            (Kind::Bool(true), b"\x20\x01"),
            (Kind::Struct([("a", "b")].into_iter().collect()), b"\x2a\x0a\x0a\x08\x0a\x01a\x12\x03\x1a\x01b"),
            (Kind::List(list), b"\x32\x04\x0a\x02\x20\x01"),
        ];
        for (kind, bytes) in golden {
            let value = Value { kind: Some(kind) };
            assert_eq!(value.encode_to_vec(), bytes, "{value:?}");
            assert_eq!(Value::decode(bytes).unwrap(), value);
        }
    }

    #[test]
    fn any_and_status_have_their_golden_bytes() {
        let any = Any { type_url: "t".into(), value: Bytes::from_static(b"v") };
        assert_eq!(any.encode_to_vec(), b"\x0a\x01t\x12\x01v");
        assert_eq!(Status { code: 3, message: "no".into() }.encode_to_vec(), b"\x08\x03\x12\x02no");
    }

    #[test]
    fn only_a_text_is_read_as_text() {
        let members: Struct = [("a", Value::from("b")), ("n", Value { kind: Some(Kind::Number(1.0)) })].into_iter().collect();
        assert_eq!((members.text("a"), members.text("n"), members.text("none")), (Some("b"), None, None));
    }
}
