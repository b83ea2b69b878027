//! One packet of the agent, understood or refused.

use std::os::fd::OwnedFd;

use prost::Message;

use super::Pod;
use crate::sys::netns::NetNs;
use crate::wire::zds::{Payload, WorkloadRequest};

/// What the agent asks.
#[derive(Debug)]
pub(super) enum Request {
    /// Serve this pod in this namespace.
    Add(Pod, NetNs),
    /// Go on serving the pod of this uid.
    Keep(String),
    /// Stop serving the pod of this uid.
    Del(String),
    /// The snapshot is complete.
    SnapshotSent,
}

/// Why a request was not done, and what follows from that. Every one is told to the agent in an acknowledgement first.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// The pod waits and is tried again; the connection goes on.
    #[error("{0}")]
    Pending(String),
    /// The packet makes no sense: close this connection and make a new one.
    #[error("{0}")]
    Malformed(String),
    /// The agent's and our idea of the protocol's state differ: end the process.
    #[error("{0}")]
    Fatal(String),
}

impl Request {
    /// Understands a packet. Descriptors that it does not return are closed.
    pub(super) fn decode(bytes: &[u8], truncated: bool, fds: Vec<OwnedFd>) -> Result<Self, Refusal> {
        let malformed = |reason: String| Err(Refusal::Malformed(reason));
        if truncated {
            return malformed("the packet is longer than 1024 bytes or carries too many descriptors".into());
        }
        let payload = match WorkloadRequest::decode(bytes) {
            Ok(request) => request.payload,
            Err(error) => return malformed(format!("the packet does not decode: {error}")),
        };
        let Some(payload) = payload else { return malformed("the packet holds no request that this version knows".into()) };
        let wanted = usize::from(matches!(payload, Payload::Add(_)));
        if fds.len() != wanted {
            return malformed(format!("the packet carries {} descriptors, its kind takes {wanted}", fds.len()));
        }
        match payload {
            Payload::Add(add) => {
                let Some(info) = add.workload_info else {
                    return Err(Refusal::Fatal(format!("pod {} was added without workload_info", add.uid)));
                };
                let pod = Pod { uid: add.uid, name: info.name, namespace: info.namespace, service_account: info.service_account };
                let Some(fd) = fds.into_iter().next() else { return malformed("no descriptor".into()) };
                match NetNs::from_fd(fd) {
                    Ok(netns) => Ok(Self::Add(pod, netns)),
                    Err(error) => malformed(format!("the descriptor of pod {} is unusable: {error}", pod.uid)),
                }
            }
            Payload::Keep(keep) => Ok(Self::Keep(keep.uid)),
            Payload::Del(del) => Ok(Self::Del(del.uid)),
            Payload::SnapshotSent(_) => Ok(Self::SnapshotSent),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;
    use crate::wire::zds::{AddWorkload, DelWorkload, KeepWorkload, SnapshotSent};

    fn bytes(payload: Payload) -> Vec<u8> {
        WorkloadRequest::from(payload).encode_to_vec()
    }

    fn add(pod: Pod) -> Vec<u8> {
        bytes(Payload::Add(pod.into()))
    }

    fn pod() -> Pod {
        Pod { uid: "u1".into(), name: "web".into(), namespace: "shop".into(), service_account: "sa".into() }
    }

    fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    /// A descriptor and a witness that tells whether it has been closed: the read end of a pipe sees the end of file then.
    fn watched_fd() -> (OwnedFd, impl Fn() -> bool) {
        let (reader, writer) = std::io::pipe().unwrap();
        let closed = move || {
            let mut poll = [nix::poll::PollFd::new(reader.as_fd(), nix::poll::PollFlags::empty())];
            nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO).unwrap() == 1
        };
        (writer.into(), closed)
    }

    #[test]
    fn add_with_info_and_one_descriptor_is_understood() {
        let file = fd();
        let raw = file.as_raw_fd();
        let Ok(Request::Add(decoded, netns)) = Request::decode(&add(pod()), false, vec![file]) else { panic!("not an Add") };
        assert_eq!(decoded, pod());
        assert_eq!(netns.as_fd().as_raw_fd(), raw);
    }

    #[test]
    fn keep_del_and_snapshot_take_no_descriptor() {
        let kinds = [
            bytes(Payload::Keep(KeepWorkload { uid: "u".into() })),
            bytes(Payload::Del(DelWorkload { uid: "u".into() })),
            bytes(Payload::SnapshotSent(SnapshotSent {})),
        ];
        for packet in kinds {
            assert!(Request::decode(&packet, false, vec![]).is_ok());
            let (unwanted, closed) = watched_fd();
            assert!(matches!(Request::decode(&packet, false, vec![unwanted]), Err(Refusal::Malformed(_))));
            assert!(closed(), "an unwanted descriptor must be closed");
        }
    }

    #[test]
    fn add_without_a_descriptor_or_with_two_is_malformed_and_all_are_closed() {
        assert!(matches!(Request::decode(&add(pod()), false, vec![]), Err(Refusal::Malformed(_))));
        let ((first, first_closed), (second, second_closed)) = (watched_fd(), watched_fd());
        assert!(matches!(Request::decode(&add(pod()), false, vec![first, second]), Err(Refusal::Malformed(_))));
        assert!(first_closed() && second_closed());
    }

    #[test]
    fn add_without_workload_info_is_fatal_and_its_descriptor_is_closed() {
        let (file, closed) = watched_fd();
        let packet = bytes(Payload::Add(AddWorkload { uid: "u1".into(), workload_info: None }));
        assert!(matches!(Request::decode(&packet, false, vec![file]), Err(Refusal::Fatal(_))));
        assert!(closed());
    }

    #[test]
    fn garbage_unknown_kinds_and_truncated_packets_are_malformed_and_close_descriptors() {
        for (packet, truncated) in [(&b"\xff\xff"[..], false), (&b"\x22\x00"[..], false), (&add(pod())[..], true)] {
            let (file, closed) = watched_fd();
            assert!(matches!(Request::decode(packet, truncated, vec![file]), Err(Refusal::Malformed(_))));
            assert!(closed());
        }
    }
}
