//! DNS messages as bytes: what a query asks, and the answers that are ours to write.
//!
//! Queries are hostile input and are read by hickory. What is forwarded stays the bytes that it was, and answers repeat the question's bytes, so that
//! the letters' case, which some resolvers use against forgery, comes back as it was sent.

use std::net::IpAddr;

use hickory_proto::op::{Header, Message, MessageType, OpCode, Query as HickoryQuery};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::names::Family;

/// How long resolvers may keep our answers, seconds (reference, dataplane §9.1).
const TTL: u32 = 30;
/// Largest answer over UDP without EDNS.
const PLAIN_UDP: u16 = 512;
const HEADER: usize = 12;
/// A pointer to the name of the question.
const QUESTION_NAME: [u8; 2] = [0xc0, 0x0c];
/// The bits of the second half word of a header.
const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const AA: u8 = 0x04;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
const RA: u8 = 0x80;

/// The answer codes that we give ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rcode {
    FormErr = 1,
    ServFail = 2,
    NotImp = 4,
    Refused = 5,
}

/// What EDNS says in a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Edns {
    payload: u16,
    version: u8,
    dnssec_ok: bool,
}

/// A query with one question.
#[derive(Debug, Clone)]
pub(super) struct Query {
    bytes: Vec<u8>,
    question_end: usize,
    /// Length of each label of the name.
    labels: Vec<usize>,
    /// In lower case, without the final dot; `None` if it has characters that no name of the mesh has.
    pub(super) name: Option<String>,
    pub(super) kind: RecordType,
    internet: bool,
    /// `Err` if what follows the question cannot be read.
    edns: Result<Option<Edns>, ()>,
}

/// Why there is no [`Query`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Not even a header: nobody could be answered.
    Silence,
    /// An answer that says what is wrong.
    Answer(Vec<u8>),
}

impl Query {
    /// Reads a message of a client.
    pub(super) fn read(bytes: Vec<u8>) -> Result<Self, Unreadable> {
        let wrong = |rcode| Err(Unreadable::Answer(bare(&bytes, rcode)));
        let mut decoder = BinDecoder::new(&bytes);
        let Ok(header) = Header::read(&mut decoder) else { return Err(Unreadable::Silence) };
        if header.message_type == MessageType::Response {
            return wrong(Rcode::FormErr);
        }
        if header.op_code != OpCode::Query {
            return wrong(Rcode::NotImp);
        }
        if header.counts.queries != 1 {
            return wrong(Rcode::FormErr);
        }
        let Ok(question) = HickoryQuery::read(&mut decoder) else { return wrong(Rcode::FormErr) };
        let question_end = decoder.index();
        let labels: Vec<usize> = question.name().iter().map(<[u8]>::len).collect();
        // We repeat the bytes, so the name must stand there in full, not as a pointer into the header.
        if labels.iter().map(|label| label + 1).sum::<usize>() + 1 + 4 != question_end - HEADER {
            return wrong(Rcode::FormErr);
        }
        let edns = if header.counts.additionals == 0 { Ok(None) } else { edns(&bytes) };
        let (kind, internet) = (question.query_type(), question.query_class() == DNSClass::IN);
        Ok(Self { question_end, labels, name: readable(question.name().iter()), kind, internet, edns, bytes })
    }

    /// The question that a resolver would send about a name, if it can be one of DNS.
    pub(super) fn about(name: &str, family: Family) -> Option<Self> {
        let id: u16 = rand::random();
        let mut bytes = [&id.to_be_bytes()[..], &[RD, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
        for label in name.split('.') {
            bytes.push(u8::try_from(label.len()).ok().filter(|length| (1..=63).contains(length))?);
            bytes.extend(label.as_bytes());
        }
        let kind = match family {
            Family::Ipv4 => RecordType::A,
            Family::Ipv6 => RecordType::AAAA,
        };
        bytes.push(0);
        bytes.extend(u16::from(kind).to_be_bytes());
        bytes.extend([0, 1]);
        Self::read(bytes).ok()
    }

    /// The kind of address that is asked for, if it is one.
    pub(super) fn family(&self) -> Option<Family> {
        match self.kind {
            RecordType::A if self.internet => Some(Family::Ipv4),
            RecordType::AAAA if self.internet => Some(Family::Ipv6),
            _ => None,
        }
    }

    /// How much the client takes over UDP, bytes.
    pub(super) fn udp_limit(&self) -> usize {
        self.edns.ok().flatten().map_or(PLAIN_UDP, |edns| edns.payload).max(PLAIN_UDP).into()
    }

    /// Our answer: with `canonical_labels` a CNAME to as many labels of the name and addresses of that, else addresses of the name. It has as many
    /// of them as fit into `limit` bytes, and the TC bit if that is not all.
    pub(super) fn answer(&self, addresses: &[IpAddr], canonical_labels: Option<usize>, limit: usize) -> Vec<u8> {
        let Ok(edns) = self.edns else { return self.refuse(Rcode::FormErr) };
        let mut out = self.beginning();
        out[2] |= AA;
        out[3] |= RA;
        let opt = edns.map_or(Vec::new(), |edns| opt(&edns));
        let room = limit.saturating_sub(opt.len());
        let (mut owner, mut written, mut truncated) = (QUESTION_NAME, 0_u16, false);
        if let Some(labels) = canonical_labels {
            let length: usize = self.labels.iter().take(labels).map(|label| label + 1).sum();
            let mut target = self.bytes[HEADER..HEADER + length].to_vec();
            target.push(0);
            let before = out.len();
            let place = record(&mut out, QUESTION_NAME, RecordType::CNAME, &target);
            owner = (0xc000 | place).to_be_bytes();
            written = 1;
            if out.len() > room {
                out.truncate(before);
                (written, truncated) = (0, true);
            }
        }
        for address in if truncated { &[] } else { addresses } {
            let before = out.len();
            match address {
                IpAddr::V4(ip) => record(&mut out, owner, RecordType::A, &ip.octets()),
                IpAddr::V6(ip) => record(&mut out, owner, RecordType::AAAA, &ip.octets()),
            };
            if out.len() > room || written == u16::MAX {
                out.truncate(before);
                truncated = true;
                break;
            }
            written += 1;
        }
        if truncated {
            out[2] |= TC;
        }
        out[6..8].copy_from_slice(&written.to_be_bytes());
        out[11] = u8::from(!opt.is_empty());
        out.extend(opt);
        out
    }

    /// An answer that only says no.
    pub(super) fn refuse(&self, rcode: Rcode) -> Vec<u8> {
        let mut out = self.beginning();
        out[3] |= rcode as u8 | RA;
        if let Ok(Some(edns)) = &self.edns {
            out[11] = 1;
            out.extend(opt(edns));
        }
        out
    }

    /// The same query with another id.
    pub(super) fn with_id(&self, id: u16) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        bytes
    }

    /// Makes `answer`, which came to `id`, the answer to this query: as it is, but for the id, and cut down to the question with the TC bit if it is
    /// longer than `limit`. Gives nothing back unless it is an answer to this question.
    pub(super) fn accept(&self, mut answer: Vec<u8>, id: u16, limit: usize) -> Option<Vec<u8>> {
        if answer.len() < HEADER || answer[..2] != id.to_be_bytes() || answer[2] & (QR | OPCODE) != QR {
            return None;
        }
        let asked = &self.bytes[HEADER..self.question_end];
        let repeated = answer.get(HEADER..self.question_end).is_some_and(|question| question.eq_ignore_ascii_case(asked));
        // Servers that do not understand a query may leave the question out, with an error.
        let without_question = answer[4..6] == [0, 0] && answer[3] & 0x0f != 0;
        if !(without_question || answer[4..6] == [0, 1] && repeated) {
            return None;
        }
        answer[..2].copy_from_slice(&self.bytes[..2]);
        if answer.len() > limit {
            answer.truncate(if without_question { HEADER } else { self.question_end });
            answer[6..HEADER].fill(0);
            answer[2] |= TC;
        }
        Some(answer)
    }

    /// The header of an answer without records, and the question.
    fn beginning(&self) -> Vec<u8> {
        let mut out = self.bytes[..self.question_end].to_vec();
        out[2] = QR | (out[2] & RD);
        // Whoever asked not to check gets that back.
        out[3] &= 0x10;
        out[6..HEADER].fill(0);
        out
    }
}

/// The code of an answer that has at least a header.
pub(super) fn rcode(answer: &[u8]) -> u8 {
    answer.get(3).map_or(0, |flags| flags & 0x0f)
}

/// What an answer to a question about addresses says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// In the order of the answer.
    pub(super) list: Vec<IpAddr>,
    /// There were more than had room.
    pub(super) truncated: bool,
    /// The answer's code, as words.
    pub(super) code: String,
}

/// Reads an answer, of whoever it is; `None` if it is none.
pub(super) fn addresses(answer: &[u8], family: Family) -> Option<Addresses> {
    let message = Message::from_vec(answer).ok()?;
    let address = |record: &Record| match (&record.data, family) {
        (RData::A(ip), Family::Ipv4) => Some(IpAddr::from(ip.0)),
        (RData::AAAA(ip), Family::Ipv6) => Some(ip.0.into()),
        _ => None,
    };
    let list = message.answers.iter().filter_map(address).collect();
    Some(Addresses { list, truncated: message.metadata.truncation, code: message.metadata.response_code.to_string() })
}

/// Whether an answer says that this server will not or cannot, so that another one may know better.
pub(super) fn is_no_help(answer: &[u8]) -> bool {
    [Rcode::ServFail, Rcode::Refused, Rcode::NotImp].iter().any(|code| *code as u8 == rcode(answer))
}

/// A header alone, for messages whose question cannot be repeated. `bytes` has at least a header.
fn bare(bytes: &[u8], rcode: Rcode) -> Vec<u8> {
    let mut out = bytes[..HEADER].to_vec();
    out[2] = QR | (out[2] & (OPCODE | RD));
    out[3] = RA | rcode as u8;
    out[4..].fill(0);
    out
}

fn edns(bytes: &[u8]) -> Result<Option<Edns>, ()> {
    let message = Message::from_vec(bytes).map_err(|_| ())?;
    let read = |edns: &hickory_proto::op::Edns| Edns { payload: edns.max_payload(), version: edns.version(), dnssec_ok: edns.flags().dnssec_ok };
    Ok(message.edns.as_ref().map(read))
}

/// The OPT record that answers one: at least 512 bytes, the version and the DO bit as they were (reference, dataplane §9.1).
fn opt(edns: &Edns) -> Vec<u8> {
    let [high, low] = edns.payload.max(PLAIN_UDP).to_be_bytes();
    vec![0, 0, 41, high, low, 0, edns.version, if edns.dnssec_ok { 0x80 } else { 0 }, 0, 0, 0]
}

/// Appends a record of class IN and returns where its data begins.
fn record(out: &mut Vec<u8>, owner: [u8; 2], kind: RecordType, data: &[u8]) -> u16 {
    out.extend(owner);
    out.extend(u16::from(kind).to_be_bytes());
    out.extend([0, 1]);
    out.extend(TTL.to_be_bytes());
    // Data is an address or a name: at most 255 bytes.
    out.extend(u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
    let place = u16::try_from(out.len()).unwrap_or(0);
    out.extend(data);
    place
}

/// A name of letters, digits, `-`, `_` and `*`, in lower case and with dots.
fn readable<'a>(labels: impl Iterator<Item = &'a [u8]>) -> Option<String> {
    let mut name = String::new();
    for label in labels {
        if !name.is_empty() {
            name.push('.');
        }
        for byte in label {
            if !(byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'*')) {
                return None;
            }
            name.push(byte.to_ascii_lowercase().into());
        }
    }
    Some(name)
}

#[cfg(test)]
mod tests;
