//! The certificate service: who may have which certificate, for how long and how often (reference, node-and-control §B.9). The signing itself is
//! `identity`'s.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tonic::{Code, Status};

use super::CaConfig;
use super::catalog::Catalog;
use super::session::quote;
use super::signer::Signer;
use super::stats::Stats;
use super::tokens::Caller;
use crate::identity::{IdentityError, Issuer, SigningRequest};
use crate::lifecycle::RateBudgets;
use crate::model::{SpiffeId, Text};
use crate::telemetry::limited;
use crate::wire::ca::{CertificateRequest, CertificateResponse};

/// Nodes whose rates are remembered.
const MOST_NODES: usize = 10_000;

/// Signs for callers.
pub(super) struct Authority {
    config: CaConfig,
    issuer: Arc<Signer>,
    catalogs: watch::Receiver<Arc<Catalog>>,
    rates: RateBudgets<Text>,
    stats: Arc<Stats>,
}

impl Authority {
    pub(super) fn new(config: CaConfig, issuer: Arc<Signer>, catalogs: watch::Receiver<Arc<Catalog>>, stats: Arc<Stats>) -> Self {
        let rates = RateBudgets::new(config.per_second, config.burst, MOST_NODES);
        Self { config, issuer, catalogs, rates, stats }
    }

    /// One request. Leaves a line of who got what, or who did not and why.
    pub(super) async fn create(&self, caller: &Caller, peer: SocketAddr, request: &CertificateRequest) -> Result<CertificateResponse, Status> {
        let outcome = self.decide(caller, request).await;
        self.stats.certificate(outcome.is_ok());
        match outcome {
            Ok((identity, ttl, answer)) => {
                tracing::info!(target: "audit", node = %caller.node, %peer, %identity, ?ttl, "certificate issued");
                Ok(answer)
            }
            Err(status) => {
                let asked = quote(request.impersonated().unwrap_or("(itself)"));
                limited!(warn, "certificate requests refused", target: "audit", node = %caller.node, %peer, identity = asked, reason = status.message(), "certificate refused");
                Err(status)
            }
        }
    }

    async fn decide(&self, caller: &Caller, request: &CertificateRequest) -> Result<(SpiffeId, Duration, CertificateResponse), Status> {
        self.rates.take(caller.node.clone()).map_err(|error| Status::resource_exhausted(error.to_string()))?;
        let identity = match request.impersonated() {
            Some(name) => name.parse::<SpiffeId>().map_err(|error| Status::invalid_argument(error.to_string()))?,
            None => caller.own().cloned().ok_or_else(|| {
                Status::invalid_argument("the request names no ImpersonatedIdentity, and the token stands for no single identity of its own")
            })?,
        };
        let catalog = self.catalogs.borrow().clone();
        let of_node = |node: &Text| catalog.nodes.get(node).into_iter().flatten().cloned().collect();
        if !caller.may_be(&identity, &catalog.snapshot, of_node) {
            return Err(Status::permission_denied(format!("node {} may not have a certificate for {identity}", caller.node.as_str())));
        }
        let ttl = self.lifetime(request.validity_duration)?;
        let signing = SigningRequest { identity: identity.clone(), csr_pem: request.csr.clone(), ttl };
        match self.issuer.current().issue(&signing).await {
            Ok(issued) => Ok((identity, ttl, CertificateResponse { cert_chain: issued.certificates })),
            Err(IdentityError::Issuer(problem)) => Err(Status::invalid_argument(problem)),
            Err(other) => Err(Status::new(Code::Internal, other.to_string())),
        }
    }

    /// Zero or less asks for the default; more than the longest is refused, as in the reference.
    fn lifetime(&self, seconds: i64) -> Result<Duration, Status> {
        let wanted = match u64::try_from(seconds) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds),
            _ => self.config.default_ttl,
        };
        if wanted > self.config.longest_ttl {
            return Err(Status::invalid_argument(format!("a lifetime of {wanted:?} is longer than the {:?} allowed", self.config.longest_ttl)));
        }
        Ok(wanted)
    }
}
