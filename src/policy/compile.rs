//! The policies of one workload, compiled, and the decision itself (reference, dataplane §6.4).

use std::fmt;
use std::sync::Arc;

use crate::model::Text;

use super::cache::DecisionCache;
use super::decision::{Decision, DenialReason, DryRunMatch, conclude};
use super::index::RuleIndex;
use super::prepare::{Prepared, Subject, Uses};
use super::{Action, Authorization, Denial, Facts, Permitted};

/// Up to this many rules are evaluated faster than a cache is asked.
const FEW: usize = 4;

/// All policies that apply to a destination workload, compiled. Cheap to clone, made by [`super::PolicySet::compile`].
///
/// Two are equal if the same policies apply, so a watcher can tell whether anything changed for its workload.
#[derive(Clone)]
pub struct CompiledPolicy(pub(super) Arc<Compiled>);

/// Layers are shared between workloads: the global one by all, that of a namespace by all workloads in it.
pub(super) struct Compiled {
    pub(super) global: Option<Arc<Layer>>,
    pub(super) namespace: Option<Arc<Layer>>,
    pub(super) selected: Option<Arc<Layer>>,
    /// Policies that the workload names and nobody has sent.
    pub(super) unknown: Vec<Text>,
    decisions: Decisions,
}

/// How decisions are come by.
enum Decisions {
    /// Without rules there is nothing to evaluate, and one decision for all.
    Constant(Arc<Decision>),
    Evaluated,
    Cached(DecisionCache),
}

/// Policies of one scope, by key.
pub(super) struct Layer {
    pub(super) policies: Box<[Arc<Prepared>]>,
    dry_run_deny: RuleIndex,
    deny: RuleIndex,
    dry_run_allow: RuleIndex,
    allow: RuleIndex,
    /// Whether an ALLOW policy is enforced, even one that can never match.
    enforces_allow: bool,
    /// The first policy that cannot be enforced.
    unenforceable: Option<usize>,
    /// How many rules there are, and what they look at.
    rules: usize,
    uses: Uses,
}

impl Layer {
    pub(super) fn new(policies: Box<[Arc<Prepared>]>) -> Self {
        let index = |action: Action, dry_run: bool| {
            RuleIndex::new(&policies, |policy| policy.authorization.action == action && policy.authorization.dry_run == dry_run)
        };
        let enforced = |policy: &Prepared| !policy.authorization.dry_run;
        Self {
            dry_run_deny: index(Action::Deny, true),
            deny: index(Action::Deny, false),
            dry_run_allow: index(Action::Allow, true),
            allow: index(Action::Allow, false),
            enforces_allow: policies.iter().any(|policy| enforced(policy) && policy.authorization.action == Action::Allow),
            rules: policies.iter().map(|policy| policy.rules.len()).sum(),
            uses: policies.iter().fold(Uses::default(), |uses, policy| uses.or(policy.uses)),
            unenforceable: policies.iter().position(|policy| enforced(policy) && policy.problem().is_some()),
            policies,
        }
    }

    fn first(&self, index: &RuleIndex, subject: &Subject<'_>) -> Option<Text> {
        index.first(&self.policies, subject).and_then(|at| self.policies.get(at)).map(|policy| policy.key.clone())
    }

    fn dry_run<'a>(&'a self, index: &'a RuleIndex, subject: &Subject<'_>) -> impl Iterator<Item = DryRunMatch> + 'a {
        let found = index.all(&self.policies, subject).into_iter().filter_map(|at| self.policies.get(at));
        found.map(|policy| DryRunMatch { policy: policy.key.clone(), action: policy.authorization.action })
    }
}

impl Compiled {
    pub(super) fn new(global: Option<Arc<Layer>>, namespace: Option<Arc<Layer>>, selected: Option<Arc<Layer>>, unknown: Vec<Text>) -> Self {
        let mut compiled = Self { global, namespace, selected, unknown, decisions: Decisions::Evaluated };
        let (rules, uses) = compiled.layers().fold((0, Uses::default()), |(rules, uses), layer| (rules + layer.rules, uses.or(layer.uses)));
        compiled.decisions = match rules {
            0 => Decisions::Constant(Arc::new(compiled.evaluate(&Facts::anything()))),
            1..=FEW => Decisions::Evaluated,
            _ => Decisions::Cached(DecisionCache::new(uses)),
        };
        compiled
    }

    fn layers(&self) -> impl Iterator<Item = &Arc<Layer>> {
        [&self.global, &self.namespace, &self.selected].into_iter().flatten()
    }

    /// The order of the reference, dataplane §6.4; what we do not know or understand denies right after what we do.
    fn evaluate(&self, facts: &Facts) -> Decision {
        let subject = Subject::of(facts);
        let mut dry_run: Vec<DryRunMatch> = self.layers().flat_map(|layer| layer.dry_run(&layer.dry_run_deny, &subject)).collect();
        if let Some(policy) = self.layers().find_map(|layer| layer.first(&layer.deny, &subject)) {
            return Decision { outcome: Err(DenialReason::Explicit { policy }), dry_run };
        }
        if let Some(reason) = self.unenforceable().or_else(|| self.unknown()) {
            return Decision { outcome: Err(reason), dry_run };
        }
        dry_run.extend(self.layers().flat_map(|layer| layer.dry_run(&layer.dry_run_allow, &subject)));
        if !self.layers().any(|layer| layer.enforces_allow) {
            return Decision { outcome: Ok(None), dry_run };
        }
        let allowed_by = self.layers().find_map(|layer| layer.first(&layer.allow, &subject));
        Decision { outcome: allowed_by.map(Some).ok_or(DenialReason::NotAllowed), dry_run }
    }

    fn unenforceable(&self) -> Option<DenialReason> {
        let policy = self.layers().find_map(|layer| layer.unenforceable.and_then(|at| layer.policies.get(at)))?;
        policy.problem().map(|problem| DenialReason::Unenforceable { policy: policy.key.clone(), problem: problem.clone() })
    }

    fn unknown(&self) -> Option<DenialReason> {
        self.unknown.first().map(|policy| DenialReason::Unknown { policy: policy.clone() })
    }
}

impl CompiledPolicy {
    /// Asks whether a new connection may pass. Both answers carry the dry-run policies that matched, for the log.
    ///
    /// A decision for facts that were seen before is taken from a bounded cache.
    pub fn permit(&self, facts: &Facts) -> Result<Permitted, Denial> {
        conclude(match &self.0.decisions {
            Decisions::Constant(decision) => Arc::clone(decision),
            Decisions::Evaluated => Arc::new(self.0.evaluate(&facts.canonical())),
            Decisions::Cached(cache) => cache.decide(facts.canonical(), |facts| self.0.evaluate(facts)),
        })
    }

    /// Asks whether a live connection may go on, after a change of policy.
    pub fn recheck(&self, facts: &Facts) -> Result<(), Denial> {
        self.permit(facts).map(drop)
    }

    /// The policies that apply: global, of the namespace, named by the workload; each by key.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.0.layers().flat_map(|layer| &layer.policies).map(|policy| &policy.authorization)
    }

    /// The policies that the workload names and nobody has sent; while there is one, everything is denied.
    #[must_use]
    pub fn unknown(&self) -> &[Text] {
        &self.0.unknown
    }
}

impl PartialEq for CompiledPolicy {
    fn eq(&self, other: &Self) -> bool {
        let same = |left: &Option<Arc<Layer>>, right: &Option<Arc<Layer>>| match (left, right) {
            (None, None) => true,
            (Some(left), Some(right)) => {
                let mut pairs = left.policies.iter().zip(&right.policies);
                let equal = |left: &Arc<Prepared>, right: &Arc<Prepared>| Arc::ptr_eq(left, right) || left.authorization == right.authorization;
                Arc::ptr_eq(left, right) || (left.policies.len() == right.policies.len() && pairs.all(|(left, right)| equal(left, right)))
            }
            _ => false,
        };
        Arc::ptr_eq(&self.0, &other.0)
            || (self.0.unknown == other.0.unknown
                && same(&self.0.global, &other.0.global)
                && same(&self.0.namespace, &other.0.namespace)
                && same(&self.0.selected, &other.0.selected))
    }
}

impl Eq for CompiledPolicy {}

impl fmt::Debug for CompiledPolicy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policies: Vec<Text> = self.policies().map(|policy| policy.key()).collect();
        formatter.debug_struct("CompiledPolicy").field("policies", &policies).field("unknown", &self.0.unknown).finish_non_exhaustive()
    }
}
