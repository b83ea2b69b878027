//! Which servers are believed to be the CA.

use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::ca_server::serving;
use super::*;

async fn refused(client: &Client, words: &str) {
    let error = client.store.fetch(&id("web")).await.unwrap_err();
    assert_eq!(error.reason(), "untrusted_ca", "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[tokio::test]
async fn a_server_of_another_root_or_name_gets_no_token() {
    let server = server().await;
    server.present(serving(&Authority::root("root"), &["localhost"]));
    let client = Client::of(&server);
    refused(&client, "does not lead to one of the roots in ").await;
    server.present(serving(&server.desk.ca, &["istiod.istio-system.svc"]));
    refused(&Client::of(&server), "is not for localhost").await;
    assert!(server.asked().is_empty());
}

#[tokio::test]
async fn an_alternate_name_is_accepted_beside_the_first_and_from_the_same_roots_only() {
    let server = server().await;
    let with = |name: &str| Client::with(&server, |config| config.alternate_name = Some(name.to_owned()), Config::default(), true);
    let client = with("istiod.istio-system.svc");
    client.store.fetch(&id("one")).await.unwrap();
    server.close();
    server.present(serving(&server.desk.ca, &["istiod.istio-system.svc"]));
    client.store.fetch(&id("two")).await.unwrap();
    refused(&with("istiod.other.svc"), "is not for localhost or istiod.other.svc").await;
    server.present(serving(&Authority::root("root"), &["istiod.istio-system.svc"]));
    refused(&with("istiod.istio-system.svc"), "does not lead to").await;
}

#[tokio::test]
async fn roots_are_rotated_without_a_restart() {
    let server = server().await;
    let client = Client::of(&server);
    client.store.fetch(&id("one")).await.unwrap();
    // The CA moves to another root; its connections stay, and old clients with them.
    let next = Authority::root("next");
    server.present(serving(&next, &["localhost"]));
    client.store.fetch(&id("two")).await.unwrap();
    assert_eq!(server.desk.connections.load(Ordering::SeqCst), 1);
    // The file follows: the next request goes over a connection that the new root verified.
    std::fs::write(client.file("root-cert.pem"), next.signer.pem()).unwrap();
    client.store.fetch(&id("three")).await.unwrap();
    assert_eq!(server.desk.connections.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_connection_does_not_outlive_the_root_that_verified_it() {
    let server = server().await;
    let client = Client::of(&server);
    let old = client.store.fetch(&id("old")).await.unwrap();
    std::fs::write(client.file("root-cert.pem"), Authority::root("next").signer.pem()).unwrap();
    refused(&client, "does not lead to").await;
    assert_eq!(client.store.fetch(&id("old")).await.unwrap().generation, old.generation);
}

#[tokio::test]
async fn roots_that_cannot_be_read_leave_a_connection_as_it_is_and_make_none() {
    let server = server().await;
    let client = Client::of(&server);
    client.store.fetch(&id("one")).await.unwrap();
    std::fs::write(client.file("root-cert.pem"), "half a fi").unwrap();
    client.store.fetch(&id("two")).await.unwrap();
    let fresh = Client::with(&server, |config| config.roots = RootSource::File(client.file("root-cert.pem")), Config::default(), true);
    let error = fresh.store.fetch(&id("web")).await.unwrap_err();
    assert_eq!(error.reason(), "roots");
    assert!(error.to_string().contains(client.file("root-cert.pem").to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn roots_may_be_given_as_text() {
    let server = server().await;
    let text = server.desk.ca.signer.pem();
    let client = Client::with(&server, |config| config.roots = RootSource::of(&text), Config::default(), true);
    client.store.fetch(&id("web")).await.unwrap();
}

#[tokio::test]
async fn with_the_pqc_policy_the_ca_must_have_x25519mlkem768_too() {
    let server = server().await;
    let quantum = || Client::with(&server, |config| config.post_quantum_only = true, Config::default(), true);
    quantum().store.fetch(&id("web")).await.unwrap();
    let classic = rustls::crypto::CryptoProvider {
        kx_groups: vec![rustls::crypto::aws_lc_rs::kx_group::X25519],
        ..rustls::crypto::aws_lc_rs::default_provider()
    };
    let presented = server.desk.ca.leaf({
        let mut params = pki::workload(&[]);
        params.subject_alt_names = vec![rcgen::SanType::DnsName("localhost".try_into().unwrap())];
        params
    });
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(classic))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(presented.certified.clone())));
    tls.alpn_protocols = vec![b"h2".to_vec()];
    server.present(Arc::new(tls));
    refused(&quantum(), "").await;
    Client::of(&server).store.fetch(&id("web")).await.unwrap();
}

#[tokio::test]
async fn a_server_without_tls_or_without_http2_is_named_and_gets_nothing() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let mut heard = Vec::new();
        let _ = socket.read_to_end(&mut heard).await;
        heard
    });
    let server = server().await;
    let client = Client::with(&server, |config| config.address = format!("localhost:{port}").parse().unwrap(), Config::default(), true);
    refused(&client, "no trusted connection to localhost:").await;
    let heard = heard.await.unwrap();
    assert!(!heard.windows(11).any(|bytes| bytes == b"first-token"));

    let mut tls = Arc::unwrap_or_clone(serving(&server.desk.ca, &["localhost"]));
    tls.alpn_protocols = Vec::new();
    server.present(Arc::new(tls));
    refused(&Client::of(&server), "HTTP/2").await;
}
