//! Which lines are written: a default level and levels of scopes, as `RUST_LOG` and `POST /logging?level=` say it.
//!
//! A scope is what a log line shows as its scope: a room (`discovery`), a part of one (`discovery::local`), `access`, or the name of
//! another crate (`h2`). Span and field filters of `RUST_LOG` are refused rather than half understood.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::telemetry::TelemetryError;

/// Most scopes in one filter, and most bytes of a scope: the admin page feeds this.
const MAX_SCOPES: usize = 64;
const MAX_SCOPE_BYTES: usize = 128;

/// A default level and exceptions from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    default: LevelFilter,
    scopes: BTreeMap<String, LevelFilter>,
}

impl Default for Filter {
    /// `info`, without the chatter of the DNS library (reference, dataplane §10.2).
    fn default() -> Self {
        Self { default: LevelFilter::INFO, scopes: BTreeMap::from([("hickory_server::server".to_owned(), LevelFilter::OFF)]) }
    }
}

impl Filter {
    /// This filter with the entries of `text` applied in order; nothing changes when any of them is invalid.
    pub(super) fn with(&self, text: &str) -> Result<Self, TelemetryError> {
        let mut filter = self.clone();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let refuse = |reason| TelemetryError::Filter { entry: entry.chars().take(80).collect(), reason };
            match entry.split_once('=') {
                None => filter.default = level(entry).ok_or_else(|| refuse("that is not a level"))?,
                Some((scope, wanted)) => {
                    let scope = scope.trim();
                    let wanted = level(wanted.trim()).ok_or_else(|| refuse("what follows '=' is not a level"))?;
                    let plausible = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':' | b'-' | b'.');
                    if scope.is_empty() || scope.len() > MAX_SCOPE_BYTES || !scope.bytes().all(plausible) {
                        return Err(refuse("what precedes '=' is not a scope"));
                    }
                    filter.scopes.insert(scope.to_owned(), wanted);
                    if filter.scopes.len() > MAX_SCOPES {
                        return Err(refuse("too many scopes"));
                    }
                }
            }
        }
        Ok(filter)
    }

    /// The same as `tracing` understands it: a scope also stands for the module of that name in this crate.
    pub(super) fn targets(&self) -> Targets {
        let mut targets = Targets::new().with_default(self.default);
        for (scope, level) in &self.scopes {
            targets = targets.with_target(scope.clone(), *level);
            if !scope.starts_with("culvert") {
                targets = targets.with_target(format!("culvert::{scope}"), *level);
            }
        }
        targets
    }
}

fn level(word: &str) -> Option<LevelFilter> {
    let known = ["error", "warn", "info", "debug", "trace", "off"].iter().any(|level| word.eq_ignore_ascii_case(level));
    LevelFilter::from_str(word).ok().filter(|_| known)
}

impl fmt::Display for Filter {
    /// In the form that [`Filter::with`] reads.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (scope, level) in &self.scopes {
            write!(formatter, "{scope}={level},")?;
        }
        write!(formatter, "{}", self.default)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tracing::Level;

    use super::*;

    #[test]
    fn levels_and_scopes_apply_in_order_and_print_readably() {
        let filter = Filter::default().with("debug, access=off,h2=Warn,,access=trace").unwrap();
        assert_eq!(filter.to_string(), "access=trace,h2=warn,hickory_server::server=off,debug");
        assert_eq!(Filter::default().with(&filter.to_string()).unwrap(), filter);
    }

    #[test]
    fn a_scope_names_a_room_of_this_crate_and_a_foreign_crate() {
        let targets = Filter::default().with("warn,discovery=debug,h2=error").unwrap().targets();
        assert!(targets.would_enable("culvert::discovery::local", &Level::DEBUG));
        assert!(!targets.would_enable("culvert::policy", &Level::INFO));
        assert!(!targets.would_enable("h2::codec", &Level::WARN));
        assert!(!targets.would_enable("hickory_server::server", &Level::ERROR));
    }

    #[test]
    fn nonsense_is_refused_with_the_entry_and_the_reason() {
        for (text, shown) in [("loud", "\"loud\""), ("a=b", "\"a=b\""), ("info,[span]=info", "[span]"), ("=info", "not a scope"), ("3", "\"3\"")] {
            let error = Filter::default().with(text).unwrap_err().to_string();
            assert!(error.contains(shown), "{error}");
        }
        let many: Vec<String> = (0..80).map(|number| format!("s{number}=info")).collect();
        assert!(Filter::default().with(&many.join(",")).unwrap_err().to_string().contains("too many"));
    }
}
