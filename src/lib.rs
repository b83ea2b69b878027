//! Culvert: an ambient-mode mesh data plane for Kubernetes.
//!
//! One proxy per node carries pod TCP traffic over HBONE (mutual TLS with SPIFFE identities, HTTP/2 CONNECT),
//! enforces L4 authorization at the destination, and refuses everything else: it never terminates user HTTP,
//! has no extension points, proxies no UDP, and never fails open.
//!
//! This file is the map of the house. A room may use only rooms above it (`tests/layers.rs` enforces the exact table).

// Words: ids, addresses, workloads, services, SPIFFE names, the immutable snapshot.
pub mod model;

// Decisions: compiled rules + facts of a connection → verdict with its reason.
pub mod policy;

// Every protobuf message, hand-written.
pub mod wire;

// Tasks: shutdown, drain, supervision, backoff, permits, clock.
pub mod lifecycle;

// What happened: metrics, access log, rate-limited log.
pub mod telemetry;

// The kernel: all `unsafe`; namespaces, socket options, nft, routes, packets with descriptors.
pub mod sys;

// Bytes: relays between sockets.
pub mod forward;

// Calls to a control plane: gRPC over TLS, roots and token re-read.
pub mod grpc;

// Who: certificates and their renewal, peer verification.
pub mod identity;

// Where: the sources of the mesh's state → snapshot.
pub mod discovery;

// The tunnel: dial, accept, pool, CONNECT, keepalive, limits.
pub mod hbone;

// Which pods are ours: ZDS client, per-pod listeners.
pub mod pods;

// One connection from accept to close: outbound, inbound, plaintext.
pub mod proxy;

// In-pod capture rules and the ZDS server.
pub mod node;

// The control plane: the mesh told to proxies, and certificates for them.
pub mod control;

// Readiness, metrics page, config dump, log level.
pub mod admin;

// The mesh in a box.
pub mod lab;

// The front door.
pub mod cli;
