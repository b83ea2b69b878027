//! The live connections of one pod, as `config_dump` shows them (reference, dataplane §10.2, `workloadState`).

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::model::{CompactAddress, Service};
use crate::telemetry::{Meter, Reporter};

/// How the connection travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Plain TCP.
    Tcp,
    /// Inside a tunnel.
    Hbone,
    /// Inside a tunnel within the tunnel to the gateway of another network.
    DoubleHbone,
}

impl Protocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Hbone => "HBONE",
            Self::DoubleHbone => "DOUBLEHBONE",
        }
    }
}

/// What a client asked for.
#[derive(Debug, Clone)]
pub enum Asked {
    /// An address, on outbound.
    Address(SocketAddr),
    /// A service, on inbound.
    Service(Arc<Service>),
}

impl fmt::Display for Asked {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(formatter),
            Self::Service(service) => formatter.write_str(&service.hostname),
        }
    }
}

/// One live connection.
#[derive(Debug, Clone)]
pub struct LiveConnection {
    /// Where it was accepted.
    pub reporter: Reporter,
    /// The client.
    pub source: SocketAddr,
    /// What the client asked for, where that is known.
    pub original: Option<Asked>,
    /// Where it really goes.
    pub actual: SocketAddr,
    /// How.
    pub protocol: Protocol,
}

/// All live connections of one pod: who they are, and how to make their tasks look around.
#[derive(Default)]
pub struct ConnectionTable {
    rows: Mutex<Rows>,
}

/// Places that are used again. In boxes: a list that grows keeps up to twice its length.
#[derive(Default)]
struct Rows {
    places: Vec<Option<Box<Row>>>,
    free: Vec<u32>,
}

/// A [`LiveConnection`] in the least room, as it is kept for every idle connection of the node.
struct Row {
    reporter: Reporter,
    protocol: Protocol,
    source: CompactAddress,
    actual: CompactAddress,
    original: Option<Original>,
    /// The task of the connection, once it waits.
    waker: Option<Waker>,
    /// Its bytes, once they flow.
    meter: Option<Arc<Meter>>,
    /// Of one whose one direction has ended: what had moved at the last look, and since when.
    still: Option<Box<Still>>,
    /// It shall end: the other direction has been still for too long.
    over: bool,
}

/// Bytes that had moved, and since when no other did.
struct Still {
    totals: (u64, u64),
    since: Instant,
}

enum Original {
    Address(CompactAddress),
    Service(Arc<Service>),
}

impl Row {
    fn new(connection: LiveConnection) -> Self {
        let LiveConnection { reporter, source, original, actual, protocol } = connection;
        let original = original.map(|asked| match asked {
            Asked::Address(address) => Original::Address(address.into()),
            Asked::Service(service) => Original::Service(service),
        });
        Self { reporter, protocol, source: source.into(), actual: actual.into(), original, waker: None, meter: None, still: None, over: false }
    }

    fn connection(&self) -> LiveConnection {
        let original = self.original.as_ref().map(|original| match original {
            Original::Address(address) => Asked::Address((*address).into()),
            Original::Service(service) => Asked::Service(service.clone()),
        });
        LiveConnection { reporter: self.reporter, source: self.source.into(), original, actual: self.actual.into(), protocol: self.protocol }
    }
}

/// Takes the connection out of the table when dropped.
pub struct Registration {
    table: Arc<ConnectionTable>,
    place: u32,
}

impl Registration {
    /// Where the connection really goes, as it was registered.
    pub(super) fn actual(&self) -> Option<CompactAddress> {
        self.table.lock().places.get(self.place as usize).and_then(Option::as_ref).map(|row| row.actual)
    }

    /// The task of `context` is woken by the next [`ConnectionTable::wake_all`]. Look at what may have changed after this, not before. Says whether
    /// the connection shall end because it was half-closed and still for too long.
    pub(super) fn listen(&self, context: &Context<'_>) -> bool {
        let mut rows = self.table.lock();
        let Some(Some(row)) = rows.places.get_mut(self.place as usize) else { return false };
        if !row.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            row.waker = Some(context.waker().clone());
        }
        row.over
    }

    /// The bytes of the connection flow from now on.
    pub(super) fn flows(&self, meter: Arc<Meter>) {
        if let Some(Some(row)) = self.table.lock().places.get_mut(self.place as usize) {
            row.meter = Some(meter);
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let row = {
            let mut rows = self.table.lock();
            let row = rows.places.get_mut(self.place as usize).and_then(Option::take);
            rows.free.push(self.place);
            if rows.free.len() == rows.places.len() {
                *rows = Rows::default();
            }
            row
        };
        drop(row);
    }
}

impl ConnectionTable {
    fn lock(&self) -> MutexGuard<'_, Rows> {
        // Nothing panics while it holds the lock; a poisoned table is still whole.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a connection for as long as the result lives.
    pub fn register(self: &Arc<Self>, connection: LiveConnection) -> Registration {
        let row = Some(Box::new(Row::new(connection)));
        let mut rows = self.lock();
        let place = match rows.free.pop() {
            Some(place) => {
                if let Some(free) = rows.places.get_mut(place as usize) {
                    *free = row;
                }
                place
            }
            None => {
                rows.places.push(row);
                u32::try_from(rows.places.len() - 1).unwrap_or(u32::MAX)
            }
        };
        drop(rows);
        Registration { table: self.clone(), place }
    }

    /// Makes the task of every connection look around: policy has changed, or time is up.
    pub(super) fn wake_all(&self) {
        let wakers: Vec<Waker> = self.lock().places.iter().flatten().filter_map(|row| row.waker.clone()).collect();
        for waker in wakers {
            waker.wake();
        }
    }

    /// Looks for connections whose one direction has ended and whose other did not move for `limit`, and makes their tasks end them.
    pub(super) fn reap(&self, limit: Duration) {
        let now = Instant::now();
        let mut ended = Vec::new();
        for row in self.lock().places.iter_mut().flatten() {
            let Some(meter) = row.meter.as_ref().filter(|meter| meter.is_half_closed()) else { continue };
            let totals = meter.totals();
            match &row.still {
                Some(still) if still.totals == totals => {
                    row.over |= now.duration_since(still.since) >= limit;
                    ended.extend(row.waker.clone().filter(|_| row.over));
                }
                _ => row.still = Some(Box::new(Still { totals, since: now })),
            }
        }
        for waker in ended {
            waker.wake();
        }
    }

    /// How many connections are live.
    #[must_use]
    pub fn len(&self) -> usize {
        let rows = self.lock();
        rows.places.len() - rows.free.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `connections` object of `config_dump`.
    #[must_use]
    pub fn dump(&self) -> Value {
        let live: Vec<LiveConnection> = self.lock().places.iter().flatten().map(|row| row.connection()).collect();
        let rows = |reporter| -> Vec<Value> {
            live.iter()
                .filter(|connection| connection.reporter == reporter)
                .map(|connection| {
                    json!({
                        "src": connection.source.to_string(),
                        "originalDst": connection.original.as_ref().map(ToString::to_string),
                        "actualDst": connection.actual.to_string(),
                        "protocol": connection.protocol.as_str(),
                    })
                })
                .collect()
        };
        json!({ "inbound": rows(Reporter::Destination), "outbound": rows(Reporter::Source) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn connection() -> LiveConnection {
        LiveConnection {
            reporter: Reporter::Source,
            source: "10.0.0.1:1234".parse().unwrap(),
            original: Some(Asked::Address("10.0.0.2:80".parse().unwrap())),
            actual: "10.0.0.2:15008".parse().unwrap(),
            protocol: Protocol::Hbone,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_half_closed_connection_ends_when_nothing_moved_for_the_limit_and_no_other_does() {
        const MINUTE: Duration = Duration::from_secs(60);
        let table = Arc::new(ConnectionTable::default());
        let [open, still, busy] = [(); 3].map(|()| (table.register(connection()), Arc::new(Meter::default())));
        let _beginning = table.register(connection());
        for (registration, meter) in [&open, &still, &busy] {
            registration.flows(meter.clone());
        }
        still.1.half_close();
        busy.1.half_close();
        let ends = |of: &(Registration, Arc<Meter>)| of.0.listen(&Context::from_waker(Waker::noop()));
        for minute in 0..5 {
            assert!(![&open, &still, &busy].map(ends).contains(&true), "after {minute} minutes");
            busy.1.sent(1);
            table.reap(4 * MINUTE);
            tokio::time::advance(MINUTE).await;
        }
        assert_eq!([&open, &still, &busy].map(ends), [false, true, false]);
        // Another connection in its place begins anew.
        drop(still);
        let next = (table.register(connection()), Arc::new(Meter::default()));
        next.1.half_close();
        next.0.flows(next.1.clone());
        table.reap(4 * MINUTE);
        assert!(!ends(&next));
    }

    #[test]
    fn a_connection_is_listed_exactly_while_it_lives() {
        let table = Arc::new(ConnectionTable::default());
        let registration = table.register(connection());
        let row = json!({ "src": "10.0.0.1:1234", "originalDst": "10.0.0.2:80", "actualDst": "10.0.0.2:15008", "protocol": "HBONE" });
        assert_eq!(table.dump(), json!({ "inbound": [], "outbound": [row] }));
        drop(registration);
        assert!(table.is_empty());
        assert_eq!(table.dump(), json!({ "inbound": [], "outbound": [] }));
    }
}
