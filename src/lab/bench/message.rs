//! What the inside of a bench tells the outside: lines of JSON.

use serde::{Deserialize, Serialize};

use super::report::Outcome;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Message {
    /// The namespaces are entered.
    Entered,
    /// What is being done.
    Step(String),
    /// Every contestant is ready.
    Began {
        /// What the pods really use.
        congestion_control: String,
    },
    /// A figure is done.
    Took(Box<Outcome>),
    /// All are.
    Done,
    /// Nothing goes on, and why.
    Failed(String),
}
