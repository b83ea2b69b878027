//! The bench from outside: starts the inside, hears it, ends it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use super::message::Message;
use super::options::Options;
use super::report::{Machine, Report};
use crate::lab::Error;
use crate::lab::directory::{Base, Directory};
use crate::lab::handle::Lab;
use crate::lab::pod::last_lines;

/// What is told while a bench runs.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// What is being done; many.
    Step(&'a str),
    /// Text of the report: its heading, then one table after another.
    Text(&'a str),
}

/// Measures, and returns everything that was found; `interrupted` is asked all the time, and `None` is the answer when it said yes. Nothing
/// is left of the bench then, nor after an error. May be called in a program with threads.
///
/// # Errors
/// When the machine does not allow it, or a contestant does not start; the error ends with the last words of its log.
pub fn run(
    program: &Path,
    base: &Base,
    options: Options,
    interrupted: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Option<Report>, Error> {
    let inside = Inside::start(program, base, &options)?;
    let mut report = Report::begin(options, Machine::this());
    loop {
        match inside.messages.recv_timeout(Duration::from_millis(100)) {
            _ if interrupted() => return Ok(None),
            Err(RecvTimeoutError::Timeout) | Ok(Message::Entered) => {}
            Ok(Message::Step(step)) => tell(Event::Step(&step)),
            Ok(Message::Began { congestion_control }) => {
                report.machine.congestion_control = congestion_control;
                tell(Event::Text(&report.heading()));
            }
            Ok(Message::Took(outcome)) => {
                tell(Event::Text(&report.table(&outcome)));
                report.outcomes.push(*outcome);
            }
            Ok(Message::Done) => return Ok(Some(report)),
            Ok(Message::Failed(sentence)) => return Err(Error::State(sentence)),
            Err(RecvTimeoutError::Disconnected) => {
                let cause = last_lines(&inside.directory.supervisor_log());
                return Err(Error::Failed { what: "the bench ended before it was done".to_owned(), cause });
            }
        }
    }
}

/// The other side. Dropping it ends it and removes its files.
#[derive(Debug)]
struct Inside {
    base: Base,
    name: String,
    directory: Directory,
    child: Child,
    messages: Receiver<Message>,
}

impl Inside {
    fn start(program: &Path, base: &Base, options: &Options) -> Result<Self, Error> {
        let failed = || Error::failed::<std::io::Error>("cannot start the bench");
        let lock = base.lock()?;
        let name = format!("bench-{}", std::process::id());
        let directory = base.create(&name)?;
        let started = spawn(program, base, &name, &directory, options);
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                directory.remove()?;
                base.tidy();
                return Err(failed()(error));
            }
        };
        let (send, messages) = mpsc::channel();
        let output = child.stdout.take();
        let inside = Self { base: base.clone(), name, directory, child, messages };
        let hear = move || {
            for line in output.into_iter().flat_map(|output| BufReader::new(output).lines()).map_while(Result::ok) {
                if let Ok(message) = serde_json::from_str(&line)
                    && send.send(message).is_err()
                {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("bench".into()).spawn(hear).map_err(failed())?;
        // Others wait only until this one can be found by its process.
        drop(lock);
        Ok(inside)
    }
}

fn spawn(program: &Path, base: &Base, name: &str, directory: &Directory, options: &Options) -> std::io::Result<Child> {
    fs::write(directory.definition(), serde_json::to_string(options)?)?;
    let log = File::create(directory.supervisor_log())?;
    let mut command = Command::new(program);
    command.args(["lab", "supervise-bench", "--name", name]).arg("--run-dir").arg(base.path()).current_dir("/");
    // Away from the terminal from the first moment on: Ctrl-C is for us, and we end the bench in good order.
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn()
}

impl Drop for Inside {
    fn drop(&mut self) {
        Lab::remove(&self.base, &self.name).ok();
        // Closes its standard input, if it is still there.
        self.child.wait().ok();
    }
}
