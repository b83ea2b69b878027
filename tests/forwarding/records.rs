//! Records of every size and form (RFC 8446 §5): what is allowed comes through, what is not has its alert.

use culvert::hbone::{Config, Endpoint, Role};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::opened::{ROLES, open, pattern};
use crate::raw_h2::{ENHANCE_YOUR_CALM, Frame};
use crate::raw_tls::{APPLICATION_DATA, BAD_RECORD_MAC, CHANGE_CIPHER_SPEC, RECORD_OVERFLOW, UNEXPECTED_MESSAGE};
use crate::tunnel_peers::{Realm, eventually, soon};

fn endpoint() -> Endpoint {
    Endpoint::new(Config::default())
}

const MOST: usize = 1 << 14;

#[tokio::test]
async fn records_of_every_size_with_and_without_padding_carry_the_same_bytes() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        // Each size once; records end anywhere in the frames that they carry. Most are small, so that this does not take long.
        let sizes = (1..=700).chain((700..MOST).step_by(211)).chain(MOST - 30..=MOST);
        let sizes: Vec<usize> = sizes.collect();
        let total: usize = sizes.iter().sum();
        let mut frames = Vec::new();
        let mut sent = Vec::new();
        let bytes = pattern(total);
        let mut rest = &bytes[..];
        let mut size = 1;
        while frames.len() < total {
            let (payload, after) = rest.split_at(size.min(rest.len()));
            frames.extend(Frame::data(1, payload).encode());
            sent.extend_from_slice(payload);
            rest = after;
            size = size * 5 % 16_001 + 1;
        }
        let application = opened.application;
        let mut socket = application.socket;
        let reader = tokio::spawn(async move {
            let mut got = vec![0; sent.len()];
            socket.read_exact(&mut got).await.unwrap();
            (socket, got == sent)
        });
        let tls = &mut opened.peer.io;
        let (mut rest, mut since, mut payload) = (&frames[..], 0, 0);
        let mut walked = 0;
        for (number, size) in sizes.iter().copied().chain(std::iter::repeat(MOST)).enumerate() {
            let (part, after) = rest.split_at(size.min(rest.len()));
            rest = after;
            // None, a little, and as much as the record takes.
            let padding = [0, 1 + number % 255, MOST - part.len()][number % 3].min(MOST - part.len());
            let record = tls.send.seal(APPLICATION_DATA, part, padding);
            soon(tls.write_raw(&record)).await.unwrap();
            since += part.len();
            if since >= 64 << 10 || rest.is_empty() {
                // Never more under way than any window: frames that are whole by now were taken.
                let end = frames.len() - rest.len();
                while let Some(length) = frame_at(&frames, walked).filter(|length| walked + length <= end) {
                    (walked, payload) = (walked + length, payload + length - 9);
                }
                let total = || if role == Role::Client { application.meter.totals().1 } else { application.meter.totals().0 };
                eventually("the application took it", || total() >= payload as u64).await;
                since = 0;
            }
            if rest.is_empty() {
                break;
            }
        }
        let (_socket, same) = soon(reader).await.unwrap();
        assert!(same);
    }
}

/// The octets of the frame there.
fn frame_at(frames: &[u8], at: usize) -> Option<usize> {
    let head = frames.get(at..at + 9)?;
    Some(9 + u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize)
}

#[tokio::test]
async fn records_arrive_in_whatever_segments() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        opened.peer.io.socket.set_nodelay(true).unwrap();
        let bytes = pattern(3000);
        let mut wire = Vec::new();
        for piece in bytes.chunks(300) {
            wire.extend(opened.peer.io.send.seal(APPLICATION_DATA, &Frame::data(1, piece).encode(), 5));
        }
        for octet in wire {
            opened.peer.io.write_raw(&[octet]).await.unwrap();
        }
        opened.application.expect(&bytes).await;
        opened.works().await;
    }
}

#[tokio::test]
async fn empty_records_are_allowed_and_a_flood_of_them_is_not() {
    let realm = Realm::new();
    for role in ROLES {
        for padding in [0, 1000] {
            let mut opened = open(&realm, role, endpoint()).await;
            for _ in 0..300 {
                let record = opened.peer.io.send.seal(APPLICATION_DATA, &[], padding);
                opened.peer.io.write_raw(&record).await.unwrap();
            }
            opened.works().await;
            let flood: Vec<u8> = (0..5000).flat_map(|_| opened.peer.io.send.seal(APPLICATION_DATA, &[], padding)).collect();
            let _ = tokio::time::timeout(crate::tunnel_peers::PATIENCE, opened.peer.io.write_raw(&flood)).await.expect("it is still read");
            assert_eq!(opened.ends().await.goaway, Some(ENHANCE_YOUR_CALM), "{role:?}");
        }
    }
}

#[tokio::test]
async fn a_record_with_one_bit_flipped_ends_the_tunnel() {
    let realm = Realm::new();
    for role in ROLES {
        let length = 5 + Frame::data(1, *b"good bytes").encode().len() + 17;
        // The version is only authenticated; type and length have their own errors, or make it wait for more.
        for place in (1..3).chain(5..length) {
            let mut opened = open(&realm, role, endpoint()).await;
            let mut record = opened.peer.io.send.seal(APPLICATION_DATA, &Frame::data(1, *b"good bytes").encode(), 0);
            assert_eq!(record.len(), length);
            record[place] ^= 1 << (place % 8);
            opened.peer.io.write_raw(&record).await.unwrap();
            assert_eq!(opened.ends().await.alert, Some(BAD_RECORD_MAC), "{role:?} {place}");
        }
    }
}

#[tokio::test]
async fn bytes_before_a_broken_record_arrive_and_none_after_it() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        let tls = &mut opened.peer.io;
        let mut wire = tls.send.seal(APPLICATION_DATA, &Frame::data(1, *b"good").encode(), 0);
        let mut broken = tls.send.seal(APPLICATION_DATA, &Frame::data(1, *b"broken").encode(), 0);
        broken[20] ^= 1;
        wire.extend(broken);
        wire.extend(tls.send.seal(APPLICATION_DATA, &Frame::data(1, *b"behind").ends().encode(), 0));
        tls.write_raw(&wire).await.unwrap();
        let mut got = Vec::new();
        let end = soon(opened.application.socket.read_to_end(&mut got)).await;
        assert!(end.is_err() && b"good".starts_with(&got), "{role:?} {end:?} {got:?}");
    }
}

#[tokio::test]
async fn records_of_a_wrong_form_have_their_alerts() {
    let realm = Realm::new();
    let frame = |size: usize| Frame::data(1, vec![1; size - 9]).encode();
    for role in ROLES {
        // What is inside.
        let inside: [(&str, Vec<u8>, u8); 6] = [
            ("padding alone", vec![0; 100], UNEXPECTED_MESSAGE),
            ("of no type", [frame(100), vec![99]].concat(), UNEXPECTED_MESSAGE),
            ("ChangeCipherSpec, encrypted", vec![1, CHANGE_CIPHER_SPEC], UNEXPECTED_MESSAGE),
            ("one octet too much", [frame(MOST + 1), vec![APPLICATION_DATA]].concat(), RECORD_OVERFLOW),
            ("as much too much as fits", [frame(MOST + 239), vec![APPLICATION_DATA]].concat(), RECORD_OVERFLOW),
            ("a ciphertext too long, although it is mostly padding", [vec![APPLICATION_DATA], vec![0; MOST + 256]].concat(), RECORD_OVERFLOW),
        ];
        for (what, inner, expected) in inside {
            let mut opened = open(&realm, role, endpoint()).await;
            let record = opened.peer.io.send.seal_inner(inner);
            opened.peer.io.write_raw(&record).await.unwrap();
            assert_eq!(opened.ends().await.alert, Some(expected), "{role:?}: {what}");
        }
        // What is outside: the header alone is enough.
        let outside: [(&str, [u8; 5], u8); 9] = [
            ("too long", [23, 3, 3, 0x41, 0x01], RECORD_OVERFLOW),
            ("as long as can be", [23, 3, 3, 0xff, 0xff], RECORD_OVERFLOW),
            ("no room for a tag", [23, 3, 3, 0, 16], BAD_RECORD_MAC),
            ("empty", [23, 3, 3, 0, 0], BAD_RECORD_MAC),
            ("ChangeCipherSpec after the handshake", [20, 3, 3, 0, 1], UNEXPECTED_MESSAGE),
            ("an alert in the clear", [21, 3, 3, 0, 2], UNEXPECTED_MESSAGE),
            ("a handshake in the clear", [22, 3, 3, 0, 100], UNEXPECTED_MESSAGE),
            ("no TLS at all", *b"GET /", UNEXPECTED_MESSAGE),
            ("of no type", [0, 3, 3, 0, 100], UNEXPECTED_MESSAGE),
        ];
        for (what, header, expected) in outside {
            let mut opened = open(&realm, role, endpoint()).await;
            opened.peer.io.socket.write_all(&header).await.unwrap();
            assert_eq!(opened.ends().await.alert, Some(expected), "{role:?}: {what}");
        }
    }
}

#[tokio::test]
async fn our_records_are_full_and_none_is_longer_than_allowed() {
    let realm = Realm::new();
    for role in ROLES {
        let mut opened = open(&realm, role, endpoint()).await;
        let bytes = pattern(60_000);
        opened.application.send(&bytes).await;
        opened.application.finish().await;
        assert!(soon(opened.peer.read_to_end(1)).await == bytes);
        // `RawTls` refuses longer ones.
        assert_eq!(opened.peer.io.longest, MOST, "{role:?}");
    }
}
