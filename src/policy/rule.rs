//! The words of a policy, exactly those of the reference (dataplane §6.1).

use ipnet::IpNet;

use crate::model::Text;

/// One authorization policy. All fields are public: whoever reads policies (xDS, a file) fills them in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Authorization {
    /// Name, unique in its namespace.
    pub name: Text,
    /// Namespace.
    pub namespace: Text,
    /// Whom it applies to.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// The policy matches if any of them does; without rules it never matches.
    pub rules: Vec<Rule>,
    /// Only reported, never enforced; holds for an invalid policy too.
    pub dry_run: bool,
    /// Whether we understood all of it.
    pub validity: Validity,
}

/// Whether a policy can be enforced as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Validity {
    /// Every part of it was understood.
    #[default]
    Valid,
    /// Something was not, and this is what: the policy denies all of its targets.
    Invalid(Text),
}

/// Whom a policy applies to (reference, dataplane §6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scope {
    /// Every workload.
    #[default]
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// The workloads that name it, and nobody else.
    WorkloadSelector,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Action {
    /// The connection may pass; as soon as one ALLOW policy applies, nothing else may.
    #[default]
    Allow,
    /// The connection may not pass, whatever else allows it.
    Deny,
}

/// Matches if all clauses do; without clauses it always matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Rule {
    /// Its clauses.
    pub clauses: Vec<Clause>,
}

/// Matches if any match does; without matches it always matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Clause {
    /// Its alternatives.
    pub matches: Vec<Match>,
}

/// Conditions on one connection: every list that is not empty must hold. A match with no condition at all never matches.
///
/// A positive list holds if any entry does, a `not_` list if no entry does.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Match {
    /// Namespace of the source identity.
    pub namespaces: Vec<StringMatch>,
    /// Negated `namespaces`.
    pub not_namespaces: Vec<StringMatch>,
    /// Source identity without `spiffe://`: `<trust domain>/ns/<namespace>/sa/<service account>`.
    pub principals: Vec<StringMatch>,
    /// Negated `principals`.
    pub not_principals: Vec<StringMatch>,
    /// Namespace and service account of the source identity, in any trust domain.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Negated `service_accounts`.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Address of the TCP peer.
    pub source_ips: Vec<IpNet>,
    /// Negated `source_ips`.
    pub not_source_ips: Vec<IpNet>,
    /// Address of the pod.
    pub destination_ips: Vec<IpNet>,
    /// Negated `destination_ips`.
    pub not_destination_ips: Vec<IpNet>,
    /// Target port on the pod.
    pub destination_ports: Vec<u16>,
    /// Negated `destination_ports`.
    pub not_destination_ports: Vec<u16>,
}

/// How a text is compared: literally and case-sensitively.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// Equal.
    Exact(Text),
    /// Begins with.
    Prefix(Text),
    /// Ends with.
    Suffix(Text),
    /// Is there at all.
    Presence,
}

/// One service account, in any trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Text,
    /// Its name.
    pub service_account: Text,
}

impl Authorization {
    /// An enforced policy with these rules.
    #[must_use]
    pub fn new(name: impl Into<Text>, namespace: impl Into<Text>, scope: Scope, action: Action, rules: Vec<Rule>) -> Self {
        Self { name: name.into(), namespace: namespace.into(), scope, action, rules, dry_run: false, validity: Validity::Valid }
    }

    /// A policy that was received but not understood: it denies all of its targets and says `reason`. If the scope itself
    /// was not understood, pass [`Scope::Global`], the widest.
    #[must_use]
    pub fn invalid(name: impl Into<Text>, namespace: impl Into<Text>, scope: Scope, action: Action, reason: impl Into<Text>) -> Self {
        Self { validity: Validity::Invalid(reason.into()), ..Self::new(name, namespace, scope, action, Vec::new()) }
    }

    /// `namespace/name`, the name of a policy everywhere.
    #[must_use]
    pub fn key(&self) -> Text {
        format!("{}/{}", self.namespace, self.name).into()
    }

    /// What in the words themselves cannot be meant: these would match nothing or everything.
    pub(super) fn problem(&self) -> Option<&'static str> {
        self.rules.iter().flat_map(|rule| &rule.clauses).flat_map(|clause| &clause.matches).find_map(Match::problem)
    }
}

impl Match {
    /// Whether there is no condition at all; such a match never matches.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.not_namespaces.is_empty()
            && self.principals.is_empty()
            && self.not_principals.is_empty()
            && self.service_accounts.is_empty()
            && self.not_service_accounts.is_empty()
            && self.source_ips.is_empty()
            && self.not_source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.not_destination_ips.is_empty()
            && self.destination_ports.is_empty()
            && self.not_destination_ports.is_empty()
    }

    fn problem(&self) -> Option<&'static str> {
        let mut texts = [&self.namespaces, &self.not_namespaces, &self.principals, &self.not_principals].into_iter().flatten();
        let mut accounts = self.service_accounts.iter().chain(&self.not_service_accounts);
        if texts.any(StringMatch::is_blank) {
            return Some("a namespace or principal matcher is an empty string");
        }
        if accounts.any(|account| account.namespace.is_empty() || account.service_account.is_empty()) {
            return Some("a service account matcher lacks its namespace or its name");
        }
        None
    }
}

impl StringMatch {
    fn is_blank(&self) -> bool {
        match self {
            Self::Exact(text) | Self::Prefix(text) | Self::Suffix(text) => text.is_empty(),
            Self::Presence => false,
        }
    }
}
