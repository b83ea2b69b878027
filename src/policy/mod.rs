//! Decisions: compiled rules and the facts of one connection give a verdict with its reason (reference, dataplane §6).
//! This room is pure: it does no I/O, keeps no clock, logs nothing, and never grants what it does not understand.
//! Main types: [`Authorization`], [`PolicySet`], [`CompiledPolicy`], [`Permitted`], [`Denial`].
//!
//! Where we are stricter than the reference:
//! * a policy that carries something we cannot read denies all of its targets, whatever its action; so does an empty string
//!   matcher, which could only be a mistake ([`Validity`]);
//! * a policy that a workload names but nobody has sent denies until it is known;
//! * a negated identity matcher against a peer without identity never grants (ALLOW) but does match in DENY, so that
//!   `not_principals: PRESENCE` in a DENY keeps meaning STRICT mutual TLS.
//!
//! How it is fast: see `index.rs` (which rules can match at all) and `cache.rs` (verdicts of facts already seen).

mod cache;
mod compile;
mod decision;
mod index;
mod prepare;
mod rule;
mod set;

#[cfg(test)]
mod tests;

pub use compile::CompiledPolicy;
pub use decision::{Denial, DenialReason, DryRunMatch, Facts, Permitted};
pub use rule::{Action, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch, Validity};
pub use set::PolicySet;
