//! Answers that must not be installed. Each is what an honest answer is, but for one thing.

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, PublicKey};

use super::ca_server::signed;
use super::pki::{HOUR, workload};
use super::*;

/// Valid at the end of the test too, so that each answer has one fault only.
fn honest(identity: &str) -> CertificateParams {
    let mut params = workload(&[identity]);
    params.not_after = (SystemTime::now() + 72 * HOUR).into();
    params
}

/// An honest answer but for what `edit` does to the leaf.
fn leaf(edit: impl Fn(&mut CertificateParams) + Send + Sync + 'static) -> impl Fn(&Authority, &PublicKey, &str) -> Vec<String> + Send + Sync {
    move |ca, key, identity| {
        let mut params = honest(identity);
        edit(&mut params);
        signed(ca, key, &params, &ca.signer.pem())
    }
}

/// The CA answers wrongly; the old certificate serves on, a new identity gets the reason, and metrics count it.
async fn refused(outcome: &str, words: &str, lie: impl Fn(&Authority, &PublicKey, &str) -> Vec<String> + Send + Sync + 'static) {
    let server = server().await;
    let client = Client::of(&server);
    let good = client.store.fetch(&id("old")).await.unwrap();
    client.store.prefetch(id("old"));
    server.lie(lie);
    let error = client.store.fetch(&id("new")).await.unwrap_err();
    assert_eq!(error.reason(), outcome, "{error}");
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(client.state("new").unwrap(), format!("Unavailable: {error}"));
    assert_eq!(client.counted(outcome), 1, "{}", client.metrics());
    // At the renewal of the other, too.
    client.leap(DAY / 2 + 2 * HOUR).await;
    until("a refused renewal", || client.counted(outcome) >= 3).await;
    assert_eq!(client.counted("issued"), 1);
    assert_eq!(client.store.fetch(&id("old")).await.unwrap().generation, good.generation);
    assert_eq!(client.state("old").as_deref(), Some("Available"));
}

#[tokio::test]
async fn an_answer_for_another_identity_is_not_installed() {
    let edit = |params: &mut CertificateParams| params.subject_alt_names = workload(&["spiffe://cluster.local/ns/shop/sa/victim"]).subject_alt_names;
    refused("answer_for_other_identity", "it is for spiffe://cluster.local/ns/shop/sa/victim", leaf(edit)).await;
}

#[tokio::test]
async fn an_answer_with_a_second_identity_is_not_installed() {
    let edit = |params: &mut CertificateParams| {
        params.subject_alt_names.extend(workload(&["spiffe://cluster.local/ns/shop/sa/victim"]).subject_alt_names);
    };
    refused("answer_untrusted", "2 URI names", leaf(edit)).await;
}

#[tokio::test]
async fn an_expired_answer_is_not_installed() {
    let edit = |params: &mut CertificateParams| params.not_after = (SystemTime::now() - 60 * SECOND).into();
    refused("answer_expired", "expired", leaf(edit)).await;
}

#[tokio::test]
async fn an_answer_of_the_future_is_not_installed() {
    let edit = |params: &mut CertificateParams| {
        params.not_before = (SystemTime::now() + 48 * HOUR).into();
        params.not_after = (SystemTime::now() + 72 * HOUR).into();
    };
    refused("answer_not_yet_valid", "not valid for another", leaf(edit)).await;
}

#[tokio::test]
async fn an_answer_for_another_key_is_not_installed() {
    refused("answer_for_other_key", "another key", |ca, _, identity| {
        let other = KeyPair::generate().unwrap();
        vec![honest(identity).signed_by(&other, &ca.signer).unwrap().pem(), ca.signer.pem()]
    })
    .await;
}

#[tokio::test]
async fn an_empty_answer_is_not_installed() {
    refused("answer_empty", "it is empty", |_, _, _| Vec::new()).await;
}

#[tokio::test]
async fn a_leaf_without_roots_is_not_installed() {
    refused("answer_without_roots", "no root", |ca, key, identity| vec![honest(identity).signed_by(key, &ca.signer).unwrap().pem()]).await;
}

#[tokio::test]
async fn an_answer_that_is_a_ca_is_not_installed() {
    let edit = |params: &mut CertificateParams| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign];
    };
    refused("answer_untrusted", "CA certificate", leaf(edit)).await;
}

#[tokio::test]
async fn an_answer_that_does_not_lead_to_its_roots_is_not_installed() {
    let stranger = Authority::root("root").signer.pem();
    refused("answer_untrusted", "every peer would refuse it", move |ca, key, identity| signed(ca, key, &honest(identity), &stranger)).await;
}

#[tokio::test]
async fn a_chain_of_a_hundred_is_not_installed() {
    refused("answer_too_long", "100 certificates", |ca, key, identity| {
        let mut answer = signed(ca, key, &honest(identity), &ca.signer.pem());
        answer.splice(1..1, std::iter::repeat_n(ca.signer.pem(), 99));
        answer
    })
    .await;
}

#[tokio::test]
async fn an_answer_of_megabytes_is_not_read() {
    refused("too_large", "limit", |ca, key, identity| {
        let mut answer = signed(ca, key, &honest(identity), &ca.signer.pem());
        answer.push("x".repeat(2 << 20));
        answer
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_is_no_pem_is_not_installed() {
    refused("answer_malformed", "PEM", |_, _, _| vec!["hello".into(), "world".into()]).await;
}
