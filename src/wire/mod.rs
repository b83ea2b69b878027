//! Every protobuf message that leaves or enters the process, as hand-written `prost` structs whose field tags can be read in place.
//! This room does no I/O and takes no decisions; it only says how messages look, and golden bytes in its tests hold it to that.
//! Main types: the messages of [`xds`] (the envelope), [`workload`] and [`authorization`] (what it brings), [`ca`], and [`zds`].

pub mod authorization;
pub mod ca;
pub mod google;
mod strict;
pub mod workload;
pub mod xds;
pub mod zds;
