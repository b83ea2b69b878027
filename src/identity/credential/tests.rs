#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType};
use rustls::crypto::{KeyProvider, aws_lc_rs};
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::SigningKey;

use super::*;
use crate::identity::Config;
use crate::identity::certificate::{CertificateEntry, to_pem};
use crate::lifecycle::Clock;

const HOUR: Duration = Duration::from_secs(3600);

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// An answer that is right except for what `edit` does to it.
    fn answer(&self, pending: &PendingKey, edit: impl FnOnce(&mut CertificateParams)) -> Issued {
        let csr = CertificateSigningRequestParams::from_pem(&pending.request.csr_pem).unwrap();
        let leaf = self.params(&pending.request.identity, edit).signed_by(&csr.public_key, &self.0).unwrap();
        Issued { certificates: vec![leaf.pem(), self.0.pem()] }
    }

    fn params(&self, identity: &SpiffeId, edit: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().unwrap())];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = (SystemTime::now() - HOUR).into();
        params.not_after = (SystemTime::now() + HOUR).into();
        edit(&mut params);
        params
    }
}

fn shape() -> Arc<Shape> {
    Arc::new(Shape::new(&Config::default(), Clock::system()))
}

fn me() -> SpiffeId {
    SpiffeId::new("cluster.local", "default", "client").unwrap()
}

fn pending(shape: &Shape) -> PendingKey {
    PendingKey::generate(&me(), HOUR, shape.provider.key_provider).unwrap()
}

fn problem(edit: impl FnOnce(&Ca, &PendingKey) -> Issued) -> AnswerProblem {
    let shape = shape();
    let pending = pending(&shape);
    let issued = edit(&Ca::new(), &pending);
    match Credential::verify(&shape, pending, &issued, 1) {
        Err(IdentityError::Answer { identity, problem }) if identity == me() => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_right_answer_is_installed_whole() {
    let shape = shape();
    let pending = pending(&shape);
    let issued = Ca::new().answer(&pending, |_| {});
    let credential = Credential::verify(&shape, pending, &issued, 7).unwrap();
    assert_eq!((credential.identity.clone(), credential.generation, credential.chain.len(), credential.roots.len()), (me(), 7, 1, 1));
    assert!(credential.is_valid(SystemTime::now()) && !credential.is_valid(SystemTime::now() + 2 * HOUR));
}

#[test]
fn an_empty_answer_or_one_without_roots_is_refused() {
    assert_eq!(problem(|_, _| Issued { certificates: Vec::new() }), AnswerProblem::Empty);
    assert_eq!(problem(|ca, pending| Issued { certificates: ca.answer(pending, |_| {}).certificates[..1].to_vec() }), AnswerProblem::NoRoots);
    let text = |at: usize| {
        problem(|ca, pending| {
            let mut issued = ca.answer(pending, |_| {});
            issued.certificates[at] = "hello".to_owned();
            issued
        })
    };
    assert!(matches!((text(0), text(1)), (AnswerProblem::Malformed(_), AnswerProblem::Malformed(_))));
}

#[test]
fn an_answer_for_another_identity_is_refused() {
    let other = SpiffeId::new("cluster.local", "default", "victim").unwrap();
    let found =
        problem(|ca, pending| ca.answer(pending, |params| params.subject_alt_names = vec![SanType::URI(other.to_string().try_into().unwrap())]));
    assert_eq!(found, AnswerProblem::WrongIdentity(other.clone()));
    let both = problem(|ca, pending| ca.answer(pending, |params| params.subject_alt_names.push(SanType::URI(other.to_string().try_into().unwrap()))));
    assert_eq!(both, AnswerProblem::Leaf(PeerError::SeveralUris(2)));
}

#[test]
fn an_answer_for_another_key_is_refused() {
    let found = problem(|ca, pending| {
        let leaf = ca.params(&pending.request.identity, |_| {}).signed_by(&KeyPair::generate().unwrap(), &ca.0).unwrap();
        Issued { certificates: vec![leaf.pem(), ca.0.pem()] }
    });
    assert_eq!(found, AnswerProblem::OtherKey);
}

#[test]
fn an_answer_outside_its_validity_is_refused() {
    let expired = problem(|ca, pending| ca.answer(pending, |params| params.not_after = (SystemTime::now() - Duration::from_secs(2)).into()));
    assert!(expired.to_string().contains("expired"), "{expired}");
    let early = problem(|ca, pending| ca.answer(pending, |params| params.not_before = (SystemTime::now() + Duration::from_secs(5)).into()));
    assert!(early.to_string().contains("not valid for another"), "{early}");
}

#[test]
fn an_answer_that_does_not_lead_to_its_roots_is_refused() {
    let found = problem(|ca, pending| {
        let mut issued = ca.answer(pending, |_| {});
        issued.certificates[1] = Ca::new().0.pem();
        issued
    });
    assert!(matches!(&found, AnswerProblem::Untrusted(_)), "{found}");
}

#[test]
fn an_answer_that_peers_would_refuse_for_its_purpose_is_refused() {
    for purpose in [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth] {
        let found = problem(|ca, pending| ca.answer(pending, |params| params.extended_key_usages = vec![purpose.clone()]));
        assert!(found.to_string().contains("extended key usage"), "{found}");
    }
}

#[test]
fn a_chain_of_a_hundred_is_refused_unread() {
    let found = problem(|ca, pending| {
        let mut issued = ca.answer(pending, |_| {});
        let root = issued.certificates[1].clone();
        issued.certificates.splice(1..1, std::iter::repeat_n(root, 99));
        issued
    });
    assert_eq!(found, AnswerProblem::TooLong(100));
}

#[test]
fn roots_among_the_intermediates_are_not_sent() {
    let shape = shape();
    let pending = pending(&shape);
    let ca = Ca::new();
    let mut issued = ca.answer(&pending, |_| {});
    issued.certificates.insert(1, ca.0.pem());
    assert_eq!(Credential::verify(&shape, pending, &issued, 1).unwrap().chain.len(), 1);
}

#[test]
fn a_chain_is_valid_only_while_all_of_it_is() {
    let (shape, ca) = (shape(), Ca::new());
    let pending = pending(&shape);
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let end = SystemTime::now() + HOUR / 2;
    params.distinguished_name.push(rcgen::DnType::CommonName, "below");
    params.not_after = end.into();
    let below = Ca(CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &ca.0).unwrap());
    let mut issued = below.answer(&pending, |_| {});
    issued.certificates.push(ca.0.pem());
    let credential = Credential::verify(&shape, pending, &issued, 1).unwrap();
    assert_eq!(credential.chain.len(), 2);
    assert!(credential.not_after <= end);
}

#[test]
fn the_configurations_are_built_once() {
    let shape = shape();
    let pending = pending(&shape);
    let issued = Ca::new().answer(&pending, |_| {});
    let credential = Credential::verify(&shape, pending, &issued, 1).unwrap();
    assert!(Arc::ptr_eq(&credential.server_config(), &credential.server_config()));
    assert!(Arc::ptr_eq(&credential.client_config(), &credential.client_config()));
    assert!(credential.server_config().enable_secret_extraction && credential.client_config().enable_secret_extraction);
    assert!(!credential.client_config().enable_sni);
    assert_eq!(credential.server_config().send_tls13_tickets, 0);
    assert!(!credential.server_config().session_storage.can_cache());
}

#[test]
fn suites_and_groups_are_those_agreed() {
    let names = |config: Config| {
        let provider = Shape::new(&config, Clock::system()).provider;
        let suites: Vec<String> = provider.cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect();
        let groups: Vec<String> = provider.kx_groups.iter().map(|group| format!("{:?}", group.name())).collect();
        (suites, groups)
    };
    let (suites, groups) = names(Config::default());
    assert_eq!(suites, ["TLS13_AES_256_GCM_SHA384", "TLS13_AES_128_GCM_SHA256"]);
    assert_eq!(groups, ["X25519", "secp256r1", "secp384r1", "X25519MLKEM768"]);
    assert_eq!(names(Config { prefer_aes128: true, ..Config::default() }).0, ["TLS13_AES_128_GCM_SHA256", "TLS13_AES_256_GCM_SHA384"]);
    let (suites, groups) = names(Config { post_quantum_only: true, ..Config::default() });
    assert_eq!((suites.len(), groups), (2, vec!["X25519MLKEM768".to_owned()]));
}

/// Hands keys on to the real provider and keeps a copy.
#[derive(Debug)]
struct Spy(Mutex<Vec<u8>>);

impl KeyProvider for Spy {
    fn load_private_key(&self, key: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
        *self.0.lock().unwrap() = key.secret_der().to_vec();
        aws_lc_rs::default_provider().key_provider.load_private_key(key)
    }
}

#[test]
fn key_bytes_never_appear_in_debug_or_dump() {
    let shape = shape();
    let spy = Spy(Mutex::default());
    let pending = PendingKey::generate(&me(), HOUR, &spy).unwrap();
    let der = spy.0.into_inner().unwrap();
    // PKCS#8 of P-256 in this library: the 32 secret bytes follow the header `04 20` of their OCTET STRING.
    let at = der.windows(2).position(|pair| pair == [4, 32]).unwrap() + 2;
    let secret = &der[at..at + 32];
    let request = format!("{:?}", pending.request);
    let issued = Ca::new().answer(&pending, |_| {});
    let credential = Credential::verify(&shape, pending, &issued, 1).unwrap();
    let entries: Vec<CertificateEntry> = credential.chain.iter().chain(&credential.roots).map(CertificateEntry::of).collect();
    let shown = [
        request,
        format!("{credential:?} {credential:#?}"),
        format!("{:?} {:?}", credential.server_config(), credential.client_config()),
        format!("{entries:?} {}", serde_json::to_string(&entries).unwrap()),
        format!("{issued:?} {}", to_pem(&credential.chain[0])),
    ];
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    // Any eight bytes in a row would be a leak, in whatever notation.
    for window in secret.windows(8) {
        let decimal = window.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        for text in &shown {
            assert!(!text.contains(&decimal));
        }
    }
    for text in &shown {
        assert!(!text.to_lowercase().contains(&hex[..16]) && !text.to_lowercase().contains(&hex[16..32]));
    }
}
