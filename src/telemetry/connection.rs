//! One connection from its opening to its end.

use std::sync::Arc;
use std::time::Instant;

use super::access;
use super::facts::{ConnectionEnd, ConnectionFacts, ResponseFlag};
use super::labels::Labels;
use super::series::{Meter, Series, SeriesTable};

/// A connection that was counted as opened. It is counted as closed and logged exactly once: by [`OpenConnection::close`], or when
/// it is dropped, as happens when its task is cancelled (flag `-`) or panics (flag `CONNECT`).
#[must_use = "the connection counts as closed as soon as this is dropped"]
#[derive(Debug)]
pub struct OpenConnection {
    table: Arc<SeriesTable>,
    facts: ConnectionFacts,
    meter: Arc<Meter>,
    /// The label set that counted the opening, and will count the end; none once it has.
    opened: Option<Arc<Series>>,
    /// The label set that counts the bytes.
    metered: Arc<Series>,
    started: Instant,
}

impl OpenConnection {
    pub(super) fn open(table: Arc<SeriesTable>, facts: ConnectionFacts) -> Self {
        let meter = Arc::new(Meter::default());
        let opened = table.open(Labels::of(&facts), facts.reporter, &meter);
        access::opened(&facts);
        Self { table, facts, meter, metered: Arc::clone(&opened), opened: Some(opened), started: Instant::now() }
    }

    /// The byte counters. Whoever moves the bytes keeps a clone; bytes counted after the close appear nowhere.
    #[must_use]
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    /// What is known so far.
    #[must_use]
    pub fn facts(&self) -> &ConnectionFacts {
        &self.facts
    }

    /// Corrects the facts, for what is learned after the opening. The access log and further bytes follow the new facts; the end is
    /// counted under the labels of the opening, so that opened minus closed is right for every label set.
    pub fn amend(&mut self, change: impl FnOnce(&mut ConnectionFacts)) {
        change(&mut self.facts);
        self.metered = self.table.relabel(&self.metered, &self.meter, Labels::of(&self.facts), self.facts.reporter);
    }

    /// Ends the connection. Call it when its bytes have stopped.
    pub fn close(mut self, end: ConnectionEnd) {
        self.end(&end);
    }

    fn end(&mut self, end: &ConnectionEnd) {
        let Some(opened) = self.opened.take() else { return };
        let totals = self.table.close(&opened, &self.metered, &self.meter, end.flag);
        access::complete(&self.facts, totals, self.started.elapsed(), end);
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = Some("the task of this connection panicked".to_owned());
            self.end(&ConnectionEnd { flag: ResponseFlag::Connect, error, policy: None });
        } else {
            self.end(&ConnectionEnd::default());
        }
    }
}
