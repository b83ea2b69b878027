//! From the messages of `istio.security` to policies (reference, dataplane §6.1).
//!
//! A policy is never passed over: what is not understood denies all of its targets and says why. That is stricter than the reference, which
//! drops conditions that it cannot read and keeps the version before a version that it refuses.

use ipnet::IpNet;
use prost::Message;

use super::rows::{known, shown, within};
use crate::model::Text;
use crate::policy::{Action, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch, Validity};
use crate::wire::authorization as wire;
use crate::wire::xds::AUTHORIZATION_TYPE;

/// Namespace and name of a policy by the name of its resource, which is its key (reference, dataplane §5.2).
fn names(resource: &str) -> (&str, &str) {
    resource.split_once('/').unwrap_or(("", resource))
}

/// The key under which the policy of a resource is kept.
pub(super) fn key(resource: &str) -> Text {
    let (namespace, name) = names(resource);
    format!("{namespace}/{name}").into()
}

/// The policy of a resource that is refused whatever it says: it denies its targets.
pub(super) fn refused(resource: &str, content: Option<(&str, &[u8])>, reason: String) -> Authorization {
    let (namespace, name) = names(resource);
    let encoded = content.filter(|(type_url, _)| *type_url == AUTHORIZATION_TYPE);
    let (scope, dry_run) = encoded.map_or((Scope::Global, false), |(_, encoded)| targets(encoded));
    Authorization { dry_run, ..Authorization::invalid(name, namespace, scope, Action::Deny, reason) }
}

/// Reads the policy of the resource of this name. If there is anything wrong with it, the policy is one that denies all of its targets
/// ([`Validity::Invalid`]).
pub(super) fn policy(resource: &str, encoded: &[u8]) -> Authorization {
    let (namespace, name) = names(resource);
    let refused = |scope, action, reason: String| Authorization::invalid(name, namespace, scope, action, reason);
    let decoded = match wire::Authorization::decode(encoded) {
        Ok(decoded) => decoded,
        // Whom it is for may be readable all the same.
        Err(error) => {
            let (scope, dry_run) = targets(encoded);
            return Authorization { dry_run, ..refused(scope, Action::Deny, format!("not a policy: {error}")) };
        }
    };
    let scope = scope(decoded.scope);
    let action = match wire::Action::try_from(decoded.action) {
        Ok(wire::Action::Allow) => Ok(Action::Allow),
        Ok(wire::Action::Deny) => Ok(Action::Deny),
        Err(prost::UnknownEnumValue(number)) => Err(format!("action has the unknown value {number}")),
    };
    let dry_run = decoded.dry_run;
    // If it is of another namespace than its name says, nobody knows whose workloads are meant.
    let widest = if decoded.namespace == namespace { scope.clone().unwrap_or(Scope::Global) } else { Scope::Global };
    let read = || {
        if (decoded.namespace.as_str(), decoded.name.as_str()) != (namespace, name) {
            return Err(format!("it says that it is {}/{}", shown(&decoded.namespace), shown(&decoded.name)));
        }
        if let Some(field) = wire::unknown_field(encoded) {
            return Err(format!("it has a field that is not known here: {field}"));
        }
        let rules = decoded.rules.iter().enumerate().map(|(index, from)| rule(from).map_err(|reason| within(&format!("rules[{index}]"), reason)));
        Ok((scope.clone()?, action.clone()?, rules.collect::<Result<Vec<_>, String>>()?))
    };
    match read() {
        Ok((scope, action, rules)) => {
            Authorization { name: name.into(), namespace: namespace.into(), scope, action, rules, dry_run, validity: Validity::Valid }
        }
        Err(reason) => Authorization { dry_run, ..refused(widest, action.unwrap_or(Action::Deny), reason) },
    }
}

fn scope(number: i32) -> Result<Scope, String> {
    Ok(match known("scope", wire::Scope::try_from(number))? {
        wire::Scope::Global => Scope::Global,
        wire::Scope::Namespace => Scope::Namespace,
        wire::Scope::WorkloadSelector => Scope::WorkloadSelector,
    })
}

/// Scope and dry run of a policy that does not decode, so that it denies nobody but its targets; everybody is one if not even the scope is known.
fn targets(encoded: &[u8]) -> (Scope, bool) {
    /// The policy without what is in it.
    #[derive(Clone, PartialEq, Message)]
    struct Outline {
        #[prost(int32, tag = "3")]
        scope: i32,
        #[prost(bool, tag = "6")]
        dry_run: bool,
    }
    Outline::decode(encoded).map_or((Scope::Global, false), |outline| (scope(outline.scope).unwrap_or(Scope::Global), outline.dry_run))
}

fn rule(from: &wire::Rule) -> Result<Rule, String> {
    let clauses = from.clauses.iter().enumerate();
    let clauses = clauses.map(|(index, from)| clause(from).map_err(|reason| within(&format!("clauses[{index}]"), reason)));
    Ok(Rule { clauses: clauses.collect::<Result<_, String>>()? })
}

fn clause(from: &wire::Clause) -> Result<Clause, String> {
    let matches = from.matches.iter().enumerate();
    let matches = matches.map(|(index, from)| conditions(from).map_err(|reason| within(&format!("matches[{index}]"), reason)));
    Ok(Clause { matches: matches.collect::<Result<_, String>>()? })
}

fn conditions(from: &wire::Match) -> Result<Match, String> {
    if let Some(extension) = from.extensions.first() {
        return Err(format!("extensions: the condition {:?} is not known here", shown(&extension.name)));
    }
    Ok(Match {
        namespaces: each("namespaces", &from.namespaces, text)?,
        not_namespaces: each("not_namespaces", &from.not_namespaces, text)?,
        principals: each("principals", &from.principals, text)?,
        not_principals: each("not_principals", &from.not_principals, text)?,
        service_accounts: each("service_accounts", &from.service_accounts, account)?,
        not_service_accounts: each("not_service_accounts", &from.not_service_accounts, account)?,
        source_ips: each("source_ips", &from.source_ips, range)?,
        not_source_ips: each("not_source_ips", &from.not_source_ips, range)?,
        destination_ips: each("destination_ips", &from.destination_ips, range)?,
        not_destination_ips: each("not_destination_ips", &from.not_destination_ips, range)?,
        destination_ports: each("destination_ports", &from.destination_ports, port)?,
        not_destination_ports: each("not_destination_ports", &from.not_destination_ports, port)?,
    })
}

fn each<F, T>(field: &str, list: &[F], read: impl Fn(&F) -> Result<T, String>) -> Result<Vec<T>, String> {
    list.iter().map(read).collect::<Result<_, String>>().map_err(|reason| within(field, reason))
}

fn text(from: &wire::StringMatch) -> Result<StringMatch, String> {
    // An empty word would match nothing or everything.
    let word = |text: &str| if text.is_empty() { Err("an empty text".to_owned()) } else { Ok(Text::from(text)) };
    match &from.match_type {
        Some(wire::MatchType::Exact(text)) => word(text).map(StringMatch::Exact),
        Some(wire::MatchType::Prefix(text)) => word(text).map(StringMatch::Prefix),
        Some(wire::MatchType::Suffix(text)) => word(text).map(StringMatch::Suffix),
        Some(wire::MatchType::Presence(())) => Ok(StringMatch::Presence),
        None => Err("a comparison of a kind that is not known here".to_owned()),
    }
}

fn account(from: &wire::ServiceAccountMatch) -> Result<ServiceAccountMatch, String> {
    if from.namespace.is_empty() || from.service_account.is_empty() {
        return Err("a service account without its namespace or name".to_owned());
    }
    Ok(ServiceAccountMatch { namespace: from.namespace.as_str().into(), service_account: from.service_account.as_str().into() })
}

fn range(from: &wire::Address) -> Result<IpNet, String> {
    // The policy room makes mapped addresses canonical together with their prefixes.
    let v4 = || <[u8; 4]>::try_from(&from.address[..]).ok().map(std::net::IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(&from.address[..]).ok().map(std::net::IpAddr::from);
    let ip = v4().or_else(v6).ok_or_else(|| format!("an address has {} bytes, not 4 or 16", from.address.len()))?;
    let length = u8::try_from(from.length).ok().and_then(|length| IpNet::new(ip, length).ok());
    length.ok_or_else(|| format!("{} is not a prefix length of {ip}", from.length))
}

fn port(number: &u32) -> Result<u16, String> {
    u16::try_from(*number).map_err(|_| format!("{number} is not a port"))
}

#[cfg(test)]
mod tests;
