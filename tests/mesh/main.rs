//! Meshes in network namespaces, with the real binary: what a user of a cluster would see.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mesh.rs"]
mod mesh;

mod abuse;
mod policy;
mod programs;
mod traffic;
