#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;

fn pair(suite: Suite) -> (Sealer, Opener) {
    let state = Direction { suite, secret: vec![7; suite.secret_length()], sequence: 0 };
    (Sealer::new(state.clone()).unwrap(), Opener::new(state).unwrap())
}

#[test]
fn records_of_every_size_come_back() {
    for suite in [Suite::Aes128Gcm, Suite::Aes256Gcm] {
        let (mut sealer, mut opener) = pair(suite);
        for size in [0, 1, 2, 15, 16, 17, 100, 4095, 16383, 16384] {
            let mut slot = vec![0; Sealer::sealed_length(size)];
            for (i, byte) in slot[HEADER..HEADER + size].iter_mut().enumerate() {
                *byte = i as u8;
            }
            sealer.seal(&mut slot, Content::ApplicationData).unwrap();
            let opened = opener.open(&mut slot, 0).unwrap().unwrap();
            assert_eq!(opened.plaintext.len(), size);
            assert!(slot[opened.plaintext].iter().enumerate().all(|(i, byte)| *byte == i as u8));
        }
    }
}

#[test]
fn a_key_update_on_both_sides_keeps_the_stream_readable() {
    let (mut sealer, mut opener) = pair(Suite::Aes256Gcm);
    for round in 0..5u8 {
        let mut slot = vec![round; Sealer::sealed_length(10)];
        sealer.seal(&mut slot, Content::ApplicationData).unwrap();
        let opened = opener.open(&mut slot, 0).unwrap().unwrap();
        assert_eq!(slot[opened.plaintext], [round; 10]);
        sealer.update().unwrap();
        opener.update().unwrap();
    }
}
