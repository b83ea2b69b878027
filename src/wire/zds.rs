//! ZDS, package `istio.workload.zds`: the node agent tells the proxy of its node which pods to serve (reference, dataplane §8.2 and
//! node-and-control A.8). One message per `SOCK_SEQPACKET` packet, no framing; an `AddWorkload` comes with one descriptor, the pod's
//! network namespace.

use prost::Message;

/// Longest packet in either direction, in bytes. A longer one is a protocol error.
pub const MAX_PACKET: usize = 1024;

/// Version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Version {
    /// Never sent.
    NotUsed = 0,
    /// The only one so far.
    V1 = 1,
}

/// Proxy → agent, the first packet of a connection.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ZdsHello {
    /// Protocol version the proxy speaks.
    #[prost(enumeration = "Version", tag = "1")]
    pub version: i32,
}

/// Agent → proxy. Each one is answered by a [`WorkloadResponse`] before the next is sent.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WorkloadRequest {
    /// What is asked; absent only in messages of a newer protocol.
    #[prost(oneof = "Payload", tags = "1, 2, 3, 5")]
    pub payload: Option<Payload>,
}

/// The kinds of [`WorkloadRequest`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Payload {
    /// Serve this pod.
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    /// Stop serving this pod.
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    /// Everything that exists has been sent.
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    /// Go on serving this pod if you do; its namespace is unknown to the agent right now. Only before `SnapshotSent`.
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

/// Serve a pod; its network namespace comes beside the packet.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct AddWorkload {
    /// UID of the Kubernetes pod.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Who the pod is; the proxy refuses an Add without it.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
}

/// Who a pod is. (Tag 4, a trust domain, is reserved.)
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WorkloadInfo {
    /// Name of the pod.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Its service account.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// See [`Payload::Del`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DelWorkload {
    /// UID of the Kubernetes pod. The tag is 2, unlike everywhere else.
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// See [`Payload::Keep`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct KeepWorkload {
    /// UID of the Kubernetes pod.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// See [`Payload::SnapshotSent`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct SnapshotSent {}

/// Proxy → agent: the answer to one [`WorkloadRequest`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WorkloadResponse {
    /// The answer; absent only in messages of a newer protocol.
    #[prost(oneof = "Answer", tags = "1")]
    pub payload: Option<Answer>,
}

/// The kinds of [`WorkloadResponse`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Answer {
    /// Done, or why not.
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// Done, or why not.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Ack {
    /// Empty when all is well.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// A pod as both ends of ZDS speak of it: an [`AddWorkload`] whose parts are all there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pod {
    /// UID of the Kubernetes pod.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

impl From<Pod> for AddWorkload {
    fn from(pod: Pod) -> Self {
        let info = WorkloadInfo { name: pod.name, namespace: pod.namespace, service_account: pod.service_account };
        Self { uid: pod.uid, workload_info: Some(info) }
    }
}

impl From<Payload> for WorkloadRequest {
    fn from(payload: Payload) -> Self {
        Self { payload: Some(payload) }
    }
}

impl WorkloadResponse {
    /// An answer: `error` is empty when all is well, and is cut to what fits into a packet.
    #[must_use]
    pub fn ack(error: &str) -> Self {
        // Two tags and two lengths of at most two bytes each go around the text.
        let end = error.floor_char_boundary(MAX_PACKET - 8);
        Self { payload: Some(Answer::Ack(Ack { error: error.get(..end).unwrap_or_default().to_owned() })) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pod() -> Pod {
        Pod { uid: "u1".into(), name: "web".into(), namespace: "shop".into(), service_account: "sa".into() }
    }

    /// Each message with the bytes that protoc's encoders give for it, written by hand from the field tags.
    #[test]
    fn every_request_has_its_golden_bytes() {
        let golden: [(Payload, &[u8]); 4] = [
            (Payload::Add(pod().into()), b"\x0a\x15\x0a\x02u1\x12\x0f\x0a\x03web\x12\x04shop\x1a\x02sa"),
            (Payload::Del(DelWorkload { uid: "u1".into() }), b"\x12\x04\x12\x02u1"),
            (Payload::SnapshotSent(SnapshotSent {}), b"\x1a\x00"),
            (Payload::Keep(KeepWorkload { uid: "u1".into() }), b"\x2a\x04\x0a\x02u1"),
        ];
        for (payload, bytes) in golden {
            let request = WorkloadRequest::from(payload);
            assert_eq!(request.encode_to_vec(), bytes, "{request:?}");
            assert_eq!(WorkloadRequest::decode(bytes).unwrap(), request);
        }
    }

    #[test]
    fn hello_and_acks_have_their_golden_bytes() {
        assert_eq!(ZdsHello { version: Version::V1 as i32 }.encode_to_vec(), b"\x08\x01");
        assert_eq!(WorkloadResponse::ack("").encode_to_vec(), b"\x0a\x00");
        assert_eq!(WorkloadResponse::ack("no").encode_to_vec(), b"\x0a\x04\x0a\x02no");
    }

    #[test]
    fn an_unknown_kind_of_request_decodes_to_no_payload() {
        assert_eq!(WorkloadRequest::decode(&b"\x22\x00"[..]).unwrap().payload, None);
    }

    #[test]
    fn the_longest_error_still_fits_into_a_packet_and_is_cut_between_characters() {
        for text in ["x".repeat(5000), "ü".repeat(3000), "x".repeat(MAX_PACKET - 8)] {
            let bytes = WorkloadResponse::ack(&text).encode_to_vec();
            assert!(bytes.len() <= MAX_PACKET && bytes.len() > MAX_PACKET - 12, "{}", bytes.len());
            WorkloadResponse::decode(&bytes[..]).unwrap();
        }
    }
}
