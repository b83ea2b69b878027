//! The proxy's own tunnel: its metrics can be scraped over HBONE by whoever policy permits (reference, dataplane §4.9).

use std::io;
use std::sync::Arc;

use tokio::net::TcpListener;

use super::{Node, PodProxy, PodSockets};
use crate::discovery::LocalName;
use crate::lifecycle::drain::DrainWatcher;

/// Serves the HBONE port in the proxy's own namespace for its own workload `name` until `drain`; `process` as in [`PodProxy::new`].
///
/// # Errors
/// When the listener cannot be registered with the runtime.
pub fn serve_own_tunnel(
    node: &Arc<Node>,
    name: LocalName,
    listener: std::net::TcpListener,
    (drain, process): (DrainWatcher, DrainWatcher),
) -> io::Result<()> {
    let config = super::Config { mark: None, ..node.config.clone() };
    let pod = PodProxy::new(node.clone(), name, PodSockets::new(None, false, &config), process);
    pod.serve_hbone(TcpListener::from_std(listener)?, drain);
    Ok(())
}
