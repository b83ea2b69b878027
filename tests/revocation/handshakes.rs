//! New handshakes.

use std::io;
use std::time::{Duration, SystemTime};

use culvert::identity::explain_io;
use rcgen::{CrlDistributionPoint, CrlIssuingDistributionPoint, CrlScope};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::crl::{list, list_with, serial};
use super::pki::{Presented, workload};
use super::*;

const PEER: &str = "spiffe://cluster.local/ns/default/sa/peer";

/// How it went for each side. The client knows only when it has read something that it was not refused.
async fn shake(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> (io::Result<()>, io::Result<()>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let accept = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_all(b"k").await?;
        stream.flush().await?;
        let _ = stream.read(&mut [0]).await;
        Ok(())
    };
    let dial = async {
        let mut stream = TlsConnector::from(client).connect(ServerName::try_from("named.example").unwrap(), near).await?;
        stream.read_u8().await.map(drop)
    };
    tokio::join!(accept, dial)
}

/// Why our server refuses a client, and our client a server, that present this. `None`: it is served.
async fn verdicts(ours: &Ours, peer: &Presented) -> [Option<String>; 2] {
    let credential = ours.credential("ours").await;
    let reason = |outcome: io::Result<()>| outcome.err().map(|error| explain_io(&error).reason.to_owned());
    let (inbound, told) = shake(credential.server_config(), Arc::new(peer.client())).await;
    if inbound.is_err() {
        assert_eq!(explain_io(&told.unwrap_err()).text, "the peer refused our certificate: revoked");
    }
    let (_, outbound) = shake(Arc::new(peer.server()), credential.client_config()).await;
    [reason(inbound), reason(outbound)]
}

fn refused() -> [Option<String>; 2] {
    [Some("revoked".into()), Some("revoked".into())]
}

const SERVED: [Option<String>; 2] = [None, None];

fn peer_of(ca: &Authority) -> Presented {
    ca.leaf(workload(&[PEER]))
}

#[tokio::test]
async fn a_revoked_leaf_is_refused_in_both_directions_and_told_so() {
    let root = Authority::root("root");
    let (bad, good) = (peer_of(&root), peer_of(&root));
    let ours = Ours::new(&root, &root, list(&root.signer, &[&bad.chain()[0]]).as_bytes());
    assert_eq!(verdicts(&ours, &good).await, SERVED);
    assert_eq!((ours.counted("source"), ours.counted("destination")), (0, 0));
    assert_eq!(verdicts(&ours, &bad).await, refused());
    assert_eq!((ours.counted("source"), ours.counted("destination")), (1, 1));
}

#[tokio::test]
async fn a_revoked_intermediate_is_refused_with_all_that_it_signed() {
    let root = Authority::root("root");
    let (bad, good) = (root.intermediate("bad"), root.intermediate("good"));
    let ours = Ours::new(&good, &root, list(&root.signer, &[bad.signer.der()]).as_bytes());
    assert_eq!(verdicts(&ours, &peer_of(&bad)).await, refused());
    assert_eq!(verdicts(&ours, &peer_of(&bad.intermediate("below"))).await, refused());
    assert_eq!(verdicts(&ours, &peer_of(&good)).await, SERVED);
}

#[tokio::test]
async fn a_leaf_below_an_intermediate_is_revoked_by_that_one() {
    let root = Authority::root("root");
    let ca = root.intermediate("ca");
    let (bad, good) = (peer_of(&ca), peer_of(&ca));
    let ours = Ours::new(&ca, &root, list(&ca.signer, &[&bad.chain()[0]]).as_bytes());
    assert_eq!(verdicts(&ours, &bad).await, refused());
    assert_eq!(verdicts(&ours, &good).await, SERVED);
}

#[tokio::test]
async fn a_list_past_its_next_update_still_counts() {
    let root = Authority::root("root");
    let (bad, good) = (peer_of(&root), peer_of(&root));
    let old = list_with(&root.signer, &[serial(&bad.chain()[0])], |params| params.next_update = (SystemTime::now() - Duration::from_secs(60)).into());
    let ours = Ours::new(&root, &root, old.pem().unwrap().as_bytes());
    assert_eq!(verdicts(&ours, &bad).await, refused());
    assert_eq!(verdicts(&ours, &good).await, SERVED);
}

#[tokio::test]
async fn a_list_of_another_issuer_says_nothing_even_about_the_same_number() {
    let (root, other) = (Authority::root("root"), Authority::root("other"));
    let peer = peer_of(&root);
    let ours = Ours::new(&root, &root, list(&other.signer, &[&peer.chain()[0]]).as_bytes());
    assert_eq!(verdicts(&ours, &peer).await, SERVED);
}

#[tokio::test]
async fn a_list_under_a_false_signature_refuses_what_it_names_and_nothing_else() {
    // The same name, another key.
    let (root, forger) = (Authority::root("root"), Authority::root("root"));
    let (named, other) = (peer_of(&root), peer_of(&root));
    let ours = Ours::new(&root, &root, list(&forger.signer, &[&named.chain()[0]]).as_bytes());
    assert_eq!(verdicts(&ours, &named).await, refused());
    assert_eq!(verdicts(&ours, &other).await, SERVED);
}

#[tokio::test]
async fn a_certificate_of_two_distribution_points_is_on_the_list_of_either_and_of_no_other() {
    let root = Authority::root("root");
    let point = |uri: &str| CrlDistributionPoint { uris: vec![uri.to_owned()] };
    let mut params = workload(&[PEER]);
    params.crl_distribution_points = vec![point("http://crl.example/a"), point("http://crl.example/b")];
    let peer = root.leaf(params);
    for (uri, expected) in [("http://crl.example/a", refused()), ("http://crl.example/b", refused()), ("http://crl.example/c", SERVED)] {
        let of = CrlIssuingDistributionPoint { distribution_point: point(uri), scope: None };
        let list = list_with(&root.signer, &[serial(&peer.chain()[0])], |params| params.issuing_distribution_point = Some(of));
        let ours = Ours::new(&root, &root, list.pem().unwrap().as_bytes());
        assert_eq!(verdicts(&ours, &peer).await, expected, "{uri}");
    }
}

#[tokio::test]
async fn a_list_of_cas_says_nothing_about_leaves() {
    let root = Authority::root("root");
    let mut params = workload(&[PEER]);
    params.crl_distribution_points = vec![CrlDistributionPoint { uris: vec!["http://crl.example/a".to_owned()] }];
    let peer = root.leaf(params);
    let of = |scope| CrlIssuingDistributionPoint {
        distribution_point: CrlDistributionPoint { uris: vec!["http://crl.example/a".to_owned()] },
        scope: Some(scope),
    };
    for (scope, expected) in [(CrlScope::CaCertsOnly, SERVED), (CrlScope::UserCertsOnly, refused())] {
        let list = list_with(&root.signer, &[serial(&peer.chain()[0])], |params| params.issuing_distribution_point = Some(of(scope)));
        let ours = Ours::new(&root, &root, list.pem().unwrap().as_bytes());
        assert_eq!(verdicts(&ours, &peer).await, expected);
    }
}

#[tokio::test]
async fn all_lists_of_a_file_count_also_two_of_one_issuer() {
    let (root, other) = (Authority::root("root"), Authority::root("other"));
    let (first, second, third) = (peer_of(&root), peer_of(&root), peer_of(&root));
    let text = [list(&other.signer, &[]), list(&root.signer, &[&first.chain()[0]]), list(&root.signer, &[&second.chain()[0]])].join("\n");
    let ours = Ours::new(&root, &root, text.as_bytes());
    assert_eq!(verdicts(&ours, &first).await, refused());
    assert_eq!(verdicts(&ours, &second).await, refused());
    assert_eq!(verdicts(&ours, &third).await, SERVED);
}

#[tokio::test]
async fn a_list_may_be_der() {
    let root = Authority::root("root");
    let peer = peer_of(&root);
    let list = list_with(&root.signer, &[serial(&peer.chain()[0])], |_| {});
    let ours = Ours::new(&root, &root, list.der());
    assert_eq!(verdicts(&ours, &peer).await, refused());
}

#[tokio::test]
async fn nothing_usable_at_start_revokes_nothing_until_it_is_corrected() {
    let root = Authority::root("root");
    let peer = peer_of(&root);
    let ours = Ours::new(&root, &root, b"hello");
    assert_eq!(verdicts(&ours, &peer).await, SERVED);
    assert!(ours.metrics().contains("culvert_crl_loads_total{outcome=\"unusable\"} 1"), "{}", ours.metrics());
    std::fs::write(&ours.file, list(&root.signer, &[&peer.chain()[0]])).unwrap();
    tunnel_peers::eventually("the list is in force", || ours.metrics().contains("culvert_crl_loads_total{outcome=\"loaded\"} 1")).await;
    assert_eq!(verdicts(&ours, &peer).await, refused());
}

#[tokio::test]
async fn our_own_certificate_is_not_looked_up() {
    // A node whose own CA is revoked still has certificates; its peers refuse it.
    let root = Authority::root("root");
    let ca = root.intermediate("ca");
    let ours = Ours::new(&ca, &root, list(&root.signer, &[ca.signer.der()]).as_bytes());
    ours.credential("ours").await;
    assert_eq!((ours.counted("source"), ours.counted("destination")), (0, 0));
}
