//! A mesh in a box: nodes and pods as network namespaces on one Linux machine, with real proxies, real rules and real commands.
//! It never touches the machine's own network, needs no cluster, and leaves nothing behind: everything lives in namespaces that end
//! with one process. Main types: [`Definition`] (the file), [`Lab`] (a handle on a running one), [`Status`].
//!
//! Who runs what: `culvert lab up` starts `culvert lab supervise`, which leaves the shared namespaces (see [`launch`]) and becomes the
//! first process of its own process namespace plus one child, the `supervisor`. The supervisor holds every network namespace by a
//! descriptor only, builds the links (`topology`), starts a control plane (`control_plane`), proxies and pod commands, and answers on a socket
//! ([`control`]). When the
//! first process ends, for whatever reason, the kernel kills all the others, and with the descriptors the namespaces are gone.

pub mod bench;
mod certificates;
pub mod control;
mod control_plane;
pub mod definition;
pub mod demo;
mod directory;
mod handle;
pub mod launch;
mod mesh;
mod plan;
mod pod;
pub mod policies;
pub mod programs;
mod proxies;
mod running;
mod supervisor;
mod tasks;
mod topology;
mod waypoints;
pub mod wire_look;

pub use control::Status;
pub use definition::Definition;
pub use directory::{Base, LabState};
pub use handle::{Lab, Launch, Place, Wiring, enter_and_run};
pub use supervisor::{Means, supervise};

/// The name of the namespace between the nodes, where a look at the wire is taken.
pub const FABRIC: &str = "fabric";

/// What went wrong with a lab.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be used; says where and why.
    #[error("lab file: {0}")]
    Definition(String),
    /// The kernel does not allow what a lab is made of.
    #[error("{0}")]
    NotAllowed(String),
    /// The lab, or a part of it, does not exist or is in the wrong state.
    #[error("{0}")]
    State(String),
    /// A step failed.
    #[error("{what}: {cause}")]
    Failed {
        /// The step, "cannot …".
        what: String,
        /// Why.
        cause: String,
    },
}

impl Error {
    /// For `map_err`: a step that failed.
    pub(crate) fn failed<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |cause| Self::Failed { what, cause: cause.to_string() }
    }
}
