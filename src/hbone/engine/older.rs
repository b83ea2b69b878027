//! Tunnels of TLS 1.2 (RFC 5246, with AES-GCM as RFC 5288 has it), where they are permitted (`TLS12_ENABLED`): for peers that speak nothing newer.
//!
//! The core knows the records of TLS 1.3 alone, and stays so. A tunnel of TLS 1.2 is driven on one end of a pair of sockets, as one within another
//! tunnel is; a task at the other end opens each record of one form and seals it in the other. On the pair, records are those of TLS 1.3 under keys
//! that are drawn for it and leave the process nowhere. That costs a copy and two more passes of AES-GCM each way, and 64 KiB for each tunnel.
//!
//! TLS 1.2 cannot change its keys (rustls never renegotiates, and neither does this), so a tunnel ends after 2^24 records in one direction, which
//! are 256 GiB of full ones. The task ends with its process: such a tunnel cannot be moved to a successor
//! ([`Immovable::Older`](crate::hbone::Immovable)).

use std::io;
use std::time::Duration;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::super::Error;
use super::{Early, Established};
use crate::forward::record::{Content, Direction, HEADER, KEY_LIMIT, MAX_PLAINTEXT, Opener, RecordError, Sealer, Suite, TAG};
use crate::sys::socket::pair;

/// Octets of the nonce that stand in front of the ciphertext; the rest of it is fixed.
const EXPLICIT: usize = 8;
/// Kinds of records.
const ALERT: u8 = 21;
const APPLICATION_DATA: u8 = 23;
/// Most octets after the header (RFC 5246 §6.2.3).
const MAX_BODY: usize = MAX_PLAINTEXT + 2048;
/// What is read at once: a full record or two.
const READ: usize = 32 << 10;
/// How long one direction may go on after the other has ended: a little longer than the tunnel itself waits then.
const FAREWELL: Duration = Duration::from_secs(2);

/// Makes of a finished handshake of TLS 1.2 what the core can drive. Must be called within a runtime.
pub(super) fn adapt(
    socket: TcpStream,
    extracted: &ExtractedSecrets,
    chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    input: Early,
) -> Result<Established, Error> {
    let (near, far) = pair().and_then(|(near, far)| Ok((TcpStream::from_std(near)?, TcpStream::from_std(far)?))).map_err(Error::Connect)?;
    let broken = |error: RecordError| Error::Tls(error.to_string());
    let [up, down] = [direction()?, direction()?];
    let (theirs, ours) = (Older::new(&extracted.rx)?, Older::new(&extracted.tx)?);
    let (sealer, opener) = (Sealer::new(up.clone()).map_err(broken)?, Opener::new(down.clone()).map_err(broken)?);
    let (from_peer, to_peer) = socket.into_split();
    let (from_core, to_core) = far.into_split();
    let inward = inward(BufReader::with_capacity(READ, io::Cursor::new(input.records).chain(from_peer)), to_core, theirs, sealer);
    let outward = outward(BufReader::with_capacity(READ, from_core), to_peer, ours, opener);
    tokio::spawn(carry(inward, outward));
    Ok(Established {
        socket: near,
        opener: Opener::new(up).map_err(broken)?,
        sealer: Sealer::new(down).map_err(broken)?,
        chain,
        older: true,
        input: Early { plaintext: input.plaintext, records: Vec::new() },
    })
}

/// Keys for one direction of the pair.
fn direction() -> Result<Direction, Error> {
    let suite = Suite::Aes128Gcm;
    let mut secret = vec![0; suite.secret_length()];
    aws_lc_rs::rand::fill(&mut secret).map_err(|_| Error::Tls("no random numbers".into()))?;
    Ok(Direction { suite, secret, sequence: 0 })
}

/// Both directions, until the tunnel is over or one of them breaks; the other has a moment to come to its end. Then both sockets go.
async fn carry(inward: impl Future<Output = io::Result<()>>, outward: impl Future<Output = io::Result<()>>) {
    let (mut inward, mut outward) = (Box::pin(inward), Box::pin(outward));
    let ended = tokio::select! {
        ended = &mut inward => {
            // With this the core sees the end; what it has said before, or says to that, is for the peer.
            drop(inward);
            let _ = tokio::time::timeout(FAREWELL, outward).await;
            ended
        }
        ended = &mut outward => {
            if ended.is_ok() {
                let _ = tokio::time::timeout(FAREWELL, inward).await;
            }
            ended
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a tunnel of TLS 1.2 broke");
    }
}

/// From the peer to the core.
async fn inward<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(mut from: R, mut to: W, mut peer: Older, mut sealer: Sealer) -> io::Result<()> {
    let (mut record, mut slot) = (Vec::new(), Vec::new());
    while let Some(kind) = read_record(&mut from, &mut record).await? {
        let plain = peer.open(kind, &mut record)?;
        let content = match kind {
            APPLICATION_DATA => Content::ApplicationData,
            ALERT => Content::Alert,
            // HelloRequest, or a new handshake.
            other => return Err(malformed(format!("a record of kind {other} after the handshake"))),
        };
        slot.clear();
        slot.resize(HEADER, 0);
        slot.extend_from_slice(plain);
        slot.resize(Sealer::sealed_length(plain.len()), 0);
        sealer.seal(&mut slot, content).map_err(io::Error::other)?;
        to.write_all(&slot).await?;
    }
    to.shutdown().await
}

/// From the core to the peer.
async fn outward<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(mut from: R, mut to: W, mut own: Older, mut opener: Opener) -> io::Result<()> {
    let (mut record, mut sealed) = (Vec::new(), Vec::new());
    while read_record(&mut from, &mut record).await?.is_some() {
        let opened = opener.open(&mut record, 0).map_err(io::Error::other)?.ok_or_else(|| malformed("half a record".to_owned()))?;
        let kind = match opened.content {
            Content::ApplicationData => APPLICATION_DATA,
            Content::Alert => ALERT,
            // The core says nothing else after the handshake than that it goes on with its next key.
            Content::Handshake => {
                opener.update().map_err(io::Error::other)?;
                continue;
            }
        };
        own.seal(kind, record.get(opened.plaintext).unwrap_or_default(), &mut sealed)?;
        to.write_all(&sealed).await?;
    }
    to.shutdown().await
}

/// Reads one record, header and body, and says its kind; `None` at the end of the connection.
async fn read_record<R: AsyncRead + Unpin>(from: &mut R, record: &mut Vec<u8>) -> io::Result<Option<u8>> {
    let mut header = [0; HEADER];
    let (first, rest) = header.split_at_mut(1);
    if from.read(first).await? == 0 {
        return Ok(None);
    }
    from.read_exact(rest).await?;
    let [kind, _, _, high, low] = header;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_BODY {
        return Err(malformed(format!("a record of {length} octets")));
    }
    record.clear();
    record.extend_from_slice(&header);
    record.resize(HEADER + length, 0);
    from.read_exact(record.get_mut(HEADER..).unwrap_or_default()).await?;
    Ok(Some(kind))
}

fn malformed(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// One direction of TLS 1.2.
struct Older {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Older {
    fn new((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(Error::Tls("the cipher suite is not served".into())),
        };
        let unusable = |_| Error::Tls("the keys of the handshake cannot be used".into());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unusable(()))?;
        let iv = iv.as_ref().try_into().map_err(|_| unusable(()))?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence: *sequence })
    }

    /// The number of the next record.
    fn next(&mut self) -> io::Result<u64> {
        let sequence = self.sequence;
        if sequence >= KEY_LIMIT {
            return Err(io::Error::other("TLS 1.2 cannot change its keys, and these have sealed as much as they may"));
        }
        self.sequence += 1;
        Ok(sequence)
    }

    /// What a record of TLS 1.2 authenticates beside its content.
    fn aad(sequence: u64, kind: u8, length: usize) -> io::Result<Aad<[u8; 13]>> {
        let length = u16::try_from(length).map_err(io::Error::other)?;
        let mut aad = [0; 13];
        aad[..8].copy_from_slice(&sequence.to_be_bytes());
        aad[8..11].copy_from_slice(&[kind, 3, 3]);
        aad[11..].copy_from_slice(&length.to_be_bytes());
        Ok(Aad::from(aad))
    }

    /// Opens a whole record in place.
    fn open<'a>(&mut self, kind: u8, record: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let body = record.get_mut(HEADER..).unwrap_or_default();
        let length = body.len().checked_sub(EXPLICIT + TAG).ok_or_else(|| malformed("a record that is too short".to_owned()))?;
        if length > MAX_PLAINTEXT {
            return Err(malformed(format!("a record of {length} octets of plaintext")));
        }
        let (explicit, sealed) = body.split_at_mut(EXPLICIT);
        let mut nonce = self.iv;
        nonce[NONCE_LEN - EXPLICIT..].copy_from_slice(explicit);
        let aad = Self::aad(self.next()?, kind, length)?;
        let plain = self.key.open_in_place(Nonce::assume_unique_for_key(nonce), aad, sealed);
        plain.map(|plain| &*plain).map_err(|_| malformed("a record does not decrypt".to_owned()))
    }

    /// Seals a record; its nonce is, as in TLS 1.3 and as rustls does, the number of the record, XORed into the IV, so that none comes twice.
    fn seal(&mut self, kind: u8, plain: &[u8], record: &mut Vec<u8>) -> io::Result<()> {
        let sequence = self.next()?;
        let mut nonce = self.iv;
        for (octet, counter) in nonce[NONCE_LEN - EXPLICIT..].iter_mut().zip(sequence.to_be_bytes()) {
            *octet ^= counter;
        }
        let length = u16::try_from(EXPLICIT + plain.len() + TAG).map_err(io::Error::other)?;
        record.clear();
        record.extend_from_slice(&[kind, 3, 3]);
        record.extend_from_slice(&length.to_be_bytes());
        record.extend_from_slice(&nonce[NONCE_LEN - EXPLICIT..]);
        let start = record.len();
        record.extend_from_slice(plain);
        let aad = Self::aad(sequence, kind, plain.len())?;
        let content = record.get_mut(start..).unwrap_or_default();
        let tag = self.key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), aad, content);
        record.extend_from_slice(tag.map_err(|_| io::Error::other("a record cannot be sealed"))?.as_ref());
        Ok(())
    }
}
