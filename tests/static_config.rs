//! The static configuration from outside: what loads, what is refused with which words, and what happens when a file changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use culvert::discovery::local::{self, Config, LocalSource, ReloadStats};
use culvert::discovery::{Error, Mesh, World};
use culvert::model::{NamespacedHostname, TunnelProtocol};
use culvert::policy::{Facts, Scope};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// Long enough for a busy machine; nothing waits this long unless it is broken.
const SOON: Duration = Duration::from_secs(20);

async fn load(text: &str) -> Result<Mesh, Error> {
    local::start(LocalSource::Text(text.to_owned()), Config::default()).await
}

#[tokio::test]
async fn a_file_as_users_of_the_reference_write_it_loads() {
    let mesh = load(
        r#"
# Two local addresses, one taken by HBONE and one by plain TCP.
workloads:
- uid: lab//v1/Pod/default/here
  name: here
  namespace: default
  serviceAccount: default
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  node: here
  network: ""
  services:
    "default/one.example":
      80: 8080
    "default/two.example":
      80: 8081
- uid: lab//v1/Pod/default/here-tcp
  name: here-tcp
  namespace: default
  serviceAccount: default
  workloadIps: ["127.0.0.2"]
  protocol: TCP
  services:
    "default/one.example":
      80: 8080
policies:
  - action: Allow
    rules:
    - - - notDestinationPorts:
          - 9999
    name: deny-9999
    namespace: default
    scope: Namespace
    dryRun: false
services:
- name: one
  namespace: default
  hostname: one.example
  vips:
    - /127.10.0.1
  ports:
    80: 8080
  subjectAltNames:
   - spiffe://cluster.local/ns/default/sa/here
  canonical: true
- name: two
  namespace: default
  hostname: two.example
  vips:
    - far/127.10.0.2
  ports:
    80: 8081
"#,
    )
    .await
    .unwrap();
    let world = mesh.current();
    let here = world.snapshot.workload_by_address("", "127.0.0.1".parse().unwrap()).unwrap();
    assert_eq!((here.uid.as_str(), here.profile.protocol), ("lab//v1/Pod/default/here", TunnelProtocol::Hbone));
    assert_eq!(here.identity().unwrap().to_string(), "spiffe://cluster.local/ns/default/sa/default");
    assert_eq!(here.capacity, 1);
    assert_eq!(world.snapshot.service_by_address("far", "127.10.0.2".parse().unwrap(), None).unwrap().hostname, "two.example");
    assert!(world.snapshot.service_by_address("", "127.10.0.2".parse().unwrap(), None).is_none());
    let one = NamespacedHostname { namespace: "default".into(), hostname: "one.example".into() };
    assert_eq!(world.snapshot.endpoints(&one).count(), 2);
    let compiled = world.policies.compile("default", &[]);
    let facts = |destination_port| Facts {
        identity: None,
        source_ip: "10.0.0.1".parse().unwrap(),
        destination_ip: "127.0.0.1".parse().unwrap(),
        destination_port,
    };
    assert!(compiled.permit(&facts(8080)).is_ok());
    assert!(compiled.permit(&facts(9999)).is_err());
    assert_eq!(world.policies.get("default/deny-9999").unwrap().scope, Scope::Namespace);
}

#[tokio::test]
async fn whatever_is_wrong_is_told_with_its_line_and_field() {
    let workload = "workloads:\n- uid: u\n  namespace: n\n";
    let service = "services:\n- name: s\n  namespace: n\n  hostname: h\n";
    let policy = "policies:\n- name: p\n  namespace: n\n  scope: Namespace\n  action: Deny\n";
    let table: Vec<(String, &str)> = vec![
        ("".into(), ": document: the file says nothing; write {} for an empty mesh"),
        ("# only a comment\n".into(), ": document: the file says nothing; write {} for an empty mesh"),
        ("- uid: u\n".into(), ":1:1: document: expected a map"),
        ("workload: []\n".into(), ":1:1: workload: unknown field \"workload\"; expected one of workloads, policies, services, stagedServices"),
        ("workloads: 3\n".into(), ":1:12: workloads: expected a list"),
        ("workloads: []\npolicies:\n".into(), ":2:9: policies: expected a list, found nothing; write [] for an empty one"),
        ("workloads: []\n---\nworkloads: []\n".into(), ":3:1: document: expected one YAML document, found a second one"),
        ("workloads:\n- uid: u\n".into(), ":2:3: workloads[0]: the field \"namespace\" is missing"),
        ("workloads:\n- namespace: n\n".into(), ":2:3: workloads[0]: a workload needs a uid, or a name to make one of"),
        (format!("{workload}  ip: 1.2.3.4\n"), ":4:3: workloads[0].ip: unknown field \"ip\"; expected one of workloadIps, waypoint,"),
        (
            format!("{workload}  workloadIps:\n  - 1.2.3.4\n  - 1.2.3\n"),
            ":6:5: workloads[0].workloadIps[1]: expected an IPv4 or IPv6 address, found \"1.2.3\"",
        ),
        (format!("{workload}  workloadIps: 1.2.3.4\n"), ":4:16: workloads[0].workloadIps: expected a list"),
        (format!("{workload}  protocol: http\n"), ":4:13: workloads[0].protocol: expected one of TCP, HBONE, found \"http\""),
        (format!("{workload}  networkMode: host\n"), ":4:16: workloads[0].networkMode: expected one of Standard, HostNetwork, found \"host\""),
        (format!("{workload}  status: ok\n"), ":4:11: workloads[0].status: expected one of Healthy, Unhealthy, found \"ok\""),
        (
            format!("{workload}  workloadType: daemonset\n"),
            ":4:17: workloads[0].workloadType: expected one of deployment, cronjob, pod, job, found \"daemonset\"",
        ),
        (format!("{workload}  nativeTunnel: yes\n"), ":4:17: workloads[0].nativeTunnel: expected one of true, false, found \"yes\""),
        (format!("{workload}  capacity: -1\n"), ":4:13: workloads[0].capacity: expected a number from 0 to 4294967295, found \"-1\""),
        (format!("{workload}  node:\n"), ":4:7: workloads[0].node: expected a value, found nothing; write \"\" for an empty text"),
        (format!("{workload}  node: [a]\n"), ":4:9: workloads[0].node: expected a single value"),
        (format!("{workload}  node: a\n  node: b\n"), ":5:3: workloads[0].node: the key \"node\" appears twice"),
        (
            format!("{workload}  trustDomain: Cluster.Local\n"),
            ":4:16: workloads[0].trustDomain: expected a part of a SPIFFE ID: the trust domain must be lower-case letters",
        ),
        (
            format!("{workload}  serviceAccount: a/b\n"),
            ":4:19: workloads[0].serviceAccount: expected a part of a SPIFFE ID: the service account is not a path segment",
        ),
        (
            format!("{workload}  waypoint:\n    destination: 10.0.0.1\n"),
            ":5:18: workloads[0].waypoint.destination: expected <network>/<address> or <namespace>/<host name>, found \"10.0.0.1\"",
        ),
        (
            format!("{workload}  waypoint: {{destination: net/10.0.0.999}}\n"),
            ":4:27: workloads[0].waypoint.destination: expected <network>/<address> or <namespace>/<host name>, found \"net/10.0.0.999\"",
        ),
        (
            format!("{workload}  waypoint: {{destination: n/w, hboneMtlsPort: 0}}\n"),
            ":4:47: workloads[0].waypoint.hboneMtlsPort: expected a port from 1 to 65535, found \"0\"",
        ),
        (format!("{workload}  waypoint: {{hboneMtlsPort: 15008}}\n"), ":4:13: workloads[0].waypoint: the field \"destination\" is missing"),
        (
            format!("{workload}  services:\n    web.example: {{80: 8080}}\n"),
            ":5:5: workloads[0].services.web.example: expected <namespace>/<host name>, found \"web.example\"",
        ),
        (
            format!("{workload}  services:\n    n/web:\n      80: 65536\n"),
            ":6:11: workloads[0].services.n/web.80: expected a port from 0 to 65535, found \"65536\"",
        ),
        (
            format!("{workload}  services:\n    n/web:\n      http: 80\n"),
            ":6:7: workloads[0].services.n/web.http: expected a port from 1 to 65535, found \"http\"",
        ),
        (
            format!("{workload}  services: [n/web]\n"),
            ":4:14: workloads[0].services[0]: this file has no such service; to give the ports all the same, write a map from service to ports",
        ),
        (
            format!("{workload}  authorizationPolicies: [deny]\n"),
            ":4:27: workloads[0].authorizationPolicies[0]: expected <namespace>/<policy name>, found \"deny\"",
        ),
        (
            format!("{workload}  applicationTunnel: {{protocol: HTTP}}\n"),
            ":4:33: workloads[0].applicationTunnel.protocol: expected one of NONE, PROXY, found \"HTTP\"",
        ),
        (format!("{workload}- uid: v\n  namespace: n\n- uid: u\n  namespace: n\n"), ":6:8: workloads[2].uid: \"u\" is already workloads[0]"),
        (
            format!("{service}  vips: [10.0.0.1]\n"),
            ":5:10: services[0].vips[0]: expected <network>/<address>, where the default network is empty (such as /10.0.0.1), found \"10.0.0.1\"",
        ),
        (format!("{service}  cidrVips: [{{cidr: 10.0.0.0/33}}]\n"), ":5:21: services[0].cidrVips[0].cidr: expected an address range such as"),
        (format!("{service}  ports: {{http: 80}}\n"), ":5:11: services[0].ports.http: expected a port from 1 to 65535, found \"http\""),
        (
            format!("{service}  loadBalancer: {{routingPreferences: [Rack]}}\n"),
            ":5:39: services[0].loadBalancer.routingPreferences[0]: expected one of Region, Zone, Subzone, Node, Cluster, Network, found \"Rack\"",
        ),
        (
            format!("{service}  loadBalancer: {{mode: Random}}\n"),
            ":5:24: services[0].loadBalancer.mode: expected one of Standard, Strict, Failover, Passthrough, found \"Random\"",
        ),
        (format!("{service}  ipFamilies: v4\n"), ":5:15: services[0].ipFamilies: expected one of IPv4, IPv6, Dual, found \"v4\""),
        (format!("{service}  visibility: Private\n"), ":5:15: services[0].visibility: expected one of Public, Namespace, found \"Private\""),
        (format!("{service}  endpoints: {{u: {{workloadUid: u}}}}\n"), ":5:18: services[0].endpoints.u: no workload of this file has this uid"),
        (format!("{service}- name: t\n  namespace: n\n  hostname: h\n"), ":7:13: services[1].hostname: \"n/h\" is already services[0]"),
        (policy.to_owned(), ":2:3: policies[0]: the field \"rules\" is missing"),
        (format!("{policy}  rules:\n"), ":6:8: policies[0].rules: expected a list, found nothing; write [] for an empty one"),
        (
            "policies:\n- name: p\n  scope: Namespace\n  action: Deny\n  rules: []\n".into(),
            ":2:3: policies[0].namespace: a policy of scope Namespace needs a namespace",
        ),
        (
            "policies:\n- name: p\n  scope: Everywhere\n  action: Deny\n  rules: []\n".into(),
            ":3:10: policies[0].scope: expected one of Global, Namespace, WorkloadSelector, found \"Everywhere\"",
        ),
        (
            "policies:\n- name: p\n  scope: Global\n  action: Audit\n  rules: []\n".into(),
            ":4:11: policies[0].action: expected one of Allow, Deny, found \"Audit\"",
        ),
        (
            format!("{policy}  rules:\n  - - - principal: []\n"),
            ":7:9: policies[0].rules[0][0][0].principal: unknown field \"principal\"; expected one of namespaces,",
        ),
        (
            format!("{policy}  rules:\n  - - - principals: [{{Equals: a}}]\n"),
            ":7:23: policies[0].rules[0][0][0].principals[0]: expected one of Exact, Prefix, Suffix, Presence, found \"Equals\"",
        ),
        (
            format!("{policy}  rules:\n  - - - principals:\n        - Exact: spiffe://a/ns/b/sa/c\n"),
            ":8:18: policies[0].rules[0][0][0].principals[0].Exact: expected <trust domain>/ns/<namespace>/sa/<service account> without",
        ),
        (
            format!("{policy}  rules:\n  - - - namespaces:\n        - Prefix: \"\"\n"),
            ":8:19: policies[0].rules[0][0][0].namespaces[0].Prefix: expected a text; an empty one would match nothing or everything",
        ),
        (
            format!("{policy}  rules:\n  - - - sourceIps: [10.0.0.0/8, 10.0.0.0/40]\n"),
            ":7:33: policies[0].rules[0][0][0].sourceIps[1]: expected an address range such as 10.0.0.0/8 (prefix at most 32)",
        ),
        (
            format!("{policy}  rules:\n  - - - destinationPorts: [70000]\n"),
            ":7:28: policies[0].rules[0][0][0].destinationPorts[0]: expected a port from 0 to 65535, found \"70000\"",
        ),
        (
            format!("{policy}  rules: []\n- name: p\n  namespace: n\n  scope: Global\n  action: Allow\n  rules: []\n"),
            ":7:9: policies[1].name: \"n/p\" is already policies[0]",
        ),
        (format!("{workload}  node: \"a\n"), ":5:1: workloads[0]: invalid indentation in multiline quoted scalar"),
        (format!("{workload}\tnode: a\n"), ":3:14: workloads[0]: while scanning a plain scalar, found a tab"),
        (format!("{workload}  node: *nobody\n"), ":4:9: workloads[0]: alias references unknown anchor"),
    ];
    assert!(table.len() >= 25);
    let mut wrong = String::new();
    for (text, expected) in table {
        let shown = load(&text).await.err().map_or_else(|| "(accepted)".to_owned(), |error| error.to_string());
        if !shown.starts_with(&format!("LOCAL_XDS{expected}")) || shown.lines().count() != 1 {
            wrong += &format!("{shown}\ninstead of\nLOCAL_XDS{expected}\nfor\n{text}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[tokio::test]
async fn a_file_that_cannot_be_read_stops_the_start_with_its_path() {
    let directory = TempDir::new().unwrap();
    let missing = directory.path().join("mesh.yaml");
    let error = local::start(LocalSource::Path(missing.clone()), Config::default()).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot read the static configuration {}: No such file", missing.display())), "{error}");
    let error = local::start(LocalSource::Path(directory.path().to_owned()), Config::default()).await.unwrap_err().to_string();
    assert!(error.contains("Is a directory"), "{error}");
    std::fs::write(&missing, b"workloads: []\n# \xff\n").unwrap();
    let error = local::start(LocalSource::Path(missing.clone()), Config::default()).await.unwrap_err().to_string();
    assert_eq!(error, format!("{}:2:1: document: this line is not UTF-8 text", missing.display()));
}

/// Error lines of this thread, as they are written.
struct Log(mpsc::UnboundedSender<String>);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(String::from_utf8_lossy(line).trim_end().to_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A followed file with eyes on its worlds and its error lines.
struct Followed {
    directory: TempDir,
    path: PathBuf,
    mesh: Mesh,
    updates: watch::Receiver<Arc<World>>,
    errors: mpsc::UnboundedReceiver<String>,
    stats: Arc<ReloadStats>,
    _capture: tracing::subscriber::DefaultGuard,
}

/// A file that says one workload.
fn saying(uid: &str) -> String {
    format!("workloads:\n- uid: {uid}\n  namespace: n\n")
}

impl Followed {
    /// `prepare` makes the file in a directory and returns its path.
    async fn start(prepare: impl FnOnce(&Path) -> PathBuf) -> Self {
        let directory = TempDir::new().unwrap();
        let path = prepare(directory.path());
        let (sender, errors) = mpsc::unbounded_channel();
        let writer = move || Log(sender.clone());
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::ERROR).with_writer(writer).with_ansi(false).finish();
        let capture = tracing::subscriber::set_default(subscriber);
        let config = Config::default();
        let stats = Arc::clone(&config.stats);
        let mesh = local::start(LocalSource::Path(path.clone()), config).await.unwrap();
        let updates = mesh.subscribe();
        Self { directory, path, mesh, updates, errors, stats, _capture: capture }
    }

    async fn plain() -> Self {
        Self::start(|directory| {
            let path = directory.join("mesh.yaml");
            std::fs::write(&path, saying("first")).unwrap();
            path
        })
        .await
    }

    /// Replaces the file as one should: by a rename.
    fn replace(&self, text: &str) {
        let next = self.directory.path().join("next");
        std::fs::write(&next, text).unwrap();
        std::fs::rename(&next, &self.path).unwrap();
    }

    async fn says(&mut self, uid: &str) {
        let found = timeout(SOON, self.updates.wait_for(|world| world.snapshot.workload(uid).is_some())).await;
        assert!(found.expect("not published").is_ok());
        assert_eq!(self.mesh.current().snapshot.workloads().count(), 1);
    }

    async fn error(&mut self) -> String {
        timeout(SOON, self.errors.recv()).await.expect("no error line").unwrap()
    }

    /// The next change must come through, and nothing else must have been said before it.
    async fn is_silent_until(&mut self, uid: &str) {
        self.replace(&saying(uid));
        self.says(uid).await;
        assert!(self.errors.try_recv().is_err(), "more than one error line");
    }

    fn counts(&self) -> (u64, u64) {
        (self.stats.loads.load(Ordering::Relaxed), self.stats.failures.load(Ordering::Relaxed))
    }
}

#[tokio::test]
async fn a_bad_file_leaves_the_old_world_and_says_so_once() {
    let mut file = Followed::plain().await;
    file.says("first").await;
    file.replace("workloads:\n- uid: u\n  namespace: n\n  workloadIps: [nowhere]\n");
    let line = file.error().await;
    let place = format!("{}:4:17: workloads[0].workloadIps[0]: expected an IPv4 or IPv6 address, found \"nowhere\"", file.path.display());
    assert!(line.ends_with(&format!("static configuration refused, the old one stays: {place}")), "{line}");
    file.says("first").await;
    assert_eq!((file.mesh.current().epoch, file.counts()), (1, (1, 1)));
    // The same content in another file is the same content.
    file.replace("workloads:\n- uid: u\n  namespace: n\n  workloadIps: [nowhere]\n");
    file.is_silent_until("second").await;
    assert_eq!((file.mesh.current().epoch, file.counts()), (2, (2, 1)));
}

#[tokio::test]
async fn a_good_file_after_a_bad_one_is_loaded_even_if_it_is_the_old_one() {
    let mut file = Followed::plain().await;
    file.replace("policies: [{}]\n");
    assert!(file.error().await.contains("policies[0]: the field \"name\" is missing"));
    file.replace(&saying("first"));
    // Nothing is published, so the next bad content tells that the one before was read.
    file.replace("policies: 1\n");
    assert!(file.error().await.contains("policies: expected a list"));
    assert_eq!(file.mesh.current().epoch, 1);
    file.is_silent_until("second").await;
}

#[tokio::test]
async fn a_file_written_in_place_is_loaded() {
    let mut file = Followed::plain().await;
    std::fs::write(&file.path, saying("second")).unwrap();
    file.says("second").await;
    assert_eq!(file.counts(), (2, 0), "the empty moment of a truncated file was read");
}

#[tokio::test]
async fn a_removed_file_leaves_the_old_world_and_says_so_once() {
    let mut file = Followed::plain().await;
    std::fs::remove_file(&file.path).unwrap();
    let line = file.error().await;
    assert!(line.contains("cannot read the static configuration") && line.contains("No such file"), "{line}");
    assert!(file.mesh.current().snapshot.workload("first").is_some());
    file.is_silent_until("second").await;
    assert_eq!(file.counts(), (2, 1));
}

#[tokio::test]
async fn an_emptied_file_is_bad_and_not_an_empty_mesh() {
    let mut file = Followed::plain().await;
    std::fs::write(&file.path, "").unwrap();
    assert!(file.error().await.contains("the file says nothing"));
    assert!(file.mesh.current().snapshot.workload("first").is_some());
    file.is_silent_until("second").await;
}

#[tokio::test]
async fn a_swapped_link_is_a_change() {
    // As Kubernetes mounts a ConfigMap: mesh.yaml -> ..data/mesh.yaml, ..data -> ..v1, and ..data is swapped.
    fn version(directory: &Path, name: &str, uid: &str) {
        std::fs::create_dir(directory.join(name)).unwrap();
        std::fs::write(directory.join(name).join("mesh.yaml"), saying(uid)).unwrap();
        symlink(name, directory.join("..tmp")).unwrap();
        std::fs::rename(directory.join("..tmp"), directory.join("..data")).unwrap();
    }
    let mut file = Followed::start(|directory| {
        version(directory, "..v1", "first");
        symlink("..data/mesh.yaml", directory.join("mesh.yaml")).unwrap();
        directory.join("mesh.yaml")
    })
    .await;
    file.says("first").await;
    for (name, uid) in [("..v2", "second"), ("..v3", "third")] {
        version(file.directory.path(), name, uid);
        file.says(uid).await;
    }
    std::fs::remove_dir_all(file.directory.path().join("..v1")).unwrap();
    // The file behind the link is written to.
    std::fs::write(file.directory.path().join("..v3/mesh.yaml"), saying("fourth")).unwrap();
    file.says("fourth").await;
    assert_eq!(file.counts(), (4, 0));
}

#[tokio::test]
async fn a_swapped_directory_on_the_path_is_a_change() {
    let mut file = Followed::start(|directory| {
        for (name, uid) in [("v1", "first"), ("v2", "second")] {
            std::fs::create_dir(directory.join(name)).unwrap();
            std::fs::write(directory.join(name).join("mesh.yaml"), saying(uid)).unwrap();
        }
        symlink("v1", directory.join("current")).unwrap();
        directory.join("current/mesh.yaml")
    })
    .await;
    symlink("v2", file.directory.path().join("next")).unwrap();
    std::fs::rename(file.directory.path().join("next"), file.directory.path().join("current")).unwrap();
    file.says("second").await;
}

#[tokio::test]
async fn a_change_is_published_as_one_world_and_soon() {
    let mut file = Followed::plain().await;
    let mut fastest = Duration::MAX;
    for round in 0..5 {
        let started = Instant::now();
        let deny = "policies: [{name: p, namespace: n, scope: Global, action: Deny, rules: [[[{destinationPorts: [1]}]]]}]\n";
        file.replace(&format!("{}{deny}", saying(&format!("round-{round}"))));
        file.says(&format!("round-{round}")).await;
        fastest = fastest.min(started.elapsed());
        let world = file.mesh.current();
        assert_eq!((world.epoch, world.policies.len()), (round + 2, 1));
    }
    assert!(fastest < Duration::from_millis(200), "a reload took {fastest:?}");
}
