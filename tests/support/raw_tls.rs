//! A TLS 1.3 peer that does with its records what it is told to, legal or not. rustls shakes hands; from then on an independent record layer
//! (RFC 8446 §5, §7.2, §7.3) seals and opens. As a byte stream it carries a [`RawPeer`](crate::raw_h2::RawPeer).

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, HKDF_SHA384, KeyType, Prk};
use culvert::identity::Credential;
use rustls::{CipherSuite, ClientConnection, Connection, KeyLog, ServerConnection};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

pub const CHANGE_CIPHER_SPEC: u8 = 20;
pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
pub const APPLICATION_DATA: u8 = 23;

pub const CLOSE_NOTIFY: u8 = 0;
pub const UNEXPECTED_MESSAGE: u8 = 10;
pub const BAD_RECORD_MAC: u8 = 20;
pub const RECORD_OVERFLOW: u8 = 22;
pub const ILLEGAL_PARAMETER: u8 = 47;
pub const DECODE_ERROR: u8 = 50;

/// A KeyUpdate; with 1 the other side is asked for its own (§4.6.3).
pub fn key_update(asked: u8) -> Vec<u8> {
    vec![24, 0, 0, 1, asked]
}

/// A post-handshake message (§4).
pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[kind], &length[1..], body].concat()
}

/// One direction of a connection.
pub struct Half {
    suite: CipherSuite,
    secret: Vec<u8>,
    pub sequence: u64,
    key: LessSafeKey,
    iv: Vec<u8>,
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

fn algorithms(suite: CipherSuite) -> (&'static Algorithm, hkdf::Algorithm) {
    match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => (&AES_128_GCM, HKDF_SHA256),
        CipherSuite::TLS13_AES_256_GCM_SHA384 => (&AES_256_GCM, HKDF_SHA384),
        other => panic!("{other:?}"),
    }
}

fn expand(suite: CipherSuite, secret: &[u8], label: &str, length: usize) -> Vec<u8> {
    let label = format!("tls13 {label}");
    let sizes = (u16::try_from(length).unwrap().to_be_bytes(), [u8::try_from(label.len()).unwrap()]);
    let info = [&sizes.0[..], &sizes.1, label.as_bytes(), &[0]];
    let mut out = vec![0; length];
    Prk::new_less_safe(algorithms(suite).1, secret).expand(&info, Length(length)).unwrap().fill(&mut out).unwrap();
    out
}

impl Half {
    fn new(suite: CipherSuite, secret: Vec<u8>) -> Self {
        let algorithm = algorithms(suite).0;
        let key = expand(suite, &secret, "key", algorithm.key_len());
        let iv = expand(suite, &secret, "iv", 12);
        Self { suite, secret, sequence: 0, key: LessSafeKey::new(UnboundKey::new(algorithm, &key).unwrap()), iv }
    }

    /// Moves on to the next key (§7.2).
    pub fn update(&mut self) {
        let length = self.secret.len();
        *self = Self::new(self.suite, expand(self.suite, &self.secret, "traffic upd", length));
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce: [u8; 12] = self.iv[..].try_into().unwrap();
        for (at, byte) in self.sequence.to_be_bytes().into_iter().enumerate() {
            nonce[4 + at] ^= byte;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// A record whose inside is exactly this: content, its type, padding.
    pub fn seal_inner(&mut self, mut inner: Vec<u8>) -> Vec<u8> {
        let length = u16::try_from(inner.len() + 16).unwrap().to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, length[0], length[1]];
        let nonce = self.nonce();
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(&header), &mut inner).unwrap();
        [&header[..], &inner, tag.as_ref()].concat()
    }

    pub fn seal(&mut self, kind: u8, content: &[u8], padding: usize) -> Vec<u8> {
        self.seal_inner([content, &[kind], &vec![0; padding]].concat())
    }

    /// Type and content of a whole record. Panics when it does not open: our own side must not send such a one.
    fn open(&mut self, record: &mut [u8]) -> (u8, Vec<u8>) {
        let (header, body) = record.split_at_mut(5);
        assert_eq!(header[0], APPLICATION_DATA);
        let nonce = self.nonce();
        let inner = self.key.open_in_place(nonce, Aad::from(&*header), body).expect("a record that does not open");
        let kind = inner.iter().rposition(|byte| *byte != 0).expect("a record of padding");
        (inner[kind], inner[..kind].to_vec())
    }
}

/// Keeps the secrets of one handshake.
#[derive(Debug, Default)]
struct Secrets(Mutex<HashMap<String, Vec<u8>>>);

impl KeyLog for Secrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        self.0.lock().unwrap().insert(label.to_owned(), secret.to_vec());
    }
}

/// Either side of a connection.
pub struct RawTls {
    pub socket: TcpStream,
    pub send: Half,
    pub receive: Half,
    /// Zeros behind whatever is written through it as a byte stream.
    pub padding: usize,
    /// Alerts that came: level and description.
    pub alerts: Vec<(u8, u8)>,
    /// KeyUpdates that came: what they ask for, and the records that had come with the key before.
    pub updates: Vec<(u8, u64)>,
    /// Longest content of a record that came.
    pub longest: usize,
    input: Vec<u8>,
    plaintext: Vec<u8>,
    output: Vec<u8>,
    over: bool,
}

impl RawTls {
    pub async fn client(socket: TcpStream, credential: &Credential) -> Self {
        let (mut peer, last) = Self::client_before_its_last_flight(socket, credential).await;
        peer.socket.write_all(&last).await.unwrap();
        peer
    }

    /// A client that has not sent its last flight yet, which comes along.
    pub async fn client_before_its_last_flight(socket: TcpStream, credential: &Credential) -> (Self, Vec<u8>) {
        let secrets = Arc::<Secrets>::default();
        let mut config = rustls::ClientConfig::clone(&credential.client_config());
        config.key_log = secrets.clone();
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        Self::shake(socket, connection.into(), &secrets, ["CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"]).await
    }

    pub async fn server(socket: TcpStream, credential: &Credential) -> Self {
        let secrets = Arc::<Secrets>::default();
        let mut config = rustls::ServerConfig::clone(&credential.server_config());
        config.key_log = secrets.clone();
        let connection = ServerConnection::new(Arc::new(config)).unwrap();
        let (peer, last) = Self::shake(socket, connection.into(), &secrets, ["SERVER_TRAFFIC_SECRET_0", "CLIENT_TRAFFIC_SECRET_0"]).await;
        assert!(last.is_empty());
        peer
    }

    /// Reads record by record, so that rustls never sees one of those behind the handshake.
    async fn shake(mut socket: TcpStream, mut connection: Connection, secrets: &Secrets, [send, receive]: [&str; 2]) -> (Self, Vec<u8>) {
        loop {
            let mut flight = Vec::new();
            while connection.wants_write() {
                connection.write_tls(&mut flight).unwrap();
            }
            if !connection.is_handshaking() {
                let suite = connection.negotiated_cipher_suite().unwrap().suite();
                let secrets = secrets.0.lock().unwrap();
                let half = |label: &str| Half::new(suite, secrets[label].clone());
                let empty = Vec::new;
                let peer = Self {
                    socket,
                    send: half(send),
                    receive: half(receive),
                    padding: 0,
                    alerts: Vec::new(),
                    updates: Vec::new(),
                    longest: 0,
                    input: empty(),
                    plaintext: empty(),
                    output: empty(),
                    over: false,
                };
                return (peer, flight);
            }
            socket.write_all(&flight).await.unwrap();
            let mut record = vec![0; 5];
            socket.read_exact(&mut record).await.unwrap();
            record.resize(5 + usize::from(u16::from_be_bytes([record[3], record[4]])), 0);
            socket.read_exact(&mut record[5..]).await.unwrap();
            connection.read_tls(&mut &record[..]).unwrap();
            connection.process_new_packets().unwrap();
        }
    }

    /// Puts bytes on the wire as they are.
    pub async fn write_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes).await
    }

    /// Sends one record.
    pub async fn record(&mut self, kind: u8, content: &[u8]) {
        let record = self.send.seal(kind, content, 0);
        self.write_raw(&record).await.unwrap();
    }

    /// Sends a KeyUpdate and moves on to the next key.
    pub async fn update_key(&mut self, asked: u8) {
        self.record(HANDSHAKE, &key_update(asked)).await;
        self.send.update();
    }

    fn take_record(&mut self, mut record: Vec<u8>) {
        let before = self.receive.sequence;
        let (kind, content) = self.receive.open(&mut record);
        assert!(content.len() <= 1 << 14);
        self.longest = self.longest.max(content.len());
        match (kind, &content[..]) {
            (APPLICATION_DATA, _) => self.plaintext.extend_from_slice(&content),
            (ALERT, [level, description]) => self.alerts.push((*level, *description)),
            (HANDSHAKE, [24, 0, 0, 1, asked]) => {
                self.updates.push((*asked, before));
                self.receive.update();
            }
            _ => panic!("record of kind {kind}: {content:?}"),
        }
    }
}

impl AsyncRead for RawTls {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.plaintext.is_empty() {
                let count = this.plaintext.len().min(buffer.remaining());
                buffer.put_slice(&this.plaintext[..count]);
                this.plaintext.drain(..count);
                return Poll::Ready(Ok(()));
            }
            if let Some(header) = this.input.get(..5) {
                let length = 5 + usize::from(u16::from_be_bytes([header[3], header[4]]));
                if this.input.len() >= length {
                    let rest = this.input.split_off(length);
                    let record = std::mem::replace(&mut this.input, rest);
                    this.take_record(record);
                    continue;
                }
            }
            if this.over {
                return Poll::Ready(Ok(()));
            }
            let mut bytes = [0; 64 << 10];
            let mut room = ReadBuf::new(&mut bytes);
            // A reset is an end like any other; what came before it counts.
            let outcome = ready!(Pin::new(&mut this.socket).poll_read(context, &mut room));
            this.over = outcome.is_err() || room.filled().is_empty();
            this.input.extend_from_slice(room.filled());
        }
    }
}

impl AsyncWrite for RawTls {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut *this).poll_flush(context))?;
        let count = bytes.len().min((1 << 14) - this.padding);
        this.output = this.send.seal(APPLICATION_DATA, &bytes[..count], this.padding);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while !this.output.is_empty() {
            let written = ready!(Pin::new(&mut this.socket).poll_write(context, &this.output))?;
            this.output.drain(..written);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut *this).poll_flush(context))?;
        Pin::new(&mut this.socket).poll_shutdown(context)
    }
}
