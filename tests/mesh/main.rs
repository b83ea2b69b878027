//! Meshes in network namespaces, with the real binary: what a user of a cluster would see.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/caller.rs"]
mod caller;
#[path = "../support/mesh.rs"]
mod mesh;
#[allow(dead_code, unreachable_pub)]
#[path = "../support/pki.rs"]
mod pki;

mod balancing;
mod calls;
mod lifecycle;
mod traffic;
