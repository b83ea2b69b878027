//! Where the mesh's state comes from: a control plane, or a file (reference, dataplane §5.3, 5.8 and §10.1).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::super::duration;
use super::control_plane::{default_address, headers};
use crate::discovery::local::LocalSource;
use crate::discovery::xds::Identity;
use crate::grpc::{self, RootSource, Token};

/// Where the mesh's state comes from.
#[derive(Debug, Clone)]
pub(super) enum MeshSource {
    /// A file or a text.
    Local(LocalSource),
    /// A control plane.
    Remote(Box<RemoteMesh>),
}

impl MeshSource {
    /// Marks the sockets of calls.
    pub(super) fn mark(&mut self, mark: Option<u32>) {
        if let Self::Remote(remote) = self {
            remote.server.mark = mark;
        }
    }
}

/// How a control plane is asked.
#[derive(Debug, Clone)]
pub(super) struct RemoteMesh {
    pub(super) server: grpc::Config,
    pub(super) identity: Identity,
    /// How long a look-up waits for an answer, if only what is looked up is asked for.
    pub(super) on_demand: Option<Duration>,
}

/// Who the proxy is.
pub(super) struct Oneself<'a> {
    pub(super) node: &'a str,
    pub(super) cluster_id: &'a str,
    pub(super) pod: Option<&'a str>,
    pub(super) namespace: Option<&'a str>,
    pub(super) token: Option<Token>,
}

/// Flags and environment about the state of the mesh.
#[derive(Debug, clap::Args)]
pub(super) struct MeshArgs {
    /// File with workloads, services and policies (YAML), used instead of XDS_ADDRESS; reloaded when it changes.
    #[arg(long, env = "LOCAL_XDS_PATH")]
    local_xds_path: Option<PathBuf>,
    /// The same, as text.
    #[arg(long, env = "LOCAL_XDS", conflicts_with = "local_xds_path")]
    local_xds: Option<String>,
    /// The control plane that tells workloads, services and policies, as https://host:port. Default istiod.istio-system.svc:15012 within Kubernetes,
    /// localhost:15012 elsewhere.
    #[arg(long, env = "XDS_ADDRESS")]
    xds_address: Option<String>,
    /// The roots that the control plane's certificate must lead to: a PEM file (read again for every connection), PEM text, or SYSTEM.
    #[arg(long, env = "XDS_ROOT_CA", default_value = "./var/run/secrets/istio/root-cert.pem")]
    xds_root_ca: String,
    /// A second name that the control plane's certificate may have.
    #[arg(long, env = "ALT_XDS_HOSTNAME")]
    alt_xds_hostname: Option<String>,
    /// Ask the control plane only for what connections need, instead of for everything.
    #[arg(long, env = "XDS_ON_DEMAND", default_value_t = false, action = clap::ArgAction::Set)]
    xds_on_demand: bool,
    /// How long a connection waits for the control plane to say what its destination is, with XDS_ON_DEMAND; then it is refused. (A DNS question
    /// waits 1 s, and is passed on then.)
    #[arg(long, env = "CULVERT_ON_DEMAND_TIMEOUT", default_value = "5s", value_parser = duration::parse)]
    on_demand_timeout: Duration,
    /// Address of the proxy's own pod, as the control plane is told.
    #[arg(long, env = "INSTANCE_IP", default_value = "")]
    instance_ip: String,
}

impl MeshArgs {
    /// Its part of the `config` object of `config_dump`.
    pub(super) fn dump(&self) -> Value {
        serde_json::json!({
            "localXdsPath": self.local_xds_path, "xdsAddress": self.xds_address, "xdsRootCert": self.xds_root_ca,
            "altXdsHostname": self.alt_xds_hostname, "xdsOnDemand": self.xds_on_demand,
            "onDemandTimeout": format!("{:?}", self.on_demand_timeout),
        })
    }

    /// Checks what the types cannot. `environment` is what the metadata and headers are taken from.
    pub(super) fn source(&self, oneself: &Oneself<'_>, environment: &[(String, String)]) -> anyhow::Result<MeshSource> {
        match (&self.local_xds_path, &self.local_xds) {
            (Some(path), _) => return Ok(MeshSource::Local(LocalSource::Path(path.clone()))),
            (None, Some(text)) => return Ok(MeshSource::Local(LocalSource::Text(text.clone()))),
            (None, None) => {}
        }
        let address = match self.xds_address.as_deref().map(str::trim) {
            Some("") => {
                bail!("no source of workloads, services and policies: XDS_ADDRESS is empty; set it to https://host:port, or LOCAL_XDS_PATH to a file")
            }
            Some(address) => address,
            None => default_address(),
        };
        let server = grpc::Config {
            alternate_name: self.alt_xds_hostname.clone(),
            token: oneself.token.clone(),
            headers: headers("XDS_HEADER_", oneself.cluster_id, environment.iter().cloned()),
            ..grpc::Config::new(address.parse().context("XDS_ADDRESS")?, RootSource::of(&self.xds_root_ca))
        };
        // Says now what could never work.
        grpc::Dialer::new(server.clone()).context("the settings of the xDS client")?;
        let identity = Identity {
            ip: self.instance_ip.clone(),
            pod: oneself.pod.unwrap_or_default().to_owned(),
            namespace: oneself.namespace.unwrap_or_default().to_owned(),
            node: oneself.node.to_owned(),
            metadata: metadata(oneself.cluster_id, environment)?,
        };
        Ok(MeshSource::Remote(Box::new(RemoteMesh { server, identity, on_demand: self.xds_on_demand.then_some(self.on_demand_timeout) })))
    }
}

/// What the control plane is told about us: `ISTIO_META_*` as text, then `ISTIO_METAJSON_*` as what it says.
fn metadata(cluster_id: &str, environment: &[(String, String)]) -> anyhow::Result<Vec<(String, Value)>> {
    let mut members = vec![("CLUSTER_ID".to_owned(), cluster_id.into())];
    members.extend(environment.iter().filter_map(|(name, value)| Some((name.strip_prefix("ISTIO_META_")?.to_owned(), value.as_str().into()))));
    for (name, value) in environment {
        if let Some(member) = name.strip_prefix("ISTIO_METAJSON_") {
            members.push((member.to_owned(), serde_json::from_str(value).with_context(|| format!("{name} is not JSON"))?));
        }
    }
    Ok(members)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::parsed;
    use super::*;

    const ENVIRONMENT: [(&str, &str); 4] =
        [("ISTIO_META_DNS_CAPTURE", "true"), ("ISTIO_METAJSON_LABELS", "{\"app\":\"z\"}"), ("XDS_HEADER_X_TEAM", "blue"), ("PATH", "/bin")];

    fn source(line: &[&str]) -> anyhow::Result<MeshSource> {
        source_in(line, &ENVIRONMENT)
    }

    fn source_in(line: &[&str], environment: &[(&str, &str)]) -> anyhow::Result<MeshSource> {
        let environment: Vec<_> = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let oneself = Oneself { node: "n1", cluster_id: "c1", pod: Some("z"), namespace: Some("istio-system"), token: None };
        parsed::<MeshArgs>(line)?.source(&oneself, &environment)
    }

    #[test]
    fn without_a_local_file_the_mesh_comes_from_a_control_plane() {
        assert!(matches!(source(&["--local-xds", "{}"]).unwrap(), MeshSource::Local(LocalSource::Text(_))));
        let line = ["--xds-address", "xds.example:15012", "--alt-xds-hostname", "istiod.other.svc", "--xds-root-ca", "SYSTEM"];
        let MeshSource::Remote(remote) = source(&line).unwrap() else { unreachable!("a control plane") };
        assert_eq!(remote.server.address.to_string(), "xds.example:15012");
        assert_eq!((remote.server.roots, remote.server.alternate_name.as_deref()), (RootSource::System, Some("istiod.other.svc")));
        assert_eq!(remote.server.headers, [("clusterid".to_owned(), "c1".to_owned()), ("X_TEAM".to_owned(), "blue".to_owned())]);
        assert_eq!(remote.on_demand, None);
        assert_eq!((remote.identity.node.as_str(), remote.identity.pod.as_str(), remote.identity.ip.as_str()), ("n1", "z", ""));
        let expected = [("CLUSTER_ID", Value::from("c1")), ("DNS_CAPTURE", "true".into()), ("LABELS", serde_json::json!({"app": "z"}))];
        assert_eq!(remote.identity.metadata, expected.map(|(name, value)| (name.to_owned(), value)));
    }

    #[test]
    fn on_demand_is_asked_for_and_bounded() {
        let MeshSource::Remote(remote) = source(&["--xds-on-demand", "true"]).unwrap() else { unreachable!("a control plane") };
        assert_eq!(remote.on_demand, Some(Duration::from_secs(5)));
    }

    #[test]
    fn settings_of_the_control_plane_that_cannot_work_stop_the_start() {
        for (line, problem) in [
            (["--xds-address", ""], "XDS_ADDRESS is empty"),
            (["--xds-address", "http://istiod:15010"], "plaintext"),
            (["--alt-xds-hostname", "two words"], "not a host name"),
        ] {
            let error = format!("{:#}", source(&line).unwrap_err());
            assert!(error.contains(problem), "{error}");
        }
        let error = format!("{:#}", source_in(&[], &[("ISTIO_METAJSON_X", "{")]).unwrap_err());
        assert!(error.starts_with("ISTIO_METAJSON_X is not JSON"), "{error}");
    }
}
