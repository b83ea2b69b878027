//! The published state of the mesh: an immutable world per change, a handle to read it and the one publisher that makes the next.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::dump::{dump, with_static_config};
use super::xds::{Demand, Unanswered};
use crate::model::{GatewayDestination, NamespacedHostname, Service, Snapshot, SnapshotBuilder, Text, Workload, canonical};
use crate::policy::{Authorization, PolicySet};

/// So many workloads may count as local without the name of a node; beyond, policies are compiled for those that have connections.
const UNNAMED: usize = 1024;
/// To compile more policies than this takes more than a moment.
const MANY_POLICIES: usize = 256;
/// The same of edits.
const MANY_EDITS: usize = 256;

/// Everything known at one moment. Never changes.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// Workloads and services.
    pub snapshot: Snapshot,
    /// Authorization policies.
    pub policies: PolicySet,
    /// Counts the worlds of one publisher, from 0 for the empty one.
    pub epoch: u64,
    /// The epoch in which policies or workloads of the local node changed last: what is derived from these alone is still right.
    pub local_epoch: u64,
}

/// The three names by which a pod and its workload find each other (reference, dataplane §12.1 row 22).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LocalName {
    /// Pod name.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Service account.
    pub service_account: Text,
}

impl fmt::Display for LocalName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{} (service account {})", self.namespace, self.name, self.service_account)
    }
}

/// A handle to the current world. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Mesh {
    current: Arc<ArcSwap<World>>,
    updates: watch::Receiver<Arc<World>>,
    local_updates: watch::Receiver<Arc<World>>,
    departures: watch::Receiver<u64>,
    fixed: bool,
    /// Where to ask for what is not there, if the source tells only what it is asked.
    demand: Option<Demand>,
}

impl Mesh {
    /// A mesh whose source is asked on demand.
    pub(crate) fn on_demand(self, demand: Option<Demand>) -> Self {
        Self { demand, ..self }
    }

    /// Whether look-ups should ask first: [`Mesh::know_address`], [`Mesh::know_service`], [`Mesh::know_gateway`].
    #[must_use]
    pub fn is_on_demand(&self) -> bool {
        self.demand.is_some()
    }

    /// Makes sure that whatever an address of a network names is in the current world. Returns at once unless the mesh is asked on demand
    /// (`XDS_ON_DEMAND`) and the address is not known. An error means that nobody knows what it is: it must not be taken for unknown. A place among those
    /// who wait is taken for `pod`; no pod can have them all.
    pub async fn know_address(&self, pod: &LocalName, network: &str, ip: IpAddr) -> Result<(), Unanswered> {
        let Some(demand) = &self.demand else { return Ok(()) };
        if self.current().snapshot.locate(network, ip, None).is_some() {
            return Ok(());
        }
        demand.ask(pod, format!("{network}/{}", canonical(ip)).into()).await
    }

    /// The same for a service, by its host name.
    pub async fn know_service(&self, pod: &LocalName, key: &NamespacedHostname) -> Result<(), Unanswered> {
        let Some(demand) = &self.demand else { return Ok(()) };
        if self.current().snapshot.service(key).is_some() {
            return Ok(());
        }
        demand.ask(pod, key.to_string().into()).await
    }

    /// Whether [`know_service`](Self::know_service) would ask the source, rather than return at once.
    #[must_use]
    pub fn must_ask(&self, key: &NamespacedHostname) -> bool {
        let asks = |demand: &Demand| self.current().snapshot.service(key).is_none() && !demand.is_fresh(&key.to_string());
        self.demand.as_ref().is_some_and(asks)
    }

    /// The same for a waypoint or a network gateway.
    pub async fn know_gateway(&self, pod: &LocalName, gateway: &GatewayDestination) -> Result<(), Unanswered> {
        let Some(demand) = &self.demand else { return Ok(()) };
        match gateway {
            GatewayDestination::Address(address) => self.know_address(pod, &address.network, address.ip).await,
            GatewayDestination::Hostname(key) => {
                let world = self.current();
                if world.snapshot.service(key).is_some() || world.snapshot.workload_by_hostname(key).is_some() {
                    return Ok(());
                }
                demand.ask(pod, key.to_string().into()).await
            }
        }
    }

    /// The world as it is now. Takes no lock.
    #[must_use]
    pub fn current(&self) -> Arc<World> {
        self.current.load_full()
    }

    /// Later worlds. The world of this moment counts as seen: look at it with `borrow()`, then wait for `changed()`.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<World>> {
        let mut updates = self.updates.clone();
        updates.mark_unchanged();
        updates
    }

    /// [`Mesh::subscribe`] for who looks only at policies and at workloads of the local node: in a large mesh nearly every change is elsewhere, and
    /// not worth a wake-up of each pod. The world in it is the last in which these changed.
    #[must_use]
    pub fn subscribe_local(&self) -> watch::Receiver<Arc<World>> {
        let mut updates = self.local_updates.clone();
        updates.mark_unchanged();
        updates
    }

    /// The epoch in which a workload left the mesh last, for who keeps something for workloads wherever they are. What happens to those that
    /// stay wakes nobody.
    #[must_use]
    pub fn subscribe_departures(&self) -> watch::Receiver<u64> {
        let mut departures = self.departures.clone();
        departures.mark_unchanged();
        departures
    }

    /// The workload of a pod on this node, waiting up to `limit` for it to become known: the pod may start before the mesh
    /// hears of it. `None` after that time, or when no further world can come.
    pub async fn wait_for_local(&self, name: &LocalName, limit: Duration) -> Option<Arc<Workload>> {
        let mut updates = self.subscribe_local();
        let found = async {
            loop {
                let found = updates.borrow_and_update().snapshot.local_workload(&name.name, &name.namespace, &name.service_account);
                if found.is_some() {
                    return found;
                }
                if updates.changed().await.is_err() {
                    return None;
                }
            }
        };
        tokio::time::timeout(limit, found).await.ok().flatten()
    }

    /// [`dump`](super::dump()) of the current world; `staticConfig` says what was loaded if this mesh comes from a static source.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        let world = self.current();
        if self.fixed { with_static_config(&world) } else { dump(&world) }
    }
}

/// One change of the mesh.
#[derive(Debug, Clone)]
pub enum Edit {
    /// Adds or replaces a workload by its uid.
    Workload(Workload),
    /// Adds or replaces a service by its key.
    Service(Service),
    /// Removes a workload by uid or a service by `namespace/hostname`; names that never existed are legal (reference, dataplane §5.2).
    Remove(Text),
    /// Adds or replaces a policy by its key.
    Policy(Authorization),
    /// Removes a policy by `namespace/name`.
    RemovePolicy(Text),
}

/// Makes worlds and publishes them. There is one per mesh.
#[derive(Debug)]
pub struct Publisher {
    current: Arc<ArcSwap<World>>,
    updates: watch::Sender<Arc<World>>,
    local_updates: watch::Sender<Arc<World>>,
    departures: watch::Sender<u64>,
}

impl Publisher {
    /// A publisher and a handle to its worlds, the first of which is empty. `node` restricts local workloads to those of this
    /// node; without it every workload counts as local.
    #[must_use]
    pub fn new(node: Option<Text>) -> (Self, Mesh) {
        let mut snapshot = Snapshot::default().edit();
        if let Some(node) = node {
            snapshot = snapshot.local_node(node);
        }
        let world = Arc::new(World { snapshot: snapshot.build(), ..World::default() });
        let current = Arc::new(ArcSwap::new(Arc::clone(&world)));
        let (local_updates, local_receiver) = watch::channel(Arc::clone(&world));
        let (updates, receiver) = watch::channel(world);
        let (departures, departed) = watch::channel(0);
        let mesh = Mesh {
            current: Arc::clone(&current),
            updates: receiver,
            local_updates: local_receiver,
            departures: departed,
            fixed: false,
            demand: None,
        };
        (Self { current, updates, local_updates, departures }, mesh)
    }

    /// [`Publisher::new`] for a static source.
    pub(super) fn fixed(node: Option<Text>) -> (Self, Mesh) {
        let (publisher, mesh) = Self::new(node);
        (publisher, Mesh { fixed: true, ..mesh })
    }

    /// The world published last.
    #[must_use]
    pub fn current(&self) -> Arc<World> {
        self.current.load_full()
    }

    /// Applies all edits in order and publishes the result as one world. Says whether it did: edits that change nothing publish
    /// nothing.
    pub fn publish(&mut self, edits: impl IntoIterator<Item = Edit>) -> bool {
        let mut draft = self.draft();
        edits.into_iter().for_each(|edit| draft.apply(edit));
        self.publish_draft(draft)
    }

    /// A world to be, which begins as the one published last.
    pub(super) fn draft(&self) -> Draft {
        let last = self.current();
        Draft { snapshot: last.snapshot.edit(), policies: last.policies.clone(), changed: false, policies_changed: false, edits: 0 }
    }

    /// Publishes a draft of the world published last, if it differs; says whether it does. A world is shown with the policies of local workloads
    /// compiled, so that no connection waits for that: see [`Draft::is_slow`].
    pub(super) fn publish_draft(&mut self, draft: Draft) -> bool {
        let (changed, local) = (draft.changed, draft.is_local());
        let Draft { snapshot, mut policies, .. } = draft;
        if changed {
            let last = self.current();
            let (epoch, departed, snapshot) = (last.epoch + 1, snapshot.departed(), snapshot.build());
            // Without the name of the node every workload counts as local.
            if local && (snapshot.local_node().is_some() || snapshot.workload_count() <= UNNAMED) {
                let profiles = snapshot.local_workloads().map(|workload| &workload.profile);
                policies.prepare(&last.policies, profiles.map(|profile| (&profile.namespace, &profile.authorization_policies[..])));
            }
            let world = World { snapshot, policies, epoch, local_epoch: if local { epoch } else { last.local_epoch } };
            let world = Arc::new(world);
            // In this order, so that whoever is woken finds the new world by either way.
            self.current.store(Arc::clone(&world));
            if local {
                self.local_updates.send_replace(Arc::clone(&world));
            }
            if departed {
                self.departures.send_replace(epoch);
            }
            self.updates.send_replace(world);
        }
        changed
    }

    /// Resolves when the last [`Mesh`] and the last subscriber are gone.
    pub async fn abandoned(&self) {
        self.abandonment().await;
    }

    /// [`Publisher::abandoned`], for whoever does not have the publisher at hand.
    pub(super) fn abandonment(&self) -> impl Future<Output = ()> + Send + 'static {
        let (updates, local_updates) = (self.updates.clone(), self.local_updates.clone());
        async move {
            updates.closed().await;
            local_updates.closed().await;
        }
    }
}

/// A world to be.
#[derive(Debug)]
pub(super) struct Draft {
    snapshot: SnapshotBuilder,
    policies: PolicySet,
    changed: bool,
    policies_changed: bool,
    edits: usize,
}

impl Draft {
    /// Whether policies or workloads of this node changed.
    fn is_local(&self) -> bool {
        self.policies_changed || self.snapshot.local_changed()
    }

    /// Whether to publish it may take some time, not to be spent where other work waits: it has many edits, or many policies (150 of 10 rules are
    /// about 1 ms) must be looked through for local workloads.
    pub(super) fn is_slow(&self) -> bool {
        self.edits > MANY_EDITS || (self.changed && self.is_local() && self.policies.len() > MANY_POLICIES)
    }

    /// Later edits of a key win.
    pub(super) fn apply(&mut self, edit: Edit) {
        let policies = matches!(edit, Edit::Policy(_) | Edit::RemovePolicy(_));
        let changed = match edit {
            Edit::Workload(workload) => self.snapshot.put_workload(workload),
            Edit::Service(service) => self.snapshot.put_service(service),
            Edit::Remove(name) => self.snapshot.remove(&name),
            Edit::Policy(policy) => {
                let differs = self.policies.get(&policy.key()).is_none_or(|known| **known != policy);
                if differs {
                    self.policies.insert(policy);
                }
                differs
            }
            Edit::RemovePolicy(key) => self.policies.remove(&key),
        };
        self.edits += 1;
        self.changed |= changed;
        self.policies_changed |= changed && policies;
    }
}
