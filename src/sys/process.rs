//! Processes in namespaces of their own: entering user, process and mount namespaces, being the first process of one, starting
//! children inside namespaces, and recognising a process beyond doubt although process ids are used again.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getegid, geteuid};

/// Moves this process into a user namespace in which it is root, and nobody else exists. Must be called with a single thread.
///
/// # Errors
/// `EPERM`, `ENOSPC` or `EACCES` where the kernel does not allow user namespaces to this user.
pub fn become_root_in_user_namespace() -> io::Result<()> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))
}

/// Gives this process own mount, network, IPC and host-name namespaces, and its future children an own process namespace; mounts made
/// from now on are seen by nobody outside. Must be called with a single thread.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn leave_shared_namespaces() -> io::Result<()> {
    let new = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(new)?;
    make_mounts_private()
}

/// What this process became in [`split`].
#[derive(Debug)]
pub enum Split {
    /// The original process, with the id of the child.
    Parent(i32),
    /// The new process.
    Child,
}

/// Forks. Refuses in a process with several threads, because the child would inherit their locks but not them.
///
/// # Errors
/// When there is more than one thread, or those of `fork(2)`.
pub fn split() -> io::Result<Split> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("cannot fork: the process has more than one thread"));
    }
    // SAFETY: there is one thread (checked above), so no lock can be held by a thread that the child would lack.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Split::Parent(child.as_raw())),
        ForkResult::Child => Ok(Split::Child),
    }
}

/// Is the first process of a process namespace: waits for every orphan, hands SIGTERM and SIGINT on to `main`, and returns the exit
/// code of `main` when it ends (128 + signal when it was killed). Ending afterwards makes the kernel kill whatever is left in the
/// namespace.
///
/// # Errors
/// Those of `sigprocmask(2)` and `sigwait(3)`.
pub fn be_first_process(main: i32) -> io::Result<i32> {
    let signals: SigSet = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block()?;
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == main => return Ok(code),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == main => return Ok(128 + signal as i32),
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) => {}
                Err(nix::Error::ECHILD) => return Ok(1),
                Err(error) => return Err(error.into()),
            }
        }
        match signals.wait()? {
            Signal::SIGCHLD => {}
            signal => drop(nix::sys::signal::kill(Pid::from_raw(main), signal)),
        }
    }
}

/// Waits for a child of this process to end.
///
/// # Errors
/// `ECHILD` when it is no child of this process.
pub fn wait_for(child: i32) -> io::Result<()> {
    loop {
        match waitpid(Pid::from_raw(child), None) {
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return Ok(()),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Mounts a fresh `/proc` that shows the process namespace this process is in.
///
/// # Errors
/// `EPERM` in a user namespace whose `/proc` is partly covered (some containers); the old one then still serves.
pub fn mount_proc() -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)?)
}

/// Makes `target` show the file or directory `source`, in this mount namespace.
///
/// # Errors
/// Those of `mount(2)`; `ENOENT` when `target` does not exist.
pub fn bind_mount(source: &Path, target: &Path) -> io::Result<()> {
    Ok(mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Mounts an empty file system in memory on `target`, in this mount namespace.
///
/// # Errors
/// Those of `mount(2)`.
pub fn mount_tmpfs(target: &Path) -> io::Result<()> {
    Ok(mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=1777"))?)
}

/// Makes a mount namespace that is a copy of ours, runs `prepare` in it (its mounts are seen nowhere else), and returns it. It lives as
/// long as the descriptor, or a process in it.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`, and the errors of `prepare`.
pub fn create_mount_namespace(prepare: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<OwnedFd> {
    // On a thread that is thrown away: it could never come back.
    let born = std::thread::Builder::new().name("mntns-create".into()).spawn(move || {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
        make_mounts_private()?;
        prepare()?;
        Ok(OwnedFd::from(File::open("/proc/thread-self/ns/mnt")?))
    })?;
    born.join().unwrap_or_else(|_| Err(io::Error::other("the thread that creates a mount namespace panicked")))
}

fn make_mounts_private() -> io::Result<()> {
    Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?)
}

/// Makes a command start as leader of a session of its own, inside the given network and mount namespaces, and die with the
/// thread that starts it.
pub fn start_inside(command: &mut Command, network: Arc<OwnedFd>, mounts: Option<Arc<OwnedFd>>) {
    let inside = move || {
        setns(&network, CloneFlags::CLONE_NEWNET)?;
        if let Some(mounts) = &mounts {
            setns(mounts, CloneFlags::CLONE_NEWNS)?;
        }
        nix::unistd::setsid()?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and only makes system calls on descriptors that it owns; it does not allocate.
    unsafe { command.pre_exec(inside) };
}

/// Ends every process of a group: SIGTERM if `gently`, else SIGKILL.
///
/// # Errors
/// `ESRCH` when there is no such group.
pub fn end_group(leader: i32, gently: bool) -> io::Result<()> {
    Ok(nix::sys::signal::killpg(Pid::from_raw(leader), if gently { Signal::SIGTERM } else { Signal::SIGKILL })?)
}

/// Makes a command be killed when the thread that starts it ends.
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: one system call (prctl) between fork and exec.
    unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)) };
}

/// Namespaces that a process enters for good, in the order in which they must be entered.
#[derive(Debug)]
pub struct Entrance {
    user: Option<File>,
    process: File,
    mounts: File,
    network: File,
}

impl Entrance {
    /// Opens the user and process namespaces of process `pid`, and the given files as mount and network namespaces.
    ///
    /// # Errors
    /// `EACCES` when this user may not look into that process, `ENOENT` when it is gone.
    pub fn open(pid: i32, mounts: &Path, network: &Path) -> io::Result<Self> {
        let file = |name: &str| File::open(format!("/proc/{pid}/ns/{name}"));
        let same_user = std::fs::read_link(format!("/proc/{pid}/ns/user"))? == std::fs::read_link("/proc/self/ns/user")?;
        let user = if same_user { None } else { Some(file("user")?) };
        // The process namespace for children: that of the process itself, or of what it starts.
        Ok(Self { user, process: file("pid")?, mounts: File::open(mounts)?, network: File::open(network)? })
    }

    /// Enters all of them; children that start from now on are in the process namespace too. Must be called with a single thread.
    ///
    /// # Errors
    /// `EPERM` without the right to enter.
    pub fn enter(self) -> io::Result<()> {
        if let Some(user) = &self.user {
            setns(user, CloneFlags::CLONE_NEWUSER)?;
        }
        setns(&self.process, CloneFlags::CLONE_NEWPID)?;
        setns(&self.network, CloneFlags::CLONE_NEWNET)?;
        Ok(setns(&self.mounts, CloneFlags::CLONE_NEWNS)?)
    }
}

/// A process that cannot be confused with a later one of the same id.
#[derive(Debug)]
pub struct Process {
    handle: OwnedFd,
    id: i32,
}

impl Process {
    /// Takes hold of the process `id` if it started at `start_time` (see [`start_time`]); `None` when it is gone.
    ///
    /// # Errors
    /// Those of `pidfd_open(2)`.
    pub fn find(id: i32, start: u64) -> io::Result<Option<Self>> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) };
        let Ok(raw) = i32::try_from(raw) else { return Err(io::Error::other("pidfd_open returned no descriptor")) };
        if raw < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        let handle = unsafe { OwnedFd::from_raw_fd(raw) };
        let process = Self { handle, id };
        // Asked after the handle exists: if the time matches, the handle cannot be of a later process.
        if start_time(id).ok() == Some(start) && !process.wait(Duration::ZERO)? { Ok(Some(process)) } else { Ok(None) }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Asks it to end (SIGTERM).
    ///
    /// # Errors
    /// `EPERM` when it belongs to somebody else. That it is gone already is no error.
    pub fn terminate(&self) -> io::Result<()> {
        self.signal(libc::SIGTERM)
    }

    /// Ends it (SIGKILL); the same errors.
    ///
    /// # Errors
    /// `EPERM` when it belongs to somebody else. That it is gone already is no error.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// Waits until it has ended, at most `limit`; says whether it has. For the first process of a process namespace this means that
    /// every process of the namespace has ended.
    ///
    /// # Errors
    /// Those of `poll(2)`.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let milliseconds = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        let mut polled = [PollFd::new(std::os::fd::AsFd::as_fd(&self.handle), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX);
        loop {
            match poll(&mut polled, timeout) {
                Ok(ready) => return Ok(ready > 0),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: a descriptor we own, an integer, no siginfo, no flags.
        let answer = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.handle.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) };
        if answer == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
    }
}

/// When a process started, in clock ticks since boot: together with its id it names a process for ever.
///
/// # Errors
/// `ENOENT` when there is no such process.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name (field 2) may contain anything, so count from its closing bracket: field 3 is the first word after it.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = rest.split_whitespace().nth(19).and_then(|word| word.parse().ok());
    field.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// Leaves the terminal and its process group: no Ctrl-C reaches this process any more.
///
/// # Errors
/// `EPERM` when it leads a process group.
pub fn leave_terminal() -> io::Result<()> {
    Ok(nix::unistd::setsid().map(drop)?)
}

/// The process that listens at the other end of a connected socket, by its id as this process sees it.
///
/// # Errors
/// Those of `getsockopt(2)`.
pub fn listening_process(stream: &UnixStream) -> io::Result<i32> {
    Ok(getsockopt(stream, PeerCredentials)?.pid())
}

/// Lets a thread (0: the calling one) run on one CPU only. Threads that it starts from now on inherit that.
///
/// # Errors
/// `ESRCH` when there is no such thread, `EINVAL` when this process may not use the CPU.
pub fn pin(thread: i32, cpu: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(thread), &only)?)
}

/// The CPUs that the calling thread may run on, in their order.
///
/// # Errors
/// Those of `sched_getaffinity(2)`.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect())
}

/// The effective user id of this process.
#[must_use]
pub fn user_id() -> u32 {
    geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_pinned_thread_may_use_one_cpu_and_so_may_what_it_starts() {
        let pinned = std::thread::spawn(|| {
            let last = *allowed_cpus().unwrap().last().unwrap();
            pin(0, last).unwrap();
            (last, allowed_cpus().unwrap(), std::thread::spawn(|| allowed_cpus().unwrap()).join().unwrap())
        });
        let (last, own, child) = pinned.join().unwrap();
        assert_eq!((own, child), (vec![last], vec![last]));
        assert!(pin(0, CpuSet::count() - 1).is_err());
    }
}
