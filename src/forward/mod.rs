//! Bytes: moves them between two sockets and counts them. Knows nothing of mesh, identity or HTTP/2.
//! It never decides who may talk to whom, and never holds a buffer for a connection that is idle.
//! Main types: [`relay`], [`Ended`], [`ReadSize`], [`record`], [`slab`].

mod buffer;
pub mod record;
mod relay;
pub(crate) mod shelf;
pub mod slab;
mod splice;

pub use buffer::{MAX_READ, MIN_READ, ReadSize};
pub use relay::{Ended, relay, socket_error};
pub use shelf::{TRIM_INTERVAL, trim};
