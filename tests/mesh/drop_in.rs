//! The real proxy in a mesh that is told by somebody else: a control plane and a CA written from the wire documents alone, an agent that speaks ZDS,
//! and two pods (reference, dataplane §5, §7, §8, §10.1; craft-and-trust F4, F5, F9, D17).

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use culvert::node::rules::{self, RulesConfig};
use culvert::node::zds::ZdsServer;
use culvert::sys::link::Links;
use culvert::sys::netns::NetNs;
use culvert::sys::nft;
use culvert::sys::socket::{DialOptions, dial_socket};
use culvert::wire::authorization::Scope;
use culvert::wire::workload::{self, Workload};
use culvert::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use culvert::wire::zds::Pod;
use tokio::runtime::Runtime;

use crate::ca_server::{CaServer, serving};
use crate::caller::Ca;
use crate::lifecycle::{Bare, lonely};
use crate::mesh::{PATIENCE, echo_on, ends_without_a_byte, serve_echo, until, wait_until};
use crate::pki::Authority;
use crate::xds_server::{Server, ServerStream, Trust, pod, pod_resource, policy_resource, service_resource_with};

const CLIENT: [u8; 4] = [10, 1, 0, 1];
const SERVER: [u8; 4] = [10, 1, 0, 2];
/// On the pods' wire, as far as routes are concerned.
const VIP: [u8; 4] = [10, 1, 0, 99];
const OTHER_VIP: [u8; 4] = [10, 1, 0, 98];

/// A pod of this node, with an account of its own name.
fn member(name: &str, ip: [u8; 4]) -> Workload {
    Workload { node: "here".into(), service_account: name.into(), ..pod(name, ip) }
}

/// The pod as the agent tells of it.
fn enrolled(name: &str) -> Pod {
    Pod { uid: name.into(), name: name.into(), namespace: "shop".into(), service_account: name.into() }
}

/// A node: its proxy, its agent, two pods with a wire between them, and a CA. The control plane comes when a test says so.
struct Ground {
    proxy: Bare,
    ca: CaServer,
    _agent: ZdsServer,
    client: NetNs,
    server: NetNs,
    node: NetNs,
    control: SocketAddr,
    trust: Trust,
    files: tempfile::TempDir,
    runtime: Runtime,
}

impl Ground {
    fn new() -> Self {
        let [node, client, server] = [lonely(), lonely(), lonely()];
        client.run(|| Links::open().unwrap().add_veth("eth0", "eth0", server.as_fd()).unwrap()).unwrap();
        for (netns, ip) in [(&client, CLIENT), (&server, SERVER)] {
            let links = netns.run(|| Links::open().unwrap()).unwrap();
            links.set_up("eth0").unwrap();
            links.add_address("eth0", format!("{}/24", IpAddr::from(ip)).parse().unwrap()).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let _inside = runtime.enter();
        let listen = || node.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        // Nobody else is in this namespace who could take the port meanwhile.
        let control = listen().local_addr().unwrap();
        let (root, trust, files) = (Authority::root("root"), Trust::new(&[]), tempfile::tempdir().unwrap());
        let (tls, roots, listener) = (serving(&root, &["localhost"]), root.signer.pem(), listen());
        listener.set_nonblocking(true).unwrap();
        let ca = CaServer::start_on(tokio::net::TcpListener::from_std(listener).unwrap(), root, roots, tls);
        let path = |name: &str| files.path().join(name).to_str().unwrap().to_owned();
        trust.write_root(&files.path().join("control.pem"));
        std::fs::write(path("ca.pem"), ca.desk.ca.signer.pem()).unwrap();
        std::fs::write(path("token"), "one\n").unwrap();
        let proxy = Bare::start(
            node.clone(),
            &[
                ("LOCAL_CA_DIR", ""),
                ("NODE_NAME", "here"),
                ("XDS_ADDRESS", &format!("https://{control}")),
                ("XDS_ROOT_CA", &path("control.pem")),
                ("CA_ADDRESS", &format!("https://localhost:{}", ca.address.port())),
                ("CA_ROOT_CA", &path("ca.pem")),
                ("AUTH_TOKEN", &path("token")),
            ],
        );
        let pods = [(enrolled("client"), Some(client.clone())), (enrolled("server"), Some(server.clone()))];
        let agent = ZdsServer::bind(&proxy.zds(), pods).unwrap();
        serve_echo(server.run(|| TcpListener::bind("0.0.0.0:8080").unwrap()).unwrap());
        let ground = Self { proxy, ca, _agent: agent, client, server, node, control, trust, files, runtime };
        // Listeners before rules.
        for netns in [&ground.client, &ground.server] {
            let up = until(|| netns.run(|| TcpStream::connect("127.0.0.1:15008")).unwrap().ok());
            assert!(up.is_some(), "the pod has no listeners:\n{}", ground.proxy.log());
            rules::install(netns, &RulesConfig { dns_capture: false, ..RulesConfig::default() }).unwrap();
        }
        ground
    }

    /// The control plane begins to listen.
    fn control_plane(&self) -> Server {
        self.node.run(|| self.runtime.block_on(Server::at(self.control, &self.trust))).unwrap()
    }

    /// It dies.
    fn kill(&self, mut server: Server, stream: ServerStream) {
        self.runtime.block_on(server.stop());
        drop(stream);
    }

    /// A stream that was told both pods.
    fn synced(&self, server: &mut Server) -> ServerStream {
        let pods = [("client", CLIENT), ("server", SERVER)].map(|(name, ip)| pod_resource(&member(name, ip), "1"));
        self.runtime.block_on(server.synced(pods.into(), vec![]))
    }

    fn connect(&self, target: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let target = target.into();
        let socket = self.client.run(|| TcpStream::connect_timeout(&target, PATIENCE)).unwrap()?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    }

    fn echo(&self, target: impl Into<SocketAddr>) -> io::Result<()> {
        echo_on(&mut self.connect(target)?, b"hello")
    }

    fn ready(&self) -> (u16, String) {
        self.proxy.page(15021, "GET /healthz/ready").unwrap_or_default()
    }

    fn wait_until_ready(&self) {
        wait_until("it is ready", || self.ready() == (200, "ready\n".to_owned()));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Tunnels that are open at the pods of this node.
    fn tunnels(&self) -> usize {
        let (_, page) = self.proxy.page(15020, "GET /metrics").unwrap();
        let open = page.lines().find_map(|line| line.strip_prefix("istio_tcp_sockets_open{reporter=\"destination\"} "));
        open.map_or(0, |count| count.parse().unwrap())
    }

    /// Identities that the CA was asked for, with the token of each request.
    fn asked(&self) -> Vec<(String, String)> {
        let told = |asked: &crate::ca_server::Asked| (asked.impersonated().unwrap(), asked.header("authorization").unwrap().to_owned());
        let mut all: Vec<_> = self.ca.asked().iter().map(told).collect();
        all.sort();
        all
    }
}

#[test]
fn without_a_control_plane_a_proxy_is_not_ready_and_carries_nothing_until_it_comes() {
    let ground = Ground::new();
    let server = (IpAddr::from(SERVER), 8080);
    wait_until("only the state is missing", || ground.ready() == (500, "not ready, pending: state manager\n".to_owned()));
    // Nobody is sent anywhere in plain text because nobody is known: it is waited for, and then refused.
    let begin = Instant::now();
    assert!(ends_without_a_byte(ground.connect(server).unwrap()).is_err());
    assert!((Duration::from_secs(4)..Duration::from_secs(15)).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    assert_eq!(ground.asked(), []);
    let mut control = ground.control_plane();
    let _stream = ground.synced(&mut control);
    ground.wait_until_ready();
    ground.echo(server).unwrap();
}

#[test]
fn over_the_wire_of_somebody_else_pods_talk_and_nobody_notices_that_the_control_plane_is_replaced() {
    let mut ground = Ground::new();
    let mut control = ground.control_plane();
    let mut stream = ground.synced(&mut control);
    ground.wait_until_ready();
    assert_eq!(stream.metadata.get("authorization").unwrap(), "Bearer one");
    let server: SocketAddr = (IpAddr::from(SERVER), 8080).into();
    ground.echo(server).unwrap();
    let identity = |name: &str| format!("spiffe://cluster.local/ns/shop/sa/{name}");
    let by = |token: &str| ["client", "server"].map(|name| (identity(name), format!("Bearer {token}"))).to_vec();
    assert_eq!(ground.asked(), by("one"));
    let seen = || {
        let line = |line: &str| {
            ["connection complete", "direction=\"inbound\"", &format!("src.identity=\"{}\"", identity("client")), "src.addr=10.1.0.1:"]
                .iter()
                .all(|part| line.contains(part))
        };
        ground.proxy.log().lines().any(line)
    };
    wait_until("the server's side has seen the client's identity", seen);

    // A service and a policy arrive on the open stream.
    let mut live = ground.connect(server).unwrap();
    echo_on(&mut live, b"before").unwrap();
    let vip: SocketAddr = (IpAddr::from(VIP), 80).into();
    let mut with_service = member("server", SERVER);
    let service = service_resource_with("web.shop", VIP, &mut with_service, (80, 8080));
    ground.runtime.block_on(async {
        stream.push(ADDRESS_TYPE, vec![service, pod_resource(&with_service, "2")], &[]).await;
        stream.acked().await;
    });
    ground.echo(vip).unwrap();
    ground.runtime.block_on(async {
        // ALLOW without rules permits nobody.
        stream.push(AUTHORIZATION_TYPE, vec![policy_resource("nobody", Scope::Namespace, 0)], &[]).await;
        stream.acked().await;
    });
    let ended = until(|| echo_on(&mut live, b"cut?").err());
    assert!(ended.is_some(), "a live connection goes on against the policy");
    assert!(ground.echo(vip).is_err());
    ground.runtime.block_on(async {
        stream.push(AUTHORIZATION_TYPE, vec![], &["shop/nobody"]).await;
        stream.acked().await;
    });
    let mut live = ground.connect(vip).unwrap();
    echo_on(&mut live, b"permitted again").unwrap();

    // The control plane dies. Its successor has another root, and wants another token.
    ground.kill(control, stream);
    ground.echo(vip).unwrap();
    assert_eq!(ground.ready().0, 200);
    ground.trust = Trust::new(&[]);
    ground.trust.write_root(&ground.file("control.pem"));
    std::fs::write(ground.file("token"), "two\n").unwrap();
    let mut control = ground.control_plane();
    let mut stream = ground.runtime.block_on(control.accept());
    assert_eq!(stream.metadata.get("authorization").unwrap(), "Bearer two");
    let held = ground.runtime.block_on(stream.request()).initial_resource_versions;
    let versions = |name: &str| held.get(name).map(String::as_str);
    assert_eq!((held.len(), versions("Kubernetes//Pod/shop/server"), versions("shop/web.shop")), (3, Some("2"), Some("s1")));
    echo_on(&mut live, b"not cut").unwrap();

    // So does the CA: a new pod of this node gets its certificate from one that shows another root.
    let next = Authority::root("next");
    ground.ca.present(serving(&next, &["localhost"]));
    ground.ca.close();
    std::fs::write(ground.file("ca.pem"), next.signer.pem()).unwrap();
    ground.runtime.block_on(async {
        stream.request().await;
        stream.push(ADDRESS_TYPE, vec![pod_resource(&member("late", [10, 1, 0, 3]), "1")], &[]).await;
        stream.acked().await;
    });
    let late = (identity("late"), "Bearer two".to_owned());
    wait_until("the new pod's certificate is asked for", || ground.asked().contains(&late));
    wait_until("and is there", || {
        let dump = ground.proxy.config_dump().unwrap();
        dump["certificates"].as_array().unwrap().iter().any(|entry| entry["identity"] == late.0.as_str() && entry["state"] == "Available")
    });
    echo_on(&mut live, b"nor by this").unwrap();
    ground.echo(vip).unwrap();
    assert_eq!(ground.asked().len(), 3, "nothing was asked for twice: {:?}", ground.asked());
}

/// The address that a connection had before its translation is no address of a tunnel: redirection does not touch the port.
#[test]
fn a_tunnel_belongs_to_the_address_of_its_socket_and_not_to_what_was_translated_into_it() {
    let ground = Ground::new();
    let mut control = ground.control_plane();
    let _stream = ground.synced(&mut control);
    ground.wait_until_ready();
    let other: SocketAddr = (IpAddr::from(VIP), 15008).into();
    let translate =
        "table ip test { chain c { type nat hook prerouting priority -110; ip daddr 10.1.0.99 tcp dport 15008 dnat to 10.1.0.2:15008; }; }";
    ground.server.run(|| nft::apply(translate)).unwrap().unwrap();
    ground.client.run(|| Links::open().unwrap().add_route("10.1.0.99/32".parse().unwrap(), SERVER.into()).unwrap()).unwrap();
    let directory = ground.files.path().join("ca");
    std::fs::create_dir(&directory).unwrap();
    ground.ca.desk.ca.write(&directory, &ground.ca.desk.ca);
    let marked = DialOptions { mark: Some(0x539), ..DialOptions::default() };
    let (socket, _) = ground.client.run(|| dial_socket(other, None, &marked)).unwrap().unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.connect_timeout(&other.into(), PATIENCE).unwrap();
    let ca = Ca::load(&directory);
    let tunnel = ca.dial(socket.into(), "spiffe://cluster.local/ns/shop/sa/client").unwrap();
    tunnel.connect("10.1.0.2:8080").stream.echo(b"the socket's own address");
    assert_eq!(tunnel.connect("10.1.0.99:8080").status, 400);
}

#[test]
fn a_destination_that_is_known_by_name_only_is_resolved_when_it_is_needed() {
    let ground = Ground::new();
    let mut control = ground.control_plane();
    let mut stream = ground.synced(&mut control);
    ground.wait_until_ready();
    // As a service entry with DNS resolution is. In the client's pod, this name is the pod itself.
    serve_echo(ground.client.run(|| TcpListener::bind("127.0.0.1:8080").unwrap()).unwrap());
    let mut rows = Vec::new();
    for (name, vip) in [("localhost", VIP), ("gone.invalid", OTHER_VIP)] {
        let tcp = workload::TunnelProtocol::None.into();
        let mut endpoint =
            Workload { uid: format!("entry/{name}"), hostname: name.into(), addresses: Vec::new(), tunnel_protocol: tcp, ..pod(name, VIP) };
        rows.push(service_resource_with(&format!("{name}.test"), vip, &mut endpoint, (80, 8080)));
        rows.push(pod_resource(&endpoint, "1"));
    }
    ground.runtime.block_on(async {
        stream.push(ADDRESS_TYPE, rows, &[]).await;
        stream.acked().await;
    });
    for _ in 0..2 {
        ground.echo((IpAddr::from(VIP), 80)).unwrap();
    }
    assert!(ends_without_a_byte(ground.connect((IpAddr::from(OTHER_VIP), 80)).unwrap()).is_err());
    let refused = || {
        ground.proxy.log().lines().any(|line| {
            line.contains("connection failed") && line.contains("DNS resolution produced no addresses: gone.invalid cannot be resolved: ")
        })
    };
    wait_until("the reason is in the log", refused);
    let (_, page) = ground.proxy.page(15020, "GET /metrics").unwrap();
    for (name, count) in [("localhost", 2), ("gone.invalid", 1)] {
        assert!(
            page.lines().any(|line| line.starts_with("istio_on_demand_dns_total{") && line.ends_with(&format!("hostname=\"{name}\"}} {count}"))),
            "{page}"
        );
    }
}

#[test]
fn an_idle_tunnel_to_a_pod_that_left_the_mesh_is_closed_at_once_and_a_used_one_with_its_last_stream() {
    let ground = Ground::new();
    let mut control = ground.control_plane();
    let mut stream = ground.synced(&mut control);
    ground.wait_until_ready();
    let server: SocketAddr = (IpAddr::from(SERVER), 8080).into();
    let mut live = ground.connect(server).unwrap();
    echo_on(&mut live, b"before").unwrap();
    // What else changes is no reason.
    let push = |stream: &mut ServerStream, changed: Vec<_>, gone: &[&str]| {
        ground.runtime.block_on(async {
            stream.push(ADDRESS_TYPE, changed, gone).await;
            stream.acked().await;
        });
    };
    push(&mut stream, vec![pod_resource(&member("other", [10, 1, 0, 3]), "1")], &[]);
    push(&mut stream, vec![], &["Kubernetes//Pod/shop/other"]);
    assert_eq!(ground.tunnels(), 1);
    push(&mut stream, vec![], &["Kubernetes//Pod/shop/server"]);
    echo_on(&mut live, b"it finishes").unwrap();
    assert_eq!(ground.tunnels(), 1);
    drop(live);
    wait_until("the tunnel ends with its last stream, not after minutes", || ground.tunnels() == 0);
    // Nobody uses this one.
    push(&mut stream, vec![pod_resource(&member("server", SERVER), "2")], &[]);
    wait_until("it is reached again", || ground.echo(server).is_ok());
    wait_until("over a new tunnel", || ground.tunnels() == 1);
    push(&mut stream, vec![], &["Kubernetes//Pod/shop/server"]);
    wait_until("the idle tunnel ends", || ground.tunnels() == 0);
}
