//! The control plane from outside, by a client written from the wire documents: subscriptions, reloads, certificates, and clients that do not behave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "control/certificates.rs"]
mod certificates;
#[path = "control/clients.rs"]
mod clients;
#[path = "support/control_client.rs"]
mod control_client;
#[path = "control/ground.rs"]
mod ground;
#[path = "control/mesh_file.rs"]
mod mesh_file;
#[path = "control/program.rs"]
mod program;
#[path = "control/round_trip.rs"]
mod round_trip;
#[path = "control/streams.rs"]
mod streams;
