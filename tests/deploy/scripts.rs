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
        assert!(!help.printed.contains("source "), "the code is not help: {help:?}");
        let unknown = stubs.run(script, &["--no-such-thing"]);
        assert_eq!(unknown.code, 2, "{script:?}: {unknown:?}");
        assert!(unknown.complained.contains("--no-such-thing") && unknown.complained.contains("--help"), "{unknown:?}");
    }
}
