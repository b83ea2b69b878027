//! Where: what the mesh consists of, read from a source and published as one immutable [`World`] per change.
//! This room never decides about a connection, never blocks a reader, and never lets a bad source replace a good world.
//! Main types: [`World`], [`Mesh`] (the handle that everybody reads), [`Publisher`] (its one writer), [`local::LocalSource`].
//!
//! Sources: a static file or text ([`local`]), or a control plane ([`xds`]). The worlds of every source look alike, and [`dump()`] shows them in the shape of the
//! reference's config dump (dataplane §10.2).

mod dump;
mod follow;
mod form;
pub mod local;
mod world;
pub mod xds;

use std::path::PathBuf;

pub use dump::dump;
#[cfg(test)]
use form::Document;
use world::Draft;
pub use world::{Edit, LocalName, Mesh, Publisher, World};

/// Why there is no world to start with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the static configuration {}: {reason}", path.display())]
    Unreadable {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// The content is not a static configuration.
    #[error("{origin}{}: {field}: {reason}", if *line == 0 { String::new() } else { format!(":{line}:{column}") })]
    Refused {
        /// The path, or `LOCAL_XDS` for a text.
        origin: String,
        /// Line, counted from 1; 0 if there is none.
        line: u64,
        /// Column, counted from 1.
        column: u64,
        /// The field, such as `workloads[3].workloadIps[0]`, or `document` for the whole.
        field: String,
        /// What was expected and what was found.
        reason: String,
    },
}

#[cfg(test)]
mod tests;
