//! A policy as the config dump and the static file write it (reference, dataplane §10.2).

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Refusal;
use super::scalar::{As, Flag, Word};
use crate::model::Text;
use crate::policy::{Action, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch, Validity};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PolicyForm {
    pub(super) name: Text,
    #[serde(default)]
    pub(super) namespace: Text,
    scope: Word<Scope>,
    action: Word<Action>,
    #[serde(deserialize_with = "super::yaml::list")]
    rules: Vec<Vec<Vec<MatchForm>>>,
    #[serde(default)]
    dry_run: Flag,
    /// Why the policy cannot be enforced and denies all of its targets. Not in the reference; without it a dump of such a policy
    /// would load again as a policy without rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    invalid: Option<Text>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MatchForm {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<StringForm>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_namespaces: Vec<StringForm>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service_accounts: Vec<ServiceAccountForm>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_service_accounts: Vec<ServiceAccountForm>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    principals: Vec<StringForm>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_principals: Vec<StringForm>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ips: Vec<As<IpNet>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_source_ips: Vec<As<IpNet>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_ips: Vec<As<IpNet>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_destination_ips: Vec<As<IpNet>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_ports: Vec<As<u16>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_destination_ports: Vec<As<u16>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
enum StringForm {
    Exact(Text),
    Prefix(Text),
    Suffix(Text),
    /// Written as `Presence: []`.
    Presence([(); 0]),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceAccountForm {
    namespace: Text,
    service_account: Text,
}

impl PolicyForm {
    pub(super) fn of(policy: &Authorization) -> Self {
        Self {
            name: policy.name.clone(),
            namespace: policy.namespace.clone(),
            scope: Word(policy.scope),
            action: Word(policy.action),
            rules: policy
                .rules
                .iter()
                .map(|rule| rule.clauses.iter().map(|clause| clause.matches.iter().map(MatchForm::of).collect()).collect())
                .collect(),
            dry_run: Flag(policy.dry_run),
            invalid: match &policy.validity {
                Validity::Valid => None,
                Validity::Invalid(reason) => Some(reason.clone()),
            },
        }
    }

    /// The row. What could not be meant is refused here, where it can still be put right: a policy that silently matches
    /// nothing would leave a door open (DENY) or shut (ALLOW).
    pub(super) fn into_row(self) -> Result<Authorization, Refusal> {
        if self.name.is_empty() || self.name.contains('/') {
            return Err(Refusal::at("name", "expected a name without '/'"));
        }
        if self.namespace.is_empty() && self.scope.0 == Scope::Namespace {
            return Err(Refusal::at("namespace", "a policy of scope Namespace needs a namespace"));
        }
        if self.invalid.is_none() {
            self.check()?;
        }
        let rules = self.rules.into_iter().map(|clauses| Rule {
            clauses: clauses.into_iter().map(|matches| Clause { matches: matches.into_iter().map(MatchForm::into_match).collect() }).collect(),
        });
        Ok(Authorization {
            name: self.name,
            namespace: self.namespace,
            scope: self.scope.0,
            action: self.action.0,
            rules: rules.collect(),
            dry_run: self.dry_run.0,
            validity: self.invalid.map_or(Validity::Valid, Validity::Invalid),
        })
    }

    fn check(&self) -> Result<(), Refusal> {
        for (rule, clauses) in self.rules.iter().enumerate() {
            for (clause, matches) in clauses.iter().enumerate() {
                for (position, form) in matches.iter().enumerate() {
                    form.check().map_err(|refusal| refusal.within_index(position).within_index(clause).within("rules", rule))?;
                }
            }
        }
        Ok(())
    }
}

impl MatchForm {
    fn of(from: &Match) -> Self {
        let texts = |list: &[StringMatch]| list.iter().map(StringForm::of).collect();
        let ranges = |list: &[IpNet]| list.iter().copied().map(As).collect();
        let ports = |list: &[u16]| list.iter().copied().map(As).collect();
        let accounts = |list: &[ServiceAccountMatch]| {
            let form = |account: &ServiceAccountMatch| ServiceAccountForm {
                namespace: account.namespace.clone(),
                service_account: account.service_account.clone(),
            };
            list.iter().map(form).collect()
        };
        Self {
            namespaces: texts(&from.namespaces),
            not_namespaces: texts(&from.not_namespaces),
            service_accounts: accounts(&from.service_accounts),
            not_service_accounts: accounts(&from.not_service_accounts),
            principals: texts(&from.principals),
            not_principals: texts(&from.not_principals),
            source_ips: ranges(&from.source_ips),
            not_source_ips: ranges(&from.not_source_ips),
            destination_ips: ranges(&from.destination_ips),
            not_destination_ips: ranges(&from.not_destination_ips),
            destination_ports: ports(&from.destination_ports),
            not_destination_ports: ports(&from.not_destination_ports),
        }
    }

    fn into_match(self) -> Match {
        let texts = |list: Vec<StringForm>| list.into_iter().map(StringForm::into_match).collect();
        let ranges = |list: Vec<As<IpNet>>| list.into_iter().map(|range| range.0).collect();
        let ports = |list: Vec<As<u16>>| list.into_iter().map(|port| port.0).collect();
        let accounts = |list: Vec<ServiceAccountForm>| {
            let account = |form: ServiceAccountForm| ServiceAccountMatch { namespace: form.namespace, service_account: form.service_account };
            list.into_iter().map(account).collect()
        };
        Match {
            namespaces: texts(self.namespaces),
            not_namespaces: texts(self.not_namespaces),
            principals: texts(self.principals),
            not_principals: texts(self.not_principals),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            source_ips: ranges(self.source_ips),
            not_source_ips: ranges(self.not_source_ips),
            destination_ips: ranges(self.destination_ips),
            not_destination_ips: ranges(self.not_destination_ips),
            destination_ports: ports(self.destination_ports),
            not_destination_ports: ports(self.not_destination_ports),
        }
    }

    fn check(&self) -> Result<(), Refusal> {
        let principals = [("principals", &self.principals), ("notPrincipals", &self.not_principals)];
        let namespaces = [("namespaces", &self.namespaces), ("notNamespaces", &self.not_namespaces)];
        for (field, list) in principals.into_iter().chain(namespaces) {
            for (index, form) in list.iter().enumerate() {
                let Some((word, text)) = form.word() else { continue };
                let reason = if text.is_empty() {
                    "expected a text; an empty one would match nothing or everything"
                } else if text.contains("spiffe://") {
                    "expected <trust domain>/ns/<namespace>/sa/<service account> without \"spiffe://\", with which it could never match"
                } else {
                    continue;
                };
                return Err(Refusal::at(word, reason).within(field, index));
            }
        }
        for (field, list) in [("serviceAccounts", &self.service_accounts), ("notServiceAccounts", &self.not_service_accounts)] {
            for (index, form) in list.iter().enumerate() {
                for (name, text) in [("namespace", &form.namespace), ("serviceAccount", &form.service_account)] {
                    if text.is_empty() {
                        return Err(Refusal::at(name, "expected a name; an empty one would match nothing").within(field, index));
                    }
                }
            }
        }
        Ok(())
    }
}

impl StringForm {
    fn of(from: &StringMatch) -> Self {
        match from {
            StringMatch::Exact(text) => Self::Exact(text.clone()),
            StringMatch::Prefix(text) => Self::Prefix(text.clone()),
            StringMatch::Suffix(text) => Self::Suffix(text.clone()),
            StringMatch::Presence => Self::Presence([]),
        }
    }

    fn into_match(self) -> StringMatch {
        match self {
            Self::Exact(text) => StringMatch::Exact(text),
            Self::Prefix(text) => StringMatch::Prefix(text),
            Self::Suffix(text) => StringMatch::Suffix(text),
            Self::Presence([]) => StringMatch::Presence,
        }
    }

    fn word(&self) -> Option<(&'static str, &Text)> {
        match self {
            Self::Exact(text) => Some(("Exact", text)),
            Self::Prefix(text) => Some(("Prefix", text)),
            Self::Suffix(text) => Some(("Suffix", text)),
            Self::Presence([]) => None,
        }
    }
}
