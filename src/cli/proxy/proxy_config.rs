//! The ProxyConfig of Istio: defaults that an operator writes as YAML, in the mesh file that is mounted beside the proxy or in `PROXY_CONFIG`, which
//! wins (reference, dataplane §10.1). Everything in it is the default of a flag, so that a flag or its variable always wins.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use clap::Arg;
use serde::Deserialize;
use serde_json::Value;

/// Where Istio mounts its mesh file.
const MESH_FILE: &str = "./etc/istio/config/mesh";
/// What begins the names of variables that are node metadata.
pub(super) const METADATA_PREFIX: &str = "ISTIO_META_";

/// What a proxy for L4 takes from a ProxyConfig; its other keys are Envoy's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ProxyConfig {
    discovery_address: Option<String>,
    proxy_admin_port: Option<u16>,
    stats_port: Option<u16>,
    concurrency: Option<u32>,
    proxy_metadata: Option<BTreeMap<String, Value>>,
}

/// The mesh file, as far as it concerns us.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MeshFile {
    default_config: Option<ProxyConfig>,
}

impl ProxyConfig {
    /// What the environment and the mesh file say.
    ///
    /// # Errors
    /// When one of them is there and cannot be read.
    pub(crate) fn of_environment() -> anyhow::Result<Self> {
        let file = match std::fs::read_to_string(MESH_FILE) {
            Ok(text) => Some(text),
            Err(error) if !Path::new(MESH_FILE).exists() => {
                tracing::debug!("no mesh file: {error}");
                None
            }
            Err(error) => return Err(error).context(MESH_FILE),
        };
        Self::of(std::env::var("PROXY_CONFIG").ok().as_deref(), file.as_deref())
    }

    fn of(variable: Option<&str>, file: Option<&str>) -> anyhow::Result<Self> {
        let written = |text: &&str| !text.trim().is_empty();
        let file: Option<MeshFile> = file.filter(written).map(serde_saphyr::from_str).transpose().context(MESH_FILE)?;
        let variable: Option<Self> = variable.filter(written).map(serde_saphyr::from_str).transpose().context("PROXY_CONFIG")?;
        let (below, above) = (file.and_then(|file| file.default_config).unwrap_or_default(), variable.unwrap_or_default());
        let mut metadata = below.metadata();
        metadata.extend(above.metadata());
        Ok(Self {
            discovery_address: above.discovery_address.or(below.discovery_address),
            proxy_admin_port: above.proxy_admin_port.or(below.proxy_admin_port),
            stats_port: above.stats_port.or(below.stats_port),
            concurrency: above.concurrency.or(below.concurrency),
            proxy_metadata: Some(metadata),
        })
    }

    /// Node metadata by its name, without the prefix that variables have.
    fn metadata(&self) -> BTreeMap<String, Value> {
        let named = |(name, value): (&String, &Value)| (name.strip_prefix(METADATA_PREFIX).unwrap_or(name).to_owned(), value.clone());
        self.proxy_metadata.iter().flatten().map(named).collect()
    }

    /// The flags of `culvert proxy` with the defaults that are said here.
    pub(crate) fn defaults(&self, command: clap::Command) -> clap::Command {
        command.mut_args(|arg| self.default_of(arg))
    }

    fn default_of(&self, arg: Arg) -> Arg {
        let said = match arg.get_id().as_str() {
            "xds_address" => self.discovery_address.clone(),
            "admin_port" => self.proxy_admin_port.map(|port| port.to_string()),
            "stats_port" => self.stats_port.map(|port| port.to_string()),
            "worker_threads" => self.concurrency.map(|threads| threads.to_string()),
            "metadata" => {
                let pairs = self.metadata().into_iter().map(|(name, value)| &*format!("{name}={}", text(&value)).leak());
                return arg.default_values(pairs);
            }
            _ => {
                let name = arg.get_env().and_then(|name| name.to_str()?.strip_prefix(METADATA_PREFIX).map(str::to_owned));
                name.and_then(|name| self.metadata().get(&name).map(text))
            }
        };
        // Said once, at start: clap keeps defaults for as long as the process lives.
        match said {
            Some(said) => arg.default_value(&*said.leak()),
            None => arg,
        }
    }
}

/// A value of metadata; numbers and booleans are often written without quotes.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_variable_wins_over_the_mesh_file_and_metadata_is_merged() {
        let file = "
defaultConfig:
  discoveryAddress: file.example:15012
  proxyAdminPort: 1
  binaryPath: /usr/local/bin/envoy
  proxyMetadata: {ISTIO_META_A: file, ISTIO_META_B: file, C: 3}
rootNamespace: istio-system
";
        let merged =
            ProxyConfig::of(Some("{discoveryAddress: variable.example:15012, statsPort: 2, proxyMetadata: {B: variable}}"), Some(file)).unwrap();
        let metadata = BTreeMap::from([("A".to_owned(), "file".into()), ("B".to_owned(), "variable".into()), ("C".to_owned(), 3.into())]);
        assert_eq!(
            merged,
            ProxyConfig {
                discovery_address: Some("variable.example:15012".into()),
                proxy_admin_port: Some(1),
                stats_port: Some(2),
                concurrency: None,
                proxy_metadata: Some(metadata),
            }
        );
    }

    #[test]
    fn a_proxy_config_may_be_empty_or_without_metadata() {
        for text in [None, Some(""), Some(" \n"), Some("concurrency: 0"), Some("{}")] {
            assert_eq!(ProxyConfig::of(text, text.filter(|text| !text.contains("concurrency"))).unwrap().metadata(), BTreeMap::new(), "{text:?}");
        }
        assert_eq!(ProxyConfig::of(Some("concurrency: 0"), Some("defaultConfig:")).unwrap().concurrency, Some(0));
    }

    #[test]
    fn what_cannot_be_read_is_an_error_that_names_its_place() {
        for (variable, file, place) in [
            (Some("concurrency: many"), None, "PROXY_CONFIG"),
            (Some("concurrency: -1"), None, "PROXY_CONFIG"),
            (Some("- a list"), None, "PROXY_CONFIG"),
            (None, Some("defaultConfig: {statsPort: 70000}"), MESH_FILE),
        ] {
            let error = format!("{:#}", ProxyConfig::of(variable, file).unwrap_err());
            assert!(error.starts_with(place), "{error}");
        }
    }
}
