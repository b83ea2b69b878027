//! How TLS ends a tunnel: close_notify, alerts, connections that break off, and post-handshake messages that must not come (RFC 8446 §4.6, §6).

use culvert::hbone::{Config, Endpoint, Role};
use tokio::io::AsyncWriteExt;

use crate::opened::{Farewell, ROLES, open};
use crate::raw_h2::{ENHANCE_YOUR_CALM, Frame, NO_ERROR};
use crate::raw_tls::{ALERT, APPLICATION_DATA, CLOSE_NOTIFY, DECODE_ERROR, HANDSHAKE, ILLEGAL_PARAMETER, UNEXPECTED_MESSAGE, key_update, message};
use crate::tunnel_peers::Realm;

fn endpoint() -> Endpoint {
    Endpoint::new(Config::default())
}

const NEW_SESSION_TICKET: u8 = 4;
const CERTIFICATE_REQUEST: u8 = 13;

#[tokio::test]
async fn close_notify_in_mid_transfer_is_answered_and_is_no_end_of_a_stream() {
    let realm = Realm::new();
    for role in ROLES {
        // 90, user_canceled, announces one.
        for alert in [[1, 0], [2, 0], [1, 90]] {
            let mut opened = open(&realm, role, endpoint()).await;
            opened.works().await;
            opened.peer.send(&Frame::data(1, *b"half of it")).await;
            opened.peer.io.record(ALERT, &alert).await;
            let farewell = opened.ends().await;
            assert_eq!(farewell, Farewell { alert: Some(CLOSE_NOTIFY), goaway: Some(NO_ERROR) }, "{role:?} {alert:?}");
        }
    }
}

#[tokio::test]
async fn every_other_alert_ends_the_tunnel_whatever_its_level() {
    let realm = Realm::new();
    for role in ROLES {
        for level in [1, 2] {
            for description in [10, 20, 22, 42, 80, 116, 255] {
                let mut opened = open(&realm, role, endpoint()).await;
                opened.peer.io.record(ALERT, &[level, description]).await;
                opened.ends().await;
            }
        }
    }
}

#[tokio::test]
async fn an_alert_that_is_none_is_an_error_of_its_own() {
    let realm = Realm::new();
    for role in ROLES {
        // RFC 8446 §5.1 and §5.4: neither empty nor in pieces nor two in a record.
        for (what, content, expected) in
            [("empty", &[][..], UNEXPECTED_MESSAGE), ("a piece", &[1], DECODE_ERROR), ("two", &[1, 0, 1, 0], DECODE_ERROR)]
        {
            let mut opened = open(&realm, role, endpoint()).await;
            opened.peer.io.record(ALERT, content).await;
            assert_eq!(opened.ends().await.alert, Some(expected), "{role:?} {what}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_breaks_off_is_no_end_of_a_stream() {
    let realm = Realm::new();
    for role in ROLES {
        for cut in ["between records", "in a header", "in a record", "with a reset"] {
            let mut opened = open(&realm, role, endpoint()).await;
            opened.works().await;
            let tls = &mut opened.peer.io;
            let record = tls.send.seal(APPLICATION_DATA, &Frame::data(1, vec![1; 1000]).ends().encode(), 0);
            match cut {
                "in a header" => tls.write_raw(&record[..3]).await.unwrap(),
                "in a record" => tls.write_raw(&record[..900]).await.unwrap(),
                "with a reset" => socket2::SockRef::from(&tls.socket).set_linger(Some(std::time::Duration::ZERO)).unwrap(),
                _ => {}
            }
            if cut != "with a reset" {
                tls.socket.shutdown().await.unwrap();
                opened.ends().await;
                continue;
            }
            drop(opened.peer);
            assert!(opened.application.read_to_end().await.is_err(), "{role:?} {cut}");
        }
    }
}

#[tokio::test]
async fn tickets_are_ignored_by_a_client_and_refused_by_a_server() {
    let realm = Realm::new();
    let ticket = message(NEW_SESSION_TICKET, &[7; 5000]);
    for pieces in [ticket.len(), 1000, 3000] {
        let mut opened = open(&realm, Role::Client, endpoint()).await;
        for piece in ticket.chunks(pieces) {
            opened.peer.io.record(HANDSHAKE, piece).await;
        }
        opened.works().await;
        // Two and a half in a record, the rest in the next.
        let many = ticket.repeat(3);
        let (first, second) = many.split_at(12_500);
        opened.peer.io.record(HANDSHAKE, first).await;
        opened.peer.io.record(HANDSHAKE, second).await;
        opened.works().await;
    }
    let mut opened = open(&realm, Role::Server, endpoint()).await;
    opened.peer.io.record(HANDSHAKE, &ticket).await;
    assert_eq!(opened.ends().await.alert, Some(UNEXPECTED_MESSAGE));
}

#[tokio::test]
async fn handshake_messages_that_must_not_come_have_their_alerts() {
    let realm = Realm::new();
    let two_updates = [key_update(0), key_update(0)].concat();
    let table: [(&str, Vec<u8>, u8); 11] = [
        ("CertificateRequest, which nobody said to support", message(CERTIFICATE_REQUEST, &[0; 40]), UNEXPECTED_MESSAGE),
        ("HelloRequest of TLS 1.2", message(0, &[]), UNEXPECTED_MESSAGE),
        ("ClientHello: renegotiation", message(1, &[3; 200]), UNEXPECTED_MESSAGE),
        ("Finished, once more", message(20, &[1; 48]), UNEXPECTED_MESSAGE),
        ("of no kind", message(99, &[1; 48]), UNEXPECTED_MESSAGE),
        ("of 16 MiB", vec![NEW_SESSION_TICKET, 0xff, 0xff, 0xff, 0], UNEXPECTED_MESSAGE),
        ("empty record", Vec::new(), UNEXPECTED_MESSAGE),
        ("KeyUpdate that asks for something else", key_update(2), ILLEGAL_PARAMETER),
        ("KeyUpdate of two octets", message(24, &[0, 0]), DECODE_ERROR),
        ("KeyUpdate of none", message(24, &[]), DECODE_ERROR),
        ("KeyUpdate that is not the last of its record", two_updates, UNEXPECTED_MESSAGE),
    ];
    for role in ROLES {
        for (what, bytes, expected) in &table {
            let mut opened = open(&realm, role, endpoint()).await;
            opened.peer.io.record(HANDSHAKE, bytes).await;
            assert_eq!(opened.ends().await.alert, Some(*expected), "{role:?}: {what}");
        }
    }
}

#[tokio::test]
async fn nothing_comes_between_the_pieces_of_a_handshake_message() {
    // RFC 8446 §5.1.
    let realm = Realm::new();
    for role in ROLES {
        for (kind, content) in [(APPLICATION_DATA, Frame::data(1, *b"x").encode()), (APPLICATION_DATA, Vec::new()), (ALERT, vec![1, 0])] {
            let mut opened = open(&realm, role, endpoint()).await;
            opened.peer.io.record(HANDSHAKE, &key_update(0)[..3]).await;
            opened.peer.io.record(kind, &content).await;
            assert_eq!(opened.ends().await.alert, Some(UNEXPECTED_MESSAGE), "{role:?} {kind}");
        }
    }
}

#[tokio::test]
async fn a_flood_of_key_updates_ends_the_tunnel_and_a_busy_tunnel_may_have_many() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        let tls = &mut opened.peer.io;
        let mut wire = Vec::new();
        for _ in 0..3000 {
            wire.extend(tls.send.seal(HANDSHAKE, &key_update(0), 0));
            tls.send.update();
        }
        // It is cut before all of it is read.
        let _ = tls.write_raw(&wire).await;
        assert_eq!(opened.ends().await.goaway, Some(ENHANCE_YOUR_CALM), "{role:?}");
    }
}
