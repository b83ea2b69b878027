//! Who may talk to whom: handshakes between our configurations and every kind of peer, over in-memory pipes.
//! Rows D1–D6, T1, T2, T5 and T7 of the list of attacks; S (SPIFFE grammar) as a property.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, unreachable_pub)]
#[path = "support/pki.rs"]
mod pki;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use culvert::identity::{Config, Credential, Credentials, HandshakeFailure, LocalIssuer, PeerError, expect_peer, explain_io, peer_identity};
use culvert::lifecycle::{Clock, SettableTime};
use culvert::model::SpiffeId;
use pki::{Authority, HOUR, Presented, workload};
use proptest::prelude::*;
use rcgen::{CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType};
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const OURS: &str = "spiffe://cluster.local/ns/default/sa/server";
const PEER: &str = "spiffe://cluster.local/ns/default/sa/client";

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

/// Our own credential, signed by this CA.
async fn ours_with(ca: &Authority, root: &Authority, config: Config) -> Arc<Credential> {
    let dir = tempfile::tempdir().unwrap();
    ca.write(dir.path(), root);
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let (credentials, renewal) = Credentials::new(config, Arc::new(issuer), Clock::system());
    let renewal = tokio::spawn(renewal);
    let credential = credentials.fetch(&id(OURS)).await.unwrap();
    drop(credentials);
    renewal.await.unwrap();
    credential
}

async fn ours(ca: &Authority) -> Arc<Credential> {
    ours_with(ca, ca, Config::default()).await
}

/// What both sides know after a handshake.
#[derive(Debug)]
struct Met {
    peer: Vec<CertificateDer<'static>>,
    alpn: Option<Vec<u8>>,
    version: rustls::ProtocolVersion,
    suite: rustls::CipherSuite,
    group: rustls::NamedGroup,
    kind: rustls::HandshakeKind,
}

fn met(common: &rustls::CommonState) -> Met {
    Met {
        peer: common.peer_certificates().unwrap_or_default().iter().map(|der| der.clone().into_owned()).collect(),
        alpn: common.alpn_protocol().map(<[u8]>::to_vec),
        version: common.protocol_version().unwrap(),
        suite: common.negotiated_cipher_suite().unwrap().suite(),
        group: common.negotiated_key_exchange_group().unwrap().name(),
        kind: common.handshake_kind().unwrap(),
    }
}

/// What came of it on the server's and on the client's side. The client has seen the first bytes after the handshake, so tickets and late
/// refusals are known.
struct Outcome {
    server: io::Result<(Met, Option<String>)>,
    client: io::Result<(Met, u32)>,
}

async fn shake(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> Outcome {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let accept = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_all(b"k").await?;
        stream.flush().await?;
        let connection = stream.get_ref().1;
        let known = (met(connection), connection.server_name().map(str::to_owned));
        let _ = stream.read(&mut [0]).await;
        Ok(known)
    };
    let dial = async {
        let name = ServerName::try_from("named.example").unwrap();
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.read_u8().await?;
        let connection = stream.get_ref().1;
        Ok((met(connection), connection.tls13_tickets_received()))
    };
    let (server, client) = tokio::join!(accept, dial);
    Outcome { server, client }
}

/// How our server judges a client that presents this.
async fn as_client(ours: &Credential, peer: &Presented) -> Result<SpiffeId, HandshakeFailure> {
    let outcome = shake(ours.server_config(), Arc::new(peer.client())).await;
    match outcome.server {
        Ok((met, _)) => {
            outcome.client.expect("accepted by the server but not by the client");
            Ok(peer_identity(&met.peer).unwrap())
        }
        Err(error) => {
            assert!(outcome.client.is_err(), "the client must notice");
            Err(explain_io(&error))
        }
    }
}

/// How our client judges a server that presents this, before it asks which one it is.
async fn as_server(ours: &Credential, peer: &Presented) -> Result<SpiffeId, HandshakeFailure> {
    match shake(Arc::new(peer.server()), ours.client_config()).await.client {
        Ok((met, _)) => Ok(peer_identity(&met.peer).unwrap()),
        Err(error) => Err(explain_io(&error)),
    }
}

/// Refused in both directions for this reason.
async fn refused_both_ways(ours: &Credential, peer: &Presented, reason: &str, words: &str) {
    for failure in [as_client(ours, peer).await.unwrap_err(), as_server(ours, peer).await.unwrap_err()] {
        assert_eq!(failure.reason, reason, "{failure}");
        assert!(failure.text.contains(words), "{failure}");
        assert!(!failure.text.contains(char::is_control), "what a peer chose is escaped: {failure:?}");
    }
}

#[tokio::test]
async fn two_of_our_own_meet_over_tls13_with_h2_without_sni_tickets_or_resumption() {
    let ca = Authority::root("root");
    let (one, other) = (ours(&ca).await, ours(&ca).await);
    for _ in 0..2 {
        let outcome = shake(one.server_config(), other.client_config()).await;
        let ((server, name), (client, tickets)) = (outcome.server.unwrap(), outcome.client.unwrap());
        assert_eq!(name, None, "no server name is sent");
        assert_eq!(tickets, 0, "no ticket is sent");
        for side in [&server, &client] {
            assert_eq!(side.version, rustls::ProtocolVersion::TLSv1_3);
            assert_eq!(side.alpn.as_deref(), Some(&b"h2"[..]));
            assert_eq!(side.suite, rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
            assert_eq!(side.group, rustls::NamedGroup::X25519);
            assert_eq!(side.kind, rustls::HandshakeKind::Full);
            assert_eq!(peer_identity(&side.peer).unwrap(), id(OURS));
        }
        assert_eq!(client.peer.len(), 1, "the root is not sent");
    }
}

#[tokio::test]
async fn an_intermediate_is_sent_and_the_root_is_not() {
    let root = Authority::root("root");
    let middle = root.intermediate("middle");
    let credential = ours_with(&middle, &root, Config::default()).await;
    assert_eq!((credential.chain.len(), credential.roots.len()), (2, 1));
    as_client(&credential, &middle.leaf(workload(&[PEER]))).await.unwrap();
    as_server(&credential, &root.leaf(workload(&[PEER]))).await.unwrap();
    let missing = middle.leaf(workload(&[PEER]));
    let alone = Presented { certified: Arc::new(rustls::sign::CertifiedKey::new(missing.chain()[..1].to_vec(), missing.certified.key.clone())) };
    refused_both_ways(&credential, &alone, "unknown_issuer", "unknown issuer").await;
}

// ---- D1

#[tokio::test]
async fn d1_dates_are_exact_to_the_second() {
    let ca = Authority::root("root");
    let dir = tempfile::tempdir().unwrap();
    ca.write(dir.path(), &ca);
    // Our own clock stands still at a whole second.
    let now = UNIX_EPOCH + Duration::from_secs(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs());
    let clock = Clock::fixed(SettableTime::new(now));
    let issuer = LocalIssuer::load(dir.path(), clock.clone()).unwrap();
    let (credentials, renewal) = Credentials::new(Config::default(), Arc::new(issuer), clock);
    let renewal = tokio::spawn(renewal);
    let ours = credentials.fetch(&id(OURS)).await.unwrap();
    let second = Duration::from_secs(1);
    let with = |from: SystemTime, to: SystemTime| {
        let mut params = workload(&[PEER]);
        (params.not_before, params.not_after) = (from.into(), to.into());
        ca.leaf(params)
    };
    refused_both_ways(&ours, &with(now - HOUR, now - second), "expired", "peer certificate expired 1 s ago").await;
    refused_both_ways(&ours, &with(now + second, now + HOUR), "not_yet_valid", "not valid for another 1 s").await;
    as_client(&ours, &with(now - HOUR, now + second)).await.unwrap();
    as_server(&ours, &with(now, now + HOUR)).await.unwrap();
    drop(credentials);
    renewal.await.unwrap();
}

#[tokio::test]
async fn d1_certificates_of_strangers_are_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    as_client(&ours, &ca.leaf(workload(&[PEER]))).await.unwrap();
    let stranger = Authority::root("stranger").leaf(workload(&[PEER]));
    refused_both_ways(&ours, &stranger, "unknown_issuer", "unknown issuer").await;
    let impostor = Authority::root("root").leaf(workload(&[PEER]));
    let failure = as_client(&ours, &impostor).await.unwrap_err();
    assert!(["unknown_issuer", "bad_signature"].contains(&failure.reason), "right CA name, other key: {failure}");
    assert!(as_server(&ours, &impostor).await.is_err());
    let key = KeyPair::generate().unwrap();
    let own_word = Presented::new(vec![workload(&[PEER]).self_signed(&key).unwrap().der().clone()], &key);
    assert!(as_client(&ours, &own_word).await.is_err() && as_server(&ours, &own_word).await.is_err());
}

#[tokio::test]
async fn d1_d5_a_ca_certificate_is_not_a_leaf() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let mut params = workload(&[PEER]);
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages.push(KeyUsagePurpose::KeyCertSign);
    refused_both_ways(&ours, &ca.leaf(params), "ca_as_leaf", "CA certificate").await;
    let itself = Presented::new(vec![ca.signer.der().clone()], ca.signer.key());
    assert!(as_client(&ours, &itself).await.is_err() && as_server(&ours, &itself).await.is_err());
}

#[tokio::test]
async fn a_certificate_with_somebody_elses_key_is_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let (victim, thief) = (ca.leaf(workload(&[PEER])), ca.leaf(workload(&[PEER])));
    let stolen = Presented { certified: Arc::new(rustls::sign::CertifiedKey::new(victim.chain().to_vec(), thief.certified.key.clone())) };
    refused_both_ways(&ours, &stolen, "bad_signature", "bad signature").await;
}

// ---- D2, D3

#[tokio::test]
async fn d2_anything_but_one_uri_name_is_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    refused_both_ways(&ours, &ca.leaf(workload(&[PEER, OURS])), "bad_name", "2 URI names").await;
    refused_both_ways(&ours, &ca.leaf(workload(&[OURS, PEER])), "bad_name", "2 URI names").await;
    refused_both_ways(&ours, &ca.leaf(workload(&[PEER, PEER])), "bad_name", "2 URI names").await;
    refused_both_ways(&ours, &ca.leaf(workload(&[PEER, "https://example.com/"])), "bad_name", "2 URI names").await;
    refused_both_ways(&ours, &ca.leaf(workload(&[])), "bad_name", "no URI name").await;
    let mut dns = workload(&[]);
    dns.subject_alt_names = vec![SanType::DnsName("client.default.svc".try_into().unwrap())];
    refused_both_ways(&ours, &ca.leaf(dns.clone()), "bad_name", "no URI name").await;
    refused_both_ways(&ours, &ca.leaf(workload(&["https://example.com/ns/a/sa/b"])), "bad_name", "not a workload SPIFFE ID").await;
    // A DNS name beside the one URI name is allowed, and means nothing.
    dns.subject_alt_names.push(SanType::URI(PEER.try_into().unwrap()));
    assert_eq!(as_client(&ours, &ca.leaf(dns)).await.unwrap(), id(PEER));
}

#[tokio::test]
async fn d3_names_outside_the_grammar_are_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let long = format!("spiffe://cluster.local/ns/default/sa/{}", "a".repeat(3 * 1024));
    for name in [
        "spiffe://cluster.local/ns/default/sa/client\0",
        "spiffe://cluster.local/ns/default/sa/client\0.evil",
        "spiffe://cluster.local\0.evil/ns/default/sa/client",
        "spiffe://cluster.local/ns/default/sa/cli\nent",
        "spiffe://cluster.local/ns/default/sa/cli\x1b[2Jent",
        "spiffe://cluster.local/ns/default/sa/cli%65nt",
        "spiffe://cluster.local/ns/default%2fsa/sa/client",
        "spiffe://Cluster.local/ns/default/sa/client",
        "SPIFFE://cluster.local/ns/default/sa/client",
        "spiffe://cluster.local/NS/default/sa/client",
        "spiffe://cluster.local/ns/a/sa/b/../c",
        "spiffe://cluster.local/ns/../sa/client",
        "spiffe://cluster.local/ns/default/sa/client/",
        "spiffe://cluster.local/ns/default/sa/",
        "spiffe://cluster.local/ns//sa/client",
        "spiffe://cluster.local:443/ns/default/sa/client",
        "spiffe://user@cluster.local/ns/default/sa/client",
        "spiffe://cluster.local/ns/default/sa/client?x=y",
        "spiffe://cluster.local/ns/default/sa/client#x",
        " spiffe://cluster.local/ns/default/sa/client",
        "spiffe://cluster.local/ns/default/sa/client ",
        "spiffe:///ns/default/sa/client",
        "spiffe://cluster.local",
        "",
        &long,
    ] {
        refused_both_ways(&ours, &ca.leaf(workload(&[name])), "bad_name", "not a workload SPIFFE ID").await;
    }
}

#[tokio::test]
async fn d3_names_that_are_not_text_are_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    // SEQUENCE { [6] bytes }, written by hand: the certificate library refuses to make these.
    for bytes in [&b"spiffe://cluster.local/ns/default/sa/cli\xffent"[..], "spiffe://cluster.local/ns/default/sa/clïent".as_bytes()] {
        let length = u8::try_from(bytes.len()).unwrap();
        let mut content = vec![0x30, length + 2, 0x86, length];
        content.extend_from_slice(bytes);
        let mut params = workload(&[]);
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], content)];
        let leaf = ca.leaf(params);
        assert!(peer_identity(leaf.chain()).is_err());
        assert!(as_client(&ours, &leaf).await.is_err() && as_server(&ours, &leaf).await.is_err());
    }
    // A good name beside one that is not text.
    let mut content = vec![0x30, u8::try_from(PEER.len()).unwrap() + 5, 0x82, 1, 0xff, 0x86, u8::try_from(PEER.len()).unwrap()];
    content.extend_from_slice(PEER.as_bytes());
    let mut params = workload(&[]);
    params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], content)];
    assert!(matches!(peer_identity(ca.leaf(params).chain()), Err(PeerError::Malformed(_))));
    // Two extensions of names.
    let mut params = workload(&[PEER]);
    let mut content = vec![0x30, u8::try_from(OURS.len()).unwrap() + 2, 0x86, u8::try_from(OURS.len()).unwrap()];
    content.extend_from_slice(OURS.as_bytes());
    params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], content)];
    let leaf = ca.leaf(params);
    assert!(peer_identity(leaf.chain()).is_err());
    assert!(as_client(&ours, &leaf).await.is_err() && as_server(&ours, &leaf).await.is_err());
}

// ---- D4

#[tokio::test]
async fn d4_clients_of_other_trust_domains_are_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    for domain in ["other.domain", "cluster.local.evil", "evil.cluster.local", "cluster", "cluster.local.", "cluster.loca"] {
        let name = format!("spiffe://{domain}/ns/default/sa/client");
        let failure = as_client(&ours, &ca.leaf(workload(&[&name]))).await.unwrap_err();
        assert_eq!(failure.reason, "trust_domain");
        assert_eq!(failure.text, format!("trust domain mismatch: the peer is {name}, only cluster.local is accepted"));
    }
    let failure = as_client(&ours, &ca.leaf(workload(&["spiffe:///ns/default/sa/client"]))).await.unwrap_err();
    assert_eq!(failure.reason, "bad_name");
}

// ---- D5, T7

#[tokio::test]
async fn d5_t7_certificates_for_another_purpose_are_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let purposes = |purposes: Vec<ExtendedKeyUsagePurpose>| {
        let mut params = workload(&[PEER]);
        params.extended_key_usages = purposes;
        ca.leaf(params)
    };
    let server_only = purposes(vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert_eq!(as_client(&ours, &server_only).await.unwrap_err().reason, "wrong_purpose");
    as_server(&ours, &server_only).await.unwrap();
    let client_only = purposes(vec![ExtendedKeyUsagePurpose::ClientAuth]);
    assert_eq!(as_server(&ours, &client_only).await.unwrap_err().reason, "wrong_purpose");
    as_client(&ours, &client_only).await.unwrap();
    refused_both_ways(&ours, &purposes(vec![ExtendedKeyUsagePurpose::CodeSigning]), "wrong_purpose", "extended key usage").await;
    // No such extension at all restricts nothing (ref §2.1).
    as_client(&ours, &purposes(Vec::new())).await.unwrap();
    as_server(&ours, &purposes(Vec::new())).await.unwrap();
}

#[tokio::test]
async fn d5_wrong_key_usage_is_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    for usages in [
        vec![KeyUsagePurpose::KeyEncipherment],
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign],
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign],
    ] {
        let mut params = workload(&[PEER]);
        params.key_usages = usages;
        refused_both_ways(&ours, &ca.leaf(params), "wrong_purpose", "key usage").await;
    }
}

// ---- D6

#[tokio::test]
async fn d6_another_workload_than_the_one_dialled_is_refused() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let expected = [id("spiffe://cluster.local/ns/default/sa/wanted"), id("spiffe://cluster.local/ns/default/sa/also")];
    for name in ["spiffe://cluster.local/ns/other/sa/wanted", "spiffe://cluster.local/ns/default/sa/neighbour", "spiffe://evil/ns/default/sa/wanted"]
    {
        let outcome = shake(Arc::new(ca.leaf(workload(&[name])).server()), ours.client_config()).await;
        let (met, _) = outcome.client.unwrap();
        let error = expect_peer(&met.peer, &expected).unwrap_err();
        assert_eq!(error, PeerError::Unexpected { expected: expected.to_vec(), actual: id(name) });
        let text = error.to_string();
        assert!(expected.iter().all(|id| text.contains(&id.to_string())) && text.contains(name), "{text}");
        assert_eq!(HandshakeFailure::from(&error).reason, "identity");
    }
    let leaf = ca.leaf(workload(&["spiffe://cluster.local/ns/default/sa/also"]));
    assert_eq!(expect_peer(leaf.chain(), &expected).unwrap(), expected[1]);
    assert!(expect_peer(leaf.chain(), &[]).is_err(), "an empty list accepts nobody");
    assert_eq!(expect_peer(&[], &expected).unwrap_err(), PeerError::NoCertificate);
}

// ---- chain length

#[tokio::test]
async fn long_chains_are_refused_before_they_cost_anything() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let good = ca.leaf(workload(&[PEER]));
    let padded = |extra: usize| {
        let mut chain = good.chain().to_vec();
        chain.extend(std::iter::repeat_n(ca.signer.der().clone(), extra));
        Presented { certified: Arc::new(rustls::sign::CertifiedKey::new(chain, good.certified.key.clone())) }
    };
    as_client(&ours, &padded(4)).await.unwrap();
    refused_both_ways(&ours, &padded(5), "chain_too_long", "6 certificates").await;
    refused_both_ways(&ours, &padded(100), "chain_too_long", "101 certificates").await;
}

// ---- T1, T2, T5

#[tokio::test]
async fn t1_only_tls13_with_the_agreed_suites_and_groups() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let peer = ca.leaf(workload(&[PEER]));
    let old = shake(ours.server_config(), Arc::new(peer.client_with(aws_lc_rs::default_provider(), &[&rustls::version::TLS12]))).await;
    assert_eq!(explain_io(&old.server.unwrap_err()).reason, "incompatible");
    let alert = explain_io(&old.client.unwrap_err());
    assert_eq!((alert.reason, &*alert.text), ("refused_by_peer", "the peer does not accept our TLS version"));

    let offering = |suites: Vec<rustls::SupportedCipherSuite>, groups: Vec<&'static dyn rustls::crypto::SupportedKxGroup>| {
        let provider = rustls::crypto::CryptoProvider { cipher_suites: suites, kx_groups: groups, ..aws_lc_rs::default_provider() };
        shake(ours.server_config(), Arc::new(peer.client_with(provider, &[&rustls::version::TLS13])))
    };
    let chacha = offering(vec![cipher_suite::TLS13_CHACHA20_POLY1305_SHA256], vec![kx_group::X25519]).await;
    assert!(chacha.server.is_err() && chacha.client.is_err());
    for suite in [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384] {
        let outcome = offering(vec![suite], vec![kx_group::X25519]).await;
        assert_eq!(outcome.server.unwrap().0.suite, suite.suite());
    }
    for group in [kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1, kx_group::X25519MLKEM768] {
        let outcome = offering(vec![cipher_suite::TLS13_AES_128_GCM_SHA256], vec![group]).await;
        assert_eq!(outcome.server.unwrap().0.group, group.name());
    }
    for group in [kx_group::MLKEM768, kx_group::SECP256R1MLKEM768] {
        assert!(offering(vec![cipher_suite::TLS13_AES_128_GCM_SHA256], vec![group]).await.server.is_err());
    }
    // The first key share is refused in favour of one that we accept: a second hello, not a failure.
    let retried = offering(vec![cipher_suite::TLS13_AES_128_GCM_SHA256], vec![kx_group::MLKEM768, kx_group::SECP384R1]).await;
    assert_eq!(retried.server.unwrap().0.kind, rustls::HandshakeKind::FullWithHelloRetryRequest);
}

#[tokio::test]
async fn t1_preferring_aes128_changes_only_the_order_offered() {
    let ca = Authority::root("root");
    let light = ours_with(&ca, &ca, Config { prefer_aes128: true, ..Config::default() }).await;
    let outcome = shake(ours(&ca).await.server_config(), light.client_config()).await;
    assert_eq!(outcome.server.unwrap().0.suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
}

#[tokio::test]
async fn with_the_pqc_policy_both_sides_offer_and_accept_only_x25519mlkem768() {
    let ca = Authority::root("root");
    let peer = ca.leaf(workload(&[PEER]));
    let quantum = ours_with(&ca, &ca, Config { post_quantum_only: true, ..Config::default() }).await;
    let hybrid = rustls::NamedGroup::X25519MLKEM768;
    let both = shake(quantum.server_config(), quantum.client_config()).await;
    let (server, client) = (both.server.unwrap().0, both.client.unwrap().0);
    assert_eq!((server.group, client.group, server.version), (hybrid, hybrid, rustls::ProtocolVersion::TLSv1_3));
    // Peers that know all groups end up with it although they prefer others; they had to be asked for it, or it was all that was offered.
    let knowing = shake(quantum.server_config(), Arc::new(peer.client())).await;
    assert_eq!(knowing.server.unwrap().0.group, hybrid);
    let knowing = shake(Arc::new(peer.server()), quantum.client_config()).await;
    assert_eq!(knowing.client.unwrap().0.group, hybrid);
    // Each other group alone is refused, in both directions; so is TLS 1.2.
    for group in [kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1, kx_group::MLKEM768, kx_group::SECP256R1MLKEM768] {
        let other = || rustls::crypto::CryptoProvider { kx_groups: vec![group], ..aws_lc_rs::default_provider() };
        let accepting = shake(quantum.server_config(), Arc::new(peer.client_with(other(), &[&rustls::version::TLS13]))).await;
        assert_eq!(explain_io(&accepting.server.unwrap_err()).reason, "incompatible", "accepted {group:?}");
        let mut server = ServerConfig::builder_with_provider(Arc::new(other()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(peer.certified.clone())));
        server.alpn_protocols = vec![b"h2".to_vec()];
        let offering = shake(Arc::new(server), quantum.client_config()).await;
        assert_eq!(explain_io(&offering.server.unwrap_err()).reason, "incompatible", "offered {group:?}");
    }
    let old = peer.client_with(aws_lc_rs::default_provider(), &[&rustls::version::TLS12]);
    assert!(shake(quantum.server_config(), Arc::new(old)).await.server.is_err());
}

#[tokio::test]
async fn t2_a_client_without_a_certificate_is_refused_and_told() {
    let ours = ours(&Authority::root("root")).await;
    let client = pki::credulous(aws_lc_rs::default_provider(), &[&rustls::version::TLS13]).with_no_client_auth();
    let outcome = shake(ours.server_config(), Arc::new(client)).await;
    assert_eq!(explain_io(&outcome.server.unwrap_err()).reason, "no_certificate");
    let told = explain_io(&outcome.client.unwrap_err());
    assert_eq!((told.reason, &*told.text), ("refused_by_peer", "the peer refused us: it wants a certificate"));
}

#[tokio::test]
async fn t5_a_session_from_elsewhere_is_not_resumed() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let peer = ca.leaf(workload(&[PEER]));
    // One client configuration that collects tickets from a generous server and offers them to ours.
    let mut generous = peer.server();
    generous.ticketer = aws_lc_rs::Ticketer::new().unwrap();
    let (generous, client) = (Arc::new(generous), Arc::new(peer.client()));
    let (_, tickets) = shake(generous.clone(), client.clone()).await.client.unwrap();
    assert!(tickets > 0);
    let again = shake(generous, client.clone()).await.client.unwrap().0;
    assert_eq!(again.kind, rustls::HandshakeKind::Resumed, "the client does offer sessions");
    shake(Arc::new(peer.server()), client.clone()).await.client.unwrap();
    for _ in 0..2 {
        let outcome = shake(ours.server_config(), client.clone()).await;
        assert_eq!(outcome.server.unwrap().0.kind, rustls::HandshakeKind::Full);
        assert_eq!(outcome.client.unwrap().1, 0);
    }
    // And our client offers none, however generous the server.
    let mut generous = peer.server();
    generous.ticketer = aws_lc_rs::Ticketer::new().unwrap();
    let generous = Arc::new(generous);
    for _ in 0..2 {
        let (met, _) = shake(generous.clone(), ours.client_config()).await.client.unwrap();
        assert_eq!(met.kind, rustls::HandshakeKind::Full);
    }
}

#[tokio::test]
async fn secrets_can_be_taken_out_on_both_sides() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from("x.example").unwrap();
    let (server, client) =
        tokio::join!(TlsAcceptor::from(ours.server_config()).accept(far), TlsConnector::from(ours.client_config()).connect(name, near));
    server.unwrap().into_inner().1.dangerous_extract_secrets().unwrap();
    client.unwrap().into_inner().1.dangerous_extract_secrets().unwrap();
}

#[tokio::test]
async fn a_peer_that_does_not_speak_tls_or_h2_is_explained() {
    let ca = Authority::root("root");
    let ours = ours(&ca).await;
    let (mut near, far) = tokio::io::duplex(1024);
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let error = TlsAcceptor::from(ours.server_config()).accept(far).await.err().unwrap();
    assert_eq!(explain_io(&error).reason, "not_tls");
    let (near, far) = tokio::io::duplex(1024);
    drop(near);
    let error = TlsAcceptor::from(ours.server_config()).accept(far).await.err().unwrap();
    assert_eq!(explain_io(&error).reason, "closed");
    let mut client = ca.leaf(workload(&[PEER])).client();
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    let outcome = shake(ours.server_config(), Arc::new(client)).await;
    assert_eq!(explain_io(&outcome.server.unwrap_err()).text, "the peer does not speak h2 (ALPN)");
}

#[tokio::test]
async fn every_root_of_a_bundle_is_trusted() {
    let (old, new, stranger) = (Authority::root("old"), Authority::root("new"), Authority::root("stranger"));
    let dir = tempfile::tempdir().unwrap();
    new.write(dir.path(), &new);
    std::fs::write(dir.path().join("root-cert.pem"), old.signer.pem() + &new.signer.pem()).unwrap();
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let (credentials, renewal) = Credentials::new(Config::default(), Arc::new(issuer), Clock::system());
    let renewal = tokio::spawn(renewal);
    let ours = credentials.fetch(&id(OURS)).await.unwrap();
    assert_eq!(ours.roots.len(), 2);
    for ca in [&old, &new] {
        as_client(&ours, &ca.leaf(workload(&[PEER]))).await.unwrap();
        as_server(&ours, &ca.leaf(workload(&[PEER]))).await.unwrap();
    }
    refused_both_ways(&ours, &stranger.leaf(workload(&[PEER])), "unknown_issuer", "unknown issuer").await;
    drop(credentials);
    renewal.await.unwrap();
}

#[test]
fn unreadable_certificates_are_refused() {
    for bytes in [&b""[..], b"hello", &[0x30, 0x80], &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]] {
        assert!(matches!(peer_identity(&[CertificateDer::from(bytes.to_vec())]), Err(PeerError::Malformed(_))));
    }
    let leaf = Authority::root("root").leaf(workload(&[PEER]));
    let mut longer = leaf.chain()[0].to_vec();
    longer.push(0);
    assert!(matches!(peer_identity(&[CertificateDer::from(longer)]), Err(PeerError::Malformed(_))));
}

// ---- S: the grammar

/// The grammar once more, by the slowest means.
fn oracle(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let parts: Vec<&str> = rest.split('/').collect();
    let segment = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && part.chars().all(|c| c.is_ascii_alphanumeric() || ['.', '-', '_'].contains(&c))
    };
    text.len() <= 2048
        && parts.len() == 5
        && (parts[1], parts[3]) == ("ns", "sa")
        && segment(parts[2])
        && segment(parts[4])
        && !parts[0].is_empty()
        && parts[0].chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ['.', '-', '_'].contains(&c))
}

proptest! {
    #[test]
    fn s_every_identity_reads_back_as_itself(domain in "[a-z0-9._-]{1,40}", namespace in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,40}", account in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,40}") {
        let made = SpiffeId::new(&domain, &namespace, &account).unwrap();
        let read: SpiffeId = made.to_string().parse().unwrap();
        prop_assert_eq!(&made, &read);
        prop_assert_eq!((&**read.trust_domain(), &**read.namespace(), &**read.service_account()), (&*domain, &*namespace, &*account));
    }

    #[test]
    fn s_a_name_is_accepted_exactly_when_the_grammar_says_so(
        text in "spiffe://[a-zA-Z0-9.:@%-]{0,6}/(ns|NS|n|)/[a-z.%\\x00 ]{0,4}/(sa|SA|)/[a-zA-Z0-9._~é-]{0,4}(/|/x|\\?x|#|)|\\PC{0,60}"
    ) {
        prop_assert_eq!(text.parse::<SpiffeId>().is_ok(), oracle(&text), "{:?}", text);
        if let Ok(read) = text.parse::<SpiffeId>() {
            prop_assert_eq!(read.to_string(), text, "only the canonical form is accepted");
        }
    }

    /// What one flipped byte does to a certificate: never a panic, and never another name with the same signature check passed (webpki runs first).
    #[test]
    fn a_damaged_certificate_never_panics(at in 0_usize..600, bit in 0_u8..8) {
        static LEAF: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let leaf = LEAF.get_or_init(|| Authority::root("root").leaf(workload(&[PEER])).chain()[0].to_vec());
        let mut damaged = leaf.clone();
        let at = at % damaged.len();
        damaged[at] ^= 1 << bit;
        let _ = peer_identity(&[CertificateDer::from(damaged)]);
    }
}

/// Names in errors are bounded, whatever a service lists.
#[test]
fn a_mismatch_with_a_thousand_expected_identities_is_one_readable_line() {
    let many: Vec<SpiffeId> = (0..1000).map(|n| id(&format!("spiffe://cluster.local/ns/default/sa/a{n}"))).collect();
    let leaf = Authority::root("root").leaf(workload(&[PEER]));
    let text = expect_peer(leaf.chain(), &many).unwrap_err().to_string();
    assert!(text.len() < 500 && text.ends_with("and 995 more"), "{text}");
}
