//! Whom to ask what we do not own: the nameservers of the proxy's `/etc/resolv.conf` (reference, dataplane §9.4).

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::telemetry::limited;

/// The C library uses no more either.
const MOST_NAMESERVERS: usize = 3;
/// Most search domains that are taken off; glibc has no limit any more, and nobody has this many.
const MOST_DOMAINS: usize = 32;
const PORT: u16 = 53;
/// How often the file is looked at again, at most.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ResolvConf {
    /// In order of preference.
    pub(super) nameservers: Vec<SocketAddr>,
    /// Lower case, without final dots.
    pub(super) search: Vec<String>,
}

impl ResolvConf {
    /// Reads what is understood and passes over the rest, as the C library does.
    pub(super) fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") if conf.nameservers.len() < MOST_NAMESERVERS => {
                    let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    conf.nameservers.extend(address.map(|ip| SocketAddr::new(ip.to_canonical(), PORT)));
                }
                // The last one counts.
                Some("search" | "domain") => {
                    let domains = words.map(|word| word.trim_end_matches('.').to_ascii_lowercase());
                    conf.search = domains.filter(|domain| !domain.is_empty()).take(MOST_DOMAINS).collect();
                }
                _ => {}
            }
        }
        conf
    }
}

/// The file, followed as it changes.
#[derive(Debug)]
pub(super) struct Upstreams {
    path: PathBuf,
    state: Mutex<(Option<Instant>, Arc<ResolvConf>)>,
}

impl Upstreams {
    /// Nothing is read yet.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, state: Mutex::default() }
    }

    /// What the file says, not more than 5 s ago. One that cannot be read leaves what is known.
    pub(super) fn current(&self) -> Arc<ResolvConf> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.is_some_and(|looked| looked.elapsed() < LOOK_AGAIN) {
            return state.1.clone();
        }
        state.0 = Some(Instant::now());
        match std::fs::read_to_string(&self.path) {
            Ok(text) => {
                let conf = ResolvConf::parse(&text);
                if conf != *state.1 {
                    state.1 = Arc::new(conf);
                }
            }
            Err(error) => {
                limited!(warn, "resolv.conf", "cannot read {}, DNS queries go on to {:?}: {error}", self.path.display(), state.1.nameservers)
            }
        }
        state.1.clone()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn nameservers_come_in_order_and_the_last_search_list_counts() {
        let conf = ResolvConf::parse(
            "# comment\nnameserver 10.96.0.10\nnameserver fd00::a # v6\nnameserver nobody\nnameserver ::ffff:10.0.0.1\nnameserver 10.0.0.2\n\
             search Old.Example\nsearch default.svc.cluster.local. cluster.LOCAL .\noptions ndots:5\n",
        );
        let nameservers: Vec<String> = conf.nameservers.iter().map(ToString::to_string).collect();
        assert_eq!(nameservers, ["10.96.0.10:53", "[fd00::a]:53", "10.0.0.1:53"]);
        assert_eq!(conf.search, ["default.svc.cluster.local", "cluster.local"]);
        assert_eq!(ResolvConf::parse("\u{0}nonsense\nnameserver\nsearch"), ResolvConf::default());
    }

    #[test]
    fn a_change_is_seen_and_a_file_that_vanishes_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        let upstreams = Upstreams::new(path.clone());
        let look = || {
            upstreams.state.lock().unwrap().0 = None;
            upstreams.current().nameservers.len()
        };
        assert_eq!(look(), 0);
        std::fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
        assert_eq!(upstreams.current().nameservers.len(), 0, "looked at again too soon");
        assert_eq!(look(), 1);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look(), 1);
    }
}
