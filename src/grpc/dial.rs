//! From an address to a verified HTTP/2 connection.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, Error as TlsError};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tonic::metadata::{AsciiMetadataKey, MetadataMap, MetadataValue};

use super::coalesce::{Coalesced, Coalescing};
use super::connection::Connection;
use super::trust::Roots;
use super::{Config, Error};

/// The TCP keepalive of the reference (dataplane §5.3): probes find what no call waits for.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(300), Duration::from_secs(75), 9);

/// A host and a port, from `https://host:port`; the scheme may be left out, and the port then is 443.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
    name: ServerName<'static>,
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |problem: &str| Error::Setting { what: "the address", value: text.to_owned(), problem: problem.to_owned() };
        let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
        let uri: Uri = whole.parse().map_err(|_| wrong("is not of the form https://host:port"))?;
        if uri.scheme_str() != Some("https") {
            return Err(wrong("is not https: calls carry tokens, so they are never made in plaintext"));
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| wrong("names no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| wrong("names a host that no certificate can name"))?;
        Ok(Self { host, port: uri.port_u16().unwrap_or(443), name })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') { write!(formatter, "[{}]:{}", self.host, self.port) } else { write!(formatter, "{}:{}", self.host, self.port) }
    }
}

/// How to reach and trust one server. Holds no connection.
#[derive(Debug)]
pub struct Dialer {
    config: Config,
    origin: Uri,
    alternate: Option<ServerName<'static>>,
    headers: MetadataMap,
}

impl Dialer {
    /// Checks the settings; touches neither files nor network.
    ///
    /// # Errors
    /// [`Error::Setting`] names what cannot be used.
    pub fn new(config: Config) -> Result<Self, Error> {
        let wrong = |what, value: &str, problem: &str| Error::Setting { what, value: value.to_owned(), problem: problem.to_owned() };
        let origin = format!("https://{}", config.address);
        let origin = origin.parse().map_err(|_| wrong("the address", &origin, "is not a URI"))?;
        let alternate = match config.alternate_name.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => Some(ServerName::try_from(name.to_owned()).map_err(|_| wrong("the alternate name", name, "is not a host name"))?),
            None => None,
        };
        let mut headers = MetadataMap::new();
        for (name, value) in &config.headers {
            let key: AsciiMetadataKey =
                name.to_ascii_lowercase().parse().map_err(|_| wrong("the header", name, "has a name that gRPC does not allow"))?;
            let value = MetadataValue::try_from(value).map_err(|_| wrong("the header", name, "has a value that is not plain text"))?;
            headers.append(key, value);
        }
        Ok(Self { config, origin, alternate, headers })
    }

    /// The server, for logs.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.config.address
    }

    /// The roots as their source has them now.
    ///
    /// # Errors
    /// [`Error::Roots`].
    pub async fn roots(&self) -> Result<Roots, Error> {
        Roots::parse(&self.config.roots, &self.config.roots.read().await?)
    }

    /// The headers of a call, with the token as its file has it now.
    ///
    /// # Errors
    /// [`Error::Token`].
    pub async fn metadata(&self) -> Result<MetadataMap, Error> {
        let mut headers = self.headers.clone();
        if let Some(token) = &self.config.token {
            headers.insert("authorization", token.header().await?);
        }
        Ok(headers)
    }

    /// Makes a connection to a server whose certificate leads to `roots` and has its name. Must be called within a runtime, which drives it. It
    /// closes when its last clone and its last call are gone.
    ///
    /// # Errors
    /// [`Error::Unreachable`] and [`Error::Untrusted`].
    pub async fn dial(&self, roots: &Roots) -> Result<Connection, Error> {
        let coalescing = Coalescing::default();
        let socket = Coalesced::new(self.reach().await?, coalescing.clone());
        let untrusted = |problem: String| Error::Untrusted { address: self.config.address.to_string(), problem };
        let tls = roots.client(self.alternate.clone(), self.config.post_quantum_only).map_err(|error| untrusted(error.to_string()))?;
        let shake = async {
            let stream = TlsConnector::from(Arc::new(tls)).connect(self.config.address.name.clone(), socket).await;
            let stream = stream.map_err(|error| self.explain(&error))?;
            if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                return Err("it does not speak HTTP/2 (ALPN h2)".to_owned());
            }
            let (sender, driver) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(self.config.ping_interval)
                .keep_alive_timeout(self.config.ping_timeout)
                .handshake(TokioIo::new(stream))
                .await
                .map_err(|error| error.to_string())?;
            Ok((sender, driver))
        };
        let limit = self.config.connect_timeout;
        let (sender, driver) = match tokio::time::timeout(limit, shake).await {
            Ok(outcome) => outcome.map_err(untrusted)?,
            Err(_) => return Err(untrusted(format!("TLS and HTTP/2 were not ready within {limit:?}"))),
        };
        tokio::spawn(async move {
            // Calls under way get the error themselves.
            if let Err(error) = driver.await {
                tracing::debug!(%error, "connection to the control plane ended");
            }
        });
        Ok(Connection::new(sender, self.origin.clone(), coalescing))
    }

    async fn reach(&self) -> Result<TcpStream, Error> {
        let Config { address, connect_timeout, mark, .. } = &self.config;
        let unreachable = |problem: String| Error::Unreachable { address: address.to_string(), problem };
        let found = tokio::time::timeout(*connect_timeout, tokio::net::lookup_host((address.host.as_str(), address.port))).await;
        let found = found.map_err(|_| unreachable(format!("its name was not resolved within {connect_timeout:?}")))?;
        let mut problem = "its name has no address".to_owned();
        for candidate in found.map_err(|error| unreachable(format!("its name cannot be resolved: {error}")))? {
            match tokio::time::timeout(*connect_timeout, connect(candidate, *mark)).await {
                Ok(Ok(socket)) => {
                    prepare(&socket).map_err(|error| unreachable(error.to_string()))?;
                    return Ok(socket);
                }
                Ok(Err(error)) => problem = error.to_string(),
                Err(_) => problem = format!("no answer from {} within {connect_timeout:?}", candidate.ip()),
            }
        }
        Err(unreachable(problem))
    }

    /// Why a TLS handshake failed, with what to look at.
    fn explain(&self, error: &io::Error) -> String {
        let Config { address, roots, .. } = &self.config;
        match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(TlsError::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
                format!("its certificate does not lead to one of the roots {roots}")
            }
            Some(TlsError::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. })) => {
                let also = self.config.alternate_name.as_deref().map(|name| format!(" or {name}")).unwrap_or_default();
                format!("its certificate is not for {}{also}; if it has another name on purpose, set that as the alternate host name", address.host)
            }
            Some(other) => other.to_string(),
            None if error.kind() == io::ErrorKind::UnexpectedEof => "it closed the connection during the TLS handshake".to_owned(),
            None => error.to_string(),
        }
    }
}

async fn connect(to: SocketAddr, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(mark) = mark {
        let refused = |error: io::Error| io::Error::new(error.kind(), format!("the mark {mark:#x} cannot be set on its socket: {error}"));
        socket2::SockRef::from(&socket).set_mark(mark).map_err(refused)?;
    }
    socket.connect(to).await
}

fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let (idle, interval, retries) = KEEPALIVE;
    let keepalive = socket2::TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(retries);
    socket2::SockRef::from(socket).set_tcp_keepalive(&keepalive)
}
