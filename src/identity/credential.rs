//! One certificate of one identity, and the configurations made of it.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, Error, InconsistentKeys, RootCertStore, ServerConfig};

use super::certificate::{Validity, from_pem};
use super::error::{AnswerProblem, IdentityError, PeerError};
use super::explain::explain;
use super::issuer::{Issued, PendingKey};
use super::revocation::{Revoked, Trust};
use super::tls::Shape;
use super::verify::{ClientVerifier, MAX_PRESENTED, ServerVerifier, peer_identity};
use crate::model::SpiffeId;
use crate::telemetry::Reporter;

/// A verified certificate with its key and its rustls configurations, each built once. Renewal makes a new one; connections keep theirs.
pub struct Credential {
    /// Who this is.
    pub identity: SpiffeId,
    /// The leaf, then the intermediates: what a peer is shown.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that came with it: what peers are verified against.
    pub roots: Vec<CertificateDer<'static>>,
    /// When the chain begins to be valid.
    pub not_before: SystemTime,
    /// When the first certificate of the chain ceases to be valid. Connections made with it must not outlive this by more than 60 s.
    pub not_after: SystemTime,
    /// Different for every credential of this process: part of the key of pooled tunnels.
    pub generation: u64,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    store: Arc<RootCertStore>,
    shape: Arc<Shape>,
}

impl Credential {
    /// The configuration for accepting tunnels as this identity: asks for a client certificate of the same trust domain.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// The configuration for dialling as this identity. The server name given to rustls is neither sent nor checked; call
    /// [`expect_peer`](super::expect_peer) after the handshake.
    #[must_use]
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    /// Watches over the peer of a tunnel that was made with this now; call it as soon as the handshake is done. At the source, the peer is the
    /// server.
    #[must_use]
    pub fn watch_peer(&self, chain: &[CertificateDer<'static>], reporter: Reporter) -> Revoked {
        let revocations = self.shape.revocations.as_ref()?;
        let trust = Trust { roots: self.store.clone(), algorithms: self.shape.provider.signature_verification_algorithms, reporter };
        // A clock before 1970 verified nothing.
        let since = self.shape.now()?;
        revocations.watch(chain.to_vec(), trust, since)
    }

    /// Whether the chain is valid at this time.
    #[must_use]
    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.validity().covers(now)
    }

    pub(super) fn validity(&self) -> Validity {
        Validity { not_before: self.not_before, not_after: self.not_after }
    }

    /// Verifies an issuer's answer exactly as a peer with the same roots will, and makes a credential of it.
    pub(super) fn verify(shape: &Arc<Shape>, pending: PendingKey, issued: &Issued, generation: u64) -> Result<Self, IdentityError> {
        let identity = pending.request.identity.clone();
        Self::verified(shape, pending, issued, generation).map_err(|problem| IdentityError::Answer { identity, problem })
    }

    fn verified(shape: &Arc<Shape>, pending: PendingKey, issued: &Issued, generation: u64) -> Result<Self, AnswerProblem> {
        let identity = pending.request.identity;
        let (chain, roots) = parse(issued)?;
        let leaf_identity = peer_identity(&chain).map_err(AnswerProblem::Leaf)?;
        if leaf_identity != identity {
            return Err(AnswerProblem::WrongIdentity(leaf_identity));
        }
        let certified = Arc::new(CertifiedKey::new(chain.clone(), pending.key));
        certified.keys_match().map_err(|error| match error {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => AnswerProblem::OtherKey,
            other => AnswerProblem::Untrusted(explain(&other)),
        })?;

        let untrusted = |error: Error| match PeerError::within(&error) {
            Some(peer) => AnswerProblem::Leaf(peer.clone()),
            None => AnswerProblem::Untrusted(explain(&error)),
        };
        let mut store = RootCertStore::empty();
        for root in &roots {
            store.add(root.clone()).map_err(|error| AnswerProblem::Malformed(format!("a root cannot be read: {error}")))?;
        }
        let store = Arc::new(store);
        let now = shape.now().ok_or_else(|| untrusted(Error::FailedToGetCurrentTime))?;
        let servers = Arc::new(ServerVerifier::new(store.clone(), shape));
        let clients = ClientVerifier::new(store.clone(), shape, identity.trust_domain().clone()).map_err(untrusted)?;
        let (leaf, intermediates) = chain.split_first().ok_or(AnswerProblem::Empty)?;
        // Not against the revocation lists: those are about peers, and a CA that goes on with a revoked intermediate is for its operator to mend.
        servers.check(leaf, intermediates, now).map_err(untrusted)?;
        clients.check(leaf, intermediates, now).map_err(untrusted)?;

        let validity = common_validity(&chain)?;
        let server = shape.server(Arc::new(clients), certified.clone()).map_err(untrusted)?;
        let client = shape.client(servers, certified).map_err(untrusted)?;
        Ok(Self {
            identity,
            chain,
            roots,
            not_before: validity.not_before,
            not_after: validity.not_after,
            generation,
            server: Arc::new(server),
            client: Arc::new(client),
            store,
            shape: shape.clone(),
        })
    }
}

/// Splits an answer by its layout (ref §7.1): leaf, intermediates, and last the roots.
fn parse(issued: &Issued) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>), AnswerProblem> {
    let (roots, chain) = issued.certificates.split_last().ok_or(AnswerProblem::Empty)?;
    if chain.is_empty() {
        return Err(AnswerProblem::NoRoots);
    }
    let read = |pem: &String| from_pem(pem.as_bytes()).map_err(AnswerProblem::Malformed);
    let mut parsed = Vec::with_capacity(chain.len());
    for pem in chain {
        parsed.extend(read(pem)?);
        if parsed.len() > MAX_PRESENTED {
            // Peers refuse such chains unread, so this would only fail later and elsewhere.
            return Err(AnswerProblem::TooLong(parsed.len().max(chain.len())));
        }
    }
    let roots = read(roots)?;
    // Roots are not sent (ref §2.1), but issuers put them among the intermediates all the same.
    let leaf = parsed.first().cloned();
    parsed.retain(|certificate| Some(certificate) == leaf.as_ref() || !roots.contains(certificate));
    Ok((parsed, roots))
}

/// When all certificates of a chain are valid: a peer refuses the whole when one has expired.
fn common_validity(chain: &[CertificateDer<'static>]) -> Result<Validity, AnswerProblem> {
    let mut common: Option<Validity> = None;
    for der in chain {
        let one = Validity::of(der).map_err(AnswerProblem::Malformed)?;
        common =
            Some(common.map_or(one, |all| Validity { not_before: all.not_before.max(one.not_before), not_after: all.not_after.min(one.not_after) }));
    }
    common.ok_or(AnswerProblem::Empty)
}

impl fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By hand: nothing that could reach a key is ever printed.
        formatter
            .debug_struct("Credential")
            .field("identity", &self.identity)
            .field("generation", &self.generation)
            .field("certificates", &self.chain.len())
            .field("roots", &self.roots.len())
            .field("not_before", &super::certificate::rfc3339_of(self.not_before))
            .field("not_after", &super::certificate::rfc3339_of(self.not_after))
            .finish()
    }
}

#[cfg(test)]
mod tests;
