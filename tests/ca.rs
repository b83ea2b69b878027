//! The CA client against a CA that was written from the wire documents alone (`support/ca_server.rs`): what it sends, what it believes, and what it
//! does when the CA is down, slow, silent, refusing or lying. Fault F7 and attack D18 (the node's side) of the reference, dataplane §7.1–7.4.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, unreachable_pub)]
#[path = "support/ca_server.rs"]
mod ca_server;
#[allow(dead_code, unreachable_pub)]
#[path = "support/pki.rs"]
mod pki;

#[path = "ca/answers.rs"]
mod answers;
#[path = "ca/faults.rs"]
mod faults;
#[path = "ca/requests.rs"]
mod requests;
#[path = "ca/trust.rs"]
mod trust;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ca_server::CaServer;
use culvert::grpc::{self, Dialer, RootSource, Token};
use culvert::identity::{Config, Credentials, RemoteIssuer};
use culvert::lifecycle::{Clock, SettableTime};
use culvert::model::SpiffeId;
use pki::Authority;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

/// A client with its files, its store and a wall clock of its own.
struct Client {
    store: Credentials,
    wall: SettableTime,
    registry: Registry,
    files: tempfile::TempDir,
    renewal: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

impl Client {
    /// A client of the server, with its root in a file and a token.
    fn of(server: &CaServer) -> Self {
        Self::with(server, |_| {}, Config::default(), true)
    }

    fn with(server: &CaServer, edit: impl FnOnce(&mut grpc::Config), config: Config, impersonate: bool) -> Self {
        let files = tempfile::tempdir().unwrap();
        let (roots, token) = (files.path().join("root-cert.pem"), files.path().join("token"));
        std::fs::write(&roots, server.desk.ca.signer.pem()).unwrap();
        std::fs::write(&token, "first-token").unwrap();
        let address = format!("https://localhost:{}", server.address.port()).parse().unwrap();
        let mut channel = grpc::Config {
            token: Some(Token::File(token)),
            headers: vec![("clusterid".into(), "Kubernetes".into()), ("X_TEAM".into(), "blue".into())],
            ..grpc::Config::new(address, RootSource::File(roots))
        };
        edit(&mut channel);
        let wall = SettableTime::new(SystemTime::now());
        let issuer = RemoteIssuer::new(Dialer::new(channel).unwrap(), impersonate);
        let (store, renewal) = Credentials::new(config, Arc::new(issuer), Clock::fixed(wall.clone()));
        let mut registry = Registry::default();
        registry.register_collector(store.collector());
        Self { store, wall, registry, files, renewal: tokio::spawn(renewal) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn metrics(&self) -> String {
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &self.registry).unwrap();
        page
    }

    /// How many requests ended this way.
    fn counted(&self, outcome: &str) -> u64 {
        let name = format!("culvert_certificate_requests_total{{outcome=\"{outcome}\"}} ");
        self.metrics().lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
    }

    /// The words of the configuration dump for the state of an identity.
    fn state(&self, account: &str) -> Option<String> {
        self.store.dump().into_iter().find(|state| state.identity == id(account).to_string()).map(|state| state.state)
    }

    /// Both clocks go forward at once, without waiting; timers that are due fire. The server's clock is another.
    async fn leap(&self, by: Duration) {
        self.wall.advance(by);
        tokio::time::pause();
        tokio::time::advance(by).await;
        tokio::time::resume();
    }
}

/// Waits for a condition that must come true soon.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let patience = std::time::Instant::now() + 20 * SECOND;
    while !condition() {
        assert!(std::time::Instant::now() < patience, "never: {what}");
        // Real time: the tests step tokio's clock.
        tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(2))).await.unwrap();
    }
}

async fn server() -> CaServer {
    CaServer::start(Authority::root("root")).await
}
