//! The `baggage` header of an HBONE request and response: what a peer says about its workload (reference, dataplane §2.4).
//!
//! It is a claim. It feeds telemetry and nothing else, so a hostile value may at worst spoil a label: [`Baggage::parse`] bounds
//! the bytes that it looks at, the number of entries and the length of each value.

use std::fmt::Write;

use super::{Text, Workload, WorkloadKind};

/// All header instances together; more is refused whole. The header list of a request is at most 8 KiB (design §9).
const MAX_BYTES: usize = 8 * 1024;
/// Entries looked at in all instances together; a well-formed header has seven.
const MAX_ENTRIES: usize = 128;
/// Longest value kept: a Kubernetes name has at most 253 bytes. A longer one counts as unset, never as a shortened name,
/// because two shortened names could become one.
const MAX_VALUE: usize = 253;

/// What a workload says about itself for telemetry. An absent field is unknown.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster_id: Option<Text>,
    /// `k8s.namespace.name`.
    pub namespace: Option<Text>,
    /// Names the key of the workload's name, `k8s.<kind>.name`.
    pub workload_type: Option<WorkloadKind>,
    /// Value of `k8s.<kind>.name`.
    pub workload_name: Option<Text>,
    /// `service.name`.
    pub service_name: Option<Text>,
    /// `service.version`.
    pub revision: Option<Text>,
    /// `cloud.region`.
    pub region: Option<Text>,
    /// `cloud.availability_zone`.
    pub zone: Option<Text>,
}

impl Baggage {
    /// The baggage of a workload that we know; empty words become absent fields.
    #[must_use]
    pub fn of(workload: &Workload) -> Self {
        let known = |text: &Text| if text.is_empty() { None } else { Some(text.clone()) };
        let profile = &workload.profile;
        Self {
            cluster_id: known(&profile.cluster_id),
            namespace: known(&profile.namespace),
            workload_type: Some(profile.kind),
            workload_name: known(&profile.workload_name),
            service_name: known(&profile.canonical_name),
            revision: known(&profile.canonical_revision),
            region: known(&profile.locality.region),
            zone: known(&profile.locality.zone),
        }
    }

    /// The header value, in the order of the reference, without spaces and without percent-encoding. Absent fields are left
    /// out, and so is a value that the format cannot carry (`,`, `=`, control or non-ASCII characters).
    #[must_use]
    pub fn to_header(&self) -> String {
        let workload_key = match self.workload_type.unwrap_or_default() {
            WorkloadKind::Deployment => "k8s.deployment.name",
            WorkloadKind::CronJob => "k8s.cronjob.name",
            WorkloadKind::Pod => "k8s.pod.name",
            WorkloadKind::Job => "k8s.job.name",
        };
        let mut header = String::with_capacity(256);
        for (key, value) in [
            ("k8s.cluster.name", &self.cluster_id),
            ("k8s.namespace.name", &self.namespace),
            (workload_key, &self.workload_name),
            ("service.name", &self.service_name),
            ("service.version", &self.revision),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ] {
            let Some(value) = value else { continue };
            if value.is_empty() || !value.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b',' && byte != b'=') {
                continue;
            }
            let separator = if header.is_empty() { "" } else { "," };
            // invariant: writing to a String cannot fail
            let _ = write!(header, "{separator}{key}={value}");
        }
        header
    }

    /// Reads all instances of the header. The last occurrence of a key wins, an empty value unsets it, unknown keys are ignored.
    /// `None` when there is no header, when any instance has a byte outside visible ASCII, space and tab, and when there are
    /// more than 8 KiB or 128 entries: a header that is partly nonsense is not believed in part.
    pub fn parse<H: AsRef<[u8]>>(headers: impl IntoIterator<Item = H>) -> Option<Self> {
        let mut baggage = Self::default();
        let (mut present, mut bytes, mut entries) = (false, 0, 0);
        for header in headers {
            let header = header.as_ref();
            present = true;
            bytes += header.len();
            if bytes > MAX_BYTES || !header.iter().all(|byte| (b' '..=b'~').contains(byte) || *byte == b'\t') {
                return None;
            }
            for entry in std::str::from_utf8(header).ok()?.split(',') {
                entries += 1;
                if entries > MAX_ENTRIES {
                    return None;
                }
                let mut parts = entry.split('=');
                if let (Some(key), Some(value)) = (parts.next(), parts.next()) {
                    baggage.set(key, value);
                }
            }
        }
        present.then_some(baggage)
    }

    fn set(&mut self, key: &str, value: &str) {
        let value = if value.is_empty() || value.len() > MAX_VALUE { None } else { Some(Text::from(value)) };
        let kind = match key {
            "k8s.cluster.name" => return self.cluster_id = value,
            "k8s.namespace.name" => return self.namespace = value,
            "service.name" => return self.service_name = value,
            "service.version" => return self.revision = value,
            "cloud.region" => return self.region = value,
            "cloud.availability_zone" => return self.zone = value,
            "k8s.deployment.name" => WorkloadKind::Deployment,
            "k8s.cronjob.name" => WorkloadKind::CronJob,
            "k8s.pod.name" => WorkloadKind::Pod,
            "k8s.job.name" => WorkloadKind::Job,
            _ => return,
        };
        self.workload_type = value.is_some().then_some(kind);
        self.workload_name = value;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{Addresses, HealthStatus, Locality, Profile};

    fn workload() -> Workload {
        Workload {
            uid: "u".into(),
            name: "web-0".into(),
            addresses: Addresses::default(),
            node: "n".into(),
            hostname: Text::default(),
            status: HealthStatus::Healthy,
            capacity: 1,
            profile: Arc::new(Profile {
                namespace: "shop".into(),
                canonical_name: "web".into(),
                canonical_revision: "v1".into(),
                workload_name: "web".into(),
                kind: WorkloadKind::CronJob,
                locality: Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() },
                ..Profile::default()
            }),
        }
    }

    const FULL: &str = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.cronjob.name=web,service.name=web,service.version=v1,cloud.region=r,cloud.availability_zone=z";

    #[test]
    fn a_workload_prints_in_the_order_of_the_reference_and_reads_back() {
        let baggage = Baggage::of(&workload());
        assert_eq!(baggage.to_header(), FULL);
        assert_eq!(Baggage::parse([FULL]).unwrap(), baggage);
    }

    #[test]
    fn empty_and_unprintable_values_are_omitted() {
        let baggage = Baggage {
            namespace: Some("a,b=c".into()),
            workload_name: Some("w\r\n".into()),
            service_name: Some("s\u{e9}".into()),
            revision: Some("v".into()),
            ..Baggage::default()
        };
        assert_eq!(baggage.to_header(), "service.version=v");
        assert_eq!(Baggage::default().to_header(), "");
    }

    #[test]
    fn the_last_occurrence_wins_across_instances_and_an_empty_value_unsets() {
        let parsed = Baggage::parse(["k8s.pod.name=a,service.name=x,service.version=1", "k8s.job.name=b,service.name=,unknown=1,junk"]).unwrap();
        assert_eq!(parsed.workload_name, Some("b".into()));
        assert_eq!(parsed.workload_type, Some(WorkloadKind::Job));
        assert_eq!(parsed.service_name, None);
        assert_eq!(parsed.revision, Some("1".into()));
    }

    #[test]
    fn keys_must_match_exactly() {
        assert_eq!(Baggage::parse([" service.name=x,Service.name=y,service.name =z"]).unwrap(), Baggage::default());
    }

    #[test]
    fn hostile_headers_are_refused_whole() {
        assert_eq!(Baggage::parse(Vec::<&[u8]>::new()), None);
        assert_eq!(Baggage::parse(["service.name=ok".as_bytes(), b"service.version=\xff".as_slice()]), None);
        assert_eq!(Baggage::parse(["service.name=\u{1b}[31m"]), None);
        assert_eq!(Baggage::parse(["a".repeat(9000)]), None);
        assert_eq!(Baggage::parse([",".repeat(200)]), None);
        let long = format!("service.name={}", "a".repeat(254));
        assert_eq!(Baggage::parse([long]).unwrap().service_name, None);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_panic_and_what_parses_prints_parsable(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(baggage) = Baggage::parse([&bytes]) {
                prop_assert!(baggage.to_header().is_ascii());
            }
        }

        #[test]
        fn a_printed_header_reads_back(cluster in "[ -+.-<>-~]{1,40}", name in "[a-z0-9-]{1,40}") {
            let baggage = Baggage { cluster_id: Some(cluster.into()), workload_name: Some(name.into()), workload_type: Some(WorkloadKind::Pod), ..Baggage::default() };
            prop_assert_eq!(Baggage::parse([baggage.to_header()]), Some(baggage));
        }
    }
}
