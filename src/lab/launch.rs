//! From an ordinary process to the first process of a lab: every step that must happen before there is a second thread.

use std::io::{self, Read, Write};

use super::Error;
use super::directory::Directory;
use crate::sys::process::{
    Split, be_first_process, become_root_in_user_namespace, leave_shared_namespaces, leave_terminal, mount_proc, split, user_id,
};

/// What a process has become in [`enter`].
#[derive(Debug)]
pub(super) enum Role {
    /// The process that was started; its work is done. The first process of the lab is its child.
    Launcher(i32),
    /// The first process of the lab, whose other processes have ended, with the supervisor's exit code.
    First(i32),
    /// The supervisor, inside the lab's namespaces.
    Supervisor,
}

/// Leaves the machine's namespaces and becomes three processes: the caller, the first process of the lab, and its supervisor.
pub(super) fn enter(directory: &Directory) -> Result<Role, Error> {
    leave()?;
    let failed = |what: &'static str| Error::failed::<io::Error>(what);
    let (mut permission, mut give) = io::pipe().map_err(failed("cannot make a pipe"))?;
    match split().map_err(failed("cannot start the lab's first process"))? {
        Split::Parent(pid) => {
            // The lab goes on only when `lab down` can find it.
            directory.write_pid(pid).map_err(failed("cannot write the lab's pid file"))?;
            give.write_all(&[1]).map_err(failed("cannot start the lab's first process"))?;
            Ok(Role::Launcher(pid))
        }
        Split::Child => {
            drop(give);
            permission.read_exact(&mut [0]).map_err(failed("the launcher gave up"))?;
            drop(permission);
            leave_terminal().map_err(failed("cannot leave the terminal"))?;
            if let Err(error) = mount_proc() {
                // Some containers forbid it. The old /proc then shows the ids of the machine, which works too.
                eprintln!("cannot mount a fresh /proc, going on with the old one: {error}");
            }
            match split().map_err(failed("cannot start the lab's supervisor"))? {
                Split::Parent(main) => be_first_process(main).map(Role::First).map_err(failed("cannot wait for the lab's processes")),
                Split::Child => Ok(Role::Supervisor),
            }
        }
    }
}

/// As root directly; otherwise, and for a root without its usual rights (containers), as root of a user namespace.
fn leave() -> Result<(), Error> {
    let direct = if user_id() == 0 { leave_shared_namespaces() } else { Err(io::Error::from(io::ErrorKind::PermissionDenied)) };
    match direct {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        Err(error) => return Err(Error::failed("cannot make the lab's namespaces")(error)),
    }
    let own = become_root_in_user_namespace().and_then(|()| leave_shared_namespaces());
    own.map_err(|error| {
        Error::NotAllowed(format!("a lab needs root with CAP_SYS_ADMIN, or user namespaces, and this machine gives neither{}", hint(&error)))
    })
}

/// Which setting most likely stands in the way.
fn hint(error: &io::Error) -> String {
    let setting = |name: &str| std::fs::read_to_string(format!("/proc/sys/{name}")).map(|text| text.trim().to_owned()).unwrap_or_default();
    if setting("kernel/unprivileged_userns_clone") == "0" {
        return ": the setting kernel.unprivileged_userns_clone is 0".to_owned();
    }
    if setting("user/max_user_namespaces") == "0" {
        return ": the setting user.max_user_namespaces is 0".to_owned();
    }
    if setting("kernel/apparmor_restrict_unprivileged_userns") == "1" {
        return ": the setting kernel.apparmor_restrict_unprivileged_userns is 1".to_owned();
    }
    format!(": {error} (in a container: its seccomp profile forbids unshare)")
}
