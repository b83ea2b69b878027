//! Authorization policies, package `istio.security`, as the control plane tells them to node proxies (reference, dataplane §6.1).
//!
//! A condition that we skip could open what it closes, so [`unknown_field`] finds fields that these structs do not have.

use bytes::Bytes;
use prost::Message;

use super::strict::{Fields, first_unknown};
use super::workload::Extension;

/// One policy.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Authorization {
    /// Name, unique in its namespace.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Whom it applies to.
    #[prost(enumeration = "Scope", tag = "3")]
    pub scope: i32,
    /// What a match means.
    #[prost(enumeration = "Action", tag = "4")]
    pub action: i32,
    /// Alternatives (istio/istio calls them groups).
    #[prost(message, repeated, tag = "5")]
    pub rules: Vec<Rule>,
    /// Only reported.
    #[prost(bool, tag = "6")]
    pub dry_run: bool,
    /// Of no meaning to node proxies.
    #[prost(message, repeated, tag = "7")]
    pub extensions: Vec<Extension>,
}

/// Matches if all clauses do.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Rule {
    /// Its clauses (istio/istio calls them rules).
    #[prost(message, repeated, tag = "1")]
    pub clauses: Vec<Clause>,
}

/// Matches if any match does.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Clause {
    /// Its alternatives. The tag is 2.
    #[prost(message, repeated, tag = "2")]
    pub matches: Vec<Match>,
}

/// Conditions on one connection.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Match {
    /// Namespace of the source.
    #[prost(message, repeated, tag = "1")]
    pub namespaces: Vec<StringMatch>,
    /// Negated.
    #[prost(message, repeated, tag = "2")]
    pub not_namespaces: Vec<StringMatch>,
    /// Identity of the source without `spiffe://`.
    #[prost(message, repeated, tag = "3")]
    pub principals: Vec<StringMatch>,
    /// Negated.
    #[prost(message, repeated, tag = "4")]
    pub not_principals: Vec<StringMatch>,
    /// Address of the source.
    #[prost(message, repeated, tag = "5")]
    pub source_ips: Vec<Address>,
    /// Negated.
    #[prost(message, repeated, tag = "6")]
    pub not_source_ips: Vec<Address>,
    /// Address of the destination.
    #[prost(message, repeated, tag = "7")]
    pub destination_ips: Vec<Address>,
    /// Negated.
    #[prost(message, repeated, tag = "8")]
    pub not_destination_ips: Vec<Address>,
    /// Port of the destination.
    #[prost(uint32, repeated, tag = "9")]
    pub destination_ports: Vec<u32>,
    /// Negated.
    #[prost(uint32, repeated, tag = "10")]
    pub not_destination_ports: Vec<u32>,
    /// Service account of the source, in any trust domain.
    #[prost(message, repeated, tag = "11")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Negated.
    #[prost(message, repeated, tag = "12")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Conditions that only other proxies understand.
    #[prost(message, repeated, tag = "13")]
    pub extensions: Vec<Extension>,
}

/// An address or a range of them.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Address {
    /// 4 or 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub address: Bytes,
    /// Prefix length in bits.
    #[prost(uint32, tag = "2")]
    pub length: u32,
}

/// A service account.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// Its name.
    #[prost(string, tag = "2")]
    pub service_account: String,
}

/// How a text is compared.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StringMatch {
    /// Absent only in messages of a newer protocol.
    #[prost(oneof = "MatchType", tags = "1, 2, 3, 4")]
    pub match_type: Option<MatchType>,
}

/// The kinds of [`StringMatch`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum MatchType {
    /// Equal.
    #[prost(string, tag = "1")]
    Exact(String),
    /// Begins with.
    #[prost(string, tag = "2")]
    Prefix(String),
    /// Ends with.
    #[prost(string, tag = "3")]
    Suffix(String),
    /// Is there at all (`google.protobuf.Empty`).
    #[prost(message, tag = "4")]
    Presence(()),
}

/// See [`Authorization::scope`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Scope {
    /// Every workload.
    Global = 0,
    /// Every workload of the policy's namespace.
    Namespace = 1,
    /// The workloads that name it.
    WorkloadSelector = 2,
}

/// See [`Authorization::action`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Action {
    /// May pass.
    Allow = 0,
    /// May not.
    Deny = 1,
}

/// Where a policy has a field that [`Authorization`] does not know, such as `rules.clauses.14`; `None` if it has none.
/// The content of extensions is not looked at. `encoded` is a policy that decodes.
#[must_use]
pub fn unknown_field(encoded: &[u8]) -> Option<String> {
    const OPAQUE: Option<&Fields> = None;
    const TEXT: &Fields = &Fields(&[(1, "exact", OPAQUE), (2, "prefix", OPAQUE), (3, "suffix", OPAQUE), (4, "presence", Some(&Fields(&[])))]);
    const RANGE: &Fields = &Fields(&[(1, "address", OPAQUE), (2, "length", OPAQUE)]);
    const ACCOUNT: &Fields = &Fields(&[(1, "namespace", OPAQUE), (2, "serviceAccount", OPAQUE)]);
    const MATCH: &Fields = &Fields(&[
        (1, "namespaces", Some(TEXT)),
        (2, "notNamespaces", Some(TEXT)),
        (3, "principals", Some(TEXT)),
        (4, "notPrincipals", Some(TEXT)),
        (5, "sourceIps", Some(RANGE)),
        (6, "notSourceIps", Some(RANGE)),
        (7, "destinationIps", Some(RANGE)),
        (8, "notDestinationIps", Some(RANGE)),
        (9, "destinationPorts", OPAQUE),
        (10, "notDestinationPorts", OPAQUE),
        (11, "serviceAccounts", Some(ACCOUNT)),
        (12, "notServiceAccounts", Some(ACCOUNT)),
        (13, "extensions", OPAQUE),
    ]);
    const CLAUSE: &Fields = &Fields(&[(2, "matches", Some(MATCH))]);
    const RULE: &Fields = &Fields(&[(1, "clauses", Some(CLAUSE))]);
    const POLICY: &Fields = &Fields(&[
        (1, "name", OPAQUE),
        (2, "namespace", OPAQUE),
        (3, "scope", OPAQUE),
        (4, "action", OPAQUE),
        (5, "rules", Some(RULE)),
        (6, "dryRun", OPAQUE),
        (7, "extensions", OPAQUE),
    ]);
    first_unknown(encoded, POLICY)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn text(kind: MatchType) -> Vec<StringMatch> {
        vec![StringMatch { match_type: Some(kind) }]
    }

    fn range(octet: u8) -> Vec<Address> {
        vec![Address { address: Bytes::copy_from_slice(&[octet, 0, 0, 0]), length: 8 }]
    }

    fn account(name: &str) -> Vec<ServiceAccountMatch> {
        vec![ServiceAccountMatch { namespace: "n".into(), service_account: name.into() }]
    }

    /// Every field with a value of its own, so that two swapped tags cannot hide.
    fn full() -> (Authorization, Vec<u8>) {
        let conditions = Match {
            namespaces: text(MatchType::Exact("a".into())),
            not_namespaces: text(MatchType::Prefix("b".into())),
            principals: text(MatchType::Suffix("c".into())),
            not_principals: text(MatchType::Presence(())),
            source_ips: range(1),
            not_source_ips: range(2),
            destination_ips: range(3),
            not_destination_ips: range(4),
            destination_ports: vec![80, 443],
            not_destination_ports: vec![81],
            service_accounts: account("d"),
            not_service_accounts: account("e"),
            extensions: vec![Extension { name: "f".into(), config: None }],
        };
        let policy = Authorization {
            name: "p".into(),
            namespace: "n".into(),
            scope: Scope::WorkloadSelector.into(),
            action: Action::Deny.into(),
            rules: vec![Rule { clauses: vec![Clause { matches: vec![conditions] }] }],
            dry_run: true,
            extensions: vec![Extension { name: "x".into(), config: None }],
        };
        let conditions = [
            &b"\x0a\x03\x0a\x01a\x12\x03\x12\x01b\x1a\x03\x1a\x01c\x22\x02\x22\x00"[..],
            b"\x2a\x08\x0a\x04\x01\x00\x00\x00\x10\x08\x32\x08\x0a\x04\x02\x00\x00\x00\x10\x08",
            b"\x3a\x08\x0a\x04\x03\x00\x00\x00\x10\x08\x42\x08\x0a\x04\x04\x00\x00\x00\x10\x08",
            b"\x4a\x03\x50\xbb\x03\x52\x01\x51\x5a\x06\x0a\x01n\x12\x01d\x62\x06\x0a\x01n\x12\x01e\x6a\x03\x0a\x01f",
        ]
        .concat();
        let length = u8::try_from(conditions.len()).unwrap();
        let bytes = [
            &b"\x0a\x01p\x12\x01n\x18\x02\x20\x01"[..],
            &[0x2a, length + 4, 0x0a, length + 2, 0x12, length],
            &conditions,
            b"\x30\x01\x3a\x03\x0a\x01x",
        ];
        (policy, bytes.concat())
    }

    #[test]
    fn a_policy_has_its_golden_bytes() {
        let (policy, bytes) = full();
        assert_eq!(policy.encode_to_vec(), bytes);
        assert_eq!(Authorization::decode(&bytes[..]).unwrap(), policy);
    }

    #[test]
    fn a_policy_of_known_fields_has_no_unknown_one() {
        assert_eq!(unknown_field(&full().1), None);
        assert_eq!(unknown_field(b""), None);
    }

    #[test]
    fn an_unknown_field_is_found_at_every_depth() {
        let cases: [(&[u8], &str); 7] = [
            (b"\x40\x01", "8"),
            (b"\x2a\x02\x10\x01", "rules.2"),
            (b"\x2a\x04\x0a\x02\x08\x01", "rules.clauses.1"),
            (b"\x2a\x06\x0a\x04\x12\x02\x70\x01", "rules.clauses.matches.14"),
            (b"\x2a\x09\x0a\x07\x12\x05\x0a\x03\x2a\x01x", "rules.clauses.matches.namespaces.5"),
            (b"\x2a\x08\x0a\x06\x12\x04\x2a\x02\x18\x01", "rules.clauses.matches.sourceIps.3"),
            (b"\x2a\x0a\x0a\x08\x12\x06\x22\x04\x22\x02\x08\x01", "rules.clauses.matches.notPrincipals.presence.1"),
        ];
        for (bytes, place) in cases {
            Authorization::decode(bytes).unwrap();
            assert_eq!(unknown_field(bytes).as_deref(), Some(place));
        }
    }

    #[test]
    fn fields_of_every_wire_type_are_walked_over() {
        // A group, a 64-bit, a 32-bit and a length-delimited value under unknown numbers; the first one is named.
        for bytes in [&b"\x43\x08\x01\x44"[..], b"\x41\0\0\0\0\0\0\0\0", b"\x45\0\0\0\0", b"\x42\x01x"] {
            assert_eq!(unknown_field(bytes).as_deref(), Some("8"));
        }
        assert_eq!(unknown_field(b"\x0a\x01p\x1a").as_deref(), Some("3"), "what cannot be walked over is not taken for known");
        assert_eq!(unknown_field(b"\x0a\x05p").as_deref(), Some("1"));
    }
}
