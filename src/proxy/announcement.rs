//! The PROXY protocol, version 2: how a captured waypoint learns of a connection whose bytes it gets (reference, dataplane §2.9).

use std::net::{IpAddr, SocketAddr};

use crate::model::{SpiffeId, canonical_socket};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
/// The transport of every connection: a stream, to be joined with the address family.
const STREAM: u8 = 0x01;
const INET: u8 = 0x10;
const INET6: u8 = 0x20;
/// TLV of the client's SPIFFE ID.
const IDENTITY: u8 = 0xd0;

/// The header in front of a connection of `source` to `destination`, with the identity of the client's certificate if it has one. If the addresses are
/// of different families, the header says nothing about them.
pub(super) fn header(source: SocketAddr, destination: SocketAddr, identity: Option<&SpiffeId>) -> Vec<u8> {
    let (source, destination) = (canonical_socket(source), canonical_socket(destination));
    let mut body = Vec::with_capacity(128);
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            body.extend_from_slice(&from.octets());
            body.extend_from_slice(&to.octets());
            INET
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            body.extend_from_slice(&from.octets());
            body.extend_from_slice(&to.octets());
            INET6
        }
        _ => 0,
    };
    if family != 0 {
        body.extend_from_slice(&source.port().to_be_bytes());
        body.extend_from_slice(&destination.port().to_be_bytes());
    }
    let identity = identity.map(ToString::to_string);
    // An identity comes out of a certificate and is far shorter; one that does not fit is left out rather than cut.
    if let Some((identity, length)) = identity.as_deref().and_then(|identity| Some((identity, u16::try_from(identity.len()).ok()?))) {
        body.push(IDENTITY);
        body.extend_from_slice(&length.to_be_bytes());
        body.extend_from_slice(identity.as_bytes());
    }
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    let mut header = SIGNATURE.to_vec();
    header.extend_from_slice(&[PROXY, family | STREAM]);
    header.extend_from_slice(&length.to_be_bytes());
    header.append(&mut body);
    header
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn socket(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn behind_the_signature(source: &str, destination: &str, identity: Option<&str>) -> Vec<u8> {
        let identity = identity.map(|text| text.parse().unwrap());
        let header = header(socket(source), socket(destination), identity.as_ref());
        assert_eq!(header[..12], [0x0d, 0x0a, 0x0d, 0x0a, 0, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a]);
        header[12..].to_vec()
    }

    #[test]
    fn the_header_has_both_addresses_and_the_clients_identity() {
        let identity = "spiffe://cluster.local/ns/default/sa/client";
        let v4 = [&[0x21, 0x11, 0, 58, 10, 0, 0, 9, 10, 1, 0, 1, 0x9c, 0x40, 0, 80, 0xd0, 0, 43], identity.as_bytes()].concat();
        assert_eq!(behind_the_signature("10.0.0.9:40000", "10.1.0.1:80", Some(identity)), v4);
        assert_eq!(behind_the_signature("[::ffff:10.0.0.9]:40000", "10.1.0.1:80", Some(identity)), v4);
        let mut v6 = vec![0x21, 0x21, 0, 36];
        v6.extend_from_slice(
            &[[0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9], [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]].concat(),
        );
        v6.extend_from_slice(&[0x9c, 0x40, 0x01, 0xbb]);
        assert_eq!(behind_the_signature("[2001:db8::9]:40000", "[2001:db8::1]:443", None), v6);
    }

    #[test]
    fn addresses_of_two_families_are_left_out() {
        let identity = "spiffe://a/ns/b/sa/c";
        let expected = [&[0x21, 0x01, 0, 23, 0xd0, 0, 20], identity.as_bytes()].concat();
        assert_eq!(behind_the_signature("10.0.0.9:40000", "[2001:db8::1]:80", Some(identity)), expected);
        assert_eq!(behind_the_signature("[2001:db8::9]:40000", "10.1.0.1:80", None), [0x21, 0x01, 0, 0]);
    }
}
