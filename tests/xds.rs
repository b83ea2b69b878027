//! The delta xDS client against a server that does what the reference says a control plane does, and what it should not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "xds/demand.rs"]
mod demand;
#[path = "xds/faults.rs"]
mod faults;
#[allow(unreachable_pub)]
#[path = "support/freezer.rs"]
mod freezer;
#[allow(dead_code, unreachable_pub)]
#[path = "support/pki.rs"]
mod pki;
#[path = "xds/pushes.rs"]
mod pushes;
#[path = "xds/readers.rs"]
mod readers;
#[allow(dead_code, unreachable_pub)]
#[path = "support/xds_server.rs"]
mod xds_server;

use std::net::SocketAddr;
use std::time::Duration;

use culvert::discovery::xds::{self, Identity, Stats};
use culvert::discovery::{LocalName, Mesh};
use culvert::grpc::{self, Dialer, RootSource, Token};
use culvert::lifecycle::{Backoff, Supervisor};
use tokio::sync::watch;
use tokio::time::timeout;
use xds_server::{SOON, Server, Trust};

/// Whose connection wants to know.
fn asker() -> LocalName {
    LocalName { name: "client".into(), namespace: "shop".into(), service_account: "default".into() }
}

/// A server, a client and their files.
struct Stand {
    trust: Trust,
    server: Server,
    files: tempfile::TempDir,
    mesh: Mesh,
    ready: watch::Receiver<bool>,
    stats: Stats,
    supervisor: Supervisor,
}

/// What a test changes of the client.
struct Setup {
    /// Where the client dials, if not at the server itself.
    at: Option<SocketAddr>,
    on_demand: Option<Duration>,
    backoff: Backoff,
    ping: (Duration, Duration),
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            at: None,
            on_demand: None,
            backoff: Backoff::new(Duration::from_millis(5), Duration::from_millis(50)),
            ping: (Duration::from_secs(18), Duration::from_secs(10)),
        }
    }
}

impl Stand {
    async fn new() -> Self {
        Self::with(Setup::default()).await
    }

    async fn with(setup: Setup) -> Self {
        let trust = Trust::new(&[]);
        let server = Server::start(&trust).await;
        let files = tempfile::tempdir().unwrap();
        trust.write_root(&files.path().join("root.pem"));
        std::fs::write(files.path().join("token"), "one\n").unwrap();
        let (mesh, ready, stats, supervisor) = client(setup.at.unwrap_or(server.address), files.path(), &setup);
        Self { trust, server, files, mesh, ready, stats, supervisor }
    }

    /// Cuts every connection; nobody listens from now on.
    async fn stop_server(&mut self) -> SocketAddr {
        self.server.stop().await;
        self.server.address
    }

    async fn restart_server(&mut self, address: SocketAddr) {
        self.server = Server::at(address, &self.trust).await;
    }

    async fn ready(&mut self) {
        timeout(SOON, self.ready.wait_for(|ready| *ready)).await.expect("not ready").unwrap();
    }

    fn has(&self, uid: &str) -> bool {
        self.mesh.current().snapshot.workload(uid).is_some()
    }

    /// Waits for a world.
    async fn until(&self, what: &str, holds: impl Fn(&culvert::discovery::World) -> bool) {
        let mut worlds = self.mesh.subscribe();
        timeout(SOON, worlds.wait_for(|world| holds(world))).await.unwrap_or_else(|_| panic!("never: {what}")).unwrap();
    }

    fn metrics(&self) -> String {
        let mut registry = prometheus_client::registry::Registry::default();
        self.stats.register(&mut registry);
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
        page
    }
}

fn client(at: SocketAddr, files: &std::path::Path, setup: &Setup) -> (Mesh, watch::Receiver<bool>, Stats, Supervisor) {
    let roots = RootSource::File(files.join("root.pem"));
    let dialer = Dialer::new(grpc::Config {
        token: Some(Token::File(files.join("token"))),
        headers: vec![("clusterid".into(), "Kubernetes".into())],
        ping_interval: setup.ping.0,
        ping_timeout: setup.ping.1,
        ..grpc::Config::new(at.to_string().parse().unwrap(), roots)
    });
    let identity = Identity { pod: "proxy-x".into(), namespace: "istio-system".into(), node: "n1".into(), ..Identity::default() };
    let (stats, supervisor) = (Stats::default(), Supervisor::new());
    let (mesh, ready) = xds::start(xds::Config {
        on_demand: setup.on_demand,
        backoff: setup.backoff.clone(),
        stats: stats.clone(),
        supervisor: supervisor.clone(),
        ..xds::Config::new(dialer.unwrap(), identity)
    });
    (mesh, ready, stats, supervisor)
}
