//! The DaemonSet's container without a cluster: its arguments, environment, user, group and capabilities, and a CNI that names a pod.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use culvert::node::Pod;
use culvert::node::zds::ZdsServer;
use culvert::sys::netns::NetNs;
use k8s_openapi::api::core::v1::Container;

use super::manifests::daemon_set;
use super::{pki, printed, skipped};

/// Ends with the test.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The answer of a page in a namespace.
pub(super) fn get(netns: &NetNs, port: u16, path: &str) -> std::io::Result<String> {
    ask(netns, port, "GET", path)
}

/// The same for another method.
pub(super) fn ask(netns: &NetNs, port: u16, method: &str, path: &str) -> std::io::Result<String> {
    let mut stream = netns.run(|| TcpStream::connect(("127.0.0.1", port)))??;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A namespace with a loopback.
pub(super) fn namespace() -> NetNs {
    let netns = NetNs::create().unwrap();
    netns.run(|| printed(Command::new("ip").args(["link", "set", "lo", "up"]))).unwrap();
    netns
}

/// Starts the container's program in a namespace, with the DaemonSet's arguments, environment and rights, and what the cluster adds.
fn start(container: &Container, netns: &NetNs, folder: &Path, added: &[(&str, &str)]) -> Proxy {
    let security = container.security_context.as_ref().unwrap();
    let capabilities = security.capabilities.as_ref().unwrap().add.iter().flatten();
    let rights: String = capabilities.map(|name| format!(",+{}", name.to_lowercase())).collect();
    let mut command = Command::new("setpriv");
    command.arg(format!("--bounding-set=-all{rights}")).arg(format!("--regid={}", security.run_as_group.unwrap())).arg("--clear-groups");
    command.arg("--").arg(env!("CARGO_BIN_EXE_culvert")).args(container.args.iter().flatten()).env_clear().current_dir(folder);
    for variable in container.env.iter().flatten() {
        command.env(&variable.name, variable.value.as_deref().unwrap_or("from-the-cluster"));
    }
    command.env("INPOD_UDS", folder.join("ztunnel.sock")).envs(added.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Proxy(netns.run(|| command.spawn()).unwrap().unwrap())
}

impl Proxy {
    /// Waits until the probe's answer has a text.
    async fn until(&mut self, container: &Container, netns: &NetNs, expected: &str) {
        let probe = container.readiness_probe.as_ref().unwrap().http_get.as_ref().unwrap();
        let port = serde_json::from_value(serde_json::to_value(&probe.port).unwrap()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let answer = get(netns, port, probe.path.as_deref().unwrap());
            if answer.as_ref().is_ok_and(|text| text.contains(expected)) {
                return;
            }
            let ended = self.0.try_wait().unwrap().is_some();
            assert!(!ended && Instant::now() < deadline, "{answer:?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends it and returns what it said.
    fn log(&mut self) -> String {
        self.0.kill().ok();
        let mut log = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut log).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        log
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_rights_of_the_daemon_set_it_serves_a_pod_and_becomes_ready() {
    if !nix::unistd::geteuid().is_root() {
        return skipped("only root can give rights away");
    }
    let (_, _, container) = daemon_set();
    let folder = tempfile::tempdir().unwrap();
    let authority = pki::Authority::root("cluster");
    authority.write(folder.path(), &authority);

    let (node, netns) = (namespace(), namespace());
    let pod = Pod { uid: "1".into(), name: "web".into(), namespace: "default".into(), service_account: "web".into() };
    let cni = ZdsServer::bind(&folder.path().join("ztunnel.sock"), [(pod, Some(netns.clone()))]).unwrap();
    // In place of istiod; and a refusal instead of a warning if the client's address cannot be kept.
    let added = [("LOCAL_XDS", "{}"), ("LOCAL_CA_DIR", "."), ("ENABLE_ORIG_SRC", "true")];
    let mut proxy = start(&container, &node, folder.path(), &added);
    proxy.until(&container, &node, "HTTP/1.1 200 ").await;
    for port in [15001, 15006, 15008] {
        netns.run(|| TcpStream::connect(("127.0.0.1", port))).unwrap().unwrap_or_else(|error| panic!("{port} of the pod: {error}"));
    }
    let stats = u16::try_from(container.ports.unwrap()[0].container_port).unwrap();
    let metrics = get(&node, stats, "/metrics").unwrap();
    assert!(metrics.contains("workload_manager_active_proxy_count 1\n"), "{metrics}");
    drop(cni);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_environment_and_files_of_the_daemon_set_it_asks_istiod_and_waits_for_it() {
    if !nix::unistd::geteuid().is_root() {
        return skipped("only root can give rights away");
    }
    let (_, pod, container) = daemon_set();
    let folder = tempfile::tempdir().unwrap();
    let mounted = |volume: &str, file: &str, content: &str| {
        let mount = container.volume_mounts.iter().flatten().find(|mount| mount.name == volume).unwrap();
        let place = folder.path().join(mount.mount_path.trim_start_matches('/'));
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join(file), content).unwrap();
    };
    mounted("istiod-ca-cert", "root-cert.pem", &pki::Authority::root("cluster").signer.pem());
    let mut tokens =
        pod.volumes.iter().flatten().filter_map(|volume| volume.projected.as_ref()?.sources.as_ref()?.first()?.service_account_token.as_ref());
    mounted("istio-token", &tokens.next().unwrap().path, "token");
    let node = namespace();
    let mut proxy = start(&container, &node, folder.path(), &[]);
    proxy.until(&container, &node, "not ready, pending: state manager, workload proxy manager").await;
    let log = proxy.log();
    for said in ["istiod.istio-system.svc:15012", "./var/run/secrets/tokens/istio-token", "./var/run/secrets/istio/root-cert.pem"] {
        let line = |what: &str| log.lines().any(|line| line.contains(what) && line.contains(said));
        assert!(line("control plane") && line("certificates come from a CA"), "{said}: {log}");
    }
}
