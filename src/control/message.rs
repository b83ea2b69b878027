//! gRPC over HTTP/2 as far as a server of few calls needs it: messages cut out of a request's body within a budget of memory, and answers that
//! are written from shared pieces while the client reads them.
//!
//! tonic's own server would copy every answer whole into memory for every client before the first byte is read: 200 clients that are slow to
//! read 25 MB each would take 5 GB. Here a client takes one frame of [`FRAME`] bytes and a list of pointers.

use std::convert::Infallible;
use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, header};
use hyper::body::{Body, Frame, Incoming};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Status;

use super::subscription::{Item, Push, Upserts};
use crate::model::Text;
use crate::wire::xds::DeltaDiscoveryResponse;

/// Bytes that are copied together into one piece for HTTP/2.
const FRAME: usize = 64 << 10;

/// Messages up to this size are read without asking for room.
const SMALL: usize = 64 << 10;

/// A decoded message takes about this many times its encoded size.
const GROWTH: usize = 4;

/// A message whose first bytes have come must be whole after this time.
const ARRIVES_WITHIN: Duration = Duration::from_secs(30);

/// Tag of `DeltaDiscoveryResponse.resources`, and of `Resource.aliases`.
const RESOURCES: u32 = 2;
const ALIASES: u32 = 4;

/// Memory for the messages that all clients together are sending: large ones wait for each other instead of meeting in memory.
#[derive(Debug, Clone)]
pub(super) struct Room {
    places: Arc<Semaphore>,
    total: usize,
}

impl Room {
    /// Room for `total` bytes, and for one message at a time if it is larger.
    pub(super) fn new(total: usize) -> Self {
        // In KiB: a permit count is a u32 where it is asked for.
        let total = (total >> 10).clamp(1, Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(total)), total }
    }

    async fn take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let wanted = u32::try_from((bytes >> 10).clamp(1, self.total)).unwrap_or(u32::MAX);
        self.places.clone().acquire_many_owned(wanted).await.ok()
    }
}

/// Cuts messages out of a request's body.
#[derive(Debug)]
pub(super) struct Requests {
    body: Incoming,
    buffer: BytesMut,
    limit: usize,
    room: Room,
}

/// A message, and the room it takes while it is held.
#[derive(Debug)]
pub(super) struct Received<M> {
    pub(super) message: M,
    _room: Option<OwnedSemaphorePermit>,
}

impl Requests {
    /// The messages of a body, none larger than `limit` bytes.
    pub(super) fn new(body: Incoming, limit: usize, room: Room) -> Self {
        Self { body, buffer: BytesMut::new(), limit, room }
    }

    /// The next one; `None` at the end.
    pub(super) async fn next<M: Message + Default>(&mut self) -> Result<Option<Received<M>>, Status> {
        if !self.fill(5).await? {
            return if self.buffer.is_empty() { Ok(None) } else { Err(Status::internal("the stream ends within a message")) };
        }
        let [compressed, a, b, c, d] = *self.buffer.first_chunk::<5>().ok_or_else(|| Status::internal("no message"))?;
        if compressed != 0 {
            return Err(Status::unimplemented("messages must not be compressed"));
        }
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > self.limit {
            return Err(Status::out_of_range(format!("a message of {length} bytes is larger than the {} allowed", self.limit)));
        }
        let room = if length > SMALL { self.room.take(length.saturating_mul(GROWTH)).await } else { None };
        // Whoever holds room must use it.
        let whole = tokio::time::timeout(ARRIVES_WITHIN, self.fill(5 + length)).await;
        let whole = whole.map_err(|_| Status::deadline_exceeded(format!("a message of {length} bytes did not arrive within {ARRIVES_WITHIN:?}")))?;
        if !whole? {
            return Err(Status::internal("the stream ends within a message"));
        }
        let mut bytes = self.buffer.split_to(5 + length).freeze();
        let bytes = bytes.split_off(5);
        let message = M::decode(bytes).map_err(|error| Status::invalid_argument(format!("the message cannot be decoded: {error}")))?;
        Ok(Some(Received { message, _room: room }))
    }

    /// Reads until there are `length` bytes. `false` if the body ends before.
    async fn fill(&mut self, length: usize) -> Result<bool, Status> {
        while self.buffer.len() < length {
            let frame = std::future::poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await;
            match frame {
                None => return Ok(false),
                Some(Err(error)) => return Err(Status::cancelled(error.to_string())),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
        Ok(true)
    }
}

/// One message of an answer.
#[derive(Debug)]
pub(super) struct Outgoing {
    head: Bytes,
    items: Items,
}

#[derive(Debug)]
enum Items {
    /// A whole set, and the last name that was written.
    All(super::catalog::Set, Option<Text>),
    Some(std::vec::IntoIter<Item>),
}

impl Outgoing {
    /// A message of one piece.
    pub(super) fn single(message: &impl Message) -> Self {
        Self { head: with_prefix(message, 0), items: Items::Some(Vec::new().into_iter()) }
    }

    /// A push as a `DeltaDiscoveryResponse`.
    pub(super) fn push(push: Push, epoch: u64, nonce: u64) -> Self {
        let length = match &push.upserts {
            Upserts::All(set) => set.entries.values().map(|entry| framed(entry.body.len())).sum(),
            Upserts::Some(items) => items.iter().map(|item| framed(body_length(item))).sum(),
        };
        let head = DeltaDiscoveryResponse {
            system_version_info: epoch.to_string(),
            type_url: push.kind.type_url().to_owned(),
            nonce: nonce.to_string(),
            removed_resources: push.removed,
            resources: Vec::new(),
        };
        let items = match push.upserts {
            Upserts::All(set) => Items::All(set, None),
            Upserts::Some(items) => Items::Some(items.into_iter()),
        };
        Self { head: with_prefix(&head, length), items }
    }

    /// The next piece; `None` when all is written.
    fn piece(&mut self) -> Option<Bytes> {
        if !self.head.is_empty() {
            return Some(std::mem::take(&mut self.head));
        }
        let mut piece = BytesMut::new();
        match &mut self.items {
            Items::All(set, last) => {
                let from = last.take().map_or(Bound::Unbounded, Bound::Excluded);
                for (name, entry) in set.entries.range::<(Bound<Text>, Bound<Text>), Text>((from, Bound::Unbounded)) {
                    write(&mut piece, &entry.body, &[]);
                    *last = Some(name.clone());
                    if piece.len() >= FRAME {
                        break;
                    }
                }
            }
            Items::Some(items) => {
                while piece.len() < FRAME
                    && let Some(item) = items.next()
                {
                    write(&mut piece, &item.entry.body, &item.aliases);
                }
            }
        }
        (!piece.is_empty()).then(|| piece.freeze())
    }
}

/// The five bytes before a message, and its first part; `more` bytes of it follow.
fn with_prefix(message: &impl Message, more: usize) -> Bytes {
    let length = message.encoded_len() + more;
    let mut bytes = BytesMut::with_capacity(5 + message.encoded_len());
    bytes.put_u8(0);
    // A message of 4 GiB is never made: sessions split before 200 MiB.
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    bytes.extend_from_slice(&message.encode_to_vec());
    bytes.freeze()
}

fn body_length(item: &Item) -> usize {
    item.entry.body.len() + alias_length(&item.aliases)
}

fn alias_length(aliases: &[String]) -> usize {
    aliases.iter().map(|alias| key_len(ALIASES) + encoded_len_varint(alias.len() as u64) + alias.len()).sum()
}

/// A resource with its tag and length.
fn framed(body: usize) -> usize {
    key_len(RESOURCES) + encoded_len_varint(body as u64) + body
}

fn write(piece: &mut BytesMut, body: &[u8], aliases: &[String]) {
    encode_key(RESOURCES, WireType::LengthDelimited, piece);
    encode_varint((body.len() + alias_length(aliases)) as u64, piece);
    piece.extend_from_slice(body);
    for alias in aliases {
        encode_key(ALIASES, WireType::LengthDelimited, piece);
        encode_varint(alias.len() as u64, piece);
        piece.extend_from_slice(alias.as_bytes());
    }
}

/// What a call sends: messages, then how it ended.
#[derive(Debug)]
pub(super) enum Say {
    Message(Outgoing),
    End(Status),
}

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Answer {
    says: mpsc::Receiver<Say>,
    current: Option<Outgoing>,
    ended: bool,
}

impl Answer {
    /// An answer that is told what to say. If the other end is dropped without an end, the call ends well.
    pub(super) fn streaming() -> (mpsc::Sender<Say>, Response<Self>) {
        // One: what is sent next is worked out when the client takes it, and so may be newer and cover more.
        let (sender, says) = mpsc::channel(1);
        (sender, Self { says, current: None, ended: false }.response())
    }

    /// An answer of one message, or a refusal.
    pub(super) fn of(outcome: Result<Outgoing, Status>) -> Response<Self> {
        let (_, says) = mpsc::channel(1);
        match outcome {
            Ok(message) => Self { says, current: Some(message), ended: false }.response(),
            Err(status) => {
                let mut response = Self { says, current: None, ended: true }.response();
                put(&status, response.headers_mut());
                response
            }
        }
    }

    fn response(self) -> Response<Self> {
        let mut response = Response::new(self);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        response
    }

    fn end(&mut self, status: &Status) -> Frame<Bytes> {
        self.ended = true;
        let mut trailers = HeaderMap::new();
        put(status, &mut trailers);
        Frame::trailers(trailers)
    }
}

fn put(status: &Status, headers: &mut HeaderMap) {
    // Fails only for a message that is no header, and that is percent-encoded.
    if status.add_header(headers).is_err() {
        headers.insert(Status::GRPC_STATUS, HeaderValue::from_static("13"));
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if let Some(current) = &mut self.current {
                if let Some(piece) = current.piece() {
                    return Poll::Ready(Some(Ok(Frame::data(piece))));
                }
                self.current = None;
            }
            match self.says.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Say::Message(message))) => self.current = Some(message),
                Poll::Ready(Some(Say::End(status))) => return Poll::Ready(Some(Ok(self.end(&status)))),
                Poll::Ready(None) => return Poll::Ready(Some(Ok(self.end(&Status::new(tonic::Code::Ok, ""))))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
