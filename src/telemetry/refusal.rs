//! Connections that are refused before their context is known: they have no labels, so the reference counts them nowhere
//! (dataplane §12.3); here they have a counter of their own, by reason.

use std::net::SocketAddr;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::facts::Reporter;
use super::rate_limit::RateLimit;

/// The few kinds of early refusal; value of the `reason` label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RefusalReason {
    /// A limit of design §9 was reached.
    Overload,
    /// TLS or HTTP/2 handshake failed or took too long.
    Handshake,
    /// No certificate for the local workload.
    Identity,
    /// The connection leads back to the proxy, or to a port that it may not be sent to.
    Loop,
    /// The local workload is not known.
    UnknownWorkload,
    /// The request is malformed.
    BadRequest,
    /// The destination is not ours, or does not match the connection.
    BadDestination,
    /// Routing found nowhere to go: no healthy endpoint, unknown waypoint or gateway.
    NoRoute,
    /// The kernel refused something.
    Io,
    /// Anything else.
    #[default]
    Other,
}

impl RefusalReason {
    /// Value of the label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overload => "overload",
            Self::Handshake => "handshake",
            Self::Identity => "identity",
            Self::Loop => "loop",
            Self::UnknownWorkload => "unknown_workload",
            Self::BadRequest => "bad_request",
            Self::BadDestination => "bad_destination",
            Self::NoRoute => "no_route",
            Self::Io => "io",
            Self::Other => "other",
        }
    }
}

/// A connection that never got a context.
#[derive(Debug, Clone)]
pub struct EarlyRefusal {
    /// Which end we are.
    pub direction: Reporter,
    /// The client.
    pub source: SocketAddr,
    /// Where it wanted to go.
    pub destination: SocketAddr,
    /// Why, as a category.
    pub reason: RefusalReason,
    /// Why, in words.
    pub error: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    reporter: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone)]
pub(super) struct Refusals {
    family: Family<RefusalLabels, Counter>,
}

impl Refusals {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let family = Family::<RefusalLabels, Counter>::default();
        registry.register("culvert_early_refusals", "Connections refused before their context was known", family.clone());
        Self { family }
    }

    pub(super) fn record(&self, refusal: &EarlyRefusal) {
        self.family.get_or_create(&RefusalLabels { reporter: refusal.direction.as_str(), reason: refusal.reason.as_str() }).inc();
        if limit(refusal.reason).admit_listed() {
            tracing::event!(
                target: "access",
                tracing::Level::WARN,
                src.addr = %refusal.source,
                dst.addr = %refusal.destination,
                direction = refusal.direction.direction(),
                error = refusal.error.as_str(),
                "connection failed"
            );
        }
    }
}

fn limit(reason: RefusalReason) -> &'static RateLimit {
    const fn of(cause: &'static str) -> RateLimit {
        RateLimit::of(cause, 10)
    }
    static OVERLOAD: RateLimit = of("refused: overload");
    static HANDSHAKE: RateLimit = of("refused: handshake");
    static IDENTITY: RateLimit = of("refused: identity");
    static LOOP: RateLimit = of("refused: loop");
    static UNKNOWN_WORKLOAD: RateLimit = of("refused: unknown workload");
    static BAD_REQUEST: RateLimit = of("refused: bad request");
    static BAD_DESTINATION: RateLimit = of("refused: bad destination");
    static NO_ROUTE: RateLimit = of("refused: no route");
    static IO: RateLimit = of("refused: io");
    static OTHER: RateLimit = of("refused: other");
    match reason {
        RefusalReason::Overload => &OVERLOAD,
        RefusalReason::Handshake => &HANDSHAKE,
        RefusalReason::Identity => &IDENTITY,
        RefusalReason::Loop => &LOOP,
        RefusalReason::UnknownWorkload => &UNKNOWN_WORKLOAD,
        RefusalReason::BadRequest => &BAD_REQUEST,
        RefusalReason::BadDestination => &BAD_DESTINATION,
        RefusalReason::NoRoute => &NO_ROUTE,
        RefusalReason::Io => &IO,
        RefusalReason::Other => &OTHER,
    }
}
