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

/// Flags as their tests give them.
#[cfg(test)]
fn parsed<A: clap::Args>(line: &[&str]) -> Result<A, clap::Error> {
    let command = A::augment_args(clap::Command::new("proxy"));
    A::from_arg_matches(&command.try_get_matches_from(["proxy"].iter().chain(line))?)
}

/// Runs the data plane until it is told to stop.
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let settings = args.check()?;
    assemble::run(settings)
}
