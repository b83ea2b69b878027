#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::sync::Barrier;
use std::time::Duration;

use super::logging::LogFormat;
use super::logging::tests::lines;
use super::*;
use crate::model::{Authority, Baggage, HealthStatus, Locality, Profile, Service, SpiffeId, Workload};

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn workload(name: &str, namespace: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: name.into(),
        name: format!("{name}-0").as_str().into(),
        addresses: Default::default(),
        node: "node".into(),
        hostname: "".into(),
        status: HealthStatus::Healthy,
        capacity: 1,
        profile: Arc::new(Profile {
            namespace: namespace.into(),
            workload_name: name.into(),
            canonical_name: format!("{name}-svc").as_str().into(),
            canonical_revision: "v1".into(),
            service_account: name.into(),
            locality: Locality { region: "r1".into(), ..Locality::default() },
            ..Profile::default()
        }),
    })
}

fn identity(name: &str, namespace: &str) -> Option<SpiffeId> {
    Some(SpiffeId::new("cluster.local", namespace, name).unwrap())
}

/// As the outbound side sees a tunnel to a service.
fn outbound() -> ConnectionFacts {
    ConnectionFacts {
        reporter: Reporter::Source,
        source: PeerFacts {
            identity: identity("curl", "shop"),
            workload: Some(workload("curl", "shop")),
            ..PeerFacts::unknown(address("10.0.0.1:4000"))
        },
        destination: PeerFacts {
            identity: identity("web", "back"),
            workload: Some(workload("web", "back")),
            ..PeerFacts::unknown(address("10.0.0.2:15008"))
        },
        service: Some(Arc::new(Service {
            hostname: "web.back.svc.cluster.local".into(),
            namespace: "back".into(),
            name: "web".into(),
            ..Service::default()
        })),
        hbone_target: Some(Authority::Address(address("10.0.0.2:80").into())),
        mutual_tls: true,
    }
}

/// As the inbound side sees plain TCP from a stranger.
fn inbound_plaintext() -> ConnectionFacts {
    ConnectionFacts {
        reporter: Reporter::Destination,
        source: PeerFacts::unknown(address("[2001:db8::1]:4000")),
        destination: PeerFacts { workload: Some(workload("web", "back")), ..PeerFacts::unknown(address("10.0.0.2:80")) },
        service: None,
        hbone_target: None,
        mutual_tls: false,
    }
}

/// The traffic lines of the page.
fn traffic(telemetry: &Telemetry) -> Vec<String> {
    telemetry
        .metrics_page()
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("istio_tcp_") && line.contains("request_protocol"))
        .map(str::to_owned)
        .collect()
}

fn total(telemetry: &Telemetry, family: &str) -> u64 {
    traffic(telemetry).iter().filter(|line| line.starts_with(family)).map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

const SOURCE: &str = r#"reporter="source",source_workload="curl",source_canonical_service="curl-svc",source_canonical_revision="v1",source_workload_namespace="shop",source_principal="spiffe://cluster.local/ns/shop/sa/curl",source_app="curl-svc",source_version="v1",source_cluster="Kubernetes",destination_service="web.back.svc.cluster.local",destination_service_namespace="back",destination_service_name="web",destination_workload="web",destination_canonical_service="web-svc",destination_canonical_revision="v1",destination_workload_namespace="back",destination_principal="spiffe://cluster.local/ns/back/sa/web",destination_app="web-svc",destination_version="v1",destination_cluster="Kubernetes",request_protocol="tcp",response_flags="-",connection_security_policy="mutual_tls",source_region="r1",source_zone="unknown",destination_region="r1",destination_zone="unknown""#;
const DESTINATION: &str = r#"reporter="destination",source_workload="unknown",source_canonical_service="unknown",source_canonical_revision="unknown",source_workload_namespace="unknown",source_principal="unknown",source_app="unknown",source_version="unknown",source_cluster="unknown",destination_service="unknown",destination_service_namespace="unknown",destination_service_name="unknown",destination_workload="web",destination_canonical_service="web-svc",destination_canonical_revision="v1",destination_workload_namespace="back",destination_principal="spiffe://cluster.local/ns/back/sa/web",destination_app="web-svc",destination_version="v1",destination_cluster="Kubernetes",request_protocol="tcp",response_flags="DENY",connection_security_policy="unknown",source_region="unknown",source_zone="unknown",destination_region="r1",destination_zone="unknown""#;

#[test]
fn a_source_connection_shows_the_complete_labels_in_their_order() {
    let telemetry = Telemetry::default();
    let open = telemetry.opened(outbound());
    open.meter().received(11);
    open.meter().sent(22);
    let live = ["connections_opened_total{SET} 1", "received_bytes_total{SET} 11", "sent_bytes_total{SET} 22"];
    let expect = |lines: &[&str]| lines.iter().map(|line| format!("istio_tcp_{}", line.replace("SET", SOURCE))).collect::<Vec<_>>();
    assert_eq!(traffic(&telemetry), expect(&live), "live counters show at once");
    open.close(ConnectionEnd::default());
    let [opened, received, sent] = live;
    assert_eq!(traffic(&telemetry), expect(&[opened, "connections_closed_total{SET} 1", received, sent]));
}

/// From a captured pod to one outside of the mesh, or to one whose workload takes plain TCP: nobody has shown a certificate.
#[test]
fn without_tls_no_source_has_a_principal_and_no_line_an_identity() {
    let telemetry = Telemetry::default();
    let facts = ConnectionFacts { mutual_tls: false, hbone_target: None, ..outbound() };
    let written = lines(LogFormat::Plain, "", |_| telemetry.opened(facts).close(ConnectionEnd::default()));
    let [line] = written.as_slice() else { panic!("{written:?}") };
    assert!(line.contains("src.workload=\"curl-0\"") && !line.contains("src.identity") && !line.contains("dst.identity"), "{line}");
    let plain = SOURCE.replace("source_principal=\"spiffe://cluster.local/ns/shop/sa/curl\"", "source_principal=\"unknown\"");
    let plain = plain.replace("connection_security_policy=\"mutual_tls\"", "connection_security_policy=\"unknown\"");
    assert!(plain.contains("destination_principal=\"spiffe://cluster.local/ns/back/sa/web\""), "who it ought to be");
    assert_eq!(traffic(&telemetry)[0], format!("istio_tcp_connections_opened_total{{{plain}}} 1"));
}

#[test]
fn a_denied_destination_connection_shows_its_flag_and_counts_as_failed() {
    let telemetry = Telemetry::default();
    telemetry.opened(inbound_plaintext()).close(ConnectionEnd { flag: ResponseFlag::Denied, error: Some("no".into()), policy: None });
    let good = DESTINATION.replace("DENY", "-");
    assert_eq!(
        traffic(&telemetry),
        [
            format!("istio_tcp_connections_opened_total{{{good}}} 1"),
            format!("istio_tcp_connections_closed_total{{{DESTINATION}}} 1"),
            format!("istio_tcp_connections_failed_total{{{DESTINATION}}} 1"),
            format!("istio_tcp_received_bytes_total{{{good}}} 0"),
            format!("istio_tcp_sent_bytes_total{{{good}}} 0"),
        ]
    );
}

#[test]
fn an_unknown_pair_has_no_locality_labels_and_baggage_fills_a_side_that_we_do_not_know() {
    let telemetry = Telemetry::default();
    let mut facts = inbound_plaintext();
    facts.destination.workload = None;
    facts.source.baggage =
        Baggage::parse(["k8s.cluster.name=c2,k8s.namespace.name=far,k8s.pod.name=p,service.name=s,service.version=v9,cloud.region=r"]).map(Box::new);
    facts.mutual_tls = true;
    facts.source.identity = identity("a", "far");
    let _open = telemetry.opened(facts);
    let line = traffic(&telemetry).remove(0);
    let shown = r#"source_workload="p",source_canonical_service="s",source_canonical_revision="v9",source_workload_namespace="far",source_principal="spiffe://cluster.local/ns/far/sa/a",source_app="p",source_version="v9",source_cluster="c2""#;
    assert!(line.contains(shown), "{line}");
    assert!(!line.contains("region"), "{line}");
}

#[test]
fn opened_and_closed_pair_exactly_once_also_on_drop_and_panic() {
    let telemetry = Telemetry::default();
    let written = lines(LogFormat::Plain, "info", |_| {
        drop(telemetry.opened(outbound()));
        let in_panic = telemetry.clone();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let open = in_panic.opened(outbound());
            open.meter().sent(5);
            std::panic::resume_unwind(Box::new("a bug"));
        }));
        assert!(ended.is_err());
        telemetry.opened(outbound()).close(ConnectionEnd::default());
    });
    assert_eq!(total(&telemetry, "istio_tcp_connections_opened"), 3);
    assert_eq!(total(&telemetry, "istio_tcp_connections_closed"), 3);
    assert_eq!(total(&telemetry, "istio_tcp_connections_failed"), 1);
    assert_eq!(total(&telemetry, "istio_tcp_sent_bytes"), 5);
    assert_eq!(written.len(), 3);
    assert!(written[1].starts_with("TIME\terror\t") && written[1].contains("error=\"the task of this connection panicked\""), "{written:?}");
}

#[test]
fn amended_facts_label_further_bytes_and_the_end_pairs_with_the_opening() {
    let telemetry = Telemetry::default();
    let mut open = telemetry.opened(outbound());
    open.meter().sent(1);
    open.amend(|facts| facts.service = None);
    open.meter().sent(10);
    open.close(ConnectionEnd { flag: ResponseFlag::Connect, error: None, policy: None });
    let lines = traffic(&telemetry);
    let value = |family: &str, text: &str| {
        let line = lines.iter().find(|line| line.starts_with(family) && line.contains(text));
        line.map(|line| line.rsplit(' ').next().unwrap().to_owned())
    };
    assert_eq!(value("istio_tcp_sent_bytes", "destination_service_name=\"web\"").as_deref(), Some("1"));
    assert_eq!(value("istio_tcp_connections_closed", "destination_service_name=\"web\"").as_deref(), Some("1"));
    assert_eq!(value("istio_tcp_connections_opened", "destination_service_name=\"unknown\""), None);
    assert_eq!(total(&telemetry, "istio_tcp_sent_bytes"), 11, "{lines:?}");
}

#[test]
fn bytes_of_racing_connections_are_exact_at_close_and_never_go_back() {
    let telemetry = Telemetry::default();
    let barrier = Barrier::new(5);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                barrier.wait();
                for _ in 0..50 {
                    let open = telemetry.opened(outbound());
                    let meter = open.meter();
                    (0..100).for_each(|_| meter.received(3));
                    open.close(ConnectionEnd::default());
                }
            });
        }
        barrier.wait();
        let mut last = 0;
        for _ in 0..50 {
            let now = total(&telemetry, "istio_tcp_received_bytes");
            assert!(now >= last, "{now} < {last}");
            last = now;
        }
    });
    assert_eq!(total(&telemetry, "istio_tcp_received_bytes"), 4 * 50 * 100 * 3);
    assert_eq!(total(&telemetry, "istio_tcp_connections_closed"), 200);
}

#[test]
fn invented_names_cannot_take_more_than_the_series_budget() {
    let telemetry = Telemetry::new(TelemetryConfig { series_budget: 100, ..TelemetryConfig::default() });
    for number in 0..1000 {
        let mut facts = inbound_plaintext();
        facts.source.baggage = Baggage::parse([format!("service.name=evil{number}")]).map(Box::new);
        let open = telemetry.opened(facts);
        open.meter().received(1);
        open.close(ConnectionEnd { flag: ResponseFlag::Denied, error: None, policy: None });
    }
    assert!(traffic(&telemetry).len() <= 100 + 2 * 5, "{} lines", traffic(&telemetry).len());
    for family in ["istio_tcp_connections_opened", "istio_tcp_connections_closed", "istio_tcp_connections_failed", "istio_tcp_received_bytes"] {
        assert_eq!(total(&telemetry, family), 1000, "{family}: nothing is lost");
    }
    assert!(traffic(&telemetry).iter().any(|line| line.contains("source_workload=\"overflow\"") && line.contains("reporter=\"destination\"")));
    let overflowed = telemetry.inner.series.overflowed();
    assert!(overflowed >= 975, "{overflowed}");
    assert!(telemetry.metrics_page().unwrap().contains(&format!("culvert_traffic_series_overflow_total {overflowed}")));
}

#[test]
fn long_names_cannot_take_more_than_the_page_budget() {
    let telemetry = Telemetry::new(TelemetryConfig { page_budget: 100_000, ..TelemetryConfig::default() });
    for number in 0..1000 {
        let mut facts = inbound_plaintext();
        facts.source.baggage = Baggage::parse([format!("service.name={}{number},service.version={0}", "e".repeat(240))]).map(Box::new);
        telemetry.opened(facts).close(ConnectionEnd::default());
    }
    let page = telemetry.metrics_page().unwrap();
    assert!(page.len() < 110_000, "{} bytes", page.len());
}

#[test]
fn label_sets_that_nobody_uses_make_room_when_the_budget_is_used_up() {
    let telemetry = Telemetry::new(TelemetryConfig { series_budget: 8, ..TelemetryConfig::default() });
    let named = |name: &str| {
        let mut facts = inbound_plaintext();
        facts.source.baggage = Baggage::parse([format!("service.name={name}")]).map(Box::new);
        telemetry.opened(facts)
    };
    let kept = named("kept");
    drop(named("idle"));
    drop(named("early"));
    assert_eq!(telemetry.inner.series.overflowed(), 1);
    telemetry.inner.series.age(Duration::from_secs(601));
    drop(named("late"));
    assert_eq!(telemetry.inner.series.overflowed(), 1);
    let page = telemetry.metrics_page().unwrap();
    assert!(page.contains("\"late\"") && page.contains("\"kept\"") && !page.contains("\"idle\""), "{page}");
    drop(kept);
}

#[test]
fn a_full_page_is_written_in_well_under_a_second() {
    let telemetry = Telemetry::default();
    for number in 0..3000 {
        let mut facts = outbound();
        facts.source.workload = None;
        facts.source.baggage = Baggage::parse([format!("service.name=s{number}")]).map(Box::new);
        drop(telemetry.opened(facts));
    }
    let started = std::time::Instant::now();
    let page = telemetry.metrics_page().unwrap();
    let lines = traffic(&telemetry).len();
    println!("{lines} lines, {} bytes, {:?}", page.len(), started.elapsed());
    assert!(lines > 9_000 && lines <= 10_005, "{lines}");
    assert!(page.len() < 11 << 20, "{}", page.len());
}

#[test]
fn the_page_names_the_build_the_process_and_our_own_counters() {
    let telemetry = Telemetry::new(TelemetryConfig { tag: "1.30".into(), ..TelemetryConfig::default() });
    let guard = telemetry.socket_opened(Reporter::Source);
    let other = telemetry.socket_opened(Reporter::Source);
    telemetry.refused_early(&EarlyRefusal {
        direction: Reporter::Destination,
        source: address("10.0.0.1:1"),
        destination: address("10.0.0.2:15008"),
        reason: RefusalReason::Handshake,
        error: "x".into(),
    });
    telemetry.source_lost();
    drop(other);
    let page = telemetry.metrics_page().unwrap();
    for line in [
        "istio_build{component=\"ztunnel\",tag=\"1.30\"} 1\n",
        "# TYPE istio_tcp_sockets_open gauge\n",
        "istio_tcp_sockets_open{reporter=\"source\"} 1\n",
        "culvert_early_refusals_total{reporter=\"destination\",reason=\"handshake\"} 1\n",
        "culvert_source_addresses_lost_total 1\n",
        "\nprocess_open_fds ",
        "\nprocess_max_fds ",
        "\nculvert_log_lines_suppressed_total ",
        "\nculvert_log_lines_dropped_total ",
        "\nculvert_traffic_series_overflow_total 0\n",
        "(unstable)",
    ] {
        assert!(page.contains(line), "{line:?} is missing in\n{page}");
    }
    assert!(!page.contains("istio_tcp_connections_opened"), "families without a series are left out");
    assert!(page.ends_with("# EOF\n"));
    drop(guard);
    assert!(telemetry.metrics_page().unwrap().contains("istio_tcp_sockets_open{reporter=\"source\"} 0\n"));
}

#[tokio::test]
async fn a_watched_runtime_shows_its_workers() {
    let telemetry = Telemetry::default();
    telemetry.watch_runtime(&tokio::runtime::Handle::current());
    let page = telemetry.metrics_page().unwrap();
    assert!(page.contains("tokio_num_workers 1\n") && page.contains("tokio_worker_park_count_total{worker=\"0\"} "), "{page}");
}

fn ended(error: &str) -> ConnectionEnd {
    ConnectionEnd { flag: ResponseFlag::Denied, error: Some(error.into()), policy: Some("back/no-curl".into()) }
}

#[test]
fn plain_access_log_lines_have_the_fields_of_the_reference_in_order() {
    let written = lines(LogFormat::Plain, "debug", |_| {
        access::opened(&outbound());
        access::complete(&outbound(), (84, 15), Duration::from_micros(12_900), &ConnectionEnd::default());
        let mut inbound = outbound();
        inbound.reporter = Reporter::Destination;
        access::complete(&inbound, (84, 15), Duration::ZERO, &ended("connection closed due to policy rejection: explicitly denied by: back/no-curl"));
        access::complete(&inbound_plaintext(), (0, 0), Duration::ZERO, &ConnectionEnd::default());
    });
    let known = r#"src.addr=10.0.0.1:4000 src.workload="curl-0" src.namespace="shop" src.identity="spiffe://cluster.local/ns/shop/sa/curl" src.cluster="Kubernetes" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 dst.service="web.back.svc.cluster.local" dst.workload="web-0" dst.namespace="back" dst.identity="spiffe://cluster.local/ns/back/sa/web" dst.cluster="Kubernetes""#;
    assert_eq!(
        written,
        [
            format!("TIME\tdebug\taccess\tconnection opened\t{known} direction=\"outbound\""),
            format!("TIME\tinfo\taccess\tconnection complete\t{known} direction=\"outbound\" bytes_sent=84 bytes_recv=15 duration=\"12ms\""),
            format!("TIME\terror\taccess\tconnection complete\t{known} direction=\"inbound\" bytes_sent=15 bytes_recv=84 duration=\"0ms\" error=\"connection closed due to policy rejection: explicitly denied by: back/no-curl\" policy=\"back/no-curl\""),
            "TIME\tinfo\taccess\tconnection complete\tsrc.addr=[2001:db8::1]:4000 dst.addr=10.0.0.2:80 dst.workload=\"web-0\" dst.namespace=\"back\" dst.cluster=\"Kubernetes\" direction=\"inbound\" bytes_sent=0 bytes_recv=0 duration=\"0ms\"".to_owned(),
        ]
    );
}

#[test]
fn json_access_log_lines_keep_dotted_names_flat() {
    let written = lines(LogFormat::Json, "", |_| access::complete(&outbound(), (84, 15), Duration::from_millis(3), &ended("no")));
    assert_eq!(
        written,
        [
            r#"{"level":"error","time":"TIME","scope":"access","message":"connection complete","src.addr":"10.0.0.1:4000","src.workload":"curl-0","src.namespace":"shop","src.identity":"spiffe://cluster.local/ns/shop/sa/curl","src.cluster":"Kubernetes","dst.addr":"10.0.0.2:15008","dst.hbone_addr":"10.0.0.2:80","dst.service":"web.back.svc.cluster.local","dst.workload":"web-0","dst.namespace":"back","dst.identity":"spiffe://cluster.local/ns/back/sa/web","dst.cluster":"Kubernetes","direction":"outbound","bytes_sent":84,"bytes_recv":15,"duration":"3ms","error":"no","policy":"back/no-curl"}"#
        ]
    );
}

#[test]
fn a_hostile_peer_writes_one_line_whose_end_still_says_what_happened() {
    let mut facts = outbound();
    facts.hbone_target = Some(Authority::Host("\u{1b}]0;x\r\n".repeat(100_000).into(), 80));
    facts.source.workload = None;
    facts.source.baggage =
        Baggage::parse([format!("service.name=\"{0},k8s.namespace.name={0},k8s.cluster.name={0}", "\\".repeat(250))]).map(Box::new);
    for format in [LogFormat::Plain, LogFormat::Json] {
        let written = lines(format, "", |_| access::complete(&facts, (1, 2), Duration::ZERO, &ended(&"e\n".repeat(10_000))));
        let [line] = written.as_slice() else { panic!("{} lines", written.len()) };
        assert!(line.len() < 2048 && line.contains("bytes_recv") && line.contains("back/no-curl") && !line.contains('\u{1b}'), "{line}");
        assert!(format == LogFormat::Plain || serde_json::from_str::<serde_json::Value>(line).is_ok());
    }
}

#[test]
fn early_refusals_are_one_warning_each_and_at_most_ten_a_second() {
    let telemetry = Telemetry::default();
    let refusal = EarlyRefusal {
        direction: Reporter::Destination,
        source: address("10.0.0.1:4000"),
        destination: address("10.0.0.2:15008"),
        reason: RefusalReason::Loop,
        error: "recursive call\n".into(),
    };
    let written = lines(LogFormat::Plain, "", |_| (0..1000).for_each(|_| telemetry.refused_early(&refusal)));
    assert_eq!(
        written[0],
        "TIME\twarn\taccess\tconnection failed\tsrc.addr=10.0.0.1:4000 dst.addr=10.0.0.2:15008 direction=\"inbound\" error=\"recursive call\\n\""
    );
    // The loop may cross into a second second on a slow machine.
    assert!(written.len() <= 20, "{} lines", written.len());
    assert!(telemetry.metrics_page().unwrap().contains("reason=\"loop\"} 1000\n"));
    let noted = lines(LogFormat::Plain, "", |_| report_suppressed());
    assert!(noted.iter().any(|line| line.contains("log lines suppressed") && line.contains("cause=\"refused: loop\"")), "{noted:?}");
}

#[test]
fn names_that_were_needed_are_counted_for_each_workload_up_to_a_limit() {
    let telemetry = Telemetry::default();
    let needed = |number: usize| {
        let profile = Profile {
            canonical_name: "shop".into(),
            namespace: "default".into(),
            workload_name: format!("shop-{number}").as_str().into(),
            ..Profile::default()
        };
        let workload = Workload { profile: Arc::new(profile), ..(*workload("shop", "default")).clone() };
        telemetry.name_used(&workload, &"db.example".into());
    };
    needed(0);
    needed(0);
    let line = "istio_on_demand_dns_total{source_workload=\"shop-0\",source_canonical_service=\"shop\",source_canonical_revision=\"unknown\",\
        source_workload_namespace=\"default\",source_principal=\"unknown\",source_app=\"shop\",source_version=\"unknown\",\
        source_cluster=\"Kubernetes\",hostname=\"db.example\"} 2\n";
    let page = telemetry.metrics_page().unwrap();
    assert!(page.contains(line), "{line} is not in\n{page}");
    (1..2000).for_each(needed);
    let page = telemetry.metrics_page().unwrap();
    assert_eq!(page.lines().filter(|line| line.starts_with("istio_on_demand_dns_total{")).count(), 1001);
    assert!(page.contains("hostname=\"overflow\"} 1000\n"));
}
