//! Random frames, legal ones and others, in random order and in random pieces, against both of our sides: an answer or a clean end, never a hang
//! and never a task that dies.

use culvert::hbone::{Config, Endpoint};
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, RngSeed, TestCaseError, TestRunner};

use crate::opened::{ROLES, open};
use crate::raw_h2::{Frame, GOAWAY, PING, hpack};
use crate::tunnel_peers::{PATIENCE, Realm};

/// A frame as a peer might send it that means no good: kinds, streams and lengths that exist, and some that do not.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let stream = prop_oneof![4 => Just(1u32), 2 => Just(3u32), 1 => Just(0u32), 1 => 0..9u32, 1 => any::<u32>()];
    let octets = |most| prop::collection::vec(any::<u8>(), 0..most);
    let number = prop_oneof![Just(0u32), 1..9u32, Just(0x7fff_ffff), any::<u32>()];
    let settings = (1..8u16, number.clone()).prop_map(|setting| Frame::settings(&[setting]));
    let request = prop_oneof![
        3 => Just(hpack::block(&[(":method", "CONNECT"), (":authority", "10.0.0.2:80")])),
        2 => Just(hpack::block(&[(":status", "200")])),
        1 => octets(60).boxed(),
    ];
    prop_oneof![
        6 => (stream.clone(), octets(40), any::<bool>()).prop_map(|(stream, bytes, end)| Frame::new(0, u8::from(end), stream, bytes)),
        2 => (stream.clone(), octets(40)).prop_map(|(stream, bytes)| Frame::new(0, 8, stream, bytes)),
        3 => (stream.clone(), request, any::<u8>()).prop_map(|(stream, block, flags)| Frame::new(1, flags | 4, stream, block)),
        3 => settings,
        3 => (stream.clone(), number.clone()).prop_map(|(stream, number)| Frame::window_update(stream, number)),
        2 => (stream.clone(), number.clone()).prop_map(|(stream, number)| Frame::reset(stream, number)),
        1 => (stream.clone(), number).prop_map(|(last, code)| Frame::goaway(last, code)),
        2 => any::<[u8; 8]>().prop_map(Frame::ping),
        2 => (any::<u8>(), any::<u8>(), stream, octets(20)).prop_map(|(kind, flags, stream, bytes)| Frame::new(kind % 12, flags, stream, bytes)),
    ]
    .prop_map(|frame| frame.encode())
}

fn input() -> impl Strategy<Value = (Vec<Vec<u8>>, usize)> {
    (prop::collection::vec(frame(), 1..25), prop_oneof![1..40usize, Just(16 << 10)])
}

async fn try_out(realm: &Realm, frames: &[Vec<u8>], piece: usize) -> Result<(), TestCaseError> {
    for role in ROLES {
        let mut opened = open(realm, role, Endpoint::new(Config::default())).await;
        let wire = frames.concat();
        for part in wire.chunks(piece) {
            // The tunnel may be over by then.
            if opened.peer.send_bytes(part).await.is_err() {
                break;
            }
        }
        let _ = opened.peer.send_bytes(&Frame::ping(*b"at last!").encode()).await;
        let outcome = async {
            while let Some(frame) = opened.peer.receive().await {
                if frame.kind == GOAWAY || (frame.kind == PING && frame.payload == b"at last!") {
                    return true;
                }
            }
            // Closed, with an alert at least.
            !opened.peer.io.alerts.is_empty()
        };
        let outcome = tokio::time::timeout(PATIENCE, outcome).await;
        prop_assert_eq!(outcome.ok(), Some(true), "{:?}", role);
    }
    Ok(())
}

#[test]
fn random_frames_have_an_answer_or_a_clean_end() {
    let told = Cases::default();
    let rng_seed = if told.rng_seed == RngSeed::Random { RngSeed::Fixed(5) } else { told.rng_seed };
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { told.cases } else { 150 };
    let mut runner = TestRunner::new(Cases { cases, rng_seed, failure_persistence: None, max_shrink_time: 60_000, ..told });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let realm = runtime.block_on(async { Realm::new() });
    let outcome = runner.run(&input(), |(frames, piece)| runtime.block_on(try_out(&realm, &frames, piece)));
    outcome.unwrap_or_else(|failed| panic!("{failed}"));
}
