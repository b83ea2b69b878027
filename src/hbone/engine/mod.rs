//! The forwarding core of a tunnel: TLS records and HTTP/2 frames of CONNECT streams in one task, without a copy, an allocation or a lock per
//! record (design §4).
//!
//! Why an HTTP/2 of our own, and not `h2` with DATA taken out below it (design §4). The state of a live tunnel must be movable to another process,
//! and the tables inside `h2` (HPACK, streams, settings) can be neither read out nor set. And figures: that seam was prototyped and thrown away,
//! stock `h2` 0.4.20 on a byte layer in memory which cut DATA and WINDOW_UPDATE out below it and put ours between its frames; record layer,
//! sockets, windows and fairness were ours as they are. 2026-11-21, VM with 2 cores of a Xeon, Linux 6.18, release profile; both seams in one
//! process, client and server on a thread each, loopback TCP, applications on socket pairs, A B B A: `proto cpu 2 6` (12 trials each),
//! `proto bulk 1 5` (10), `proto heap` (9,900 streams, 200 tunnels). Median (lowest–highest); CPU of the whole process: both sides, applications
//! included.
//!
//! | | `h2` below | here | |
//! |---|---|---|---|
//! | CONNECT, 200, 1 byte, closed, 1 at once: CPU µs | 116.7 (79.0–118.6) | 101.3 (83.3–104.0) | 0.87 |
//! | the same, 32 at once | 47.3 (46.9–48.0) | 41.6 (40.2–43.6) | 0.88 |
//! | CONNECT, 200, reset, without applications, 32 at once: CPU µs | 16.4 (16.3–16.6) | 11.9 (11.9–12.1) | 0.73 |
//! | 1 KiB request, 1 stream: CPU µs | 30.7 (30.1–31.1) | 30.4 (30.2–31.6) | 0.99 |
//! | the same, 32 streams | 8.91 (8.75–9.11) | 8.94 (8.67–9.11) | 1.00 |
//! | bulk, 1 stream, up: CPU s/GB | 0.754 (0.741–0.779) | 0.745 (0.739–0.782) | 0.99 |
//! | the same, down | 0.777 (0.745–0.788) | 0.770 (0.746–0.797) | 0.99 |
//! | heap of an idle stream, client; server: octets | 1,250; 1,250 | 637; 637 | 0.51 |
//! | heap of an idle tunnel, client; server: octets | 36,190; 29,800 | 5,600; 6,320 | 0.15; 0.21 |
//! | lines without comments, HPACK included, moving a tunnel not | 2,577 | 2,817 | 1.09 |
//!
//! So `h2` below is the same in bulk and for requests on open streams, has fewer lines of ours, and is dearer where streams come and go (with the
//! same system calls) and in memory. What it could not give either: a guard against floods of PING, SETTINGS, PRIORITY or unknown frames (its brake
//! is a full socket, which memory never is), more streams for a peer that does not know the limit yet, a client's GOAWAY with a reason. The
//! filter needs a table of streams beside `h2`'s to judge DATA. It must keep WINDOW_UPDATE from `h2`, whose windows, never used, overflow after 2
//! GiB (tried: FLOW_CONTROL_ERROR).
//!
//! What this core is worth was also measured against this house on stock `h2` 0.4.20 and tokio-rustls, as it was before, both in one run
//! (`culvert lab bench --peer`, two rounds of 2 s, 2 cores, one worker each, CPU of both proxies):
//!
//! | | stock | here | |
//! |---|---|---|---|
//! | bulk, 1 stream: CPU s/GB; Gbit/s | 0.830; 14.5 | 0.564; 20.3 | 0.68; 1.42 |
//! | requests, 1 connection: CPU s/1,000; p50 µs | 0.0552; 72.0 | 0.0430; 62.1 | 0.78; 0.86 |
//! | requests, 32 connections: CPU s/1,000; per s | 0.0256; 39,440 | 0.0133; 73,814 | 0.52; 1.87 |
//! | new connections: CPU s/1,000; per s | 0.145; 6,858 | 0.0854; 11,400 | 0.59; 1.66 |
//! | lines without comments, record layer included | 1,567 | 5,224 | 917 of them move a live tunnel |
//!
//! The figures also have what else changed around the tunnel since. Conformance: the tests of the tunnel were written against the
//! stock stack and pass here; random schedules through both give the same bytes and ends (`tests/forwarding`), and the stock stack stays in the
//! tests as the oracle.

mod clock;
mod command;
mod control;
mod frame;
mod frozen;
mod handshake;
mod headers;
mod older;
mod ready;
mod receive;
mod reserve;
mod spare;
mod stream;
mod temper;
mod transmit;
mod tunnel;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::request::Fields;
use crate::forward::record::{Opener, Sealer};

pub(super) use command::{Answered, Attach, Command};
pub(super) use frame::Reason;
pub use frame::{Head, Step, Walker};
pub(super) use frozen::{Freeze, Thawed};
pub use frozen::{Frozen, StateError};
pub(super) use handshake::{connect, welcome};
pub(super) use ready::Inbox;
pub(super) use reserve::STARVED;
pub(super) use tunnel::{Next, Side, Tunnel};

/// The receive window that a stream starts with at most; it grows while its application keeps up.
const INITIAL_WINDOW: u32 = 256 << 10;
/// The same for streams that we open.
const INITIAL_WINDOW_OPENED: u32 = 1 << 20;
const MAX_WINDOW: i64 = frame::MAX_WINDOW;
/// How long a connection that is over may take to say so.
const LINGER: Duration = Duration::from_secs(1);

/// A finished TLS handshake.
pub(super) struct Established {
    pub(super) socket: TcpStream,
    pub(super) opener: Opener,
    pub(super) sealer: Sealer,
    /// The peer's certificates, leaf first.
    pub(super) chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    /// It was one of TLS 1.2.
    pub(super) older: bool,
    pub(super) input: Early,
}

/// What arrived behind the handshake.
#[derive(Default)]
pub(super) struct Early {
    /// Already opened.
    pub(super) plaintext: Vec<u8>,
    /// Not yet.
    pub(super) records: Vec<u8>,
}

/// A CONNECT of the peer that waits for its answer.
pub(super) struct Asked {
    pub(super) id: u32,
    pub(super) fields: Fields,
    /// Resolves, with an error, when the peer gave up.
    pub(super) told: oneshot::Receiver<()>,
    pub(super) inbox: Arc<Inbox<Command>>,
}
