//! The node agent: makes pods part of the mesh by putting capture rules into them and telling the node's proxies to serve them.
//! This room never carries a byte of a pod's traffic and decides no policy; what it changes in a pod it can also take back.
//! Main types: [`rules::RulesConfig`], [`zds::ZdsServer`].

pub mod rules;
pub mod zds;

pub use crate::wire::zds::Pod;
