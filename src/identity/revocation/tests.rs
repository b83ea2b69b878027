#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber,
};
use rustls::crypto::aws_lc_rs;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn list(&self, serials: &[Vec<u8>]) -> rcgen::CertificateRevocationList {
        let now = SystemTime::now();
        let entry = |serial: &Vec<u8>| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: (now - DAY).into(),
            next_update: (now + DAY).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap()
    }

    fn leaf(&self, serial: &[u8]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(serial));
        params.signed_by(&KeyPair::generate().unwrap(), &self.0).unwrap().der().clone()
    }

    fn trust(&self) -> Trust {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        Trust { roots: Arc::new(roots), algorithms, reporter: Reporter::Destination }
    }
}

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

/// What the library itself says, asked about every certificate with the whole list.
fn oracle(list: &rcgen::CertificateRevocationList, leaf: &CertificateDer<'_>, trust: &Trust) -> bool {
    let list = webpki::OwnedCertRevocationList::from_der(list.der()).unwrap().into();
    let lists = [&list];
    let options = webpki::RevocationOptionsBuilder::new(&lists).unwrap().with_status_policy(webpki::UnknownStatusPolicy::Allow).build();
    let certificate = webpki::EndEntityCert::try_from(leaf).unwrap();
    let usage = webpki::KeyUsage::client_auth();
    let verified = certificate.verify_for_usage(trust.algorithms.all, &trust.roots.roots, &[], now(), usage, Some(options), None);
    match verified.map(drop) {
        Ok(()) => false,
        Err(webpki::Error::CertRevoked) => true,
        Err(other) => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The look-up before the verification never loses a revoked certificate, whatever its number looks like.
    #[test]
    fn the_quick_look_finds_what_the_whole_verification_finds(
        serials in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 1..6),
        listed in prop::collection::vec(any::<bool>(), 6),
        similar in any::<bool>(),
    ) {
        let ca = Ca::new();
        let mut revoked: Vec<Vec<u8>> = serials.iter().zip(&listed).filter(|(_, listed)| **listed).map(|(serial, _)| serial.clone()).collect();
        if similar {
            // A number that differs in a leading zero or its last byte only.
            revoked.push([&[1_u8], serials[0].as_slice()].concat());
        }
        let list = ca.list(&revoked);
        let (lists, trust) = (Lists::parse(list.der()).unwrap(), ca.trust());
        for serial in &serials {
            let leaf = ca.leaf(serial);
            prop_assert_eq!(lists.revoke((&leaf, &[]), &trust, now()), oracle(&list, &leaf, &trust), "{:?} of {:?}", serial, revoked);
        }
    }

    /// Whatever a file holds, it is an error or lists; nothing panics.
    #[test]
    fn no_content_of_a_file_makes_the_parser_panic(content in prop::collection::vec(any::<u8>(), 0..400), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let _ = Lists::parse(&content);
        // A good list with one byte changed.
        let mut der = ca_list().clone();
        let at = at.index(der.len());
        der[at] = byte;
        let _ = Lists::parse(&der);
        let _ = Lists::parse(&der[..at]);
    }
}

fn ca_list() -> &'static Vec<u8> {
    static LIST: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    LIST.get_or_init(|| Ca::new().list(&[vec![1, 2, 3], vec![0x80; 16]]).der().to_vec())
}

#[test]
fn a_file_is_text_or_one_list_in_der_or_empty() {
    let ca = Ca::new();
    let (one, two) = (ca.list(&[vec![1]]), ca.list(&[vec![2], vec![3]]));
    let sizes = |content: &[u8]| Lists::parse(content).map(|lists| (lists.len(), lists.revoked()));
    assert_eq!(sizes(b""), Ok((0, 0)));
    assert_eq!(sizes(b" \n"), Ok((0, 0)));
    assert_eq!(sizes(one.der()), Ok((1, 1)));
    let both = format!("# comment\n{}{}", one.pem().unwrap(), two.pem().unwrap());
    assert_eq!(sizes(both.as_bytes()), Ok((2, 3)));
    assert!(sizes(b"hello").unwrap_err().contains("no PEM section"));
    assert!(sizes(ca.0.pem().as_bytes()).unwrap_err().contains("no PEM section"), "a certificate is not a list");
    assert!(sizes(&one.der()[..40]).unwrap_err().contains("list 1 of 1"));
    let broken = both.replacen("MII", "AAA", 2);
    assert!(sizes(broken.as_bytes()).is_err() || broken == both);
}

#[test]
fn what_cannot_be_read_as_a_certificate_is_taken_for_revoked() {
    let ca = Ca::new();
    let lists = Lists::parse(ca.list(&[vec![1]]).der()).unwrap();
    assert!(lists.revoke((&CertificateDer::from(vec![1, 2, 3]), &[]), &ca.trust(), now()));
}

/// The name of the second CA is the end of the first one's.
#[test]
fn a_list_says_nothing_about_an_issuer_whose_name_ends_like_its_own() {
    let named = |parts: &[(rcgen::DnType, &str)]| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = rcgen::DistinguishedName::new();
        parts.iter().for_each(|(kind, text)| params.distinguished_name.push(kind.clone(), *text));
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    };
    let (organisation, name) = ((rcgen::DnType::OrganizationName, "a"), (rcgen::DnType::CommonName, "b"));
    let (long, short) = (named(&[organisation, name.clone()]), named(&[name]));
    let subject = |ca: &Ca| x509_parser::parse_x509_certificate(ca.0.der()).unwrap().1.subject().as_raw().to_vec();
    assert!(subject(&long).ends_with(&subject(&short)[2..]), "this test shows nothing");
    let lists = Lists::parse(short.list(&[vec![7]]).der()).unwrap();
    assert!(!lists.revoke((&long.leaf(&[7]), &[]), &long.trust(), now()));
    assert!(lists.revoke((&short.leaf(&[7]), &[]), &short.trust(), now()));
}

/// Between the handshake's look and the watch's there is a moment in which the lists may change.
#[tokio::test(start_paused = true)]
async fn a_list_that_came_during_the_handshake_ends_the_tunnel_at_once() {
    let ca = Ca::new();
    let file = Following::start(Some(&ca.list(&[vec![1]]).pem().unwrap()));
    let ended = async |serial: u8| {
        let revoked = file.revocations.watch(vec![ca.leaf(&[serial])], ca.trust(), now()).unwrap();
        tokio::time::timeout(Duration::from_millis(1), revoked).await.is_ok()
    };
    assert!(ended(1).await && !ended(2).await);
}

#[tokio::test(start_paused = true)]
async fn a_file_of_more_than_64_mib_is_not_read() {
    let file = Following::start(Some(&text(2)));
    // A list, and what takes no room on disk.
    fs::write(&file.path, text(3)).unwrap();
    fs::OpenOptions::new().write(true).open(&file.path).unwrap().set_len((64 << 20) + 1).unwrap();
    file.look().await;
    assert_eq!((file.revoked(), file.loads("unusable"), file.loads("loaded")), (2, 1, 1));
}

/// A file, its lists, and the task that follows it, on a clock that does not take time.
struct Following {
    path: PathBuf,
    revocations: Revocations,
    task: tokio::task::JoinHandle<()>,
    _directory: tempfile::TempDir,
}

impl Following {
    fn start(content: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca-crl.pem");
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let (revocations, task) = Revocations::open(path.clone());
        Self { path, revocations, task: tokio::spawn(task), _directory: directory }
    }

    fn revoked(&self) -> usize {
        self.revocations.0.lists.borrow().revoked()
    }

    fn loads(&self, outcome: &'static str) -> u64 {
        self.revocations.0.loads.get_or_create(&OutcomeLabel { outcome }).get()
    }

    /// Long enough for a change to be seen: a second.
    async fn look(&self) {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn text(revoked: usize) -> String {
    let serials: Vec<Vec<u8>> = (1..=u8::try_from(revoked).unwrap()).map(|serial| vec![serial]).collect();
    Ca::new().list(&serials).pem().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_file_that_comes_changes_and_is_emptied_is_followed_within_a_second() {
    let file = Following::start(None);
    assert_eq!((file.revoked(), file.loads("missing")), (0, 1));
    fs::write(&file.path, text(2)).unwrap();
    file.look().await;
    assert_eq!(file.revoked(), 2);
    fs::write(&file.path, text(3)).unwrap();
    file.look().await;
    assert_eq!(file.revoked(), 3);
    // A ConfigMap is swapped by a rename.
    let next = file.path.with_extension("next");
    fs::write(&next, text(4)).unwrap();
    fs::rename(&next, &file.path).unwrap();
    file.look().await;
    assert_eq!(file.revoked(), 4);
    fs::write(&file.path, "").unwrap();
    file.look().await;
    assert_eq!((file.revoked(), file.loads("loaded")), (0, 4));
    // Nothing is read while nothing changes.
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(file.loads("loaded"), 4);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_used_changes_nothing_and_is_counted() {
    let file = Following::start(Some(&text(2)));
    assert_eq!(file.revoked(), 2);
    fs::write(&file.path, "hello").unwrap();
    file.look().await;
    assert_eq!((file.revoked(), file.loads("unusable")), (2, 1));
    fs::remove_file(&file.path).unwrap();
    file.look().await;
    assert_eq!((file.revoked(), file.loads("missing")), (2, 1), "a file that vanishes revokes what it did");
    fs::create_dir(&file.path).unwrap();
    file.look().await;
    assert_eq!((file.revoked(), file.loads("unusable")), (2, 2));
    fs::remove_dir(&file.path).unwrap();
    fs::write(&file.path, text(5)).unwrap();
    file.look().await;
    assert_eq!(file.revoked(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_file_in_the_middle_of_being_written_is_not_read_but_not_waited_for_without_end() {
    let file = Following::start(Some(&text(2)));
    // Changed at every look: never still.
    for length in 0..6 {
        fs::write(&file.path, "x".repeat(length)).unwrap();
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert_eq!((file.revoked(), file.loads("unusable"), file.loads("loaded")), (2, 0, 1));
    for length in 6..20 {
        fs::write(&file.path, "x".repeat(length)).unwrap();
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert!(file.loads("unusable") >= 1);
}

#[derive(Debug)]
struct Page(Revocations);

impl prometheus_client::collector::Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.encode(&mut encoder)
    }
}

#[test]
fn every_family_has_samples_from_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let (revocations, _reading) = Revocations::open(directory.path().join("none"));
    let mut registry = prometheus_client::registry::Registry::default();
    registry.register_collector(Box::new(Page(revocations)));
    let mut page = String::new();
    prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
    for sample in [
        "istio_crl_policy_rejections_total{reporter=\"source\"} 0",
        "istio_crl_policy_rejections_total{reporter=\"destination\"} 0",
        "istio_crl_untracked_connections_total{reporter=\"source\"} 0",
        "istio_crl_untracked_connections_total{reporter=\"destination\"} 0",
        "culvert_crl_loads_total{outcome=\"missing\"} 1",
    ] {
        assert!(page.lines().any(|line| line == sample), "{sample} is not in\n{page}");
    }
}

/// The figures of a release build are in the module's documentation.
#[test]
fn a_long_list_costs_a_handshake_no_more_than_a_short_one() {
    let ca = Ca::new();
    let serial = |number: u32| [&[1; 12][..], &number.to_be_bytes()].concat();
    let (free, trust) = (ca.leaf(&serial(1 << 20)), ca.trust());
    let [short, long] = [10, 10_000].map(|entries| {
        let encoded = ca.list(&(0..entries).map(serial).collect::<Vec<_>>());
        let begun = Instant::now();
        let lists = Lists::parse(encoded.der()).unwrap();
        println!("{entries} entries: read in {:?}", begun.elapsed());
        assert!(lists.revoke((&ca.leaf(&serial(7)), &[]), &trust, now()) && lists.revoked() == entries as usize);
        // The best of several turns: other work of the machine does not count.
        let turn = |_| {
            let begun = Instant::now();
            (0..200).for_each(|_| assert!(!lists.revoke((&free, &[]), &trust, now())));
            begun.elapsed() / 200
        };
        let best = (0..10).map(turn).min().unwrap();
        println!("{entries} entries: {best:?} a chain");
        best
    });
    assert!(long < short * 3 + Duration::from_micros(5), "{long:?} with 10,000 entries, {short:?} with 10");
}
