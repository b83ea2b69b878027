//! The image as the DaemonSet runs it, between a control plane with a CA and a CNI: everything of a node but Kubernetes.

use std::collections::BTreeMap;
use std::fs;
use std::net::{TcpStream, UdpSocket};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use culvert::node::Pod;
use culvert::node::zds::ZdsServer;
use culvert::sys::netns::NetNs;

use super::image::{Images, answer, prepared};
use super::manifests::daemon_set;
use super::printed;
use super::rights::{ask, get, namespace};

const MESH: &str = "
workloads:
- {uid: web, name: web, namespace: default, serviceAccount: web, workloadIps: [10.9.0.1], protocol: HBONE, node: n1}
";
const TOKENS: &str = "
tokens:
- {token: a-token-of-the-node, node: n1, identities: [node]}
";

/// Ends with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within half a minute: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn answers(netns: &NetNs, port: u16, path: &str, text: &str) -> bool {
    get(netns, port, path).is_ok_and(|answer| answer.contains(text))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_image_with_the_daemon_sets_settings_finds_its_control_plane_gets_certificates_and_becomes_ready() {
    let Some(binary) = prepared() else { return };
    let (_, pod, container) = daemon_set();
    let images = Images::new();
    images.build(&binary, "image");
    let folder = images.path();
    let volume = |name: &str| {
        let path = folder.join("volumes").join(name);
        fs::create_dir_all(&path).unwrap();
        path
    };

    let (node, netns) = (namespace(), namespace());
    let dns = node.run(|| UdpSocket::bind("127.0.0.1:53")).unwrap().unwrap();
    std::thread::spawn(move || answer(&dns));
    fs::write(folder.join("mesh.yaml"), MESH).unwrap();
    fs::write(folder.join("tokens.yaml"), TOKENS).unwrap();
    fs::create_dir(folder.join("ca")).unwrap();
    let mut control = Command::new(env!("CARGO_BIN_EXE_culvert"));
    control.current_dir(folder).args(["control", "--config", "mesh.yaml", "--ca-dir", "ca", "--create-ca", "--token-file", "tokens.yaml"]);
    control.args(["--readiness", "127.0.0.1:16021", "--metrics", "127.0.0.1:16020"]);
    let log = |name: &str| fs::File::options().create(true).append(true).open(folder.join(name)).unwrap();
    control.stdout(log("control.log")).stderr(log("control.log"));
    let _control = Ends(node.run(|| control.spawn()).unwrap().unwrap());
    until("the control plane is ready", || answers(&node, 16021, "/healthz/ready", "HTTP/1.1 200 ")).await;

    fs::copy(folder.join("ca/root-cert.pem"), volume("istiod-ca-cert").join("root-cert.pem")).unwrap();
    fs::write(volume("istio-token").join("istio-token"), "a-token-of-the-node").unwrap();
    let known = Pod { uid: "web".into(), name: "web".into(), namespace: "default".into(), service_account: "web".into() };
    let _cni = ZdsServer::bind(&volume("cni-ztunnel-sock-dir").join("ztunnel.sock"), [(known, Some(netns.clone()))]).unwrap();

    let mut from = images.command("buildah");
    from.args(["from", "--pull-never", "--dns", "127.0.0.1", "--dns-option", "ndots:5", "--dns-search", "cluster.local", "culvert:dev"]);
    let name = printed(&mut from).trim().to_owned();
    let mut run = images.command("buildah");
    // Dropping all would drop what is added, too: here a container has nothing to begin with.
    fs::write(folder.join("containers.conf"), "[containers]\ndefault_capabilities = []\n").unwrap();
    run.env("CONTAINERS_CONF", folder.join("containers.conf")).args(["run", "--user"]);
    let security = container.security_context.as_ref().unwrap();
    run.arg(format!("{}:{}", security.run_as_user.unwrap(), security.run_as_group.unwrap()));
    for capability in security.capabilities.as_ref().unwrap().add.iter().flatten() {
        run.arg("--cap-add").arg(format!("CAP_{capability}"));
    }
    for mount in container.volume_mounts.iter().flatten() {
        let kind = if mount.read_only == Some(true) { "ro" } else { "rw" };
        run.arg("-v").arg(format!("{}:{}:{kind}", volume(&mount.name).display(), mount.mount_path));
    }
    let fields = BTreeMap::from([
        ("spec.nodeName", "n1"),
        ("spec.serviceAccountName", pod.service_account_name.as_deref().unwrap()),
        ("metadata.name", "culvert-x"),
        ("metadata.namespace", "istio-system"),
        ("status.podIP", "10.9.0.254"),
    ]);
    for variable in container.env.iter().flatten() {
        let field = variable.value_from.as_ref().map(|from| fields[from.field_ref.as_ref().unwrap().field_path.as_str()]);
        run.arg("-e").arg(format!("{}={}", variable.name, variable.value.as_deref().or(field).unwrap()));
    }
    run.arg(&name).arg("/culvert").args(container.args.iter().flatten());
    run.stdout(log("proxy.log")).stderr(log("proxy.log"));
    let mut proxy = Ends(node.run(|| run.spawn()).unwrap().unwrap());

    let probe = container.readiness_probe.as_ref().unwrap().http_get.as_ref().unwrap();
    let port = serde_json::from_value(serde_json::to_value(&probe.port).unwrap()).unwrap();
    until("the container is ready", || {
        let ended = proxy.0.try_wait().unwrap().is_some();
        assert!(!ended, "the container has ended: {}", fs::read_to_string(folder.join("proxy.log")).unwrap());
        answers(&node, port, probe.path.as_deref().unwrap(), "HTTP/1.1 200 ")
    })
    .await;
    netns.run(|| TcpStream::connect("127.0.0.1:15008")).unwrap().unwrap();
    until("the pod has its certificate", || {
        let dump = get(&node, 15000, "/config_dump").unwrap_or_default();
        let body = dump.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let dump: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
        let certificates = dump["certificates"].as_array().map_or(&[][..], Vec::as_slice);
        certificates.iter().any(|one| one["identity"] == "spiffe://cluster.local/ns/default/sa/web" && one["state"] == "Available")
    })
    .await;
    // As the kubelet would: it drains and ends well.
    ask(&node, 15000, "POST", "/quitquitquit").unwrap();
    until("the container has ended", || proxy.0.try_wait().unwrap().is_some()).await;
    assert!(proxy.0.wait().unwrap().success());
}
