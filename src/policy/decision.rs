//! What is decided about, and how it was decided.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::model::{SpiffeId, Text, canonical};

use super::Action;

/// What policies may know of a connection (reference, dataplane §6.3).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Facts {
    /// Identity of the source from its certificate; `None` for plaintext.
    pub identity: Option<SpiffeId>,
    /// Address of the TCP peer.
    pub source_ip: IpAddr,
    /// Address of the pod.
    pub destination_ip: IpAddr,
    /// Resolved target port on the pod: not 15008, and not the service port.
    pub destination_port: u16,
}

impl Facts {
    /// Facts for decisions that look at none.
    pub(super) fn anything() -> Self {
        let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self { identity: None, source_ip: nowhere, destination_ip: nowhere, destination_port: 0 }
    }

    /// The same facts with canonical addresses: `::ffff:1.2.3.4` is `1.2.3.4` in every matcher.
    pub(super) fn canonical(&self) -> Self {
        Self { source_ip: canonical(self.source_ip), destination_ip: canonical(self.destination_ip), ..self.clone() }
    }
}

/// A dry-run policy that matched: had it been enforced, it would have had a say. For the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DryRunMatch {
    /// `namespace/name`.
    pub policy: Text,
    /// Its action.
    pub action: Action,
}

/// The finished thought about some facts; shared with the decision cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Decision {
    /// The ALLOW policy that matched if there was one, or why not.
    pub(super) outcome: Result<Option<Text>, DenialReason>,
    /// Dry-run policies that matched on the way, in the order of evaluation.
    pub(super) dry_run: Vec<DryRunMatch>,
}

/// Proof that policy was asked and permitted this connection. Only this room can make one, and it cannot be copied:
/// relaying takes it, so that forgetting the check does not compile.
///
/// ```compile_fail
/// let forged = culvert::policy::Permitted { decision: Default::default() };
/// ```
/// ```compile_fail
/// fn twice(permitted: culvert::policy::Permitted) -> (culvert::policy::Permitted, culvert::policy::Permitted) {
///     (permitted.clone(), permitted)
/// }
/// ```
#[derive(Debug)]
#[must_use = "a permit that nobody uses permits nothing"]
pub struct Permitted {
    decision: Arc<Decision>,
}

impl Permitted {
    /// The ALLOW policy that matched, `namespace/name`; `None` when no ALLOW policy applies.
    #[must_use]
    pub fn policy(&self) -> Option<&Text> {
        self.decision.outcome.as_ref().ok().and_then(Option::as_ref)
    }

    /// Dry-run policies that matched, for the log.
    #[must_use]
    pub fn dry_run(&self) -> &[DryRunMatch] {
        &self.decision.dry_run
    }
}

/// Why a connection may not pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Denial {
    reason: DenialReason,
    decision: Arc<Decision>,
}

/// The reasons to deny.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DenialReason {
    /// A DENY policy matched.
    #[error("explicitly denied by: {policy}")]
    Explicit {
        /// `namespace/name`.
        policy: Text,
    },
    /// ALLOW policies apply, and none matched.
    #[error("allow policies exist, but none allowed")]
    NotAllowed,
    /// The workload names a policy that nobody has sent (yet).
    #[error("policy {policy} is named by the workload but not known")]
    Unknown {
        /// `namespace/name`.
        policy: Text,
    },
    /// A policy that applies could not be understood.
    #[error("policy {policy} cannot be enforced: {problem}")]
    Unenforceable {
        /// `namespace/name`.
        policy: Text,
        /// What was not understood.
        problem: Text,
    },
}

impl Denial {
    /// The reason, for metrics.
    #[must_use]
    pub fn reason(&self) -> &DenialReason {
        &self.reason
    }

    /// The policy to blame, `namespace/name`; `None` when merely no ALLOW policy matched.
    #[must_use]
    pub fn policy(&self) -> Option<&Text> {
        match &self.reason {
            DenialReason::Explicit { policy } | DenialReason::Unknown { policy } | DenialReason::Unenforceable { policy, .. } => Some(policy),
            DenialReason::NotAllowed => None,
        }
    }

    /// Dry-run policies that matched, for the log.
    #[must_use]
    pub fn dry_run(&self) -> &[DryRunMatch] {
        &self.decision.dry_run
    }
}

/// Turns a decision into the token or the refusal: the only place where a [`Permitted`] is made.
pub(super) fn conclude(decision: Arc<Decision>) -> Result<Permitted, Denial> {
    match &decision.outcome {
        Ok(_) => Ok(Permitted { decision }),
        Err(reason) => Err(Denial { reason: reason.clone(), decision }),
    }
}
