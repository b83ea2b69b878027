//! The way to the CA, and what it has in common with the way to xDS (reference, dataplane §7.4 and §10.1).

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::grpc::{self, RootSource, Token};

/// Where kubelet puts the token when nothing else is said.
const DEFAULT_TOKEN: &str = "./var/run/secrets/tokens/istio-token";

/// Where certificates come from.
#[derive(Debug, Clone)]
pub(super) enum CaSource {
    /// Signed in this process with the CA in a directory.
    Local(PathBuf),
    /// Asked of a server.
    Remote(Box<grpc::Config>),
}

impl CaSource {
    /// Marks the sockets of calls.
    pub(super) fn mark(&mut self, mark: Option<u32>) {
        if let Self::Remote(config) = self {
            config.mark = mark;
        }
    }
}

/// Flags and environment about certificates and how to prove who we are.
#[derive(Debug, clap::Args)]
pub(super) struct CaArgs {
    /// Directory with ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem; certificates are signed in process instead of by CA_ADDRESS. For
    /// the lab and for a single machine.
    #[arg(long, env = "LOCAL_CA_DIR", value_parser = path())]
    pub(super) local_ca_dir: Option<PathBuf>,
    /// The CA, as https://host:port. Default istiod.istio-system.svc:15012 within Kubernetes, localhost:15012 elsewhere.
    #[arg(long, env = "CA_ADDRESS")]
    pub(super) ca_address: Option<String>,
    /// The roots that the CA's own certificate must lead to: a PEM file (read again for every request), PEM text, or SYSTEM.
    #[arg(long, env = "CA_ROOT_CA", default_value = "./var/run/secrets/istio/root-cert.pem")]
    pub(super) ca_root_ca: String,
    /// A second name that the CA's certificate may have.
    #[arg(long, env = "ALT_CA_HOSTNAME")]
    pub(super) alt_ca_hostname: Option<String>,
    /// The token that proves to the control plane who we are: a file (read again for every call), or the token itself. Default
    /// ./var/run/secrets/tokens/istio-token if it exists.
    #[arg(long, env = "AUTH_TOKEN", hide_env_values = true)]
    pub(super) auth_token: Option<String>,
    /// Revocation lists (PEM, or one in DER); certificates on them are refused and live tunnels with them cut. Read again when it changes.
    #[arg(long, env = "CRL_PATH", value_parser = path())]
    pub(super) crl_path: Option<PathBuf>,
}

/// A path, or nothing: an empty variable is how charts say that there is none.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

impl CaArgs {
    /// Checks what the types cannot.
    pub(super) fn source(&self, cluster_id: &str, post_quantum_only: bool) -> anyhow::Result<CaSource> {
        if let Some(directory) = self.local_ca_dir.as_ref().filter(|directory| !directory.as_os_str().is_empty()) {
            return Ok(CaSource::Local(directory.clone()));
        }
        let address = match self.ca_address.as_deref().map(str::trim) {
            Some("") => bail!("no source of certificates: CA_ADDRESS is empty; set it to https://host:port, or LOCAL_CA_DIR to a directory"),
            Some(address) => address,
            None => default_address(),
        };
        let config = grpc::Config {
            alternate_name: self.alt_ca_hostname.clone(),
            token: token(self.auth_token.as_deref()),
            headers: headers("CA_HEADER_", cluster_id, environment()),
            post_quantum_only,
            ..grpc::Config::new(address.parse().context("CA_ADDRESS")?, RootSource::of(&self.ca_root_ca))
        };
        // Says now what could never work.
        grpc::Dialer::new(config.clone()).context("the settings of the CA client")?;
        Ok(CaSource::Remote(Box::new(config)))
    }
}

impl CaArgs {
    /// What `config_dump` shows of it; never the token.
    pub(super) fn dump(&self) -> serde_json::Value {
        serde_json::json!({
            "localCaDir": self.local_ca_dir, "caAddress": self.ca_address, "caRootCert": self.ca_root_ca, "altCaHostname": self.alt_ca_hostname,
            "crlPath": self.crl_path,
        })
    }
}

/// All variables that are text; others are none of ours.
pub(super) fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Where the control plane is when nobody says.
pub(super) fn default_address() -> &'static str {
    default_address_where(std::env::var_os("KUBERNETES_SERVICE_HOST").is_some())
}

fn default_address_where(kubernetes: bool) -> &'static str {
    if kubernetes { "https://istiod.istio-system.svc:15012" } else { "https://localhost:15012" }
}

/// What proves who we are to the control plane.
pub(super) fn token(setting: Option<&str>) -> Option<Token> {
    match setting.filter(|setting| !setting.trim().is_empty()) {
        Some(setting) => Some(Token::of(setting)),
        None => Path::new(DEFAULT_TOKEN).exists().then(|| Token::of(DEFAULT_TOKEN)),
    }
}

/// The headers of every call: the cluster, and what variables with this prefix name.
pub(super) fn headers(prefix: &str, cluster_id: &str, environment: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    let named = environment.filter_map(|(name, value)| Some((name.strip_prefix(prefix)?.to_owned(), value)));
    std::iter::once(("clusterid".to_owned(), cluster_id.to_owned())).chain(named).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::parsed;
    use super::*;

    fn source(line: &[&str]) -> anyhow::Result<CaSource> {
        parsed::<CaArgs>(line)?.source("Kubernetes", false)
    }

    #[test]
    fn without_a_local_ca_certificates_come_from_a_server() {
        assert!(matches!(source(&["--local-ca-dir", "", "--crl-path", ""]).unwrap(), CaSource::Remote(_)), "empty is absent");
        assert!(matches!(source(&["--local-ca-dir", "/ca"]).unwrap(), CaSource::Local(directory) if directory == Path::new("/ca")));
        let CaSource::Remote(config) = source(&["--ca-address", "ca.example:443", "--alt-ca-hostname", "istiod.other.svc"]).unwrap() else {
            unreachable!("a remote CA")
        };
        assert_eq!(config.address.to_string(), "ca.example:443");
        assert_eq!(config.roots, RootSource::File("./var/run/secrets/istio/root-cert.pem".into()));
        assert_eq!(config.alternate_name.as_deref(), Some("istiod.other.svc"));
        assert!(config.headers.contains(&("clusterid".into(), "Kubernetes".into())));
    }

    #[test]
    fn settings_of_the_ca_that_cannot_work_stop_the_start() {
        for (line, problem) in [
            (["--ca-address", ""], "CA_ADDRESS is empty"),
            (["--ca-address", "http://istiod:15010"], "plaintext"),
            (["--alt-ca-hostname", "two words"], "not a host name"),
        ] {
            let error = format!("{:#}", source(&line).unwrap_err());
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn variables_with_the_prefix_become_headers() {
        let environment = [("CA_HEADER_X_TEAM", "blue"), ("XDS_HEADER_X_TEAM", "red"), ("PATH", "/bin")];
        let environment = environment.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(headers("CA_HEADER_", "c", environment), [("clusterid".to_owned(), "c".to_owned()), ("X_TEAM".to_owned(), "blue".to_owned())]);
    }

    #[test]
    fn within_kubernetes_the_control_plane_is_istiod_and_elsewhere_this_machine() {
        assert_eq!(default_address_where(true), "https://istiod.istio-system.svc:15012");
        assert_eq!(default_address_where(false), "https://localhost:15012");
        assert_eq!(default_address(), default_address_where(std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()));
    }

    #[test]
    fn no_token_means_that_none_is_sent() {
        assert_eq!(token(Some("/var/run/token")), Some(Token::File("/var/run/token".into())));
        assert_eq!(token(Some(" ")), token(None));
    }
}
