//! One client's delta stream: requests in, pushes out, never more under way than the client takes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use super::catalog::{Catalog, Kind};
use super::message::{Outgoing, Received, Requests, Say};
use super::stats::{Held, Stats};
use super::subscription::{Part, Push, Subscription, Upserts};
use super::tokens::{Caller, Tokens};
use crate::lifecycle::drain::DrainWatcher;
use crate::model::Text;
use crate::telemetry::limited;
use crate::wire::xds::DeltaDiscoveryRequest;

/// A response is split beyond this: clients take 200 MiB (reference, dataplane §5.3). Below it the first response of a type stays whole, because a
/// client that applied it calls itself ready.
const LARGEST_RESPONSE: usize = 180 << 20;

/// Characters of what a client says that reach the log.
const LONGEST_QUOTE: usize = 500;

/// What a session works with.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) caller: Caller,
    pub(super) catalogs: watch::Receiver<Arc<Catalog>>,
    pub(super) says: mpsc::Sender<Say>,
    pub(super) stats: Arc<Stats>,
    pub(super) drain: DrainWatcher,
    /// Who may call, and how often to look whether the caller still may.
    pub(super) tokens: (Arc<Tokens>, Duration),
    /// When the stream is ended, so that replicas share clients evenly again.
    pub(super) longest: Duration,
}

/// What a stream has come to.
#[derive(Debug, Default)]
struct State {
    /// The client as it calls itself.
    client: Option<Client>,
    subscriptions: BTreeMap<Kind, Subscription>,
    /// What is to be sent before anything else.
    pending: VecDeque<Push>,
    nonce: u64,
    held: Vec<Held>,
}

#[derive(Debug, Clone)]
struct Client {
    id: String,
    node: Option<Text>,
}

impl Session {
    /// Serves the stream until either side ends it.
    pub(super) async fn run(mut self, requests: Requests) {
        let end = self.serve(requests).await;
        // The client may be gone.
        let _ = self.says.send(Say::End(end)).await;
    }

    async fn serve(&mut self, requests: Requests) -> Status {
        let mut state = State::default();
        let (mut requests, _reader) = read(requests);
        let mut catalogs = self.catalogs.clone();
        let mut drain = self.drain.clone();
        let old = tokio::time::sleep(self.longest);
        tokio::pin!(old);
        let (tokens, every) = self.tokens.clone();
        let caller = self.caller.clone();
        let revoked = async move {
            loop {
                tokio::time::sleep(every).await;
                if !tokens.still_knows(&caller) {
                    return;
                }
            }
        };
        tokio::pin!(revoked);
        loop {
            let catalog = catalogs.borrow_and_update().clone();
            let told = async {
                tokio::select! {
                    () = &mut old => ok(),
                    _ = drain.signaled() => ok(),
                    () = &mut revoked => no_longer(),
                }
            };
            // Everything of one catalog before the next: a policy must not arrive after the workload that names it.
            tokio::select! {
                status = told => return status,
                sent = self.bring_up_to(&catalog, &mut state) => if !sent { return ok() },
            }
            let request = tokio::select! {
                _ = drain.signaled() => return ok(),
                () = &mut old => return ok(),
                () = &mut revoked => return no_longer(),
                () = self.says.closed() => return ok(),
                changed = catalogs.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return ok(),
                },
                request = requests.recv() => request,
            };
            match request {
                None => return ok(),
                Some(Err(status)) => return status,
                Some(Ok(request)) => {
                    let catalog = catalogs.borrow().clone();
                    if let Err(status) = self.take(&request.message, &catalog, &mut state) {
                        return status;
                    }
                }
            }
        }
    }

    /// Sends what waits and what has changed. Each response is worked out when the client has room for it. `false` if the client is gone.
    async fn bring_up_to(&self, catalog: &Catalog, state: &mut State) -> bool {
        let steps = [(Kind::Authorization, Part::Upserts), (Kind::Address, Part::Everything), (Kind::Authorization, Part::Everything)];
        let mut steps = steps.into_iter();
        loop {
            if state.pending.is_empty() {
                let Some((kind, part)) = steps.next() else { return true };
                let push = state.subscriptions.get_mut(&kind).and_then(|subscription| subscription.update(catalog, part));
                state.pending.extend(push.into_iter().flat_map(split));
                continue;
            }
            let Ok(permit) = self.says.reserve().await else { return false };
            if let Some(push) = state.pending.pop_front() {
                state.nonce += 1;
                self.stats.pushed(push.kind, push.len(), push.removed.len());
                let client = state.client.as_ref().map_or("", |client| &client.id);
                tracing::debug!(
                    node = %self.caller.node,
                    client,
                    kind = push.kind.name(),
                    resources = push.len(),
                    removed = push.removed.len(),
                    nonce = state.nonce,
                    epoch = catalog.epoch,
                    "pushed"
                );
                permit.send(Say::Message(Outgoing::push(push, catalog.epoch, state.nonce)));
            }
        }
    }

    /// One request.
    fn take(&self, request: &DeltaDiscoveryRequest, catalog: &Catalog, state: &mut State) -> Result<(), Status> {
        let client = self.introduce(request, state)?;
        self.hear_answer(request, &client, state);
        let Some(kind) = Kind::of(&request.type_url) else {
            if request.response_nonce.is_empty() {
                limited!(info, "unknown resource type", node = %self.caller.node, r#type = quote(&request.type_url), "a client asks for a type that is not served here");
            }
            return Ok(());
        };
        let refused = |error: super::subscription::Refused| Status::new(Code::ResourceExhausted, error.to_string());
        let push = if let Some(subscription) = state.subscriptions.get_mut(&kind) {
            subscription.request(request, catalog).map_err(refused)?
        } else {
            let kept = request.initial_resource_versions.len();
            let (subscription, push) = Subscription::first(kind, client.node.clone(), request, catalog).map_err(refused)?;
            tracing::info!(node = %self.caller.node, client = client.id, kind = kind.name(), kept, sent = push.len(), removed = push.removed.len(), "subscribed");
            state.subscriptions.insert(kind, subscription);
            state.held.push(self.stats.subscribed(kind));
            Some(push)
        };
        state.pending.extend(push.into_iter().flat_map(split));
        Ok(())
    }

    /// The first request says who the client is, and the token says whether that may be.
    fn introduce(&self, request: &DeltaDiscoveryRequest, state: &mut State) -> Result<Client, Status> {
        if let Some(known) = &state.client {
            return Ok(known.clone());
        }
        let node = request.node.as_ref().ok_or_else(|| Status::invalid_argument("the first request of a stream must say which node it is from"))?;
        let named = node.metadata.as_ref().and_then(|metadata| metadata.text("NODE_NAME")).filter(|name| !name.is_empty());
        if named.is_some_and(|named| self.caller.node != *named) {
            let problem = format!("the token is that of node {:?}, not of the NODE_NAME of the request", self.caller.node.as_str());
            limited!(warn, "a client on the wrong node", node = %self.caller.node, claims = quote(named.unwrap_or_default()), "refused: {problem}");
            return Err(Status::permission_denied(problem));
        }
        let client = Client { id: quote(&node.id), node: Some(self.caller.node.clone()) };
        state.client = Some(client.clone());
        Ok(client)
    }

    /// ACK, NACK, or an answer to something that was never said.
    fn hear_answer(&self, request: &DeltaDiscoveryRequest, client: &Client, state: &State) {
        let kind = Kind::of(&request.type_url);
        if request.response_nonce.is_empty() {
            return;
        }
        // Several may be under way, and what a client says of an older one is still true of it.
        let ours = request.response_nonce.parse::<u64>().is_ok_and(|nonce| (1..=state.nonce).contains(&nonce));
        let Some(kind) = kind.filter(|_| ours) else {
            self.stats.stale();
            tracing::debug!(node = %self.caller.node, client = client.id, nonce = quote(&request.response_nonce), "an answer to no response of ours");
            return;
        };
        match &request.error_detail {
            None => self.stats.acknowledged(kind),
            Some(error) => {
                self.stats.refused(kind);
                limited!(
                    warn,
                    "clients refuse resources",
                    node = %self.caller.node,
                    client = client.id,
                    kind = kind.name(),
                    nonce = request.response_nonce,
                    reason = quote(&error.message),
                    "the client refused resources (NACK); they are sent again when they change"
                );
            }
        }
    }
}

/// Reads requests ahead of their being served, one at a time.
fn read(mut requests: Requests) -> (mpsc::Receiver<Result<Received<DeltaDiscoveryRequest>, Status>>, JoinSet<()>) {
    let (sender, receiver) = mpsc::channel(1);
    let mut reader = JoinSet::new();
    reader.spawn(async move {
        while let Some(request) = requests.next().await.transpose() {
            let last = request.is_err();
            if sender.send(request).await.is_err() || last {
                return;
            }
        }
    });
    (receiver, reader)
}

fn ok() -> Status {
    Status::new(Code::Ok, "")
}

fn no_longer() -> Status {
    Status::unauthenticated("the bearer token is no longer one of the control plane's token file")
}

/// A push as responses that clients can take.
fn split(push: Push) -> Vec<Push> {
    let Push { kind, upserts, removed } = push;
    let items = match upserts {
        Upserts::All(set) if set.bytes <= LARGEST_RESPONSE => return vec![Push { kind, upserts: Upserts::All(set), removed }],
        Upserts::All(set) => set.entries.values().map(Into::into).collect(),
        Upserts::Some(items) => items,
    };
    let mut pushes = vec![Push { kind, upserts: Upserts::Some(Vec::new()), removed }];
    let mut bytes = 0;
    for item in items {
        bytes += item.entry.body.len();
        if bytes > LARGEST_RESPONSE {
            bytes = item.entry.body.len();
            pushes.push(Push { kind, upserts: Upserts::Some(Vec::new()), removed: Vec::new() });
        }
        if let Some(Push { upserts: Upserts::Some(items), .. }) = pushes.last_mut() {
            items.push(item);
        }
    }
    pushes
}

/// What a client said, for a log.
pub(super) fn quote(text: &str) -> String {
    text.chars().take(LONGEST_QUOTE).map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}
