//! H4: what is a request and what is not, and how each is answered.

use culvert::hbone::{Config, ConnectResponse, Refusal};

use crate::raw_h2::{self, Frame, RawPeer, field, hpack};
use crate::tunnel_peers::{OurServer, Realm, soon, tls_to};

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// It reaches the application side with this authority.
    Request(&'static str),
    /// It is answered 400.
    Bad,
    /// It is malformed: RST_STREAM(PROTOCOL_ERROR) (RFC 9113 §8.1.1).
    Malformed,
    /// The header list is too large: 431.
    TooLarge,
    /// No field that h2's decoder can hold: the tunnel ends with PROTOCOL_ERROR (RFC 9113 §5.4: a stream error may be treated as one of the
    /// connection).
    Ends,
}

use Outcome::{Bad, Ends, Malformed, Request, TooLarge};

fn connect(authority: &str) -> Vec<u8> {
    hpack::block(&[(":method", "CONNECT"), (":authority", authority)])
}

fn with(more: &[(&str, &str)]) -> Vec<u8> {
    hpack::block(&[&[(":method", "CONNECT"), (":authority", "10.0.0.2:80")], more].concat())
}

fn table() -> Vec<(&'static str, Vec<u8>, Outcome)> {
    let get = [(":method", "GET"), (":scheme", "https"), (":authority", "10.0.0.2:80"), (":path", "/")];
    let method = |method: &'static str| {
        let mut fields = get;
        fields[0].1 = method;
        hpack::block(&fields)
    };
    let long = format!("{}:80", "a".repeat(300));
    vec![
        // Authority forms.
        ("IPv4", connect("10.0.0.2:80"), Request("10.0.0.2:80")),
        ("IPv6", connect("[2001:db8::1]:80"), Request("[2001:db8::1]:80")),
        ("IPv6 loopback", connect("[::1]:80"), Request("[::1]:80")),
        ("IPv4 in IPv6", connect("[::ffff:10.0.0.2]:80"), Request("10.0.0.2:80")),
        ("hostname", connect("web.default.svc.cluster.local:80"), Request("web.default.svc.cluster.local:80")),
        ("hostname in capitals", connect("WEB.default:80"), Request("web.default:80")),
        ("highest port", connect("10.0.0.2:65535"), Request("10.0.0.2:65535")),
        ("no port", connect("10.0.0.2"), Bad),
        ("empty port", connect("10.0.0.2:"), Bad),
        ("port 0", connect("10.0.0.2:0"), Bad),
        ("port 65536", connect("10.0.0.2:65536"), Bad),
        ("leading zero in the port", connect("10.0.0.2:080"), Bad),
        ("sign before the port", connect("10.0.0.2:+80"), Bad),
        ("port in letters", connect("10.0.0.2:http"), Bad),
        ("two ports", connect("10.0.0.2:80:80"), Bad),
        ("user", connect("user@10.0.0.2:80"), Bad),
        ("user and password", connect("user:secret@10.0.0.2:80"), Bad),
        ("zone", connect("[fe80::1%eth0]:80"), Bad),
        ("IPv6 without brackets", connect("::1:80"), Bad),
        ("IPv4 in brackets", connect("[10.0.0.2]:80"), Bad),
        ("bracket not closed", connect("[::1:80"), Bad),
        ("three octets", connect("10.0.2:80"), Bad),
        ("octet 256", connect("10.0.0.256:80"), Bad),
        ("trailing dot", connect("web.:80"), Bad),
        ("leading dot", connect(".web:80"), Bad),
        ("empty label", connect("web..default:80"), Bad),
        ("only a port", connect(":80"), Bad),
        ("empty", connect(""), Bad),
        ("space", connect("10.0.0.2:80 "), Malformed),
        ("path behind", connect("10.0.0.2:80/x"), Bad),
        ("scheme before", connect("http://10.0.0.2:80"), Bad),
        ("not ASCII", connect("w\u{e9}b:80"), Bad),
        ("percent", connect("web%2e:80"), Bad),
        ("control character", connect("web\u{1}:80"), Bad),
        ("NUL", connect("10.0.0.2\0:80"), Malformed),
        ("300 bytes", connect(&long), Bad),
        // Pseudo headers.
        ("no authority", hpack::block(&[(":method", "CONNECT")]), Malformed),
        ("no method", hpack::block(&[(":authority", "10.0.0.2:80")]), Malformed),
        ("nothing", vec![], Malformed),
        ("two authorities", with(&[]).into_iter().chain(hpack::literal(":authority", b"10.0.0.3:80")).collect(), Malformed),
        ("two equal authorities", with(&[(":authority", "10.0.0.2:80")]), Malformed),
        ("two methods", [hpack::literal(":method", b"CONNECT"), with(&[])].concat(), Malformed),
        (":scheme", with(&[(":scheme", "https")]), Malformed),
        (":path", with(&[(":path", "/")]), Malformed),
        (":scheme and :path", with(&[(":scheme", "https"), (":path", "/")]), Malformed),
        (":status", with(&[(":status", "200")]), Malformed),
        ("unknown pseudo header", with(&[(":unknown", "x")]), Malformed),
        ("pseudo header after a field", hpack::block(&[(":method", "CONNECT"), ("baggage", "x"), (":authority", "10.0.0.2:80")]), Malformed),
        ("authority before method", hpack::block(&[(":authority", "10.0.0.2:80"), (":method", "CONNECT")]), Request("10.0.0.2:80")),
        ("extended CONNECT", with(&[(":protocol", "websocket"), (":scheme", "https"), (":path", "/")]), Bad),
        ("extended CONNECT, no path", with(&[(":protocol", "connect-udp")]), Bad),
        // Methods.
        ("GET", method("GET"), Bad),
        ("POST", method("POST"), Bad),
        ("OPTIONS", method("OPTIONS"), Bad),
        ("connect", method("connect"), Bad),
        ("Connect", method("Connect"), Bad),
        ("connect as CONNECT is sent", hpack::block(&[(":method", "connect"), (":authority", "10.0.0.2:80")]), Bad),
        ("GET as CONNECT is sent", hpack::block(&[(":method", "GET"), (":authority", "10.0.0.2:80")]), Bad),
        ("no method name", hpack::block(&[(":method", ""), (":authority", "10.0.0.2:80")]), Bad),
        // Fields.
        ("Host beside", with(&[("host", "10.9.9.9:99")]), Request("10.0.0.2:80")),
        ("only Host", hpack::block(&[(":method", "CONNECT"), ("host", "10.0.0.2:80")]), Malformed),
        ("content-length: 0", with(&[("content-length", "0")]), Bad),
        ("content-length: 5", with(&[("content-length", "5")]), Bad),
        ("content-length that is none", with(&[("content-length", "x")]), Bad),
        ("two content-lengths", with(&[("content-length", "1"), ("content-length", "2")]), Bad),
        ("connection", with(&[("connection", "close")]), Malformed),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")]), Malformed),
        ("upgrade", with(&[("upgrade", "h2c")]), Malformed),
        ("te: gzip", with(&[("te", "gzip")]), Malformed),
        ("te: trailers", with(&[("te", "trailers")]), Request("10.0.0.2:80")),
        ("field name in capitals", with(&[("Baggage", "x")]), Malformed),
        ("field name with a space", with(&[("bag gage", "x")]), Malformed),
        ("unknown field", with(&[("x-anything", "x")]), Request("10.0.0.2:80")),
        ("hostile baggage", with(&[("baggage", "k8s.cluster.name=,,,=,=,k8s.pod.name")]), Request("10.0.0.2:80")),
        ("9 KiB of field", with(&[("x-long", &"x".repeat(9 << 10))]), TooLarge),
        ("200 small fields", [with(&[]), hpack::literal("x-small", b"").repeat(300)].concat(), TooLarge),
    ]
}

/// What the peer sees, and what the application side sees.
async fn try_out(
    server: &mut OurServer,
    peer: &mut RawPeer<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>,
    stream: u32,
    block: &[u8],
) -> Outcome {
    peer.send(&Frame::headers(stream, block)).await;
    let answer = async {
        loop {
            let frame = peer.next().await.expect("the tunnel ended");
            match frame.kind {
                raw_h2::HEADERS => {
                    let fields = peer.fields(&frame);
                    let status = field(&fields, ":status").unwrap().to_owned();
                    assert_eq!(frame.stream, stream);
                    assert_eq!(frame.end_stream(), status != "200", "{status}");
                    return Ok(status);
                }
                raw_h2::GOAWAY => return Err(1000 + frame.code()),
                raw_h2::RST_STREAM if frame.stream == stream => return Err(frame.code()),
                // The rest of the one before.
                raw_h2::RST_STREAM => {}
                other => panic!("kind {other}"),
            }
        }
    };
    let decide = async {
        let incoming = server.requests.recv().await.unwrap();
        match incoming.request() {
            Ok(request) => {
                let authority = request.authority.to_string();
                Some((authority, incoming.accept(&ConnectResponse::default()).unwrap()))
            }
            Err(_) => {
                incoming.refuse(Refusal::BadRequest);
                None
            }
        }
    };
    let mut decided = None;
    let (mut answer, mut decide) = (std::pin::pin!(answer), std::pin::pin!(decide));
    let answer = loop {
        tokio::select! {
            biased;
            found = &mut decide, if decided.is_none() => decided = Some(found),
            answer = &mut answer => break answer,
        }
    };
    match (answer, decided) {
        (Ok(status), Some(Some((authority, _stream)))) if status == "200" => Request(authority.leak()),
        (Ok(status), Some(None)) if status == "400" => Bad,
        (Ok(status), None) if status == "431" => TooLarge,
        (Err(raw_h2::PROTOCOL_ERROR), None) => Malformed,
        (Err(1001), None) => Ends,
        (answer, decided) => panic!("{answer:?}, decided: {}", decided.is_some()),
    }
}

#[tokio::test]
async fn every_form_of_request_has_its_answer_and_the_tunnel_lives_on() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let credential = realm.credential("client").await;
    let mut peer = RawPeer::client(tls_to(server.address, &credential).await, &[]).await;
    let mut stream = 1;
    let mut wrong = Vec::new();
    for (what, block, expected) in table() {
        let outcome = soon(try_out(&mut server, &mut peer, stream, &block)).await;
        if outcome != expected {
            wrong.push(format!("{what}: {outcome:?} instead of {expected:?}"));
        }
        stream += 2;
        if outcome == Ends {
            peer = RawPeer::client(tls_to(server.address, &credential).await, &[]).await;
            stream = 1;
        }
        let outcome = soon(try_out(&mut server, &mut peer, stream, &connect("10.0.0.2:80"))).await;
        assert_eq!(outcome, Request("10.0.0.2:80"), "after {what}");
        stream += 2;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn refusals_have_the_statuses_of_the_reference_and_no_body() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    let refusals = [(Refusal::BadRequest, "400"), (Refusal::Denied, "401"), (Refusal::Unavailable, "503")];
    for (index, (refusal, status)) in refusals.into_iter().enumerate() {
        let stream = u32::try_from(index * 2 + 1).unwrap();
        peer.send(&Frame::connect(stream, "10.0.0.2:80").ends()).await;
        server.request().await.refuse(refusal);
        assert_eq!(soon(peer.expect_status(stream)).await, (status.to_owned(), true));
    }
}

#[tokio::test]
async fn a_request_that_is_dropped_without_an_answer_is_reset() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    peer.send(&Frame::connect(1, "10.0.0.2:80")).await;
    drop(server.request().await);
    assert_eq!(soon(peer.expect(raw_h2::RST_STREAM, 1)).await.code(), raw_h2::CANCEL);
}

#[tokio::test]
async fn the_headers_of_a_request_and_its_answer_arrive() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let mut peer = RawPeer::client(tls_to(server.address, &*realm.credential("client").await).await, &[]).await;
    let baggage = "k8s.cluster.name=c1,k8s.namespace.name=default,k8s.deployment.name=web,service.name=web";
    let trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00";
    let fields = [("baggage", baggage), ("forwarded", "for=\"10.0.0.1:1\";host=web"), ("traceparent", trace), ("x-forwarded-network", "blue")];
    peer.send(&Frame::headers(1, with(&fields))).await;
    let incoming = server.request().await;
    let request = incoming.request().unwrap().clone();
    assert_eq!(request.baggage.as_ref().unwrap().to_header(), baggage);
    assert_eq!(request.forwarded.as_deref(), Some("for=\"10.0.0.1:1\";host=web"));
    assert_eq!(request.traceparent.as_deref(), Some(trace));
    assert_eq!(request.forwarded_network.as_deref(), Some("blue"));
    let _stream = incoming.accept(&ConnectResponse { baggage: request.baggage }).unwrap();
    let answer = soon(peer.expect_headers(1)).await;
    assert_eq!(field(&answer, ":status"), Some("200"));
    assert_eq!(field(&answer, "baggage"), Some(baggage));
}
