//! HTTP/1.1 for small pages, on a budget: every number that a client can reach has a bound.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{Id, JoinSet};

use crate::telemetry::limited;

/// Time for a whole request header, and for the next one on a connection that is kept (reference, dataplane §10.2).
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a request header (reference, dataplane §10.2).
const HEADER_BYTES: usize = 8 * 1024;
/// Connections at once; at most 16 KiB each beside the page that they are sent.
const CONNECTIONS: usize = 256;
/// A connection is asked to end after this long, whatever it does ...
const CONNECTION_TIME: Duration = Duration::from_secs(60);
/// ... and may take this long to read the answer that it is being sent.
const LAST_ANSWER: Duration = Duration::from_secs(30);
/// How long answers may take after the shutdown was signalled. The answer to /quitquitquit is one of them.
const SHUTDOWN_TIME: Duration = Duration::from_secs(1);
/// How long a request waits for room for its page.
const PAGE_WAIT: Duration = Duration::from_secs(2);
/// Pause after a failed accept (design §9: 1 ms–1 s).
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));

pub(super) type Answer = Response<Full<Bytes>>;

/// Accepts until `shutdown`, then lets running answers finish and returns within about a second. One source may hold `per_source`
/// connections.
pub(super) async fn serve<H, F>(listener: TcpListener, per_source: usize, handler: H, shutdown: impl Future<Output = ()>)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let (stop, stopped) = watch::channel(());
    let mut tasks: JoinSet<()> = JoinSet::new();
    let mut sources: HashMap<Id, IpAddr> = HashMap::new();
    let mut pause = PAUSES.0;
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = tasks.join_next_with_id() => {
                sources.remove(&ended.map_or_else(|error| error.id(), |(id, ())| id));
                continue;
            }
            accepted = accept(&listener, &mut pause) => accepted,
        };
        let Some((stream, peer)) = accepted else { continue };
        let peer = peer.ip().to_canonical();
        let held = sources.values().filter(|source| **source == peer).count();
        if tasks.len() >= CONNECTIONS || held >= per_source {
            limited!(debug, "admin connection limit", source = %peer, "connection refused: too many are open");
            continue;
        }
        let task = tasks.spawn(connection(stream, handler.clone(), stopped.clone()));
        sources.insert(task.id(), peer);
    }
    drop(listener);
    drop(stop);
    // What has not ended by then is cut off with the set.
    let _ = tokio::time::timeout(SHUTDOWN_TIME, async { while tasks.join_next().await.is_some() {} }).await;
}

/// One accept; after an error (no descriptors, usually) it pauses, longer each time.
async fn accept(listener: &TcpListener, pause: &mut Duration) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => {
            *pause = PAUSES.0;
            Some(accepted)
        }
        Err(error) => {
            limited!(warn, "failed to accept", %error, "cannot accept an admin, readiness or metrics connection");
            tokio::time::sleep(*pause).await;
            *pause = (*pause * 2).min(PAUSES.1);
            None
        }
    }
}

async fn connection<H, F>(stream: TcpStream, handler: H, mut stopped: watch::Receiver<()>)
where
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Answer>,
{
    let service = service_fn(move |request| {
        let answer = handler(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(HEADER_BYTES);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        // How a scraper ends its connection is nobody's concern.
        _ = connection.as_mut() => return,
        _ = stopped.changed() => {}
        () = tokio::time::sleep(CONNECTION_TIME) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
}

/// An answer in plain text.
pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    typed(status, "text/plain; charset=utf-8", body)
}

/// An answer of a given content type, which no browser may guess differently.
pub(super) fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

pub(super) fn not_found() -> Answer {
    text(StatusCode::NOT_FOUND, "not found\n")
}

/// 405 with what would be allowed.
pub(super) fn wrong_method(allowed: &Method, body: impl Into<Bytes>) -> Answer {
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, body);
    if let Ok(allowed) = HeaderValue::from_str(allowed.as_str()) {
        answer.headers_mut().insert(header::ALLOW, allowed);
    }
    answer
}

/// Room for large pages. A page takes its place until its last byte has left for the client, so readers that stop reading
/// cannot fill the memory.
#[derive(Debug, Clone)]
pub(super) struct Pages {
    places: Arc<Semaphore>,
}

/// A page and its place.
struct Placed {
    page: String,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Placed {
    fn as_ref(&self) -> &[u8] {
        self.page.as_bytes()
    }
}

impl Pages {
    pub(super) fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)) }
    }

    /// Makes a page on a thread that may take its time. `Err` is the answer to send instead.
    pub(super) async fn make<E: std::fmt::Display + Send + 'static>(
        &self,
        make: impl FnOnce() -> Result<String, E> + Send + 'static,
    ) -> Result<Bytes, Answer> {
        let place = tokio::time::timeout(PAGE_WAIT, Arc::clone(&self.places).acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(text(StatusCode::SERVICE_UNAVAILABLE, "too many pages are being read\n"));
        };
        match tokio::task::spawn_blocking(make).await {
            Ok(Ok(page)) => Ok(Bytes::from_owner(Placed { page, _place: place })),
            Ok(Err(error)) => Err(text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))),
            Err(_) => Err(text(StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made\n")),
        }
    }
}
