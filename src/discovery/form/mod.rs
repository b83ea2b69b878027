//! The written form of the mesh: the same structures for the static file and the config dump, so that what a dump shows can be
//! loaded again (reference, dataplane §5.8 and §10.2).

mod policy;
mod scalar;
mod service;
mod workload;
mod yaml;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use crate::model::{NamespacedHostname, PortMap, Service, Snapshot, Text, Workload};
use crate::policy::{Authorization, PolicySet};
use policy::PolicyForm;
use scalar::As;
use service::{EndpointForm, ServiceForm};
use workload::{ServicesForm, WorkloadForm, port_map};
pub(super) use yaml::{Fault, read};

/// A whole file, or the mesh sections of a dump.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Document {
    #[serde(default, deserialize_with = "yaml::list")]
    workloads: Vec<WorkloadForm>,
    #[serde(default, deserialize_with = "yaml::list")]
    policies: Vec<PolicyForm>,
    #[serde(default, deserialize_with = "yaml::list")]
    services: Vec<ServiceForm>,
    /// Endpoints of services that are not known; a dump has them, a file written by hand has no use for them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    staged_services: BTreeMap<As<NamespacedHostname>, BTreeMap<Text, EndpointForm>>,
}

/// What a file says, as rows that nothing is wrong with.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows {
    pub(super) workloads: Vec<Workload>,
    pub(super) services: Vec<Service>,
    pub(super) policies: Vec<Authorization>,
}

/// One step from a value to a value within it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Index(usize),
    Key(String),
}

/// Why a value was refused, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    path: Vec<Step>,
    reason: String,
}

impl Refusal {
    fn here(reason: impl Into<String>) -> Self {
        Self { path: Vec::new(), reason: reason.into() }
    }

    fn at(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::here(reason).within_field(field)
    }

    fn within_field(mut self, field: impl Into<String>) -> Self {
        self.path.insert(0, Step::Key(field.into()));
        self
    }

    fn within_index(mut self, index: usize) -> Self {
        self.path.insert(0, Step::Index(index));
        self
    }

    /// The same refusal seen from outside a list: item `index` of `list`.
    fn within(self, list: &str, index: usize) -> Self {
        self.within_index(index).within_field(list)
    }
}

/// A path as people write it: `workloads[3].services.default/web.80`.
struct Path<'a>(&'a [Step]);

impl fmt::Display for Path<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(formatter, "[{index}]")?,
                Step::Key(key) if position == 0 => formatter.write_str(key)?,
                Step::Key(key) => write!(formatter, ".{key}")?,
            }
        }
        Ok(())
    }
}

/// The keys seen so far, each with the row that had it first.
struct Unique<K>(HashMap<K, usize>);

impl<K: Eq + Hash + fmt::Display> Unique<K> {
    fn claim(&mut self, key: K, section: &str, index: usize) -> Result<(), String> {
        match self.0.get(&key) {
            Some(first) => Err(format!("\"{key}\" is already {section}[{first}]")),
            None => {
                self.0.insert(key, index);
                Ok(())
            }
        }
    }
}

/// The ports that services list for their endpoints.
type Listed = HashMap<(Text, NamespacedHostname), PortMap>;

impl Document {
    /// Turns every form into a row and checks what concerns more than one of them.
    fn into_rows(self) -> Result<Rows, Refusal> {
        let mut uids = Unique(HashMap::with_capacity(self.workloads.len()));
        for (index, form) in self.workloads.iter().enumerate() {
            let claimed = form.key().and_then(|uid| uids.claim(uid, "workloads", index).map_err(|reason| Refusal::at("uid", reason)));
            claimed.map_err(|refusal| refusal.within("workloads", index))?;
        }
        let mut listed = self.listed_endpoints(&uids)?;
        let own_ports: HashMap<NamespacedHostname, PortMap> = self
            .services
            .iter()
            .map(|form| (NamespacedHostname { namespace: form.namespace.clone(), hostname: form.hostname.clone() }, port_map(&form.ports)))
            .collect();

        let mut rows = Rows::default();
        for (index, form) in self.workloads.into_iter().enumerate() {
            let row = form.key().and_then(|uid| {
                let services = services_of(&form.services, &uid, &mut listed, &own_ports)?;
                form.into_row(uid, services)
            });
            rows.workloads.push(row.map_err(|refusal| refusal.within("workloads", index))?);
        }
        add_endpoints(&mut rows.workloads, listed);

        let mut keys = Unique(HashMap::new());
        for (index, form) in self.services.into_iter().enumerate() {
            let row = form.into_row().and_then(|row| match keys.claim(row.key(), "services", index) {
                Ok(()) => Ok(row),
                Err(reason) => Err(Refusal::at("hostname", reason)),
            });
            rows.services.push(row.map_err(|refusal| refusal.within("services", index))?);
        }
        let mut keys = Unique(HashMap::new());
        for (index, form) in self.policies.into_iter().enumerate() {
            let row = form.into_row().and_then(|row| match keys.claim(row.key(), "policies", index) {
                Ok(()) => Ok(row),
                Err(reason) => Err(Refusal::at("name", reason)),
            });
            rows.policies.push(row.map_err(|refusal| refusal.within("policies", index))?);
        }
        Ok(rows)
    }

    /// What `services[].endpoints` and `stagedServices` say about the ports of workloads.
    fn listed_endpoints(&self, uids: &Unique<Text>) -> Result<Listed, Refusal> {
        let mut listed = Listed::new();
        let mut take = |service: NamespacedHostname, endpoints: &BTreeMap<Text, EndpointForm>| {
            for (uid, endpoint) in endpoints {
                if endpoint.workload_uid != *uid {
                    let reason = format!("expected the uid that the endpoint is listed under, found \"{}\"", endpoint.workload_uid);
                    return Err(Refusal::at("workloadUid", reason).within_field(uid.as_str()));
                }
                if !uids.0.contains_key(uid) {
                    return Err(Refusal::at(uid.as_str(), "no workload of this file has this uid"));
                }
                listed.insert((uid.clone(), service.clone()), port_map(&endpoint.port));
            }
            Ok(())
        };
        for (index, form) in self.services.iter().enumerate() {
            let service = NamespacedHostname { namespace: form.namespace.clone(), hostname: form.hostname.clone() };
            take(service, &form.endpoints).map_err(|refusal| refusal.within_field("endpoints").within("services", index))?;
        }
        for (service, endpoints) in &self.staged_services {
            let within = |refusal: Refusal| refusal.within_field(service.0.to_string()).within_field("stagedServices");
            take(service.0.clone(), endpoints).map_err(within)?;
        }
        Ok(listed)
    }

    /// The form of a static file that says exactly what is known.
    pub(super) fn of(snapshot: &Snapshot, policies: &PolicySet) -> Self {
        Self {
            workloads: sorted_workloads(snapshot).into_iter().map(|workload| WorkloadForm::of(workload)).collect(),
            policies: sorted_policies(policies),
            services: sorted_services(snapshot).into_iter().map(|service| ServiceForm::of(service, BTreeMap::new())).collect(),
            staged_services: BTreeMap::new(),
        }
    }

    /// The sections of a config dump. A workload's service ports are shown at the endpoints of the service, or under
    /// `stagedServices` while the service is not known.
    pub(super) fn dumped(snapshot: &Snapshot, policies: &PolicySet) -> Self {
        let workloads = sorted_workloads(snapshot);
        let mut staged: BTreeMap<As<NamespacedHostname>, BTreeMap<Text, EndpointForm>> = BTreeMap::new();
        for workload in &workloads {
            for (key, ports) in workload.profile.services.iter().filter(|(key, _)| snapshot.service(key).is_none()) {
                staged.entry(As(key.clone())).or_default().insert(workload.uid.clone(), EndpointForm::of(workload, ports));
            }
        }
        let endpoints = |service: &Service| {
            snapshot.endpoints(&service.key()).map(|(workload, ports)| (workload.uid.clone(), EndpointForm::of(workload, ports))).collect()
        };
        Self {
            workloads: workloads.iter().map(|workload| WorkloadForm::listed(workload)).collect(),
            policies: sorted_policies(policies),
            services: sorted_services(snapshot).into_iter().map(|service| ServiceForm::of(service, endpoints(service))).collect(),
            staged_services: staged,
        }
    }
}

/// The services of one workload with their ports. Takes what it uses out of `listed`.
fn services_of(
    form: &ServicesForm,
    uid: &Text,
    listed: &mut Listed,
    own_ports: &HashMap<NamespacedHostname, PortMap>,
) -> Result<Vec<(NamespacedHostname, PortMap)>, Refusal> {
    let mut services = Vec::new();
    let mut seen = HashSet::new();
    match form {
        ServicesForm::Keys(keys) => {
            for (index, key) in keys.iter().enumerate() {
                let ports = listed.remove(&(uid.clone(), key.0.clone())).or_else(|| own_ports.get(&key.0).cloned());
                let Some(ports) = ports else {
                    let reason = "this file has no such service; to give the ports all the same, write a map from service to ports";
                    return Err(Refusal::here(reason).within("services", index));
                };
                if !seen.insert(&key.0) {
                    return Err(Refusal::here(format!("\"{}\" is listed twice", key.0)).within("services", index));
                }
                services.push((key.0.clone(), ports));
            }
        }
        ServicesForm::Ports(entries) => {
            for (key, ports) in entries {
                let ports = port_map(ports);
                if listed.remove(&(uid.clone(), key.0.clone())).is_some_and(|other| other != ports) {
                    let reason = "the endpoints of the service give this workload other ports";
                    return Err(Refusal::at(key.0.to_string(), reason).within_field("services"));
                }
                services.push((key.0.clone(), ports));
            }
        }
    }
    Ok(services)
}

/// Endpoints that a service lists and their workload does not.
fn add_endpoints(workloads: &mut [Workload], listed: Listed) {
    let mut left: BTreeMap<Text, BTreeMap<NamespacedHostname, PortMap>> = BTreeMap::new();
    for ((uid, service), ports) in listed {
        left.entry(uid).or_default().insert(service, ports);
    }
    for workload in workloads {
        if let Some(services) = left.remove(&workload.uid) {
            std::sync::Arc::make_mut(&mut workload.profile).services.extend(services);
        }
    }
}

fn sorted_workloads(snapshot: &Snapshot) -> Vec<&std::sync::Arc<Workload>> {
    let mut workloads: Vec<_> = snapshot.workloads().collect();
    workloads.sort_unstable_by(|left, right| left.uid.cmp(&right.uid));
    workloads
}

fn sorted_services(snapshot: &Snapshot) -> Vec<&std::sync::Arc<Service>> {
    let mut services: Vec<_> = snapshot.services().collect();
    services.sort_unstable_by(|left, right| (&left.hostname, &left.namespace).cmp(&(&right.hostname, &right.namespace)));
    services
}

fn sorted_policies(policies: &PolicySet) -> Vec<PolicyForm> {
    let mut policies: Vec<_> = policies.iter().collect();
    policies.sort_by_cached_key(|policy| policy.key());
    policies.into_iter().map(|policy| PolicyForm::of(policy)).collect()
}

#[cfg(test)]
pub(super) mod tests;
