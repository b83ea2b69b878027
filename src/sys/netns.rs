//! Network namespaces: hold one, recognise one, and do a piece of work inside one.
//!
//! A socket belongs for ever to the namespace it was created in, so only creation and binding happen inside [`NetNs::run`];
//! accept, connect and I/O then work from any thread.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use nix::sched::{CloneFlags, setns, unshare};

/// What distinguishes one network namespace from another as long as somebody holds it open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetNsId {
    /// Device number of the nsfs file.
    pub dev: u64,
    /// Inode number on that device.
    pub ino: u64,
}

/// An open network namespace. Clones share one file descriptor; the namespace lives at least as long as the last clone.
#[derive(Debug, Clone)]
pub struct NetNs {
    file: Arc<OwnedFd>,
    id: NetNsId,
}

impl NetNs {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not mounted or the process is out of file descriptors.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace that `path` names: a bind mount such as `/var/run/netns/NAME`, or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// Those of `open(2)`. Whether the file is a network namespace shows when [`run`](Self::run) enters it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// Takes over a descriptor, for example one received over a unix socket.
    ///
    /// # Errors
    /// Those of `fstat(2)`; the descriptor is closed then.
    pub fn from_fd(file: OwnedFd) -> io::Result<Self> {
        let stat = nix::sys::stat::fstat(&file)?;
        Ok(Self { file: Arc::new(file), id: NetNsId { dev: stat.st_dev, ino: stat.st_ino } })
    }

    /// Makes a new, empty namespace (its loopback is down). It disappears with the last clone and the last socket in it.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn create() -> io::Result<Self> {
        // A thread of its own is thrown away afterwards, so that no thread of ours ever has to find its way back.
        let born = std::thread::Builder::new().name("netns-create".into()).spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::current()
        })?;
        born.join().unwrap_or_else(|_| Err(io::Error::other("the thread that creates a network namespace panicked")))
    }

    /// Device and inode: equal exactly for descriptors of the same namespace.
    #[must_use]
    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// Runs `work` on this thread inside the namespace and comes back, also when `work` panics. Threads and processes that `work`
    /// starts are born inside. `work` must not await: another task would then run in the wrong namespace.
    ///
    /// The process aborts if the thread cannot return, because going on would put every later socket of this thread into a
    /// stranger's pod.
    ///
    /// # Errors
    /// When the namespace cannot be entered (`EPERM` without `CAP_SYS_ADMIN`, `EINVAL` if the descriptor is not a network
    /// namespace); `work` has not run then.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let way_back = WayBack::prepare()?;
        enter(self.file.as_fd())?;
        let _way_back = way_back.begin();
        Ok(work())
    }
}

/// Two handles are equal when they hold the same namespace.
impl PartialEq for NetNs {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for NetNs {}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Checks at start-up that this process may enter network namespaces at all, by entering its own.
///
/// # Errors
/// One sentence that names the missing capability.
pub fn check_may_enter() -> io::Result<()> {
    NetNs::current()?.run(|| ())
}

fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| {
        let cause = io::Error::from(errno);
        match errno {
            nix::Error::EPERM => io::Error::new(cause.kind(), format!("cannot enter a network namespace without CAP_SYS_ADMIN: {cause}")),
            nix::Error::EINVAL => io::Error::new(cause.kind(), format!("the descriptor is not a network namespace: {cause}")),
            _ => cause,
        }
    })
}

/// Where the first thread that made a visit is at home. All workers are at home there: one descriptor serves them, and none has to open its own
/// for every visit.
static HOME: OnceLock<NetNs> = OnceLock::new();

thread_local! {
    /// Whether this thread is at home in [`HOME`], once that is known. Nothing but [`NetNs::run`] moves a thread, so it stays true.
    static AT_HOME_THERE: Cell<Option<bool>> = const { Cell::new(None) };
    /// The thread is on a visit.
    static AWAY: Cell<bool> = const { Cell::new(false) };
}

/// The way back from a visit that has not begun.
struct WayBack {
    from: NetNs,
    /// It leads into a namespace that is visited too.
    nested: bool,
}

impl WayBack {
    fn prepare() -> io::Result<Self> {
        let nested = AWAY.get();
        let home = HOME.get().filter(|_| !nested && AT_HOME_THERE.get() == Some(true));
        let from = match home {
            Some(home) => home.clone(),
            None => NetNs::current()?,
        };
        if !nested && AT_HOME_THERE.get().is_none() {
            AT_HOME_THERE.set(Some(HOME.get_or_init(|| from.clone()) == &from));
        }
        Ok(Self { from, nested })
    }

    fn begin(self) -> Visit {
        AWAY.set(true);
        Visit(self)
    }
}

/// Returns the thread to where it came from when dropped, or ends the process.
struct Visit(WayBack);

impl Drop for Visit {
    fn drop(&mut self) {
        if setns(&self.0.from, CloneFlags::CLONE_NEWNET).is_err() {
            // Nothing sane is left to do: this thread sits in a pod's namespace and does not know it.
            std::process::abort();
        }
        AWAY.set(self.0.nested);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn visits_within_visits_lead_back_to_where_each_began_also_on_a_thread_that_is_born_inside() {
        let (home, one, two) = (NetNs::current().unwrap().id(), NetNs::create().unwrap(), NetNs::create().unwrap());
        let here = || NetNs::current().unwrap().id();
        for _ in 0..2 {
            one.run(|| {
                two.run(|| assert_eq!(here(), two.id())).unwrap();
                assert_eq!(here(), one.id());
                let born_inside = std::thread::spawn({
                    let (one, two) = (one.clone(), two.clone());
                    move || {
                        for _ in 0..2 {
                            two.run(|| ()).unwrap();
                            assert_eq!(here(), one.id());
                        }
                    }
                });
                born_inside.join().unwrap();
            })
            .unwrap();
            assert_eq!(here(), home);
        }
    }

    #[test]
    fn work_runs_inside_and_the_thread_comes_back() {
        let home = NetNs::current().unwrap().id();
        let other = NetNs::create().unwrap();
        assert_ne!(home, other.id());
        assert_eq!(other.run(|| NetNs::current().unwrap().id()).unwrap(), other.id());
        assert_eq!(NetNs::current().unwrap().id(), home);
    }

    #[test]
    fn runs_may_be_nested() {
        let (home, first, second) = (NetNs::current().unwrap().id(), NetNs::create().unwrap(), NetNs::create().unwrap());
        let seen = first.run(|| (second.run(|| NetNs::current().unwrap().id()).unwrap(), NetNs::current().unwrap().id())).unwrap();
        assert_eq!(seen, (second.id(), first.id()));
        assert_eq!(NetNs::current().unwrap().id(), home);
    }

    #[test]
    fn a_panic_inside_still_brings_the_thread_back() {
        let home = NetNs::current().unwrap().id();
        let other = NetNs::create().unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| other.run(|| panic!("on purpose"))));
        assert!(caught.is_err());
        assert_eq!(NetNs::current().unwrap().id(), home);
    }

    #[test]
    fn a_clone_and_a_second_descriptor_have_the_same_id() {
        let first = NetNs::create().unwrap();
        let second = NetNs::from_fd(first.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(first.id(), second.id());
        assert_eq!(first.clone().id(), second.id());
    }

    #[test]
    fn a_descriptor_that_is_no_namespace_is_refused_and_nothing_runs() {
        let not_a_namespace = NetNs::from_fd(File::open("/proc/self/status").unwrap().into()).unwrap();
        let error = not_a_namespace.run(|| panic!("must not run")).unwrap_err();
        assert!(error.to_string().contains("not a network namespace"), "{error}");
    }

    #[test]
    fn this_process_may_enter_namespaces() {
        check_may_enter().unwrap();
    }
}
