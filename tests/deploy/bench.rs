//! bench.sh: its table out of recorded numbers, and a whole run with real load on this machine in place of a cluster.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};

use super::stubs::Stubs;
use super::{deploy, transcript};

#[test]
fn the_table_shows_medians_and_the_ratios_within_a_round() {
    // Invented numbers whose medians one sees: nothing was measured.
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/deploy/transcripts/samples.tsv");
    let ran = Stubs::new().run(&deploy("kind/bench.sh"), &["--table", samples.to_str().unwrap()]);
    assert_eq!((ran.code, ran.complained.as_str()), (0, ""));
    assert_eq!(ran.printed, transcript("table"));
}

#[test]
fn numbers_that_are_missing_are_not_made_up() {
    let stubs = Stubs::new();
    let bench = |arguments: &[&str]| stubs.run(&deploy("kind/bench.sh"), arguments);
    let only_warm_up = stubs.file("warm-up", "0\tnone\tsame\tbulk-up\tgbit_per_s\t1\n");
    let ran = bench(&["--table", only_warm_up.to_str().unwrap()]);
    assert_eq!((ran.code, ran.printed.as_str()), (1, ""), "{ran:?}");
    assert!(ran.complained.contains("no round counts yet"), "{ran:?}");
    let half = stubs.file("half", "1\tculvert\tsame\tbulk-up\tgbit_per_s\t1\n");
    assert!(bench(&["--table", half.to_str().unwrap()]).printed.ends_with("| same node | bulk-up | Gbit/s | – | – | 1.00 | – |\n"));
    for wrong in [&["--only", "bulk"][..], &["--rounds", "0"], &["--seconds", "x"]] {
        assert_eq!(bench(wrong).code, 2, "{wrong:?}");
    }
}

/// Ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn a_run_takes_turns_and_leaves_the_nodes_as_they_were() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let culvert = env!("CARGO_BIN_EXE_culvert");
    let mut server = Server(Command::new(culvert).args(["lab", "serve-load", &port.to_string()]).spawn().unwrap());
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(server.0.try_wait().unwrap().is_none());
        std::thread::yield_now();
    }
    // Each reading of a node says that its proxies had a second more.
    let docker = r#"
state="$(dirname "$0")/../state"
case "$*" in *schedstat*) ;; *) echo "2 CPUs, Linux 6, cubic"; exit ;; esac
seconds=$(($(cat "$state/seconds-$2" 2>/dev/null || echo 0) + 1))
echo "$seconds" >"$state/seconds-$2"
printf '%s 7 7\n%s 7 7\n' "${seconds}000000000" 5"#;
    let stubs = Stubs::new().with("kubectl", include_str!("kubectl.bash")).with("docker", docker);
    fs::write(stubs.state("culvert"), culvert).unwrap();
    fs::write(stubs.state("port"), port.to_string()).unwrap();
    let samples = stubs.file("samples", "");
    let arguments = ["--rounds", "1", "--seconds", "1", "--only", "requests-2,bulk-up", "--samples", samples.to_str().unwrap()];
    let ran = stubs.run(&deploy("kind/bench.sh"), &arguments);
    assert_eq!(ran.code, 0, "{ran:?}");

    // Seven quantities for each of two rounds, two places and a contestant with a proxy, two less without one.
    let lines = fs::read_to_string(&samples).unwrap();
    let rows: Vec<Vec<&str>> = lines.lines().map(|line| line.split('\t').collect()).collect();
    let of = |who: &str| rows.iter().filter(|row| row[1] == who).count();
    assert_eq!((of("none"), of("ztunnel"), of("culvert")), (16, 24, 24), "{lines}");
    let mut order: Vec<_> = rows.iter().map(|row| (row[0], row[1])).collect();
    order.dedup();
    assert_eq!(order, [("0", "none"), ("0", "ztunnel"), ("0", "culvert"), ("1", "none"), ("1", "culvert"), ("1", "ztunnel")]);
    // One second of one node's proxies, or of two, for the work that was done.
    let value = |place: &str, quantity: &str| -> f64 {
        let row = rows.iter().find(|row| row[..5] == ["1", "culvert", place, "requests-2", quantity]);
        row.unwrap_or_else(|| panic!("{place} {quantity}: {lines}"))[5].parse().unwrap()
    };
    for (place, nodes) in [("same", 1.0), ("across", 2.0)] {
        let requests = nodes * 1000.0 / value(place, "cpu_s_per_1000");
        // The trial really lasts a tenth of a second, and the last answers.
        let ratio = requests / value(place, "per_s");
        assert!((0.095..5.0).contains(&ratio), "{place}: {ratio}");
    }
    assert!(ran.printed.contains("2 CPUs, Linux 6, cubic; 1 rounds of 1 s, interleaved"), "{ran:?}");
    assert!(ran.printed.contains("| across nodes | bulk-up | CPU s/GB | – |"), "{ran:?}");
    let calls = stubs.calls();
    assert!(calls.trim_end().ends_with("label node n1 n2 culvert/bench-"), "{calls}");
    assert!(!stubs.state("label-n1").exists() && !stubs.state("affinity").exists(), "ztunnel serves, as before");
}

#[test]
fn a_run_that_fails_cleans_up_and_says_why() {
    let stubs = Stubs::new().with("kubectl", include_str!("kubectl.bash")).with("docker", "");
    fs::write(stubs.state("culvert"), env!("CARGO_BIN_EXE_culvert")).unwrap();
    // Nobody listens there.
    fs::write(stubs.state("port"), "1").unwrap();
    let ran = stubs.run(&deploy("kind/bench.sh"), &["--rounds", "1", "--seconds", "1"]);
    assert_ne!(ran.code, 0);
    assert!(ran.complained.contains("Connection refused"), "{ran:?}");
    assert!(stubs.calls().trim_end().ends_with("label node n1 n2 culvert/bench-"), "{}", stubs.calls());
}
