//! What the user typed ([`Args`]) and what it means ([`Settings`]). Names and meaning of the environment variables are the reference's
//! (dataplane §10.1).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};

use super::super::duration;
use super::control_plane::{CaArgs, CaSource, environment, token};
use super::dns::DnsArgs;
use super::mesh_source::{MeshArgs, MeshSource, Oneself};
use super::proxy_config::METADATA_PREFIX;
use super::threads::ThreadArgs;
use crate::discovery::LocalName;
use crate::sys::socket::{Keepalive, Transparency};

/// Flags and environment of `culvert proxy`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// `shared`: one proxy for all pods of the node, told by the CNI over ZDS. `dedicated`: one proxy for one workload, in its own namespace.
    #[arg(long, env = "PROXY_MODE", default_value = "shared", value_parser = ["shared", "dedicated"])]
    mode: String,
    /// `namespace/name/service-account` of the workload; required in dedicated mode.
    #[arg(long, env = "PROXY_WORKLOAD_INFO")]
    workload_info: Option<String>,
    /// Name of this node; workloads of other nodes are not local.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    node_name: String,
    /// Network of this node.
    #[arg(long, env = "NETWORK", default_value = "")]
    network: String,
    /// Name of this cluster.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    cluster_id: String,
    /// The same; wins over CLUSTER_ID.
    #[arg(long, env = "ISTIO_META_CLUSTER_ID")]
    meta_cluster_id: Option<String>,
    /// Node metadata that the control plane is told, KEY=VALUE; may be said more than once. A variable ISTIO_META_KEY=VALUE says the same and wins;
    /// ISTIO_METAJSON_KEY takes JSON. Default: proxyMetadata of PROXY_CONFIG, which is YAML (or JSON) over defaultConfig of the file
    /// ./etc/istio/config/mesh. Its discoveryAddress, proxyAdminPort, statsPort and concurrency are defaults of XDS_ADDRESS, CULVERT_ADMIN_PORT,
    /// CULVERT_STATS_PORT and ZTUNNEL_WORKER_THREADS.
    #[arg(long, value_name = "KEY=VALUE")]
    metadata: Vec<String>,
    /// Name of the proxy's own pod; with POD_NAMESPACE and SERVICE_ACCOUNT, metrics are served over HBONE too.
    #[arg(long, env = "POD_NAME")]
    pod_name: Option<String>,
    /// Namespace of the proxy's own pod.
    #[arg(long, env = "POD_NAMESPACE")]
    pod_namespace: Option<String>,
    /// Service account of the proxy's own pod.
    #[arg(long, env = "SERVICE_ACCOUNT")]
    service_account: Option<String>,
    #[command(flatten)]
    mesh: MeshArgs,
    #[command(flatten)]
    ca: CaArgs,
    #[command(flatten)]
    dns: DnsArgs,
    /// How long workload certificates are valid.
    #[arg(long, env = "SECRET_TTL", default_value = "24h", value_parser = duration::parse)]
    secret_ttl: Duration,
    /// The unix socket on which the CNI speaks ZDS.
    #[arg(long, env = "INPOD_UDS", default_value = "/var/run/ztunnel/ztunnel.sock")]
    inpod_uds: PathBuf,
    /// Set SO_REUSEPORT on the pods' listeners, so that a new proxy can bind beside the old one.
    #[arg(long, env = "INPOD_PORT_REUSE", default_value_t = true, action = clap::ArgAction::Set)]
    inpod_port_reuse: bool,
    /// SO_MARK of every socket in a pod; must equal the CNI's. Default 1337 in shared mode, none in dedicated mode.
    #[arg(long, env = "PACKET_MARK")]
    packet_mark: Option<u32>,
    /// Whether applications see the client's address: `true` must work, `false` never, unset tries.
    #[arg(long, env = "ENABLE_ORIG_SRC")]
    enable_orig_src: Option<bool>,
    /// TCP keepalive on captured and dialled sockets.
    #[arg(long, env = "KEEPALIVE_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    keepalive_enabled: bool,
    /// Silence before the first keepalive probe.
    #[arg(long, env = "KEEPALIVE_TIME", default_value = "180s", value_parser = duration::parse)]
    keepalive_time: Duration,
    /// Time between keepalive probes.
    #[arg(long, env = "KEEPALIVE_INTERVAL", default_value = "180s", value_parser = duration::parse)]
    keepalive_interval: Duration,
    /// Keepalive probes without an answer until a connection is given up.
    #[arg(long, env = "KEEPALIVE_RETRIES", default_value_t = 9)]
    keepalive_retries: u32,
    /// TCP_USER_TIMEOUT = keepalive time + retries × interval.
    #[arg(long, env = "USER_TIMEOUT_ENABLED", default_value_t = false, action = clap::ArgAction::Set)]
    user_timeout_enabled: bool,
    /// Receive window of one HTTP/2 stream, bytes.
    #[arg(long, env = "HTTP2_STREAM_WINDOW_SIZE", default_value_t = 4 << 20, value_parser = clap::value_parser!(u32).range(65_535..=0x7fff_ffff))]
    http2_stream_window_size: u32,
    /// Receive window of one tunnel, bytes; must exceed the stream window.
    #[arg(long, env = "HTTP2_CONNECTION_WINDOW_SIZE", default_value_t = 16 << 20, value_parser = clap::value_parser!(u32).range(65_535..=0x7fff_ffff))]
    http2_connection_window_size: u32,
    /// Largest HTTP/2 frame that is accepted, bytes.
    #[arg(long, env = "HTTP2_FRAME_SIZE", default_value_t = 1 << 20, value_parser = clap::value_parser!(u32).range(16_384..=0x00ff_ffff))]
    http2_frame_size: u32,
    /// Streams that one peer's tunnel may have open at once.
    #[arg(long, env = "CULVERT_MAX_STREAMS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_streams: u32,
    /// Streams opened at once on a pooled tunnel before a sibling is dialled.
    #[arg(long, env = "POOL_MAX_STREAMS_PER_CONNECTION", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    pool_max_streams_per_connection: u16,
    /// A pooled tunnel that no stream used for this long is closed.
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", default_value = "5m", value_parser = duration::parse)]
    pool_unused_release_timeout: Duration,
    /// TLS, HTTP/2 preface and first SETTINGS together must be done by then.
    #[arg(long, env = "CULVERT_HANDSHAKE_DEADLINE", default_value = "10s", value_parser = duration::parse)]
    handshake_deadline: Duration,
    /// A PING is sent after this much time since the last answer.
    #[arg(long, env = "CULVERT_PING_INTERVAL", default_value = "10s", value_parser = duration::parse)]
    ping_interval: Duration,
    /// A PING without an answer for this long means that the peer is dead.
    #[arg(long, env = "CULVERT_PING_TIMEOUT", default_value = "15s", value_parser = duration::parse)]
    ping_timeout: Duration,
    /// How long a TCP connect may take.
    #[arg(long, env = "CULVERT_CONNECT_TIMEOUT", default_value = "10s", value_parser = duration::parse)]
    connect_timeout: Duration,
    /// How long a connection of which one side has finished sending may lie still before it is ended.
    #[arg(long, env = "CULVERT_HALF_CLOSED_TIMEOUT", default_value = "5m", value_parser = duration::parse)]
    half_closed_timeout: Duration,
    /// Connections on this node that have not yet proven who they are.
    #[arg(long, env = "CULVERT_MAX_UNAUTHENTICATED", default_value_t = 512)]
    max_unauthenticated: usize,
    /// The same, from one source address.
    #[arg(long, env = "CULVERT_MAX_UNAUTHENTICATED_PER_SOURCE", default_value_t = 64)]
    max_unauthenticated_per_source: usize,
    /// Dials under way at once on behalf of one peer.
    #[arg(long, env = "CULVERT_MAX_PENDING_DIALS", default_value_t = 64)]
    max_pending_dials: usize,
    /// Dials per second on behalf of one peer to one pod that may come to nothing: they failed, or the request was gone before its answer. Beyond
    /// it requests are refused without a dial. Dials that succeed are not limited: ordinary load is thousands of them.
    #[arg(long, env = "CULVERT_MAX_FAILED_DIALS", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    max_failed_dials: u32,
    /// Bytes that all peers together may send before applications have taken them, beyond 256 KiB of each tunnel.
    #[arg(long, env = "CULVERT_RECEIVE_BUDGET", default_value_t = crate::hbone::Endpoint::RECEIVE_BUDGET)]
    receive_budget: u64,
    /// How long connections may go on after the signal to stop; overrides TERMINATION_GRACE_PERIOD_SECONDS.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", value_parser = duration::parse)]
    connection_termination_deadline: Option<Duration>,
    /// The pod's grace period; the drain takes a little less.
    #[arg(long, env = "TERMINATION_GRACE_PERIOD_SECONDS")]
    termination_grace_period_seconds: Option<u64>,
    #[command(flatten)]
    threads: ThreadArgs,
    /// Use IPv6.
    #[arg(long, env = "IPV6_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    ipv6_enabled: bool,
    /// Serve SOCKS5 (without authentication, CONNECT only) on 127.0.0.1:15080 of each pod: connections asked for there go the way of captured ones.
    #[arg(long, env = "UNSTABLE_ENABLE_SOCKS5", default_value_t = false, action = clap::ArgAction::Set)]
    unstable_enable_socks5: bool,
    /// Reach applications that are told the client by a PROXY header (captured waypoints) on the pod's loopback address.
    #[arg(long, env = "LOCALHOST_APP_TUNNEL", default_value_t = true, action = clap::ArgAction::Set)]
    localhost_app_tunnel: bool,
    /// Send baggage in responses, and believe the baggage of requests (telemetry only).
    #[arg(long, env = "ENABLE_RESPONSE_BAGGAGE", default_value_t = true, action = clap::ArgAction::Set)]
    enable_response_baggage: bool,
    /// `true`: speak TLS 1.2 with peers that speak nothing newer, between proxies; slower. Anything else: TLS 1.3 only.
    #[arg(long, env = "TLS12_ENABLED", default_value = "false")]
    tls12_enabled: String,
    /// `pqc`: only post-quantum key exchange.
    #[arg(long, env = "COMPLIANCE_POLICY", default_value = "", value_parser = ["", "pqc"])]
    compliance_policy: String,
    /// Log policy decisions at INFO instead of DEBUG.
    #[arg(long, env = "AUTHZ_POLICY_INFO_LOGGING", default_value_t = false, action = clap::ArgAction::Set)]
    authz_policy_info_logging: bool,
    /// Log filter, such as `info` or `access=debug,info`.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    log: String,
    /// `plain` or `json`.
    #[arg(long, env = "LOG_FORMAT", default_value = "plain", value_parser = ["plain", "json"])]
    log_format: String,
    /// Version that `istio_build` shows.
    #[arg(long, env = "ISTIO_META_ISTIO_VERSION", default_value = "unknown")]
    istio_version: String,
    /// Port of the admin pages, on loopback only.
    #[arg(long, env = "CULVERT_ADMIN_PORT", default_value_t = 15000)]
    admin_port: u16,
    /// Port of the metrics page.
    #[arg(long, env = "CULVERT_STATS_PORT", default_value_t = 15020)]
    stats_port: u16,
    /// Port of the readiness page.
    #[arg(long, env = "CULVERT_READINESS_PORT", default_value_t = 15021)]
    readiness_port: u16,
    /// Accepted and ignored: charts pass the name of the proxy here.
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    ignored: Vec<String>,
}

/// Which pods this process serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mode {
    /// All pods of the node, told over ZDS.
    Shared,
    /// One workload in the process's own namespace.
    Dedicated(LocalName),
}

/// The checked settings, one part per room.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) mode: Mode,
    pub(super) node_name: String,
    pub(super) own: Option<LocalName>,
    pub(super) source: MeshSource,
    pub(super) ca: CaSource,
    pub(super) crl_path: Option<PathBuf>,
    pub(super) secret_ttl: Duration,
    pub(super) pods: crate::pods::Config,
    pub(super) dns: crate::proxy::dns::Config,
    pub(super) ipv6: bool,
    pub(super) proxy: crate::proxy::Config,
    pub(super) hbone: crate::hbone::Config,
    pub(super) unauthenticated: (usize, usize),
    pub(super) pending_dials: usize,
    pub(super) failed_dials: u32,
    pub(super) receive_budget: u64,
    pub(super) drain: Duration,
    pub(super) workers: usize,
    pub(super) tls12: bool,
    pub(super) pqc: bool,
    pub(super) log: String,
    pub(super) log_json: bool,
    pub(super) istio_version: String,
    pub(super) ports: Ports,
    /// Everything that was set, for `config_dump`.
    pub(super) dump: serde_json::Value,
}

/// Ports of the process's own pages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    pub(super) admin: u16,
    pub(super) stats: u16,
    pub(super) readiness: u16,
}

/// The mark of the reference's CNI (dataplane §1.2).
const DEFAULT_MARK: u32 = 0x539;

impl Args {
    /// Checks what the types cannot, and says which variable is wrong.
    pub(super) fn check(&self) -> anyhow::Result<Settings> {
        let mode = self.proxy_mode()?;
        let pqc = self.compliance_policy == "pqc";
        let mut ca = self.ca.source(&self.cluster_id(), pqc)?;
        let oneself = Oneself {
            node: &self.node_name,
            cluster_id: &self.cluster_id(),
            pod: self.pod_name.as_deref(),
            namespace: self.pod_namespace.as_deref(),
            token: token(self.ca.auth_token.as_deref()),
        };
        let mut source = self.mesh.source(&oneself, &self.named_environment()?)?;
        if self.http2_connection_window_size <= self.http2_stream_window_size {
            bail!("HTTP2_CONNECTION_WINDOW_SIZE must exceed HTTP2_STREAM_WINDOW_SIZE, or one stream that is not read blocks all others");
        }
        let keepalive = self.keepalive_enabled.then_some(Keepalive {
            idle: self.keepalive_time,
            interval: self.keepalive_interval,
            retries: self.keepalive_retries,
        });
        let mark = self.packet_mark.or_else(|| (mode == Mode::Shared).then_some(DEFAULT_MARK)).filter(|mark| *mark != 0);
        if matches!(mode, Mode::Dedicated(_)) {
            // Its pod's rules would bring its own calls back to it.
            source.mark(mark);
            ca.mark(mark);
        }
        let user_timeout = keepalive.as_ref().filter(|_| self.user_timeout_enabled).map(Keepalive::user_timeout);
        Ok(Settings {
            node_name: self.node_name.clone(),
            own: self.own_name(&mode),
            source,
            ca,
            // An empty value is how charts say that there is none.
            crl_path: self.ca.crl_path.clone().filter(|path| !path.as_os_str().is_empty()),
            secret_ttl: self.secret_ttl,
            pods: crate::pods::Config {
                socket: self.inpod_uds.clone(),
                // Listeners are unmarked in dedicated mode (reference, dataplane §1.1).
                mark: mark.filter(|_| mode == Mode::Shared),
                port_reuse: self.inpod_port_reuse && mode == Mode::Shared,
                transparency: match self.enable_orig_src {
                    None => Transparency::Try,
                    Some(true) => Transparency::Must,
                    Some(false) => Transparency::Never,
                },
                keepalive,
                user_timeout,
                ipv6: self.ipv6_enabled,
                services: crate::pods::Services { dns: self.dns.address()?, socks: self.unstable_enable_socks5 },
                drain_deadline: self.drain(),
                ..crate::pods::Config::default()
            },
            dns: self.dns.config(self.ipv6_enabled, mode != Mode::Shared),
            ipv6: self.ipv6_enabled,
            proxy: crate::proxy::Config {
                route: crate::proxy::route::RouteConfig {
                    network: self.network.as_str().into(),
                    socks: self.unstable_enable_socks5,
                    resolved: Vec::new(),
                },
                mark,
                keepalive,
                user_timeout: self.user_timeout_enabled,
                connect_timeout: self.connect_timeout,
                half_closed: self.half_closed_timeout,
                workload_timeout: Duration::from_secs(5),
                baggage: self.enable_response_baggage,
                localhost_app_tunnel: self.localhost_app_tunnel,
                policy_info: self.authz_policy_info_logging,
            },
            hbone: crate::hbone::Config {
                stream_window: self.http2_stream_window_size,
                connection_window: self.http2_connection_window_size,
                frame_size: self.http2_frame_size,
                max_streams: self.max_streams,
                handshake_deadline: self.handshake_deadline,
                ping_interval: self.ping_interval,
                ping_timeout: self.ping_timeout,
                pool_max_streams: self.pool_max_streams_per_connection,
                pool_unused_release: self.pool_unused_release_timeout,
                ..crate::hbone::Config::default()
            },
            unauthenticated: (self.max_unauthenticated, self.max_unauthenticated_per_source),
            pending_dials: self.max_pending_dials,
            failed_dials: self.max_failed_dials,
            receive_budget: self.receive_budget,
            drain: self.drain(),
            workers: self.threads.count()?,
            tls12: self.tls12_enabled == "true",
            pqc,
            log: self.log.clone(),
            log_json: self.log_format == "json",
            istio_version: self.istio_version.clone(),
            ports: Ports { admin: self.admin_port, stats: self.stats_port, readiness: self.readiness_port },
            dump: self.dump(),
            mode,
        })
    }

    fn proxy_mode(&self) -> anyhow::Result<Mode> {
        if self.mode == "shared" {
            return Ok(Mode::Shared);
        }
        let text = self.workload_info.as_deref().context("PROXY_MODE=dedicated needs PROXY_WORKLOAD_INFO=namespace/name/service-account")?;
        let parts: Vec<&str> = text.split('/').collect();
        match parts.as_slice() {
            [namespace, name, account] if parts.iter().all(|part| !part.is_empty()) => {
                Ok(Mode::Dedicated(LocalName { name: (*name).into(), namespace: (*namespace).into(), service_account: (*account).into() }))
            }
            _ => bail!("PROXY_WORKLOAD_INFO is {text:?}: expected namespace/name/service-account"),
        }
    }

    /// `ISTIO_META_CLUSTER_ID` wins (reference, dataplane §10.1).
    fn cluster_id(&self) -> String {
        self.meta_cluster_id.clone().filter(|name| !name.is_empty()).unwrap_or_else(|| self.cluster_id.clone())
    }

    /// The environment, with the metadata that only flags name in front of it.
    fn named_environment(&self) -> anyhow::Result<Vec<(String, String)>> {
        let variables: Vec<_> = environment().collect();
        let mut all = Vec::new();
        for pair in &self.metadata {
            let (name, value) = pair.split_once('=').with_context(|| format!("--metadata {pair}: expected KEY=VALUE"))?;
            let name = format!("{METADATA_PREFIX}{name}");
            if !variables.iter().any(|(variable, _)| *variable == name) {
                all.push((name, value.to_owned()));
            }
        }
        all.extend(variables);
        Ok(all)
    }

    fn own_name(&self, mode: &Mode) -> Option<LocalName> {
        let own = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(crate::model::Text::from);
        let name = LocalName { name: own(&self.pod_name)?, namespace: own(&self.pod_namespace)?, service_account: own(&self.service_account)? };
        (*mode == Mode::Shared).then_some(name)
    }

    /// N − 5 s for a grace period over 10 s, else N − 1 s but at least 1 s; 5 s when nothing is set (reference, dataplane §10.1).
    fn drain(&self) -> Duration {
        match (self.connection_termination_deadline, self.termination_grace_period_seconds) {
            (Some(deadline), _) => deadline,
            (None, Some(grace)) if grace > 10 => Duration::from_secs(grace - 5),
            (None, Some(grace)) => Duration::from_secs(grace.saturating_sub(1).max(1)),
            (None, None) => Duration::from_secs(5),
        }
    }

    fn rest_of_dump(&self) -> serde_json::Value {
        serde_json::json!({
            "proxyMetadata": self.metadata, "numWorkerThreads": self.threads.count().ok(), "localhostAppTunnel": self.localhost_app_tunnel,
            "logFilter": self.log, "authzPolicyInfoLogging": self.authz_policy_info_logging, "istioVersion": self.istio_version,
            "podName": self.pod_name, "podNamespace": self.pod_namespace, "serviceAccount": self.service_account,
            "keepaliveEnabled": self.keepalive_enabled, "keepaliveTime": format!("{:?}", self.keepalive_time),
            "keepaliveInterval": format!("{:?}", self.keepalive_interval), "keepaliveRetries": self.keepalive_retries,
            "userTimeoutEnabled": self.user_timeout_enabled,
            "socks5Addr": self.unstable_enable_socks5.then(|| format!("127.0.0.1:{}", crate::pods::SOCKS_PORT)),
        })
    }

    /// The `config` object of `config_dump`.
    fn dump(&self) -> serde_json::Value {
        let mut dump = serde_json::json!({
            "proxyMode": self.mode, "proxyWorkloadInformation": self.workload_info, "localNode": self.node_name, "network": self.network,
            "clusterId": self.cluster_id(), "inpodUds": self.inpod_uds,
            "inpodPortReuse": self.inpod_port_reuse, "packetMark": self.packet_mark, "requireOriginalSource": self.enable_orig_src,
            "secretTtl": format!("{:?}", self.secret_ttl), "windowSize": self.http2_stream_window_size,
            "connectionWindowSize": self.http2_connection_window_size, "frameSize": self.http2_frame_size, "maxStreams": self.max_streams,
            "poolMaxStreamsPerConn": self.pool_max_streams_per_connection,
            "poolUnusedReleaseTimeout": format!("{:?}", self.pool_unused_release_timeout),
            "handshakeDeadline": format!("{:?}", self.handshake_deadline), "pingInterval": format!("{:?}", self.ping_interval),
            "pingTimeout": format!("{:?}", self.ping_timeout), "connectTimeout": format!("{:?}", self.connect_timeout),
            "halfClosedTimeout": format!("{:?}", self.half_closed_timeout),
            "maxUnauthenticated": self.max_unauthenticated, "maxUnauthenticatedPerSource": self.max_unauthenticated_per_source,
            "maxPendingDials": self.max_pending_dials, "maxFailedDials": self.max_failed_dials, "receiveBudget": self.receive_budget,
            "selfTerminationDeadline": format!("{:?}", self.drain()),
            "ipv6Enabled": self.ipv6_enabled, "enableEnhancedBaggage": self.enable_response_baggage, "tls12Enabled": self.tls12_enabled == "true",
            "compliancePolicy": self.compliance_policy, "logFormat": self.log_format, "adminPort": self.admin_port,
            "statsPort": self.stats_port, "readinessPort": self.readiness_port,
        });
        // In parts, for the macro's sake.
        for part in [self.mesh.dump(), self.ca.dump(), self.dns.dump(), self.rest_of_dump()] {
            if let (Some(all), serde_json::Value::Object(more)) = (dump.as_object_mut(), part) {
                all.extend(more);
            }
        }
        dump
    }
}

#[cfg(test)]
mod tests;
