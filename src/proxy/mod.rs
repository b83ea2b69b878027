//! (being built)

pub mod route;
