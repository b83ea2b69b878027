//! Who a bearer token stands for. Without Kubernetes nobody can be asked, so a file says it:
//!
//! ```yaml
//! tokens:
//! - token: 4a3b…                 # at least 16 characters
//!   node: worker-1               # the only NODE_NAME that its bearer may claim
//!   identities: [node]           # those of the workloads that the mesh file places on worker-1
//! - token: 9c1d…
//!   node: machine-7
//!   identities: [spiffe://cluster.local/ns/default/sa/web]    # exactly these; "*" is every one
//! ```
//!
//! The file is read again when it has changed. A bad new one changes nothing and is complained about.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{SHA256, digest};
use http::{HeaderMap, header};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::Error;
use crate::model::{Snapshot, SpiffeId, Text};
use crate::telemetry::limited;

/// A shorter token can be guessed.
const SHORTEST_TOKEN: usize = 16;

/// A larger file is a mistake.
const LARGEST_FILE: u64 = 4 << 20;

/// Somebody who showed a token.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) node: Text,
    allowed: Arc<[Allowed]>,
    /// The hash of the token it showed.
    token: [u8; 32],
}

/// Which certificates somebody may have.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Allowed {
    Anybody,
    OfTheNode,
    One(SpiffeId),
}

impl Caller {
    /// Whether it may have a certificate for `identity`, as things are now.
    pub(super) fn may_be(&self, identity: &SpiffeId, snapshot: &Snapshot, of_node: impl Fn(&Text) -> Vec<Text>) -> bool {
        self.allowed.iter().any(|allowed| match allowed {
            Allowed::Anybody => true,
            Allowed::One(one) => one == identity,
            Allowed::OfTheNode => {
                let workloads = of_node(&self.node).into_iter().filter_map(|uid| snapshot.workload(&uid));
                workloads.into_iter().any(|workload| workload.identity().is_ok_and(|own| own == *identity))
            }
        })
    }

    /// The one identity it has if it asks for itself.
    pub(super) fn own(&self) -> Option<&SpiffeId> {
        match &*self.allowed {
            [Allowed::One(one)] => Some(one),
            _ => None,
        }
    }
}

/// Why somebody is nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoCaller {
    #[error("the call has no bearer token in its authorization header")]
    NoToken,
    #[error("the bearer token is not one of the control plane's token file")]
    Unknown,
}

/// The token file.
pub struct Tokens {
    path: PathBuf,
    known: Mutex<Known>,
}

struct Known {
    fingerprint: Option<Fingerprint>,
    callers: Callers,
}

/// Tells one content of a file from another: device, inode, size, time of change.
pub(super) type Fingerprint = (u64, u64, u64, i64, i64);

/// By hash: the tokens themselves are not kept, and how long a look-up takes tells nothing of them.
type Callers = HashMap<[u8; 32], Caller>;

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// [`Error::Tokens`] says what is wrong with it, without a word of a token.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let fingerprint = fingerprint(path);
        let callers = read(path).map_err(|problem| Error::Tokens { path: path.to_owned(), problem })?;
        Ok(Self { path: path.to_owned(), known: Mutex::new(Known { fingerprint, callers }) })
    }

    /// Who makes a call with these headers.
    pub(super) fn caller(&self, headers: &HeaderMap) -> Result<Caller, NoCaller> {
        let value = headers.get(header::AUTHORIZATION).ok_or(NoCaller::NoToken)?;
        let (scheme, token) = value.to_str().ok().and_then(|value| value.split_once(' ')).ok_or(NoCaller::NoToken)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(NoCaller::NoToken);
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.reread(&mut known);
        known.callers.get(&hash(token.trim())).cloned().ok_or(NoCaller::Unknown)
    }

    /// Whether its token still stands for what it stood for: somebody may have taken it out of the file.
    pub(super) fn still_knows(&self, caller: &Caller) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.reread(&mut known);
        known.callers.get(&caller.token).is_some_and(|now| now.node == caller.node)
    }

    fn reread(&self, known: &mut Known) {
        let now = fingerprint(&self.path);
        if now == known.fingerprint {
            return;
        }
        known.fingerprint = now;
        match read(&self.path) {
            Ok(callers) => {
                tracing::info!(path = %self.path.display(), tokens = callers.len(), "token file loaded again");
                known.callers = callers;
            }
            Err(problem) => limited!(error, "token file", path = %self.path.display(), "the token file was refused, the old tokens stay: {problem}"),
        }
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Tokens").field("path", &self.path).finish_non_exhaustive()
    }
}

fn hash(token: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    // Both have 32 bytes.
    bytes.iter_mut().zip(digest(&SHA256, token.as_bytes()).as_ref()).for_each(|(to, from)| *to = *from);
    bytes
}

pub(super) fn fingerprint(path: &Path) -> Option<Fingerprint> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    tokens: Vec<Line>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    token: String,
    node: String,
    identities: Vec<String>,
}

fn read(path: &Path) -> Result<Callers, String> {
    let length = std::fs::metadata(path).map_err(|error| format!("it cannot be read: {error}"))?.len();
    if length > LARGEST_FILE {
        return Err(format!("it has {length} bytes, more than the {LARGEST_FILE} allowed"));
    }
    let text = Zeroizing::new(std::fs::read_to_string(path).map_err(|error| format!("it cannot be read: {error}"))?);
    parse(&text)
}

fn parse(text: &str) -> Result<Callers, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    let file: File = serde_saphyr::from_str_with_options(text, options).map_err(|error| place(&error))?;
    let mut callers = Callers::new();
    for (index, Line { token, node, identities }) in file.tokens.into_iter().enumerate() {
        let token = Zeroizing::new(token);
        let wrong = |problem: String| format!("tokens[{index}]: {problem}");
        if token.trim().len() < SHORTEST_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(wrong(format!("expected a token of at least {SHORTEST_TOKEN} printable characters without spaces")));
        }
        if node.is_empty() {
            return Err(wrong("expected the name of a node".to_owned()));
        }
        let allowed = |name: &String| match name.as_str() {
            "*" => Ok(Allowed::Anybody),
            "node" => Ok(Allowed::OfTheNode),
            name => name.parse().map(Allowed::One).map_err(|error| wrong(format!("identities: {error}; \"*\" and \"node\" are also possible"))),
        };
        let allowed = identities.iter().map(allowed).collect::<Result<Vec<_>, _>>()?;
        let token = hash(&token);
        if callers.insert(token, Caller { node: node.into(), allowed: allowed.into(), token }).is_some() {
            return Err(wrong("the same token is there twice".to_owned()));
        }
    }
    if callers.is_empty() { Err("it has no token, so nobody could connect".to_owned()) } else { Ok(callers) }
}

/// What is wrong with the form, and where. Not the reader's own words: they may quote a token.
fn place(error: &serde_saphyr::Error) -> String {
    let what = match error {
        serde_saphyr::Error::SerdeUnknownField { expected, .. } => format!("a field is unknown; expected one of {}", expected.join(", ")),
        serde_saphyr::Error::SerdeMissingField { field, .. } => format!("the field \"{field}\" is missing"),
        _ => "expected a YAML map with a list \"tokens\" of maps with token, node and identities".to_owned(),
    };
    match error.location() {
        Some(place) => format!("line {}: {what}", place.line()),
        None => what,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GOOD: &str = "tokens:\n- {token: 0123456789abcdef, node: left, identities: [node]}\n- {token: fedcba9876543210, node: right, identities: [spiffe://t/ns/a/sa/b]}\n";

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn a_token_stands_for_its_node_and_any_other_for_nobody() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), GOOD).unwrap();
        let tokens = Tokens::load(file.path()).unwrap();
        assert_eq!(tokens.caller(&headers("Bearer 0123456789abcdef")).unwrap().node, "left");
        assert_eq!(tokens.caller(&headers("bearer fedcba9876543210")).unwrap().node, "right");
        for (value, problem) in [
            ("Bearer 0123456789abcdeF", NoCaller::Unknown),
            ("Bearer ", NoCaller::Unknown),
            ("Bearer", NoCaller::NoToken),
            ("Basic 0123456789abcdef", NoCaller::NoToken),
        ] {
            assert_eq!(tokens.caller(&headers(value)).unwrap_err(), problem, "{value}");
        }
        assert_eq!(tokens.caller(&HeaderMap::new()).unwrap_err(), NoCaller::NoToken);
        assert!(!format!("{tokens:?}").contains("0123"));
    }

    #[test]
    fn a_changed_file_counts_at_once_and_a_bad_one_not_at_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), GOOD).unwrap();
        let tokens = Tokens::load(file.path()).unwrap();
        std::fs::write(file.path(), "tokens: nonsense that is not a list").unwrap();
        assert!(tokens.caller(&headers("Bearer 0123456789abcdef")).is_ok());
        std::fs::write(file.path(), GOOD.replace("0123456789abcdef", "another-token-of-it")).unwrap();
        assert!(tokens.caller(&headers("Bearer 0123456789abcdef")).is_err(), "a token that was taken out still counts");
        assert!(tokens.caller(&headers("Bearer another-token-of-it")).is_ok());
    }

    #[test]
    fn what_is_wrong_with_the_file_is_said_without_a_token() {
        for (text, part) in [
            ("", "tokens"),
            ("tokens: []", "no token"),
            ("tokens:\n- {token: short-secret, node: a, identities: []}", "16"),
            ("tokens:\n- {token: 'secret secret secret', node: a, identities: []}", "printable"),
            ("tokens:\n- {token: secretsecretsecret, node: '', identities: []}", "node"),
            ("tokens:\n- {token: secretsecretsecret, node: a, identities: [web]}", "tokens[0]: identities"),
            ("tokens:\n- {token: secretsecretsecret, node: a}", "identities"),
            ("tokens:\n- {token: secretsecretsecret, node: a, identities: [], more: 1}", "line 2: a field is unknown"),
            ("tokens:\n- secretsecretsecret", "line 2: expected"),
            ("tokens:\n- &x {token: secretsecretsecret, node: a, identities: []}\n- *x", "twice"),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.contains(part) && !problem.contains("secret"), "{text}: {problem}");
        }
    }

    #[test]
    fn somebody_without_identities_may_be_nobody() {
        let callers = parse("tokens:\n- {token: secretsecretsecret, node: a, identities: []}").unwrap();
        let caller = callers.values().next().unwrap();
        let identity = SpiffeId::new("t", "n", "s").unwrap();
        assert!(!caller.may_be(&identity, &Snapshot::default(), |_| Vec::new()));
    }
}
