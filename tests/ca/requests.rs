//! What is sent, and how the store asks.

use std::sync::atomic::Ordering;

use rcgen::PublicKeyData;
use x509_parser::prelude::FromDer;

use super::ca_server::{Mood, serving};
use super::*;

#[tokio::test]
async fn a_request_has_the_form_of_the_protocol() {
    let server = server().await;
    let client = Client::of(&server);
    client.store.fetch(&id("web")).await.unwrap();
    let asked = server.asked().remove(0);
    assert_eq!(asked.impersonated().as_deref(), Some("spiffe://cluster.local/ns/shop/sa/web"));
    assert_eq!(asked.message.metadata.as_ref().unwrap().fields.len(), 1);
    assert_eq!(asked.message.validity_duration, 86_400, "SECRET_TTL");
    assert_eq!(asked.header("authorization"), Some("Bearer first-token"));
    assert_eq!((asked.header("clusterid"), asked.header("x_team")), (Some("Kubernetes"), Some("blue")));
    assert_eq!((asked.header("content-type"), asked.header("te")), (Some("application/grpc"), Some("trailers")));
    // PKCS#10: P-256, nothing in the subject, the identity as the only name.
    let (_, pem) = x509_parser::pem::parse_x509_pem(asked.message.csr.as_bytes()).unwrap();
    assert_eq!(pem.label, "CERTIFICATE REQUEST");
    let (_, csr) = x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents).unwrap();
    assert_eq!(csr.certification_request_info.subject.iter().count(), 0);
    let parsed = rcgen::CertificateSigningRequestParams::from_pem(&asked.message.csr).unwrap();
    assert_eq!(parsed.params.subject_alt_names, [rcgen::SanType::URI("spiffe://cluster.local/ns/shop/sa/web".try_into().unwrap())]);
    assert_eq!((parsed.public_key.algorithm(), parsed.public_key.der_bytes().len()), (&rcgen::PKCS_ECDSA_P256_SHA256, 65));
}

#[tokio::test]
async fn each_request_is_for_a_fresh_key() {
    let server = server().await;
    let client = Client::of(&server);
    for _ in 0..2 {
        client.store.fetch(&id("web")).await.unwrap();
        client.store.forget(&id("web"));
    }
    let keys: Vec<_> = server.asked().iter().map(|asked| rcgen::CertificateSigningRequestParams::from_pem(&asked.message.csr).unwrap()).collect();
    assert_ne!(keys[0].public_key.der_bytes(), keys[1].public_key.der_bytes());
}

#[tokio::test]
async fn a_dedicated_proxy_asks_for_itself_without_metadata() {
    let server = server().await;
    let client = Client::with(&server, |_| {}, Config::default(), false);
    let own = SpiffeId::new("cluster.local", "own", "caller").unwrap();
    client.store.fetch(&own).await.unwrap();
    assert_eq!(server.asked()[0].message.metadata, None);
}

#[tokio::test]
async fn the_chain_is_leaf_and_intermediates_and_all_of_the_last_text_are_roots() {
    let (root, other) = (Authority::root("root"), Authority::root("other"));
    let ca = root.intermediate("upper").intermediate("lower");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let roots = format!("{}{}", other.signer.pem(), root.signer.pem());
    let server = CaServer::start_on(listener, ca, roots, serving(&root, &["localhost"]));
    let client = Client::of(&server);
    std::fs::write(client.file("root-cert.pem"), root.signer.pem()).unwrap();
    let credential = client.store.fetch(&id("web")).await.unwrap();
    let (lower, upper) = (&server.desk.ca.chain[0], &server.desk.ca.chain[1]);
    assert_eq!(credential.chain[1..], [lower.clone(), upper.clone()]);
    assert_eq!(credential.roots, [other.signer.der().clone(), root.signer.der().clone()]);
    // The page of certificates and the metrics say the same.
    let dump = serde_json::to_value(client.store.dump()).unwrap();
    assert_eq!((&dump[0]["identity"], &dump[0]["state"]), (&"spiffe://cluster.local/ns/shop/sa/web".into(), &"Available".into()));
    assert_eq!((dump[0]["certChain"].as_array().unwrap().len(), dump[0]["rootCerts"].as_array().unwrap().len()), (3, 2));
    assert!(client.metrics().contains("culvert_certificates{state=\"available\"} 1\n"));
    assert_eq!(client.counted("issued"), 1);
    let left = client.metrics().lines().find_map(|line| line.strip_prefix("culvert_certificate_first_expiry_seconds ")?.parse::<u64>().ok());
    assert!((80_000..=86_400).contains(&left.unwrap()), "{left:?}");
}

#[tokio::test]
async fn the_token_file_is_read_for_every_request() {
    let server = server().await;
    let client = Client::of(&server);
    client.store.fetch(&id("one")).await.unwrap();
    std::fs::write(client.file("token"), "second-token\n").unwrap();
    client.store.fetch(&id("two")).await.unwrap();
    let asked = server.asked();
    let tokens: Vec<_> = asked.iter().map(|asked| asked.header("authorization").unwrap()).collect();
    assert_eq!(tokens, ["Bearer first-token", "Bearer second-token"]);
    assert_eq!(server.desk.connections.load(Ordering::SeqCst), 1, "one connection serves both");
}

#[tokio::test]
async fn without_a_usable_token_the_ca_is_not_asked() {
    let server = server().await;
    let client = Client::of(&server);
    std::fs::write(client.file("token"), "").unwrap();
    let error = client.store.fetch(&id("web")).await.unwrap_err();
    assert_eq!(error.reason(), "token");
    assert!(error.to_string().contains(client.file("token").to_str().unwrap()) && error.to_string().contains("empty"), "{error}");
    assert_eq!((client.counted("token"), server.asked().len()), (1, 0));
    // The file comes back: so does the identity, at the next try.
    std::fs::write(client.file("token"), "late-token").unwrap();
    client.leap(2 * SECOND).await;
    until("a certificate", || client.state("web").as_deref() == Some("Available")).await;
}

#[tokio::test]
async fn no_more_requests_are_in_flight_than_allowed() {
    let server = server().await;
    server.mood(Mood::Hang);
    let client = Client::with(&server, |_| {}, Config { requests_in_flight: 3, ..Config::default() }, true);
    for n in 0..12 {
        client.store.prefetch(id(&format!("n{n}")));
    }
    until("three requests", || server.asked().len() == 3).await;
    server.mood(Mood::Slow(Duration::from_millis(5)));
    // What hangs times out after 30 s and is asked for again.
    client.leap(31 * SECOND).await;
    until("the others", || client.counted("issued") >= 9).await;
    client.leap(2 * SECOND).await;
    until("all", || client.counted("issued") == 12).await;
    assert_eq!(server.desk.busiest.load(Ordering::SeqCst), 3);
    assert_eq!(client.counted("timeout"), 3);
}

#[tokio::test]
async fn prefetched_identities_are_there_before_they_are_needed_and_forgotten_ones_are_given_up() {
    let server = server().await;
    let client = Client::of(&server);
    client.store.prefetch(id("early"));
    until("a certificate", || client.state("early").as_deref() == Some("Available")).await;
    client.store.fetch(&id("early")).await.unwrap();
    assert_eq!(server.asked().len(), 1, "it was there");
    client.store.forget(&id("early"));
    assert_eq!(client.state("early"), None);

    server.mood(Mood::Hang);
    let (store, identity) = (client.store.clone(), id("late"));
    let waiting = tokio::spawn(async move { store.fetch(&identity).await });
    until("a request", || server.desk.busy.load(Ordering::SeqCst) == 1).await;
    client.store.forget(&id("late"));
    assert!(waiting.await.unwrap().unwrap_err().to_string().contains("no longer needed"));
    until("the request to be taken back", || server.desk.busy.load(Ordering::SeqCst) == 0).await;
    assert!(client.store.dump().is_empty());
}

#[tokio::test]
async fn renewal_is_at_half_life_over_the_wire_too() {
    let server = server().await;
    let client = Client::of(&server);
    client.store.prefetch(id("web"));
    until("a certificate", || client.counted("issued") == 1).await;
    let first = client.store.fetch(&id("web")).await.unwrap();
    // From 10 % before: 1.0 d of life after a beginning one hour ago is halved at 11.5 h, ±1.25 h.
    client.leap(10 * DAY / 24).await;
    assert_eq!(client.store.fetch(&id("web")).await.unwrap().generation, first.generation);
    client.leap(3 * DAY / 24).await;
    until("a renewal", || client.counted("issued") == 2).await;
    assert!(client.store.fetch(&id("web")).await.unwrap().generation > first.generation);
}
