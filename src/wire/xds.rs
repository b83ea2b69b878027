//! Delta xDS, package `envoy.service.discovery.v3`: what changed in the mesh since the client last heard (reference, dataplane §5.3–5.5).
//! Fields that no peer of ours uses are left out; they are skipped when they come.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use prost::{DecodeError, Message};

use super::google::{Any, Status, Struct};

/// The one method: a stream of requests for a stream of responses, any number of types on it.
pub const DELTA_METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// Type of [`Address`](super::workload::Address).
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";

/// Type of a bare [`Workload`](super::workload::Workload); istiod serves it, our client does not ask for it.
pub const WORKLOAD_TYPE: &str = "type.googleapis.com/istio.workload.Workload";

/// Type of [`Authorization`](super::authorization::Authorization).
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// The name that stands for every resource of a type. A type of which no name was ever subscribed is subscribed to it.
pub const WILDCARD: &str = "*";

/// Client → server.
#[derive(Clone, PartialEq, Message)]
pub struct DeltaDiscoveryRequest {
    /// Who asks; only in the first request of a type.
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    /// What kind of resource this is about.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names to add to the subscription.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names to take out of it.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// What the client still has from an earlier stream, name to version; only in the first request of a type.
    #[prost(btree_map = "string, string", tag = "5")]
    pub initial_resource_versions: BTreeMap<String, String>,
    /// The nonce of the response that this request answers; empty if it answers none.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// Why something in that response was refused; absent is an ACK.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// Server → client.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeltaDiscoveryResponse {
    /// Version of the server's whole state, for people.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// Added and changed.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    /// What kind of resource this is about.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be given back in the answer.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Names of what is gone. Names that never existed are legal.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// A [`DeltaDiscoveryResponse`] whose resources are still as they came: the first one of a stream has the whole mesh, and who reads it piece by
/// piece needs no second copy of it.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct EncodedPush {
    /// Added and changed, each an encoded [`Resource`].
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<Bytes>,
    /// What kind of resource this is about.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be given back in the answer.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Names of what is gone. Names that never existed are legal.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// A [`Resource`] that is read where it lies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResourceView<'a> {
    /// See [`Resource::version`].
    pub version: &'a str,
    /// Type and bytes of [`Resource::resource`].
    pub content: Option<(&'a str, &'a [u8])>,
    /// See [`Resource::name`].
    pub name: &'a str,
    /// See [`Resource::aliases`].
    pub aliases: Vec<&'a str>,
}

impl<'a> ResourceView<'a> {
    /// Takes and refuses what [`Resource`] takes and refuses, and finds the same in it.
    ///
    /// # Errors
    /// When it is no encoded resource.
    pub fn read(encoded: &'a [u8]) -> Result<Self, String> {
        let mut view = Self::default();
        each_field(encoded, |number, bytes| {
            match number {
                1 => view.version = text(bytes)?,
                2 => {
                    // Of a message that comes in pieces, the later ones add to it.
                    let (mut kind, mut value) = view.content.unwrap_or_default();
                    each_field(bytes, |number, bytes| {
                        match number {
                            1 => kind = text(bytes)?,
                            2 => value = bytes,
                            _ => return Ok(false),
                        }
                        Ok(true)
                    })?;
                    view.content = Some((kind, value));
                }
                3 => view.name = text(bytes)?,
                4 => view.aliases.push(text(bytes)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(view)
    }
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|_| "a text is not UTF-8".to_owned())
}

/// Hands over every field of bytes; `take` says whether it knows the number. One that it knows must be of bytes.
fn each_field<'a>(mut rest: &'a [u8], mut take: impl FnMut(u32, &'a [u8]) -> Result<bool, String>) -> Result<(), String> {
    let broken = |error: DecodeError| error.to_string();
    while !rest.is_empty() {
        let (number, wire_type) = decode_key(&mut rest).map_err(broken)?;
        if wire_type != WireType::LengthDelimited {
            if take(number, &[])? {
                return Err(format!("field {number} is not of its type"));
            }
            skip_field(wire_type, number, &mut rest, DecodeContext::default()).map_err(broken)?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut rest).map_err(broken)?).unwrap_or(usize::MAX);
        let (bytes, after) = rest.split_at_checked(length).ok_or_else(|| format!("field {number} is longer than its message"))?;
        rest = after;
        take(number, bytes)?;
    }
    Ok(())
}

/// One added or changed resource.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Resource {
    /// Changes with the content; istiod leaves it empty for Authorization.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The content.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// The name it has, whatever name it was asked for by.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Other names by which it can be asked for.
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
}

/// `envoy.config.core.v3.Node`: who the client is.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    /// `<role>~<IP>~<pod>.<namespace>~<namespace>.svc.cluster.local`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Not used for node proxies.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// Members such as `NAMESPACE` and `NODE_NAME`.
    #[prost(message, optional, tag = "3")]
    pub metadata: Option<Struct>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_first_request_has_its_golden_bytes() {
        let request = DeltaDiscoveryRequest {
            node: Some(Node { id: "z".into(), cluster: String::new(), metadata: Some([("N", "n")].into_iter().collect()) }),
            type_url: "t".into(),
            resource_names_subscribe: vec!["*".into()],
            resource_names_unsubscribe: vec!["*".into()],
            initial_resource_versions: [("a".to_owned(), "1".to_owned()), ("b".to_owned(), String::new())].into(),
            ..DeltaDiscoveryRequest::default()
        };
        let node = b"\x0a\x0f\x0a\x01z\x1a\x0a\x0a\x08\x0a\x01N\x12\x03\x1a\x01n";
        // A map entry leaves out an empty value.
        let tail = b"\x12\x01t\x1a\x01*\x22\x01*\x2a\x06\x0a\x01a\x12\x011\x2a\x03\x0a\x01b";
        assert_eq!(request.encode_to_vec(), [&node[..], &tail[..]].concat());
        assert_eq!(DeltaDiscoveryRequest::decode(&[&node[..], &tail[..]].concat()[..]).unwrap(), request);
    }

    #[test]
    fn an_ack_and_a_nack_have_their_golden_bytes() {
        let ack = DeltaDiscoveryRequest { type_url: "t".into(), response_nonce: "n".into(), ..DeltaDiscoveryRequest::default() };
        assert_eq!(ack.encode_to_vec(), b"\x12\x01t\x32\x01n");
        let nack = DeltaDiscoveryRequest { error_detail: Some(Status { code: 0, message: "a: no".into() }), ..ack };
        assert_eq!(nack.encode_to_vec(), b"\x12\x01t\x32\x01n\x3a\x07\x12\x05a: no");
    }

    #[test]
    fn a_response_has_its_golden_bytes_and_shares_the_memory_of_its_resources() {
        let resource = Resource {
            version: "v".into(),
            resource: Some(Any { type_url: "t".into(), value: Bytes::from_static(b"xy") }),
            name: "n".into(),
            aliases: vec!["a".into()],
        };
        let response = DeltaDiscoveryResponse {
            system_version_info: "s".into(),
            resources: vec![resource],
            type_url: "t".into(),
            nonce: "1".into(),
            removed_resources: vec!["gone".into()],
        };
        let bytes = Bytes::from_static(b"\x0a\x01s\x12\x12\x0a\x01v\x12\x07\x0a\x01t\x12\x02xy\x1a\x01n\x22\x01a\x22\x01t\x2a\x011\x32\x04gone");
        assert_eq!(response.encode_to_vec(), bytes);
        let decoded = DeltaDiscoveryResponse::decode(bytes.clone()).unwrap();
        assert_eq!(decoded, response);
        let value = decoded.resources[0].resource.as_ref().unwrap().value.as_ptr();
        assert!(bytes.as_ptr_range().contains(&value), "the content was copied");
    }

    #[test]
    fn an_encoded_push_is_a_response_and_shares_its_memory() {
        let bytes = Bytes::from_static(b"\x0a\x01s\x12\x12\x0a\x01v\x12\x07\x0a\x01t\x12\x02xy\x1a\x01n\x22\x01a\x22\x01t\x2a\x011\x32\x04gone");
        let (push, whole) = (EncodedPush::decode(bytes.clone()).unwrap(), DeltaDiscoveryResponse::decode(bytes.clone()).unwrap());
        assert_eq!((push.type_url, push.nonce, push.removed_resources), (whole.type_url, whole.nonce, whole.removed_resources));
        assert!(bytes.as_ptr_range().contains(&push.resources[0].as_ptr()), "the content was copied");
        let view = ResourceView::read(&push.resources[0]).unwrap();
        assert_eq!(view, ResourceView { version: "v", content: Some(("t", b"xy")), name: "n", aliases: vec!["a"] });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Oracle: prost.
        #[test]
        fn a_resource_in_place_reads_as_prost_reads_it(pieces in proptest::collection::vec(any_piece(), 0..6), cut in 0..4_usize) {
            let mut bytes = pieces.concat();
            if cut == 0 {
                bytes.pop();
            }
            let ours = ResourceView::read(&bytes).ok().map(|view| Resource {
                version: view.version.to_owned(),
                resource: view.content.map(|(kind, value)| Any { type_url: kind.to_owned(), value: Bytes::copy_from_slice(value) }),
                name: view.name.to_owned(),
                aliases: view.aliases.into_iter().map(str::to_owned).collect(),
            });
            prop_assert_eq!(ours, Resource::decode(&bytes[..]).ok());
        }
    }

    /// Fields as they should be, of other types, with other lengths, and bytes of no meaning.
    fn any_piece() -> impl Strategy<Value = Vec<u8>> {
        let field = |number: u8, inner: Vec<u8>| [vec![number << 3 | 2, u8::try_from(inner.len()).unwrap()], inner].concat();
        prop_oneof![
            (1..7_u8, "[a-z\u{e9}]{0,4}").prop_map(move |(number, text)| field(number, text.into_bytes())),
            (1..4_u8, proptest::collection::vec(any::<u8>(), 0..4)).prop_map(move |(number, inner)| field(2, field(number, inner))),
            (1..7_u8, 0..3_u8).prop_map(|(number, value)| vec![number << 3, value]),
            proptest::collection::vec(any::<u8>(), 0..4),
        ]
    }

    #[test]
    fn fields_that_we_do_not_use_are_skipped() {
        // Node.locality (4) and Resource.ttl (6).
        assert_eq!(Node::decode(&b"\x0a\x01z\x22\x02\x0a\x00"[..]).unwrap().id, "z");
        assert_eq!(Resource::decode(&b"\x1a\x01n\x32\x02\x08\x01"[..]).unwrap().name, "n");
    }
}
