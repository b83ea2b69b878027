#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use proptest::prelude::*;

use super::*;
use crate::forward::record::{Direction, Suite};
use crate::hbone::engine::Side;
use crate::hbone::{Config, Endpoint, Role};

fn direction(suite: Suite, sequence: u64) -> Direction {
    Direction { suite, secret: (0..suite.secret_length()).map(|at| u8::try_from(at).unwrap()).collect(), sequence }
}

/// A state in which every field has something to lose.
fn full(side: Side) -> State {
    let stream = |id: u32, shut_down: bool| StreamState {
        id,
        role: if side == Side::Server { Role::Server } else { Role::Client },
        send_window: -7,
        receive_window: 100_000,
        owed: 5000,
        target_window: 262_144,
        sparse: id == 3,
        sent_end: !shut_down && id == 3,
        received_end: shut_down,
        shut_down,
        backlog: if shut_down { Vec::new() } else { b"not yet taken".to_vec() },
    };
    State {
        side,
        peer: "spiffe://cluster.local/ns/default/sa/peer".parse().unwrap(),
        chain: List(vec![b"leaf".to_vec(), b"intermediate".to_vec()]),
        farewell: Duration::from_secs(3600),
        end: Duration::from_secs(3660),
        receive: direction(Suite::Aes256Gcm, 77),
        send: direction(Suite::Aes256Gcm, 88),
        input: vec![23, 3, 3, 0, 200, 1, 2, 3],
        output: vec![23, 3, 3, 0, 99, 9],
        control: b"control".to_vec(),
        post_handshake: vec![4, 0, 0, 100],
        preface_left: 0,
        frame: FrameState {
            head: Vec::new(),
            left: 30,
            current: Some(CurrentFrame { length: 40, kind: frame::HEADERS, flags: 0, stream: 7, padding: Some(3) }),
            gathered: vec![1; 10],
        },
        block: Some(BlockState { stream: 7, end_stream: false, fragments: 2, bytes: vec![0x82] }),
        table: TableState { max: 4000, entries: List(vec![EntryState { name: b"a".to_vec(), value: b"b".to_vec() }]) },
        promised: Promised { stream_window: 262_144, frame_size: 1 << 20, header_list: 8192, max_streams: 256 },
        settings: SettingsState { known: true, initial_window: 65_535, max_streams: 100 },
        send_window: 12_345,
        widest_send_window: 23_456,
        receive_window: 654_321,
        window: 1 << 20,
        next_id: 9,
        last_peer_id: 7,
        draining: Some(Some(7)),
        released: true,
        goaway_received: true,
        clock: ClockState { waits_for: 2, timer: Duration::from_secs(4), heard: Duration::from_secs(1) },
        temper: TemperState { since: Duration::from_millis(10), premature: 1, local: 2, idle: 3, empty: 4, moved: 5 },
        reset: List(vec![ResetState { id: 1, ago: Duration::from_secs(2) }]),
        streams: List(vec![stream(5, false), stream(3, false), stream(1, true)]),
    }
}

/// With a checksum that fits.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.extend_from_slice(digest(&SHA256, &bytes).as_ref());
    bytes
}

/// Reads a state, whose checksum is right; whatever it says, a tunnel that goes on with it does not panic.
async fn try_it(bytes: &[u8]) -> Result<(), StateError> {
    let state = encoding::open::<State>(bytes)?;
    state.check()?;
    let side = state.side;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut far = Vec::new();
    let sockets = (0..=state.streams.0.len()).map(|_| {
        far.push(std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        OwnedFd::from(listener.accept().unwrap().0)
    });
    let sockets = sockets.collect();
    let endpoint = Arc::new(Endpoint::new(Config::default()));
    // More than a slab holds, or keys that cannot be made, are refused here.
    if let Ok(mut thawed) = (Frozen { state: Box::new(state), sockets }).thaw(side, &endpoint) {
        let mut context = Context::from_waker(Waker::noop());
        let _ = thawed.tunnel.poll_next(&mut context);
        tokio::task::yield_now().await;
        let _ = thawed.tunnel.poll_next(&mut context);
        thawed.tunnel.credit_connection();
    }
    Ok(())
}

#[test]
fn what_is_written_is_read_again_in_full() {
    for side in [Side::Client, Side::Server] {
        let bytes = encoding::seal(&full(side));
        let state = encoding::open::<State>(&bytes).unwrap();
        assert_eq!(state.check(), Ok(()));
        assert_eq!(encoding::seal(&state), bytes, "{side:?}");
        assert_eq!(bytes.capacity(), bytes.len(), "secrets lie in one place only");
    }
}

#[tokio::test]
async fn a_tunnel_that_is_taken_up_is_in_the_state_that_was_written() {
    for side in [Side::Client, Side::Server] {
        let (mut near, mut sockets) = (Vec::new(), Vec::new());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for _ in 0..4 {
            near.push(std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            sockets.push(OwnedFd::from(listener.accept().unwrap().0));
        }
        // With other limits than those that the peer was told.
        let endpoint = Arc::new(Endpoint::new(Config { frame_size: 16_384, header_list: 100, max_streams: 1, ..Config::default() }));
        let written = full(side);
        let mut thawed = Frozen { state: Box::new(full(side)), sockets }.thaw(side, &endpoint).unwrap();
        let ids: Vec<u32> = thawed.streams.iter().map(|(id, ..)| *id).collect();
        assert_eq!(ids, [5, 3, 1], "in the order of the queue");
        assert_eq!(thawed.tunnel.inbox().streams(), 100);
        assert_eq!(thawed.tunnel.windows.tunnel(), 1 << 20);
        // A stream without its application has none to be asked for: give each one.
        for (id, role, socket) in thawed.streams {
            let (done, _) = oneshot::channel();
            let wake = super::super::ready::StreamWaker::new(&thawed.tunnel.inbox, 0);
            let slot = thawed.tunnel.streams.slot_of(id).unwrap();
            let attach = super::super::Attach { id, socket, role, meter: Arc::default(), done, slot: None };
            thawed.tunnel.streams.at(slot).unwrap().phase = Phase::Relaying(super::super::stream::Application::new(attach, wake));
            thawed.tunnel.senders.push_back(slot);
        }
        let order = thawed.tunnel.in_order();
        let (give, _taken) = oneshot::channel();
        let freeze = Freeze { origin: thawed.origin, now: false, give };
        let mut again = thawed.tunnel.take_apart(&freeze, &order);
        // Time goes on.
        let close = |one: Duration, other: Duration| one.abs_diff(other) < Duration::from_secs(1);
        assert!(close(again.farewell, written.farewell) && close(again.end, written.end));
        assert!(close(again.clock.timer, written.clock.timer) && close(again.clock.heard, written.clock.heard));
        assert!(close(again.temper.since, written.temper.since) && close(again.reset.0[0].ago, written.reset.0[0].ago));
        (again.farewell, again.end) = (written.farewell, written.end);
        (again.clock.timer, again.clock.heard) = (written.clock.timer, written.clock.heard);
        (again.temper.since, again.reset.0[0].ago) = (written.temper.since, written.reset.0[0].ago);
        assert_eq!(encoding::seal(&again), encoding::seal(&written), "{side:?}");
    }
}

#[tokio::test]
async fn no_flipped_bit_makes_a_tunnel_panic() {
    let bytes = encoding::seal(&full(Side::Server));
    let body = bytes.len() - 32;
    let mut refused = 0;
    for at in 14 * 8..body * 8 {
        let mut flipped = bytes[..body].to_vec();
        flipped[at / 8] ^= 1 << (at % 8);
        let flipped = sealed(flipped);
        refused += usize::from(try_it(&flipped).await.is_err());
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn states_that_no_tunnel_can_have_are_refused() {
    type Spoil = fn(&mut State);
    let spoil: [(&str, Spoil); 14] = [
        ("a stream twice", |state| state.streams.0[1].id = 5),
        ("a stream that was never opened", |state| state.streams.0[0].id = 1001),
        ("an even stream", |state| state.streams.0[0].id = 4),
        ("a window too large", |state| state.send_window = 1 << 31),
        ("more input than a slab", |state| state.input = vec![0; crate::forward::slab::SLAB + 1]),
        ("a widest window below the present one", |state| state.widest_send_window = 12_344),
        ("a frame that is longer than allowed", |state| state.promised.frame_size = 1 << 24),
        ("payload without a frame", |state| state.frame.current = None),
        ("more payload to come than the frame has", |state| state.frame.left = 41),
        ("a whole head that waits", |state| state.frame.head = vec![0; 9]),
        ("a table too large", |state| state.table.max = 4097),
        ("more certificates than are kept", |state| state.chain.0[1] = vec![0; 16 << 10]),
        ("two suites", |state| state.send = direction(Suite::Aes128Gcm, 0)),
        ("an end before the last byte", |state| state.streams.0[2].backlog = vec![1]),
    ];
    for (what, spoil) in spoil {
        let mut state = full(Side::Server);
        spoil(&mut state);
        let read = encoding::open::<State>(&encoding::seal(&state)).unwrap();
        assert!(matches!(read.check(), Err(StateError::Invalid(_))), "{what}");
    }
}

proptest! {
    #[test]
    fn random_bytes_are_refused(noise in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(encoding::open::<State>(&noise).is_err());
        let mut framed = b"CVTUNNEL\x00\x02".to_vec();
        framed.extend_from_slice(&u32::try_from(noise.len()).unwrap().to_be_bytes());
        framed.extend_from_slice(&noise);
        prop_assert!(!matches!(encoding::open::<State>(&sealed(framed)), Err(StateError::Foreign | StateError::Checksum | StateError::Version(_)) | Ok(_)));
    }

    #[test]
    fn random_damage_never_panics(hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let bytes = encoding::seal(&full(Side::Client));
        let mut damaged = bytes[..bytes.len() - 32].to_vec();
        for (at, value) in hits {
            let at = at.index(damaged.len());
            damaged[at] = value;
        }
        if let Ok(state) = encoding::open::<State>(&sealed(damaged)) {
            let _ = state.check();
        }
    }
}
