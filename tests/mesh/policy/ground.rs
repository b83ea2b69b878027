//! A lab whose policies a test changes, and what it asks of it.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::mesh::{Mesh, serve_echo, wait_until};

/// Clients on the left, servers on the right; `till` and `vault` have the same labels in different namespaces.
pub(super) const MARKET: &str = "
nodes: [left, right]
pods:
  - {name: buyer, namespace: shop, serviceAccount: buyer, node: left}
  - {name: clerk, namespace: bank, serviceAccount: clerk, node: left}
  - {name: outside, namespace: shop, serviceAccount: buyer, node: left, captured: false}
  - {name: till, namespace: shop, serviceAccount: till, node: right, labels: {app: money}, ports: [{name: http, containerPort: 8080}]}
  - {name: shelf, namespace: shop, serviceAccount: shelf, node: right, labels: {app: goods}}
  - {name: vault, namespace: bank, serviceAccount: vault, node: right, labels: {app: money}}
services:
  - {name: pay, namespace: shop, selector: {app: money}, ports: [{port: 80, targetPort: http}]}
";

/// Where the servers listen.
pub(super) const PORTS: [u16; 2] = [8080, 9000];

/// A lab of which a test changes the policies.
pub(super) struct Ground {
    pub(super) mesh: Mesh,
    definition: String,
    changes: Cell<u32>,
}

/// A policy in the form of Kubernetes.
pub(super) fn policy(key: &str, spec: &str) -> String {
    let (namespace, name) = key.split_once('/').unwrap();
    format!("  - {{metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}\n")
}

/// A policy for a source, which is all that its rule says.
pub(super) fn about(key: &str, action: &str, source: &str) -> String {
    policy(key, &format!("{{action: {action}, rules: [{{from: [{{source: {source}}}]}}]}}"))
}

impl Ground {
    pub(super) fn market() -> Self {
        let ground = Self::of(MARKET);
        for pod in ["till", "shelf", "vault"] {
            for port in PORTS {
                serve_echo(ground.mesh.listen(pod, port));
            }
        }
        ground
    }

    pub(super) fn of(definition: &str) -> Self {
        Self { mesh: Mesh::up(definition), definition: definition.to_owned(), changes: Cell::new(0) }
    }

    /// Makes these the AuthorizationPolicies; returns when every proxy has published them.
    pub(super) fn set(&self, policies: &[String]) {
        self.become_definition(&self.definition, policies, &[]);
    }

    /// Likewise with PeerAuthentications.
    pub(super) fn set_peers(&self, peers: &[String]) {
        self.become_definition(&self.definition, &[], peers);
    }

    /// Likewise with another definition of nodes and pods.
    pub(super) fn become_definition(&self, definition: &str, policies: &[String], peers: &[String]) {
        let list = |name: &str, items: &[String]| if items.is_empty() { String::new() } else { format!("{name}:\n{}", items.concat()) };
        let (mark, policy) = self.mark();
        let extra = json!({"policies": [policy]});
        self.mesh.apply(&format!("{definition}{}{}extra: {extra}\n", list("authorizationPolicies", policies), list("peerAuthentications", peers)));
        self.settled(&mark);
    }

    /// Changes the proxies' configuration file itself; returns when every proxy has published it.
    pub(super) fn edit(&self, change: impl FnOnce(&mut Value)) {
        let (mark, policy) = self.mark();
        let mut mesh = self.file();
        change(&mut mesh);
        list(&mut mesh, "policies").push(policy);
        self.mesh.replace_mesh_file(&mesh.to_string());
        self.settled(&mark);
    }

    pub(super) fn file(&self) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.mesh.mesh_file()).unwrap()).unwrap()
    }

    /// A policy for nobody, by which a publication is recognised.
    fn mark(&self) -> (String, Value) {
        self.changes.set(self.changes.get() + 1);
        let name = format!("change-{}-is-published", self.changes.get());
        let policy = json!({"name": name, "namespace": "nowhere", "scope": "WorkloadSelector", "action": "Deny", "rules": []});
        (name, policy)
    }

    fn settled(&self, mark: &str) {
        for node in self.mesh.status().nodes {
            wait_until("the change is published", || self.mesh.page(&node.name, 15000, "/config_dump").1.contains(mark));
        }
    }

    /// Both addresses of a pod.
    pub(super) fn both(&self, pod: &str, port: u16) -> [SocketAddr; 2] {
        [(self.mesh.ip(pod), port).into(), (self.mesh.ip6(pod), port).into()]
    }

    /// Whether a connection gets through; anything between yes and a clear no fails the test.
    pub(super) fn passes(&self, from: &str, target: impl Into<SocketAddr>) -> bool {
        let target = target.into();
        match self.mesh.echo(from, target) {
            Ok(()) => true,
            Err(error) if is_end(&error) => false,
            Err(error) => panic!("{from} to {target}: {error}"),
        }
    }

    /// Lines about connections that were refused or cut by policy.
    pub(super) fn denials(&self, node: &str) -> Vec<String> {
        self.mesh.log(node).into_iter().filter(|line| line.contains("connection closed due to policy")).collect()
    }

    /// A connection that must be refused; the access log's line about it at the destination.
    pub(super) fn refused(&self, from: &str, target: impl Into<SocketAddr>) -> String {
        let target = target.into();
        let before = self.denials("right").len();
        assert!(!self.passes(from, target), "{from} to {target} was let through");
        wait_until("the refusal is logged", || self.denials("right").len() > before);
        let line = self.denials("right").pop().unwrap();
        assert!(line.contains("direction=\"inbound\"") && line.contains("bytes_sent=0 bytes_recv=0"), "{line}");
        line
    }
}

/// An entry list of a configuration file.
pub(super) fn list<'a>(mesh: &'a mut Value, name: &str) -> &'a mut Vec<Value> {
    mesh.get_mut(name).unwrap().as_array_mut().unwrap()
}

/// A workload of a configuration file.
pub(super) fn workload<'a>(mesh: &'a mut Value, pod: &str) -> &'a mut Value {
    list(mesh, "workloads").iter_mut().find(|entry| entry.get("name").is_some_and(|name| name == pod)).unwrap()
}

/// Whether an error is the end of a connection, and not one of the test's own.
pub(super) fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe)
}
