//! What every service of this binary begins and ends with: a log, and an error that is said once.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use crate::telemetry::logging::{self, LogConfig, LogFormat, LogHandle};

/// How long the log may take to reach its reader at the end.
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs a service with a log, which has been written out when it returns. An error of the service is said once: in the log, or on standard error when
/// the log is off.
///
/// # Errors
/// When the filter is none, or the service's own while the log is off.
pub(super) fn run(filter: &str, format: LogFormat, serve: impl FnOnce(&LogHandle) -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    let log = logging::init(LogConfig { format, filter: filter.to_owned(), ..LogConfig::default() }).context("RUST_LOG")?;
    let outcome = match serve(&log) {
        Err(error) if tracing::enabled!(tracing::Level::ERROR) => {
            tracing::error!("{error:#}");
            Ok(ExitCode::FAILURE)
        }
        outcome => outcome,
    };
    log.flush(PATIENCE);
    outcome
}
