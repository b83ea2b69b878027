//! The answers of a streaming call.
//!
//! tonic's own reader gathers an answer in one piece of memory, which it keeps as long as the stream lives, and the first answer of a control
//! plane is the whole mesh. This one leaves an answer in the pieces in which it came, and they go with what was decoded of them.

use std::marker::PhantomData;

use bytes::Buf;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prost::Message;
use tonic::{Code, Status};

use super::pieces::Pieces;

/// Compressed flag and length.
const PREFIX: usize = 5;

/// Messages as they come. Dropping it ends the call.
#[derive(Debug)]
pub struct Answers<A> {
    body: Incoming,
    received: Pieces,
    /// Bytes of the message that is coming.
    expected: Option<usize>,
    limit: usize,
    /// How the call ended.
    end: Option<Option<Status>>,
    kind: PhantomData<fn() -> A>,
}

impl<A: Message + Default> Answers<A> {
    /// Reads what follows the headers of an answer; an error if they say that nothing does, or that it is not gRPC.
    pub(super) fn new(response: Response<Incoming>, limit: usize) -> Result<Self, Status> {
        // A call that ends before it began has its status in the headers, whatever HTTP's is.
        let end = match Status::from_header_map(response.headers()) {
            Some(status) if status.code() != Code::Ok => return Err(status),
            Some(_) => Some(None),
            None => None,
        };
        if response.status() != StatusCode::OK {
            let text = format!("the server answered with HTTP status {}", response.status());
            return Err(Status::new(meaning(response.status()), text));
        }
        let content = response.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        if !content.starts_with(b"application/grpc") {
            return Err(Status::unknown(format!(
                "the server does not answer with gRPC, but with content of type {:?}",
                content.escape_ascii().to_string()
            )));
        }
        let body = response.into_body();
        Ok(Self { body, received: Pieces::default(), expected: None, limit, end, kind: PhantomData })
    }

    /// The next message; `None` at a good end. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// The server's status; `Unknown` for a connection that broke or a call that ended without a status, `OutOfRange` for a message over the limit,
    /// `Internal` for one that is none or not whole.
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
                    Ok(data) => self.received.push(data),
                    Err(frame) => self.end = Some(self.ended(frame.trailers_ref().and_then(Status::from_header_map))),
                },
                Some(Err(error)) => self.end = Some(Some(Status::unknown(format!("the connection broke: {}", chain(&error))))),
                None => self.end = Some(self.ended(None)),
            }
        }
    }

    /// What the end of the answers means.
    fn ended(&self, status: Option<Status>) -> Option<Status> {
        match status {
            Some(status) if status.code() != Code::Ok => Some(status),
            _ if self.expected.is_some() || self.received.has_remaining() => Some(Status::internal("the call ended within a message")),
            Some(_) => None,
            None => Some(Status::unknown("the call ended without a status")),
        }
    }

    /// A message that is all there.
    fn taken(&mut self) -> Result<Option<A>, Status> {
        let length = match self.expected {
            Some(length) => length,
            None if self.received.remaining() < PREFIX => return Ok(None),
            None => {
                if self.received.get_u8() != 0 {
                    return Err(self.broken(Status::internal("a compressed message, which was not asked for")));
                }
                let length = self.received.get_u32() as usize;
                if length > self.limit {
                    let limit = self.limit;
                    return Err(self.broken(Status::out_of_range(format!("a message of {length} bytes; the limit is {limit}"))));
                }
                self.expected = Some(length);
                length
            }
        };
        if self.received.remaining() < length {
            return Ok(None);
        }
        self.expected = None;
        let decoded = A::decode((&mut self.received).take(length));
        decoded.map(Some).map_err(|error| self.broken(Status::internal(format!("not the message that was expected: {error}"))))
    }

    /// Nothing after this can be read.
    fn broken(&mut self, status: Status) -> Status {
        self.received = Pieces::default();
        self.end = Some(Some(status.clone()));
        status
    }
}

/// What an HTTP status means for a call of which nothing else is known: it came from something in between (gRPC, "HTTP to gRPC status code mapping").
fn meaning(status: StatusCode) -> Code {
    match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502..=504 => Code::Unavailable,
        _ => Code::Unknown,
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

#[cfg(test)]
mod tests;
