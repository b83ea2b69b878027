#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
    let mut bytes = u32::try_from(length).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags, 0, 0, 0, 1]);
    bytes.resize(HEAD + length, 0x42);
    bytes
}

fn settled_scanner() -> Scanner {
    let mut scanner = Scanner::new(0);
    scanner.scan(&frame(SETTINGS, 0, 0)).unwrap();
    scanner
}

#[test]
fn the_first_frame_must_be_settings() {
    for (kind, flags) in [(DATA, 0), (HEADERS, 4), (SETTINGS, ACK), (0x6, 0), (0x42, 0)] {
        assert_eq!(Scanner::new(0).scan(&frame(kind, flags, 6)), Err(Violation::NotSettings), "{kind}");
    }
    let mut scanner = Scanner::new(PREFACE);
    scanner.scan(&[b'x'; PREFACE]).unwrap();
    assert!(!scanner.settled());
    let settings = frame(SETTINGS, 0, 12);
    let (most, last) = settings.split_at(settings.len() - 1);
    scanner.scan(most).unwrap();
    assert!(!scanner.settled(), "the last byte is missing");
    scanner.scan(last).unwrap();
    assert!(scanner.settled());
}

#[test]
fn a_header_block_is_bounded_over_all_its_frames() {
    let limit = MAX_HEADER_BLOCK as usize;
    let mut scanner = settled_scanner();
    scanner.scan(&frame(HEADERS, 0, limit / 2)).unwrap();
    scanner.scan(&frame(CONTINUATION, 0, limit / 2)).unwrap();
    scanner.scan(&frame(HEADERS, 0, 1)).unwrap();
    scanner.scan(&frame(CONTINUATION, 0, limit - 1)).unwrap();
    assert_eq!(scanner.scan(&frame(CONTINUATION, 0, 1)), Err(Violation::HeaderBlock));
    // Known from the head alone: nothing has to be buffered to refuse it.
    assert_eq!(settled_scanner().scan(&frame(HEADERS, 0, limit + 1)[..HEAD]), Err(Violation::HeaderBlock));
}

#[tokio::test(start_paused = true)]
async fn control_frames_have_a_rate_and_other_frames_have_none() {
    let mut scanner = settled_scanner();
    for kind in [DATA, HEADERS, RST_STREAM, WINDOW_UPDATE, CONTINUATION] {
        (0..10_000).for_each(|_| scanner.scan(&frame(kind, 0, 4)).unwrap_or_else(|_| assert_eq!(kind, CONTINUATION)));
    }
    for kind in [0x2, SETTINGS, 0x6, 0x7, 0x42] {
        let mut scanner = settled_scanner();
        let passed = (0..10_000).take_while(|_| scanner.scan(&frame(kind, 0, 4)).is_ok()).count();
        assert_eq!(passed, CONTROL_BURST as usize - 1);
        for _ in 0..10 {
            tokio::time::advance(Duration::from_secs(1)).await;
            let passed = (0..10_000).take_while(|_| scanner.scan(&frame(kind, 0, 4)).is_ok()).count();
            assert!(passed.abs_diff(CONTROL_PER_SECOND as usize) <= 1, "{passed}");
        }
    }
}

proptest! {
    #[test]
    fn frames_are_found_however_the_bytes_are_cut(lengths in proptest::collection::vec((0..3_u8, 0..600_usize), 0..40), cut in 1..700_usize) {
        let mut bytes = vec![b'x'; PREFACE];
        bytes.extend(frame(SETTINGS, 0, 18));
        let mut data = 0;
        for (kind, length) in lengths {
            let kind = [DATA, HEADERS, WINDOW_UPDATE][usize::from(kind)];
            bytes.extend(frame(kind, 0, length));
            data += if kind == DATA { length as u64 } else { 0 };
        }
        let mut scanner = Scanner::new(PREFACE);
        for piece in bytes.chunks(cut) {
            scanner.scan(piece).unwrap();
        }
        prop_assert_eq!(scanner.data, data);
        prop_assert!(scanner.settled());
        prop_assert_eq!((scanner.skip, scanner.filled), (0, 0));
    }
}
