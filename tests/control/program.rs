//! `culvert control` as a program: what it says when it cannot start, and how it ends.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::control_client::*;
use crate::ground::*;

fn command(directory: &Path, more: &[&str]) -> Command {
    command_with_ca(directory, &directory.join("ca"), more)
}

fn command_with_ca(directory: &Path, ca: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
    let file = |name: &str| directory.join(name).display().to_string();
    command.arg("control").args(["--config", &file("mesh.yaml"), "--token-file", &file("tokens.yaml")]).arg("--ca-dir").arg(ca);
    command.args(["--listen=127.0.0.1:0", "--readiness=127.0.0.1:0", "--metrics=127.0.0.1:0"]).args(more);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    command
}

/// Ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn it_serves_until_it_is_told_to_stop_and_then_ends_its_streams_in_order() {
    let directory = directory(&mesh(&[("a", "left", 1)], &[]));
    let new = directory.path().join("new-ca");
    let mut command = command_with_ca(directory.path(), &new, &["--create-ca"]);
    let mut program = Program(command.spawn().unwrap());
    let mut log = BufReader::new(program.0.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("serves xDS and certificates") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "it has ended");
    }
    let address = line.split("address=").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let connection = connect(address, &new, NAME, Some(LEFT)).await.unwrap();
    let mut stream = connection.subscribe("left", &View::default()).await.unwrap();
    for _ in 0..2 {
        stream.next().await;
    }
    kill(Pid::from_raw(program.0.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(stream.response().await.unwrap(), None);
    drop((stream, connection));
    let ended = tokio::task::spawn_blocking(move || program.0.wait().unwrap()).await.unwrap();
    assert!(ended.success(), "{ended}");
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("told by SIGTERM") && !rest.contains("not every client"), "{rest}");
    assert!(!rest.contains(LEFT) && !line.contains(LEFT), "a token is in the log");
}

#[test]
fn what_it_cannot_start_with_is_said_with_the_file_and_the_line() {
    let good = "{}";
    let spoil = |name: &str, text: Option<&str>| {
        let directory = directory(good);
        match text {
            Some(text) => std::fs::write(directory.path().join(name), text).unwrap(),
            None => std::fs::remove_file(directory.path().join(name)).unwrap(),
        }
        directory
    };
    for (name, text, part) in [
        ("mesh.yaml", Some("workloads:\n- {name: a, namespace: b, colour: blue}"), "mesh.yaml:2:"),
        ("mesh.yaml", None, "mesh.yaml"),
        ("tokens.yaml", Some("tokens: []"), "nobody could connect"),
        ("tokens.yaml", None, "tokens.yaml"),
        ("ca/ca-key.pem", None, "ca-key.pem: it is missing; put"),
        ("ca/ca-cert.pem", Some("nonsense"), "ca-cert.pem"),
    ] {
        let directory = spoil(name, text);
        let output = command(directory.path(), &[]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(said.contains(part), "{name}: {said}");
    }
    let directory = directory(good);
    for flags in [["--debounce=2s", "--debounce-max=1s"], ["--default-ttl=100d", "--max-ttl=90d"]] {
        let output = command(directory.path(), &flags).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stdout).contains(flags[0].split('=').next().unwrap()));
    }
}
