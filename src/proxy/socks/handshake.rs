//! The server's side of a SOCKS5 handshake (RFC 1928): no authentication, CONNECT only. Every length is read before what it measures, and no byte
//! after the request is taken: those are the application's.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::model::canonical_socket;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_ACCEPTABLE_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const DOMAIN: u8 = 3;
const IPV6: u8 = 4;
/// Longest name and label of DNS.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// Where a client wants to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    /// An address, canonical.
    Address(SocketAddr),
    /// A host name in lower case, without a final dot, and a port.
    Name(String, u16),
}

/// What a client is told (RFC 1928 §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Succeeded = 0,
    GeneralFailure = 1,
    NotAllowed = 2,
    NetworkUnreachable = 3,
    HostUnreachable = 4,
    Refused = 5,
    CommandUnsupported = 7,
    AddressTypeUnsupported = 8,
}

impl Reply {
    /// With an address that says nothing, as in the reference: clients have no use for it.
    pub(super) fn message(self) -> [u8; 10] {
        [VERSION, self as u8, 0, IPV4, 0, 0, 0, 0, 0, 0]
    }
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The client speaks something else.
    #[error("SOCKS: version {0} instead of 5")]
    Version(u8),
    /// The client insists on authentication.
    #[error("SOCKS: the client offers no method without authentication")]
    Methods,
    /// BIND, UDP ASSOCIATE, or nothing of the protocol.
    #[error("SOCKS: command {0} instead of CONNECT (1)")]
    Command(u8),
    /// No kind of address of the protocol.
    #[error("SOCKS: unknown address type {0}")]
    AddressType(u8),
    /// What the client calls a host name can be none.
    #[error("SOCKS: {0:?} is no host name")]
    HostName(String),
    /// The client did not come to an end.
    #[error("SOCKS: handshake not finished within {0:?}")]
    Late(Duration),
    /// The connection broke.
    #[error("SOCKS: the connection ended within the handshake: {0}")]
    Io(#[from] io::Error),
}

impl HandshakeError {
    /// What the client is told, if it has got far enough to be told anything.
    pub(super) fn reply(&self) -> Option<Reply> {
        match self {
            Self::Version(_) | Self::Methods | Self::Late(_) | Self::Io(_) => None,
            Self::Command(_) => Some(Reply::CommandUnsupported),
            Self::AddressType(_) => Some(Reply::AddressTypeUnsupported),
            Self::HostName(_) => Some(Reply::HostUnreachable),
        }
    }
}

/// Reads what the client wants, within `patience`. The request is not answered yet.
///
/// # Errors
/// See [`HandshakeError`]; a client without an acceptable method has been told.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, patience: Duration) -> Result<Destination, HandshakeError> {
    let talk = async {
        choose_method(stream).await?;
        read_request(stream).await
    };
    tokio::time::timeout(patience, talk).await.unwrap_or(Err(HandshakeError::Late(patience)))
}

async fn choose_method<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<(), HandshakeError> {
    // One byte first: whoever speaks another protocol may not send a second one before it is answered.
    require_version(stream.read_u8().await?)?;
    let mut methods = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[VERSION, NO_ACCEPTABLE_METHOD]).await?;
        return Err(HandshakeError::Methods);
    }
    Ok(stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?)
}

async fn read_request<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Destination, HandshakeError> {
    require_version(stream.read_u8().await?)?;
    let [command, _reserved, kind] = read_array(stream).await?;
    let host = match kind {
        IPV4 => Ok(Host::Address(Ipv4Addr::from(read_array(stream).await?).into())),
        IPV6 => Ok(Host::Address(Ipv6Addr::from(read_array::<16, _>(stream).await?).into())),
        DOMAIN => {
            let mut name = vec![0; usize::from(stream.read_u8().await?)];
            stream.read_exact(&mut name).await?;
            Host::of(&name)
        }
        other => return Err(HandshakeError::AddressType(other)),
    };
    let port = stream.read_u16().await?;
    // Only now, that nothing of the request is left unread: to close with unread bytes is to reset, and the reply would be lost.
    if command != CONNECT {
        return Err(HandshakeError::Command(command));
    }
    Ok(match host? {
        Host::Address(ip) => Destination::Address(canonical_socket(SocketAddr::new(ip, port))),
        Host::Name(name) => Destination::Name(name, port),
    })
}

async fn read_array<const N: usize, S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

fn require_version(version: u8) -> Result<(), HandshakeError> {
    if version == VERSION { Ok(()) } else { Err(HandshakeError::Version(version)) }
}

enum Host {
    Address(IpAddr),
    Name(String),
}

impl Host {
    /// Many clients send addresses as names.
    fn of(bytes: &[u8]) -> Result<Self, HandshakeError> {
        let wrong = || HandshakeError::HostName(Excerpt(bytes).to_string());
        let text = std::str::from_utf8(bytes).map_err(|_| wrong())?;
        if let Ok(ip) = text.parse() {
            return Ok(Self::Address(ip));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        let is_label = |label: &str| {
            (1..=MAX_LABEL).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        if name.len() > MAX_NAME || !name.split('.').all(is_label) {
            return Err(wrong());
        }
        Ok(Self::Name(name.to_ascii_lowercase()))
    }
}

/// The beginning of something that a stranger sent.
struct Excerpt<'a>(&'a [u8]);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&String::from_utf8_lossy(&self.0[..self.0.len().min(64)]))
    }
}

#[cfg(test)]
mod tests;
