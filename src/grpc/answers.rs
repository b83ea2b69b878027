//! The answers of a streaming call.
//!
//! tonic's own reader keeps the memory of the largest answer as long as the stream lives, and the first answer of a control plane is the whole
//! mesh. This one gives it back.

use std::marker::PhantomData;

use bytes::{Buf, Bytes, BytesMut};
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prost::Message;
use tonic::Status;

/// Compressed flag and length.
const PREFIX: usize = 5;
/// Beyond this, memory is taken only as the message comes: a length alone must not cost anything.
const FIRST_ROOM: usize = 1 << 20;

/// Messages as they come. Dropping it ends the call.
#[derive(Debug)]
pub struct Answers<A> {
    body: Incoming,
    received: BytesMut,
    /// Bytes of the message that is coming.
    expected: Option<usize>,
    limit: usize,
    /// How the call ended.
    end: Option<Option<Status>>,
    kind: PhantomData<fn() -> A>,
}

impl<A: Message + Default> Answers<A> {
    /// Reads what follows the headers of an answer; an error if they say that nothing does.
    pub(super) fn new(response: Response<Incoming>, limit: usize) -> Result<Self, Status> {
        if let Some(status) = Status::from_header_map(response.headers()).filter(|status| status.code() != tonic::Code::Ok) {
            return Err(status);
        }
        if response.status() != StatusCode::OK {
            return Err(Status::unknown(format!("the server answered with HTTP status {}", response.status())));
        }
        let body = response.into_body();
        Ok(Self { body, received: BytesMut::new(), expected: None, limit, end: None, kind: PhantomData })
    }

    /// The next message; `None` at a good end. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// The server's status; `Unknown` for a connection that broke, `OutOfRange` for a message over the limit, `Internal` for one that is none.
    pub async fn message(&mut self) -> Result<Option<A>, Status> {
        loop {
            if let Some(message) = self.taken()? {
                return Ok(Some(message));
            }
            if let Some(end) = &self.end {
                return end.clone().map_or(Ok(None), Err);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.received.extend_from_slice(&data),
                    Err(frame) => {
                        let status = frame.trailers_ref().and_then(Status::from_header_map);
                        self.end = Some(status.filter(|status| status.code() != tonic::Code::Ok));
                    }
                },
                Some(Err(error)) => self.end = Some(Some(Status::unknown(format!("the connection broke: {}", chain(&error))))),
                None if self.received.is_empty() => self.end = Some(None),
                None => self.end = Some(Some(Status::internal("the call ended within a message"))),
            }
        }
    }

    /// A message that is all there.
    fn taken(&mut self) -> Result<Option<A>, Status> {
        let length = match self.expected {
            Some(length) => length,
            None if self.received.len() < PREFIX => return Ok(None),
            None => {
                if self.received.get_u8() != 0 {
                    return Err(self.broken(Status::internal("a compressed message, which was not asked for")));
                }
                let length = self.received.get_u32() as usize;
                if length > self.limit {
                    let limit = self.limit;
                    return Err(self.broken(Status::out_of_range(format!("a message of {length} bytes; the limit is {limit}"))));
                }
                self.received.reserve(length.saturating_sub(self.received.len()).min(FIRST_ROOM));
                self.expected = Some(length);
                length
            }
        };
        if self.received.len() < length {
            return Ok(None);
        }
        self.expected = None;
        let message = self.received.split_to(length).freeze();
        if length > FIRST_ROOM {
            // What is left moves to memory of its own.
            self.received = BytesMut::from(&self.received[..]);
        }
        let decoded = A::decode(Bytes::clone(&message));
        decoded.map(Some).map_err(|error| self.broken(Status::internal(format!("not the message that was expected: {error}"))))
    }

    /// Nothing after this can be read.
    fn broken(&mut self, status: Status) -> Status {
        self.received = BytesMut::new();
        self.end = Some(Some(status.clone()));
        status
    }
}

/// An error and what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
