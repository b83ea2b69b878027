//! What each fuzz target does with its input. A panic is a finding.

use culvert::forward::record::{Content, Direction, HEADER, MAX_PLAINTEXT, Opened, Opener, RecordError, Sealer, Suite};
use culvert::hbone::framing::{Head, Step, Walker};
use culvert::hbone::hpack::Decoder;

#[allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#[path = "../../support/hpack.rs"]
mod oracle;

/// Takes a part of the input off its front; less when there is less.
fn take<'a>(data: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (front, rest) = data.split_at(count.min(data.len()));
    *data = rest;
    front
}

fn number(data: &mut &[u8]) -> usize {
    take(data, 1).first().copied().map_or(0, usize::from)
}

fn direction(kind: usize) -> Direction {
    let suite = if kind.is_multiple_of(2) { Suite::Aes128Gcm } else { Suite::Aes256Gcm };
    Direction { suite, secret: vec![7; suite.secret_length()], sequence: 0 }
}

/// The opener, with a key that is known. The first octet says which suite, and what the rest is: wire bytes as they are, or records to be
/// sealed and then damaged.
pub fn record(mut data: &[u8]) {
    let kind = number(&mut data);
    if kind & 2 == 0 { wire(kind, data) } else { damaged(kind, data) }
}

/// Arbitrary bytes give the same whether they come at once or in two parts, and nothing outside themselves.
fn wire(kind: usize, mut data: &[u8]) {
    let cut = number(&mut data) * 64 + number(&mut data);
    let whole = open_all(kind, data, data.len());
    let parts = open_all(kind, data, cut.min(data.len()));
    assert!(whole == parts, "{whole:?} {parts:?}");
}

type Outcome = (Vec<(Content, Vec<u8>, usize)>, Option<RecordError>);

fn open_all(kind: usize, data: &[u8], first: usize) -> Outcome {
    let Ok(mut opener) = Opener::new(direction(kind)) else { return Default::default() };
    let (mut buffer, mut at, mut opened) = (data.to_vec(), 0, Vec::new());
    for end in [first, data.len()] {
        loop {
            match opener.open(&mut buffer[..end], at) {
                Ok(Some(Opened { content, plaintext, end: next })) => {
                    assert!(at < next && next <= end && plaintext.start == at + HEADER && plaintext.end < next);
                    assert!(plaintext.len() <= MAX_PLAINTEXT);
                    opened.push((content, buffer[plaintext].to_vec(), next));
                    at = next;
                    assert_eq!(opener.state().sequence, opened.len() as u64);
                }
                Ok(None) => break,
                Err(error) => return (opened, Some(error)),
            }
        }
    }
    (opened, None)
}

/// Records that we seal open again, and one with any bit changed does not; behind one that is lost or comes twice nothing opens.
fn damaged(kind: usize, mut data: &[u8]) {
    let (Ok(mut sealer), Ok(mut opener)) = (Sealer::new(direction(kind)), Opener::new(direction(kind))) else { return };
    while !data.is_empty() {
        let (damage, size) = (number(&mut data), number(&mut data) * 64 + number(&mut data));
        let plaintext = take(&mut data, size.min(MAX_PLAINTEXT)).to_vec();
        let content = [Content::ApplicationData, Content::Handshake, Content::Alert][damage % 3];
        if damage & 0x40 != 0 {
            let updates = [sealer.update(), opener.update()];
            assert_eq!(updates, [Ok(()), Ok(())]);
        }
        let mut slot = vec![0; Sealer::sealed_length(plaintext.len())];
        slot[HEADER..HEADER + plaintext.len()].copy_from_slice(&plaintext);
        assert_eq!(sealer.seal(&mut slot, content), Ok(()));
        if damage & 0x80 == 0 {
            let opened = opener.open(&mut slot, 0);
            let expected = Opened { content, plaintext: HEADER..HEADER + plaintext.len(), end: slot.len() };
            assert_eq!(opened, Ok(Some(expected)));
            assert_eq!(&slot[HEADER..HEADER + plaintext.len()], plaintext);
            continue;
        }
        let place = number(&mut data) * 256 + number(&mut data);
        match damage % 5 {
            // Lost.
            0 => {}
            // Twice.
            1 => {
                assert!(matches!(opener.open(&mut slot.clone(), 0), Ok(Some(_))));
                assert_eq!(opener.open(&mut slot, 0), Err(RecordError::BadMac));
                return;
            }
            // Cut off.
            2 => {
                let length = slot.len();
                assert_eq!(opener.open(&mut slot[..place % length], 0), Ok(None));
                return;
            }
            _ => {
                let length = slot.len();
                slot[place % length] ^= 1 << (damage % 8);
                assert!(!matches!(opener.open(&mut slot, 0), Ok(Some(_))));
                return;
            }
        }
        let mut next = vec![0; Sealer::sealed_length(0)];
        assert_eq!(sealer.seal(&mut next, content), Ok(()));
        assert_eq!(opener.open(&mut next, 0), Err(RecordError::BadMac));
        return;
    }
}

/// The frame walker: the first octet says into how many parts the rest is cut, two more for each say where. The same frames come out as of
/// the whole, and every octet comes out once.
pub fn frames(mut data: &[u8]) {
    let mut cuts: Vec<usize> = (0..number(&mut data) % 16).map(|_| number(&mut data) * 256 + number(&mut data)).collect();
    cuts.iter_mut().for_each(|cut| *cut %= data.len() + 1);
    cuts.push(data.len());
    cuts.sort_unstable();
    let whole = walk(data, &[data.len()]);
    assert!(whole == walk(data, &cuts), "{whole:?} cut at {cuts:?}");
    let mut expected = Vec::new();
    for (head, payload) in &whole.0 {
        expected.extend(&u32::try_from(head.length).unwrap_or_default().to_be_bytes()[1..]);
        expected.extend([head.kind, head.flags]);
        // The first bit of the stream's number is not for us.
        let at = expected.len();
        expected.push(head.stream.to_be_bytes()[0] | data.get(at).copied().unwrap_or_default() & 0x80);
        expected.extend(&head.stream.to_be_bytes()[1..]);
        expected.extend(payload);
    }
    // What is missing at the end is a head that is not whole yet.
    assert!(data.starts_with(&expected) && data.len() - expected.len() < 9, "{expected:?}");
}

type Walked = (Vec<(Head, Vec<u8>)>, usize);

fn walk(data: &[u8], cuts: &[usize]) -> Walked {
    let (mut walker, mut frames, mut still) = (Walker::default(), Vec::<(Head, Vec<u8>)>::new(), 0);
    let mut start = 0;
    for cut in cuts {
        let part = &data[start..*cut];
        let mut at = 0;
        loop {
            match walker.step(part, &mut at, part.len()) {
                Step::Head(head) => {
                    assert_eq!(still, 0, "a frame before the end of the last");
                    still = head.length;
                    frames.push((head, Vec::new()));
                }
                Step::Payload { range, left } => {
                    assert!(!range.is_empty() && range.end <= part.len());
                    assert_eq!(still - range.len(), left);
                    still = left;
                    let last = frames.last_mut();
                    assert!(last.is_some(), "payload of no frame");
                    last.into_iter().for_each(|(_, payload)| payload.extend(&part[range.clone()]));
                }
                Step::Empty => break,
            }
        }
        assert_eq!(at, part.len(), "octets left lying");
        start = *cut;
    }
    (frames, still)
}

/// The HPACK decoder: the input is header blocks, each with its length before it. What it takes, a decoder written by itself takes too, and
/// says the same.
pub fn hpack(mut data: &[u8]) {
    const BUDGET: usize = 8 << 10;
    let (mut decoder, mut oracle) = (Decoder::default(), Some(oracle::Decoder::default()));
    while !data.is_empty() {
        let size = number(&mut data) * 16 + number(&mut data);
        let block = take(&mut data, size);
        let (mut fields, mut spent) = (Vec::new(), 0);
        let outcome = decoder.decode(block, BUDGET, |name, value| {
            spent += name.len() + value.len() + 32;
            fields.push((String::from_utf8(name.to_vec()), String::from_utf8(value.to_vec())));
        });
        assert!(spent <= BUDGET);
        // After an error the connection is over.
        let Ok(all) = outcome else { return };
        let fields: Result<Vec<_>, std::string::FromUtf8Error> = fields.into_iter().map(|(name, value)| Ok((name?, value?))).collect();
        // The other decoder knows text only, and all fields.
        oracle = oracle.filter(|_| all && fields.is_ok());
        if let (Some(oracle), Ok(fields)) = (&mut oracle, fields) {
            assert_eq!(oracle.decode(block), fields);
        }
    }
}
