//! Floors: relays that do the least that a node proxy could do, written to be hard to beat. Culvert's own figures are ratios to these,
//! taken in the same run. They have fixed keys and neither handshake, HTTP/2, policy nor metrics: never use one for anything else.
//!
//! * `c0`: nothing, that is, no process: the harness connects client and server directly.
//! * `c1`: splice. One hop is a `source` alone; two hops are a `source` and a `sink`.
//! * `c2`: two hops, read and write of up to 256 KiB, one tunnel connection for each application connection.
//! * `c3`: c2 with AES-256-GCM in place: 16 KiB records, each `[5 TLS][9 DATA header][payload][1 type][16 tag]`.
//!
//! `cargo bench --bench floor -- source --kind c3 --listen 0.0.0.0:15001 --to 10.0.0.2:15008 --mark 1337`, or the built file by its path.
//! All run on one thread: tokio's `current_thread` runtime.

mod crypt;
mod duplex;
mod place;
mod plain;
mod role;

use std::process::ExitCode;

use clap::Parser;
use culvert::sys::limits::raise_nofile;
use culvert::sys::socket::{ListenOptions, Transparency, listen_tcp};
use tokio::net::TcpListener;

use role::{Options, serve};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Debug, Parser)]
#[command(name = "floor", about = "Relays that do the least that a node proxy could do; for measuring only")]
enum Command {
    /// Accepts from the application's side and dials the tunnel (or, for one hop of c1, the server)
    Source(Options),
    /// Accepts from the tunnel and dials the application
    Sink(Options),
}

fn main() -> ExitCode {
    // `cargo bench` and `cargo test --benches` start every bench, without a role and with a flag of their own.
    let arguments: Vec<String> = std::env::args().filter(|argument| argument != "--bench" && argument != "--test").collect();
    if arguments.len() < 2 {
        println!("floor: nothing to do without a role; see --help");
        return ExitCode::SUCCESS;
    }
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the role that the arguments name, until the process is ended.
fn run(arguments: Vec<String>) -> Result<(), Box<dyn std::error::Error>> {
    let command = Command::try_parse_from(arguments).unwrap_or_else(|error| error.exit());
    let (options, source) = match command {
        Command::Source(options) => (options, true),
        Command::Sink(options) => (options, false),
    };
    if options.to.is_none() && !options.original_destination {
        return Err("where to: --to or --original-destination".into());
    }
    raise_nofile()?;
    let listening =
        ListenOptions { mark: options.mark, transparent: Transparency::Never, keepalive: None, backlog: 4096, ..ListenOptions::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listen_tcp(options.listen, &listening)?.socket)?;
        serve(listener, options, source).await
    })?;
    Ok(())
}
