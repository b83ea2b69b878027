//! The metrics page (reference, dataplane §10.4). Responses are not compressed: scrapers ask for it to save bandwidth, which a node
//! has, and it costs CPU, which the data path needs.

use std::future::Future;

use http::{HeaderMap, Method, StatusCode, header};
use tokio::net::TcpListener;

use super::server::{Answer, Pages, not_found, serve, typed, wrong_method};
use crate::telemetry::Telemetry;

/// Connections of one source; a scraper uses one or two.
const PER_SOURCE: usize = 8;
/// Pages in memory at once; one is at most about 16 MiB (`TelemetryConfig::page_budget`), usually far below one.
const PAGES: usize = 8;

const PLAIN: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text;charset=utf-8;version=1.0.0";

/// Answers `GET /metrics` and `GET /stats/prometheus` until `shutdown`.
pub async fn serve_metrics(listener: TcpListener, telemetry: Telemetry, shutdown: impl Future<Output = ()>) {
    let pages = Pages::new(PAGES);
    let handler = move |request: http::Request<hyper::body::Incoming>| {
        let (telemetry, pages) = (telemetry.clone(), pages.clone());
        async move {
            match (request.uri().path(), request.method()) {
                ("/metrics" | "/stats/prometheus", &Method::GET | &Method::HEAD) => page(request.headers(), telemetry, pages).await,
                ("/metrics" | "/stats/prometheus", _) => wrong_method(&Method::GET, "only GET\n"),
                _ => not_found(),
            }
        }
    };
    serve(listener, PER_SOURCE, handler, shutdown).await;
}

async fn page(headers: &HeaderMap, telemetry: Telemetry, pages: Pages) -> Answer {
    let content_type = content_type(headers);
    match pages.make(move || telemetry.metrics_page()).await {
        Ok(page) => typed(StatusCode::OK, content_type, page),
        Err(answer) => answer,
    }
}

/// OpenMetrics if any entry of `Accept` is it; the text is the same.
fn content_type(headers: &HeaderMap) -> &'static str {
    let mut entries = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let open_metrics =
        entries.any(|entry| entry.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/openmetrics-text")));
    if open_metrics { OPEN_METRICS } else { PLAIN }
}
