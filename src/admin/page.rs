//! The admin page (reference, dataplane §10.2).

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;

use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use hyper::body::Incoming;
use tokio::net::TcpListener;

use super::server::{Answer, Pages, not_found, serve, text, typed, wrong_method};
use crate::telemetry::logging::LogHandle;

/// Connections of one source, and everybody here is loopback.
const PER_SOURCE: usize = 32;
/// Dumps in memory at once; one of a large mesh takes tens of megabytes.
const DUMPS: usize = 2;

const INDEX: &str = "<!DOCTYPE html>
<html><head><title>culvert</title></head><body><h1>culvert</h1><ul>
<li><a href=\"config_dump\">config_dump</a>: what this proxy knows, as JSON</li>
<li>logging: POST shows or changes the log filter (?level=info, ?level=scope=debug,scope=trace, ?reset)</li>
<li>quitquitquit: POST drains and stops the proxy</li>
</ul></body></html>
";

const LOGGING_USAGE: &str = "usage: POST /logging\t\t\t\t(show the filter)
usage: POST /logging?level=<level>\t\t(change the level of everything)
usage: POST /logging?level=<scope>=<level>,<scope>=<level>\t(change scopes)
usage: POST /logging?reset\t\t\t\t(back to the filter of the start; may be followed by &level=...)
levels: error, warn, info, debug, trace, off
";

/// What the page shows and drives. A clone is three reference counts.
#[derive(Clone)]
pub struct AdminSources {
    /// The config dump. Whoever builds it leaves out private keys and tokens. Runs on a blocking thread, at most two at once.
    pub config_dump: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// The log, for its filter.
    pub log: LogHandle,
    /// Asks the process to drain and end; must return at once.
    pub shutdown: Arc<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for AdminSources {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("AdminSources").field("log", &self.log).finish_non_exhaustive()
    }
}

/// Serves the admin page on a listener of loopback (see [`super::listen_loopback`]) until `shutdown`.
pub async fn serve_admin(listener: TcpListener, sources: AdminSources, shutdown: impl Future<Output = ()>) {
    let dumps = Pages::new(DUMPS);
    let handler = move |request: Request<Incoming>| {
        let (sources, dumps) = (sources.clone(), dumps.clone());
        async move { answer(&request, &sources, &dumps).await }
    };
    serve(listener, PER_SOURCE, handler, shutdown).await;
}

async fn answer(request: &Request<Incoming>, sources: &AdminSources, dumps: &Pages) -> Answer {
    if !is_local(request.uri(), request.headers()) {
        return text(StatusCode::FORBIDDEN, "forbidden: this page answers to localhost only\n");
    }
    match (request.uri().path(), request.method()) {
        ("/", _) => typed(StatusCode::OK, "text/html; charset=utf-8", INDEX),
        ("/config_dump", _) => {
            let dump = Arc::clone(&sources.config_dump);
            match dumps.make(move || serde_json::to_string_pretty(&dump())).await {
                Ok(page) => typed(StatusCode::OK, "application/json", page),
                Err(answer) => answer,
            }
        }
        ("/logging", &Method::POST) => logging(request.uri().query().unwrap_or_default(), &sources.log),
        ("/logging", _) => wrong_method(&Method::POST, LOGGING_USAGE),
        ("/quitquitquit", &Method::POST) => {
            tracing::info!("shutdown asked for by POST /quitquitquit");
            (sources.shutdown)();
            text(StatusCode::OK, "shutdown now\n")
        }
        ("/quitquitquit", _) => wrong_method(&Method::POST, "only POST\n"),
        _ => not_found(),
    }
}

fn logging(query: &str, log: &LogHandle) -> Answer {
    let mut level = None;
    let mut reset = false;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("level", value) => level = Some(unescaped(value)),
            ("reset", _) => reset = true,
            _ => return text(StatusCode::BAD_REQUEST, LOGGING_USAGE),
        }
    }
    let changed = match (reset, level.as_deref()) {
        (true, level) => log.reset(level.unwrap_or_default()),
        (false, Some("")) => return text(StatusCode::BAD_REQUEST, LOGGING_USAGE),
        (false, Some(level)) => log.change(level),
        (false, None) => Ok(()),
    };
    match changed {
        Ok(()) => text(StatusCode::OK, format!("current log level is {}\n", log.filter())),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n{LOGGING_USAGE}")),
    }
}

/// Percent-decoding; what is no valid escape stays as it is, and the filter will refuse it.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).filter(|digits| *first == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let escape = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match escape.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether a request names loopback in every place where a browser writes the site that it thinks it talks to, or comes from.
fn is_local(uri: &Uri, headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let host_is_local = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()).is_some_and(|host| names_loopback(&host));
    let uri_is_local = uri.authority().is_none_or(names_loopback);
    let origin_is_local = headers.get_all(ORIGIN).iter().all(|origin| {
        let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
        origin.as_ref().and_then(Uri::authority).is_some_and(names_loopback)
    });
    host_is_local && uri_is_local && origin_is_local
}

fn names_loopback(authority: &Authority) -> bool {
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    !authority.as_str().contains('@')
        && (host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn allowed(uri: &str, headers: &[(&str, &str)]) -> bool {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(()).unwrap();
        is_local(request.uri(), request.headers())
    }

    #[test]
    fn only_loopback_names_are_answered() {
        for host in ["localhost", "LOCALHOST:15000", "127.0.0.1", "127.9.9.9:1", "[::1]:15000", "[::ffff:127.0.0.1]"] {
            assert!(allowed("/", &[("host", host)]), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.nip.io",
            "10.0.0.1:15000",
            "[::2]",
            "user@localhost",
            "",
            "localhost, evil",
            "0.0.0.0",
        ] {
            assert!(!allowed("/", &[("host", host)]), "{host}");
        }
        assert!(!allowed("/", &[]));
        assert!(!allowed("/", &[("host", "localhost"), ("host", "localhost")]));
        assert!(!allowed("http://evil.example/", &[("host", "localhost")]));
    }

    #[test]
    fn a_page_of_another_site_is_not_answered() {
        assert!(allowed("/", &[("host", "localhost"), ("origin", "http://localhost:15000")]));
        assert!(!allowed("/", &[("host", "localhost"), ("origin", "https://evil.example")]));
        assert!(!allowed("/", &[("host", "localhost"), ("origin", "null")]));
    }

    #[test]
    fn escapes_are_decoded_and_broken_ones_kept() {
        assert_eq!(unescaped("a%3Ddebug%2Cinfo"), "a=debug,info");
        assert_eq!(unescaped("%"), "%");
        assert_eq!(unescaped("%4"), "%4");
        assert_eq!(unescaped("%zz%+1"), "%zz%+1");
    }
}
