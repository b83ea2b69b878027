//! PINGs that find dead peers (reference, dataplane §2.2): the first after one interval, the next an interval after each answer.

use h2::{Ping, PingPong};

use super::{Config, Error};

/// Pings until an answer stays out or the tunnel closes; returns why.
pub(super) async fn keep_alive(pings: Option<PingPong>, config: &Config) -> Error {
    let Some(mut pings) = pings else {
        // The handle is taken once per connection; without it there is nothing to watch.
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(config.ping_interval).await;
        match tokio::time::timeout(config.ping_timeout, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Error::Tunnel(error.to_string()),
            Err(_) => return Error::PingTimeout(config.ping_timeout),
        }
    }
}
