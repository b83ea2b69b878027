//! Reading the addresses of one push.
//!
//! Most of a large mesh is replicas, whose messages differ in a few fields. So a workload is not decoded as a whole: the fields that are its own
//! are picked out, and the rest, if the same bytes were read before, is the profile that was made of them then.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::rows::{Row, Words, address, read_profile, read_service, status, within};
use crate::model::{Addresses, Ending, Profile, Text, Workload};
use crate::wire::workload as wire;

/// What the addresses of one push have in common.
#[derive(Debug, Default)]
pub(super) struct Reader {
    words: Words,
    profiles: HashMap<Box<[u8]>, Arc<Profile>, RandomState>,
    /// Encoded fields of the workload at hand that are not its own.
    shared: Vec<u8>,
}

impl Reader {
    /// Reads an encoded `Address`.
    pub(super) fn row(&mut self, encoded: &[u8]) -> Result<Row, String> {
        if let Some(workload) = only_workload(encoded) {
            return self.workload(workload).map(Row::Workload);
        }
        match wire::Address::decode(encoded).map_err(|error| error.to_string())?.r#type {
            // Of several fields, as nobody sends it: put together it is an ordinary one.
            Some(wire::AddressType::Workload(workload)) => self.workload(&workload.encode_to_vec()).map(Row::Workload),
            Some(wire::AddressType::Service(service)) => read_service(service, &mut self.words).map(Row::Service),
            None => Err("neither a workload nor a service".to_owned()),
        }
    }

    /// Reads an encoded `Workload`.
    fn workload(&mut self, encoded: &[u8]) -> Result<Workload, String> {
        self.shared.clear();
        let own = Own::split(encoded, &mut self.shared)?;
        if own.uid.is_empty() {
            return Err("uid is empty".to_owned());
        }
        let profile = match self.profiles.get(self.shared.as_slice()) {
            Some(profile) => profile.clone(),
            None => {
                let rest = wire::Workload::decode(self.shared.as_slice()).map_err(|error| error.to_string())?;
                let profile = Arc::new(read_profile(rest, &mut self.words)?);
                self.profiles.insert(self.shared.as_slice().into(), profile.clone());
                profile
            }
        };
        let one = |bytes: &[u8]| address(bytes).map_err(|reason| within("addresses", reason));
        let addresses = match own.addresses {
            Few::None => Addresses::default(),
            Few::One(bytes) => one(bytes)?.into(),
            Few::Many(all) => all.into_iter().map(one).collect::<Result<Vec<_>, _>>()?.into(),
        };
        let uid = Text::from(own.uid);
        Ok(Workload {
            name: Ending::of(&uid, own.name),
            uid,
            addresses,
            node: self.words.get(own.node),
            hostname: self.words.get(own.hostname),
            status: status(own.status)?,
            capacity: own.capacity.unwrap_or(1),
            profile,
        })
    }
}

/// The workload of an `Address` that has this one field and no other.
fn only_workload(mut encoded: &[u8]) -> Option<&[u8]> {
    let (1, WireType::LengthDelimited) = decode_key(&mut encoded).ok()? else { return None };
    let length = usize::try_from(decode_varint(&mut encoded).ok()?).ok()?;
    (length == encoded.len()).then_some(encoded)
}

/// The fields in which replicas differ, by their numbers (reference, dataplane §5.1); the last one of a number counts, as everywhere in protobuf.
#[derive(Debug, Default)]
struct Own<'a> {
    /// 1
    name: &'a str,
    /// 3
    addresses: Few<'a>,
    /// 9
    node: &'a str,
    /// 17
    status: i32,
    /// 20
    uid: &'a str,
    /// 21
    hostname: &'a str,
    /// 27
    capacity: Option<u32>,
}

/// Most workloads have one address.
#[derive(Debug, Default)]
enum Few<'a> {
    #[default]
    None,
    One(&'a [u8]),
    Many(Vec<&'a [u8]>),
}

impl<'a> Few<'a> {
    fn push(&mut self, bytes: &'a [u8]) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(bytes),
            Self::One(first) => Self::Many(vec![first, bytes]),
            Self::Many(mut all) => {
                all.push(bytes);
                Self::Many(all)
            }
        };
    }
}

impl<'a> Own<'a> {
    /// Takes the own fields out of a workload; all others go to `shared` as they are.
    fn split(encoded: &'a [u8], shared: &mut Vec<u8>) -> Result<Self, String> {
        let broken = |error: prost::DecodeError| error.to_string();
        let text = |bytes: &'a [u8]| std::str::from_utf8(bytes).map_err(|_| "a text is not UTF-8".to_owned());
        let (mut own, mut rest) = (Self::default(), encoded);
        while !rest.is_empty() {
            let field = rest;
            let (number, wire_type) = decode_key(&mut rest).map_err(broken)?;
            match (number, wire_type) {
                (1 | 3 | 9 | 20 | 21 | 27, WireType::LengthDelimited) => {
                    let length = usize::try_from(decode_varint(&mut rest).map_err(broken)?).unwrap_or(usize::MAX);
                    let (bytes, after) = rest.split_at_checked(length).ok_or_else(|| format!("field {number} is longer than the message"))?;
                    rest = after;
                    match number {
                        1 => own.name = text(bytes)?,
                        3 => own.addresses.push(bytes),
                        9 => own.node = text(bytes)?,
                        20 => own.uid = text(bytes)?,
                        21 => own.hostname = text(bytes)?,
                        _ => own.capacity = Some(u32::decode(bytes).map_err(broken)?),
                    }
                }
                // The low half is the number, as of every enumeration.
                #[allow(clippy::cast_possible_truncation)]
                (17, WireType::Varint) => own.status = decode_varint(&mut rest).map_err(broken)? as i32,
                (1 | 3 | 9 | 17 | 20 | 21 | 27, _) => return Err(format!("field {number} is not of its type")),
                _ => {
                    skip_field(wire_type, number, &mut rest, DecodeContext::default()).map_err(broken)?;
                    shared.extend_from_slice(field.get(..field.len() - rest.len()).unwrap_or_default());
                }
            }
        }
        Ok(own)
    }
}

#[cfg(test)]
mod tests;
