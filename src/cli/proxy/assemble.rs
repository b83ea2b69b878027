//! The assembly of the data plane: builds the rooms from the settings, announces them, waits for the end, drains.
//!
//! Two runtimes, as in the reference (dataplane §1.1): one thread for state, certificates and pages, a pool of workers for traffic, so that a
//! slow scrape cannot delay a connection. Readiness runs on the workers on purpose: it answers only while they do.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::control_plane::CaSource;
use super::mesh_source::MeshSource;
use super::settings::{Mode, Settings};
use super::workers::Workers;
use crate::admin::{self, AdminSources, Readiness, ReadyToken};
use crate::cli::logged;
use crate::discovery::local::{self, ReloadStats};
use crate::discovery::{LocalName, Mesh, xds};
use crate::forward;
use crate::grpc::Dialer;
use crate::hbone::{Endpoint, ReceiveBudget};
use crate::identity::{self, Credentials, Issuer, LocalIssuer, RemoteIssuer, Revocations};
use crate::lifecycle::drain::{self, DrainMode, DrainTrigger, DrainWatcher};
use crate::lifecycle::{Clock, PermitLimits, Permits, Supervisor};
use crate::pods::{self, Pod, PodListeners, PodRunner, PodsView, RunningPod};
use crate::proxy::dns::Dns;
use crate::proxy::{ConnectionTable, Departures, FailedDials, HostNames, Node, PodProxy, PodSockets, prefetch_certificates, serve_own_tunnel};
use crate::sys;
use crate::telemetry::logging::{LogFormat, LogHandle};
use crate::telemetry::{Telemetry, TelemetryConfig};

/// Runs until a signal or the admin page ends it.
pub(super) fn run(settings: Settings) -> anyhow::Result<ExitCode> {
    let format = if settings.log_json { LogFormat::Json } else { LogFormat::Plain };
    let filter = settings.log.clone();
    logged::run(&filter, format, |log| serve(settings, log))
}

fn serve(settings: Settings, log: &LogHandle) -> anyhow::Result<ExitCode> {
    let (_, nofile) = sys::limits::raise_nofile().context("raising the limit of open files")?;
    if settings.mode == Mode::Shared {
        sys::netns::check_may_enter().context("shared mode enters the network namespaces of pods")?;
        settings.pods.mark.map_or(Ok(()), sys::socket::check_may_mark).context("shared mode marks its sockets")?;
    }
    // Without its thread, memory that was freed goes back to the kernel only while more is asked for: never, on an idle node.
    if let Err(error) = sys::memory::return_while_idle() {
        tracing::warn!("memory of past peaks will be kept while the proxy is idle: {error}");
    }
    if settings.tls12 && settings.pqc {
        tracing::warn!("TLS12_ENABLED has no effect with COMPLIANCE_POLICY=pqc: there is no post-quantum key exchange in TLS 1.2");
    }
    let data = Workers::start(settings.workers)?;
    let desk = tokio::runtime::Builder::new_current_thread().thread_name("culvert-desk").enable_all().build()?;
    tracing::info!(mode = ?settings.mode, node = settings.node_name, workers = settings.workers, nofile, "culvert {} starts", env!("CARGO_PKG_VERSION"));
    let outcome = desk.block_on(Box::pin(live(settings, log.clone(), data.handle())));
    data.stop();
    outcome
}

/// The whole life of the process.
async fn live(settings: Settings, log: LogHandle, data: &Handle) -> anyhow::Result<ExitCode> {
    let readiness = Readiness::new();
    let [proxy_ready, state_ready] = ["proxy", "state manager"].map(|task| readiness.register(task));
    let telemetry = Telemetry::new(TelemetryConfig { tag: settings.istio_version.clone(), ..TelemetryConfig::default() });
    telemetry.watch_runtime(data);
    let supervisor = Supervisor::new();
    supervisor.supervise("buffers", give_back_buffers());

    let reloads = Arc::new(ReloadStats::default());
    let mesh = mesh(&settings, (&telemetry, &supervisor), &reloads, state_ready).await?;
    let credentials = credentials(&settings, &supervisor)?;
    telemetry.registry(|registry| registry.register_collector(credentials.collector()));
    if settings.mode == Mode::Shared {
        // A dedicated proxy may ask for its own workload's certificate only, and the others of its node are none of its business.
        supervisor.supervise("certificate prefetch", prefetch_certificates(mesh.clone(), credentials.clone()));
    }

    let (unauthenticated, per_source) = settings.unauthenticated;
    let node = Arc::new(Node {
        config: settings.proxy.clone(),
        hbone: Arc::new(Endpoint {
            budget: ReceiveBudget::new(settings.receive_budget),
            revocations: credentials.revocations(),
            ..Endpoint::new(settings.hbone.clone())
        }),
        mesh: mesh.clone(),
        credentials: credentials.clone(),
        host_names: HostNames::new(settings.ipv6),
        telemetry: telemetry.clone(),
        unauthenticated: Permits::new(PermitLimits { total: unauthenticated, per_key: per_source }),
        dials: Permits::new(PermitLimits { total: usize::MAX, per_key: settings.pending_dials }),
        failed_dials: FailedDials::new(settings.failed_dials),
        departures: Departures::follow(&mesh),
    });
    let dns = settings.pods.services.dns.map(|_| telemetry.registry(|registry| Dns::new(settings.dns.clone(), registry)));
    let dns_ready = dns.as_ref().map(|_| readiness.register("dns proxy"));
    let (trigger, drain) = drain::channel();
    let pods = match &settings.mode {
        Mode::Shared => Pods::Many(start_shared(&settings, (&node, dns), (data, &drain), (&supervisor, &readiness))),
        Mode::Dedicated(name) => Pods::One(name.clone(), start_dedicated(&settings, (&node, dns), name, (data, &drain))?),
    };
    telemetry.registry(|registry| registry.register_collector(Box::new(Counts { pods: pods.view(), reloads })));
    if let Some(name) = settings.own.clone() {
        start_own_tunnel(&settings, &node, name, (data, &drain))?;
    }

    let quit = Arc::new(Notify::new());
    start_pages(&settings, (&telemetry, &readiness), dump(&settings, &mesh, &credentials, pods), (log, quit.clone(), data, &drain)).await?;
    drop(drain);
    proxy_ready.ready();
    if let Some(token) = dns_ready {
        token.ready();
    }
    wait_and_drain(&settings, trigger, &quit, supervisor).await
}

/// Waits for a reason to end, then lets connections finish.
async fn wait_and_drain(settings: &Settings, trigger: DrainTrigger, quit: &Notify, supervisor: Supervisor) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let reason = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        () = quit.notified() => "the admin page",
        failed = supervisor.failed() => {
            // A node that lost one of its tasks looks alive and is not: whoever restarts us does it better than half a process.
            anyhow::bail!(failed);
        }
    };
    supervisor.stop();
    tracing::info!(deadline = ?settings.drain, "draining, told by {reason}");
    // Pods keep the deadline themselves; the extra second lets them record what they cut.
    let drained = trigger.start(DrainMode::Graceful, settings.drain + std::time::Duration::from_secs(1));
    tokio::select! {
        drained = drained => if drained { tracing::info!("drained") } else { tracing::warn!("not everything ended with the drain") },
        _ = interrupt.recv() => {
            tracing::warn!("interrupted again, ending at once");
            return Ok(ExitCode::from(130));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The mesh, from where the settings say; `ready` when the first of it is there.
async fn mesh(
    settings: &Settings,
    (telemetry, supervisor): (&Telemetry, &Supervisor),
    reloads: &Arc<ReloadStats>,
    ready: ReadyToken,
) -> anyhow::Result<Mesh> {
    let remote = match &settings.source {
        MeshSource::Local(source) => {
            let node = Some(settings.node_name.as_str()).filter(|name| !name.is_empty()).map(Into::into);
            let config = local::Config { node, stats: reloads.clone(), supervisor: supervisor.clone(), ..local::Config::default() };
            let mesh = local::start(source.clone(), config).await?;
            ready.ready();
            return Ok(mesh);
        }
        MeshSource::Remote(remote) => remote,
    };
    let server = &remote.server;
    tracing::info!(server = %server.address, token = ?server.token, roots = %server.roots, on_demand = ?remote.on_demand, "the mesh comes from a control plane");
    let dialer = Dialer::new(server.clone())?;
    let config = xds::Config { on_demand: remote.on_demand, supervisor: supervisor.clone(), ..xds::Config::new(dialer, remote.identity.clone()) };
    telemetry.registry(|registry| config.stats.register(registry));
    let (mesh, mut synced) = xds::start(config);
    tokio::spawn(async move {
        if synced.wait_for(|synced| *synced).await.is_err() {
            // A token that is dropped counts as ready, and there never was a first state.
            return std::future::pending().await;
        }
        ready.ready();
    });
    Ok(mesh)
}

fn credentials(settings: &Settings, supervisor: &Supervisor) -> anyhow::Result<Credentials> {
    let issuer: Arc<dyn Issuer> = match &settings.ca {
        CaSource::Local(directory) => Arc::new(LocalIssuer::load(directory, Clock::system())?),
        CaSource::Remote(config) => {
            tracing::info!(ca = %config.address, token = ?config.token, roots = %config.roots, "certificates come from a CA");
            Arc::new(RemoteIssuer::new(Dialer::new((**config).clone())?, settings.mode == Mode::Shared))
        }
    };
    let revocations = settings.crl_path.clone().map(|path| {
        let (revocations, reading) = Revocations::open(path);
        supervisor.supervise("revocation lists", reading);
        revocations
    });
    let config = identity::Config {
        ttl: settings.secret_ttl,
        revocations,
        post_quantum_only: settings.pqc,
        tls12: settings.tls12,
        ..identity::Config::default()
    };
    let (credentials, renewal) = Credentials::new(config, issuer, Clock::system());
    supervisor.supervise("certificate renewal", renewal);
    Ok(credentials)
}

/// What is served.
enum Pods {
    Many(PodsView),
    One(LocalName, Arc<ConnectionTable>),
}

impl Pods {
    fn view(&self) -> Option<PodsView> {
        match self {
            Self::Many(view) => Some(view.clone()),
            Self::One(..) => None,
        }
    }

    /// `workloadState` of the config dump.
    fn dump(&self) -> serde_json::Value {
        match self {
            Self::Many(view) => view.dump(),
            Self::One(name, connections) => {
                let info = serde_json::json!({ "name": name.name, "namespace": name.namespace, "serviceAccount": name.service_account });
                let state = serde_json::json!({ "state": "Up", "connections": connections.dump(), "info": info });
                serde_json::json!({ (name.name.to_string()): state })
            }
        }
    }
}

/// Makes a [`PodProxy`] of each pod that the agent names.
struct Runner {
    node: Arc<Node>,
    dns: Option<Arc<Dns>>,
    process: DrainWatcher,
}

impl PodRunner for Runner {
    fn start(&self, pod: Pod, listeners: PodListeners) -> RunningPod {
        let (trigger, drain) = drain::channel();
        let name = LocalName { name: pod.name.into(), namespace: pod.namespace.into(), service_account: pod.service_account.into() };
        let sockets = PodSockets::new(Some(listeners.netns.clone()), listeners.transparent, &self.node.config);
        let proxy = PodProxy::new(self.node.clone(), name, sockets, self.process.clone());
        let proxy = start_pod(&proxy, listeners, self.dns.as_ref(), &drain);
        RunningPod::new(trigger, Arc::new(move || proxy.dump()))
    }
}

fn start_pod(proxy: &Arc<PodProxy>, listeners: PodListeners, dns: Option<&Arc<Dns>>, drain: &DrainWatcher) -> Arc<ConnectionTable> {
    proxy.serve_outbound(listeners.outbound, drain.clone());
    proxy.serve_plaintext(listeners.plaintext, drain.clone());
    proxy.serve_hbone(listeners.hbone, drain.clone());
    if let (Some(sockets), Some(dns)) = (listeners.dns, dns) {
        proxy.serve_dns(sockets, dns, drain);
    }
    if let Some(listener) = listeners.socks {
        proxy.serve_socks(listener, dns, drain.clone());
    }
    proxy.connections().clone()
}

fn start_shared(
    settings: &Settings,
    (node, dns): (&Arc<Node>, Option<Arc<Dns>>),
    (data, drain): (&Handle, &DrainWatcher),
    (supervisor, readiness): (&Supervisor, &Readiness),
) -> PodsView {
    let token = readiness.register("workload proxy manager");
    let (client, view) = pods::Client::new(settings.pods.clone(), Arc::new(Runner { node: node.clone(), dns, process: drain.clone() }));
    let mut ready = view.ready();
    data.spawn(async move {
        loop {
            if *ready.borrow_and_update() {
                token.ready()
            } else {
                token.rearm()
            }
            if ready.changed().await.is_err() {
                return;
            }
        }
    });
    let task = data.spawn(client.run(drain.clone()));
    let mut told = drain.clone();
    supervisor.supervise("pods", async move {
        let outcome = task.await;
        if told.mode().is_some() {
            // Told to end: the drain waits for us, not the supervisor.
            drop(told);
            return std::future::pending().await;
        }
        match outcome {
            Ok(Err(error)) => tracing::error!("{error}"),
            Ok(Ok(())) => told.forced().await,
            Err(error) => tracing::error!("{error}"),
        }
    });
    view
}

fn start_dedicated(
    settings: &Settings,
    (node, dns): (&Arc<Node>, Option<Arc<Dns>>),
    name: &LocalName,
    (data, drain): (&Handle, &DrainWatcher),
) -> anyhow::Result<Arc<ConnectionTable>> {
    let _runtime = data.enter();
    let own = sys::netns::NetNs::current()?;
    let listeners = pods::open_listeners(&own, &settings.pods)?;
    let sockets = PodSockets::new(None, listeners.transparent, &node.config);
    let proxy = PodProxy::new(node.clone(), name.clone(), sockets, drain.clone());
    Ok(start_pod(&proxy, listeners, dns.as_ref(), &drained_with_the_process(settings, drain)))
}

/// Buffers that no worker has needed for a second go back to the allocator, also those of workers that have nothing to do.
async fn give_back_buffers() {
    loop {
        tokio::time::sleep(forward::TRIM_INTERVAL).await;
        forward::trim();
    }
}

/// A watcher of a drain that begins with the process's and keeps the deadline; the process's own gives a second more, in which connections that
/// were cut are recorded.
fn drained_with_the_process(settings: &Settings, process: &DrainWatcher) -> DrainWatcher {
    let (trigger, drain) = drain::channel();
    let (deadline, mut process) = (settings.drain, process.clone());
    tokio::spawn(async move {
        let mode = process.signaled().await;
        if !trigger.start(mode, deadline).await {
            tracing::warn!(?deadline, "connections were cut at the end of the drain");
        }
    });
    drain
}

fn start_own_tunnel(settings: &Settings, node: &Arc<Node>, name: LocalName, (data, drain): (&Handle, &DrainWatcher)) -> anyhow::Result<()> {
    let options = sys::socket::ListenOptions { keepalive: None, ..sys::socket::ListenOptions::default() };
    let address = sys::socket::wildcard(crate::hbone::PORT, settings.ipv6);
    let listener = sys::socket::listen_tcp(address, &options).context("the proxy's own HBONE listener")?;
    let _runtime = data.enter();
    serve_own_tunnel(node, name, listener.socket, (drained_with_the_process(settings, drain), drain.clone()))?;
    Ok(())
}

type Dump = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// The page of `config_dump` (reference, dataplane §10.2).
fn dump(settings: &Settings, mesh: &Mesh, credentials: &Credentials, pods: Pods) -> Dump {
    let (mesh, credentials, config) = (mesh.clone(), credentials.clone(), settings.dump.clone());
    let version = version(&settings.istio_version);
    Arc::new(move || {
        let mut page = mesh.dump();
        if let Some(page) = page.as_object_mut() {
            page.insert("config".into(), config.clone());
            page.insert("version".into(), version.clone());
            page.insert("certificates".into(), serde_json::json!(credentials.dump()));
            page.insert("workloadState".into(), pods.dump());
        }
        page
    })
}

/// What was built, and how. Whoever builds a release sets the two variables that cargo does not know.
fn version(istio: &str) -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("CULVERT_GIT_REVISION").unwrap_or("unknown"),
        "rustVersion": option_env!("CULVERT_RUST_VERSION").unwrap_or("unknown"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "buildStatus": if option_env!("CULVERT_GIT_REVISION").is_some() { "Clean" } else { "unknown" },
        "istioVersion": istio,
        "cryptoProvider": "aws-lc",
    })
}

async fn start_pages(
    settings: &Settings,
    (telemetry, readiness): (&Telemetry, &Readiness),
    config_dump: Dump,
    (log, quit, data, drain): (LogHandle, Arc<Notify>, &Handle, &DrainWatcher),
) -> anyhow::Result<()> {
    let sources = AdminSources { config_dump, log, shutdown: Arc::new(move || quit.notify_one()) };
    for listener in admin::listen_loopback(settings.ports.admin, settings.ipv6).await? {
        tokio::spawn(admin::serve_admin(listener, sources.clone(), drained(drain)));
    }
    let listener = listen(settings.ports.stats, settings.ipv6, "metrics")?;
    tokio::spawn(admin::serve_metrics(listener, telemetry.clone(), drained(drain)));
    let _runtime = data.enter();
    let listener = listen(settings.ports.readiness, settings.ipv6, "readiness")?;
    tokio::spawn(admin::serve_readiness(listener, readiness.clone(), drained(drain)));
    Ok(())
}

fn drained(drain: &DrainWatcher) -> impl Future<Output = ()> + Send + 'static {
    let mut drain = drain.clone();
    async move {
        drain.signaled().await;
    }
}

fn listen(port: u16, ipv6: bool, what: &'static str) -> anyhow::Result<TcpListener> {
    let options = sys::socket::ListenOptions { transparent: sys::socket::Transparency::Never, ..sys::socket::ListenOptions::default() };
    let listener = sys::socket::listen_tcp(sys::socket::wildcard(port, ipv6), &options).with_context(|| format!("the {what} page"))?;
    Ok(TcpListener::from_std(listener.socket)?)
}

/// Counts that other rooms keep in plain atomics.
#[derive(Debug)]
struct Counts {
    pods: Option<PodsView>,
    reloads: Arc<ReloadStats>,
}

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut counter = |name: &str, help: &str, value: u64| {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
        };
        counter("culvert_static_config_loads", "Contents of the static configuration that were loaded", self.reloads.loads.load(Ordering::Relaxed))?;
        let failures = self.reloads.failures.load(Ordering::Relaxed);
        counter("culvert_static_config_failures", "Contents of the static configuration that were refused", failures)?;
        let Some(pods) = &self.pods else { return Ok(()) };
        let stats = pods.stats();
        counter("workload_manager_proxies_started", "Pods whose service began (unstable)", stats.started.load(Ordering::Relaxed))?;
        counter("workload_manager_proxies_stopped", "Pods whose service ended (unstable)", stats.stopped.load(Ordering::Relaxed))?;
        for (name, help, value) in [
            ("workload_manager_active_proxy_count", "Pods being served (unstable)", &stats.active),
            ("workload_manager_pending_proxy_count", "Pods that cannot be served yet (unstable)", &stats.pending),
        ] {
            let gauge = ConstGauge::new(i64::try_from(value.load(Ordering::Relaxed)).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
