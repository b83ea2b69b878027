#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use bytes::{BufMut, Bytes};
use futures_util::{StreamExt, stream};
use http::HeaderMap;
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::DuplexStream;
use tokio::task::JoinHandle;
use tonic::Request;

use super::super::{Coalescing, Connection};
use super::*;

const LIMIT: usize = 1 << 10;

/// What a server says in answer to the call, as it goes on the wire.
#[derive(Clone)]
struct Said {
    status: u16,
    headers: &'static [(&'static str, &'static str)],
    data: Vec<Vec<u8>>,
    trailers: Option<&'static [(&'static str, &'static str)]>,
    /// The stream is reset after this.
    breaks: bool,
}

const GRPC: &[(&str, &str)] = &[("content-type", "application/grpc")];
const GOOD: Option<&[(&str, &str)]> = Some(&[("grpc-status", "0")]);

fn said(data: &[&[u8]]) -> Said {
    Said { status: 200, headers: GRPC, data: data.iter().map(|chunk| chunk.to_vec()).collect(), trailers: GOOD, breaks: false }
}

/// A message in its frame.
fn framed(text: &str) -> Vec<u8> {
    let message = text.to_owned().encode_to_vec();
    let mut frame = vec![0];
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.extend(message);
    frame
}

fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap())).collect()
}

/// Serves one connection. Its answers are of stock hyper, which takes any frames for a body.
fn serve(said: Said, wire: DuplexStream) -> JoinHandle<()> {
    tokio::spawn(async move {
        let service = service_fn(move |_request: http::Request<Incoming>| {
            let Said { status, headers, data, trailers, breaks } = said.clone();
            let mut frames: Vec<io::Result<Frame<Bytes>>> = data.into_iter().map(|chunk| Ok(Frame::data(Bytes::from(chunk)))).collect();
            if let Some(trailers) = trailers {
                frames.push(Ok(Frame::trailers(map(trailers))));
            }
            let end = breaks.then_some(async {
                // When what came before is on its way.
                tokio::time::sleep(Duration::from_secs(1)).await;
                Err(io::Error::other("reset"))
            });
            let frames = stream::iter(frames).chain(stream::iter(end).then(|end| end)).boxed();
            let mut response = Response::builder().status(status).body(StreamBody::new(frames)).unwrap();
            *response.headers_mut() = map(headers);
            async move { Ok::<_, Infallible>(response) }
        });
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(wire), service).await;
    })
}

/// The answers to a call, up to their end.
async fn heard(said: Said) -> (Vec<String>, Result<(), Status>) {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let server = serve(said, theirs);
    let client = async move {
        let (sender, driver) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
        let driven = tokio::spawn(driver);
        let connection = Connection::new(sender, "https://control.test".parse().unwrap(), Coalescing::default());
        let requests = Request::new(stream::pending::<String>());
        let mut messages = Vec::new();
        let end = match connection.stream::<String, String>("/test/Stream", requests, LIMIT).await {
            Err(status) => Err(status),
            Ok(mut answers) => loop {
                match answers.message().await {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => {
                        assert!(answers.message().await.unwrap().is_none(), "an end is an end");
                        break Ok(());
                    }
                    Err(status) => {
                        assert_eq!(answers.message().await.unwrap_err().code(), status.code(), "nothing comes after an error");
                        break Err(status);
                    }
                }
            },
        };
        driven.abort();
        (messages, end)
    };
    let heard = tokio::time::timeout(Duration::from_secs(60), client).await.unwrap();
    server.abort();
    heard
}

#[tokio::test(start_paused = true)]
async fn messages_arrive_whole_however_they_are_cut_and_a_good_end_is_no_error() {
    let two = [framed("one"), framed("two")].concat();
    let every_byte: Vec<&[u8]> = two.chunks(1).collect();
    let longest = "x".repeat(LIMIT - 3);
    for (data, expected) in [
        (vec![], vec![]),
        (vec![&two[..]], vec!["one", "two"]),
        (every_byte, vec!["one", "two"]),
        (vec![&[0, 0, 0, 0, 0][..]], vec![""]),
        (vec![&framed(&longest)[..]], vec![&longest]),
    ] {
        let (messages, end) = heard(said(&data)).await;
        assert_eq!(messages, expected);
        end.unwrap();
    }
    // A call may end well before it began.
    let (messages, end) =
        heard(Said { headers: &[("content-type", "application/grpc+proto"), ("grpc-status", "0")], trailers: None, ..said(&[]) }).await;
    assert!(messages.is_empty());
    end.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_breaks_the_framing_is_an_error_after_what_came_whole() {
    let whole = framed("whole");
    let mut compressed = framed("x");
    compressed[0] = 1;
    let mut endless = vec![0];
    endless.put_u32(u32::MAX);
    let too_long = framed(&"x".repeat(LIMIT - 2));
    let cases: [(&str, Said, Code, &str); 9] = [
        ("cut in its prefix", said(&[&whole, &[0, 0]]), Code::Internal, "within a message"),
        ("cut after its prefix", said(&[&whole, &[0, 0, 0, 0, 9]]), Code::Internal, "within a message"),
        ("cut in the message", said(&[&whole, &framed("half")[..7]]), Code::Internal, "within a message"),
        ("compressed", said(&[&whole, &compressed]), Code::Internal, "compressed"),
        ("a byte over the limit", said(&[&whole, &too_long]), Code::OutOfRange, "the limit is 1024"),
        ("a length alone", said(&[&whole, &endless]), Code::OutOfRange, "4294967295 bytes"),
        ("another kind of message", said(&[&whole, &[0, 0, 0, 0, 2, 0x0a, 0x7f]]), Code::Internal, "not the message"),
        ("no status", Said { trailers: None, ..said(&[&whole]) }, Code::Unknown, "without a status"),
        ("a reset", Said { trailers: None, breaks: true, ..said(&[&whole]) }, Code::Unknown, "broke"),
    ];
    for (case, said, code, text) in cases {
        let (messages, end) = heard(said).await;
        let status = end.unwrap_err();
        assert_eq!((messages, status.code()), (vec!["whole".to_owned()], code), "{case}: {status}");
        assert!(status.message().contains(text), "{case}: {status}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_no_grpc_is_an_error_that_says_what_came_and_a_status_says_itself() {
    const BUSY: &[(&str, &str)] = &[("grpc-status", "8"), ("grpc-message", "later%2C please")];
    let html = || Said { headers: &[("content-type", "text/html")], ..said(&[b"<html>"]) };
    let cases: [(&str, Said, Code, &str); 9] = [
        ("a page", html(), Code::Unknown, "\"text/html\""),
        ("no type at all", Said { headers: &[], ..said(&[]) }, Code::Unknown, "of type \"\""),
        ("HTTP 401", Said { status: 401, ..html() }, Code::Unauthenticated, "HTTP status 401"),
        ("HTTP 404", Said { status: 404, ..html() }, Code::Unimplemented, "HTTP status 404"),
        ("HTTP 503", Said { status: 503, ..html() }, Code::Unavailable, "HTTP status 503"),
        ("HTTP 301", Said { status: 301, ..said(&[]) }, Code::Unknown, "HTTP status 301"),
        (
            "a status alone",
            Said { headers: &[("grpc-status", "16"), ("grpc-message", "no token")], trailers: None, ..said(&[]) },
            Code::Unauthenticated,
            "no token",
        ),
        (
            "a status with an HTTP status",
            Said { status: 503, headers: &[("grpc-status", "7")], trailers: None, ..said(&[]) },
            Code::PermissionDenied,
            "",
        ),
        ("a status at the end", Said { trailers: Some(BUSY), ..said(&[]) }, Code::ResourceExhausted, "later, please"),
    ];
    for (case, said, code, text) in cases {
        let (messages, end) = heard(said).await;
        let status = end.unwrap_err();
        assert_eq!((messages.len(), status.code()), (0, code), "{case}: {status}");
        assert!(status.message().contains(text), "{case}: {status}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_large_message_leaves_no_memory_behind() {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let text = "x".repeat(3 << 20);
    let frames = [framed(&text), framed("small")].concat();
    let server = serve(said(&[&frames]), theirs);
    let (sender, driver) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
    let driven = tokio::spawn(driver);
    let connection = Connection::new(sender, "https://control.test".parse().unwrap(), Coalescing::default());
    let requests = Request::new(stream::pending::<String>());
    let mut answers = connection.stream::<String, String>("/test/Stream", requests, 8 << 20).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().len(), text.len());
    assert!(answers.received.remaining() < 1 << 20, "{} bytes are kept", answers.received.remaining());
    assert_eq!(answers.message().await.unwrap().unwrap(), "small");
    driven.abort();
    server.abort();
}
