//! The TLS handshake by rustls, up to the point where it hands over its secrets. From then on rustls is gone: the record layer is ours.

use std::io;
use std::ops::Deref;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{CipherSuite, CommonState, ExtractedSecrets, ProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::Error;
use super::{Early, Established, older};
use crate::forward::record::{self, Direction, Opener, RecordError, Sealer, Suite};
use crate::identity::{Credential, TrafficSecrets, capture_secrets};

/// Octets of a handshake that may be unread by rustls: its own limit is 64 KiB, so this is reached by nothing that could succeed.
const INCOMING_LIMIT: usize = 96 << 10;

/// The two kinds of unbuffered connection have the same shape and no common trait.
trait Handshaking: Deref<Target: Deref<Target = CommonState>> + Sized {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn into_secrets(self) -> Result<ExtractedSecrets, rustls::Error>;
    /// What we receive with and what we send with.
    fn ours(secrets: &TrafficSecrets) -> (&[u8], &[u8]);
}

impl Handshaking for UnbufferedClientConnection {
    type Data = rustls::client::ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn into_secrets(self) -> Result<ExtractedSecrets, rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, _)| secrets)
    }
    fn ours(secrets: &TrafficSecrets) -> (&[u8], &[u8]) {
        (&secrets.server, &secrets.client)
    }
}

impl Handshaking for UnbufferedServerConnection {
    type Data = rustls::server::ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn into_secrets(self) -> Result<ExtractedSecrets, rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, _)| secrets)
    }
    fn ours(secrets: &TrafficSecrets) -> (&[u8], &[u8]) {
        (&secrets.client, &secrets.server)
    }
}

/// Handshakes as the client; who answered is for the caller to check.
pub(in crate::hbone) async fn connect(socket: TcpStream, credential: &Credential) -> Result<Established, Error> {
    // The name is never sent (SNI is off) and never checked (the SPIFFE ID is): rustls only wants one. The socket may have no address at all.
    let name = rustls::pki_types::ServerName::IpAddress(std::net::Ipv6Addr::UNSPECIFIED.into());
    establish(socket, UnbufferedClientConnection::new(credential.client_config(), name)).await
}

/// Handshakes as the server; the configuration has verified the client.
pub(in crate::hbone) async fn welcome(socket: TcpStream, credential: &Credential) -> Result<Established, Error> {
    establish(socket, UnbufferedServerConnection::new(credential.server_config())).await
}

/// Brings a handshake to its end and takes over from rustls.
async fn establish<C: Handshaking>(socket: TcpStream, connection: Result<C, rustls::Error>) -> Result<Established, Error> {
    let mut connection = connection.map_err(|error| tls(&error))?;
    let (socket, secrets, input) = run(socket, &mut connection).await?;
    crate::hbone::require_alpn(connection.alpn_protocol())?;
    let chain = connection.peer_certificates().unwrap_or_default().to_vec();
    let is_older = connection.protocol_version() == Some(ProtocolVersion::TLSv1_2);
    let extracted = connection.into_secrets().map_err(|error| tls(&error))?;
    if is_older {
        return older::adapt(socket, &extracted, chain, input);
    }
    let (receive, send) = C::ours(&secrets);
    let (opener, sealer) = directions(&extracted, receive, send)?;
    Ok(Established { socket, opener, sealer, chain, older: false, input })
}

fn tls(error: &rustls::Error) -> Error {
    match error {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked) => Error::Revoked,
        other => Error::Tls(crate::identity::explain(other).to_string()),
    }
}

/// Our record layer in both directions. The counters are rustls' own: it may have opened or sealed records after the handshake.
fn directions(extracted: &ExtractedSecrets, receive: &[u8], send: &[u8]) -> Result<(Opener, Sealer), Error> {
    use rustls::ConnectionTrafficSecrets as Secrets;
    let suite = match extracted.tx.1 {
        Secrets::Aes128Gcm { .. } => Suite::Aes128Gcm,
        Secrets::Aes256Gcm { .. } => Suite::Aes256Gcm,
        _ => return Err(Error::Tls(format!("the cipher suite is not served: {:?}", CipherSuite::Unknown(0)))),
    };
    if receive.len() != suite.secret_length() || send.len() != suite.secret_length() {
        return Err(Error::Tls("only TLS 1.3 is served".into()));
    }
    let broken = |error: RecordError| Error::Tls(error.to_string());
    let opener = Opener::new(Direction { suite, secret: receive.to_vec(), sequence: extracted.rx.0 }).map_err(broken)?;
    let sealer = Sealer::new(Direction { suite, secret: send.to_vec(), sequence: extracted.tx.0 }).map_err(broken)?;
    Ok((opener, sealer))
}

/// What one turn of the handshake asks for.
enum Next {
    Again,
    Read,
    Write,
    Done,
    Fail(Error),
}

async fn run<C: Handshaking>(mut socket: TcpStream, connection: &mut C) -> Result<(TcpStream, TrafficSecrets, Early), Error> {
    let mut secrets = TrafficSecrets::default();
    let mut incoming = Vec::with_capacity(8 << 10);
    let mut outgoing = Vec::new();
    let mut plaintext = Vec::new();
    // What rustls has been shown: all of it, and the whole records of it.
    let (mut shown, mut whole) = (0_usize, 0_usize);
    loop {
        let (next, discard) =
            capture_secrets(&mut secrets, || turn(connection, incoming.get_mut(..shown).unwrap_or_default(), (&mut outgoing, &mut plaintext)));
        let discard = discard.min(incoming.len());
        incoming.drain(..discard);
        (shown, whole) = (shown.saturating_sub(discard), whole.saturating_sub(discard));
        match next {
            Next::Again => {}
            // One record at a time: it must not open those behind the handshake, where the peer may already change its key.
            Next::Read if let Some(end) = record_end(&incoming, whole) => (shown, whole) = (end, end),
            // It may see from the beginning of a record that there is no use in waiting for the rest.
            Next::Read if shown < incoming.len() => shown = incoming.len(),
            Next::Read => {
                if incoming.len() > INCOMING_LIMIT {
                    return Err(Error::Tls("the peer sends a handshake without end".into()));
                }
                if socket.read_buf(&mut incoming).await.map_err(|error| Error::Tls(error.to_string()))? == 0 {
                    return Err(Error::Tls("the peer closed the connection during the handshake".into()));
                }
            }
            Next::Write => {
                socket.write_all(&outgoing).await.map_err(|error| Error::Tls(error.to_string()))?;
                outgoing.clear();
            }
            Next::Done => return Ok((socket, secrets, Early { plaintext, records: incoming })),
            Next::Fail(error) => {
                // The alert tells the peer why; it may have hung up already.
                let _ = flush_alert(&mut socket, connection, &mut outgoing).await;
                return Err(error);
            }
        }
    }
}

/// Where the record that starts at `start` ends, if all of it is here.
fn record_end(incoming: &[u8], start: usize) -> Option<usize> {
    let [_, _, _, high, low] = incoming.get(start..)?.first_chunk::<{ record::HEADER }>()?;
    let end = start + record::HEADER + usize::from(u16::from_be_bytes([*high, *low]));
    (end <= incoming.len()).then_some(end)
}

/// One step of rustls' state machine.
fn turn<C: Handshaking>(connection: &mut C, incoming: &mut [u8], (outgoing, plaintext): (&mut Vec<u8>, &mut Vec<u8>)) -> (Next, usize) {
    let UnbufferedStatus { mut discard, state, .. } = connection.process(incoming);
    let next = match state {
        Ok(ConnectionState::EncodeTlsData(mut encode)) => {
            let mut record = vec![0; 4096];
            let written = match encode.encode(&mut record) {
                Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
                    record.resize(required_size, 0);
                    encode.encode(&mut record)
                }
                other => other,
            };
            match written {
                Ok(count) => {
                    outgoing.extend_from_slice(record.get(..count).unwrap_or_default());
                    Next::Again
                }
                Err(error) => Next::Fail(Error::Tls(error.to_string())),
            }
        }
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            transmit.done();
            Next::Write
        }
        Ok(ConnectionState::BlockedHandshake) => Next::Read,
        Ok(ConnectionState::WriteTraffic(_)) => Next::Done,
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut next = Next::Again;
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        plaintext.extend_from_slice(record.payload);
                    }
                    Err(error) => {
                        next = Next::Fail(tls(&error));
                        break;
                    }
                }
            }
            next
        }
        Ok(_) => Next::Fail(Error::Tls("the peer closed the connection during the handshake".into())),
        Err(error) => Next::Fail(tls(&error)),
    };
    (next, discard)
}

/// After an error rustls has an alert to send.
async fn flush_alert<C: Handshaking>(socket: &mut TcpStream, connection: &mut C, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let (next, _) = turn(connection, &mut [], (outgoing, &mut Vec::new()));
    if matches!(next, Next::Again | Next::Write) && !outgoing.is_empty() {
        socket.write_all(outgoing).await?;
    }
    Ok(())
}
