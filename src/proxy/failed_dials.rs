//! Dials that came to nothing: they failed, or the request was gone before its 200.

use std::net::IpAddr;

use crate::lifecycle::{PermitRefused, RateBudgets};
use crate::model::SpiffeId;

/// Peers and pods that are remembered at once; a pair costs about 100 bytes.
const MAX_PAIRS: usize = 65_536;

/// Bounds the dials that came to nothing, per peer and pod.
///
/// A cap on all dials would forbid ordinary load, which is thousands of new connections per second over one tunnel. A rapid reset
/// (CVE-2023-44487) has nothing but dials that come to nothing, and so has a client that hammers a port where nobody listens: beyond the rate
/// their requests are refused without a dial. The pod is part of the key, so that one dead pod of a service does not cost its clients the
/// others on this node.
#[derive(Debug)]
pub struct FailedDials {
    per_second: u32,
    budgets: RateBudgets<(SpiffeId, IpAddr)>,
}

impl FailedDials {
    /// `per_second` of them in the long run, and as many at once.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        Self { per_second, budgets: RateBudgets::new(per_second, per_second, MAX_PAIRS) }
    }

    /// Whether one more dial of `peer` to `pod` may be tried.
    ///
    /// # Errors
    /// When too many came to nothing lately.
    pub fn check(&self, peer: &SpiffeId, pod: IpAddr) -> Result<(), PermitRefused> {
        self.budgets.check(&(peer.clone(), pod)).map_err(|_exceeded| PermitRefused::PerKey(self.per_second as usize))
    }

    /// A dial came to nothing.
    pub fn count(&self, peer: &SpiffeId, pod: IpAddr) {
        // What exceeds the budget was refused by the check, or was under way at the same time as the last one.
        let _ = self.budgets.take((peer.clone(), pod));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_dials_that_come_to_nothing_count_and_each_pod_by_itself() {
        let failed = FailedDials::new(100);
        let peer: SpiffeId = "spiffe://cluster.local/ns/default/sa/client".parse().unwrap();
        let [dead, alive] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(IpAddr::from);
        for _ in 0..100 {
            assert_eq!(failed.check(&peer, dead), Ok(()));
            failed.count(&peer, dead);
        }
        assert_eq!(failed.check(&peer, dead), Err(PermitRefused::PerKey(100)));
        (0..10_000).for_each(|_| assert_eq!(failed.check(&peer, alive), Ok(())));
        tokio::time::advance(std::time::Duration::from_millis(10)).await;
        assert_eq!(failed.check(&peer, dead), Ok(()));
        failed.count(&peer, dead);
        assert_eq!(failed.check(&peer, dead), Err(PermitRefused::PerKey(100)));
    }
}
