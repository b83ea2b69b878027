//! A peer that speaks the tunnel's protocol byte by byte, so that it can stop, or lie, at any of them.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;

use culvert::identity::{Config, Credentials, LocalIssuer};
use culvert::lifecycle::Clock;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

/// What a client of HTTP/2 says first, and the settings that must follow.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(super) const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

const HEADERS: u8 = 1;
const END_HEADERS: u8 = 4;

/// The TLS of a good peer of the mesh whose CA is in `directory`.
pub(super) fn credential(directory: &Path, account: &str) -> Arc<ClientConfig> {
    let issuer = LocalIssuer::load(directory, Clock::system()).unwrap();
    let (credentials, renewal) = Credentials::new(Config::default(), Arc::new(issuer), Clock::system());
    let identity = format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let credential = runtime.block_on(async {
        tokio::select! {
            credential = credentials.fetch(&identity) => credential.unwrap(),
            () = renewal => panic!("the renewal ended"),
        }
    });
    credential.client_config()
}

/// The first flight of a TLS client.
pub(super) fn client_hello(config: &Arc<ClientConfig>) -> Vec<u8> {
    let mut bytes = Vec::new();
    client(config).write_tls(&mut bytes).unwrap();
    bytes
}

fn client(config: &Arc<ClientConfig>) -> ClientConnection {
    ClientConnection::new(config.clone(), IpAddr::from([127, 0, 0, 1]).into()).unwrap()
}

/// A connection to port 15008 after its TLS handshake.
pub(super) struct Tunnel(StreamOwned<ClientConnection, TcpStream>);

/// One frame of HTTP/2.
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Tunnel {
    /// TLS and nothing more.
    pub(super) fn tls(mut socket: TcpStream, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let mut connection = client(config);
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        // The last flight may still wait to be written.
        while connection.wants_write() {
            connection.write_tls(&mut socket)?;
        }
        Ok(Self(StreamOwned::new(connection, socket)))
    }

    /// The whole handshake, on both sides: the server has answered with its settings, and has taken ours.
    pub(super) fn open(socket: TcpStream, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let mut tunnel = Self::tls(socket, config)?;
        tunnel.send(PREFACE)?;
        tunnel.send(SETTINGS)?;
        let first = tunnel.frame()?;
        if first.kind != 4 {
            return Err(io::Error::other(format!("a frame of kind {} instead of SETTINGS", first.kind)));
        }
        loop {
            let frame = tunnel.frame()?;
            // The acknowledgement is the empty one.
            if frame.kind == 4 && frame.payload.is_empty() {
                return Ok(tunnel);
            }
        }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)?;
        self.0.flush()
    }

    pub(super) fn socket(&self) -> &TcpStream {
        self.0.get_ref()
    }

    /// Sends a CONNECT with these bytes as they are, proper or not.
    pub(super) fn connect(&mut self, stream: u32, authority: &[u8], headers: &[(&[u8], &[u8])]) -> io::Result<()> {
        let mut block = Vec::new();
        let method: (&[u8], &[u8]) = (b":method", b"CONNECT");
        for (name, value) in [method, (b":authority", authority)].iter().chain(headers) {
            // A literal that is not indexed, with a new name, without Huffman coding (RFC 7541 §6.2.2).
            block.push(0);
            for text in [name, value] {
                push_length(&mut block, text.len());
                block.extend_from_slice(text);
            }
        }
        let length = u32::try_from(block.len()).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], HEADERS, END_HEADERS];
        frame.extend(stream.to_be_bytes());
        frame.extend(block);
        self.send(&frame)
    }

    pub(super) fn frame(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head)?;
        let [a, b, c, kind, _, s @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.0.read_exact(&mut payload)?;
        Ok(Frame { kind, stream: u32::from_be_bytes(s), payload })
    }

    /// The first frame on a stream, past those about the connection; an error when the connection ended instead.
    pub(super) fn answer(&mut self, stream: u32) -> io::Result<Frame> {
        loop {
            let frame = self.frame()?;
            if frame.stream == stream {
                return Ok(frame);
            }
            if frame.kind == 7 {
                return Err(io::Error::other("GOAWAY"));
            }
        }
    }

    /// Reads until the connection ends, whatever comes.
    pub(super) fn drain(&mut self) {
        while matches!(self.0.read(&mut [0; 4096]), Ok(1..)) {}
    }
}

/// An integer with a prefix of seven bits (RFC 7541 §5.1).
fn push_length(block: &mut Vec<u8>, length: usize) {
    if length < 127 {
        block.push(length as u8);
        return;
    }
    block.push(127);
    let mut rest = length - 127;
    while rest >= 128 {
        block.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    block.push(rest as u8);
}
