#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};
use tokio::time::Instant;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
const GREETING: [u8; 3] = [5, 1, 0];

fn request(kind: u8, host: &[u8], port: u16) -> Vec<u8> {
    let length = if kind == DOMAIN { vec![u8::try_from(host.len()).unwrap()] } else { Vec::new() };
    [&[5, 1, 0, kind][..], &length, host, &port.to_be_bytes()].concat()
}

fn named(name: &str) -> Vec<u8> {
    [&GREETING[..], &request(DOMAIN, name.as_bytes(), 80)].concat()
}

/// What the server makes of `bytes`, what it said to them, and what of them it left alone; the client sends so many at a time and hangs up.
async fn talk(bytes: &[u8], at_a_time: usize) -> (Result<Destination, HandshakeError>, Vec<u8>, Vec<u8>) {
    let (mut client, mut server) = duplex(at_a_time);
    let (mut heard, bytes) = (Vec::new(), bytes.to_vec());
    let client = tokio::spawn(async move {
        let (mut from, mut to) = tokio::io::split(&mut client);
        let sending = async {
            // The server may have hung up before.
            let _ = to.write_all(&bytes).await;
            let _ = to.shutdown().await;
        };
        let ((), _) = tokio::join!(sending, from.read_to_end(&mut heard));
        heard
    });
    let outcome = handshake(&mut server, PATIENCE).await;
    let mut rest = Vec::new();
    if outcome.is_ok() {
        server.read_to_end(&mut rest).await.unwrap();
    }
    drop(server);
    (outcome, client.await.unwrap(), rest)
}

#[tokio::test(start_paused = true)]
async fn each_kind_of_address_is_understood_in_one_piece_and_byte_by_byte_and_no_byte_more_is_taken() {
    let name = |name: &str| Destination::Name(name.to_owned(), 80);
    let address = |text: &str| Destination::Address(text.parse().unwrap());
    let longest = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
    for (request, expected) in [
        (request(IPV4, &[10, 0, 0, 1], 8080), address("10.0.0.1:8080")),
        (request(IPV6, &"fd00::1".parse::<Ipv6Addr>().unwrap().octets(), 65_535), address("[fd00::1]:65535")),
        (request(IPV6, &"::ffff:10.0.0.1".parse::<Ipv6Addr>().unwrap().octets(), 80), address("10.0.0.1:80")),
        (request(DOMAIN, b"Web.Shop.svc.CLUSTER.local.", 80), name("web.shop.svc.cluster.local")),
        (request(DOMAIN, b"web", 80), name("web")),
        (request(DOMAIN, b"_dns-1.web", 80), name("_dns-1.web")),
        (request(DOMAIN, longest.as_bytes(), 80), name(&longest)),
        (request(DOMAIN, b"10.0.0.1", 80), address("10.0.0.1:80")),
        (request(DOMAIN, b"fd00::1", 80), address("[fd00::1]:80")),
        (request(DOMAIN, b"::ffff:10.0.0.1", 80), address("10.0.0.1:80")),
    ] {
        for at_a_time in [1, 4096] {
            for greeting in [&[5, 1, 0][..], &[5, 3, 2, 1, 0], &[&[5, 255][..], &[0; 255]].concat()] {
                let (outcome, heard, rest) = talk(&[greeting, &request, b"application"].concat(), at_a_time).await;
                assert_eq!(outcome.unwrap(), expected);
                assert_eq!((heard.as_slice(), rest.as_slice()), (&[5, 0][..], &b"application"[..]), "{expected:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_ends_early_is_an_error_wherever_it_ends() {
    for whole in [[&GREETING[..], &request(IPV4, &[10, 0, 0, 1], 80)].concat(), named("web.shop")] {
        for length in 0..whole.len() {
            let (outcome, heard, _) = talk(&whole[..length], 4096).await;
            assert!(matches!(outcome, Err(HandshakeError::Io(ref error)) if error.kind() == io::ErrorKind::UnexpectedEof), "{length}: {outcome:?}");
            assert_eq!(heard, if length < GREETING.len() { &[][..] } else { &[5, 0] }, "{length}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_served_is_refused_with_the_code_for_it() {
    let after_greeting = |request: &[u8]| [&GREETING[..], request].concat();
    for (bytes, expected, reply, heard) in [
        (vec![4, 1, 0, 80, 10, 0, 0, 1, 0], "version 4 instead of 5", None, &[][..]),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "version 71 instead of 5", None, &[]),
        (vec![5, 0], "no method without authentication", None, &[5, 0xff]),
        (vec![5, 2, 1, 2], "no method without authentication", None, &[5, 0xff]),
        (after_greeting(&[4, 1, 0, 1]), "version 4 instead of 5", None, &[5, 0]),
        (after_greeting(&[5, 2, 0, 1, 10, 0, 0, 1, 0, 80]), "command 2", Some(Reply::CommandUnsupported), &[5, 0]),
        (after_greeting(&[5, 3, 0, 3, 1, b' ', 0, 80]), "command 3", Some(Reply::CommandUnsupported), &[5, 0]),
        (after_greeting(&[5, 0, 0, 1, 10, 0, 0, 1, 0, 80]), "command 0", Some(Reply::CommandUnsupported), &[5, 0]),
        (after_greeting(&[5, 1, 0, 2]), "address type 2", Some(Reply::AddressTypeUnsupported), &[5, 0]),
        (after_greeting(&[5, 1, 0, 0xff]), "address type 255", Some(Reply::AddressTypeUnsupported), &[5, 0]),
    ] {
        for at_a_time in [1, 4096] {
            let (outcome, said, _) = talk(&bytes, at_a_time).await;
            let error = outcome.unwrap_err();
            assert!(error.to_string().contains(expected), "{bytes:?}: {error}");
            assert_eq!((error.reply(), said.as_slice()), (reply, heard), "{bytes:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_a_host_name_is_refused_and_shown_safely() {
    let (label, name) = ("a".repeat(64), ["ab"; 85].join("."));
    assert_eq!(name.len(), 254);
    for wrong in ["", ".", "..", "a..b", ".a", "a b", "a\nb", "\u{1b}[2J", "zürich", "user@host", "web:80", "*.shop", "[fd00::1]", &label, &name] {
        let (outcome, ..) = talk(&named(wrong), 4096).await;
        let error = outcome.unwrap_err();
        assert!(matches!(error, HandshakeError::HostName(_)), "{wrong:?}: {error}");
        assert_eq!(error.reply(), Some(Reply::HostUnreachable));
        let shown = error.to_string();
        assert!(shown.len() < 200 && !shown.chars().any(char::is_control), "{shown}");
    }
    let (outcome, ..) = talk(&[&GREETING[..], &request(DOMAIN, &[0xff; 255], 80)].concat(), 4096).await;
    assert!(matches!(outcome, Err(HandshakeError::HostName(_))));
}

#[tokio::test(start_paused = true)]
async fn whoever_is_slow_is_given_up_on_after_the_time_limit_however_little_is_missing() {
    let whole = named("web.shop");
    for length in 0..whole.len() {
        let (mut client, mut server): (DuplexStream, DuplexStream) = duplex(4096);
        client.write_all(&whole[..length]).await.unwrap();
        let begun = Instant::now();
        let outcome = handshake(&mut server, PATIENCE).await;
        assert!(matches!(outcome, Err(HandshakeError::Late(PATIENCE))), "{length}: {outcome:?}");
        assert_eq!(begun.elapsed(), PATIENCE);
    }
    // Also if it goes on sending: a byte a second.
    let (mut client, mut server) = duplex(4096);
    let drip = tokio::spawn(async move {
        for byte in whole {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if client.write_u8(byte).await.is_err() {
                break;
            }
        }
        client
    });
    let begun = Instant::now();
    assert!(matches!(handshake(&mut server, PATIENCE).await, Err(HandshakeError::Late(PATIENCE))));
    assert_eq!(begun.elapsed(), PATIENCE);
    drip.abort();
    // A client that does not take what it is told has no more time either.
    let (mut client, mut server) = duplex(1);
    let deaf = tokio::spawn(async move {
        client.write_all(&GREETING).await.unwrap();
        std::future::pending::<()>().await;
    });
    assert!(matches!(handshake(&mut server, PATIENCE).await, Err(HandshakeError::Late(PATIENCE))));
    deaf.abort();
}

#[test]
fn a_reply_names_the_reason_and_no_address() {
    assert_eq!(Reply::Succeeded.message(), [5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(Reply::AddressTypeUnsupported.message()[..4], [5, 8, 0, 1]);
}

proptest! {
    /// Whatever is sent: an end, and at most one answer to the greeting.
    #[test]
    fn any_bytes_come_to_an_end_and_are_answered_with_two_bytes_at_most(
        mut bytes in prop::collection::vec(any::<u8>(), 0..600), polite in any::<bool>(),
    ) {
        if polite {
            bytes.splice(..0, [5, 1, 0, 5, 1, 0]);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let (outcome, heard, rest) = runtime.block_on(talk(&bytes, 4096));
        prop_assert!(heard.is_empty() || heard == [5, 0] || heard == [5, 0xff]);
        if outcome.is_ok() {
            prop_assert!(bytes.ends_with(&rest));
        }
    }
}
