//! Envoy as the other end of our tunnels, with real traffic in network namespaces: it calls our pods, and it serves their calls.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

#[path = "support/bulk.rs"]
mod bulk;
#[path = "support/caller.rs"]
mod caller;
#[path = "support/mesh.rs"]
mod mesh;
#[allow(dead_code, unreachable_pub)] // shared with other tests, which use more of it
#[path = "support/pki.rs"]
mod pki;

#[path = "envoy/ends.rs"]
mod ends;
#[path = "envoy/ground.rs"]
mod ground;
#[path = "envoy/traffic.rs"]
mod traffic;
#[path = "envoy/waypoint.rs"]
mod waypoint;
