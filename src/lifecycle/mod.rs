//! (being built)

mod clock;

pub use clock::{Clock, SettableTime};
