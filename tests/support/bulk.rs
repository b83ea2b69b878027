//! Much data through one connection, and the proof that it arrived as it was sent.
#![allow(dead_code, unreachable_pub)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

pub const GIBIBYTE: usize = 1 << 30;

/// How much it was, and its hash.
pub type Sum = (usize, Vec<u8>);

/// SHA-256 by the library that also does the proxy's TLS.
fn hash() -> Box<dyn rustls::crypto::hash::Context> {
    let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    suite.tls13().unwrap().common.hash_provider.start()
}

/// Sends whole blocks of 64 KiB of which no two are the same, in writes of odd sizes, then ends the stream.
pub fn send(mut socket: &TcpStream, size: usize, seed: u8) -> Sum {
    let mut block: Vec<u8> = (0..65_536_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect();
    let (mut hash, blocks) = (hash(), size / block.len());
    for number in 0..blocks {
        block[..8].copy_from_slice(&number.to_be_bytes());
        hash.update(&block);
        let (first, second) = block.split_at(number * 37 % block.len());
        socket.write_all(first).unwrap();
        socket.write_all(second).unwrap();
    }
    socket.shutdown(Shutdown::Write).unwrap();
    (blocks * block.len(), hash.finish().as_ref().to_vec())
}

/// Reads to the end; `pause` is told how much there was so far and may take its time.
pub fn receive(mut socket: &TcpStream, mut pause: impl FnMut(usize)) -> Sum {
    let (mut hash, mut total, mut buffer) = (hash(), 0, vec![0; 256 << 10]);
    loop {
        match socket.read(&mut buffer).unwrap() {
            0 => return (total, hash.finish().as_ref().to_vec()),
            read => {
                hash.update(&buffer[..read]);
                total += read;
                pause(total);
            }
        }
    }
}

/// Sends a gibibyte each way at the same time and compares what arrived; returns how long it took.
pub fn gibibyte_each_way(client: &TcpStream, server: &TcpStream) -> Duration {
    let since = Instant::now();
    thread::scope(|scope| {
        let up = scope.spawn(|| send(client, GIBIBYTE, 1));
        let down = scope.spawn(|| send(server, GIBIBYTE, 2));
        let at_server = scope.spawn(|| receive(server, |_| {}));
        let at_client = receive(client, |_| {});
        assert_eq!(at_server.join().unwrap(), up.join().unwrap(), "client to server");
        assert_eq!(at_client, down.join().unwrap(), "server to client");
    });
    since.elapsed()
}
