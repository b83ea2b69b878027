//! How connections end across Envoy.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use crate::ground::{Ground, ROLES};

fn say(mut socket: &TcpStream, words: &str) {
    socket.write_all(words.as_bytes()).unwrap();
}

/// Reads to the end of the stream.
fn hear(mut socket: &TcpStream) -> String {
    let mut words = String::new();
    socket.read_to_string(&mut words).unwrap();
    words
}

#[test]
fn each_direction_closes_by_itself() {
    let Some(ground) = Ground::up() else { return };
    for role in ROLES {
        let listener = ground.listen(role, 9000);
        // The caller is done first, and still gets an answer.
        let (caller, server) = ground.pair(role, &listener);
        say(&caller, "question");
        caller.shutdown(Shutdown::Write).unwrap();
        assert_eq!(hear(&server), "question");
        say(&server, "answer");
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(hear(&caller), "answer");
        // The server is done first, and still gets what the caller says.
        let (caller, server) = ground.pair(role, &listener);
        say(&server, "greeting");
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(hear(&caller), "greeting", "Envoy as {role:?}");
        say(&caller, "thanks");
        caller.shutdown(Shutdown::Write).unwrap();
        assert_eq!(hear(&server), "thanks", "Envoy as {role:?}");
    }
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
            eprintln!("{role:?} {by_caller} {ended:?}");
        }
    }
}
