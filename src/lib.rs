//! Culvert: an ambient-mode mesh data plane for Kubernetes.
//!
//! One proxy per node carries pod TCP traffic over HBONE (mutual TLS with SPIFFE identities, HTTP/2 CONNECT),
//! enforces L4 authorization at the destination, and refuses everything else: it never terminates user HTTP,
//! has no extension points, proxies no UDP, and never fails open.
//!
//! This file is the map of the house. A room may use only rooms above it (`tests/layers.rs` enforces the exact table).

pub mod admin;
pub mod cli;
pub mod discovery;
pub mod forward;
pub mod hbone;
pub mod identity;
pub mod lab;
pub mod lifecycle;
pub mod model;
pub mod node;
pub mod pods;
pub mod policy;
pub mod proxy;
pub mod sys;
pub mod telemetry;
pub mod wire;
