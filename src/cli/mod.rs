//! The front door: every subcommand, flag and environment variable. Nothing else in the house reads the environment, and nothing here does
//! more than read, check and hand over.
//! Main types: [`Cli`], one `Args` per subcommand.

mod control;
mod duration;
mod lab;
mod logged;
mod proxy;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// An ambient-mode mesh data plane: one L4 proxy per node, HBONE tunnels, zero-copy forwarding.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, about, disable_help_subcommand = false)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The node's data plane. Every setting is a flag and an environment variable.
    Proxy(Box<proxy::Args>),
    /// The control plane: tells proxies what a mesh file says, over delta xDS, and signs their certificates.
    Control(Box<control::Args>),
    /// A mesh in a box: nodes and pods as network namespaces on this machine, real proxies, no cluster.
    Lab(lab::Args),
    /// The version and what it was built with.
    Version,
}

/// Runs the command line and returns the process's exit code: 0 for success, 1 for a failure, 2 for a wrong command line.
pub fn main() -> ExitCode {
    parse().and_then(run).unwrap_or_else(|error| {
        eprintln!("culvert: {error:#}");
        ExitCode::FAILURE
    })
}

/// The command line; for a proxy once more with the defaults of its ProxyConfig, which nobody else has to be able to read.
fn parse() -> anyhow::Result<Cli> {
    let cli = Cli::parse();
    if !matches!(cli.command, Command::Proxy(_)) {
        return Ok(cli);
    }
    let config = proxy::ProxyConfig::of_environment()?;
    let command = Cli::command().mut_subcommand("proxy", |command| config.defaults(command));
    Ok(Cli::from_arg_matches(&command.get_matches())?)
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Proxy(args) => proxy::run(&args),
        Command::Control(args) => control::run(&args),
        Command::Lab(args) => lab::run(args),
        Command::Version => {
            println!("culvert {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    }
}
