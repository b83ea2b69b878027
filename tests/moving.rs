//! Live tunnels are written out and taken up again, mid-transfer, in the same process: no byte lost, none twice, every end passed on once, and all
//! that HTTP/2 and TLS remember is right afterwards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, unreachable_pub)]
#[path = "support/raw_h2.rs"]
mod raw_h2;
#[allow(dead_code, unreachable_pub)]
#[path = "support/tunnel_peers.rs"]
mod tunnel_peers;

#[allow(unreachable_pub)]
#[path = "moving/ends.rs"]
mod ends;
#[path = "moving/memory.rs"]
mod memory;
#[path = "moving/refused.rs"]
mod refused;
#[path = "moving/traffic.rs"]
mod traffic;
#[path = "moving/unanswered.rs"]
mod unanswered;
