//! Calls on one HTTP/2 connection.

use std::error::Error as _;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{Stream, StreamExt};
use http::uri::PathAndQuery;
use http::{HeaderValue, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use prost::Message;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codec::{Codec, EncodeBody};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower_service::Service;

use super::answers::Answers;
use super::coalesce::Coalescing;

/// One HTTP/2 connection to a verified server. Clones share it.
#[derive(Debug, Clone)]
pub struct Connection {
    sender: SendRequest<Body>,
    origin: Uri,
    coalescing: Coalescing,
}

impl Connection {
    pub(super) fn new(sender: SendRequest<Body>, origin: Uri, coalescing: Coalescing) -> Self {
        Self { sender, origin, coalescing }
    }

    /// The switch by which what the server says is read in gulps, for who does not wait for single answers. It is off.
    #[must_use]
    pub fn coalescing(&self) -> Coalescing {
        self.coalescing.clone()
    }

    /// Whether no further call can be made on it: the server closed it, said GOAWAY, or stopped answering.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// One request, one answer of at most `limit` bytes.
    ///
    /// # Errors
    /// The server's status, or `Unavailable` and such for a connection that broke.
    pub async fn call<Q, A>(&self, path: &'static str, request: Request<Q>, limit: usize) -> Result<Response<A>, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.ready(limit).await?;
        grpc.unary(request, PathAndQuery::from_static(path), ProstCodec::<Q, A>::default()).await
    }

    /// A stream of requests for a stream of answers of at most `limit` bytes each. The call ends when `requests` ends or the answers are dropped.
    /// Servers may send nothing, not even headers, before they have read a request.
    ///
    /// # Errors
    /// As those of [`Connection::call`], until the server's headers have come.
    pub async fn stream<Q, A>(
        &self,
        path: &'static str,
        requests: Request<impl Stream<Item = Q> + Send + 'static>,
        limit: usize,
    ) -> Result<Answers<A>, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let (metadata, _, requests) = requests.into_parts();
        let encoder = ProstCodec::<Q, A>::default().encoder();
        let body = Body::new(EncodeBody::new_client(encoder, requests.map(Ok), None, None));
        let mut parts = self.origin.clone().into_parts();
        parts.path_and_query = Some(PathAndQuery::from_static(path));
        let uri = Uri::from_parts(parts).map_err(|error| Status::internal(error.to_string()))?;
        let mut request = http::Request::new(body);
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = uri;
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = metadata.into_headers();
        request.headers_mut().insert(http::header::TE, HeaderValue::from_static("trailers"));
        request.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        let mut sender = self.sender.clone();
        let closed = |error: hyper::Error| Status::unavailable(format!("the connection is closed: {error}"));
        sender.ready().await.map_err(closed)?;
        Answers::new(sender.send_request(request).await.map_err(closed)?, limit)
    }

    async fn ready(&self, limit: usize) -> Result<Grpc<Self>, Status> {
        let mut grpc = Grpc::with_origin(self.clone(), self.origin.clone()).max_decoding_message_size(limit);
        grpc.ready().await.map_err(|error| Status::unavailable(format!("the connection is closed: {error}")))?;
        Ok(grpc)
    }
}

impl Service<http::Request<Body>> for Connection {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}

/// A status in words for a log: its code, its message (which the server chose: shortened, without control characters), and what caused it.
#[must_use]
pub fn status_text(status: &Status) -> String {
    let plain = |text: &str| text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(300).collect::<String>();
    let mut text = match status.message() {
        "" => status.code().description().to_owned(),
        message => format!("{} ({})", plain(message), status.code().description()),
    };
    let mut cause = status.source();
    while let Some(error) = cause {
        let inner = plain(&error.to_string());
        if !text.contains(&inner) {
            text = format!("{text}: {inner}");
        }
        cause = error.source();
    }
    text
}
