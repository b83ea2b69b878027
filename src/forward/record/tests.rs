#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::*;

fn pair(suite: Suite) -> (Sealer, Opener) {
    let state = Direction { suite, secret: vec![7; suite.secret_length()], sequence: 0 };
    (Sealer::new(state.clone()).unwrap(), Opener::new(state).unwrap())
}

/// A sealed record of `plaintext`.
fn sealed(sealer: &mut Sealer, plaintext: &[u8], content: Content) -> Vec<u8> {
    let mut slot = vec![0; Sealer::sealed_length(plaintext.len())];
    slot[HEADER..HEADER + plaintext.len()].copy_from_slice(plaintext);
    sealer.seal(&mut slot, content).unwrap();
    slot
}

/// Seals with padding, as peers may: what our sealer never does.
fn padded(state: &Direction, plaintext: &[u8], content: u8, padding: usize) -> Vec<u8> {
    use aws_lc_rs::aead::Aad;
    let keys = keys::Keys::derive(state.suite, &state.secret).unwrap();
    let mut body = plaintext.to_vec();
    body.push(content);
    body.resize(plaintext.len() + 1 + padding, 0);
    let length = ((body.len() + TAG) as u16).to_be_bytes();
    let header = [23, 3, 3, length[0], length[1]];
    let tag = keys.key.seal_in_place_separate_tag(keys.nonce(state.sequence), Aad::from(&header), &mut body).unwrap();
    [&header[..], &body, tag.as_ref()].concat()
}

#[test]
fn records_of_every_size_come_back() {
    for suite in [Suite::Aes128Gcm, Suite::Aes256Gcm] {
        let (mut sealer, mut opener) = pair(suite);
        let bytes: Vec<u8> = (0..MAX_PLAINTEXT).map(|at| (at * 7 + at / 250) as u8).collect();
        for size in 0..=MAX_PLAINTEXT {
            let plaintext = &bytes[..size];
            let mut record = sealed(&mut sealer, plaintext, Content::ApplicationData);
            let opened = opener.open(&mut record, 0).unwrap().unwrap();
            assert_eq!((opened.content, opened.end), (Content::ApplicationData, record.len()));
            assert_eq!(&record[opened.plaintext], plaintext);
        }
    }
}

#[test]
fn padding_is_taken_off_and_a_record_of_padding_alone_is_refused() {
    let state = Direction { suite: Suite::Aes256Gcm, secret: vec![7; 48], sequence: 0 };
    for padding in [0, 1, 15, 255, MAX_PLAINTEXT - 3] {
        let mut record = padded(&state, b"abc", 23, padding);
        let opened = Opener::new(state.clone()).unwrap().open(&mut record, 0).unwrap().unwrap();
        assert_eq!(&record[opened.plaintext], b"abc");
    }
    let mut nothing = padded(&state, b"", 0, 10);
    assert_eq!(Opener::new(state.clone()).unwrap().open(&mut nothing, 0), Err(RecordError::Unexpected));
    let mut unknown = padded(&state, b"abc", 20, 0);
    assert_eq!(Opener::new(state).unwrap().open(&mut unknown, 0), Err(RecordError::Unexpected));
}

#[test]
fn a_record_that_is_too_long_or_of_another_type_is_refused_before_it_is_read() {
    let header = |kind: u8, length: usize| [kind, 3, 3, (length >> 8) as u8, length as u8];
    assert_eq!(Opener::record_length(&header(23, MAX_CIPHERTEXT)), Ok(Some(HEADER + MAX_CIPHERTEXT)));
    assert_eq!(Opener::record_length(&header(23, MAX_CIPHERTEXT + 1)), Err(RecordError::Overflow));
    assert_eq!(Opener::record_length(&header(23, TAG)), Err(RecordError::BadMac));
    for kind in [0, 20, 21, 22, 24, 255] {
        assert_eq!(Opener::record_length(&header(kind, 100)), Err(RecordError::Unexpected));
    }
    // A plaintext beyond the limit, within the longest ciphertext.
    let state = Direction { suite: Suite::Aes128Gcm, secret: vec![7; 32], sequence: 0 };
    let mut record = padded(&state, &[9; MAX_PLAINTEXT + 1], 23, 0);
    assert_eq!(Opener::new(state).unwrap().open(&mut record, 0), Err(RecordError::Overflow));
}

#[test]
fn an_incomplete_record_waits_and_changes_nothing() {
    let (mut sealer, mut opener) = pair(Suite::Aes256Gcm);
    let mut record = sealed(&mut sealer, b"hello", Content::ApplicationData);
    let whole = record.clone();
    for length in 0..record.len() {
        assert_eq!(opener.open(&mut record[..length], 0), Ok(None));
        assert_eq!(record, whole);
    }
    assert!(opener.open(&mut record, 0).unwrap().is_some());
}

#[test]
fn records_in_another_order_or_twice_do_not_open() {
    let (mut sealer, mut opener) = pair(Suite::Aes256Gcm);
    let mut first = sealed(&mut sealer, b"one", Content::ApplicationData);
    let mut second = sealed(&mut sealer, b"two", Content::ApplicationData);
    assert_eq!(opener.open(&mut second.clone(), 0), Err(RecordError::BadMac));
    let (_, mut opener) = pair(Suite::Aes256Gcm);
    let again = first.clone();
    assert!(opener.open(&mut first, 0).unwrap().is_some());
    assert_eq!(opener.open(&mut again.clone(), 0), Err(RecordError::BadMac));
    let _ = opener.open(&mut second, 0);
}

#[test]
fn a_key_update_on_both_sides_keeps_the_stream_readable_and_on_one_side_does_not() {
    let (mut sealer, mut opener) = pair(Suite::Aes256Gcm);
    for round in 0..5u8 {
        let mut record = sealed(&mut sealer, &[round; 10], Content::ApplicationData);
        let opened = opener.open(&mut record, 0).unwrap().unwrap();
        assert_eq!(record[opened.plaintext], [round; 10]);
        sealer.update().unwrap();
        opener.update().unwrap();
    }
    sealer.update().unwrap();
    let mut record = sealed(&mut sealer, b"new key", Content::ApplicationData);
    assert_eq!(opener.open(&mut record, 0), Err(RecordError::BadMac));
}

#[test]
fn a_key_is_due_for_update_at_its_limit() {
    let state = Direction { suite: Suite::Aes256Gcm, secret: vec![7; 48], sequence: 0 };
    let mut sealer = Sealer::new(state).unwrap().with_key_limit(3);
    for due in [false, false, false, true] {
        assert_eq!(sealer.wants_update(), due);
        sealed(&mut sealer, b"x", Content::ApplicationData);
    }
    sealer.update().unwrap();
    assert!(!sealer.wants_update());
}

#[test]
fn a_direction_continues_elsewhere_from_its_state_alone() {
    let (mut sealer, mut opener) = pair(Suite::Aes128Gcm);
    for round in 0..4u8 {
        let mut record = sealed(&mut sealer, &[round], Content::ApplicationData);
        assert!(opener.open(&mut record, 0).unwrap().is_some());
        sealer = Sealer::new(sealer.state().clone()).unwrap();
        opener = Opener::new(opener.state().clone()).unwrap();
    }
}

#[test]
fn secrets_are_not_in_debug_output() {
    let state = Direction { suite: Suite::Aes128Gcm, secret: vec![0x5a; 32], sequence: 3 };
    assert!(!format!("{state:?}").contains("90"), "{state:?}");
}

proptest! {
    #[test]
    fn a_tampered_record_never_opens(size in 0usize..2000, at in any::<prop::sample::Index>(), flip in 1u8..) {
        let (mut sealer, mut opener) = pair(Suite::Aes256Gcm);
        let mut record = sealed(&mut sealer, &vec![1; size], Content::ApplicationData);
        let at = at.index(record.len());
        record[at] ^= flip;
        prop_assert!(!matches!(opener.open(&mut record, 0), Ok(Some(_))));
    }

    #[test]
    fn no_bytes_make_the_opener_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), start in 0usize..220) {
        let (_, mut opener) = pair(Suite::Aes128Gcm);
        let _ = opener.open(&mut bytes, start);
    }
}
