#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::fs::File;

use super::*;
use crate::sys::netns::NetNs;

fn close_on_exec(fd: &OwnedFd) -> bool {
    let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
    nix::fcntl::FdFlag::from_bits_retain(flags).contains(nix::fcntl::FdFlag::FD_CLOEXEC)
}

/// How many descriptors of this process lead to the namespace `id`: what a leak would raise.
fn open_descriptors_of(id: crate::sys::netns::NetNsId) -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    entries.filter(|entry| std::fs::metadata(entry.path()).is_ok_and(|file| std::os::unix::fs::MetadataExt::ino(&file) == id.ino)).count()
}

#[tokio::test]
async fn bytes_and_a_descriptor_arrive_together_and_close_on_exec() {
    let (left, right) = SeqPacket::pair().unwrap();
    let pod = NetNs::create().unwrap();
    left.send(b"add", &[pod.as_fd()]).await.unwrap();
    let mut buffer = [0; 16];
    let packet = right.receive(&mut buffer).await.unwrap().unwrap();
    assert_eq!((&buffer[..packet.len], packet.truncated), (&b"add"[..], false));
    let [fd] = <[OwnedFd; 1]>::try_from(packet.fds).unwrap();
    assert!(close_on_exec(&fd));
    assert_eq!(NetNs::from_fd(fd).unwrap().id(), pod.id());
}

#[tokio::test]
async fn a_packet_longer_than_the_buffer_is_reported_and_does_not_spill_into_the_next() {
    let (left, right) = SeqPacket::pair().unwrap();
    left.send(&[7; 100], &[]).await.unwrap();
    left.send(b"next", &[]).await.unwrap();
    let mut buffer = [0; 16];
    let first = right.receive(&mut buffer).await.unwrap().unwrap();
    assert!(first.truncated);
    let second = right.receive(&mut buffer).await.unwrap().unwrap();
    assert_eq!((&buffer[..second.len], second.truncated), (&b"next"[..], false));
}

#[tokio::test]
async fn too_many_descriptors_are_reported_and_none_leaks() {
    let (left, right) = SeqPacket::pair().unwrap();
    let pod = NetNs::create().unwrap();
    let before = open_descriptors_of(pod.id());
    left.send(b"x", &[pod.as_fd(); MAX_FDS + 1]).await.unwrap();
    let packet = right.receive(&mut [0; 8]).await.unwrap().unwrap();
    assert!(packet.truncated && packet.fds.len() >= MAX_FDS, "{packet:?}");
    drop(packet);
    assert_eq!(open_descriptors_of(pod.id()), before);
}

#[tokio::test]
async fn exactly_the_limit_of_descriptors_arrives_whole() {
    let (left, right) = SeqPacket::pair().unwrap();
    let file = File::open("/dev/null").unwrap();
    left.send(b"x", &[file.as_fd(); MAX_FDS]).await.unwrap();
    let packet = right.receive(&mut [0; 8]).await.unwrap().unwrap();
    assert_eq!((packet.fds.len(), packet.truncated), (MAX_FDS, false));
}

#[tokio::test]
async fn a_closed_peer_ends_the_stream() {
    let (left, right) = SeqPacket::pair().unwrap();
    drop(left);
    assert!(right.receive(&mut [0; 8]).await.unwrap().is_none());
    assert_eq!(right.send(b"x", &[]).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_listener_replaces_a_stale_socket_but_not_another_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zds.sock");
    drop(SeqPacketListener::bind(&path).unwrap());
    let listener = SeqPacketListener::bind(&path).unwrap();
    let client = SeqPacket::connect(&path).unwrap();
    let server = listener.accept().await.unwrap();
    client.send(b"hello", &[]).await.unwrap();
    assert_eq!(server.receive(&mut [0; 8]).await.unwrap().unwrap().len, 5);

    let precious = dir.path().join("precious");
    std::fs::write(&precious, "data").unwrap();
    assert_eq!(SeqPacketListener::bind(&precious).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "data");
}

#[tokio::test]
async fn only_the_owner_may_connect() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zds.sock");
    let _listener = SeqPacketListener::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}
