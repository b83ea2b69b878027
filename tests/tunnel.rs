//! Tunnels over loopback TCP: our two sides against each other, against stock tokio-rustls and `h2`, and against a peer that writes raw frames.
//! Rows H1, H2, H4–H11, A3–A11 (scaled down), D6, D17, D20, D24, F7, F8 and F13 of the list of attacks, and the rows of the reference's pool.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, unreachable_pub)]
#[path = "support/pki.rs"]
mod pki;
#[allow(dead_code, unreachable_pub)]
#[path = "support/raw_h2.rs"]
mod raw_h2;
#[allow(dead_code, unreachable_pub)]
#[path = "support/tunnel_peers.rs"]
mod tunnel_peers;

#[path = "tunnel/abuse.rs"]
mod abuse;
#[path = "tunnel/dials.rs"]
mod dials;
#[path = "tunnel/drain.rs"]
mod drain;
#[path = "tunnel/ends.rs"]
mod ends;
#[path = "tunnel/handshake.rs"]
mod handshake;
#[path = "tunnel/keepalive.rs"]
mod keepalive;
#[path = "tunnel/older.rs"]
mod older;
#[path = "tunnel/pool.rs"]
mod pool;
#[path = "tunnel/rates.rs"]
mod rates;
#[path = "tunnel/requests.rs"]
mod requests;
#[path = "tunnel/reserve.rs"]
mod reserve;
#[path = "tunnel/seam.rs"]
mod seam;
#[path = "tunnel/streams.rs"]
mod streams;
#[path = "tunnel/windows.rs"]
mod windows;
#[path = "tunnel/within.rs"]
mod within;
