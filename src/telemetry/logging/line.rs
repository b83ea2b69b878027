//! One event as one line, plain or JSON (reference, dataplane §10.5), always a single line of at most 2 KiB, whatever a peer put
//! into it (reference, craft-and-trust A14).
//!
//! Control characters, line breaks and everything else that does not print (escape codes, bidirectional overrides) are escaped.
//! A line that would be too long is written again with shorter values, so that the fields at its end, which say how a
//! connection ended, are still there.

use std::fmt::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::{Level, Metadata};

/// Bytes of a line, with its line break.
pub(super) const MAX_LINE: usize = 2048;
/// Most bytes of one value, tried in this order until the line fits.
const VALUE_LIMITS: [usize; 3] = [1536, 384, 96];

/// How lines look (`LOG_FORMAT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Five columns separated by tabs: time, level, scope, message, fields.
    #[default]
    Plain,
    /// One JSON object with the keys `level`, `time`, `scope`, then the fields, then one key per span.
    Json,
}

/// The fields of a span, already in the form of the log.
pub(super) struct SpanText {
    pub(super) name: &'static str,
    pub(super) fields: String,
}

/// What a line is made of.
pub(super) struct Line<'a> {
    pub(super) format: LogFormat,
    pub(super) time: SystemTime,
    pub(super) metadata: &'a Metadata<'a>,
    /// From the root inwards.
    pub(super) spans: &'a [SpanText],
}

impl Line<'_> {
    /// The line with its line break. `record` visits the fields of the event; it may be called more than once.
    pub(super) fn write(&self, record: impl Fn(&mut dyn Visit)) -> String {
        let mut line = String::new();
        for limit in VALUE_LIMITS {
            let mut fields = Fields::new(self.format, limit);
            record(&mut fields);
            line = match self.format {
                LogFormat::Plain => self.plain(&fields),
                LogFormat::Json => self.json(&fields),
            };
            if line.len() <= MAX_LINE {
                return line;
            }
        }
        // Only an event with dozens of long fields gets here.
        match self.format {
            LogFormat::Plain => cut(&mut line, MAX_LINE - 1),
            LogFormat::Json => line = self.json_rest(),
        }
        line.push('\n');
        line
    }

    fn plain(&self, fields: &Fields) -> String {
        let mut line = String::with_capacity(256 + fields.text.len());
        push_time(&mut line, self.time);
        line.push('\t');
        line.push_str(level(self.metadata.level()));
        line.push('\t');
        line.push_str(scope(self.metadata.target()));
        for span in self.spans {
            line.push(':');
            line.push_str(span.name);
            if !span.fields.is_empty() {
                line.push('{');
                line.push_str(&span.fields);
                line.push('}');
            }
        }
        line.push('\t');
        line.push_str(&fields.message);
        line.push('\t');
        line.push_str(&fields.text);
        line.push('\n');
        line
    }

    fn json(&self, fields: &Fields) -> String {
        let mut line = self.json_head();
        if !fields.message.is_empty() {
            line.push_str(",\"message\":");
            line.push_str(&fields.message);
        }
        if !fields.text.is_empty() {
            line.push(',');
            line.push_str(&fields.text);
        }
        for span in self.spans {
            line.push(',');
            push_text(&mut line, span.name, Escape::Json, MAX_LINE);
            line.push_str(":{");
            line.push_str(&span.fields);
            line.push('}');
        }
        line.push_str("}\n");
        line
    }

    fn json_head(&self) -> String {
        let mut line = String::with_capacity(512);
        line.push_str("{\"level\":\"");
        line.push_str(level(self.metadata.level()));
        line.push_str("\",\"time\":\"");
        push_time(&mut line, self.time);
        line.push_str("\",\"scope\":");
        push_text(&mut line, scope(self.metadata.target()), Escape::Json, 256);
        line
    }

    /// What remains of a JSON line that cannot be made to fit.
    fn json_rest(&self) -> String {
        self.json_head() + ",\"message\":\"a log line was too long\"}"
    }
}

/// Writes fields in the form of the log: `k=v k=v`, or `"k":v,"k":v`.
pub(super) struct Fields {
    format: LogFormat,
    limit: usize,
    message: String,
    pub(super) text: String,
}

impl Fields {
    pub(super) fn new(format: LogFormat, limit: usize) -> Self {
        Self { format, limit, message: String::new(), text: String::new() }
    }

    /// The fields of a span; they are written once, so they get the middle limit.
    pub(super) fn of_span(format: LogFormat) -> Self {
        let [_, limit, _] = VALUE_LIMITS;
        Self::new(format, limit)
    }

    fn key(&mut self, field: &Field) {
        match self.format {
            LogFormat::Plain => {
                if !self.text.is_empty() {
                    self.text.push(' ');
                }
                self.text.push_str(field.name());
                self.text.push('=');
            }
            LogFormat::Json => {
                if !self.text.is_empty() {
                    self.text.push(',');
                }
                push_text(&mut self.text, field.name(), Escape::Json, 256);
                self.text.push(':');
            }
        }
    }

    fn number(&mut self, field: &Field, number: impl fmt::Display) {
        self.key(field);
        // invariant: writing to a String cannot fail
        let _ = write!(self.text, "{number}");
    }

    fn text(&mut self, field: &Field, plain: Escape, value: impl fmt::Display) {
        let escape = if self.format == LogFormat::Json { Escape::Json } else { plain };
        if field.name() == "message" {
            self.message.clear();
            let escape = if escape == Escape::Json { escape } else { Escape::Bare };
            return push_text(&mut self.message, value, escape, self.limit);
        }
        self.key(field);
        push_text(&mut self.text, value, escape, self.limit);
    }
}

/// Prints a value by its `Debug`, which for `%value` is its `Display`.
struct Debugged<'a>(&'a dyn fmt::Debug);

impl fmt::Display for Debugged<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, Escape::Quoted, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, Escape::Bare, Debugged(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.number(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.number(field, value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.number(field, value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.number(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.number(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() { self.number(field, value) } else { self.text(field, Escape::Bare, value) }
    }
}

/// How a value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    /// As it is, but for what does not print.
    Bare,
    /// In quotes.
    Quoted,
    /// As a JSON string.
    Json,
}

/// Appends a value, escaped, and cut to `limit` bytes with `…` at the end.
fn push_text(line: &mut String, value: impl fmt::Display, escape: Escape, limit: usize) {
    if escape != Escape::Bare {
        line.push('"');
    }
    let mut writer = Escaping { line, escape, left: limit, cut: false };
    // An error says that the limit was reached, or that the value cannot print itself: what it wrote so far is what we have.
    let _ = write!(writer, "{value}");
    if writer.cut {
        line.push('…');
    }
    if escape != Escape::Bare {
        line.push('"');
    }
}

struct Escaping<'a> {
    line: &'a mut String,
    escape: Escape,
    left: usize,
    cut: bool,
}

impl Write for Escaping<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let before = self.line.len();
            self.push(character);
            let used = self.line.len() - before;
            if used > self.left {
                self.line.truncate(before);
                self.cut = true;
                return Err(fmt::Error);
            }
            self.left -= used;
        }
        Ok(())
    }
}

impl Escaping<'_> {
    fn push(&mut self, character: char) {
        match (character, self.escape) {
            (' '..='!' | '#'..='[' | ']'..='~', _) => self.line.push(character),
            ('"' | '\\', Escape::Bare) => self.line.push(character),
            ('"' | '\\', _) => {
                self.line.push('\\');
                self.line.push(character);
            }
            ('\n', _) => self.line.push_str("\\n"),
            ('\r', _) => self.line.push_str("\\r"),
            ('\t', _) => self.line.push_str("\\t"),
            // One character that stays as it is has nothing to hide.
            _ if character.escape_debug().count() == 1 => self.line.push(character),
            (_, Escape::Json) => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // invariant: writing to a String cannot fail
                    let _ = write!(self.line, "\\u{unit:04x}");
                }
            }
            _ => self.line.extend(character.escape_unicode()),
        }
    }
}

/// Cuts at a character boundary.
fn cut(line: &mut String, limit: usize) {
    let end = (0..=limit).rev().find(|end| line.is_char_boundary(*end)).unwrap_or(0);
    line.truncate(end);
}

fn level(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// The target without the name of this crate.
fn scope(target: &str) -> &str {
    target.strip_prefix("culvert::").unwrap_or(target)
}

/// RFC 3339 in UTC with microseconds, such as `2026-11-21T01:02:03.000004Z`.
fn push_time(line: &mut String, time: SystemTime) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // invariant: writing to a String cannot fail
    let _ = write!(line, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros());
}

/// Year, month and day of a number of days since 1970, by eras of 400 years that begin in March (Hinnant's algorithm).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (0, month + 3) } else { (1, month - 9) };
    (year_of_era + era * 400 + year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_print_as_rfc_3339_with_microseconds() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000001Z"),
            (951_782_399, "2000-02-28T23:59:59.000001Z"),
            (951_782_400, "2000-02-29T00:00:00.000001Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000001Z"),
            (1_795_223_045, "2026-11-21T01:04:05.000001Z"),
        ] {
            let mut line = String::new();
            push_time(&mut line, UNIX_EPOCH + std::time::Duration::new(seconds, 1_000));
            assert_eq!(line, text);
        }
    }

    #[test]
    fn nothing_that_does_not_print_survives() {
        let hostile = "a\u{1b}[31m\r\n\t\u{202e}\u{0}\u{7f}\u{9b}\u{2028}\"\\é";
        let mut bare = String::new();
        push_text(&mut bare, hostile, Escape::Bare, 1000);
        assert_eq!(bare, "a\\u{1b}[31m\\r\\n\\t\\u{202e}\\u{0}\\u{7f}\\u{9b}\\u{2028}\"\\é");
        let mut json = String::new();
        push_text(&mut json, hostile, Escape::Json, 1000);
        assert_eq!(serde_json::from_str::<String>(&json).ok().as_deref(), Some(hostile));
        assert!(json.chars().all(|character| !character.is_control()));
    }

    #[test]
    fn a_value_is_cut_at_its_limit_and_says_so() {
        let mut text = String::new();
        push_text(&mut text, "ééé", Escape::Quoted, 5);
        assert_eq!(text, "\"éé…\"");
    }
}
