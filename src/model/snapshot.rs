//! The immutable snapshot of the mesh and its look-ups.

use std::net::IpAddr;
use std::sync::Arc;

use super::{NamespacedHostname, PortMap, Service, Text, Workload};

/// Everything known about workloads and services at one moment. Cheap to clone; never changes.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {}

/// Makes the next [`Snapshot`] from the last one, sharing all that did not change.
#[derive(Debug, Clone, Default)]
pub struct SnapshotBuilder {}

/// What an address names.
#[derive(Debug, Clone)]
pub enum Located {
    /// A workload.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
}

/// A workload as an endpoint of one service.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The workload's uid.
    pub workload: Text,
    /// This endpoint's own service port to target port.
    pub ports: PortMap,
}

#[allow(unused)]
impl Snapshot {
    /// Continues from this snapshot.
    #[must_use]
    pub fn edit(&self) -> SnapshotBuilder {
        todo!()
    }

    /// A workload by its uid.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<Arc<Workload>> {
        todo!()
    }

    /// The workload that owns an address, by the conflict ranking of the reference (dataplane §3.1).
    #[must_use]
    pub fn workload_by_address(&self, network: &str, ip: IpAddr) -> Option<Arc<Workload>> {
        todo!()
    }

    /// The workload of a pod: (name, namespace, service account) on the local node.
    #[must_use]
    pub fn local_workload(&self, name: &str, namespace: &str, service_account: &str) -> Option<Arc<Workload>> {
        todo!()
    }

    /// A service by its key.
    #[must_use]
    pub fn service(&self, key: &NamespacedHostname) -> Option<Arc<Service>> {
        todo!()
    }

    /// The best service of a virtual address for a client namespace (reference, dataplane §3.2).
    #[must_use]
    pub fn service_by_address(&self, network: &str, ip: IpAddr, client_namespace: Option<&str>) -> Option<Arc<Service>> {
        todo!()
    }

    /// The best service of a host name for a client namespace.
    #[must_use]
    pub fn service_by_hostname(&self, hostname: &str, client_namespace: Option<&str>) -> Option<Arc<Service>> {
        todo!()
    }

    /// A workload by namespace and host name.
    #[must_use]
    pub fn workload_by_hostname(&self, key: &NamespacedHostname) -> Option<Arc<Workload>> {
        todo!()
    }

    /// Step 2 of routing: a workload by address first, else the best service.
    #[must_use]
    pub fn locate(&self, network: &str, ip: IpAddr, client_namespace: Option<&str>) -> Option<Located> {
        todo!()
    }

    /// The endpoints of a service, filtered by its health policy.
    pub fn endpoints(&self, service: &NamespacedHostname) -> impl Iterator<Item = (Arc<Workload>, &PortMap)> + '_ {
        std::iter::empty()
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> + '_ {
        std::iter::empty()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> + '_ {
        std::iter::empty()
    }
}

#[allow(unused)]
impl SnapshotBuilder {
    /// Restricts [`Snapshot::local_workload`] to workloads of this node; without it every workload counts as local.
    #[must_use]
    pub fn local_node(self, node: Text) -> Self {
        self
    }

    /// Adds or replaces a workload by its uid.
    pub fn insert_workload(&mut self, workload: Workload) {
        todo!()
    }

    /// Adds or replaces a service by its key.
    pub fn insert_service(&mut self, service: Service) {
        todo!()
    }

    /// Removes a workload by uid, or a service by `namespace/hostname`; says whether anything was removed (reference, dataplane §5.2).
    pub fn remove(&mut self, name: &str) -> bool {
        todo!()
    }

    /// The finished snapshot.
    #[must_use]
    pub fn build(self) -> Snapshot {
        Snapshot::default()
    }
}
