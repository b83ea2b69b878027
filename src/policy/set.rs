//! All policies that are known, and which of them apply to whom (reference, dataplane §6.2).

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use crate::model::Text;

use super::compile::{Compiled, CompiledPolicy, Layer};
use super::prepare::Prepared;
use super::{Authorization, Scope};

/// All known policies. Persistent: a clone costs a few reference counts and shares everything that an edit does not touch.
///
/// Compiled policies are shared too. Workloads to which the same policies apply get the same [`CompiledPolicy`], and an edit
/// that does not concern them leaves it, and the decisions it remembers, in place.
#[derive(Clone, Default)]
pub struct PolicySet {
    policies: imbl::OrdMap<Text, Arc<Prepared>>,
    global: Scoped,
    namespaces: imbl::HashMap<Text, Scoped>,
    compiled: Arc<Memory>,
    /// What [`PolicySet::prepare`] compiled of exactly these policies, by the hashes of what it is for.
    ready: Arc<HashMap<u64, Ready>>,
}

/// The policies of one kind of workload, compiled before anybody asks.
struct Ready {
    namespace: Text,
    names: Vec<Text>,
    compiled: CompiledPolicy,
}

/// The policies of one scope; their layer is made when it is first asked for.
#[derive(Clone, Default)]
struct Scoped {
    policies: imbl::OrdMap<Text, Arc<Prepared>>,
    layer: Arc<OnceLock<Arc<Layer>>>,
}

/// What was compiled and is still in use by somebody. An entry is only a proposal: it is taken if it consists of exactly the
/// layers that apply, so neither a hash collision nor an older set that shares this memory can do harm.
#[derive(Default)]
struct Memory {
    hashing: RandomState,
    entries: Mutex<HashMap<u64, Weak<Compiled>>>,
}

/// Below this many entries nobody looks for dead ones.
const MEMORY_SWEEP: usize = 64;

impl Scoped {
    fn insert(&mut self, policy: &Arc<Prepared>) {
        self.policies.insert(policy.key.clone(), Arc::clone(policy));
        self.layer = Arc::default();
    }

    fn remove(&mut self, key: &str) {
        if self.policies.remove(key).is_some() {
            self.layer = Arc::default();
        }
    }

    fn layer(&self) -> Option<Arc<Layer>> {
        let make = || Arc::new(Layer::new(self.policies.values().cloned().collect()));
        (!self.policies.is_empty()).then(|| Arc::clone(self.layer.get_or_init(make)))
    }
}

impl Memory {
    fn recall(&self, key: u64) -> Option<Arc<Compiled>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).get(&key).and_then(Weak::upgrade)
    }

    fn remember(&self, key: u64, compiled: &Arc<Compiled>) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= MEMORY_SWEEP && entries.len() == entries.capacity() {
            entries.retain(|_, entry| entry.strong_count() > 0);
        }
        entries.insert(key, Arc::downgrade(compiled));
    }
}

impl PolicySet {
    /// No policies: everything is permitted, unless a workload names one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a policy, or replaces the one of the same namespace and name, whatever its scope was. A policy whose words cannot
    /// be meant (an empty matcher) is kept as an invalid one.
    pub fn insert(&mut self, authorization: Authorization) {
        let policy = Arc::new(Prepared::new(authorization));
        if let Some(old) = self.policies.get(&policy.key) {
            if old.authorization == policy.authorization {
                return;
            }
            self.remove(&policy.key);
        }
        self.ready = Arc::default();
        match policy.authorization.scope {
            Scope::Global => self.global.insert(&policy),
            Scope::Namespace => self.namespaces.entry(policy.authorization.namespace.clone()).or_default().insert(&policy),
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(policy.key.clone(), policy);
    }

    /// Removes a policy by `namespace/name`, and says whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        let Some(policy) = self.policies.remove(key) else { return false };
        self.ready = Arc::default();
        let namespace = &policy.authorization.namespace;
        match policy.authorization.scope {
            Scope::Global => self.global.remove(key),
            Scope::Namespace => {
                if let Some(scoped) = self.namespaces.get_mut(namespace) {
                    scoped.remove(key);
                    if scoped.policies.is_empty() {
                        self.namespaces.remove(namespace);
                    }
                }
            }
            Scope::WorkloadSelector => {}
        }
        true
    }

    /// A policy by `namespace/name`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Arc<Authorization>> {
        self.policies.get(key).map(|policy| &policy.authorization)
    }

    /// All policies by key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.policies.values().map(|policy| &policy.authorization)
    }

    /// How many policies are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.policies.len()
    }

    /// Whether no policy is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// Compiles what applies to workloads that will be asked for, given by namespace and by the names that they name: once for all that are alike, and
    /// only where something changed. To be called before a set is shown to those who must not wait (10,000 policies of 10 rules take 80 ms): for
    /// these workloads [`PolicySet::compile`] is then a look-up, whatever becomes of other sets. Scopes that somebody compiled from the set `before`
    /// are filed anew as well, for workloads that left and still have connections.
    pub fn prepare<'a>(&mut self, before: &Self, workloads: impl Iterator<Item = (&'a Text, &'a [Text])>) {
        let stale = |own: &Scoped, old: &Scoped| own.layer.get().is_none() && old.layer.get().is_some();
        if stale(&self.global, &before.global) {
            self.global.layer();
        }
        for (namespace, old) in &before.namespaces {
            if let Some(own) = self.namespaces.get(namespace).filter(|own| stale(own, old)) {
                own.layer();
            }
        }
        let mut ready = HashMap::new();
        for (namespace, names) in workloads {
            ready.entry(self.key(namespace, names)).or_insert_with(|| Ready {
                namespace: namespace.clone(),
                names: names.to_vec(),
                compiled: self.compile(namespace, names),
            });
        }
        self.ready = Arc::new(ready);
    }

    /// Whether [`PolicySet::compile`] is a look-up for workloads of this kind, because they were prepared.
    #[must_use]
    pub fn is_ready(&self, namespace: &str, names: &[Text]) -> bool {
        self.ready(self.key(namespace, names), namespace, names).is_some()
    }

    fn ready(&self, key: u64, namespace: &str, names: &[Text]) -> Option<&CompiledPolicy> {
        let ready = self.ready.get(&key).filter(|ready| ready.namespace == *namespace && ready.names == names);
        ready.map(|ready| &ready.compiled)
    }

    fn key(&self, namespace: &str, names: &[Text]) -> u64 {
        self.compiled.hashing.hash_one((namespace, names))
    }

    /// The policies that apply to a workload of `namespace` which names `names` (`namespace/name` each): all global ones, those
    /// of its namespace, and the named ones. Names that are not known deny until they are.
    ///
    /// A look-up for workloads that were prepared, and usually for others: work is done only for policies that changed since somebody last asked.
    /// Hold on to the result, or it and its decision cache are made anew.
    #[must_use]
    pub fn compile(&self, namespace: &str, names: &[Text]) -> CompiledPolicy {
        let key = self.key(namespace, names);
        if let Some(ready) = self.ready(key, namespace, names) {
            return ready.clone();
        }
        let global = self.global.layer();
        let own = self.namespaces.get(namespace).and_then(Scoped::layer);
        let (mut selected, mut unknown) = (BTreeMap::new(), Vec::new());
        for name in names {
            match self.policies.get(name) {
                None if unknown.contains(name) => {}
                None => unknown.push(name.clone()),
                Some(policy) if applies_anyway(&policy.authorization, namespace) => {}
                Some(policy) => drop(selected.insert(&policy.key, policy)),
            }
        }
        let selected: Vec<&Arc<Prepared>> = selected.into_values().collect();
        let old = self.compiled.recall(key);
        let old_selected = old.as_ref().and_then(|old| old.selected.as_ref()).filter(|layer| consists_of(layer, &selected));
        if let Some(old) = &old
            && same_layer(&old.global, &global)
            && same_layer(&old.namespace, &own)
            && old_selected.is_some() != selected.is_empty()
            && old.selected.is_some() == old_selected.is_some()
            && old.unknown == unknown
        {
            return CompiledPolicy(Arc::clone(old));
        }
        let make = || (!selected.is_empty()).then(|| Arc::new(Layer::new(selected.iter().map(|policy| Arc::clone(policy)).collect())));
        let compiled = Arc::new(Compiled::new(global, own, old_selected.cloned().or_else(make), unknown));
        self.compiled.remember(key, &compiled);
        CompiledPolicy(compiled)
    }
}

/// A named policy may be one that applies without being named.
fn applies_anyway(policy: &Authorization, namespace: &str) -> bool {
    match policy.scope {
        Scope::Global => true,
        Scope::Namespace => policy.namespace == *namespace,
        Scope::WorkloadSelector => false,
    }
}

fn same_layer(left: &Option<Arc<Layer>>, right: &Option<Arc<Layer>>) -> bool {
    match (left, right) {
        (None, None) => true,
        (Some(left), Some(right)) => Arc::ptr_eq(left, right),
        _ => false,
    }
}

fn consists_of(layer: &Layer, policies: &[&Arc<Prepared>]) -> bool {
    layer.policies.len() == policies.len() && layer.policies.iter().zip(policies).all(|(left, right)| Arc::ptr_eq(left, right))
}

impl PartialEq for PolicySet {
    fn eq(&self, other: &Self) -> bool {
        self.policies.len() == other.policies.len() && self.iter().zip(other.iter()).all(|(left, right)| left == right)
    }
}

impl Eq for PolicySet {}

impl fmt::Debug for PolicySet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Action;

    #[test]
    fn scopes_that_somebody_uses_are_filed_before_a_changed_set_is_shown() {
        let policy = |name: &str, namespace: &str, scope| Authorization::new(name, namespace, scope, Action::Allow, Vec::new());
        let mut before = PolicySet::new();
        for namespace in ["used", "unused"] {
            before.insert(policy("one", namespace, Scope::Namespace));
        }
        before.insert(policy("all", "root", Scope::Global));
        drop(before.compile("used", &[]));
        let mut after = before.clone();
        for namespace in ["used", "unused"] {
            after.insert(policy("two", namespace, Scope::Namespace));
        }
        after.insert(policy("more", "root", Scope::Global));
        let filed = |set: &PolicySet| [&set.global, &set.namespaces["used"], &set.namespaces["unused"]].map(|scoped| scoped.layer.get().is_some());
        assert_eq!(filed(&after), [false; 3]);
        after.prepare(&before, std::iter::empty());
        assert_eq!(filed(&after), [true, true, false], "what nobody uses waits until somebody does");
        assert_eq!(after.compile("used", &[]).policies().count(), 4);
    }

    #[test]
    fn what_was_prepared_is_a_look_up_for_exactly_those_workloads_and_policies() {
        let policy = |name: &str, scope| Authorization::new(name, "shop", scope, Action::Allow, Vec::new());
        let mut set = PolicySet::new();
        for (name, scope) in [("all", Scope::Global), ("own", Scope::Namespace), ("one", Scope::WorkloadSelector), ("two", Scope::WorkloadSelector)] {
            set.insert(policy(name, scope));
        }
        let (shop, office): (Text, Text) = ("shop".into(), "office".into());
        let (one, two): (Vec<Text>, Vec<Text>) = (vec!["shop/one".into()], vec!["shop/two".into()]);
        let workloads = || [(&shop, &one[..]), (&shop, &one[..]), (&office, &[][..])].into_iter();
        set.prepare(&PolicySet::new(), workloads());
        assert_eq!(set.ready.len(), 2, "once for all that are alike");
        for (namespace, names, ready) in [("shop", &one, true), ("shop", &two, false), ("office", &one, false), ("office", &vec![], true)] {
            assert_eq!(set.is_ready(namespace, names), ready, "{namespace} {names:?}");
        }
        let first = Arc::downgrade(&set.compile("shop", &one).0);
        assert!(std::ptr::eq(Arc::as_ptr(&set.compile("shop", &one).0), first.as_ptr()) && first.strong_count() > 0, "nobody needs to hold on to it");
        // Not of another set, however it came to be.
        let edits: [fn(&mut PolicySet); 2] =
            [|set| set.insert(Authorization::new("more", "shop", Scope::Global, Action::Deny, Vec::new())), |set| assert!(set.remove("shop/one"))];
        for edit in edits {
            let mut after = set.clone();
            edit(&mut after);
            assert!(!after.is_ready("shop", &one) && after.compile("shop", &one) != set.compile("shop", &one));
            let slow = after.compile("shop", &one);
            after.prepare(&set, workloads());
            assert!(after.is_ready("shop", &one) && after.compile("shop", &one) == slow);
        }
        // What did not change is not compiled again.
        let mut same = set.clone();
        same.prepare(&set, workloads().take(1));
        assert!(Arc::ptr_eq(&same.compile("shop", &one).0, &set.compile("shop", &one).0));
        assert!(!same.is_ready("office", &[]), "what nobody asks for any more is forgotten");
    }
}
