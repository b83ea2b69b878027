//! `culvert lab bench`: what the proxies cost, measured on the user's own machine with nothing but this program.
//!
//! One run holds every contestant: no proxy at all, culvert, other proxies, and the floors, each in a topology of its own ([`stand`]): two
//! pods joined by one wire, a proxy on each side fed as on a node, and a third namespace that the mesh does not know, for passthrough. All
//! of them run all the time; trials take turns, in the opposite order each round, so that what the machine does besides meets all alike.
//! Figures are medians over rounds and medians of ratios within a round; CPU is the kernel's exact account of the proxies' threads.
//! Nothing is compared across runs.
//!
//! Like any lab it lives in a process namespace of its own and leaves nothing behind. It never measures through a bridge or a node's
//! namespace, and never reports a byte that the other end has not counted. Main types: [`Options`], [`Figure`], [`Report`]; [`run`] is the
//! outside, [`supervise`] the inside.
//!
//! [`stand`]: self

mod drive;
mod figure;
mod load;
mod measure;
mod memory;
mod message;
mod options;
mod report;
mod run;
mod stand;
mod statistics;
mod trial;

pub use drive::supervise;
pub use figure::Figure;
pub use load::{OneKind, run_one, serve as serve_load};
pub use options::{Contestant, Floor, Kind, Options, Words};
pub use report::{Machine, Report};
pub use run::{Event, run};
