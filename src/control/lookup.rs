//! What a name asked for on demand means, and what belongs to it (reference, node-and-control §B.4).
//!
//! A client that knows a service believes that it knows all of its endpoints, and would balance over those it has. So a service is never told
//! without them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::catalog::{Catalog, Entry, Row, service_of};
use crate::model::{NamespacedHostname, Service, Text, Workload};

/// Entries by name.
pub(super) type Found = BTreeMap<Text, Arc<Entry>>;

/// What a name is about: a uid, `<namespace>/<host name>` or `<network>/<address>`; empty if nothing has it.
pub(super) fn named(catalog: &Catalog, name: &str) -> Vec<Arc<Entry>> {
    if let Some(entry) = catalog.addresses.get(name) {
        return vec![entry.clone()];
    }
    let Some((before, after)) = name.split_once('/') else { return Vec::new() };
    let snapshot = &catalog.snapshot;
    let entry = |name: &str| catalog.addresses.get(name).cloned();
    if let Ok(ip) = after.parse::<IpAddr>() {
        let workload = snapshot.workload_by_address(before, ip).and_then(|workload| entry(&workload.uid));
        let services = snapshot.services_by_address(before, ip);
        return workload.into_iter().chain(services.iter().filter_map(|service| entry(&service.key().to_string()))).collect();
    }
    let key = NamespacedHostname { namespace: before.into(), hostname: after.into() };
    snapshot.workload_by_hostname(&key).and_then(|workload| entry(&workload.uid)).into_iter().collect()
}

/// Adds an entry and what belongs to it: to a service its endpoints, to a workload its services with theirs.
pub(super) fn add(catalog: &Catalog, entry: &Arc<Entry>, found: &mut Found) {
    match &entry.row {
        Row::Service(service) => add_service(catalog, service, found),
        Row::Workload(workload) => {
            add_entry(catalog, &workload.uid, found);
            for (key, _) in &workload.profile.services {
                if let Some(service) = service_of(&catalog.snapshot, &key.to_string()) {
                    add_service(catalog, &service, found);
                }
            }
        }
        Row::Policy(_) => {}
    }
}

/// The workloads of a client's own node: it serves their pods and asks for none of them by name.
pub(super) fn add_node(catalog: &Catalog, node: &str, found: &mut Found) {
    for uid in catalog.nodes.get(node).into_iter().flatten() {
        add_entry(catalog, uid, found);
    }
}

fn add_service(catalog: &Catalog, service: &Service, found: &mut Found) {
    let key = service.key();
    let name = Text::from(key.to_string());
    // Somebody else brought it, with its endpoints.
    if found.contains_key(&name) {
        return;
    }
    add_entry(catalog, &name, found);
    for (workload, _) in catalog.snapshot.endpoints(&key) {
        let workload: &Workload = workload;
        add_entry(catalog, &workload.uid, found);
    }
}

fn add_entry(catalog: &Catalog, name: &Text, found: &mut Found) {
    if let Some(entry) = catalog.addresses.get(name) {
        found.insert(name.clone(), entry.clone());
    }
}
