//! Words: ids, addresses, SPIFFE names, workloads, services and the immutable [`Snapshot`] with its look-ups.
//! This room does no I/O, keeps no clock and logs nothing.
//! Main types: [`Workload`], [`Service`], [`SpiffeId`], [`Snapshot`].

mod address;
mod baggage;
mod service;
mod snapshot;
mod spiffe;
mod text;
mod workload;

pub use address::{Addresses, Authority, AuthorityError, CompactAddress, NetworkAddress, canonical, canonical_socket};
pub use baggage::Baggage;
pub use service::{
    GatewayAddress, GatewayDestination, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, NamespacedHostname, PortMap, Scope, Service,
    Visibility, WeightedWaypoint,
};
pub use snapshot::{Located, Snapshot, SnapshotBuilder};
pub use spiffe::{SpiffeError, SpiffeId};
pub use text::{Ending, Text};
pub use workload::{
    ApplicationProtocol, ApplicationTunnel, HealthStatus, KnownIdentity, Locality, NetworkMode, Profile, TunnelProtocol, Workload, WorkloadKind,
};
