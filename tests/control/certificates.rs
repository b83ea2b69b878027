//! The certificate service: who gets which certificate.

use std::path::Path;
use std::time::Duration;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SanType};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tonic::Code;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::control_client::*;
use crate::ground::*;

const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
const MACHINE_ID: &str = "spiffe://cluster.local/ns/edge/sa/machine";

fn csr(names: &[&str], algorithm: &'static rcgen::SignatureAlgorithm) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names.iter().map(|name| SanType::URI((*name).try_into().unwrap())).collect();
    params.serialize_request(&KeyPair::generate_for(algorithm).unwrap()).unwrap().pem().unwrap()
}

fn good(name: &str) -> String {
    csr(&[name], &PKCS_ECDSA_P256_SHA256)
}

fn lifetime(leaf: &str) -> Duration {
    let der = CertificateDer::from_pem_slice(leaf.as_bytes()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&der).unwrap();
    Duration::from_secs((leaf.validity.not_after.timestamp() - leaf.validity.not_before.timestamp()).try_into().unwrap())
}

#[tokio::test]
async fn an_answer_is_the_leaf_then_intermediates_then_all_roots() {
    let plane = Plane::of_file("{}").await;
    let answer = plane.connect().await.certificate(&good(WEB), Some(WEB), 3600).await.unwrap();
    assert_eq!(answer.chain.len(), 3);
    assert!(answer.chain.iter().all(|text| text.matches("BEGIN CERTIFICATE").count() == 1));
    assert_eq!(answer.chain[2], std::fs::read_to_string(plane.ca().join("root-cert.pem")).unwrap().replace("\r\n", "\n"));
    let der = CertificateDer::from_pem_slice(answer.chain[0].as_bytes()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&der).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::URI(WEB)]);
    assert!(lifetime(&answer.chain[0]) <= Duration::from_secs(3600 + 120));
    assert_eq!(plane.metric("culvert_control_certificates_issued_total"), 1.0);
}

#[tokio::test]
async fn a_call_without_a_valid_token_is_unauthenticated() {
    let plane = Plane::of_file("{}").await;
    for token in [None, Some("not-one-of-the-tokens"), Some("")] {
        let connection = connect(plane.address, &plane.ca(), NAME, token).await.unwrap();
        assert_eq!(connection.certificate(&good(WEB), Some(WEB), 0).await.unwrap_err().code(), Code::Unauthenticated);
        assert_eq!(connection.stream().await.err().unwrap().code(), Code::Unauthenticated);
    }
    assert_eq!(plane.metric("culvert_control_unauthenticated_total"), 6.0);
    assert_eq!(plane.metric("culvert_control_certificates_issued_total"), 0.0);
}

#[tokio::test]
async fn a_token_gives_only_the_identities_it_is_for() {
    let plane = Plane::of_file(&mesh(&[("here", "right", 1), ("there", "left", 1)], &[])).await;
    let of = |name: &str| format!("spiffe://cluster.local/ns/default/sa/{name}");
    for (token, identity, allowed) in [
        (LEFT, of("anybody"), true),
        (RIGHT, of("here"), true),
        (RIGHT, of("there"), false),
        (RIGHT, of("nobody"), false),
        (RIGHT, of("here").replace("cluster.local", "other.domain"), false),
        (MACHINE, MACHINE_ID.to_owned(), true),
        (MACHINE, of("here"), false),
    ] {
        let outcome = plane.connect_as(token).await.certificate(&good(&identity), Some(&identity), 0).await;
        assert_eq!(
            outcome.as_ref().map(|_| ()).map_err(tonic::Status::code),
            if allowed { Ok(()) } else { Err(Code::PermissionDenied) },
            "{token} {identity}"
        );
    }
    // A pod that has moved away takes its identity with it.
    plane.write(&mesh(&[("here", "left", 1), ("there", "right", 1)], &[]));
    plane.until_metric("culvert_control_epoch", 2.0).await;
    let right = plane.connect_as(RIGHT).await;
    assert!(right.certificate(&good(&of("there")), Some(&of("there")), 0).await.is_ok());
    assert!(right.certificate(&good(&of("here")), Some(&of("here")), 0).await.is_err());
}

#[tokio::test]
async fn a_caller_that_names_nobody_gets_its_own_identity_if_it_has_one() {
    let plane = Plane::of_file("{}").await;
    assert!(plane.connect_as(MACHINE).await.certificate(&good(MACHINE_ID), None, 0).await.is_ok());
    assert_eq!(plane.connect().await.certificate(&good(WEB), None, 0).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_bad_request_is_refused_with_a_reason() {
    let plane = Plane::of_file("{}").await;
    let connection = plane.connect().await;
    let other = "spiffe://cluster.local/ns/default/sa/other";
    let mut spoiled = good(WEB);
    let middle = spoiled.len() / 2;
    spoiled.replace_range(middle..=middle, if &spoiled[middle..=middle] == "A" { "B" } else { "A" });
    for (csr, identity, part) in [
        (good(other), WEB, "somebody else"),
        (csr(&[WEB, other], &PKCS_ECDSA_P256_SHA256), WEB, "somebody else"),
        (csr(&[WEB], &PKCS_ECDSA_P384_SHA384), WEB, "P-256"),
        (spoiled, WEB, "not valid"),
        (String::new(), WEB, "not valid"),
        ("x".repeat(10_000), WEB, "not valid"),
        (good(WEB), "spiffe://cluster.local/web", "SPIFFE"),
        (good(WEB), "", "SPIFFE"),
    ] {
        let status = connection.certificate(&csr, Some(identity), 0).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(part), "{part}: {status}");
    }
    assert_eq!(connection.certificate(&"x".repeat(70_000), Some(WEB), 0).await.unwrap_err().code(), Code::OutOfRange);
    assert!(connection.certificate(&good(WEB), Some(WEB), 0).await.is_ok(), "a bad request spoils the connection");
}

#[tokio::test]
async fn lifetimes_are_the_default_or_as_asked_up_to_the_longest() {
    let plane = Plane::of_file("{}").await;
    let connection = plane.connect().await;
    let day = 24 * 60 * 60;
    for (asked, seconds) in [(0, day), (-5, day), (60, 60), (90 * day, 90 * day)] {
        let got = lifetime(&connection.certificate(&good(WEB), Some(WEB), asked).await.unwrap().chain[0]).as_secs();
        let seconds = u64::try_from(seconds).unwrap();
        assert!((seconds..=seconds + 121).contains(&got), "{asked}: {got}");
    }
    for asked in [90 * day + 1, i64::MAX] {
        assert_eq!(connection.certificate(&good(WEB), Some(WEB), asked).await.unwrap_err().code(), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn a_node_that_asks_too_often_is_slowed_down_and_others_are_not() {
    let mut config = config();
    (config.ca.per_second, config.ca.burst) = (1, 3);
    let plane = Plane::in_directory(directory("{}"), config).await;
    let connection = plane.connect().await;
    let mut outcomes = Vec::new();
    for _ in 0..6 {
        outcomes.push(connection.certificate(&good(WEB), Some(WEB), 0).await.map(|_| ()).map_err(|status| status.code()));
    }
    assert_eq!(outcomes[..3], [Ok(()), Ok(()), Ok(())]);
    assert!(outcomes[3..].contains(&Err(Code::ResourceExhausted)), "{outcomes:?}");
    assert!(plane.connect_as(MACHINE).await.certificate(&good(MACHINE_ID), None, 0).await.is_ok());
}

#[tokio::test]
async fn the_servers_own_certificate_has_its_names_and_leads_to_the_root() {
    let plane = Plane::of_file("{}").await;
    for name in ["istiod.istio-system.svc", "localhost", "127.0.0.1", "::1"] {
        assert!(connect(plane.address, &plane.ca(), name, Some(LEFT)).await.is_ok(), "{name}");
    }
    assert!(connect(plane.address, &plane.ca(), "somebody.else", Some(LEFT)).await.is_err());
    let other = directory("{}");
    assert!(connect(plane.address, &other.path().join("ca"), NAME, Some(LEFT)).await.is_err());
}

/// Has a link of the plane's directory lead elsewhere, in one step, as Kubernetes does with what it mounts.
fn point(directory: &Path, to: &str) {
    let new = directory.join("new");
    std::os::unix::fs::symlink(to, &new).unwrap();
    std::fs::rename(new, directory.join("ca")).unwrap();
}

#[tokio::test]
async fn another_ca_in_the_directory_is_used_without_a_restart_and_a_broken_one_changes_nothing() {
    let (directory, other) = (directory("{}"), directory("{}"));
    let [first, next, half] = ["first", "next", "half"].map(|name| directory.path().join(name));
    std::fs::rename(directory.path().join("ca"), &first).unwrap();
    std::fs::rename(other.path().join("ca"), &next).unwrap();
    std::fs::create_dir(&half).unwrap();
    for (from, name) in [(&first, "ca-cert.pem"), (&first, "cert-chain.pem"), (&next, "ca-key.pem"), (&next, "root-cert.pem")] {
        std::fs::copy(from.join(name), half.join(name)).unwrap();
    }
    point(directory.path(), "first");
    let plane = Plane::in_directory(directory.clone(), config()).await;
    let root = |ca: &Path| std::fs::read_to_string(ca.join("root-cert.pem")).unwrap();
    let connection = plane.connect().await;
    let issued = async |connection: &Connection| connection.certificate(&good(WEB), Some(WEB), 0).await.unwrap().chain.pop().unwrap();
    let reached = async |trust: &Path| connect(plane.address, trust, NAME, Some(LEFT)).await.is_ok();
    let counted = || ["loads", "failures"].map(|what| plane.metric(&format!("culvert_control_ca_{what}_total")));
    assert_eq!((issued(&connection).await, counted()), (root(&first), [0.0, 0.0]));

    point(directory.path(), "half");
    plane.until_metric("culvert_control_ca_failures_total", 1.0).await;
    assert_eq!(issued(&connection).await, root(&first));
    assert!(reached(&first).await && !reached(&next).await);
    tokio::time::sleep(5 * config().ca_check).await;
    assert_eq!(counted(), [0.0, 1.0], "it is complained about once");

    // For certificates, and for the server's own at once. Who is connected stays so.
    point(directory.path(), "next");
    plane.until_metric("culvert_control_ca_loads_total", 1.0).await;
    assert_eq!(issued(&connection).await, root(&next));
    assert!(reached(&next).await && !reached(&first).await);
    tokio::time::sleep(5 * config().ca_check).await;
    assert_eq!(counted(), [1.0, 1.0]);
}
