//! `culvert proxy`: its settings, and the assembly of the rooms.

mod assemble;
mod control_plane;
mod dns;
mod mesh_source;
mod proxy_config;
mod settings;
mod threads;
mod workers;

pub(super) use proxy_config::ProxyConfig;
pub(super) use settings::Args;

use std::process::ExitCode;

/// Runs the data plane until it is told to stop.
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let settings = args.check()?;
    assemble::run(settings)
}
