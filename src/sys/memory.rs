//! The allocator's own settings.
#![allow(unsafe_code)]

use std::io;

/// Starts jemalloc's thread that gives freed memory back to the kernel. Without it that happens only while more is asked for: never, in an idle
/// process. Call it once, when the process will not fork any more.
///
/// # Errors
/// When the allocator cannot start a thread, or is built without that.
pub fn return_while_idle() -> io::Result<()> {
    let mut on = true;
    // SAFETY: the name ends with a zero; the new value is a C bool of the given size, and the old one is not asked for (mallctl(3)).
    let code = unsafe {
        tikv_jemalloc_sys::mallctl(c"background_thread".as_ptr(), std::ptr::null_mut(), std::ptr::null_mut(), (&raw mut on).cast(), size_of::<bool>())
    };
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}
