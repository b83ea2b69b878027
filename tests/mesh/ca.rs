//! The real binary and a CA over the network (reference, dataplane §7 and §10.1: CA_ADDRESS, CA_ROOT_CA, ALT_CA_HOSTNAME, AUTH_TOKEN, CLUSTER_ID,
//! CA_HEADER_*, SECRET_TTL, TRUST_DOMAIN of workloads).

use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use crate::ca_server::{CaServer, Mood, serving};
use crate::lifecycle::{Bare, lonely};
use crate::mesh::{PATIENCE, until, wait_until};
use crate::pki::Authority;

const WORKLOADS: &str = "
workloads:
  - {uid: Kubernetes//Pod/shop/web, name: web, namespace: shop, serviceAccount: web, node: here, protocol: HBONE, workloadIps: [10.0.0.1]}
  - {uid: Kubernetes//Pod/shop/far, name: far, namespace: shop, serviceAccount: far, node: there, protocol: HBONE, workloadIps: [10.0.0.2]}
  - {uid: Kubernetes//Pod/shop/old, name: old, namespace: shop, serviceAccount: old, node: here, protocol: TCP, workloadIps: [10.0.0.3]}
";

/// A proxy and its CA in one namespace, and what the test says of the CA's name and of the roots.
struct Ground {
    proxy: Bare,
    server: CaServer,
    _files: tempfile::TempDir,
    _runtime: Runtime,
}

impl Ground {
    fn new(name: &str, believed: Option<&Authority>, env: &[(&str, &str)]) -> Self {
        Self::with(name, believed, Mood::Sign, env)
    }

    fn silent(env: &[(&str, &str)]) -> Self {
        Self::with("localhost", None, Mood::Hang, env)
    }

    fn with(name: &str, believed: Option<&Authority>, mood: Mood, env: &[(&str, &str)]) -> Self {
        let netns = lonely();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = netns.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (root, _inside) = (Authority::root("root"), runtime.enter());
        let (tls, roots) = (serving(&root, &[name]), root.signer.pem());
        let server = CaServer::start_on(tokio::net::TcpListener::from_std(listener).unwrap(), root, roots, tls);
        server.mood(mood);
        let files = tempfile::tempdir().unwrap();
        let path = files.path().join("root-cert.pem");
        std::fs::write(&path, believed.unwrap_or(&server.desk.ca).signer.pem()).unwrap();
        let address = format!("localhost:{}", server.address.port());
        let mut all = vec![
            ("LOCAL_CA_DIR", ""),
            ("LOCAL_XDS", WORKLOADS),
            ("NODE_NAME", "here"),
            ("CA_ADDRESS", address.as_str()),
            ("CA_ROOT_CA", path.to_str().unwrap()),
            ("AUTH_TOKEN", "literal-token-of-this-test"),
        ];
        all.extend(env);
        Self { proxy: Bare::start(netns, &all), server, _files: files, _runtime: runtime }
    }

    fn wait_for_state(&self, begins: &str) -> serde_json::Value {
        let dump = || self.proxy.config_dump().map(|dump| dump["certificates"].clone()).unwrap_or_default();
        let so = until(|| dump()[0]["state"].as_str().is_some_and(|state| state.starts_with(begins)).then_some(()));
        assert!(so.is_some(), "no certificate is {begins}: {}\n{}", dump(), self.proxy.log());
        dump()
    }

    fn assert_no_token_is_shown(&self) {
        let shown = format!("{}{}", self.proxy.log(), self.proxy.page(15000, "GET /config_dump").unwrap().1);
        assert!(!shown.contains("literal-token-of-this-test"), "{shown}");
    }
}

#[test]
fn a_proxy_without_a_ca_of_its_own_asks_the_one_it_is_told_for_its_local_workloads() {
    let env = [("CLUSTER_ID", "east"), ("CA_HEADER_X_TEAM", "blue"), ("SECRET_TTL", "1h"), ("ALT_CA_HOSTNAME", "istiod.istio-system.svc")];
    let ground = Ground::new("istiod.istio-system.svc", None, &env);
    let certificates = ground.wait_for_state("Available");
    assert_eq!(certificates.as_array().unwrap().len(), 1, "of this node, with HBONE: {certificates}");
    assert_eq!(certificates[0]["identity"], "spiffe://cluster.local/ns/shop/sa/web");
    let asked = ground.server.asked();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].impersonated().as_deref(), Some("spiffe://cluster.local/ns/shop/sa/web"));
    assert_eq!(asked[0].message.validity_duration, 3600);
    assert_eq!(asked[0].header("authorization"), Some("Bearer literal-token-of-this-test"));
    assert_eq!((asked[0].header("clusterid"), asked[0].header("x_team")), (Some("east"), Some("blue")));
    let (_, metrics) = ground.proxy.page(15020, "GET /metrics").unwrap();
    assert!(
        metrics.contains("culvert_certificate_requests_total{outcome=\"issued\"} 1")
            && metrics.contains("culvert_certificates{state=\"available\"} 1")
    );
    let config = ground.proxy.config_dump().unwrap()["config"].clone();
    assert_eq!((&config["altCaHostname"], &config["clusterId"]), (&"istiod.istio-system.svc".into(), &"east".into()));
    ground.assert_no_token_is_shown();
}

#[test]
fn a_ca_that_is_not_believed_is_named_in_log_dump_and_metrics_and_gets_no_token() {
    let ground = Ground::new("localhost", Some(&Authority::root("root")), &[]);
    let certificates = ground.wait_for_state("Unavailable: ");
    let state = certificates[0]["state"].as_str().unwrap();
    assert!(state.contains("no trusted connection to localhost:") && state.contains("root-cert.pem"), "{state}");
    let log = ground.proxy.log();
    assert!(log.contains("certificate not issued") && log.contains("no trusted connection to localhost:"), "{log}");
    let (_, metrics) = ground.proxy.page(15020, "GET /metrics").unwrap();
    assert!(metrics.contains("culvert_certificate_requests_total{outcome=\"untrusted_ca\"}"), "{metrics}");
    assert!(ground.server.asked().is_empty());
    ground.assert_no_token_is_shown();
}

#[test]
fn a_connection_waits_five_seconds_for_its_certificate_and_is_refused_then() {
    // Its CA is believed, and silent from the beginning.
    let env = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "shop/web/web")];
    let ground = Ground::silent(&env);
    let ready = || ground.proxy.page(15021, "GET /healthz/ready").is_ok_and(|(status, _)| status == 200);
    wait_until("it is ready", ready);
    let begin = Instant::now();
    let mut socket = ground.proxy.connect(15008).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // The proxy ends it: nothing was said to it, and it says nothing.
    assert!(matches!(socket.read(&mut [0; 8]), Ok(0) | Err(_)));
    assert!((Duration::from_secs(4)..Duration::from_secs(15)).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    let refused = || ground.proxy.page(15020, "GET /metrics").unwrap().1;
    wait_until("it is counted", || refused().contains("culvert_early_refusals_total{reporter=\"destination\",reason=\"identity\"} 1"));
}
