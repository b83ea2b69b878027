//! DNS of captured pods (port 15053): answers names of the mesh from the snapshot, and passes every other question on to the resolvers of the node's
//! proxy, byte for byte (reference, dataplane §9). It keeps no cache and never answers for what the mesh does not own; a question that nobody
//! answers is a SERVFAIL, so that clients do not wait. Where the mesh is told on demand, the services that a name may mean are asked for first.
//! Main types: [`Dns`] (what all pods of a node share), `Query` (one message), `Scope` (who asks).
//!
//! A question passed on goes out of the pod's namespace with the proxy's mark, so that a NetworkPolicy of the pod holds for it and no rule captures
//! it again; each has a socket, and so a random port, and a random id of its own. Only nameservers on loopback addresses are asked from the proxy's
//! own namespace: that is where such an address means something (the reference asks nobody then).

mod forward;
mod message;
mod metrics;
mod names;
mod resolv_conf;
mod resolve;
mod serve;
mod tcp;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use rand::seq::SliceRandom;
use tokio::time::Instant;

use super::demand;
use crate::discovery::{LocalName, Mesh};
use crate::lifecycle::{PermitLimits, Permits, RateBudgets};
use crate::model::{NamespacedHostname, Snapshot, Workload};
use crate::telemetry::limited;
use message::Query;
use metrics::DnsMetrics;
use names::{Family, MOST_ADDRESSES, Scope};
use resolv_conf::Upstreams;
pub(super) use resolve::resolve;

/// How long a question waits for the control plane, where services are told on demand. Resolvers of applications give up after 5 s, and others may
/// have to be asked yet.
const ASK_PATIENCE: Duration = Duration::from_secs(1);
/// Questions that may do so at once. Each asks for a few names, and connections must have places left.
const ASKING: PermitLimits = PermitLimits { total: 64, per_key: 8 };

/// 200 questions of a pod may do so in a second: a pod that invents names must not keep the control plane busy.
fn ask_rate() -> RateBudgets<LocalName> {
    RateBudgets::new(200, 400, 4096)
}

/// How names are answered.
#[derive(Debug, Clone)]
pub struct Config {
    /// Domain of the cluster's services (`CLUSTER_DOMAIN`). Default `cluster.local`.
    pub cluster_domain: String,
    /// Namespace whose services win when nothing else decides between services of one name (`PREFERED_SERVICE_NAMESPACE`). Default none.
    pub preferred_namespace: Option<String>,
    /// Whether IPv6 addresses are given (`IPV6_ENABLED`). Default true.
    pub ipv6: bool,
    /// Where the nameservers are listed. Default `/etc/resolv.conf`.
    pub resolv_conf: PathBuf,
    /// Whether the search domains are those of that file, as a dedicated proxy's pod has them, rather than those that Kubernetes gives every pod.
    /// Default false.
    pub own_search_domains: bool,
    /// Questions under way (passed on, or waiting for the pod to be known) of one pod; further ones are refused. Default 256.
    pub pending_per_pod: usize,
    /// The same for the whole node. Default 4096.
    pub pending: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster_domain: "cluster.local".into(),
            preferred_namespace: None,
            ipv6: true,
            resolv_conf: "/etc/resolv.conf".into(),
            own_search_domains: false,
            pending_per_pod: 256,
            pending: 4096,
        }
    }
}

/// What the DNS of all pods of a node shares.
#[derive(Debug)]
pub struct Dns {
    config: Config,
    upstreams: Upstreams,
    pending: Permits<LocalName>,
    /// Questions that wait for the control plane to say what their names are.
    asking: Permits<LocalName>,
    /// How often a pod's questions may make us ask it.
    asked: RateBudgets<LocalName>,
    metrics: DnsMetrics,
}

/// How a question arrives and is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

impl Transport {
    fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

impl Dns {
    /// With its metrics in `registry`.
    #[must_use]
    pub fn new(config: Config, registry: &mut Registry) -> Arc<Self> {
        let config = Config { cluster_domain: config.cluster_domain.trim_matches('.').to_ascii_lowercase(), ..config };
        let limits = PermitLimits { total: config.pending, per_key: config.pending_per_pod };
        let (upstreams, metrics) = (Upstreams::new(config.resolv_conf.clone()), DnsMetrics::register(registry));
        Arc::new(Self { config, upstreams, pending: Permits::new(limits), asking: Permits::new(ASKING), asked: ask_rate(), metrics })
    }

    /// Does something with what is known about who asks.
    fn with_scope<T>(&self, client: &Workload, work: impl FnOnce(&Scope<'_>) -> T) -> T {
        let (namespace, domain) = (&client.profile.namespace, &self.config.cluster_domain);
        let search =
            if self.config.own_search_domains { self.upstreams.current().search.clone() } else { search_of_kubernetes(namespace, domain).to_vec() };
        work(&Scope {
            namespace,
            network: &client.profile.network,
            search: &search,
            cluster_domain: domain,
            preferred_namespace: self.config.preferred_namespace.as_deref(),
        })
    }

    /// The services that the control plane must be asked for before the question of a workload can be answered. None if the mesh is told as a whole.
    fn unknown(&self, mesh: &Mesh, client: &Workload, query: &Query) -> Vec<NamespacedHostname> {
        let (true, Some(_), Some(name)) = (mesh.is_on_demand(), query.family(), query.name.as_deref()) else { return Vec::new() };
        let mut unknown = self.with_scope(client, |scope| names::unknown(&mesh.current().snapshot, scope, name));
        unknown.retain(|key| mesh.must_ask(key));
        unknown
    }

    /// Asks the control plane, for a moment: whatever it does not say in time is left to other resolvers, as if it were nothing of the mesh. That
    /// decides about names only; a connection to whatever address is given is refused unless it is known what is there.
    async fn know(&self, mesh: &Mesh, pod: &LocalName, unknown: &[NamespacedHostname]) {
        let latest = Instant::now() + ASK_PATIENCE;
        let known = async {
            self.asked.take(pod.clone()).map_err(|error| error.to_string())?;
            let _permit = self.asking.wait(pod.clone(), ASK_PATIENCE).await.map_err(|error| error.to_string())?;
            let left = latest.saturating_duration_since(Instant::now());
            if demand::prepare_names(mesh, pod, unknown, left).await { Ok(()) } else { Err(format!("no answer within {ASK_PATIENCE:?}")) }
        };
        if let Err::<(), String>(error) = known.await {
            let what = unknown.first().map(|key| key.hostname.as_str());
            limited!(warn, "DNS on demand", pod = %pod, domain = what, "the control plane has not said what a name is, so other resolvers are asked: {error}");
        }
    }

    /// The answer to a question of a workload, if the mesh owns the name.
    fn answer(&self, snapshot: &Snapshot, client: &Workload, query: &Query, transport: Transport) -> Option<Vec<u8>> {
        let (family, name) = (query.family()?, query.name.as_deref()?);
        let (found, mut addresses) = self.with_scope(client, |scope| {
            let found = names::find(snapshot, scope, name)?;
            let addresses = match family {
                Family::Ipv6 if !self.config.ipv6 => Vec::new(),
                _ => names::addresses(snapshot, scope, &found.service, family),
            };
            Some((found, addresses))
        })?;
        addresses.shuffle(&mut rand::rng());
        addresses.truncate(MOST_ADDRESSES);
        let limit = match transport {
            Transport::Udp => query.udp_limit(),
            Transport::Tcp => usize::from(u16::MAX),
        };
        tracing::debug!(
            target: "dns",
            { src.workload = &*client.name, src.namespace = &*client.profile.namespace, query = %query.kind, domain = name, result = found.hostname,
              endpoints = ?addresses },
            "answered"
        );
        // An answer without addresses names no one.
        let canonical_labels = found.canonical_labels.filter(|_| !addresses.is_empty());
        Some(query.answer(&addresses, canonical_labels, limit))
    }
}

/// The search domains that Kubernetes gives a pod.
fn search_of_kubernetes(namespace: &str, domain: &str) -> [String; 3] {
    [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()]
}

#[cfg(test)]
mod tests;
