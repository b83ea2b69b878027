#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{self, Write};
use std::sync::mpsc;
use std::time::Instant;

use tracing::{Level, event, info, info_span};

use super::*;

/// A sink that tests can read.
#[derive(Clone, Default)]
pub(in crate::telemetry) struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `tracing` decides by the calling thread alone what a call site logs as long as it knows one subscriber only. Tests run side by
/// side, and most have none; two idle ones that live for ever make it ask all of them.
fn several_subscribers() {
    static IDLE: std::sync::OnceLock<[tracing::Dispatch; 2]> = std::sync::OnceLock::new();
    IDLE.get_or_init(|| [tracing::Dispatch::new(Registry::default()), tracing::Dispatch::new(Registry::default())]);
}

/// [`super::build`] for a test.
fn build(config: LogConfig) -> Result<(impl Subscriber + Send + Sync, LogHandle), TelemetryError> {
    several_subscribers();
    super::build(config)
}

/// The lines that `work` logs, each with a well-formed time replaced by `TIME`.
pub(in crate::telemetry) fn lines(format: LogFormat, filter: &str, work: impl FnOnce(&LogHandle)) -> Vec<String> {
    let sink = Captured::default();
    let config = LogConfig { format, filter: filter.into(), sink: Box::new(sink.clone()), ..LogConfig::default() };
    let (subscriber, handle) = build(config).unwrap();
    tracing::subscriber::with_default(subscriber, || work(&handle));
    assert!(handle.flush(Duration::from_secs(5)));
    let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines()
        .map(|line| {
            let at = if format == LogFormat::Plain { 0 } else { line.find("\"time\":\"").unwrap() + 8 };
            let time = &line[at..at + 27];
            let shape: String = time.chars().map(|character| if character.is_ascii_digit() { '0' } else { character }).collect();
            assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
            line.replacen(time, "TIME", 1)
        })
        .collect()
}

fn some_events(_: &LogHandle) {
    let span = info_span!("inbound", id = %"7f", peer = "10.0.0.1:5", late = tracing::field::Empty);
    let _entered = span.enter();
    span.record("late", 3);
    info!(target: "culvert::proxy::inbound", number = 7, ok = true, text = "a \"b\"", address = %"10.0.0.2:80", "it {}", "happened");
    event!(target: "h2", Level::WARN, "no fields");
    event!(target: "culvert::pods", Level::DEBUG, "filtered out");
}

#[test]
fn plain_lines_have_five_columns() {
    assert_eq!(
        lines(LogFormat::Plain, "info", some_events),
        [
            "TIME\tinfo\tproxy::inbound:inbound{id=7f peer=\"10.0.0.1:5\" late=3}\tit happened\tnumber=7 ok=true text=\"a \\\"b\\\"\" address=10.0.0.2:80",
            "TIME\twarn\th2:inbound{id=7f peer=\"10.0.0.1:5\" late=3}\tno fields\t",
        ]
    );
}

#[test]
fn json_lines_have_level_time_scope_fields_and_spans() {
    assert_eq!(
        lines(LogFormat::Json, "info", some_events),
        [
            r#"{"level":"info","time":"TIME","scope":"proxy::inbound","message":"it happened","number":7,"ok":true,"text":"a \"b\"","address":"10.0.0.2:80","inbound":{"id":"7f","peer":"10.0.0.1:5","late":3}}"#,
            r#"{"level":"warn","time":"TIME","scope":"h2","message":"no fields","inbound":{"id":"7f","peer":"10.0.0.1:5","late":3}}"#,
        ]
    );
}

#[test]
fn whatever_a_value_holds_it_stays_one_short_line() {
    let megabyte = "x".repeat(1 << 20);
    let hostile = "\r\n2026-01-01T00:00:00.000000Z\tinfo\taccess\tforged\u{1b}[2J";
    for format in [LogFormat::Plain, LogFormat::Json] {
        let written = lines(format, "info", |_| {
            event!(Level::INFO, a = megabyte.as_str(), b = %megabyte, c = hostile, d = %hostile, e = "the end", "{hostile}{megabyte}");
        });
        let [line] = written.as_slice() else { panic!("{} lines", written.len()) };
        assert!(line.len() < 2048, "{} bytes", line.len());
        assert!(line.contains("the end"), "the last field is lost");
        assert!(!line.contains(['\u{1b}', '\r']), "{line}");
        if format == LogFormat::Json {
            assert!(serde_json::from_str::<serde_json::Value>(line).unwrap()["d"].as_str().unwrap().starts_with("\r\n2026"));
        } else {
            assert_eq!(line.matches('\t').count(), 4, "{line}");
        }
    }
}

#[test]
fn a_line_that_cannot_fit_is_cut_and_json_stays_json() {
    let long = "x".repeat(500);
    let long = long.as_str();
    for format in [LogFormat::Plain, LogFormat::Json] {
        let written = lines(format, "info", |_| {
            event!(
                Level::INFO,
                a = long,
                b = long,
                c = long,
                d = long,
                e = long,
                f = long,
                g = long,
                h = long,
                i = long,
                j = long,
                k = long,
                l = long,
                m = long,
                n = long,
                o = long,
                p = long,
                q = long,
                r = long,
                s = long,
                t = long,
                u = long,
                v = long,
                w = long,
                x = long,
                "much"
            );
        });
        let [line] = written.as_slice() else { panic!("{} lines", written.len()) };
        assert!(line.len() < 2048);
        assert!(format == LogFormat::Plain || serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
    }
}

#[test]
fn the_filter_changes_while_the_log_runs_and_resets() {
    let written = lines(LogFormat::Plain, "warn", |handle| {
        let log = |text| event!(target: "culvert::discovery", Level::INFO, "{text}");
        log("hidden");
        handle.change("discovery=info").unwrap();
        log("shown");
        assert_eq!(handle.filter(), "discovery=info,hickory_server::server=off,warn");
        assert!(handle.change("discovery=loud").is_err());
        log("still shown");
        handle.reset("").unwrap();
        log("hidden again");
        handle.reset("info").unwrap();
        log("shown again");
        assert_eq!(handle.filter(), "hickory_server::server=off,info");
    });
    let messages: Vec<&str> = written.iter().map(|line| line.split('\t').nth(3).unwrap()).collect();
    assert_eq!(messages, ["shown", "still shown", "shown again"]);
}

/// A pipe whose reader has stalled: a write ends when the test lets it.
struct Stalled {
    entered: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
    sink: Captured,
}

impl Write for Stalled {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.entered.send(());
        let _ = self.go_on.recv();
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stalled_reader_costs_lines_and_never_time() {
    let (entered_sender, entered) = mpsc::channel();
    let (go_on_sender, go_on) = mpsc::channel();
    let sink = Captured::default();
    let stalled = Stalled { entered: entered_sender, go_on, sink: sink.clone() };
    let (subscriber, handle) = build(LogConfig { queue: 100, sink: Box::new(stalled), ..LogConfig::default() }).unwrap();
    let before = writer::dropped_lines();
    tracing::subscriber::with_default(subscriber, || {
        info!("first");
        entered.recv().unwrap();
        let started = Instant::now();
        for _ in 0..1000 {
            info!("more");
        }
        assert!(started.elapsed() < Duration::from_secs(2), "logging waited for the reader");
    });
    assert!(writer::dropped_lines() >= before + 900);
    assert!(!handle.flush(Duration::from_millis(50)), "flush must give up on a stalled reader");
    drop(go_on_sender);
    assert!(handle.flush(Duration::from_secs(5)), "the writer must go on when the reader does");
    assert_eq!(String::from_utf8(sink.0.lock().unwrap().clone()).unwrap().lines().count(), 101);
}

/// A pipe whose reader is gone for some time.
struct Closed(Arc<Mutex<bool>>, Captured);

impl Write for Closed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if *self.0.lock().unwrap() { Err(io::ErrorKind::BrokenPipe.into()) } else { self.1.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_closed_pipe_or_full_disk_costs_lines_until_it_is_open_again() {
    let (closed, sink) = (Arc::new(Mutex::new(true)), Captured::default());
    let config = LogConfig { sink: Box::new(Closed(Arc::clone(&closed), sink.clone())), ..LogConfig::default() };
    let (subscriber, handle) = build(config).unwrap();
    let before = writer::dropped_lines();
    tracing::subscriber::with_default(subscriber, || {
        info!("lost");
        assert!(handle.flush(Duration::from_secs(5)));
        *closed.lock().unwrap() = false;
        info!("kept");
        assert!(handle.flush(Duration::from_secs(5)));
    });
    assert!(writer::dropped_lines() > before);
    let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
    assert!(text.contains("kept") && !text.contains("lost"), "{text}");
}
