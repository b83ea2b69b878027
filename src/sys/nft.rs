//! The `nft` program: apply a script as one transaction, read a table back as JSON.
//!
//! Why a program and not netlink: `nft` is the maintained interface of nftables, its scripts are text that a person can compare with
//! what runs, and the netlink crates cannot express `redirect` today. Both functions act on the namespace of the calling thread:
//! call them inside [`NetNs::run`](super::netns::NetNs::run).

use std::io::{self, Write};
use std::process::{Command, Output, Stdio};

/// Where `nft` is looked for: the search path first, then where distributions put it (a service's path often lacks `sbin`).
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// Applies `script` as one transaction with `nft -f -`: all of it or nothing.
///
/// # Errors
/// When `nft` is not installed, or refuses the script; the error then carries what `nft` said.
pub fn apply(script: &str) -> io::Result<()> {
    let output = run(&["-f", "-"], script)?;
    if output.status.success() { Ok(()) } else { Err(refused(&output)) }
}

/// The table `inet NAME` as `nft -j` prints it; `None` when there is no such table.
///
/// # Errors
/// When `nft` is not installed, fails, or prints something that is not JSON.
pub fn list_json(table: &str) -> io::Result<Option<serde_json::Value>> {
    let output = run(&["-j", "list", "table", "inet", table], "")?;
    if output.status.success() {
        return serde_json::from_slice(&output.stdout).map(Some).map_err(|error| io::Error::other(format!("nft printed invalid JSON: {error}")));
    }
    if String::from_utf8_lossy(&output.stderr).contains("No such file or directory") { Ok(None) } else { Err(refused(&output)) }
}

fn run(arguments: &[&str], input: &str) -> io::Result<Output> {
    for program in PROGRAMS {
        let mut command = Command::new(program);
        // The C locale, because list_json recognises "no such table" by nft's words.
        command.args(arguments).env("LC_ALL", "C").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io::Error::new(error.kind(), format!("cannot run {program}: {error}"))),
        };
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(input.as_bytes()) {
                // nft gave up before it had read everything: its own words say why.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                    child.kill()?;
                    child.wait()?;
                    return Err(error);
                }
                _ => {}
            }
        }
        return child.wait_with_output();
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the program nft was not found: install the package nftables"))
}

fn refused(output: &Output) -> io::Error {
    let words = String::from_utf8_lossy(&output.stderr);
    let words = if words.trim().is_empty() { "it gave no reason" } else { words.trim() };
    io::Error::other(format!("nft failed ({}): {words}", output.status))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::sys::netns::NetNs;

    #[test]
    fn a_script_is_applied_in_the_entered_namespace_only() {
        let pod = NetNs::create().unwrap();
        pod.run(|| apply("table inet probe { chain c { }\n }")).unwrap().unwrap();
        let listed = pod.run(|| list_json("probe")).unwrap().unwrap().expect("the table exists");
        assert!(listed["nftables"].as_array().unwrap().iter().any(|entry| entry["chain"]["name"] == "c"), "{listed}");
        assert!(NetNs::create().unwrap().run(|| list_json("probe")).unwrap().unwrap().is_none());
    }

    #[test]
    fn a_refused_script_changes_nothing_and_says_why() {
        let pod = NetNs::create().unwrap();
        let error = pod.run(|| apply("table inet probe { }\nadd rule inet probe missing accept\n")).unwrap().unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
        assert!(pod.run(|| list_json("probe")).unwrap().unwrap().is_none());
    }
}
