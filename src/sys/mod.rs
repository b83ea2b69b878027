//! The kernel: network namespaces, socket options, original destinations, fd passing, splice, running `nft`, policy routes, limits.
//! This room knows nothing of meshes, pods or policy, never logs, never reads the environment, and is the only one that may contain `unsafe`.
//! Main types: [`netns::NetNs`], [`socket::ListenOptions`], [`socket::DialOptions`], [`seqpacket::SeqPacket`], [`splice::Pipe`].
//!
//! Errors are `std::io::Error` throughout, because every failure here is a system call's; where the number alone would not tell a
//! person what to do, the error carries a sentence.

pub mod datagram;
pub mod limits;
pub mod link;
pub mod memory;
pub mod netns;
pub mod nft;
pub mod process;
pub mod route;
pub mod seqpacket;
pub mod socket;
pub mod splice;
pub mod stream_io;
