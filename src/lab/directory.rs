//! The run directory of a lab: its files, and whether the lab in it is alive.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Error;
use crate::sys::process::{Process, start_time, user_id};

/// `sockaddr_un` takes 108 bytes; some of them are left to the names below a lab's directory.
const LONGEST_SOCKET: usize = 100;

/// The directory in which every lab of this user has its own directory.
#[derive(Debug, Clone)]
pub struct Base(PathBuf);

/// Whether a lab runs.
#[derive(Debug)]
pub enum LabState {
    /// It runs; the first process of its process namespace.
    Running(Process),
    /// Only its directory is left.
    Crashed,
}

impl Base {
    /// The labs below this directory.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The names of all labs, running or crashed.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter(|entry| entry.path().is_dir()).filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The directory of a lab, which need not exist.
    pub(super) fn lab(&self, name: &str) -> Directory {
        Directory(self.0.join(name))
    }

    /// Whether a lab runs; `None` when there is none of this name.
    ///
    /// # Errors
    /// When its process cannot be looked at.
    pub fn state(&self, name: &str) -> Result<Option<LabState>, Error> {
        let directory = self.lab(name);
        if directory.0.is_dir() { directory.state().map(Some) } else { Ok(None) }
    }

    /// Keeps other `up` and `down` commands out for as long as the answer lives.
    pub(super) fn lock(&self) -> Result<File, Error> {
        let shown = self.0.display();
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.0).map_err(Error::failed(format!("cannot create {shown}")))?;
        let found = fs::symlink_metadata(&self.0).map_err(Error::failed(format!("cannot look at {shown}")))?;
        // Below /tmp somebody else may have been there first, and would own what we trust.
        if !found.is_dir() || found.uid() != user_id() || found.mode() & 0o022 != 0 {
            return Err(Error::State(format!("{shown} is not a directory that only this user can write to: remove it, or choose another --run-dir")));
        }
        let directory = File::open(&self.0).map_err(Error::failed(format!("cannot open {shown}")))?;
        directory.lock().map_err(Error::failed(format!("cannot lock {shown}")))?;
        Ok(directory)
    }

    /// Makes the directory of a new lab. What a crashed lab of this name left is removed first.
    pub(super) fn create(&self, name: &str) -> Result<Directory, Error> {
        let directory = self.lab(name);
        match self.state(name)? {
            Some(LabState::Running(_)) => {
                return Err(Error::State(format!("lab {name} is running already: `culvert lab down --name {name}` ends it")));
            }
            Some(LabState::Crashed) => directory.remove()?,
            None => {}
        }
        if directory.control_socket().as_os_str().len() > LONGEST_SOCKET {
            let sentence = format!("{} is too long a path for sockets: choose a shorter --run-dir or --name", directory.0.display());
            return Err(Error::State(sentence));
        }
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        for path in [directory.0.clone(), directory.zds(), directory.mesh(), directory.logs(), directory.pods(), directory.tokens()] {
            builder.create(&path).map_err(Error::failed(format!("cannot create {}", path.display())))?;
        }
        Ok(directory)
    }

    /// Removes the base directory if no lab is left in it, and a directory of ours around it likewise.
    pub(super) fn tidy(&self) {
        let around = self.0.parent().filter(|around| around.file_name().is_some_and(|name| name.to_string_lossy().starts_with("culvert")));
        for path in [Some(self.0.as_path()), around].into_iter().flatten() {
            // Not empty, or not ours: both are fine.
            fs::remove_dir(path).ok();
        }
    }
}

/// The files of one lab.
#[derive(Debug, Clone)]
pub(super) struct Directory(PathBuf);

impl Directory {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn definition(&self) -> PathBuf {
        self.0.join("lab.yaml")
    }

    pub(super) fn control_socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    pub(super) fn zds(&self) -> PathBuf {
        self.0.join("zds")
    }

    /// A directory of its own, because proxies watch the directory of their file.
    pub(super) fn mesh(&self) -> PathBuf {
        self.0.join("mesh")
    }

    pub(super) fn mesh_file(&self) -> PathBuf {
        self.mesh().join("mesh.yaml")
    }

    pub(super) fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }

    /// What the proxies prove to the control plane who they are with. Nobody else may enter the lab's directory.
    pub(super) fn tokens(&self) -> PathBuf {
        self.0.join("tokens")
    }

    pub(super) fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    pub(super) fn supervisor_log(&self) -> PathBuf {
        self.logs().join("lab.log")
    }

    pub(super) fn control_plane_log(&self) -> PathBuf {
        self.logs().join("control.log")
    }

    pub(super) fn proxy_log(&self, node: &str) -> PathBuf {
        self.logs().join(format!("proxy.{node}.log"))
    }

    pub(super) fn pod_log(&self, key: &str) -> PathBuf {
        self.logs().join(format!("pod.{}.log", key.replace('/', ".")))
    }

    pub(super) fn pod_proxy_log(&self, key: &str) -> PathBuf {
        self.logs().join(format!("proxy.{}.log", key.replace('/', ".")))
    }

    pub(super) fn pods(&self) -> PathBuf {
        self.0.join("pods")
    }

    fn pid_file(&self) -> PathBuf {
        self.0.join("pid")
    }

    /// Notes the first process of the lab's process namespace, by id and start time.
    pub(super) fn write_pid(&self, pid: i32) -> io::Result<()> {
        write_atomically(&self.pid_file(), &format!("{pid} {}\n", start_time(pid)?))
    }

    pub(super) fn state(&self) -> Result<LabState, Error> {
        let failed = || Error::failed::<io::Error>("cannot look at the lab's process");
        let text = match fs::read_to_string(self.pid_file()) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LabState::Crashed),
            Err(error) => return Err(failed()(error)),
        };
        let mut words = text.split_whitespace();
        let (Some(pid), Some(start)) = (words.next().and_then(|word| word.parse().ok()), words.next().and_then(|word| word.parse().ok())) else {
            return Ok(LabState::Crashed);
        };
        Ok(Process::find(pid, start).map_err(failed())?.map_or(LabState::Crashed, LabState::Running))
    }

    pub(super) fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::failed(format!("cannot remove {}", self.0.display()))(error)),
            _ => Ok(()),
        }
    }
}

/// Replaces a file as a whole: readers see the old one or the new one.
pub(super) fn write_atomically(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&new, path)
}
