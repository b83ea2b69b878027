//! Revocation lists: which peers are refused, and which live tunnels are cut (D7 of the list of attacks; reference, dataplane §7.5).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, unreachable_pub)]
#[path = "support/crl.rs"]
mod crl;
#[allow(dead_code, unreachable_pub)]
#[path = "support/pki.rs"]
mod pki;
#[allow(dead_code, unreachable_pub)]
#[path = "support/raw_h2.rs"]
mod raw_h2;
#[allow(dead_code, unreachable_pub)]
#[path = "support/tunnel_peers.rs"]
mod tunnel_peers;

#[path = "revocation/handshakes.rs"]
mod handshakes;
#[path = "revocation/tunnels.rs"]
mod tunnels;

use std::path::PathBuf;
use std::sync::Arc;

use culvert::identity::{Config, Credential, Credentials, LocalIssuer, Revocations};
use culvert::lifecycle::Clock;
use culvert::model::SpiffeId;
use pki::Authority;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

/// Our own side: a store whose CA is given, with a file of lists.
struct Ours {
    store: Credentials,
    registry: Registry,
    file: PathBuf,
    _directory: tempfile::TempDir,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Ours {
    fn new(ca: &Authority, root: &Authority, lists: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        ca.write(directory.path(), root);
        let file = directory.path().join("ca-crl.pem");
        std::fs::write(&file, lists).unwrap();
        let (revocations, reading) = Revocations::open(file.clone());
        let issuer = LocalIssuer::load(directory.path(), Clock::system()).unwrap();
        let config = Config { revocations: Some(revocations), ..Config::default() };
        let (store, renewal) = Credentials::new(config, Arc::new(issuer), Clock::system());
        let mut registry = Registry::default();
        registry.register_collector(store.collector());
        Self { store, registry, file, _directory: directory, tasks: [tokio::spawn(reading), tokio::spawn(renewal)] }
    }

    async fn credential(&self, account: &str) -> Arc<Credential> {
        self.store.fetch(&id(account)).await.unwrap()
    }

    fn metrics(&self) -> String {
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &self.registry).unwrap();
        page
    }

    fn counted(&self, reporter: &str) -> u64 {
        let name = format!("istio_crl_policy_rejections_total{{reporter=\"{reporter}\"}} ");
        self.metrics().lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
    }
}

fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap()
}
