//! For programs.

use serde_json::{Map, Value, json};

use super::{Missing, Outcome, Report, Taken};
use crate::lab::bench::options::Kind;

impl Report {
    /// Everything, with every value of every round that counts. Names are stable; more may come.
    #[must_use]
    pub fn json(&self) -> Value {
        let options = &self.options;
        let contestants = options.contestants.iter().map(|contestant| {
            let what = match &contestant.kind {
                Kind::Direct => json!({"kind": "direct"}),
                Kind::Culvert => json!({"kind": "culvert"}),
                Kind::Floor(floor) => json!({"kind": "floor", "floor": floor.name()}),
                Kind::Peer { client, server } => json!({"kind": "peer", "client": client.arguments, "server": server.arguments}),
            };
            json!({"name": contestant.name, "what": what})
        });
        json!({
            "format": 1,
            "version": env!("CARGO_PKG_VERSION"),
            "debugBuild": cfg!(debug_assertions),
            "date": self.date,
            "machine": self.machine,
            "settings": {
                "trialSeconds": options.trial.as_secs_f64(), "rounds": options.rounds, "workers": options.workers, "pinned": options.pin, "streams": options.streams,
            },
            "contestants": contestants.collect::<Vec<Value>>(),
            "figures": self.outcomes.iter().map(|outcome| self.figure(outcome)).collect::<Vec<Value>>(),
        })
    }

    fn figure(&self, outcome: &Outcome) -> Value {
        json!({
            "name": outcome.figure.name(),
            "title": outcome.figure.title(),
            "reference": self.reference(outcome.figure),
            "results": outcome.taken.iter().map(|taken| self.result(outcome, taken)).collect::<Vec<Value>>(),
        })
    }

    fn result(&self, outcome: &Outcome, taken: &Taken) -> Value {
        let values: Map<String, Value> = taken
            .values
            .iter()
            .filter_map(|(quantity, values)| {
                let shown = self.shown(outcome, taken, *quantity)?;
                let name = json!(quantity).as_str()?.to_owned();
                let spread = shown.spread;
                Some((name, json!({"median": spread.median, "min": spread.min, "max": spread.max, "values": values, "ratio": shown.ratio})))
            })
            .collect();
        let mut result = json!({"contestant": taken.contestant, "values": values, "stolenPercent": taken.stolen_percent});
        let missing = match &taken.missing {
            None => None,
            Some(Missing::DoesNotApply(why)) => Some(("doesNotApply", why)),
            Some(Missing::Failed(why)) => Some(("notTaken", why)),
        };
        if let (Some((key, why)), Some(result)) = (missing, result.as_object_mut()) {
            result.insert(key.to_owned(), json!(why));
        }
        result
    }
}
