#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;
use clap::{CommandFactory, Parser};

#[derive(Debug, Parser)]
struct Probe {
    #[command(flatten)]
    args: Args,
}

fn check(line: &[&str]) -> anyhow::Result<Settings> {
    let base = ["proxy", "--local-xds", "{}", "--local-ca-dir", "/ca"];
    Probe::try_parse_from(base.iter().chain(line)).map_err(anyhow::Error::from)?.args.check()
}

#[test]
fn the_drain_ends_before_the_grace_period_does() {
    assert_eq!(check(&[]).unwrap().drain, Duration::from_secs(5));
    assert_eq!(check(&["--termination-grace-period-seconds", "30"]).unwrap().drain, Duration::from_secs(25));
    assert_eq!(check(&["--termination-grace-period-seconds", "10"]).unwrap().drain, Duration::from_secs(9));
    assert_eq!(check(&["--termination-grace-period-seconds", "0"]).unwrap().drain, Duration::from_secs(1));
    assert_eq!(check(&["--connection-termination-deadline", "2m"]).unwrap().drain, Duration::from_secs(120));
}

#[test]
fn extra_positional_arguments_are_ignored() {
    assert!(check(&["ztunnel"]).is_ok());
}

#[test]
fn dedicated_mode_needs_its_workload() {
    assert!(check(&["--mode", "dedicated"]).is_err());
    assert!(check(&["--mode", "dedicated", "--workload-info", "a/b"]).is_err());
    let settings = check(&["--mode", "dedicated", "--workload-info", "ns/pod/account"]).unwrap();
    assert_eq!(settings.mode, Mode::Dedicated(LocalName { name: "pod".into(), namespace: "ns".into(), service_account: "account".into() }));
    assert_eq!(settings.pods.mark, None);
    assert_eq!(settings.proxy.mark, None);
}

#[test]
fn shared_mode_marks_every_socket() {
    let settings = check(&[]).unwrap();
    assert_eq!(settings.pods.mark, Some(0x539));
    assert_eq!(settings.proxy.mark, Some(0x539));
}

#[test]
fn a_connection_window_that_can_deadlock_is_refused() {
    assert!(check(&["--http2-stream-window-size", "1000000", "--http2-connection-window-size", "1000000"]).is_err());
}

/// Variables that are flags of clap, a value that is not the default, and what becomes of it.
type Row = (&'static str, &'static str, fn(&Settings) -> String, &'static str);

fn remote(settings: &Settings) -> &super::super::mesh_source::RemoteMesh {
    let MeshSource::Remote(remote) = &settings.source else { unreachable!("a control plane") };
    remote
}

fn ca(settings: &Settings) -> &crate::grpc::Config {
    let CaSource::Remote(config) = &settings.ca else { unreachable!("a CA") };
    config
}

fn dumped(settings: &Settings, key: &str) -> String {
    settings.dump.get(key).unwrap().to_string()
}

fn rows() -> Vec<Row> {
    vec![
        ("NODE_NAME", "n1", |it| it.node_name.clone(), "n1"),
        ("NETWORK", "east", |it| it.proxy.route.network.to_string(), "east"),
        ("CLUSTER_ID", "c1", |it| format!("{:?}", remote(it).server.headers), "[(\"clusterid\", \"c1\")]"),
        ("ISTIO_META_CLUSTER_ID", "c2", |it| format!("{:?}", ca(it).headers), "[(\"clusterid\", \"c2\")]"),
        ("POD_NAME", "z", |it| remote(it).identity.pod.clone(), "z"),
        ("POD_NAMESPACE", "istio-system", |it| remote(it).identity.namespace.clone(), "istio-system"),
        ("SERVICE_ACCOUNT", "ztunnel", |it| dumped(it, "serviceAccount"), "\"ztunnel\""),
        ("INSTANCE_IP", "10.0.0.9", |it| remote(it).identity.ip.clone(), "10.0.0.9"),
        ("XDS_ADDRESS", "xds.example:1", |it| remote(it).server.address.to_string(), "xds.example:1"),
        ("CA_ADDRESS", "https://ca.example:2", |it| ca(it).address.to_string(), "ca.example:2"),
        ("XDS_ON_DEMAND", "true", |it| format!("{:?}", remote(it).on_demand), "Some(5s)"),
        ("XDS_ROOT_CA", "SYSTEM", |it| format!("{:?}", remote(it).server.roots), "System"),
        ("CA_ROOT_CA", "SYSTEM", |it| format!("{:?}", ca(it).roots), "System"),
        ("ALT_XDS_HOSTNAME", "a.example", |it| format!("{:?}", remote(it).server.alternate_name), "Some(\"a.example\")"),
        ("ALT_CA_HOSTNAME", "b.example", |it| format!("{:?}", ca(it).alternate_name), "Some(\"b.example\")"),
        ("AUTH_TOKEN", "/t", |it| format!("{} {}", remote(it).server.token.is_some(), ca(it).token.is_some()), "true true"),
        ("SECRET_TTL", "1h30m", |it| it.secret_ttl.as_secs().to_string(), "5400"),
        ("LOCAL_XDS_PATH", "/mesh", |it| format!("{:?}", it.source), "Local(Path(\"/mesh\"))"),
        ("LOCAL_XDS", "{}", |it| format!("{:?}", it.source), "Local(Text(\"{}\"))"),
        ("INPOD_UDS", "/z.sock", |it| it.pods.socket.display().to_string(), "/z.sock"),
        ("INPOD_PORT_REUSE", "false", |it| it.pods.port_reuse.to_string(), "false"),
        ("PACKET_MARK", "7", |it| format!("{:?} {:?}", it.pods.mark, it.proxy.mark), "Some(7) Some(7)"),
        ("ENABLE_ORIG_SRC", "true", |it| format!("{:?}", it.pods.transparency), "Must"),
        ("KEEPALIVE_ENABLED", "false", |it| format!("{:?} {:?}", it.pods.keepalive.is_some(), it.proxy.keepalive.is_some()), "false false"),
        ("KEEPALIVE_TIME", "1s", |it| format!("{:?}", it.proxy.keepalive.unwrap().idle), "1s"),
        ("KEEPALIVE_INTERVAL", "2s", |it| format!("{:?}", it.proxy.keepalive.unwrap().interval), "2s"),
        ("KEEPALIVE_RETRIES", "3", |it| format!("{:?}", it.pods.keepalive.unwrap().retries), "3"),
        ("USER_TIMEOUT_ENABLED", "true", |it| format!("{:?} {}", it.pods.user_timeout, it.proxy.user_timeout), "Some(1800s) true"),
        ("HTTP2_STREAM_WINDOW_SIZE", "70000", |it| it.hbone.stream_window.to_string(), "70000"),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "5000000", |it| it.hbone.connection_window.to_string(), "5000000"),
        ("HTTP2_FRAME_SIZE", "20000", |it| it.hbone.frame_size.to_string(), "20000"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "9", |it| it.hbone.pool_max_streams.to_string(), "9"),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "7s", |it| format!("{:?}", it.hbone.pool_unused_release), "7s"),
        ("CONNECTION_TERMINATION_DEADLINE", "9s", |it| format!("{:?} {:?}", it.drain, it.pods.drain_deadline), "9s 9s"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "60", |it| format!("{:?}", it.drain), "55s"),
        ("ZTUNNEL_WORKER_THREADS", "7", |it| it.workers.to_string(), "7"),
        ("ZTUNNEL_CPU_LIMIT", "400", |it| it.workers.to_string(), "100"),
        ("ZTUNNEL_RESOURCE_CPU_LIMIT", "11", |it| it.workers.to_string(), "11"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "900", |it| it.workers.to_string(), "900"),
        ("IPV6_ENABLED", "false", |it| format!("{} {}", it.ipv6, it.pods.ipv6), "false false"),
        ("UNSTABLE_ENABLE_SOCKS5", "true", |it| format!("{} {}", it.pods.services.socks, it.proxy.route.socks), "true true"),
        ("LOCALHOST_APP_TUNNEL", "false", |it| it.proxy.localhost_app_tunnel.to_string(), "false"),
        ("ENABLE_RESPONSE_BAGGAGE", "false", |it| it.proxy.baggage.to_string(), "false"),
        ("CRL_PATH", "/crl", |it| format!("{:?}", it.crl_path), "Some(\"/crl\")"),
        ("TLS12_ENABLED", "true", |it| it.tls12.to_string(), "true"),
        ("COMPLIANCE_POLICY", "pqc", |it| format!("{} {}", it.pqc, ca(it).post_quantum_only), "true true"),
        ("AUTHZ_POLICY_INFO_LOGGING", "true", |it| it.proxy.policy_info.to_string(), "true"),
        ("RUST_LOG", "debug", |it| it.log.clone(), "debug"),
        ("LOG_FORMAT", "json", |it| it.log_json.to_string(), "true"),
        ("ISTIO_META_DNS_CAPTURE", "false", |it| it.pods.services.dns.is_some().to_string(), "false"),
        ("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.9:53", |it| format!("{:?}", it.pods.services.dns), "Some(At(127.0.0.9:53))"),
        ("CLUSTER_DOMAIN", "mesh.example", |it| it.dns.cluster_domain.to_string(), "mesh.example"),
        ("PREFERED_SERVICE_NAMESPACE", "shop", |it| format!("{:?}", it.dns.preferred_namespace), "Some(\"shop\")"),
        ("ISTIO_META_ISTIO_VERSION", "1.30", |it| it.istio_version.clone(), "1.30"),
    ]
}

/// The other variables of the reference (dataplane §10.1) that are settings, and the test that sets them.
const ELSEWHERE: [&str; 6] = [
    "PROXY_MODE",              // dedicated_mode_needs_its_workload
    "PROXY_WORKLOAD_INFO",     // dedicated_mode_needs_its_workload
    "PROXY_CONFIG",            // a_proxy_config_gives_defaults_that_flags_and_variables_override
    "XDS_HEADER_",             // mesh_source: without_a_local_file_the_mesh_comes_from_a_control_plane
    "CA_HEADER_",              // control_plane: variables_with_the_prefix_become_headers
    "KUBERNETES_SERVICE_HOST", // control_plane: within_kubernetes_the_control_plane_is_istiod_and_elsewhere_this_machine
];

/// The same with each variable's flag, which clap lets stand for it: a process's own environment cannot be set beside running threads.
fn with(variable: &str, value: &str) -> anyhow::Result<Settings> {
    let command = Probe::command();
    let arg = command.get_arguments().find(|arg| arg.get_env().is_some_and(|env| env == variable));
    let flag = arg.and_then(|arg| arg.get_long()).with_context(|| format!("{variable} is no setting"))?;
    let flag = format!("--{flag}");
    Probe::try_parse_from(["proxy", &flag, value])?.args.check()
}

#[test]
fn every_variable_of_the_reference_has_its_effect() {
    for (variable, value, effect, expected) in rows() {
        let settings = with(variable, value).unwrap_or_else(|error| panic!("{variable}={value}: {error:#}"));
        assert_eq!(effect(&settings), expected, "{variable}={value}");
        let unset = Probe::try_parse_from(["proxy"]).unwrap().args.check().unwrap();
        let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| effect(&unset) != expected)).unwrap_or(true);
        assert!(changed, "{variable}: the effect is there without it");
    }
}

#[test]
fn variables_that_are_not_set_have_the_defaults_of_the_reference() {
    let it = Probe::try_parse_from(["proxy"]).unwrap().args.check().unwrap();
    let server = &remote(&it).server;
    for (variable, actual, expected) in [
        ("XDS_ADDRESS", server.address.to_string(), super::super::control_plane::default_address().trim_start_matches("https://").to_owned()),
        ("CA_ADDRESS", ca(&it).address.to_string(), super::super::control_plane::default_address().trim_start_matches("https://").to_owned()),
        ("XDS_ROOT_CA", server.roots.to_string(), "in ./var/run/secrets/istio/root-cert.pem".to_owned()),
        ("CA_ROOT_CA", ca(&it).roots.to_string(), "in ./var/run/secrets/istio/root-cert.pem".to_owned()),
        ("PROXY_MODE", format!("{:?}", it.mode), "Shared".to_owned()),
        ("NODE_NAME", it.node_name.clone(), String::new()),
        ("NETWORK", it.proxy.route.network.to_string(), String::new()),
        ("CLUSTER_ID", format!("{:?}", server.headers), "[(\"clusterid\", \"Kubernetes\")]".to_owned()),
        ("CLUSTER_DOMAIN", it.dns.cluster_domain.clone(), "cluster.local".to_owned()),
        ("PREFERED_SERVICE_NAMESPACE", format!("{:?}", it.dns.preferred_namespace), "None".to_owned()),
        ("XDS_ON_DEMAND", format!("{:?}", remote(&it).on_demand), "None".to_owned()),
        ("SECRET_TTL", format!("{:?}", it.secret_ttl), "86400s".to_owned()),
        ("INPOD_UDS", it.pods.socket.display().to_string(), "/var/run/ztunnel/ztunnel.sock".to_owned()),
        ("INPOD_PORT_REUSE", it.pods.port_reuse.to_string(), "true".to_owned()),
        ("PACKET_MARK", format!("{:?} {:?}", it.pods.mark, it.proxy.mark), "Some(1337) Some(1337)".to_owned()),
        ("ENABLE_ORIG_SRC", format!("{:?}", it.pods.transparency), "Try".to_owned()),
        ("KEEPALIVE_*", format!("{:?}", it.proxy.keepalive), format!("{:?}", Some(Keepalive::default()))),
        (
            "KEEPALIVE_TIME, KEEPALIVE_INTERVAL",
            format!("{:?}", Keepalive::default()),
            "Keepalive { idle: 180s, interval: 180s, retries: 9 }".to_owned(),
        ),
        ("USER_TIMEOUT_ENABLED", format!("{} {:?}", it.proxy.user_timeout, it.pods.user_timeout), "false None".to_owned()),
        (
            "HTTP2_*",
            format!("{} {} {}", it.hbone.stream_window, it.hbone.connection_window, it.hbone.frame_size),
            "4194304 16777216 1048576".to_owned(),
        ),
        ("POOL_*", format!("{} {:?}", it.hbone.pool_max_streams, it.hbone.pool_unused_release), "100 300s".to_owned()),
        ("TERMINATION_GRACE_PERIOD_SECONDS", format!("{:?} {:?}", it.drain, it.pods.drain_deadline), "5s 5s".to_owned()),
        ("IPV6_ENABLED", format!("{} {} {}", it.ipv6, it.pods.ipv6, it.dns.ipv6), "true true true".to_owned()),
        ("UNSTABLE_ENABLE_SOCKS5", format!("{} {}", it.pods.services.socks, it.proxy.route.socks), "false false".to_owned()),
        ("LOCALHOST_APP_TUNNEL", it.proxy.localhost_app_tunnel.to_string(), "true".to_owned()),
        ("ENABLE_RESPONSE_BAGGAGE", it.proxy.baggage.to_string(), "true".to_owned()),
        ("CRL_PATH", format!("{:?}", it.crl_path), "None".to_owned()),
        ("TLS12_ENABLED, COMPLIANCE_POLICY", format!("{} {}", it.tls12, it.pqc), "false false".to_owned()),
        ("AUTHZ_POLICY_INFO_LOGGING", it.proxy.policy_info.to_string(), "false".to_owned()),
        ("RUST_LOG, LOG_FORMAT", format!("{} {}", it.log, it.log_json), "info false".to_owned()),
        ("ISTIO_META_DNS_*", format!("{:?}", it.pods.services.dns), "Some(Loopback(15053))".to_owned()),
        ("proxyAdminPort, statsPort", format!("{} {}", it.ports.admin, it.ports.stats), "15000 15020".to_owned()),
    ] {
        assert_eq!(actual, expected, "{variable}");
    }
}

#[test]
fn every_variable_of_the_reference_is_a_setting_or_ignored_for_a_reason() {
    const README: &str = include_str!("../../../../README.md");
    let ignored = README.split_once("### Ignored environment variables").unwrap().1.split_once("\n## ").unwrap().0;
    let own: Vec<String> = Probe::command().get_arguments().filter_map(|arg| Some(arg.get_env()?.to_str()?.to_owned())).collect();
    for variable in REFERENCE.split_whitespace() {
        let is_set = own.iter().any(|name| name == variable) || ELSEWHERE.contains(&variable);
        let is_ignored = ignored.lines().any(|line| line.starts_with("| `") && line.contains(&format!("`{variable}`")));
        assert!(is_set || is_ignored, "{variable} is neither a setting nor in the README's list of ignored ones");
    }
    let tested: Vec<&str> = rows().iter().map(|row| row.0).chain(ELSEWHERE).collect();
    for variable in own.iter().filter(|name| REFERENCE.split_whitespace().any(|known| known == name.as_str())) {
        let is_ignored = ignored.contains(&format!("`{variable}`"));
        assert!(tested.contains(&variable.as_str()) || is_ignored, "{variable} has no test");
    }
}

/// The first column of the table in dataplane §10.1, and what the chart passes beside it.
const REFERENCE: &str = "
    ENABLE_PROXY PROXY_MODE PROXY_WORKLOAD_INFO NODE_NAME NETWORK CLUSTER_ID CLUSTER_DOMAIN INSTANCE_IP POD_NAME POD_NAMESPACE SERVICE_ACCOUNT
    TRUST_DOMAIN XDS_ADDRESS CA_ADDRESS XDS_ON_DEMAND XDS_ROOT_CA CA_ROOT_CA ALT_XDS_HOSTNAME ALT_CA_HOSTNAME AUTH_TOKEN SECRET_TTL FAKE_CA
    LOCAL_XDS_PATH LOCAL_XDS XDS_HEADER_ CA_HEADER_ PREFERED_SERVICE_NAMESPACE INPOD_UDS INPOD_PORT_REUSE PACKET_MARK ENABLE_ORIG_SRC
    KEEPALIVE_ENABLED KEEPALIVE_TIME KEEPALIVE_INTERVAL KEEPALIVE_RETRIES USER_TIMEOUT_ENABLED HTTP2_STREAM_WINDOW_SIZE
    HTTP2_CONNECTION_WINDOW_SIZE HTTP2_FRAME_SIZE POOL_MAX_STREAMS_PER_CONNECTION POOL_UNUSED_RELEASE_TIMEOUT CONNECTION_TERMINATION_DEADLINE
    TERMINATION_GRACE_PERIOD_SECONDS ZTUNNEL_WORKER_THREADS ZTUNNEL_CPU_LIMIT ZTUNNEL_RESOURCE_CPU_LIMIT ZTUNNEL_RESOURCE_CPU_REQUEST
    IPV6_ENABLED UNSTABLE_ENABLE_SOCKS5 LOCALHOST_APP_TUNNEL ENABLE_RESPONSE_BAGGAGE CRL_PATH TLS12_ENABLED COMPLIANCE_POLICY
    AUTHZ_POLICY_INFO_LOGGING RUST_LOG LOG_FORMAT ISTIO_META_ISTIO_VERSION ISTIO_META_CLUSTER_ID ISTIO_META_DNS_CAPTURE
    ISTIO_META_DNS_PROXY_ADDR PROXY_CONFIG KUBERNETES_SERVICE_HOST INPOD_ENABLED";

#[test]
fn a_proxy_config_gives_defaults_that_flags_and_variables_override() {
    use clap::FromArgMatches;
    let config: super::super::ProxyConfig = serde_saphyr::from_str(
        "{discoveryAddress: 'd.example:1', proxyAdminPort: 1, statsPort: 2, concurrency: 3,
          proxyMetadata: {ISTIO_META_CLUSTER_ID: c9, ISTIO_META_ISTIO_VERSION: 1.99.0, TEAM: blue, ANSWER: 42}}",
    )
    .unwrap();
    let check = |line: &[&str]| {
        let matches = config.defaults(Probe::command()).try_get_matches_from(["proxy"].iter().chain(line)).unwrap();
        Probe::from_arg_matches(&matches).unwrap().args.check().unwrap()
    };
    let settings = check(&[]);
    assert_eq!(remote(&settings).server.address.to_string(), "d.example:1");
    assert_eq!((settings.ports.admin, settings.ports.stats, settings.workers, settings.istio_version.as_str()), (1, 2, 3, "1.99.0"));
    assert_eq!(ca(&settings).headers, [("clusterid".to_owned(), "c9".to_owned())]);
    let told = |name: &str| remote(&settings).identity.metadata.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    assert_eq!((told("TEAM"), told("ANSWER"), told("CLUSTER_ID")), (Some("blue".into()), Some("42".into()), Some("c9".into())));
    let line = ["--xds-address", "x.example:9", "--stats-port", "8", "--worker-threads", "7", "--meta-cluster-id", "c1"];
    let settings = check(&line);
    assert_eq!(remote(&settings).server.address.to_string(), "x.example:9");
    assert_eq!((settings.ports.admin, settings.ports.stats, settings.workers), (1, 8, 7));
    assert_eq!(ca(&settings).headers, [("clusterid".to_owned(), "c1".to_owned())]);
    assert!(Probe::try_parse_from(["proxy", "--metadata", "x"]).unwrap().args.check().is_err());
}
