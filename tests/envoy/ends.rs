//! How connections end across Envoy.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use crate::ground::{Ground, ROLES, Role};

fn say(mut socket: &TcpStream, words: &str) {
    socket.write_all(words.as_bytes()).unwrap();
}

fn finish(socket: &TcpStream) {
    socket.shutdown(Shutdown::Write).unwrap();
}

/// Reads to the end of the stream.
fn hear(mut socket: &TcpStream) -> String {
    let mut words = String::new();
    socket.read_to_string(&mut words).unwrap();
    words
}

#[test]
fn the_end_of_the_callers_direction_leaves_the_other_open() {
    let Some(ground) = Ground::up() else { return };
    for role in ROLES {
        let (caller, server) = ground.pair(role, &ground.listen(role, 9000));
        say(&caller, "question");
        finish(&caller);
        assert_eq!(hear(&server), "question", "Envoy as {role:?}");
        say(&server, "answer");
        finish(&server);
        assert_eq!(hear(&caller), "answer", "Envoy as {role:?}");
    }
}

#[test]
fn the_end_of_the_servers_direction_leaves_the_other_open() {
    let Some(ground) = Ground::up() else { return };
    let (caller, server) = ground.pair(Role::Client, &ground.listen(Role::Client, 9000));
    say(&server, "greeting");
    finish(&server);
    assert_eq!(hear(&caller), "greeting");
    say(&caller, "thanks");
    finish(&caller);
    assert_eq!(hear(&server), "thanks");
}

#[test]
fn an_end_with_which_envoy_resets_the_stream_is_clean_only_if_all_came_before_it() {
    // As a server Envoy keeps no half of a stream open. When its application is done, it sends what our window takes: if that is all,
    // END_STREAM and RST_STREAM(NO_ERROR), else it drops the rest and sends RST_STREAM(INTERNAL_ERROR). Our window begins with 1 MiB.
    const WHOLE: usize = 1_000_000;
    const CUT: usize = 8 << 20;
    let Some(ground) = Ground::up() else { return };
    let listener = ground.listen(Role::Server, 9000);
    for size in [WHOLE, CUT].into_iter().cycle().take(20) {
        let (mut caller, server) = ground.pair(Role::Server, &listener);
        // What Envoy does not take any more is an error of its application's, not of the test.
        let _ = (&server).write_all(&vec![b'g'; size]).and_then(|()| server.shutdown(Shutdown::Write));
        let mut got = Vec::new();
        match caller.read_to_end(&mut got) {
            Ok(_) => assert_eq!(got.len(), size, "cut off, and nobody was told"),
            Err(error) => assert_eq!((error.kind(), size), (ErrorKind::ConnectionReset, CUT)),
        }
    }
    assert_eq!(ground.figure("http.hbone.downstream_cx_total"), 1, "the tunnel has not lasted");
}

#[test]
fn a_reset_of_either_end_reaches_the_other() {
    let Some(ground) = Ground::up() else { return };
    for role in ROLES {
        let listener = ground.listen(role, 9000);
        for by_caller in [true, false] {
            let (caller, server) = ground.pair(role, &listener);
            let (from, mut to) = if by_caller { (caller, server) } else { (server, caller) };
            say(&from, "part of a message");
            let mut start = [0; 4];
            to.read_exact(&mut start).unwrap();
            culvert::sys::socket::reset_on_close(&from).unwrap();
            drop(from);
            let ended = std::iter::repeat_with(|| to.read(&mut [0; 64])).find(|read| !matches!(read, Ok(1..))).unwrap();
            let ended = ended.map_err(|error| error.kind());
            // Envoy closes its application's connection when the stream is reset, which the kernel tells as an end if nothing was left unread.
            let expected = if role == Role::Server && by_caller { Ok(0) } else { Err(ErrorKind::ConnectionReset) };
            assert_eq!(ended, expected, "Envoy as {role:?}, reset by the caller: {by_caller}");
        }
    }
}
