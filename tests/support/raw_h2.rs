//! A frame-level HTTP/2 peer (RFC 9113) over any byte stream: it writes the frames that it is told to, legal or not, and shows the frames that
//! arrive.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

#[path = "hpack.rs"]
pub mod hpack;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0x0;
pub const HEADERS: u8 = 0x1;
pub const PRIORITY: u8 = 0x2;
pub const RST_STREAM: u8 = 0x3;
pub const SETTINGS: u8 = 0x4;
pub const PUSH_PROMISE: u8 = 0x5;
pub const PING: u8 = 0x6;
pub const GOAWAY: u8 = 0x7;
pub const WINDOW_UPDATE: u8 = 0x8;
pub const CONTINUATION: u8 = 0x9;

/// END_STREAM, and ACK of SETTINGS and PING.
pub const END_STREAM: u8 = 0x1;
pub const ACK: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;
pub const PADDED: u8 = 0x8;

pub const HEADER_TABLE_SIZE: u16 = 0x1;
pub const ENABLE_PUSH: u16 = 0x2;
pub const MAX_CONCURRENT_STREAMS: u16 = 0x3;
pub const INITIAL_WINDOW_SIZE: u16 = 0x4;
pub const MAX_FRAME_SIZE: u16 = 0x5;
pub const MAX_HEADER_LIST_SIZE: u16 = 0x6;
pub const ENABLE_CONNECT_PROTOCOL: u16 = 0x8;

pub const NO_ERROR: u32 = 0x0;
pub const PROTOCOL_ERROR: u32 = 0x1;
pub const INTERNAL_ERROR: u32 = 0x2;
pub const FLOW_CONTROL_ERROR: u32 = 0x3;
pub const STREAM_CLOSED: u32 = 0x5;
pub const FRAME_SIZE_ERROR: u32 = 0x6;
pub const REFUSED_STREAM: u32 = 0x7;
pub const CANCEL: u32 = 0x8;
pub const COMPRESSION_ERROR: u32 = 0x9;
pub const CONNECT_ERROR: u32 = 0xa;
pub const ENHANCE_YOUR_CALM: u32 = 0xb;

#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = ["DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE", "CONTINUATION"];
        let name = names.get(usize::from(self.kind)).copied().unwrap_or("?");
        write!(formatter, "{name} flags={:#x} stream={} {} bytes", self.flags, self.stream, self.payload.len())?;
        let short = &self.payload[..self.payload.len().min(16)];
        write!(formatter, " {short:02x?}")
    }
}

impl Frame {
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, flags, stream, payload: payload.into() }
    }

    pub fn settings(values: &[(u16, u32)]) -> Self {
        let payload: Vec<u8> = values.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()[..]].concat()).collect();
        Self::new(SETTINGS, 0, 0, payload)
    }

    pub fn settings_ack() -> Self {
        Self::new(SETTINGS, ACK, 0, [])
    }

    /// HEADERS with the whole block in one frame.
    pub fn headers(stream: u32, block: impl Into<Vec<u8>>) -> Self {
        Self::new(HEADERS, END_HEADERS, stream, block)
    }

    /// An ordinary CONNECT.
    pub fn connect(stream: u32, authority: &str) -> Self {
        Self::headers(stream, hpack::block(&[(":method", "CONNECT"), (":authority", authority)]))
    }

    /// An answer.
    pub fn status(stream: u32, status: &str) -> Self {
        Self::headers(stream, hpack::block(&[(":status", status)]))
    }

    pub fn data(stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self::new(DATA, 0, stream, payload)
    }

    pub fn padded_data(stream: u32, payload: &[u8], padding: u8) -> Self {
        let payload = [&[padding][..], payload, &vec![0; usize::from(padding)][..]].concat();
        Self::new(DATA, PADDED, stream, payload)
    }

    pub fn reset(stream: u32, code: u32) -> Self {
        Self::new(RST_STREAM, 0, stream, code.to_be_bytes())
    }

    pub fn ping(payload: [u8; 8]) -> Self {
        Self::new(PING, 0, 0, payload)
    }

    pub fn goaway(last: u32, code: u32) -> Self {
        Self::new(GOAWAY, 0, 0, [last.to_be_bytes(), code.to_be_bytes()].concat())
    }

    pub fn window_update(stream: u32, increment: u32) -> Self {
        Self::new(WINDOW_UPDATE, 0, stream, increment.to_be_bytes())
    }

    /// With END_STREAM.
    pub fn ends(mut self) -> Self {
        self.flags |= END_STREAM;
        self
    }

    pub fn end_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    pub fn is_ack(&self) -> bool {
        matches!(self.kind, SETTINGS | PING) && self.flags & ACK != 0
    }

    /// The error code of RST_STREAM or GOAWAY.
    pub fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    /// The last stream of a GOAWAY, or the increment of a WINDOW_UPDATE.
    pub fn number(&self) -> u32 {
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }

    /// The settings of a SETTINGS.
    pub fn values(&self) -> Vec<(u16, u32)> {
        let value = |six: &[u8]| (u16::from_be_bytes(six[..2].try_into().unwrap()), u32::from_be_bytes(six[2..].try_into().unwrap()));
        self.payload.chunks(6).map(value).collect()
    }

    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[self.kind, self.flags], &self.stream.to_be_bytes(), &self.payload].concat()
    }
}

/// One end of a connection. Dropping it closes the stream.
pub struct RawPeer<S> {
    pub io: S,
    inbox: Vec<u8>,
    decoder: hpack::Decoder,
    /// What [`RawPeer::next`] answered or passed over.
    pub passed_over: Vec<Frame>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> RawPeer<S> {
    /// Says nothing yet.
    pub fn silent(io: S) -> Self {
        Self { io, inbox: Vec::new(), decoder: hpack::Decoder::default(), passed_over: Vec::new() }
    }

    /// Sends the preface and these settings.
    pub async fn client(io: S, settings: &[(u16, u32)]) -> Self {
        let mut peer = Self::silent(io);
        let hello = [PREFACE, &Frame::settings(settings).encode()].concat();
        peer.send_bytes(&hello).await.unwrap();
        peer
    }

    /// Reads the preface and sends these settings.
    pub async fn server(io: S, settings: &[(u16, u32)]) -> Self {
        let mut peer = Self::silent(io);
        let mut preface = [0; PREFACE.len()];
        peer.io.read_exact(&mut preface).await.unwrap();
        assert_eq!(preface, PREFACE);
        peer.send(&Frame::settings(settings)).await;
        peer
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }

    pub async fn send(&mut self, frame: &Frame) {
        self.send_bytes(&frame.encode()).await.unwrap();
    }

    /// Sends all in one write.
    pub async fn send_all(&mut self, frames: &[Frame]) {
        self.try_send_all(frames).await.unwrap();
    }

    /// The same, to a peer that may be gone.
    pub async fn try_send_all(&mut self, frames: &[Frame]) -> io::Result<()> {
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        self.send_bytes(&bytes).await
    }

    /// The next frame of whatever kind; `None` when the connection is closed. May be dropped and called again.
    pub async fn receive(&mut self) -> Option<Frame> {
        loop {
            if let Some(head) = self.inbox.get(..9) {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                if self.inbox.len() >= 9 + length {
                    let rest = self.inbox.split_off(9 + length);
                    let frame = std::mem::replace(&mut self.inbox, rest);
                    let stream = u32::from_be_bytes(frame[5..9].try_into().unwrap()) & 0x7fff_ffff;
                    return Some(Frame::new(frame[3], frame[4], stream, &frame[9..]));
                }
            }
            self.inbox.reserve(16 << 10);
            match self.io.read_buf(&mut self.inbox).await {
                Ok(read) if read > 0 => {}
                _ => return None,
            }
        }
    }

    /// The next frame that is not housekeeping: SETTINGS and PING are answered, they and WINDOW_UPDATE passed over.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            let frame = self.receive().await?;
            match frame.kind {
                // A connection that is closing need not take the answer.
                SETTINGS if !frame.is_ack() => drop(self.try_send_all(&[Frame::settings_ack()]).await),
                PING if !frame.is_ack() => drop(self.try_send_all(&[Frame::new(PING, ACK, 0, frame.payload.clone())]).await),
                SETTINGS | PING | WINDOW_UPDATE => {}
                _ => return Some(frame),
            }
            self.passed_over.push(frame);
        }
    }

    /// The next frame, which must be one of a stream and a kind.
    pub async fn expect(&mut self, kind: u8, stream: u32) -> Frame {
        let frame = self.next().await;
        match frame {
            Some(frame) if frame.kind == kind && frame.stream == stream => frame,
            other => panic!("expected kind {kind} on stream {stream}, got {other:?}"),
        }
    }

    /// Reads HEADERS of a stream and decodes them.
    pub async fn expect_headers(&mut self, stream: u32) -> Vec<(String, String)> {
        let frame = self.expect(HEADERS, stream).await;
        self.fields(&frame)
    }

    /// Decodes HEADERS. Every HEADERS must be decoded, in order.
    pub fn fields(&mut self, headers: &Frame) -> Vec<(String, String)> {
        assert_eq!(headers.flags & (END_HEADERS | PADDED), END_HEADERS, "the whole block in one frame");
        self.decoder.decode(&headers.payload)
    }

    /// The status of an answer.
    pub async fn expect_status(&mut self, stream: u32) -> (String, bool) {
        let frame = self.expect(HEADERS, stream).await;
        let fields = self.fields(&frame);
        (field(&fields, ":status").unwrap().to_owned(), frame.end_stream())
    }

    /// Reads DATA of one stream until its end, giving credit back; returns the bytes.
    pub async fn read_to_end(&mut self, stream: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let frame = self.expect(DATA, stream).await;
            let length = u32::try_from(frame.payload.len()).unwrap();
            bytes.extend_from_slice(&frame.payload);
            if frame.end_stream() {
                return bytes;
            }
            if length > 0 {
                self.send_all(&[Frame::window_update(0, length), Frame::window_update(stream, length)]).await;
            }
        }
    }

    /// Reads until GOAWAY and returns its code; `None` when the connection closes without one.
    pub async fn goaway_code(&mut self) -> Option<u32> {
        loop {
            let frame = self.next().await?;
            if frame.kind == GOAWAY {
                return Some(frame.code());
            }
        }
    }
}

/// The value of a field.
pub fn field<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}
