//! The life of the client: one stream after another (reference, dataplane §5.3–5.7).

use std::time::Duration;

use futures_util::{FutureExt, stream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status};

use super::apply::{Applied, Applier};
use super::demand::{Demand, News};
use super::{Config, Kind};
use crate::grpc::{self, Answers, Coalescing, status_text};
use crate::lifecycle::Backoff;
use crate::telemetry::limited;
use crate::wire::xds::{DELTA_METHOD, DeltaDiscoveryRequest, EncodedPush, WILDCARD};

/// Longest message (reference, dataplane §5.3).
const MAX_MESSAGE: usize = 200 << 20;
/// Requests that the connection has not taken yet.
const REQUESTS: usize = 16;
/// A stream on which nothing has come for this long since it was opened is given up. istiod answers every first request, if only with nothing.
const FIRST_ANSWER: Duration = Duration::from_secs(120);
/// A server that does not read our requests for this long does not live, whatever its HTTP/2 says.
const SEND_LIMIT: Duration = Duration::from_secs(30);
/// A stream that lived so long was a good one: the next is opened at once.
const GOOD_LIFE: Duration = Duration::from_secs(1);
/// Pushes of more resources than this are applied on a thread of their own.
const LARGE_PUSH: usize = 256;
/// So many pushes that come together are published together.
const TOGETHER: usize = 16;
/// Larger requests may be more than a gRPC server takes; the default limit of servers in Go is 4 MiB.
const LARGE_REQUEST: usize = 4 << 20;

/// Why a stream ended.
#[derive(Debug)]
enum End {
    /// There was none.
    Unopened(grpc::Error),
    /// The server ended it well.
    Complete,
    /// The server ended it with a status, or the connection broke.
    Status(Status),
    /// Nobody reads the mesh any more.
    Abandoned,
}

impl End {
    /// The label of the metric (reference, dataplane §5.7).
    fn reason(&self) -> &'static str {
        match self {
            Self::Unopened(grpc::Error::Unreachable { .. } | grpc::Error::Untrusted { .. }) => "ConnectionError",
            Self::Unopened(_) => "Error",
            Self::Complete | Self::Abandoned => "Complete",
            Self::Status(status) if is_transport(status) => "Reconnect",
            Self::Status(_) => "Error",
        }
    }
}

/// Whether a status says no more than that the connection is gone.
fn is_transport(status: &Status) -> bool {
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => true,
        Code::Unavailable => ["transport is closing", "received prior goaway"].iter().any(|words| status.message().contains(words)),
        _ => false,
    }
}

pub(super) struct Client {
    config: Config,
    /// Away only while a large push is applied.
    applier: Option<Applier>,
    demand: Option<Demand>,
    synced: watch::Sender<bool>,
    /// Names that were answered for, before there is a world to look them up in.
    early: (Vec<String>, Vec<String>),
    /// The server refuses requests with all our versions: the next stream says nothing of what we have, and takes the first push for all there is.
    forgetful: bool,
}

impl Client {
    pub(super) fn new(config: Config, applier: Applier, demand: Option<Demand>, synced: watch::Sender<bool>) -> Self {
        Self { config, applier: Some(applier), demand, synced, early: Default::default(), forgetful: false }
    }

    /// Opens streams until nobody reads the mesh any more.
    pub(super) async fn run(mut self) {
        let Some(abandoned) = self.applier.as_ref().map(|applier| applier.publisher().abandonment()) else { return };
        let mut abandoned = std::pin::pin!(abandoned);
        let backoff: Backoff = self.config.backoff.clone();
        let mut waits = backoff.clone();
        loop {
            let begun = Instant::now();
            let mut life = Life::default();
            let end = tokio::select! {
                () = &mut abandoned => End::Abandoned,
                end = self.stream(&mut life) => end,
            };
            self.config.stats.streaming(false);
            if let Some(demand) = &self.demand {
                demand.end();
            }
            if matches!(end, End::Abandoned) || self.applier.is_none() {
                return;
            }
            self.config.stats.terminated(end.reason());
            self.forgetful = matches!(&end, End::Status(status) if refuses_large(status) && life.request > LARGE_REQUEST);
            // A server that takes connections only to end them must not be called in a loop.
            if life.answered && begun.elapsed() >= GOOD_LIFE && matches!(end.reason(), "Complete" | "Reconnect") {
                waits = backoff.clone();
            }
            let wait = waits.next_delay();
            self.report(&end, wait);
            tokio::select! {
                () = &mut abandoned => return,
                () = sleep(wait) => {}
            }
        }
    }

    fn report(&self, end: &End, wait: Duration) {
        let server = self.config.dialer.address();
        match end {
            End::Unopened(error) => limited!(warn, "no xDS stream", %error, ?wait, "no xDS stream; what is known of the mesh stays as it is"),
            End::Status(status) if end.reason() == "Error" => {
                limited!(warn, "xDS stream refused", %server, error = status_text(status), ?wait, "the control plane refused the xDS stream");
            }
            End::Status(status) => {
                limited!(info, "xDS stream ended", %server, reason = status_text(status), ?wait, "xDS stream ended, opening the next");
            }
            End::Complete | End::Abandoned => limited!(info, "xDS stream completed", %server, ?wait, "xDS stream completed, opening the next"),
        }
    }

    /// One stream, from the dial to its end.
    async fn stream(&mut self, life: &mut Life) -> End {
        match self.open(life).await {
            Err(end) => end,
            Ok((answers, requests, coalescing)) => {
                life.coalescing = coalescing;
                tracing::info!(server = %self.config.dialer.address(), "xDS stream open");
                self.config.stats.streaming(true);
                match self.serve(answers, requests, life).await {
                    Ok(()) => End::Complete,
                    Err(status) => End::Status(status),
                }
            }
        }
    }

    async fn open(&mut self, life: &mut Life) -> Result<(Answers<EncodedPush>, mpsc::Sender<DeltaDiscoveryRequest>, Coalescing), End> {
        let dialer = &self.config.dialer;
        let roots = dialer.roots().await.map_err(End::Unopened)?;
        let metadata = dialer.metadata().await.map_err(End::Unopened)?;
        let connection = dialer.dial(&roots).await.map_err(End::Unopened)?;
        let (sender, receiver) = mpsc::channel(REQUESTS);
        for kind in Kind::ALL {
            let request = self.first_request(kind);
            life.request = life.request.max(prost::Message::encoded_len(&request));
            // There is room for both.
            let _ = sender.try_send(request);
        }
        let outgoing = stream::unfold(receiver, |mut receiver: mpsc::Receiver<_>| async { receiver.recv().await.map(|request| (request, receiver)) });
        let mut request = Request::new(outgoing);
        *request.metadata_mut() = metadata;
        let opened = timeout(FIRST_ANSWER, connection.stream(DELTA_METHOD, request, MAX_MESSAGE)).await;
        let answers = opened.unwrap_or_else(|_| Err(silent())).map_err(End::Status)?;
        Ok((answers, sender, connection.coalescing()))
    }

    /// The first request of a type on a stream (reference, dataplane §5.5).
    fn first_request(&self, kind: Kind) -> DeltaDiscoveryRequest {
        let mut request = DeltaDiscoveryRequest {
            node: Some(self.config.identity.node()),
            type_url: kind.type_url().to_owned(),
            ..DeltaDiscoveryRequest::default()
        };
        let asked = self.demand.as_ref().filter(|_| kind == Kind::Address).map(Demand::begin);
        if !self.forgetful || asked.is_some() {
            request.initial_resource_versions = self.applier.iter().flat_map(|applier| applier.held(kind)).collect();
        }
        if let Some(names) = asked {
            // Subscribing to everything and giving it up again is how one subscribes to nothing.
            request.resource_names_subscribe.push(WILDCARD.to_owned());
            request.resource_names_unsubscribe.push(WILDCARD.to_owned());
            for name in names {
                request.initial_resource_versions.entry(name.to_string()).or_default();
                request.resource_names_subscribe.push(name.to_string());
            }
        }
        request
    }

    async fn serve(
        &mut self,
        mut answers: Answers<EncodedPush>,
        requests: mpsc::Sender<DeltaDiscoveryRequest>,
        life: &mut Life,
    ) -> Result<(), Status> {
        let demand = self.demand.clone();
        let opened = Instant::now();
        loop {
            let news = async {
                match &demand {
                    Some(demand) => demand.news().await,
                    None => std::future::pending().await,
                }
            };
            let silence = async {
                if life.answered {
                    std::future::pending().await
                } else {
                    tokio::time::sleep_until(opened + FIRST_ANSWER).await;
                }
            };
            let push = tokio::select! {
                push = answers.message() => match push? {
                    Some(push) => push,
                    None => return Ok(()),
                },
                news = news => {
                    for request in requests_for(news) {
                        send(&requests, request).await?;
                    }
                    continue;
                }
                () = silence => return Err(silent()),
            };
            life.answered = true;
            let end = self.gather(push, &mut answers, life).await;
            self.publish().await?;
            for answer in life.answers.drain(..) {
                send(&requests, answer).await?;
            }
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Draws a push, and what has come with it already: all of it is one world. Says how the stream ended, if it did.
    async fn gather(&mut self, push: EncodedPush, answers: &mut Answers<EncodedPush>, life: &mut Life) -> Option<Result<(), Status>> {
        let mut next = push;
        loop {
            if let Err(error) = self.draw(next, life).await {
                return Some(Err(error));
            }
            if life.answers.len() >= TOGETHER {
                return None;
            }
            next = match answers.message().now_or_never()? {
                Ok(Some(push)) => push,
                Ok(None) => return Some(Ok(())),
                Err(error) => return Some(Err(error)),
            };
        }
    }

    /// Applies a push to the world that is published next. The stream cannot go on if that fails; if it panicked, there is no world to go on with
    /// either.
    async fn draw(&mut self, push: EncodedPush, life: &mut Life) -> Result<(), Status> {
        let kind = Kind::of(&push.type_url);
        let mut answer =
            DeltaDiscoveryRequest { type_url: push.type_url.clone(), response_nonce: push.nonce.clone(), ..DeltaDiscoveryRequest::default() };
        if let Some(kind) = kind {
            let whole = self.forgetful && self.demand.is_none() && !life.heard.contains(&kind);
            let asked = kind == Kind::Address && self.demand.as_ref().is_some_and(|demand| !demand.is_empty());
            let large = whole || push.resources.len() + push.removed_resources.len() > LARGE_PUSH;
            let drawn = self.work(large, move |applier| applier.draw(kind, push, whole, asked)).await?;
            let applied = drawn.map_err(|error| Status::internal(format!("not the message that was expected: {error}")))?;
            self.note(kind, &applied);
            life.hear(kind, self.demand.is_some());
            answer.error_detail = applied.error_detail();
        } else {
            self.config.stats.push(None, 0, 0);
            limited!(warn, "unknown xDS types", type_url = super::rows::shown(&push.type_url), "a push of a type that was not asked for");
        }
        life.answers.push(answer);
        Ok(())
    }

    /// Publishes what was drawn, and tells who asked for it.
    async fn publish(&mut self) -> Result<(), Status> {
        let slow = self.applier.as_ref().is_some_and(Applier::is_slow);
        self.work(slow, |applier| applier.publish()).await?;
        if self.applier.as_ref().is_some_and(Applier::is_synced) {
            self.synced.send_if_modified(|synced| !std::mem::replace(synced, true));
            if let Some(demand) = &self.demand {
                demand.answered(&self.early.0, &self.early.1);
            }
            self.early = Default::default();
        }
        Ok(())
    }

    /// Lets the applier do something, on a thread of its own if that is `long`: this one has other work that must not wait.
    async fn work<T: Send + 'static>(&mut self, long: bool, work: impl FnOnce(&mut Applier) -> T + Send + 'static) -> Result<T, Status> {
        let failed = || Status::internal("applying a push failed");
        let mut applier = self.applier.take().ok_or_else(failed)?;
        let work = move || {
            let done = work(&mut applier);
            (applier, done)
        };
        let (applier, done) = if long { tokio::task::spawn_blocking(work).await.map_err(|_| failed())? } else { work() };
        self.applier = Some(applier);
        Ok(done)
    }

    /// Counts what a push brought, and keeps the names that it answers.
    fn note(&mut self, kind: Kind, applied: &Applied) {
        self.config.stats.push(Some(kind), applied.bytes, applied.refusals());
        for (name, reason) in &applied.refused {
            limited!(warn, "refused xDS resources", kind = ?kind, name, reason, "an xDS resource is refused");
        }
        self.early.0.extend_from_slice(&applied.found);
        self.early.1.extend_from_slice(&applied.gone);
    }
}

/// What happened on a stream.
#[derive(Debug, Default)]
struct Life {
    /// Bytes of the largest first request.
    request: usize,
    answered: bool,
    /// The kinds that the server has told of.
    heard: Vec<Kind>,
    coalescing: Coalescing,
    /// To pushes that were drawn and not yet published.
    answers: Vec<DeltaDiscoveryRequest>,
}

impl Life {
    /// When both kinds were told of, what still comes are changes, of which some may come together, unless it is an answer that somebody waits for.
    fn hear(&mut self, kind: Kind, on_demand: bool) {
        if !self.heard.contains(&kind) {
            self.heard.push(kind);
            if self.heard.len() == Kind::ALL.len() && !on_demand {
                self.coalescing.begin();
            }
        }
    }
}

/// Whether a status may mean that a request was too large.
fn refuses_large(status: &Status) -> bool {
    matches!(status.code(), Code::ResourceExhausted | Code::OutOfRange)
}

fn silent() -> Status {
    Status::deadline_exceeded(format!("no answer within {FIRST_ANSWER:?}"))
}

/// Waits until the connection takes a request; an error if it does not.
async fn send(requests: &mpsc::Sender<DeltaDiscoveryRequest>, request: DeltaDiscoveryRequest) -> Result<(), Status> {
    let refused = |error| match error {
        mpsc::error::SendTimeoutError::Timeout(_) => Status::deadline_exceeded(format!("the server took no request for {SEND_LIMIT:?}")),
        mpsc::error::SendTimeoutError::Closed(_) => Status::unknown("the server takes no more requests"),
    };
    requests.send_timeout(request, SEND_LIMIT).await.map_err(refused)
}

/// First what is given up: a name that is given up and wanted again is then new to the server.
fn requests_for(news: News) -> impl Iterator<Item = DeltaDiscoveryRequest> {
    let names = |names: std::collections::HashSet<crate::model::Text>| names.into_iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let address = || DeltaDiscoveryRequest { type_url: Kind::Address.type_url().to_owned(), ..DeltaDiscoveryRequest::default() };
    let given_up = DeltaDiscoveryRequest { resource_names_unsubscribe: names(news.unsubscribe), ..address() };
    let wanted = DeltaDiscoveryRequest { resource_names_subscribe: names(news.subscribe), ..address() };
    [given_up, wanted].into_iter().filter(|request| !(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::super::DEFAULT_BACKOFF;
    use super::*;

    /// A thousand proxies whose control plane was gone for ten minutes: when each of them comes back.
    #[test]
    fn clients_that_come_back_after_ten_minutes_come_one_by_one() {
        let gone = Duration::from_secs(600);
        let back = |_| {
            let (mut waits, mut now) = (DEFAULT_BACKOFF, Duration::ZERO);
            while now < gone {
                now += waits.next_delay();
            }
            now - gone
        };
        let mut times: Vec<Duration> = (0..1000).map(back).collect();
        times.sort_unstable();
        let span = times[990] - times[10];
        assert!(span >= Duration::from_secs(5), "all within {span:?}");
        for from in &times {
            let together = times.iter().filter(|time| **time >= *from && **time < *from + Duration::from_millis(100)).count();
            assert!(together <= 50, "{together} of 1000 within 100 ms");
        }
    }

    #[test]
    fn the_end_of_a_stream_has_the_reason_of_the_reference() {
        let status = |code, message: &str| End::Status(Status::new(code, message)).reason();
        for code in [Code::Unknown, Code::Cancelled, Code::DeadlineExceeded] {
            assert_eq!(status(code, "anything"), "Reconnect");
        }
        assert_eq!(status(Code::Unavailable, "transport is closing"), "Reconnect");
        assert_eq!(status(Code::Unavailable, "received prior goaway: code: NO_ERROR"), "Reconnect");
        assert_eq!(status(Code::Unavailable, "server is not ready"), "Error");
        assert_eq!(status(Code::Unauthenticated, ""), "Error");
        assert_eq!(End::Complete.reason(), "Complete");
        let unreachable = grpc::Error::Unreachable { address: "a:1".into(), problem: "refused".into() };
        assert_eq!(End::Unopened(unreachable).reason(), "ConnectionError");
        let roots = grpc::Error::Roots { origin: "in x".into(), problem: "none".into() };
        assert_eq!(End::Unopened(roots).reason(), "Error");
    }

    #[test]
    fn what_is_given_up_is_told_before_what_is_wanted() {
        let names = |name: &str| std::iter::once(crate::model::Text::from(name)).collect();
        let both: Vec<_> = requests_for(News { unsubscribe: names("a"), subscribe: names("a") }).collect();
        assert_eq!((&both[0].resource_names_unsubscribe[..], &both[1].resource_names_subscribe[..]), (&["a".to_owned()][..], &["a".to_owned()][..]));
        assert_eq!(requests_for(News::default()).count(), 0);
    }
}
