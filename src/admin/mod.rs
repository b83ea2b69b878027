//! Windows for people and machines: the admin page (loopback, 15000), readiness (15021) and metrics (15020), as the reference has
//! them (dataplane §10.2–10.4).
//! This room decides nothing and holds no state of the mesh; it changes nothing but the log's filter, and stops the process only
//! when it is asked by POST. It has no `/debug/pprof`: profiles are taken with the tools of the machine.
//! Main types: [`Readiness`], [`AdminSources`], and the futures [`serve_admin`], [`serve_readiness`], [`serve_metrics`].
//!
//! Who may ask: the admin page is bound to loopback, and a browser is no way in. A `Host` or `Origin` that does not name loopback is
//! refused, so neither a rebound DNS name nor a page that a person has open can read the dump or stop the process (reference,
//! craft-and-trust D21). Readiness and metrics are open to the pod network and therefore bounded: connections in all and per
//! source, the time and size of a request header, and the pages in memory at once.

mod metrics;
mod page;
mod readiness;
mod server;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::TcpListener;

pub use metrics::serve_metrics;
pub use page::{AdminSources, serve_admin};
pub use readiness::{Readiness, ReadyToken, serve_readiness};

/// Why a window could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address is taken or may not be used.
    #[error("cannot listen on {address} for {what}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Which window.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// Listens on 127.0.0.1, and on ::1 where loopback has IPv6 and `ipv6` is set. A port of 0 may give two different ports.
pub async fn listen_loopback(port: u16, ipv6: bool) -> Result<Vec<TcpListener>, AdminError> {
    let refused = |address, source| AdminError::Listen { address, what: "the admin page", source };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut listeners = vec![TcpListener::bind(address).await.map_err(|source| refused(address, source))?];
    if ipv6 {
        let address = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        match TcpListener::bind(address).await {
            Ok(listener) => listeners.push(listener),
            // EADDRNOTAVAIL and EAFNOSUPPORT: this machine has no IPv6 on loopback.
            Err(error) if matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::Unsupported) => {}
            Err(error) if error.raw_os_error() == Some(97) => {}
            Err(error) => return Err(refused(address, error)),
        }
    }
    Ok(listeners)
}
