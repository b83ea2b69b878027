//! Bytes in bulk, one way: the sending and the receiving end, used by client and server alike.

use std::io;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{CHUNK, PERIOD, pattern_at, wrong};

/// Writes the pattern until `go_on` says no; it is told how many bytes are written so far. Returns how many there were. With a pace (bytes per
/// second) it waits when it is ahead, at the grain of tokio's timer: a burst each millisecond.
pub(super) async fn send(stream: &mut TcpStream, pace: Option<u64>, mut go_on: impl FnMut(u64) -> bool) -> io::Result<u64> {
    let (mut sent, start) = (0, Instant::now());
    while go_on(sent) {
        sent += stream.write(pattern_at(sent)).await? as u64;
        if let Some(pace) = pace {
            let due = start + Duration::from_micros(sent.saturating_mul(1_000_000) / pace.max(1));
            if due > Instant::now() {
                tokio::time::sleep_until(due.into()).await;
            }
        }
    }
    Ok(sent)
}

/// Until a moment.
pub(super) fn until(deadline: Instant) -> impl FnMut(u64) -> bool {
    move |_| Instant::now() < deadline
}

/// Receives the pattern up to the end of the stream, `already` bytes of it having arrived before. Looks at both ends of what each read
/// returns, which costs nothing and shows what is missing or out of order.
#[derive(Debug, Default)]
pub(super) struct Received {
    /// Bytes so far.
    pub(super) bytes: u64,
    /// The first position that was not the pattern.
    wrong: Option<u64>,
    /// The last eight bytes.
    tail: [u8; 8],
}

impl Received {
    /// Takes note of what has arrived.
    pub(super) fn note(&mut self, chunk: &[u8]) {
        let (Some(first), Some(last)) = (chunk.first(), chunk.last()) else { return };
        let end = self.bytes + chunk.len() as u64;
        for (position, byte) in [(self.bytes, first), (end - 1, last)] {
            if self.wrong.is_none() && pattern_at(position).first() != Some(byte) {
                self.wrong = Some(position);
            }
        }
        let keep = chunk.len().min(8);
        self.tail.rotate_left(keep);
        if let (Some(place), Some(new)) = (self.tail.get_mut(8 - keep..), chunk.get(chunk.len() - keep..)) {
            place.copy_from_slice(new);
        }
        self.bytes = end;
    }

    /// Reads to the end.
    pub(super) async fn all(mut self, stream: &mut TcpStream) -> io::Result<Self> {
        let mut buffer = vec![0; CHUNK];
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok(self),
                length => self.note(buffer.get(..length).unwrap_or_default()),
            }
        }
    }

    /// Reads until there are `total` bytes, through a buffer; all of them must be the pattern.
    pub(super) async fn up_to(&mut self, total: u64, stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
        while self.bytes < total {
            let room = usize::try_from(total - self.bytes).unwrap_or(CHUNK).min(buffer.len());
            let read = stream.read(buffer.get_mut(..room).unwrap_or_default()).await?;
            if read == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("the connection ended after {} of {total} bytes", self.bytes)));
            }
            self.note(buffer.get(..read).unwrap_or_default());
        }
        self.pure().map(drop)
    }

    /// How many bytes there were, all of them the pattern.
    pub(super) fn pure(&self) -> io::Result<u64> {
        if self.wrong.is_none() { Ok(self.bytes) } else { Err(wrong("bulk")) }
    }

    /// The same when the last eight bytes are the sender's own count.
    pub(super) fn counted(&self) -> io::Result<u64> {
        let payload = self.bytes.checked_sub(8).filter(|payload| *payload == u64::from_le_bytes(self.tail));
        let good = payload.filter(|payload| self.wrong.is_none_or(|wrong| wrong >= *payload));
        good.ok_or_else(|| wrong("bulk"))
    }
}

/// Sends the pattern from its start, `length` bytes.
pub(super) async fn send_exactly(stream: &mut TcpStream, length: u64) -> io::Result<()> {
    let mut sent = 0;
    while sent < length {
        let piece = pattern_at(sent);
        let rest = usize::try_from(length - sent).unwrap_or(PERIOD);
        sent += stream.write(piece.get(..rest.min(piece.len())).unwrap_or_default()).await? as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::super::PATTERN;
    use super::*;

    fn received(chunks: &[&[u8]]) -> Received {
        let mut received = Received::default();
        chunks.iter().for_each(|chunk| received.note(chunk));
        received
    }

    #[test]
    fn a_count_behind_the_bytes_is_found_however_they_are_cut() {
        let payload = 1000_u64;
        let mut all = PATTERN[..1000].to_vec();
        all.extend(payload.to_le_bytes());
        for cut in 0..all.len() {
            let (first, second) = all.split_at(cut);
            assert_eq!(received(&[first, second]).counted().unwrap(), payload, "cut at {cut}");
        }
        let single: Vec<&[u8]> = all.chunks(1).collect();
        assert_eq!(received(&single).counted().unwrap(), payload);
    }

    #[test]
    fn missing_extra_and_changed_bytes_are_noticed() {
        let mut all = PATTERN[..1000].to_vec();
        all.extend(1000_u64.to_le_bytes());
        assert!(received(&[&all[1..]]).counted().is_err());
        assert!(received(&[&all[..500], &all[501..]]).counted().is_err());
        assert!(received(&[&all[..1007]]).counted().is_err());
        assert!(received(&[&all[..4]]).counted().is_err());
        assert!(received(&[&PATTERN[..10], &PATTERN[11..20]]).pure().is_err());
        assert_eq!(received(&[&PATTERN[..10], &PATTERN[10..20]]).pure().unwrap(), 20);
    }
}
