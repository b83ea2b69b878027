//! Meshes in network namespaces, with the real binary: what a user of a cluster would see.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

#[path = "../support/bulk.rs"]
mod bulk;
#[allow(dead_code, unreachable_pub)] // shared with other tests, which use more of it
#[path = "../support/ca_server.rs"]
mod ca_server;
#[path = "../support/caller.rs"]
mod caller;
#[path = "../support/config_dump.rs"]
mod config_dump;
#[allow(dead_code, unreachable_pub)] // shared with other tests, which use more of it
#[path = "../support/crl.rs"]
mod crl;
#[path = "../support/mesh.rs"]
mod mesh;
#[allow(dead_code, unreachable_pub)] // shared with other tests, which use more of it
#[path = "../support/pki.rs"]
mod pki;
#[allow(dead_code, unreachable_pub)] // shared with other tests, which use more of it
#[path = "../support/xds_server.rs"]
mod xds_server;

mod abuse;
mod balancing;
mod ca;
mod calls;
mod dns;
mod drop_in;
mod gateway;
mod lifecycle;
mod pages;
mod policy;
mod programs;
mod revocation;
mod socks;
mod traffic;
mod waypoint;
mod wired;
