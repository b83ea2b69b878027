//! A lab seen from outside: start one, find one, ask it, run something in it, end it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::control::{Request, Status, ask};
use super::definition::Definition;
use super::directory::{Base, Directory, LabState};
use super::supervisor::Progress;
use super::{Error, FABRIC};
use crate::sys::netns::NetNs;
use crate::sys::process::{Entrance, die_with_parent};

/// Commands get two seconds to end, then proxies get two, then comes SIGKILL.
const ENDS_WITHIN: Duration = Duration::from_secs(8);

/// A lab to start.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The `culvert` program: supervisor, proxies and the small programs are all this one.
    pub program: PathBuf,
    /// Where run directories are.
    pub base: Base,
    /// Its name.
    pub name: String,
    /// The text of its file.
    pub definition: String,
    /// It ends when the [`Lab`] is dropped, or when this process ends.
    pub leashed: bool,
    /// From where its proxies learn everything.
    pub wiring: Wiring,
}

/// From where the proxies of a lab learn of the mesh and get their certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wiring {
    /// From a control plane in the lab, over the wire, as in a cluster.
    #[default]
    Control,
    /// From the mesh file and the CA's directory, each for itself: one program less, and changes arrive a little sooner.
    Files,
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    program: PathBuf,
    base: Base,
    name: String,
    /// The process that waits for the lab's end, and by its standard input the leash.
    launcher: Option<Child>,
}

/// A place in a lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// A pod, by `name` or `namespace/name`.
    Pod(&'a str),
    /// A node.
    Node(&'a str),
    /// Between the nodes.
    Fabric,
}

impl Lab {
    /// Starts a lab and returns when everything in it runs. May be called in a program with threads.
    ///
    /// # Errors
    /// When the file is wrong, the machine does not allow it, or something in the lab does not start; nothing is left of it then.
    pub fn start(launch: Launch) -> Result<Self, Error> {
        Definition::parse(&launch.definition)?;
        let Launch { program, base, name, definition, leashed, wiring } = launch;
        let lock = base.lock()?;
        let directory = base.create(&name)?;
        let mut lab = Self { program, base, name, launcher: None };
        let outcome = lab.start_in(&directory, &definition, (leashed, wiring));
        if outcome.is_err() {
            lab.end(&directory)?;
        }
        drop(lock);
        outcome.map(|()| lab)
    }

    /// A lab that runs already; `None` means the only one.
    ///
    /// # Errors
    /// When there is none, or several and no name.
    pub fn find(program: PathBuf, base: Base, name: Option<&str>) -> Result<Self, Error> {
        let running = |name: &str| matches!(base.state(name), Ok(Some(LabState::Running(_))));
        let name = match name {
            Some(name) if running(name) => name.to_owned(),
            Some(name) => return Err(Error::State(format!("no lab named {name} is running"))),
            None => {
                let mut names = base.names();
                names.retain(|name| running(name));
                match names.as_slice() {
                    [] => return Err(Error::State("no lab is running: `culvert lab up FILE` starts one".to_owned())),
                    [name] => name.clone(),
                    _ => return Err(Error::State(format!("several labs are running, say --name: {}", names.join(", ")))),
                }
            }
        };
        Ok(Self { program, base, name, launcher: None })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is in it and how it is.
    ///
    /// # Errors
    /// When its supervisor does not answer.
    pub fn status(&self) -> Result<Status, Error> {
        ask(&self.directory().control_socket(), &Request::Status)
    }

    /// Makes it become what another file says.
    ///
    /// # Errors
    /// When the file is wrong (nothing has changed then), or a new pod does not start.
    pub fn apply(&self, definition: &str) -> Result<Status, Error> {
        Definition::parse(definition)?;
        ask(&self.directory().control_socket(), &Request::Apply(definition.to_owned()))
    }

    /// Ends a node's proxy and starts another one.
    ///
    /// # Errors
    /// When the new one does not become ready.
    pub fn restart_proxy(&self, node: &str) -> Result<Status, Error> {
        ask(&self.directory().control_socket(), &Request::RestartProxy(node.to_owned()))
    }

    /// Ends the control plane and starts another one.
    ///
    /// # Errors
    /// When there is none, or the new one does not become ready.
    pub fn restart_control(&self) -> Result<Status, Error> {
        ask(&self.directory().control_socket(), &Request::RestartControl)
    }

    /// A command that runs in a place of the lab, with this process's standard streams unless they are changed. It needs no privilege here.
    #[must_use]
    pub fn command(&self, place: Place<'_>, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("lab").arg("exec").arg("--run-dir").arg(self.base.path()).args(["--name", &self.name]);
        match place {
            Place::Pod(name) => command.arg(name),
            Place::Node(name) => command.args(["--node", name]),
            Place::Fabric => command.args(["--node", FABRIC]),
        };
        command.arg("--").args(arguments);
        command
    }

    /// Runs a command in a pod to its end, without input.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn exec(&self, pod: &str, arguments: &[&str]) -> Result<Output, Error> {
        let output = self.command(Place::Pod(pod), arguments).stdin(Stdio::null()).output();
        output.map_err(Error::failed(format!("cannot run {arguments:?} in {pod}")))
    }

    /// A network namespace of the lab, for a caller with `CAP_SYS_ADMIN` on this machine.
    ///
    /// # Errors
    /// When there is no such place, or it cannot be opened.
    pub fn netns(&self, place: Place<'_>) -> Result<NetNs, Error> {
        let path = located(&self.status()?, place)?.network;
        NetNs::open(&path).map_err(Error::failed(format!("cannot open {}", path.display())))
    }

    /// The log of a node's proxy, of a pod's command, of the control plane (`control`), or of the lab itself (the lab's name).
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn log(&self, of: &str) -> Result<PathBuf, Error> {
        if of == self.name {
            return Ok(self.directory().supervisor_log());
        }
        let status = self.status()?;
        if let (super::control_plane::NAME, Some(control)) = (of, &status.control) {
            return Ok(control.log.clone());
        }
        match status.node(of) {
            Ok(node) => Ok(node.proxy.log.clone()),
            Err(_) => status.pod(of).map(|pod| pod.log.clone()),
        }
    }

    /// Ends it and everything in it, and removes its directory. Returns when nothing is left.
    ///
    /// # Errors
    /// When it cannot be ended, or its directory cannot be removed.
    pub fn down(mut self) -> Result<(), Error> {
        let ended = Self::remove(&self.base, &self.name);
        self.let_go();
        ended
    }

    /// Ends the lab of this name, or removes what a crashed one has left. Says whether there was anything.
    ///
    /// # Errors
    /// When it cannot be ended, or its directory cannot be removed.
    pub fn remove(base: &Base, name: &str) -> Result<(), Error> {
        if base.path().is_dir() {
            let _lock = base.lock()?;
            end_process(&base.lab(name))?;
            base.lab(name).remove()?;
            base.tidy();
        }
        Ok(())
    }

    fn directory(&self) -> Directory {
        self.base.lab(&self.name)
    }

    fn start_in(&mut self, directory: &Directory, definition: &str, (leashed, wiring): (bool, Wiring)) -> Result<(), Error> {
        let failed = || Error::failed::<io::Error>("cannot start the lab");
        fs::write(directory.definition(), definition).map_err(failed())?;
        let mut command = Command::new(&self.program);
        command.args(["lab", "supervise", "--name", &self.name]).arg("--run-dir").arg(self.base.path()).current_dir("/");
        command.args(leashed.then_some("--leash")).args((wiring == Wiring::Files).then_some("--static"));
        let log = File::create(directory.supervisor_log()).map_err(failed())?;
        // Away from the terminal from the first moment on: Ctrl-C is for us, and we end the lab in good order.
        let mut child = command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn().map_err(failed())?;
        let outcome = first_words(&mut child);
        self.launcher = Some(child);
        match outcome.map_err(failed())? {
            Some(Progress::Ready) => {
                if !leashed {
                    // The launcher has ended already.
                    self.let_go();
                }
                Ok(())
            }
            Some(Progress::Failed(sentence)) => Err(Error::State(sentence)),
            None => {
                let log = super::pod::last_lines(&directory.supervisor_log());
                Err(Error::Failed { what: "the lab ended before it was ready".to_owned(), cause: log })
            }
        }
    }

    /// Drops the leash and waits until the launcher has ended, which it does with the lab.
    fn let_go(&mut self) {
        if let Some(mut launcher) = self.launcher.take() {
            // Closes its standard input first.
            launcher.wait().ok();
        }
    }

    fn end(&mut self, directory: &Directory) -> Result<(), Error> {
        let ended = end_process(directory);
        self.let_go();
        ended?;
        directory.remove()?;
        self.base.tidy();
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.launcher.is_some() {
            Self::remove(&self.base, &self.name).ok();
            self.let_go();
        }
    }
}

/// Runs a command in a place of a lab, with this process's standard streams, and returns its exit code (128 + signal). This process
/// enters the lab for good; must be called with a single thread. `search_path` is the caller's PATH.
///
/// # Errors
/// When the place does not exist, cannot be entered, or the command cannot be started.
pub fn enter_and_run(lab: &Lab, place: Place<'_>, arguments: &[String], search_path: &str) -> Result<i32, Error> {
    let status = lab.status()?;
    let located = located(&status, place)?;
    let program = arguments.first().ok_or_else(|| Error::State("no command was given".to_owned()))?;
    let entrance = Entrance::open(status.supervisor, &located.mounts, &located.network).map_err(Error::failed("cannot look into the lab"))?;
    entrance.enter().map_err(Error::failed("cannot enter the lab"))?;
    let mut command = Command::new(program);
    command.args(arguments.iter().skip(1));
    if let Place::Pod(name) = place {
        command.envs(&status.pod(name)?.env);
    }
    let own = lab.program.parent().map(|directory| format!("{}:", directory.display())).unwrap_or_default();
    command.env("PATH", format!("{own}{search_path}"));
    die_with_parent(&mut command);
    let ended = command.status().map_err(Error::failed(format!("cannot run {program:?} in the lab")))?;
    Ok(ended.code().unwrap_or_else(|| 128 + ended.signal().unwrap_or(0)))
}

struct Located {
    network: PathBuf,
    mounts: PathBuf,
}

fn located(status: &Status, place: Place<'_>) -> Result<Located, Error> {
    let outer = |network: &Path| Located { network: network.to_owned(), mounts: PathBuf::from(format!("/proc/{}/ns/mnt", status.supervisor)) };
    Ok(match place {
        Place::Fabric | Place::Node(FABRIC) => outer(&status.fabric.path),
        Place::Node(name) => outer(&status.node(name)?.netns.path),
        Place::Pod(name) => {
            let pod = status.pod(name)?;
            Located { network: pod.netns.path.clone(), mounts: pod.mounts.path.clone() }
        }
    })
}

/// The first line that says how the start ended; `None` when there is none.
fn first_words(child: &mut Child) -> io::Result<Option<Progress>> {
    let Some(output) = child.stdout.take() else { return Ok(None) };
    for line in BufReader::new(output).lines() {
        if let Ok(progress) = serde_json::from_str(&line?) {
            return Ok(Some(progress));
        }
    }
    Ok(None)
}

/// Ends the process of a lab, gently first.
fn end_process(directory: &Directory) -> Result<(), Error> {
    let failed = || Error::failed::<io::Error>("cannot end the lab");
    if let LabState::Running(process) = directory.state()? {
        process.terminate().map_err(failed())?;
        if !process.wait(ENDS_WITHIN).map_err(failed())? {
            process.kill().map_err(failed())?;
            if !process.wait(ENDS_WITHIN).map_err(failed())? {
                return Err(Error::State(format!("process {} of the lab does not end", process.id())));
            }
        }
    }
    Ok(())
}
