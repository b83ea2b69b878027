//! The forwarding core against peers that do everything that TLS 1.3 and HTTP/2 allow, and much that they do not: record by record, frame by
//! frame, and in random schedules beside stock tokio-rustls and `h2`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, unreachable_pub)]
#[path = "support/raw_h2.rs"]
mod raw_h2;
#[allow(dead_code, unreachable_pub)]
#[path = "support/raw_tls.rs"]
mod raw_tls;
#[allow(dead_code, unreachable_pub)]
#[path = "support/tunnel_peers.rs"]
mod tunnel_peers;

#[path = "forwarding/alerts.rs"]
mod alerts;
#[path = "forwarding/credit.rs"]
mod credit;
#[path = "forwarding/frames.rs"]
mod frames;
#[path = "forwarding/keys.rs"]
mod keys;
#[path = "forwarding/opened.rs"]
mod opened;
#[path = "forwarding/records.rs"]
mod records;
#[path = "forwarding/schedules.rs"]
mod schedules;
#[path = "forwarding/stock.rs"]
mod stock;
#[path = "forwarding/transport.rs"]
mod transport;
