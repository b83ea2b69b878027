//! Revocation lists (`CRL_PATH`; ref §7.5): which certificates are believed no longer, in new handshakes and on live tunnels.
//!
//! The rules are the reference's: the whole chain is checked, a certificate of which no list speaks is good, and a list that is past its next update
//! still counts. Two things differ. All lists of an issuer count, not only the first. And a list that is not signed by the issuer it names says nothing
//! about certificates that it does not hold (there, it stops every handshake of that issuer); one that it holds is refused.
//!
//! A list of 10,000 entries is read in 5 ms and costs a handshake 1.1 µs, as one of 10 entries does (the test of long lists, release build).

mod file;
mod list;

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use rustls::RootCertStore;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;

use crate::telemetry::Reporter;
use list::Lists;

/// The lists in force. All clones are one.
#[derive(Clone)]
pub struct Revocations(Arc<Shared>);

struct Shared {
    lists: watch::Sender<Arc<Lists>>,
    rejections: Family<ReporterLabel, Counter>,
    untracked: Family<ReporterLabel, Counter>,
    loads: Family<OutcomeLabel, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabel {
    reporter: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// What a peer's chain is verified against besides its lists.
#[derive(Debug, Clone)]
pub(super) struct Trust {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    /// Which end we are: at the source, peers are servers.
    pub(super) reporter: Reporter,
}

/// Resolves when a peer's certificate is revoked; absent, it never is.
pub type Revoked = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

impl Revocations {
    /// Reads the file now, and makes the task that reads it again whenever it changes, within a second. The task must be run (and supervised) by the
    /// caller; it never ends.
    ///
    /// The file holds one list in DER or any number in PEM. Empty or missing, it revokes nothing. One that cannot be read or understood is an
    /// error in the log and in metrics, and changes nothing: at start that means that nothing is revoked until it is corrected (as in the reference),
    /// later that the lists before stay in force. So do they when the file vanishes: to revoke nothing, empty it.
    pub fn open(path: PathBuf) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let revocations = Self(Arc::new(Shared {
            lists: watch::Sender::new(Arc::default()),
            rejections: Family::default(),
            untracked: Family::default(),
            loads: Family::default(),
        }));
        // Both ends from the start: a family without samples does not say that it never happened.
        for reporter in [Reporter::Source, Reporter::Destination].map(|reporter| ReporterLabel { reporter: reporter.as_str() }) {
            drop(revocations.0.rejections.get_or_create(&reporter));
            drop(revocations.0.untracked.get_or_create(&reporter));
        }
        let mut file = file::File::new(path);
        let first = file.load();
        revocations.take(&file, first);
        let task = {
            let revocations = revocations.clone();
            async move {
                loop {
                    let content = file.changed().await;
                    revocations.take(&file, content);
                }
            }
        };
        (revocations, task)
    }

    fn take(&self, file: &file::File, content: Result<Option<Lists>, file::Unusable>) {
        let outcome = match content {
            Ok(Some(lists)) => {
                tracing::info!(file = %file.path().display(), lists = lists.len(), revoked = lists.revoked(), "revocation lists are in force");
                self.0.lists.send_replace(Arc::new(lists));
                "loaded"
            }
            Ok(None) => {
                tracing::warn!(file = %file.path().display(), "there is no revocation list (yet): what was in force stays, at start nothing is");
                "missing"
            }
            Err(file::Unusable(problem)) => {
                tracing::error!(file = %file.path().display(), problem, "the revocation lists cannot be used: what was in force stays, at start nothing is");
                "unusable"
            }
        };
        self.0.loads.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Whether a list revokes a certificate of a chain that was verified otherwise. Counts if so.
    pub(super) fn revoke(&self, chain: (&CertificateDer<'_>, &[CertificateDer<'_>]), trust: &Trust, at: UnixTime) -> bool {
        let lists = self.0.lists.borrow().clone();
        let revoked = lists.revoke(chain, trust, at);
        if revoked {
            self.0.rejections.get_or_create(&ReporterLabel { reporter: trust.reporter.as_str() }).inc();
        }
        revoked
    }

    /// Watches over the chain of a tunnel that was established at this time.
    pub(super) fn watch(&self, chain: Vec<CertificateDer<'static>>, trust: Trust, since: UnixTime) -> Revoked {
        let revocations = self.clone();
        let mut lists = self.0.lists.subscribe();
        Some(Box::pin(async move {
            loop {
                // The first look is for lists that came during the handshake.
                lists.mark_unchanged();
                let Some((leaf, intermediates)) = chain.split_first() else { return std::future::pending().await };
                if revocations.revoke((leaf, intermediates), &trust, since) {
                    return;
                }
                // The sender is ours.
                let _ = lists.changed().await;
            }
        }))
    }

    /// Counts a tunnel of which the certificates are not known, so that nothing watches over it.
    pub fn untracked(&self, reporter: Reporter) {
        self.0.untracked.get_or_create(&ReporterLabel { reporter: reporter.as_str() }).inc();
    }

    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Shared { rejections, untracked, loads, .. } = &*self.0;
        for (name, help, family) in [
            ("istio_crl_policy_rejections", "Handshakes refused and tunnels cut because a certificate of the peer is revoked (unstable)", rejections),
            ("istio_crl_untracked_connections", "Tunnels that revocation lists cannot cut (unstable)", untracked),
        ] {
            family.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        loads.encode(encoder.encode_descriptor("culvert_crl_loads", "Contents of CRL_PATH, by what became of them", None, MetricType::Counter)?)
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = self.0.lists.borrow();
        formatter.debug_struct("Revocations").field("lists", &lists.len()).field("revoked", &lists.revoked()).finish()
    }
}

#[cfg(test)]
mod tests;
