//! The files that somebody else rotates: roots and token. Read at every use; they are small, and calls are rare.

use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataValue};
use zeroize::Zeroizing;

use super::Error;

/// Where Linux distributions keep the roots of the web, in order of preference.
const SYSTEM_BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A file of roots or a token longer than this is a mistake.
const LONGEST: u64 = 4 << 20;

/// Where roots come from (`XDS_ROOT_CA`, `CA_ROOT_CA`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootSource {
    /// A PEM file.
    File(PathBuf),
    /// PEM text.
    Text(String),
    /// The operating system's bundle.
    System,
}

impl RootSource {
    /// Reads the value of a setting: `SYSTEM`, PEM text, or else a path.
    #[must_use]
    pub fn of(value: &str) -> Self {
        match value {
            "SYSTEM" => Self::System,
            text if text.contains("-----BEGIN") => Self::Text(text.to_owned()),
            path => Self::File(path.into()),
        }
    }

    /// The PEM text now.
    pub(super) async fn read(&self) -> Result<Vec<u8>, Error> {
        let failed = |problem: String| Error::Roots { origin: self.to_string(), problem };
        match self {
            Self::Text(text) => Ok(text.clone().into_bytes()),
            Self::File(path) => read(path).await.map_err(failed),
            Self::System => {
                for path in SYSTEM_BUNDLES {
                    if let Ok(bytes) = read(Path::new(path)).await {
                        return Ok(bytes);
                    }
                }
                Err(failed(format!("this system has none of {}; mount one there or name a file", SYSTEM_BUNDLES.join(", "))))
            }
        }
    }
}

impl fmt::Display for RootSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(formatter, "in {}", path.display()),
            Self::Text(_) => formatter.write_str("given as text"),
            Self::System => formatter.write_str("of the system"),
        }
    }
}

/// The bearer token that proves who we are (`AUTH_TOKEN`).
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// In a file, read for every call: kubelet replaces it before it expires.
    File(PathBuf),
    /// Itself.
    Literal(Zeroizing<String>),
}

impl Token {
    /// Reads the value of a setting: a path if there is such a file or it looks like one (a token begins with neither `/` nor `.`), else the token
    /// itself.
    #[must_use]
    pub fn of(value: &str) -> Self {
        if value.starts_with(['/', '.']) || Path::new(value).exists() {
            Self::File(value.into())
        } else {
            Self::Literal(Zeroizing::new(value.to_owned()))
        }
    }

    /// The `authorization` header now.
    pub(super) async fn header(&self) -> Result<MetadataValue<Ascii>, Error> {
        let (text, path) = match self {
            Self::Literal(text) => (text.clone(), PathBuf::from("(none: it is a literal)")),
            Self::File(path) => {
                let failed = |problem: String| Error::Token { path: path.clone(), problem };
                let bytes = Zeroizing::new(read(path).await.map_err(failed)?);
                (Zeroizing::new(String::from_utf8_lossy(&bytes).into_owned()), path.clone())
            }
        };
        let failed = |problem: &str| Error::Token { path, problem: problem.to_owned() };
        let text = text.trim();
        if text.is_empty() {
            return Err(failed("it is empty; the server would refuse us"));
        }
        let header = Zeroizing::new(format!("Bearer {text}"));
        let mut value =
            MetadataValue::try_from(header.as_str()).map_err(|_| failed("it is not a token: it has characters that no header may have"))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl fmt::Debug for Token {
    /// Without the token.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => formatter.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => formatter.write_str("Literal(…)"),
        }
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, String> {
    let problem = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => format!("it cannot be read: {error}"),
    };
    let length = tokio::fs::metadata(path).await.map_err(problem)?.len();
    if length > LONGEST {
        return Err(format!("it has {length} bytes, more than the {LONGEST} allowed"));
    }
    tokio::fs::read(path).await.map_err(problem)
}
