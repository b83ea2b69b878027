//! Programs that stand in for those which a script calls: they write down how they were called and answer as they are told.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What scripts may take from the machine.
const PLAIN: [&str; 18] = [
    "awk", "bash", "cat", "date", "dirname", "env", "grep", "install", "mktemp", "readelf", "rm", "sed", "sleep", "sort", "tail", "tee", "tr", "uniq",
];

/// A folder that is the whole PATH of a script.
pub(super) struct Stubs {
    folder: tempfile::TempDir,
}

impl Stubs {
    /// Nothing but the plain tools.
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("bin")).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        for name in PLAIN {
            // A script says itself what it misses.
            if let Some(found) = std::env::split_paths(&path).map(|place| place.join(name)).find(|file| file.is_file()) {
                symlink(found, folder.path().join("bin").join(name)).unwrap();
            }
        }
        Self { folder }
    }

    /// Adds a program: a bash script, behind a line that writes down its name and arguments.
    pub(super) fn with(self, name: &str, script: &str) -> Self {
        let file = self.folder.path().join("bin").join(name);
        let log = self.log();
        fs::write(&file, format!("#!/usr/bin/env bash\necho {name} \"$*\" >>{}\n{script}\n", log.display())).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("calls")
    }

    /// A file of this test that is gone with it.
    pub(super) fn file(&self, name: &str, content: &str) -> PathBuf {
        let file = self.folder.path().join(name);
        fs::write(&file, content).unwrap();
        file
    }

    /// Where a stand-in keeps what it must know: a file of `state`.
    pub(super) fn state(&self, name: &str) -> PathBuf {
        let folder = self.folder.path().join("state");
        fs::create_dir_all(&folder).unwrap();
        folder.join(name)
    }

    /// Takes a program away.
    pub(super) fn without(&self, name: &str) {
        fs::remove_file(self.folder.path().join("bin").join(name)).unwrap();
    }

    /// Runs a script with its arguments and nothing else in the environment.
    pub(super) fn run(&self, script: &Path, arguments: &[&str]) -> Ran {
        let mut command = Command::new(script);
        command.args(arguments).env_clear().env("PATH", self.folder.path().join("bin")).env("TMPDIR", self.folder.path()).env("POLL_SECONDS", "0.05");
        command.into()
    }

    /// Every call so far, one on a line.
    pub(super) fn calls(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}

/// What a script did.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) code: i32,
    pub(super) printed: String,
    pub(super) complained: String,
}

impl From<Command> for Ran {
    fn from(mut command: Command) -> Self {
        let Output { status, stdout, stderr } = super::run(&mut command);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: status.code().unwrap(), printed: text(stdout), complained: text(stderr) }
    }
}
