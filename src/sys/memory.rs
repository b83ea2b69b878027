//! The allocator's own settings.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;

/// How long freed pages are kept for the next who needs some, milliseconds. jemalloc's own 10 s keep the peak of every burst of connections
/// that long; buffers of the data path are pooled above the allocator and do not come by here.
const KEEP: libc::ssize_t = 1000;

/// Starts jemalloc's thread that gives freed memory back to the kernel, a second after it was freed. Without it that happens only while more is
/// asked for: never, in an idle process. Call it once, before other threads are started, and when the process will not fork any more.
///
/// # Errors
/// When the allocator cannot start a thread, or is built without that.
pub fn return_while_idle() -> io::Result<()> {
    // The arenas that threads will have, and the one that this thread has.
    set(c"arenas.dirty_decay_ms", KEEP)?;
    set(c"arena.0.dirty_decay_ms", KEEP)?;
    set(c"background_thread", true)
}

/// Sets one of jemalloc's controls, whose type `T` must be the one that mallctl(3) gives for it.
fn set<T>(name: &CStr, mut value: T) -> io::Result<()> {
    let new = (&raw mut value).cast();
    // SAFETY: the name ends with a zero; the new value is of the control's type and size, which mallctl checks, and the old one is not asked for.
    let code = unsafe { tikv_jemalloc_sys::mallctl(name.as_ptr(), std::ptr::null_mut(), std::ptr::null_mut(), new, size_of::<T>()) };
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}
