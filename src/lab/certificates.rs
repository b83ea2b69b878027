//! Certificates for programs that speak HBONE themselves, signed by the lab's CA.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};

use super::Error;
use crate::identity::{Issuer, LocalIssuer, SigningRequest};
use crate::lifecycle::Clock;
use crate::model::SpiffeId;

/// Longer than any lab lives: nobody renews it.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Writes `key.pem`, `chain.pem` (leaf and intermediates) and `root.pem` of an identity into a directory. Only this user may read the key.
pub(super) async fn present(ca: &Path, identity: &SpiffeId, directory: &Path) -> Result<(), Error> {
    let what = || format!("cannot make a certificate for {identity}");
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(Error::failed(what()))?;
    let request = CertificateParams::default().serialize_request(&key).and_then(|request| request.pem()).map_err(Error::failed(what()))?;
    let issuer = LocalIssuer::load(ca, Clock::system()).map_err(Error::failed(what()))?;
    let request = SigningRequest { identity: identity.clone(), csr_pem: request, ttl: LIFETIME };
    let issued = issuer.issue(&request).await.map_err(Error::failed(what()))?;
    let (root, chain) = issued.certificates.split_last().map_or(("", &[][..]), |(root, chain)| (root.as_str(), chain));
    let write = || -> io::Result<()> {
        fs::write(directory.join("chain.pem"), chain.concat())?;
        fs::write(directory.join("root.pem"), root)?;
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(directory.join("key.pem"))?;
        file.write_all(key.serialize_pem().as_bytes())
    };
    write().map_err(Error::failed(what()))
}
