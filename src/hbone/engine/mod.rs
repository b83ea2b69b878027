//! The forwarding core of a tunnel: TLS records and HTTP/2 frames of CONNECT streams in one task, without a copy, an allocation or a lock per
//! record (design §4).
//!
//! Why an HTTP/2 of our own and not `h2` with DATA taken out below it: the state of a live tunnel must be movable to another process, and the
//! tables inside `h2` (HPACK, streams, settings) cannot be read out or set; and a stream's bytes would still wake two tasks. The stock stack stays
//! in the tests as the oracle.

mod clock;
mod command;
mod control;
mod frame;
mod frozen;
mod handshake;
mod headers;
mod ready;
mod receive;
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
pub(super) use tunnel::{Next, Side, Tunnel};

/// The receive window that a stream starts with at most; it grows while its application keeps up.
const INITIAL_WINDOW: u32 = 256 << 10;
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
