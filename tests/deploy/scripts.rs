//! The scripts of `deploy/`, without a cluster.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::stubs::Stubs;
use super::{deploy, files, has, run};

fn scripts() -> Vec<PathBuf> {
    let mut scripts = files(&deploy(""));
    scripts.retain(|path| path.extension().is_some_and(|extension| extension == "sh"));
    assert!(scripts.len() >= 2, "{scripts:?}");
    scripts
}

#[test]
fn every_script_passes_shellcheck() {
    if !has("shellcheck") {
        return;
    }
    let mut all = scripts();
    all.push(Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/run"));
    let output = run(Command::new("shellcheck").arg("--external-sources").args(["--source-path", env!("CARGO_MANIFEST_DIR")]).args(&all));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn only_a_static_binary_gets_into_an_image() {
    let stubs = Stubs::new().with("docker", "");
    let build = |binary: &str| stubs.run(&deploy("image/build.sh"), &["--tool", "docker", "--binary", binary]);
    let dynamic = build(env!("CARGO_BIN_EXE_culvert"));
    assert_eq!(dynamic.code, 1, "{dynamic:?}");
    assert!(dynamic.complained.contains("is not static: link it with cargo rustc"), "{dynamic:?}");
    let text = build(stubs.file("text", "not a program").to_str().unwrap());
    assert!(text.complained.contains("is not an ELF file"), "{text:?}");
    let nothing = build("/nowhere");
    assert!(nothing.complained.contains("there is no file /nowhere"), "{nothing:?}");
    assert_eq!(stubs.calls(), "", "docker has nothing to do");
}

#[test]
fn every_script_has_a_help_and_refuses_what_it_does_not_know() {
    let stubs = Stubs::new();
    for script in scripts().iter().filter(|path| !path.ends_with("prelude.sh")) {
        let help = stubs.run(script, &["--help"]);
        assert_eq!(help.code, 0, "{script:?}: {help:?}");
        let name = script.file_name().unwrap().to_str().unwrap();
        assert!(help.printed.contains(&format!("/{name} ")) && help.printed.contains("--dry-run"), "{help:?}");
        assert!(!help.printed.contains("dirname") && !help.printed.contains("shellcheck"), "the code is not help: {help:?}");
        let unknown = stubs.run(script, &["--no-such-thing"]);
        assert_eq!(unknown.code, 2, "{script:?}: {unknown:?}");
        assert!(unknown.complained.contains("--no-such-thing") && unknown.complained.contains("--help"), "{unknown:?}");
    }
}

/// A dry run, and the file of `transcripts` that says what it prints.
const DRY_RUNS: [(&str, &str, &str); 9] = [
    ("image/build.sh", "--dry-run --tool buildah --output culvert.tar", "build"),
    ("kind/up.sh", "--dry-run", "up"),
    ("kind/up.sh", "--dry-run --name other --workers 1 --dual-stack --archive culvert.tar --gateway-api crds.yaml --istio-set a=b", "up-dual"),
    ("kind/swap.sh", "culvert --dry-run", "swap-culvert"),
    ("kind/swap.sh", "ztunnel --node n1 --context other --dry-run", "swap-ztunnel"),
    ("kind/swap.sh", "status --dry-run", "swap-status"),
    ("kind/demo.sh", "--dry-run", "demo"),
    ("kind/bench.sh", "--dry-run --only requests-32", "bench"),
    ("kind/down.sh", "--dry-run", "down"),
];
const TOOLS: [&str; 6] = ["buildah", "cargo", "docker", "istioctl", "kind", "kubectl"];

#[test]
fn a_dry_run_prints_every_command_in_order_and_calls_none() {
    let stubs = TOOLS.iter().fold(Stubs::new(), |stubs, tool| stubs.with(tool, "exit 1"));
    for (script, arguments, transcript) in DRY_RUNS {
        let ran = stubs.run(&deploy(script), &arguments.split(' ').collect::<Vec<_>>());
        let printed = ran.printed.replace(env!("CARGO_MANIFEST_DIR"), "REPOSITORY");
        let expected = super::transcript(transcript);
        assert!(printed == expected, "{script} {arguments} prints\n{printed}\nnot\n{expected}");
        assert_eq!((ran.code, ran.complained.as_str()), (0, ""), "{script} {arguments}");
    }
    assert_eq!(stubs.calls(), "");
}

#[test]
fn a_missing_tool_is_named_with_where_it_comes_from_and_nothing_is_done() {
    let needs: [(&str, &[&str], &[&str]); 6] = [
        ("kind/up.sh", &[], &["kind", "kubectl", "istioctl", "docker"]),
        ("kind/swap.sh", &["culvert"], &["kubectl"]),
        ("kind/demo.sh", &[], &["kubectl", "istioctl"]),
        ("kind/bench.sh", &[], &["kubectl", "docker"]),
        ("kind/down.sh", &[], &["kind"]),
        ("image/build.sh", &["--tool", "buildah"], &["buildah", "cargo"]),
    ];
    for (script, arguments, tools) in needs {
        for tool in tools {
            let stubs = TOOLS.iter().fold(Stubs::new(), |stubs, tool| stubs.with(tool, ""));
            stubs.without(tool);
            let ran = stubs.run(&deploy(script), arguments);
            assert_eq!(ran.code, 127, "{script} without {tool}: {ran:?}");
            let hint = ran.complained.split_once(&format!("{tool} is missing: ")).unwrap_or_else(|| panic!("{ran:?}")).1;
            assert!(hint.len() > 20 && hint.lines().count() == 1, "{ran:?}");
            assert_eq!(stubs.calls(), "", "{script} without {tool}");
        }
    }
}

#[test]
fn without_its_image_no_cluster_is_made() {
    let stubs = TOOLS.iter().fold(Stubs::new(), |stubs, tool| stubs.with(tool, "exit 1"));
    let ran = stubs.run(&deploy("kind/up.sh"), &[]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.complained.contains("docker knows no image culvert:dev: deploy/image/build.sh makes it"), "{ran:?}");
    let ran = stubs.run(&deploy("kind/up.sh"), &["--archive", "/nowhere.tar"]);
    assert!(ran.complained.contains("there is no file /nowhere.tar: deploy/image/build.sh --output makes it"), "{ran:?}");
    assert!(!stubs.calls().contains("kind create"), "{}", stubs.calls());
}

#[test]
fn what_up_finds_stays_as_it_is() {
    let kubectl = r#"case "$*" in *"get daemonset culvert"*) echo daemonset/culvert ;; esac"#;
    let stubs = Stubs::new().with("docker", "").with("istioctl", "").with("kubectl", kubectl).with("kind", "echo culvert");
    let ran = stubs.run(&deploy("kind/up.sh"), &[]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let calls = stubs.calls();
    assert!(!calls.contains("kind create") && !calls.contains("istioctl"), "{calls}");
    // kubectl cannot wait for a DaemonSet that is OnDelete.
    assert!(calls.contains("rollout status daemonset/istio-cni-node") && !calls.contains("rollout status daemonset/ztunnel"), "{calls}");
    assert!(calls.contains("kind load docker-image culvert:dev --name culvert"), "{calls}");
}
