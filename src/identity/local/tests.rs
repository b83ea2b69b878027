#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rcgen::{CertifiedIssuer, DnType, PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_RSA_SHA256, RsaKeySize};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::super::certificate::from_pem;
use super::super::local_files::{CA_KEY, ROOT_CERT};
use super::*;
use crate::identity::verify::peer_identity;
use crate::lifecycle::SettableTime;

const DAY: Duration = Duration::from_secs(86_400);

fn me() -> SpiffeId {
    SpiffeId::new("cluster.local", "default", "client").unwrap()
}

fn fresh() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    LocalIssuer::create(dir.path(), &Clock::system()).unwrap();
    dir
}

fn request(ttl: Duration) -> SigningRequest {
    let shape = Shape::new(&super::super::Config::default(), Clock::system());
    PendingKey::generate(&me(), ttl, shape.provider.key_provider).unwrap().request
}

/// The error of loading, which must name `file`.
fn refusal(dir: &Path, file: &str) -> String {
    match LocalIssuer::load(dir, Clock::system()) {
        Err(IdentityError::LocalCa { path, problem, remedy }) => {
            assert_eq!(path, dir.join(file), "{problem}");
            assert!(!remedy.is_empty());
            problem
        }
        other => panic!("{other:?}"),
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn root_of(key: KeyPair) -> CertifiedIssuer<'static, KeyPair> {
    CertifiedIssuer::self_signed(ca_params("root"), key).unwrap()
}

/// Loads a CA that is its own root, with its key in this text.
fn load_with_key(ca: &CertifiedIssuer<'static, KeyPair>, key: &str) -> Result<LocalIssuer, IdentityError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CA_CERT), ca.pem()).unwrap();
    fs::write(dir.path().join(CA_KEY), key).unwrap();
    LocalIssuer::load(dir.path(), Clock::system())
}

#[test]
fn a_created_directory_loads_and_its_key_is_private() {
    let dir = fresh();
    let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(CA_KEY), 0o600);
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    assert_eq!(issuer.sign(&request(DAY)).unwrap().certificates.len(), 3);
    let again = LocalIssuer::create(dir.path(), &Clock::system()).unwrap_err().to_string();
    assert!(again.contains("root-cert.pem") && again.contains("exists"), "{again}");
}

#[test]
fn a_leaf_has_exactly_the_shape_of_a_workload_certificate() {
    let dir = fresh();
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let issued = issuer.sign(&request(DAY)).unwrap();
    let der = from_pem(issued.certificates[0].as_bytes()).unwrap();
    assert_eq!(peer_identity(&der).unwrap(), me());
    let (_, leaf) = X509Certificate::from_der(&der[0]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0, "the subject is empty");
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "critical because the subject is empty");
    assert_eq!(names.value.general_names, [GeneralName::URI(&me().to_string())]);
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.server_auth && purposes.client_auth && !purposes.any && purposes.other.is_empty());
    assert_eq!(leaf.key_usage().unwrap().unwrap().value.flags, 1, "digitalSignature only");
    let constraints = leaf.basic_constraints().unwrap().unwrap();
    assert!(!constraints.value.ca);
    assert!(!leaf.serial.to_string().starts_with('-'));
    let Validity { not_before, not_after } = Validity::of(&der[0]).unwrap();
    let now = SystemTime::now();
    assert!(not_before < now - Duration::from_secs(60) && now < not_before + Duration::from_secs(180));
    assert!(not_after > now + DAY - Duration::from_secs(60) && not_after <= now + DAY);
}

#[test]
fn every_leaf_has_its_own_serial_number() {
    let dir = fresh();
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let (one, other) = (issuer.sign(&request(DAY)).unwrap(), issuer.sign(&request(DAY)).unwrap());
    assert_ne!(one.certificates[0], other.certificates[0]);
    assert_ne!(fresh_serial(), fresh_serial());
}

#[test]
fn a_short_certificate_is_hardly_backdated_so_that_half_its_life_is_ahead() {
    let dir = fresh();
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let der = from_pem(issuer.sign(&request(Duration::from_secs(60))).unwrap().certificates[0].as_bytes()).unwrap();
    assert!(SystemTime::now().duration_since(Validity::of(&der[0]).unwrap().not_before).unwrap() <= Duration::from_secs(8));
}

#[test]
fn no_leaf_outlives_the_ca_and_an_expired_ca_signs_nothing() {
    let dir = fresh();
    let start = SystemTime::now();
    let wall = SettableTime::new(start);
    let issuer = LocalIssuer::load(dir.path(), Clock::fixed(wall.clone())).unwrap();
    wall.set(issuer.validity.not_after - Duration::from_secs(3600));
    let der = from_pem(issuer.sign(&request(DAY)).unwrap().certificates[0].as_bytes()).unwrap();
    assert_eq!(Validity::of(&der[0]).unwrap().not_after, issuer.validity.not_after);
    assert_ne!(issuer.complained.load(Ordering::Relaxed), 0, "a warning was due");
    wall.set(issuer.validity.not_after);
    let refused = issuer.sign(&request(DAY)).unwrap_err().to_string();
    assert!(refused.contains("ca-cert.pem") && refused.contains("renew"), "{refused}");
}

#[test]
fn requests_that_ask_for_more_than_the_identity_are_refused() {
    let dir = fresh();
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let signed = |params: &CertificateParams, key: &KeyPair| {
        let csr_pem = params.serialize_request(key).unwrap().pem().unwrap();
        issuer.sign(&SigningRequest { identity: me(), csr_pem, ttl: DAY })
    };
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        vec![SanType::URI(me().to_string().try_into().unwrap()), SanType::URI("spiffe://cluster.local/ns/x/sa/y".try_into().unwrap())];
    assert!(signed(&params, &KeyPair::generate().unwrap()).unwrap_err().to_string().contains("somebody else"));
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    assert!(signed(&CertificateParams::default(), &p384).unwrap_err().to_string().contains("P-256"));
    let garbage = SigningRequest { identity: me(), csr_pem: "hello".to_owned(), ttl: DAY };
    assert!(issuer.sign(&garbage).unwrap_err().to_string().contains("not valid"));
    // CA:TRUE in the request is not an error, but has no effect.
    let issued = signed(&ca_params("evil"), &KeyPair::generate().unwrap()).unwrap();
    peer_identity(&from_pem(issued.certificates[0].as_bytes()).unwrap()).unwrap();
}

#[test]
fn a_request_with_a_false_signature_is_refused() {
    let dir = fresh();
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let params = CertificateParams::default();
    let csr = params.serialize_request(&KeyPair::generate().unwrap()).unwrap();
    let mut der = csr.der().to_vec();
    let last = der.len() - 1;
    der[last] ^= 1;
    let csr_pem = to_pem(&der).replace("CERTIFICATE", "CERTIFICATE REQUEST");
    assert!(issuer.sign(&SigningRequest { identity: me(), csr_pem, ttl: DAY }).is_err());
}

#[test]
fn each_missing_file_is_named() {
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path(), CA_CERT).contains("missing"));
    for (file, problem) in [(CA_CERT, "missing"), (CA_KEY, "missing"), (ROOT_CERT, "does not end with a root")] {
        let dir = fresh();
        fs::remove_file(dir.path().join(file)).unwrap();
        assert!(refusal(dir.path(), file).contains(problem));
    }
}

#[test]
fn the_chain_file_may_be_absent_when_the_root_signed_the_ca() {
    let dir = fresh();
    fs::remove_file(dir.path().join(CERT_CHAIN)).unwrap();
    assert_eq!(LocalIssuer::load(dir.path(), Clock::system()).unwrap().intermediates.len(), 1);
}

#[test]
fn the_root_file_may_be_absent_when_the_chain_ends_with_a_root() {
    let dir = fresh();
    let root = fs::read_to_string(dir.path().join(ROOT_CERT)).unwrap();
    let chain = fs::read_to_string(dir.path().join(CERT_CHAIN)).unwrap();
    fs::write(dir.path().join(CERT_CHAIN), chain + &root).unwrap();
    fs::remove_file(dir.path().join(ROOT_CERT)).unwrap();
    assert_eq!(LocalIssuer::load(dir.path(), Clock::system()).unwrap().intermediates.len(), 1);
}

#[test]
fn files_that_cannot_be_read_or_are_not_pem_are_named() {
    for file in [CA_CERT, CA_KEY, ROOT_CERT, CERT_CHAIN] {
        let dir = fresh();
        fs::write(dir.path().join(file), "hello").unwrap();
        assert!(refusal(dir.path(), file).contains("PEM"));
        fs::remove_file(dir.path().join(file)).unwrap();
        fs::create_dir(dir.path().join(file)).unwrap();
        assert!(refusal(dir.path(), file).contains("cannot be read"));
    }
}

#[test]
fn a_key_of_another_ca_is_refused() {
    let (dir, other) = (fresh(), fresh());
    fs::copy(other.path().join(CA_KEY), dir.path().join(CA_KEY)).unwrap();
    assert!(refusal(dir.path(), CA_KEY).contains("does not match"));
    fs::write(dir.path().join(CA_KEY), "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n").unwrap();
    assert!(refusal(dir.path(), CA_KEY).contains("encrypted"));
}

#[test]
fn a_chain_that_does_not_lead_to_the_root_is_refused() {
    let (dir, other) = (fresh(), fresh());
    fs::copy(other.path().join(ROOT_CERT), dir.path().join(ROOT_CERT)).unwrap();
    assert!(refusal(dir.path(), CA_CERT).contains("does not lead to a root"));
}

#[test]
fn dates_and_purpose_of_the_ca_are_checked() {
    let dir = fresh();
    let end = LocalIssuer::load(dir.path(), Clock::system()).unwrap().validity.not_after;
    for (wall, words) in [(end, "expired at 20"), (SystemTime::now() - DAY, "not valid before 20")] {
        let error = LocalIssuer::load(dir.path(), Clock::fixed(SettableTime::new(wall))).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("ca-cert.pem") && error.contains("clock"), "{error}");
    }
    let key = KeyPair::generate().unwrap();
    let write = |params: CertificateParams| {
        fs::write(dir.path().join(CA_CERT), params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(dir.path().join(CA_KEY), key.serialize_pem()).unwrap();
        refusal(dir.path(), CA_CERT)
    };
    assert!(write(CertificateParams::default()).contains("not the certificate of a CA"));
    let mut params = ca_params("root");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    assert!(write(params).contains("key usage"));
}

#[test]
fn ecdsa_keys_of_every_curve_sign() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ECDSA_P521_SHA512] {
        let ca = root_of(KeyPair::generate_for(algorithm).unwrap());
        load_with_key(&ca, &ca.key().serialize_pem()).unwrap();
    }
}

/// The PKCS#1 key inside PKCS#8 (the first OCTET STRING, long form, that begins with a SEQUENCE).
fn inner(pkcs8: &[u8]) -> &[u8] {
    let at = pkcs8.windows(6).position(|bytes| bytes[..2] == [4, 0x82] && bytes[4..] == [0x30, 0x82]).unwrap();
    &pkcs8[at + 4..]
}

fn pem_of(kind: &str, der: &[u8]) -> String {
    to_pem(der).replace("CERTIFICATE", kind)
}

#[test]
fn rsa_keys_sign_in_pkcs8_and_pkcs1() {
    let ca = root_of(KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap());
    let issuer = load_with_key(&ca, &ca.key().serialize_pem()).unwrap();
    assert_eq!(issuer.sign(&request(DAY)).unwrap().certificates.len(), 2, "a root signs itself: nothing lies between");
    let pkcs8 = ca.key().serialize_der();
    load_with_key(&ca, &pem_of("RSA PRIVATE KEY", inner(&pkcs8))).unwrap();
}

#[test]
fn ecdsa_keys_sign_in_sec1() {
    let ca = root_of(KeyPair::generate().unwrap());
    let pkcs8 = ca.key().serialize_der();
    let at = pkcs8.windows(2).position(|pair| pair == [4, 32]).unwrap();
    // ECPrivateKey (RFC 5915) as `openssl ecparam -genkey` writes it: version, secret, curve, public key.
    let mut body = vec![2, 1, 1];
    body.extend_from_slice(&pkcs8[at..at + 34]);
    body.extend_from_slice(&[0xa0, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7]);
    body.extend_from_slice(&[0xa1, 68, 3, 66, 0]);
    body.extend_from_slice(ca.key().der_bytes());
    let mut sec1 = vec![0x30, u8::try_from(body.len()).unwrap()];
    sec1.append(&mut body);
    load_with_key(&ca, &pem_of("EC PRIVATE KEY", &sec1)).unwrap();
}

#[test]
fn the_ca_key_never_appears_in_debug() {
    let dir = fresh();
    let issuer = LocalIssuer::load(dir.path(), Clock::system()).unwrap();
    let text = format!("{issuer:?} {issuer:#?} {:?}", issuer.signer);
    let key = fs::read_to_string(dir.path().join(CA_KEY)).unwrap();
    assert!(key.lines().filter(|line| !line.starts_with('-')).all(|line| !text.contains(line)));
    assert!(issuer.signer.key().serialized_der().is_empty(), "its text form is wiped after loading");
}
