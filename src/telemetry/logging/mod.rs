//! The log of the process: lines as in the reference (dataplane §10.5), a filter that can be changed while it runs, and a writer
//! that never makes anybody wait ([`writer`](self) says why).

mod filter;
mod line;
mod writer;

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Registry, reload};

use filter::Filter;
use line::{Fields, Line, SpanText};
use writer::LineSender;

pub use line::LogFormat;

use super::TelemetryError;

/// Settings of the log.
pub struct LogConfig {
    /// Plain or JSON (`LOG_FORMAT`).
    pub format: LogFormat,
    /// Filter (`RUST_LOG`), applied over `hickory_server::server=off,info`; also what a reset goes back to.
    pub filter: String,
    /// Lines that wait for the writer; more are dropped and counted. Default 10,000 as in the reference: at most 20 MiB.
    pub queue: usize,
    /// Where lines go. Default standard output.
    pub sink: Box<dyn Write + Send>,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Plain, filter: String::new(), queue: 10_000, sink: Box::new(std::io::stdout()) }
    }
}

impl fmt::Debug for LogConfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, filter, queue, sink: _ } = self;
        formatter.debug_struct("LogConfig").field("format", format).field("filter", filter).field("queue", queue).finish_non_exhaustive()
    }
}

/// Changes the filter of a running log, and flushes it. A clone is a reference count.
#[derive(Clone)]
pub struct LogHandle {
    inner: Arc<Control>,
}

struct Control {
    initial: Filter,
    current: Mutex<Filter>,
    reload: reload::Handle<Targets, Registry>,
    sender: LineSender,
}

impl LogHandle {
    /// The filter in force, such as `hickory_server::server=off,info`.
    #[must_use]
    pub fn filter(&self) -> String {
        self.inner.current.lock().unwrap_or_else(PoisonError::into_inner).to_string()
    }

    /// Applies `level` (see [`LogConfig::filter`]) over the filter in force.
    pub fn change(&self, level: &str) -> Result<(), TelemetryError> {
        self.apply(level, false)
    }

    /// Goes back to the filter of the start, then applies `level`, which may be empty.
    pub fn reset(&self, level: &str) -> Result<(), TelemetryError> {
        self.apply(level, true)
    }

    fn apply(&self, level: &str, reset: bool) -> Result<(), TelemetryError> {
        let mut current = self.inner.current.lock().unwrap_or_else(PoisonError::into_inner);
        let base = if reset { &self.inner.initial } else { &*current };
        let wanted = base.with(level)?;
        // Fails only when the log itself is gone, and then nobody sees a difference.
        let _ = self.inner.reload.reload(wanted.targets());
        *current = wanted;
        Ok(())
    }

    /// Waits until every line so far is written, at most `patience`; `false` when it gave up. Call it before the process ends.
    pub fn flush(&self, patience: Duration) -> bool {
        self.inner.sender.flush(patience)
    }
}

impl fmt::Debug for LogHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("LogHandle").field("filter", &self.filter()).finish_non_exhaustive()
    }
}

/// Sets up the log of this process; once.
pub fn init(config: LogConfig) -> Result<LogHandle, TelemetryError> {
    let (subscriber, handle) = assemble(config, true)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| TelemetryError::LogAlreadySetUp)?;
    Ok(handle)
}

/// A log that is not the process's: for a part of a test, or of a tool.
pub fn build(config: LogConfig) -> Result<(impl Subscriber + Send + Sync, LogHandle), TelemetryError> {
    assemble(config, false)
}

fn assemble(config: LogConfig, process: bool) -> Result<(impl Subscriber + Send + Sync, LogHandle), TelemetryError> {
    let initial = Filter::default().with(&config.filter)?;
    let sender = writer::start(config.queue, config.sink, process)?;
    let (filter, reload) = reload::Layer::new(initial.targets());
    let subscriber = Registry::default().with(filter).with(LogLayer { format: config.format, sender: sender.clone() });
    let control = Control { current: Mutex::new(initial.clone()), initial, reload, sender };
    Ok((subscriber, LogHandle { inner: Arc::new(control) }))
}

/// Turns events into lines.
struct LogLayer {
    format: LogFormat,
    sender: LineSender,
}

/// What a span keeps for the lines of its events.
struct SpanFields(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::of_span(self.format);
        attributes.record(&mut fields);
        span.extensions_mut().insert(SpanFields(fields.text));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        let Some(SpanFields(text)) = extensions.get_mut::<SpanFields>() else { return };
        let mut fields = Fields::of_span(self.format);
        fields.text = std::mem::take(text);
        values.record(&mut fields);
        *text = fields.text;
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut spans = Vec::new();
        for span in context.event_scope(event).into_iter().flat_map(tracing_subscriber::registry::Scope::from_root) {
            let fields = span.extensions().get::<SpanFields>().map(|fields| fields.0.clone()).unwrap_or_default();
            spans.push(SpanText { name: span.name(), fields });
        }
        let line = Line { format: self.format, time: SystemTime::now(), metadata: event.metadata(), spans: &spans };
        self.sender.send(line.write(|fields| event.record(fields)));
    }
}

/// Counters of the log itself.
#[derive(Debug)]
pub(super) struct LogCollector;

impl Collector for LogCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, value) in [
            ("culvert_log_lines_suppressed", "Log lines suppressed by a rate limit", super::rate_limit::suppressed_lines()),
            ("culvert_log_lines_dropped", "Log lines dropped because the reader of the log was too slow or gone", writer::dropped_lines()),
        ] {
            let mut counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            counter.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;
