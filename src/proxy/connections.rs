//! The live connections of one pod, as `config_dump` shows them (reference, dataplane §10.2, `workloadState`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::model::Text;
use crate::telemetry::Reporter;

/// How the connection travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Plain TCP.
    Tcp,
    /// Inside a tunnel.
    Hbone,
}

impl Protocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Hbone => "HBONE",
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
    /// What the client asked for: an address on outbound, a service's name on inbound.
    pub original: Option<Text>,
    /// Where it really goes.
    pub actual: SocketAddr,
    /// How.
    pub protocol: Protocol,
}

/// All live connections of one pod.
#[derive(Default)]
pub struct ConnectionTable {
    next: AtomicU64,
    live: Mutex<BTreeMap<u64, LiveConnection>>,
}

/// Takes the connection out of the table when dropped.
pub struct Registration {
    table: Arc<ConnectionTable>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.table.lock().remove(&self.id);
    }
}

impl ConnectionTable {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, LiveConnection>> {
        // Nothing panics while it holds the lock; a poisoned table is still whole.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a connection for as long as the result lives.
    pub fn register(self: &Arc<Self>, connection: LiveConnection) -> Registration {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(id, connection);
        Registration { table: self.clone(), id }
    }

    /// How many connections are live.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `connections` object of `config_dump`.
    #[must_use]
    pub fn dump(&self) -> Value {
        let live: Vec<LiveConnection> = self.lock().values().cloned().collect();
        let rows = |reporter| -> Vec<Value> {
            live.iter()
                .filter(|connection| connection.reporter == reporter)
                .map(|connection| {
                    json!({
                        "src": connection.source.to_string(),
                        "originalDst": connection.original.as_deref(),
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

    #[test]
    fn a_connection_is_listed_exactly_while_it_lives() {
        let table = Arc::new(ConnectionTable::default());
        let connection = LiveConnection {
            reporter: Reporter::Source,
            source: "10.0.0.1:1234".parse().unwrap(),
            original: Some("10.0.0.2:80".into()),
            actual: "10.0.0.2:15008".parse().unwrap(),
            protocol: Protocol::Hbone,
        };
        let registration = table.register(connection);
        let row = json!({ "src": "10.0.0.1:1234", "originalDst": "10.0.0.2:80", "actualDst": "10.0.0.2:15008", "protocol": "HBONE" });
        assert_eq!(table.dump(), json!({ "inbound": [], "outbound": [row] }));
        drop(registration);
        assert!(table.is_empty());
    }
}
