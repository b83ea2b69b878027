//! A control plane in this process, with a mesh file or a mesh that the test publishes itself.
#![allow(unreachable_pub)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use culvert::control::{self, Config, Debounce, Parts, Signer, Stats, StatsCollector, Tokens};
use culvert::discovery::local::{self, LocalSource, ReloadStats};
use culvert::discovery::{Mesh, Publisher};
use culvert::identity::LocalIssuer;
use culvert::lifecycle::drain::{self, DrainMode, DrainTrigger};
use culvert::lifecycle::{Clock, Supervisor};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::control_client::{Connection, connect};

/// May be everybody of node `left`.
pub const LEFT: &str = "token-of-the-left-node";
/// Of node `right`: may be its workloads.
pub const RIGHT: &str = "token-of-the-right-node";
/// Of a machine: may be one identity.
pub const MACHINE: &str = "token-of-the-machine";
pub const NAME: &str = "istiod.istio-system.svc";

const TOKENS: &str = "tokens:
- {token: token-of-the-left-node, node: left, identities: ['*']}
- {token: token-of-the-right-node, node: right, identities: [node]}
- {token: token-of-the-machine, node: machine, identities: [spiffe://cluster.local/ns/edge/sa/machine]}
";

pub struct Plane {
    pub directory: Arc<tempfile::TempDir>,
    pub address: SocketAddr,
    pub stats: Arc<Stats>,
    pub reloads: Arc<ReloadStats>,
    trigger: DrainTrigger,
    supervisor: Supervisor,
}

pub fn config() -> Config {
    let debounce = Debounce { quiet: Duration::from_millis(1), longest: Duration::from_millis(20) };
    Config { debounce, ca_check: Duration::from_millis(100), ..Config::default() }
}

/// A directory with a CA, tokens and a mesh file.
pub fn directory(mesh: &str) -> Arc<tempfile::TempDir> {
    let directory = tempfile::tempdir().unwrap();
    LocalIssuer::create(&directory.path().join("ca"), &Clock::system()).unwrap();
    std::fs::write(directory.path().join("tokens.yaml"), TOKENS).unwrap();
    std::fs::write(directory.path().join("mesh.yaml"), mesh).unwrap();
    Arc::new(directory)
}

impl Plane {
    /// One that follows a mesh file.
    pub async fn of_file(mesh: &str) -> Self {
        Self::in_directory(directory(mesh), config()).await
    }

    pub async fn in_directory(directory: Arc<tempfile::TempDir>, config: Config) -> Self {
        let (supervisor, reloads) = (Supervisor::new(), Arc::new(ReloadStats::default()));
        let source = local::Config {
            quiet: Duration::from_millis(2),
            poll: Duration::from_millis(20),
            stats: reloads.clone(),
            supervisor: supervisor.clone(),
            ..local::Config::default()
        };
        let mesh = local::start(LocalSource::Path(directory.path().join("mesh.yaml")), source).await.unwrap();
        Self::start(directory, mesh, config, supervisor, reloads).await
    }

    /// One whose mesh the test publishes.
    pub async fn published(config: Config) -> (Self, Publisher) {
        let (publisher, mesh) = Publisher::new(None);
        let plane = Self::start(directory("{}"), mesh, config, Supervisor::new(), Arc::default()).await;
        (plane, publisher)
    }

    async fn start(directory: Arc<tempfile::TempDir>, mesh: Mesh, config: Config, supervisor: Supervisor, reloads: Arc<ReloadStats>) -> Self {
        let issuer = Arc::new(Signer::load(&directory.path().join("ca"), Clock::system()).unwrap());
        let tokens = Tokens::load(&directory.path().join("tokens.yaml")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stats = Arc::new(Stats::default());
        let (trigger, drain) = drain::channel();
        let parts = Parts { mesh, issuer, tokens, stats: stats.clone(), clock: Clock::system() };
        control::start(config, parts, listener, &supervisor, &drain).unwrap();
        Self { directory, address, stats, reloads, trigger, supervisor }
    }

    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca")
    }

    pub fn mesh_file(&self) -> PathBuf {
        self.directory.path().join("mesh.yaml")
    }

    /// Puts another mesh file in place.
    pub fn write(&self, mesh: &str) {
        let new = self.mesh_file().with_extension("new");
        std::fs::write(&new, mesh).unwrap();
        std::fs::rename(new, self.mesh_file()).unwrap();
    }

    pub async fn connect(&self) -> Connection {
        self.connect_as(LEFT).await
    }

    pub async fn connect_as(&self, token: &str) -> Connection {
        connect(self.address, &self.ca(), NAME, Some(token)).await.unwrap()
    }

    /// Ends it as SIGTERM does. Says whether every client had ended its calls.
    pub async fn end(self) -> bool {
        self.supervisor.stop();
        let ended = self.trigger.start(DrainMode::Graceful, Duration::from_secs(10)).await;
        self.supervisor.finished().await;
        ended
    }

    /// A series of the metrics page.
    pub fn metric(&self, series: &str) -> f64 {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(StatsCollector(self.stats.clone())));
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        line.unwrap_or_else(|| panic!("no {series} in\n{page}"))
    }

    /// Waits until a series has a value.
    pub async fn until_metric(&self, series: &str, value: f64) {
        let deadline = tokio::time::Instant::now() + crate::control_client::PATIENCE;
        while self.metric(series) != value {
            assert!(tokio::time::Instant::now() < deadline, "{series} is {}, not {value}", self.metric(series));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A mesh file of `workloads` (name, node, capacity) behind one service, and of `policies`.
pub fn mesh(workloads: &[(&str, &str, u32)], policies: &[&str]) -> String {
    let workloads = workloads.iter().enumerate().map(|(index, (name, node, capacity))| {
        serde_json::json!({
            "name": name, "namespace": "default", "serviceAccount": name, "node": node, "capacity": capacity, "protocol": "HBONE",
            "workloadIps": [format!("10.0.0.{}", index + 1)], "services": {"default/web.default.svc": {"80": 8080}},
        })
    });
    let services =
        [serde_json::json!({"name": "web", "namespace": "default", "hostname": "web.default.svc", "vips": ["/10.1.0.1"], "ports": {"80": 8080}})];
    let policies =
        policies.iter().map(|name| serde_json::json!({"name": name, "namespace": "default", "scope": "Namespace", "action": "Deny", "rules": []}));
    let (workloads, policies): (Vec<_>, Vec<_>) = (workloads.collect(), policies.collect());
    serde_json::json!({"workloads": workloads, "services": services, "policies": policies}).to_string()
}

pub fn uid(name: &str) -> String {
    format!("Kubernetes//Pod/default/{name}")
}
