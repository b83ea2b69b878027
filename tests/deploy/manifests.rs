//! The manifests: each object is what Kubernetes takes, and what the binary and the reference expect of each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Capabilities, Container, Namespace, Pod, PodSpec, Service, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{deploy, files, printed};

const DAEMON_SET: &str = "ztunnel-replacement/labelled-nodes/daemonset.yaml";

/// The YAML documents of a file.
pub(super) fn documents(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `security.istio.io/v1 AuthorizationPolicy`, as far as the manifests use it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AuthorizationPolicy {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: AuthorizationSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AuthorizationSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    selector: Option<LabelSelector>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_refs: Option<Vec<TargetRef>>,
    action: Action,
    rules: Vec<Rule>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Action {
    Allow,
    Deny,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetRef {
    group: String,
    kind: String,
    name: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    from: Vec<From>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<Vec<To>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct From {
    source: Source,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    principals: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct To {
    operation: Operation,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Operation {
    methods: Vec<String>,
    paths: Vec<String>,
}

/// kustomize's.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    api_version: String,
    kind: String,
    resources: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patches: Option<Vec<KustomizePatch>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KustomizePatch {
    target: BTreeMap<String, String>,
    patch: String,
}

/// Whether an object survives the way into its type and back. A field that the type does not know is lost there, and so is one that only
/// repeats a default of the type (nothing of the manifests does).
fn check<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let read: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let back = serde_json::to_value(read).map_err(|error| error.to_string())?;
    if &back == object { Ok(()) } else { Err(format!("not all of it is understood, but only {back:#}")) }
}

fn check_any(object: &Value) -> Result<(), String> {
    let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
    match (text("apiVersion").as_str(), text("kind").as_str()) {
        ("v1", "Namespace") => check::<Namespace>(object),
        ("v1", "Pod") => check::<Pod>(object),
        ("v1", "Service") => check::<Service>(object),
        ("v1", "ServiceAccount") => check::<ServiceAccount>(object),
        ("apps/v1", "DaemonSet") => check::<DaemonSet>(object),
        ("apps/v1", "Deployment") => check::<Deployment>(object),
        ("security.istio.io/v1", "AuthorizationPolicy") => check::<AuthorizationPolicy>(object),
        ("kustomize.config.k8s.io/v1beta1", "Kustomization") => check::<Kustomization>(object),
        (version, kind) => Err(format!("{version} {kind} is not expected")),
    }
}

#[test]
fn every_object_reads_strictly_into_its_kubernetes_type() {
    let mut seen = 0;
    for path in files(&deploy("")).iter().filter(|path| path.extension().is_some_and(|extension| extension == "yaml")) {
        // Lab files are not Kubernetes'.
        if path.starts_with(deploy("lab")) {
            continue;
        }
        for object in documents(path) {
            check_any(&object).unwrap_or_else(|error| panic!("{}: {} {}: {error}", path.display(), object["kind"], object["metadata"]["name"]));
            seen += 1;
        }
    }
    assert!(seen >= 20, "only {seen} objects");
}

#[test]
fn a_misspelled_field_and_a_wrong_type_are_found() {
    let [object] = &documents(&deploy(DAEMON_SET))[..] else { panic!("one object") };
    check_any(object).unwrap();
    let text = object.to_string();
    for (right, wrong) in [("readinessProbe", "readynessProbe"), ("fieldRef", "fieldref"), ("\"port\":15021", "\"ports\":15021"), ("\"30\"", "30")] {
        assert!(text.contains(right));
        assert!(check_any(&serde_json::from_str(&text.replace(right, wrong)).unwrap()).is_err(), "{wrong}");
    }
}

#[test]
fn a_kustomization_names_files_that_are_there_and_patches_what_is_there() {
    for folder in ["ztunnel-replacement/labelled-nodes", "ztunnel-replacement/every-node"] {
        let [object] = &documents(&deploy(folder).join("kustomization.yaml"))[..] else { panic!("one object") };
        let kustomization: Kustomization = serde_json::from_value(object.clone()).unwrap();
        for resource in &kustomization.resources {
            let path = deploy(folder).join(resource);
            assert!(path.is_file() || path.join("kustomization.yaml").is_file(), "{}", path.display());
        }
        let [daemon_set] = &documents(&deploy(DAEMON_SET))[..] else { panic!("one object") };
        for patch in kustomization.patches.unwrap_or_default() {
            let operations: Vec<BTreeMap<String, String>> = serde_saphyr::from_str(&patch.patch).unwrap();
            for operation in operations {
                assert_eq!(operation["op"], "remove");
                assert!(daemon_set.pointer(&operation["path"]).is_some(), "{operation:?}");
            }
        }
    }
}

#[test]
fn the_demos_policies_and_services_name_pods_and_accounts_that_are_there() {
    let objects: Vec<Value> = files(&deploy("kind/demo")).iter().flat_map(|path| documents(path)).collect();
    let of_kind = |kind: &'static str| objects.iter().filter(move |object| object["kind"] == kind);
    let accounts: BTreeSet<_> = of_kind("ServiceAccount").map(|account| account["metadata"]["name"].as_str().unwrap()).collect();
    let apps: BTreeSet<_> = of_kind("Pod").map(|pod| pod["metadata"]["labels"]["app"].as_str().unwrap()).collect();
    for pod in of_kind("Pod") {
        assert!(accounts.contains(pod["spec"]["serviceAccountName"].as_str().unwrap()), "{pod}");
    }
    for service in of_kind("Service") {
        assert!(apps.contains(service["spec"]["selector"]["app"].as_str().unwrap()), "{service}");
    }
    let mut policies = 0;
    for policy in of_kind("AuthorizationPolicy") {
        policies += 1;
        if let Some(app) = policy["spec"]["selector"]["matchLabels"]["app"].as_str() {
            assert!(apps.contains(app), "{policy}");
        }
        for principal in policy["spec"]["rules"][0]["from"][0]["source"]["principals"].as_array().unwrap() {
            let account = principal.as_str().unwrap().strip_prefix("cluster.local/ns/culvert-demo/sa/").unwrap();
            // istioctl makes the waypoint's.
            assert!(accounts.contains(account) || account == "waypoint", "{account}");
        }
    }
    assert_eq!(policies, 4);
    assert!(objects.iter().all(|object| object["kind"] == "Namespace" || object["metadata"]["namespace"] == "culvert-demo"));
}

/// The DaemonSet, its pod and its only container.
pub(super) fn daemon_set() -> (DaemonSet, PodSpec, Container) {
    let [object] = &documents(&deploy(DAEMON_SET))[..] else { panic!("one object") };
    let daemon_set: DaemonSet = serde_json::from_value(object.clone()).unwrap();
    let pod = daemon_set.spec.clone().unwrap().template.spec.unwrap();
    let [container] = &pod.containers[..] else { panic!("one container") };
    (daemon_set.clone(), pod.clone(), container.clone())
}

/// Every setting of `culvert proxy` by its variable, with its default.
fn settings() -> BTreeMap<String, Option<String>> {
    let help = printed(std::process::Command::new(env!("CARGO_BIN_EXE_culvert")).args(["proxy", "--help"]).env_clear());
    // It is wrapped anywhere.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let settings: BTreeMap<_, _> = help
        .split("[env: ")
        .skip(1)
        .map(|rest| {
            // A secret's value would not be shown, so it has no sign of equality.
            let (name, rest) = rest.split_once(']').unwrap();
            let default = rest.trim_start().strip_prefix("[default: ").and_then(|rest| rest.split_once(']'));
            (name.trim_end_matches('=').to_owned(), default.map(|(value, _)| value.to_owned()))
        })
        .collect();
    assert!(settings.len() > 40, "{settings:?}");
    settings
}

/// Whatever begins with it goes to the control plane; the help cannot list it.
const FAMILY: &str = "ISTIO_META_";

#[test]
fn every_variable_of_the_daemon_set_is_one_that_the_binary_knows() {
    let (_, _, container) = daemon_set();
    let known = settings();
    for variable in container.env.unwrap() {
        assert!(known.contains_key(&variable.name) || variable.name.starts_with(FAMILY), "{} is not in culvert proxy --help", variable.name);
        assert!(variable.value.is_some() != variable.value_from.is_some(), "{}", variable.name);
    }
}

#[test]
fn probe_ports_and_paths_are_where_the_binary_listens() {
    let (daemon_set, pod, container) = daemon_set();
    let known = settings();
    let default = |name: &str| known[name].clone().unwrap();
    let probe = container.readiness_probe.unwrap().http_get.unwrap();
    assert_eq!(serde_json::to_value(probe.port).unwrap().to_string(), default("CULVERT_READINESS_PORT"));
    let ports: Vec<String> = container.ports.unwrap().iter().map(|port| port.container_port.to_string()).collect();
    assert_eq!(ports, [default("CULVERT_STATS_PORT")]);
    let annotations = daemon_set.spec.unwrap().template.metadata.unwrap().annotations.unwrap();
    assert_eq!(annotations["prometheus.io/port"], default("CULVERT_STATS_PORT"));
    assert_eq!(annotations["prometheus.io/scrape"], "true");

    // Files: each mount has its volume, and the settings' paths are in mounts.
    let volumes: BTreeSet<_> = pod.volumes.unwrap().into_iter().map(|volume| volume.name).collect();
    let mounts = container.volume_mounts.unwrap();
    assert_eq!(volumes, mounts.iter().map(|mount| mount.name.clone()).collect());
    let mounted = |path: &str| mounts.iter().any(|mount| Path::new(path).parent() == Some(Path::new(&mount.mount_path)));
    let set = |name: &str| container.env.iter().flatten().find(|variable| variable.name == name).unwrap().value.clone().unwrap();
    for path in [default("INPOD_UDS"), set("CRL_PATH"), "/var/run/secrets/istio/root-cert.pem".into(), "/var/run/secrets/tokens/istio-token".into()] {
        assert!(mounted(&path), "{path}");
    }
    assert!(mounts.iter().all(|mount| mount.read_only == Some(true) || mount.mount_path == "/var/run/ztunnel"), "{mounts:?}");
    assert_eq!(set("TERMINATION_GRACE_PERIOD_SECONDS"), pod.termination_grace_period_seconds.unwrap().to_string());
}

#[test]
fn the_daemon_set_takes_ztunnels_place_as_istio_set_it_up() {
    let (daemon_set, pod, container) = daemon_set();
    assert_eq!(daemon_set.metadata.namespace.as_deref(), Some("istio-system"));
    // The one account that istiod lets ask for other identities, and nothing of the Kubernetes API.
    assert_eq!(pod.service_account_name.as_deref(), Some("ztunnel"));
    assert_eq!(pod.automount_service_account_token, Some(false));
    assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
    assert_eq!(pod.node_selector.unwrap()["kubernetes.io/os"], "linux");
    assert_eq!(pod.host_network, None);
    let tolerated: Vec<_> = pod.tolerations.iter().flatten().map(|toleration| (toleration.effect.as_deref(), toleration.key.as_deref())).collect();
    assert_eq!(tolerated, [(Some("NoSchedule"), None), (Some("NoExecute"), None), (None, Some("CriticalAddonsOnly"))]);

    let spec = daemon_set.spec.unwrap();
    let surge = json!({ "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } });
    assert_eq!(serde_json::to_value(spec.update_strategy).unwrap(), surge);
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    for (name, value) in [("app", "ztunnel"), ("istio.io/dataplane-mode", "none"), ("sidecar.istio.io/inject", "false")] {
        assert_eq!(labels[name], value);
    }
    let selected = spec.selector.match_labels.unwrap();
    assert!(selected.iter().all(|(name, value)| labels.get(name) == Some(value)), "{selected:?}");
    // Istio's own DaemonSet selects that one.
    assert!(!selected.contains_key("app"), "{selected:?}");

    assert_eq!(container.name, "istio-proxy");
    let requests = container.resources.unwrap().requests.unwrap();
    assert_eq!((requests["cpu"].0.as_str(), requests["memory"].0.as_str()), ("200m", "512Mi"));
    let security = container.security_context.unwrap();
    assert_eq!((security.privileged, security.allow_privilege_escalation), (Some(false), Some(true)));
    assert_eq!((security.run_as_user, security.run_as_group, security.read_only_root_filesystem), (Some(0), Some(1337), Some(true)));
    let names = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
    assert_eq!(security.capabilities, Some(Capabilities { add: names(&["NET_ADMIN", "SYS_ADMIN"]), drop: names(&["ALL"]) }));
    assert!(container.liveness_probe.is_none(), "a proxy that is restarted cuts connections");
    let token =
        pod.volumes.iter().flatten().find_map(|volume| volume.projected.as_ref()?.sources.as_ref()?.first()?.service_account_token.clone()).unwrap();
    assert_eq!((token.audience.as_deref(), token.expiration_seconds, token.path.as_str()), (Some("istio-ca"), Some(43_200), "istio-token"));
}
