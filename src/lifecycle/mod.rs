//! Tasks: how they end (drain, supervision), how they try again (backoff), how many there may be (permits, rates), what time it is.
//! This room knows nothing of mesh, opens no socket and logs nothing; whoever asks decides what a refusal means.
//! Main types: [`drain::channel`], [`Supervisor`], [`Backoff`], [`Permits`], [`RateBudget`], [`AcceptBackoff`], [`Clock`].

mod accept;
mod backoff;
mod clock;
pub mod drain;
mod permits;
mod rate;
mod supervise;

pub use accept::{AcceptBackoff, AcceptErrorKind};
pub use backoff::{Backoff, BackoffError};
pub use clock::{Clock, SettableTime};
pub use drain::{DrainMode, DrainTrigger, DrainWatcher};
pub use permits::{Permit, PermitLimits, PermitRefused, Permits};
pub use rate::{RateBudget, RateBudgets, RateExceeded};
pub use supervise::{Supervisor, TaskEnd, TaskFailure};
