//! The DaemonSet's container without a cluster: its arguments, environment, user, group and capabilities, and a CNI that names a pod.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use culvert::node::Pod;
use culvert::node::zds::ZdsServer;
use culvert::sys::netns::NetNs;

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
fn get(netns: &NetNs, port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = netns.run(|| TcpStream::connect(("127.0.0.1", port)))??;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn namespace() -> NetNs {
    let netns = NetNs::create().unwrap();
    netns.run(|| printed(Command::new("ip").args(["link", "set", "lo", "up"]))).unwrap();
    netns
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_rights_of_the_daemon_set_it_serves_a_pod_and_becomes_ready() {
    if !nix::unistd::geteuid().is_root() {
        return skipped("only root can give rights away");
    }
    let (_, _, container) = daemon_set();
    let security = container.security_context.unwrap();
    let added = security.capabilities.unwrap().add.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let authority = pki::Authority::root("cluster");
    authority.write(folder.path(), &authority);

    let (node, netns) = (namespace(), namespace());
    let socket = folder.path().join("ztunnel.sock");
    let pod = Pod { uid: "1".into(), name: "web".into(), namespace: "default".into(), service_account: "web".into() };
    let cni = ZdsServer::bind(&socket, [(pod, Some(netns.clone()))]).unwrap();

    let rights: String = added.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
    let mut command = Command::new("setpriv");
    command.arg(format!("--bounding-set=-all{rights}")).arg(format!("--regid={}", security.run_as_group.unwrap())).arg("--clear-groups");
    command.arg("--").arg(env!("CARGO_BIN_EXE_culvert")).args(container.args.unwrap()).env_clear();
    for variable in container.env.unwrap() {
        command.env(&variable.name, variable.value.as_deref().unwrap_or("from-the-cluster"));
    }
    // What the cluster has in place of istiod, and a refusal instead of a warning if the client's address cannot be kept.
    command.env("INPOD_UDS", &socket).env("LOCAL_XDS", "{}").env("LOCAL_CA_DIR", folder.path()).env("ENABLE_ORIG_SRC", "true");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut proxy = Proxy(node.run(|| command.spawn()).unwrap().unwrap());

    let probe = container.readiness_probe.unwrap().http_get.unwrap();
    let port = serde_json::from_value(serde_json::to_value(probe.port).unwrap()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let answer = get(&node, port, probe.path.as_deref().unwrap());
        if answer.as_ref().is_ok_and(|text| text.starts_with("HTTP/1.1 200")) {
            break;
        }
        if Instant::now() > deadline || proxy.0.try_wait().unwrap().is_some() {
            proxy.0.kill().ok();
            let mut log = String::new();
            proxy.0.stdout.take().unwrap().read_to_string(&mut log).unwrap();
            proxy.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
            panic!("not ready: {answer:?}\n{log}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for port in [15001, 15006, 15008] {
        netns.run(|| TcpStream::connect(("127.0.0.1", port))).unwrap().unwrap_or_else(|error| panic!("{port} of the pod: {error}"));
    }
    let stats = u16::try_from(container.ports.unwrap()[0].container_port).unwrap();
    let metrics = get(&node, stats, "/metrics").unwrap();
    assert!(metrics.contains("workload_manager_active_proxy_count 1\n"), "{metrics}");
    drop(cni);
}
