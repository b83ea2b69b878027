//! Names that the proxy itself resolves for a pod: they mean what the pod's own resolver would be told.

use std::net::IpAddr;
use std::sync::Arc;

use super::message::{Addresses, Query, addresses};
use super::names::Family;
use super::serve::PodDns;
use super::{Dns, Transport};
use crate::proxy::PodProxy;

/// The first address of a name, of IPv4 if there is one (reference, dataplane §2.11).
///
/// # Errors
/// What went wrong, in words.
pub(in crate::proxy) async fn resolve(pod: &Arc<PodProxy>, dns: &Arc<Dns>, name: &str) -> Result<IpAddr, String> {
    let own = PodDns { pod: pod.clone(), dns: dns.clone() };
    let families = if dns.config.ipv6 { &[Family::Ipv4, Family::Ipv6][..] } else { &[Family::Ipv4] };
    let mut code = String::new();
    for family in families {
        let found = own.look_up(name, *family).await?;
        if let Some(first) = found.list.first() {
            return Ok(first.to_canonical());
        }
        code = found.code;
    }
    Err(format!("the answer has no address ({code})"))
}

impl PodDns {
    async fn look_up(&self, name: &str, family: Family) -> Result<Addresses, String> {
        let query = Query::about(name, family).ok_or("it is no name of DNS")?;
        let mut found = None;
        for transport in [Transport::Udp, Transport::Tcp] {
            let answer = self.answer(&query, transport).await;
            let read = addresses(&answer, family).ok_or("the answer cannot be read")?;
            let again = read.truncated && read.list.is_empty();
            found = Some(read);
            if !again {
                break;
            }
        }
        found.ok_or_else(|| "nobody was asked".to_owned())
    }
}
