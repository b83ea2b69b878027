//! Kubernetes' AuthorizationPolicy and PeerAuthentication, and their translation into the rules that a proxy enforces
//! (reference, node-and-control §B.6 and §B.7).
//!
//! Stricter than istiod in one way: what a layer 4 proxy cannot enforce (HTTP attributes, unknown keys, ports or addresses that do not
//! parse) is an error that names the field, never silently dropped.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Error;

/// Policies of this namespace without a selector apply everywhere.
pub(super) const ROOT_NAMESPACE: &str = "istio-system";
/// The policy behind STRICT (reference, node-and-control §B.7).
pub(super) const STATIC_STRICT: &str = "istio_converted_static_strict";

/// Name and namespace of a Kubernetes object.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Name.
    pub name: String,
    /// Namespace.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// `istio.io/dry-run: "true"` makes a policy that only reports.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Not used.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A selector of pods.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Labels that a pod must have, all of them.
    #[serde(default)]
    pub match_labels: BTreeMap<String, String>,
}

impl Selector {
    /// Whether labels satisfy it.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// `security.istio.io/v1 AuthorizationPolicy`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicy {
    /// May be left out; if present, as in Kubernetes.
    #[serde(default)]
    pub api_version: String,
    /// May be left out; if present, `AuthorizationPolicy`.
    #[serde(default)]
    pub kind: String,
    /// Name and namespace.
    pub metadata: Metadata,
    /// What it says; empty means: allow nothing.
    #[serde(default)]
    pub spec: AuthorizationSpec,
}

/// The spec of an AuthorizationPolicy.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationSpec {
    /// The pods it is for; all of the namespace when absent.
    #[serde(default)]
    pub selector: Option<Selector>,
    /// ALLOW (default) or DENY.
    #[serde(default)]
    pub action: Option<String>,
    /// Any of these.
    #[serde(default)]
    pub rules: Vec<AuthorizationRule>,
    /// Refused: policies for waypoints are not enforced by a node proxy.
    #[serde(default)]
    pub target_ref: Option<Value>,
    /// Refused likewise.
    #[serde(default)]
    pub target_refs: Option<Value>,
}

/// One rule: from AND to AND every when.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthorizationRule {
    #[serde(default)]
    from: Vec<From>,
    #[serde(default)]
    to: Vec<To>,
    #[serde(default)]
    when: Vec<When>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct From {
    source: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct To {
    operation: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct When {
    key: String,
    #[serde(default)]
    values: Vec<String>,
    #[serde(default)]
    not_values: Vec<String>,
}

/// A policy in the form of the proxies' configuration: rules (any) of clauses (all) of matches (any) of attributes (all).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshPolicy {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: &'static str,
    /// `Allow` or `Deny`.
    pub action: &'static str,
    /// The rules.
    pub rules: Vec<Vec<Vec<Match>>>,
    /// Only reported, not enforced.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Attribute to its values; in camelCase as in the config dump.
pub type Match = BTreeMap<String, Vec<Value>>;

/// What kind of value an attribute of a policy takes.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Prefix,
    Port,
    ServiceAccount,
}

impl AuthorizationPolicy {
    /// The policy as proxies get it.
    ///
    /// # Errors
    /// A sentence that names the policy and the field that cannot be enforced.
    pub fn translate(&self) -> Result<MeshPolicy, Error> {
        let refuse =
            |sentence: String| Error::Definition(format!("AuthorizationPolicy {}/{}: {sentence}", self.metadata.namespace, self.metadata.name));
        if !self.kind.is_empty() && self.kind != "AuthorizationPolicy" {
            return Err(refuse(format!("kind is {:?}", self.kind)));
        }
        if self.spec.target_ref.is_some() || self.spec.target_refs.is_some() {
            return Err(refuse("spec.targetRefs is for waypoints; a node proxy does not enforce it".to_owned()));
        }
        let action = match self.spec.action.as_deref() {
            None | Some("ALLOW") => "Allow",
            Some("DENY") => "Deny",
            Some(other) => return Err(refuse(format!("spec.action {other:?} is not ALLOW or DENY, the two that a node proxy enforces"))),
        };
        let mut rules = Vec::new();
        for (index, rule) in self.spec.rules.iter().enumerate() {
            rules.push(self.clauses(rule).map_err(|sentence| refuse(format!("spec.rules[{index}].{sentence}")))?);
        }
        let scope = match (&self.spec.selector, self.metadata.namespace.as_str()) {
            (Some(_), _) => "WorkloadSelector",
            (None, ROOT_NAMESPACE) => "Global",
            (None, _) => "Namespace",
        };
        let dry_run = self.metadata.annotations.get("istio.io/dry-run").is_some_and(|value| value == "true");
        Ok(MeshPolicy { name: self.metadata.name.clone(), namespace: self.metadata.namespace.clone(), scope, action, rules, dry_run })
    }

    /// One clause for all `to`, one for all `from`, one for each `when`.
    fn clauses(&self, rule: &AuthorizationRule) -> Result<Vec<Vec<Match>>, String> {
        let mut clauses = Vec::new();
        let mut to = Vec::new();
        for (index, entry) in rule.to.iter().enumerate() {
            to.push(self.attributes(&entry.operation, operation_attribute).map_err(|sentence| format!("to[{index}].operation{sentence}"))?);
        }
        let mut from = Vec::new();
        for (index, entry) in rule.from.iter().enumerate() {
            from.push(self.attributes(&entry.source, source_attribute).map_err(|sentence| format!("from[{index}].source{sentence}"))?);
        }
        clauses.extend([to, from].into_iter().filter(|clause| !clause.is_empty()));
        for (index, when) in rule.when.iter().enumerate() {
            clauses.push(vec![self.condition(when).map_err(|sentence| format!("when[{index}]{sentence}"))?]);
        }
        Ok(clauses)
    }

    fn attributes(&self, fields: &BTreeMap<String, Vec<String>>, known: fn(&str) -> Option<(&'static str, Kind)>) -> Result<Match, String> {
        let mut attributes = Match::new();
        for (field, values) in fields {
            let Some((name, kind)) = known(field) else {
                return Err(format!(".{field}: not a layer 4 field (an HTTP attribute, or unknown); a node proxy cannot enforce it"));
            };
            attributes.insert(name.to_owned(), self.values(values, kind).map_err(|sentence| format!(".{field}: {sentence}"))?);
        }
        if attributes.is_empty() { Err(": is empty".to_owned()) } else { Ok(attributes) }
    }

    fn condition(&self, when: &When) -> Result<Match, String> {
        let (positive, negative, kind) = match when.key.as_str() {
            "source.ip" => ("sourceIps", "notSourceIps", Kind::Prefix),
            "source.namespace" => ("namespaces", "notNamespaces", Kind::Text),
            "source.principal" => ("principals", "notPrincipals", Kind::Text),
            "source.serviceAccount" => ("serviceAccounts", "notServiceAccounts", Kind::ServiceAccount),
            "destination.ip" => ("destinationIps", "notDestinationIps", Kind::Prefix),
            "destination.port" => ("destinationPorts", "notDestinationPorts", Kind::Port),
            other => return Err(format!(".key {other:?}: not a layer 4 attribute; a node proxy cannot enforce it")),
        };
        let mut attributes = Match::new();
        for (name, field, values) in [(positive, "values", &when.values), (negative, "notValues", &when.not_values)] {
            if !values.is_empty() {
                attributes.insert(name.to_owned(), self.values(values, kind).map_err(|sentence| format!(".{field}: {sentence}"))?);
            }
        }
        if attributes.is_empty() { Err(": neither values nor notValues".to_owned()) } else { Ok(attributes) }
    }

    fn values(&self, values: &[String], kind: Kind) -> Result<Vec<Value>, String> {
        if values.is_empty() {
            return Err("an empty list would match everything".to_owned());
        }
        values.iter().map(|value| self.value(value, kind)).collect()
    }

    fn value(&self, value: &str, kind: Kind) -> Result<Value, String> {
        match kind {
            Kind::Text => text_match(value),
            Kind::Prefix => prefix(value).map(|net| json!(net.to_string())),
            Kind::Port => match value.parse::<u16>() {
                Ok(port) if port > 0 => Ok(json!(port)),
                _ => Err(format!("{value:?} is not a port")),
            },
            Kind::ServiceAccount => {
                let (namespace, account) = value.split_once('/').unwrap_or((&self.metadata.namespace, value));
                if namespace.is_empty() || account.is_empty() || account.contains('/') {
                    return Err(format!("{value:?} is not a service account (name or namespace/name)"));
                }
                Ok(json!({"namespace": namespace, "serviceAccount": account}))
            }
        }
    }
}

fn source_attribute(field: &str) -> Option<(&'static str, Kind)> {
    Some(match field {
        "principals" => ("principals", Kind::Text),
        "notPrincipals" => ("notPrincipals", Kind::Text),
        "namespaces" => ("namespaces", Kind::Text),
        "notNamespaces" => ("notNamespaces", Kind::Text),
        "serviceAccounts" => ("serviceAccounts", Kind::ServiceAccount),
        "notServiceAccounts" => ("notServiceAccounts", Kind::ServiceAccount),
        "ipBlocks" => ("sourceIps", Kind::Prefix),
        "notIpBlocks" => ("notSourceIps", Kind::Prefix),
        _ => return None,
    })
}

fn operation_attribute(field: &str) -> Option<(&'static str, Kind)> {
    Some(match field {
        "ports" => ("destinationPorts", Kind::Port),
        "notPorts" => ("notDestinationPorts", Kind::Port),
        _ => return None,
    })
}

/// `*` is presence, `*x` a suffix, `x*` a prefix, anything else exact.
fn text_match(value: &str) -> Result<Value, String> {
    let inner = value.trim_matches('*');
    if value.is_empty() || inner.contains('*') || value.starts_with("**") || (value.len() > 1 && value.starts_with('*') && value.ends_with('*')) {
        return Err(format!("{value:?} is not a value, `*`, `*suffix` or `prefix*`"));
    }
    if inner.contains("spiffe://") {
        return Err(format!("{value:?}: principals are written without spiffe://"));
    }
    Ok(match (value.starts_with('*'), value.ends_with('*')) {
        (true, true) => json!({"Presence": []}),
        (true, false) => json!({"Suffix": inner}),
        (false, true) => json!({"Prefix": inner}),
        (false, false) => json!({"Exact": inner}),
    })
}

fn prefix(value: &str) -> Result<IpNet, String> {
    let net = value.parse::<IpNet>().or_else(|_| value.parse::<std::net::IpAddr>().map(IpNet::from));
    net.map(|net| net.trunc()).map_err(|_| format!("{value:?} is not an address or an address/prefix"))
}

fn default_namespace() -> String {
    "default".to_owned()
}

/// `security.istio.io/v1 PeerAuthentication`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PeerAuthentication {
    /// May be left out.
    #[serde(default)]
    pub api_version: String,
    /// May be left out; if present, `PeerAuthentication`.
    #[serde(default)]
    pub kind: String,
    /// Name and namespace.
    pub metadata: Metadata,
    /// What it says.
    #[serde(default)]
    pub spec: PeerAuthenticationSpec,
}

/// The spec of a PeerAuthentication.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PeerAuthenticationSpec {
    /// The pods it is for; all of the namespace (of the mesh in the root namespace) when absent.
    #[serde(default)]
    pub selector: Option<Selector>,
    /// For all ports.
    #[serde(default)]
    pub mtls: Mtls,
    /// For single target ports; needs a selector.
    #[serde(default)]
    pub port_level_mtls: BTreeMap<u16, Mtls>,
}

/// A mode of mutual TLS.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mtls {
    /// UNSET inherits.
    #[serde(default)]
    pub mode: Mode,
}

/// Whether plain TCP is let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    /// As the next wider object says.
    #[default]
    Unset,
    /// Like PERMISSIVE at layer 4.
    Disable,
    /// Plain TCP is let in.
    Permissive,
    /// Only mutual TLS is let in.
    Strict,
}

/// Refuses what could not be translated.
pub(super) fn check_peer_authentications(all: &[PeerAuthentication]) -> Result<(), Error> {
    for one in all {
        let refuse =
            |sentence: &str| Err(Error::Definition(format!("PeerAuthentication {}/{}: {sentence}", one.metadata.namespace, one.metadata.name)));
        if !one.kind.is_empty() && one.kind != "PeerAuthentication" {
            return refuse("kind is not PeerAuthentication");
        }
        if one.spec.selector.is_none() && !one.spec.port_level_mtls.is_empty() {
            return refuse("spec.portLevelMtls needs a selector");
        }
        if one.spec.selector.is_some() && one.metadata.namespace == ROOT_NAMESPACE {
            return refuse("a selector in the root namespace selects no workload");
        }
    }
    Ok(())
}

/// The policies that PeerAuthentications become.
pub(super) fn peer_policies(all: &[PeerAuthentication]) -> Vec<MeshPolicy> {
    let mut policies = Vec::new();
    if !all.is_empty() {
        policies.push(deny(STATIC_STRICT, ROOT_NAMESPACE, vec![vec![vec![no_identity()]]]));
    }
    for one in all.iter().filter(|one| one.spec.selector.is_some()) {
        let rules = port_rules(one, effective_mode(all, &one.metadata.namespace, one.spec.mtls.mode));
        if !rules.is_empty() {
            policies.push(deny(&port_policy_name(one), &one.metadata.namespace, rules));
        }
    }
    policies
}

/// The keys (`namespace/name`) of those policies that a pod must list.
pub(super) fn peer_policy_keys(all: &[PeerAuthentication], namespace: &str, labels: &BTreeMap<String, String>) -> Vec<String> {
    let own =
        all.iter().find(|one| one.metadata.namespace == namespace && one.spec.selector.as_ref().is_some_and(|selector| selector.matches(labels)));
    let mode = effective_mode(all, namespace, own.map_or(Mode::Unset, |one| one.spec.mtls.mode));
    let by_port = own.filter(|one| !port_rules(one, mode).is_empty());
    match (by_port, mode) {
        (Some(one), _) => vec![format!("{namespace}/{}", port_policy_name(one))],
        (None, Mode::Strict) => vec![format!("{ROOT_NAMESPACE}/{STATIC_STRICT}")],
        (None, _) => Vec::new(),
    }
}

/// Workload, else namespace, else mesh; the first of several.
fn effective_mode(all: &[PeerAuthentication], namespace: &str, own: Mode) -> Mode {
    let of = |namespace: &str| {
        let found = all.iter().find(|one| one.spec.selector.is_none() && one.metadata.namespace == namespace);
        found.map_or(Mode::Unset, |one| one.spec.mtls.mode)
    };
    [own, of(namespace), of(ROOT_NAMESPACE)].into_iter().find(|mode| *mode != Mode::Unset).unwrap_or(Mode::Permissive)
}

fn port_rules(one: &PeerAuthentication, mode: Mode) -> Vec<Vec<Vec<Match>>> {
    let ports = |wanted: fn(Mode) -> bool| one.spec.port_level_mtls.iter().filter(move |(_, mtls)| wanted(mtls.mode)).map(|(port, _)| *port);
    let attribute = |name: &str, port: u16| Match::from([(name.to_owned(), vec![json!(port)])]);
    if mode == Mode::Strict {
        let open: Vec<u16> = ports(|mode| matches!(mode, Mode::Permissive | Mode::Disable)).collect();
        if open.is_empty() {
            return Vec::new();
        }
        let except = open.into_iter().map(|port| vec![attribute("notDestinationPorts", port)]);
        return vec![[vec![no_identity()]].into_iter().chain(except).collect()];
    }
    let strict = ports(|mode| mode == Mode::Strict);
    let rule = |port| no_identity().into_iter().chain(attribute("destinationPorts", port)).collect();
    strict.map(|port| vec![vec![rule(port)]]).collect()
}

fn port_policy_name(one: &PeerAuthentication) -> String {
    format!("converted_peer_authentication_{}", one.metadata.name)
}

fn no_identity() -> Match {
    Match::from([("notPrincipals".to_owned(), vec![json!({"Presence": []})])])
}

fn deny(name: &str, namespace: &str, rules: Vec<Vec<Vec<Match>>>) -> MeshPolicy {
    MeshPolicy { name: name.to_owned(), namespace: namespace.to_owned(), scope: "WorkloadSelector", action: "Deny", rules, dry_run: false }
}

#[cfg(test)]
mod tests;
