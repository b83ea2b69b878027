//! Revoked certificates between nodes (reference, dataplane §7.5; §12.4: `crl_inbound_*`, `crl_outbound_*`).

use std::fs;
use std::io::Read;
use std::net::TcpStream;

use base64::Engine;
use rcgen::{Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::crl;
use crate::mesh::{Mesh, echo_on, serve_echo, wait_until};

struct Ground {
    mesh: Mesh,
    lists: tempfile::TempDir,
}

impl Ground {
    fn new() -> Self {
        let lists = tempfile::tempdir().unwrap();
        let file = lists.path().join("ca-crl.pem");
        let mesh = Mesh::up(&format!(
            "
nodes: [left, right]
pods:
  - {{name: client, serviceAccount: client, node: left}}
  - {{name: other, serviceAccount: other, node: left}}
  - {{name: server, serviceAccount: server, node: right}}
proxyEnv: {{CRL_PATH: {}}}
",
            file.display()
        ));
        serve_echo(mesh.listen("server", 8080));
        Self { mesh, lists }
    }

    fn connect(&self, pod: &str) -> TcpStream {
        let mut socket = self.mesh.connect(pod, (self.mesh.ip("server"), 8080)).unwrap();
        echo_on(&mut socket, b"before").unwrap();
        socket
    }

    /// Puts the certificate of an account, as a node uses it now, on the list of the lab's CA.
    fn revoke(&self, node: &str, account: &str) {
        let dump = self.mesh.config_dump(node);
        let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
        let shown = dump["certificates"].as_array().unwrap().iter().find(|shown| shown["identity"] == identity.as_str()).unwrap();
        let pem = base64::prelude::BASE64_STANDARD.decode(shown["certChain"][0]["pem"].as_str().unwrap()).unwrap();
        let ca = |file: &str| fs::read_to_string(self.mesh.ca().join(file)).unwrap();
        let signer = Issuer::from_ca_cert_pem(&ca("ca-cert.pem"), KeyPair::from_pem(&ca("ca-key.pem")).unwrap()).unwrap();
        let text = crl::list(&signer, &[&CertificateDer::from_pem_slice(&pem).unwrap()]);
        fs::write(self.lists.path().join("ca-crl.pem"), text).unwrap();
    }

    fn count(&self, node: &str, name: &str, labels: &[&str]) -> f64 {
        self.mesh.metric(node, name, labels)
    }
}

fn ends_with_a_reset(mut socket: TcpStream) {
    assert_eq!(socket.read(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

const REVOKED: &str = "response_flags=\"CERT_REVOKED\"";

#[test]
fn connections_to_a_revoked_server_are_cut_and_new_ones_fail() {
    let ground = Ground::new();
    let open = ground.connect("client");
    ground.revoke("right", "server");
    ends_with_a_reset(open);
    let closed = |count: f64| ground.count("left", "istio_tcp_connections_closed_total", &["reporter=\"source\"", REVOKED]) == count;
    wait_until("it is recorded", || closed(1.0));
    assert_eq!(ground.count("left", "istio_crl_policy_rejections_total", &["reporter=\"source\""]), 1.0);
    ground.mesh.wait_for_log("left", &["connection complete", "direction=\"outbound\"", "error=\"a certificate of the peer is revoked\""]);
    ground.mesh.echo("client", (ground.mesh.ip("server"), 8080)).unwrap_err();
    wait_until("the refusal is recorded", || closed(2.0));
    assert_eq!(ground.count("left", "istio_crl_policy_rejections_total", &["reporter=\"source\""]), 2.0);
}

#[test]
fn connections_of_a_revoked_client_are_cut_and_new_ones_fail_while_others_go_on() {
    let ground = Ground::new();
    let (open, mut other) = (ground.connect("client"), ground.connect("other"));
    ground.revoke("left", "client");
    ends_with_a_reset(open);
    wait_until("it is recorded", || ground.count("right", "istio_tcp_connections_closed_total", &["reporter=\"destination\"", REVOKED]) == 1.0);
    assert_eq!(ground.count("right", "istio_crl_policy_rejections_total", &["reporter=\"destination\""]), 1.0);
    ground.mesh.wait_for_log("right", &["connection complete", "direction=\"inbound\"", "error=\"a certificate of the peer is revoked\""]);
    ground.mesh.echo("client", (ground.mesh.ip("server"), 8080)).unwrap_err();
    // A client learns of it only after its side of the handshake, and may try again with a fresh tunnel.
    wait_until("the refusal is counted", || ground.count("right", "istio_crl_policy_rejections_total", &["reporter=\"destination\""]) >= 2.0);
    // The client's proxy is told why.
    ground.mesh.wait_for_log("left", &["tunnel lost", "alert CertificateRevoked"]);
    echo_on(&mut other, b"after").unwrap();
}
