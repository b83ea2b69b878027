//! The threads that move traffic. A single one runs a scheduler that shares nothing, which costs less per wake-up than a pool of one.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

/// The name of the threads.
const NAME: &str = "culvert-data";

/// The runtime of the data path.
pub(super) struct Workers {
    handle: Handle,
    kind: Kind,
}

enum Kind {
    Pool(Runtime),
    Single { stop: oneshot::Sender<()>, thread: JoinHandle<()> },
}

impl Workers {
    /// Starts so many threads.
    pub(super) fn start(threads: usize) -> io::Result<Self> {
        if threads > 1 {
            let runtime = Builder::new_multi_thread().worker_threads(threads).thread_name(NAME).enable_all().build()?;
            return Ok(Self { handle: runtime.handle().clone(), kind: Kind::Pool(runtime) });
        }
        let runtime = Builder::new_current_thread().thread_name(NAME).enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name(NAME.to_owned()).spawn(move || {
            // An error means that the process is ending in another way.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, kind: Kind::Single { stop, thread } })
    }

    /// Where to start tasks.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends the threads without waiting for tasks.
    pub(super) fn stop(self) {
        match self.kind {
            Kind::Pool(runtime) => runtime.shutdown_background(),
            Kind::Single { stop, thread } => {
                // A thread that has ended by itself needs neither.
                let _ = stop.send(());
                let _ = thread.join();
            }
        }
    }
}
