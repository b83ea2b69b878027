//! A tunnel within a stream of another: how a workload of another network is reached (reference, dataplane §2.8, "double HBONE"). The outer tunnel
//! ends at the gateway of that network, which passes the bytes of its streams on without being able to read them; the inner one ends at the
//! workload or waypoint itself.
//!
//! The inner tunnel is a tunnel like any other, on a socket of its own: one end of a pair of sockets, whose other end is the application of the
//! outer stream. So neither layer knows of the other; what it costs is one more copy each way. An inner tunnel is not pooled: it serves the one
//! connection that it was made for, so that the gateway balances connections and not proxies.

use std::sync::Arc;

use tokio::net::TcpStream;

use super::dial::{OpenError, Way, handshake};
use super::{ConnectRequest, ConnectResponse, Endpoint, Error, Pool, PoolKey, Role, TunnelStream};
use crate::identity::Credential;
use crate::model::SpiffeId;
use crate::sys::socket;
use crate::telemetry::Meter;

/// What is asked beyond a gateway.
#[derive(Debug, Clone, Copy)]
pub struct Inner<'a> {
    /// Who may answer there. Nobody if it is empty.
    pub expected: &'a [SpiffeId],
    /// The request.
    pub request: &'a ConnectRequest,
}

impl Pool {
    /// Opens a stream to `outer`'s authority on a pooled or new tunnel to a gateway, a tunnel within it, and a stream within that. The answer, the
    /// peer and the stream are the inner ones. The inner tunnel ends with its stream, and takes the outer stream with it. Dropping the future gives
    /// all of it up.
    ///
    /// # Errors
    /// Those of [`Pool::open`] about the gateway; [`Error::Within`] about what is beyond it.
    pub async fn open_within(
        &self,
        key: &PoolKey,
        credential: &Arc<Credential>,
        outer: &ConnectRequest,
        inner: Inner<'_>,
    ) -> Result<(TunnelStream, ConnectResponse, SpiffeId), Arc<Error>> {
        let (stream, _, _) = self.open(key, credential, outer).await?;
        let opened = open(stream, key, (credential, self.endpoint()), inner).await;
        opened.map_err(|error| Arc::new(Error::Within { gateway: key.next_hop, error: Box::new(error) }))
    }
}

async fn open(
    outer: TunnelStream,
    key: &PoolKey,
    (credential, endpoint): (&Credential, &Arc<Endpoint>),
    inner: Inner<'_>,
) -> Result<(TunnelStream, ConnectResponse, SpiffeId), Error> {
    let (below, above) = socket::pair().map_err(Error::Connect)?;
    let below = TcpStream::from_std(below).map_err(Error::Connect)?;
    let socket = TcpStream::from_std(above).map_err(Error::Connect)?;
    // What is counted is what the inner stream carries.
    let outer = outer.relay(below, Role::Client, &Arc::new(Meter::default()));
    let way = Way { socket, address: key.next_hop, outer: Some(outer) };
    let tunnel = Box::pin(handshake(way, credential, inner.expected, endpoint)).await?;
    let slot = tunnel.reserve().ok_or_else(|| Error::Tunnel("the tunnel is gone".into()))?;
    match tunnel.open(slot, inner.request).await {
        Ok((stream, response)) => Ok((stream, response, tunnel.peer().clone())),
        Err(OpenError::Failed(error) | OpenError::Unusable(error)) => Err(error),
    }
}
