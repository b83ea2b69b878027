//! `culvert control`: its flags, and the assembly of the control plane.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::{duration, logged};
use crate::admin::{self, Readiness};
use crate::control::{self, CaConfig, Debounce, Parts, Signer, Stats, StatsCollector, Tokens};
use crate::discovery::local::{self, LocalSource, ReloadStats};
use crate::identity::LocalIssuer;
use crate::lifecycle::drain::{self, DrainMode, DrainWatcher};
use crate::lifecycle::{Clock, Supervisor};
use crate::sys;
use crate::telemetry::logging::LogFormat;
use crate::telemetry::{Telemetry, TelemetryConfig};

/// Flags and environment of `culvert control`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// File with workloads, services and policies (YAML), as `culvert proxy` reads it from LOCAL_XDS_PATH; followed for changes. A bad new one
    /// changes nothing and is complained about.
    #[arg(long, env = "CULVERT_CONTROL_CONFIG", value_name = "FILE")]
    config: PathBuf,
    /// Directory with ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem, as in Istio's cacerts secret. Whoever can read it can be anybody.
    /// Read again when a file changes; what cannot be used changes nothing and is complained about.
    #[arg(long, env = "CULVERT_CA_DIR", value_name = "DIR")]
    ca_dir: PathBuf,
    /// Makes a new CA there if the directory has none.
    #[arg(long, env = "CULVERT_CREATE_CA")]
    create_ca: bool,
    /// File that says which bearer tokens are accepted, of which node each is and for which identities it gets certificates (YAML: `tokens:` with
    /// `token`, `node`, `identities`, where `node` stands for the node's workloads and `*` for all); read again when it changes.
    #[arg(long, env = "CULVERT_TOKEN_FILE", value_name = "FILE")]
    token_file: PathBuf,
    /// Where xDS and the CA are served, over TLS.
    #[arg(long, env = "CULVERT_CONTROL_LISTEN", default_value = "0.0.0.0:15012", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Host names and addresses by which clients know this server; its certificate has them all.
    #[arg(
        long,
        env = "CULVERT_SERVER_NAMES",
        value_delimiter = ',',
        value_name = "NAME",
        default_value = "istiod.istio-system.svc,istiod.istio-system,istio-pilot.istio-system.svc,localhost,127.0.0.1,::1"
    )]
    server_names: Vec<String>,
    /// Where GET /healthz/ready is answered.
    #[arg(long, env = "CULVERT_CONTROL_READINESS", default_value = "0.0.0.0:15021", value_name = "ADDRESS")]
    readiness: SocketAddr,
    /// Where GET /metrics is answered.
    #[arg(long, env = "CULVERT_CONTROL_METRICS", default_value = "0.0.0.0:15014", value_name = "ADDRESS")]
    metrics: SocketAddr,
    /// A change is told when no other has followed it for this long: a burst becomes one push.
    #[arg(long, env = "CULVERT_DEBOUNCE", default_value = "100ms", value_parser = duration::parse)]
    debounce: Duration,
    /// It is told after this long even if others keep coming.
    #[arg(long, env = "CULVERT_DEBOUNCE_MAX", default_value = "1s", value_parser = duration::parse)]
    debounce_max: Duration,
    /// Streams end after this long ±10 %, and clients connect again: so they spread over replicas.
    #[arg(long, env = "CULVERT_STREAM_AGE", default_value = "30m", value_parser = duration::parse)]
    stream_age: Duration,
    /// Connections at once.
    #[arg(long, env = "CULVERT_MAX_CLIENTS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    max_clients: u32,
    /// Lifetime of a certificate whose request asks for none.
    #[arg(long, env = "DEFAULT_WORKLOAD_CERT_TTL", default_value = "24h", value_parser = duration::parse)]
    default_ttl: Duration,
    /// Longest lifetime that may be asked for.
    #[arg(long, env = "MAX_WORKLOAD_CERT_TTL", default_value = "90d", value_parser = duration::parse)]
    max_ttl: Duration,
    /// Certificate requests per second of one node; bursts may be five times that.
    #[arg(long, env = "CULVERT_CERTIFICATE_RATE", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..1_000_000))]
    certificate_rate: u32,
    /// How long calls under way may take after the signal to stop.
    #[arg(long, env = "CULVERT_CONTROL_DRAIN", default_value = "5s", value_parser = duration::parse)]
    drain: Duration,
    /// Worker threads.
    #[arg(long, env = "CULVERT_CONTROL_THREADS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Log filter, such as `info` or `culvert::control=debug,info`. Who got which certificate is logged under `audit`.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    log: String,
    /// `plain` or `json`.
    #[arg(long, env = "LOG_FORMAT", default_value = "plain", value_parser = ["plain", "json"])]
    log_format: String,
}

/// Runs the control plane until it is told to stop.
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let format = if args.log_format == "json" { LogFormat::Json } else { LogFormat::Plain };
    logged::run(&args.log, format, |_| serve(args))
}

fn serve(args: &Args) -> anyhow::Result<ExitCode> {
    if args.debounce > args.debounce_max {
        bail!("--debounce {:?} must not be longer than --debounce-max {:?}", args.debounce, args.debounce_max);
    }
    if args.default_ttl > args.max_ttl || args.default_ttl.is_zero() {
        bail!("--default-ttl {:?} must be longer than zero and not longer than --max-ttl {:?}", args.default_ttl, args.max_ttl);
    }
    sys::limits::raise_nofile().context("raising the limit of open files")?;
    if let Err(error) = sys::memory::return_while_idle() {
        tracing::warn!("memory of past peaks will be kept while nothing happens: {error}");
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(args.threads.into()).thread_name("culvert-control").enable_all().build()?;
    let outcome = runtime.block_on(Box::pin(live(args)));
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn live(args: &Args) -> anyhow::Result<ExitCode> {
    let readiness = Readiness::new();
    let ready = readiness.register("control plane");
    let telemetry = Telemetry::new(TelemetryConfig { component: "pilot", ..TelemetryConfig::default() });
    let supervisor = Supervisor::new();
    let (trigger, drain) = drain::channel();
    tokio::spawn(admin::serve_readiness(listen(args.readiness).await?, readiness, drained(&drain)));
    tokio::spawn(admin::serve_metrics(listen(args.metrics).await?, telemetry.clone(), drained(&drain)));

    let clock = Clock::system();
    if args.create_ca && !args.ca_dir.join("ca-cert.pem").exists() {
        LocalIssuer::create(&args.ca_dir, &clock)?;
        tracing::info!(directory = %args.ca_dir.display(), "a new CA was made");
    }
    let issuer = Arc::new(Signer::load(&args.ca_dir, clock.clone())?);
    let tokens = Tokens::load(&args.token_file)?;
    let reloads = Arc::new(ReloadStats::default());
    let source = local::Config { stats: reloads.clone(), supervisor: supervisor.clone(), ..local::Config::default() };
    let mesh = local::start(LocalSource::Path(args.config.clone()), source).await?;
    let stats = Arc::new(Stats::default());
    telemetry.registry(|registry| {
        registry.register_collector(Box::new(StatsCollector(stats.clone())));
        registry.register_collector(Box::new(Reloads(reloads)));
    });
    let listener = listen(args.listen).await?;
    let address = listener.local_addr()?;
    let parts = Parts { mesh, issuer, tokens, stats, clock };
    control::start(config(args), parts, listener, &supervisor, &drain)?;
    tracing::info!(%address, names = args.server_names.join(","), config = %args.config.display(), "culvert {} serves xDS and certificates", env!("CARGO_PKG_VERSION"));
    drop(drain);
    ready.ready();

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let reason = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        failed = supervisor.failed() => bail!(failed),
    };
    supervisor.stop();
    tracing::info!(deadline = ?args.drain, "ending, told by {reason}");
    if !trigger.start(DrainMode::Graceful, args.drain).await {
        tracing::warn!("not every client had ended its calls");
    }
    Ok(ExitCode::SUCCESS)
}

fn config(args: &Args) -> control::Config {
    control::Config {
        debounce: Debounce { quiet: args.debounce, longest: args.debounce_max },
        ca: CaConfig {
            default_ttl: args.default_ttl,
            longest_ttl: args.max_ttl,
            per_second: args.certificate_rate,
            burst: args.certificate_rate.saturating_mul(5),
        },
        server_names: args.server_names.clone(),
        connections: args.max_clients.try_into().unwrap_or(usize::MAX),
        longest_stream: args.stream_age,
        ..control::Config::default()
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

fn drained(drain: &DrainWatcher) -> impl Future<Output = ()> + Send + 'static {
    let mut drain = drain.clone();
    async move {
        drain.signaled().await;
    }
}

/// How often the mesh file was read.
#[derive(Debug)]
struct Reloads(Arc<ReloadStats>);

impl Collector for Reloads {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (name, help, value) in [
            ("culvert_static_config_loads", "Contents of the mesh file that were loaded", &self.0.loads),
            ("culvert_static_config_failures", "Contents of the mesh file that were refused", &self.0.failures),
        ] {
            let counter = ConstCounter::new(value.load(Ordering::Relaxed));
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}
