//! C3: records sealed and opened where they lie.
//!
//! A slab is laid out as it goes on the wire: records of `[5 TLS header][9 DATA header][payload][1 content type][16 tag]`. The sealing side
//! reads from the application straight into the payload places, seals each record in its place, and sends the slab at once. The opening
//! side reads as many whole records as a slab holds, opens each in its place, and sends all payloads at once.

use std::io::{self, IoSlice, IoSliceMut};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use tokio::net::TcpStream;

use crate::duplex::{Loaded, Pump, receive, send};
use crate::place::{give_slab, take_slab};

const TLS: usize = 5;
const FRAME: usize = 9;
const TYPE: usize = 1;
const TAG: usize = 16;
/// Most payload of one record: with the frame header it makes TLS's 16 KiB.
const PAYLOAD: usize = 16 * 1024 - FRAME;
const RECORD: usize = TLS + FRAME + PAYLOAD + TYPE + TAG;
const SLOTS: usize = 16;
const SLAB: usize = SLOTS * RECORD;

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The one key of all floors, and the counter that makes each record's nonce.
struct Cipher {
    key: LessSafeKey,
    records: u64,
}

impl Default for Cipher {
    fn default() -> Self {
        // invariant: 32 bytes are what AES-256 takes.
        let key = UnboundKey::new(&AES_256_GCM, &[0x42; 32]).map(LessSafeKey::new).unwrap_or_else(|_| std::process::abort());
        Self { key, records: 0 }
    }
}

impl Cipher {
    fn nonce(&mut self) -> Nonce {
        let mut nonce = [0x17; 12];
        for (byte, counter) in nonce[4..].iter_mut().zip(self.records.to_be_bytes()) {
            *byte ^= counter;
        }
        self.records += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// `record` is `[TLS][FRAME][payload][TYPE][TAG]` with only the payload filled in.
    fn seal(&mut self, record: &mut [u8]) -> io::Result<()> {
        let (header, body) = record.split_at_mut(TLS);
        let (inner, tag_place) = body.split_at_mut(body.len() - TAG);
        let payload = u32::try_from(inner.len() - FRAME - TYPE).map_err(|_| broken("too much for one record"))?;
        let sealed = u16::try_from(inner.len() + TAG).map_err(|_| broken("too much for one record"))?;
        header.copy_from_slice(&[23, 3, 3, sealed.to_be_bytes()[0], sealed.to_be_bytes()[1]]);
        inner[..3].copy_from_slice(&payload.to_be_bytes()[1..]);
        // DATA, no flags, stream 1.
        inner[3..FRAME].copy_from_slice(&[0, 0, 0, 0, 0, 1]);
        let last = inner.len() - TYPE;
        inner[last] = 23;
        let nonce = self.nonce();
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(&*header), inner).map_err(|_| broken("cannot seal"))?;
        tag_place.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Opens a whole record; its payload is then from `TLS + FRAME` on, of the length returned.
    fn open(&mut self, record: &mut [u8]) -> io::Result<usize> {
        let (header, body) = record.split_at_mut(TLS);
        let nonce = self.nonce();
        let inner = self.key.open_in_place(nonce, Aad::from(&*header), body).map_err(|_| broken("a record was tampered with"))?;
        let payload = inner.len().checked_sub(FRAME + TYPE).ok_or_else(|| broken("a record without a frame"))?;
        let length = u32::from_be_bytes([0, inner[0], inner[1], inner[2]]);
        if inner[3] != 0 || length as usize != payload || inner[payload + FRAME] != 23 {
            return Err(broken("a record that is no DATA frame"));
        }
        Ok(payload)
    }
}

/// From the application to the tunnel.
#[derive(Default)]
pub(crate) struct Seal {
    cipher: Cipher,
    held: Option<Box<[u8]>>,
    sent: usize,
    end: usize,
}

impl Seal {
    /// Seals what a read of `bytes` put into the payload places; the length on the wire.
    fn seal(&mut self, slab: &mut [u8], bytes: usize) -> io::Result<usize> {
        let (mut left, mut end) = (bytes, 0);
        while left > 0 {
            let payload = left.min(PAYLOAD);
            let length = RECORD - PAYLOAD + payload;
            self.cipher.seal(&mut slab[end..end + length])?;
            left -= payload;
            end += length;
        }
        Ok(end)
    }
}

impl Pump for Seal {
    fn load(&mut self, from: &TcpStream) -> io::Result<Loaded> {
        let mut slab = take_slab(SLAB);
        let mut records = slab.chunks_exact_mut(RECORD);
        let mut places: [IoSliceMut<'_>; SLOTS] =
            std::array::from_fn(|_| IoSliceMut::new(records.next().map_or(&mut [], |record| &mut record[TLS + FRAME..TLS + FRAME + PAYLOAD])));
        let result = receive(from, SLOTS * PAYLOAD, || from.try_read_vectored(&mut places));
        match result {
            Ok(0) | Err(_) => {
                give_slab(slab);
                result.map(|_| Loaded::End)
            }
            Ok(bytes) => {
                (self.sent, self.end) = (0, self.seal(&mut slab, bytes)?);
                self.held = Some(slab);
                Ok(Loaded::Some)
            }
        }
    }

    fn unload(&mut self, to: &TcpStream) -> io::Result<bool> {
        let Some(slab) = &self.held else { return Ok(true) };
        let rest = &slab[self.sent..self.end];
        self.sent += send(to, rest.len(), || to.try_write(rest))?;
        if self.sent < self.end {
            return Ok(false);
        }
        self.held.take().into_iter().for_each(give_slab);
        Ok(true)
    }
}

/// From the tunnel to the application.
pub(crate) struct Open {
    cipher: Cipher,
    held: Option<Box<[u8]>>,
    /// Bytes read into the slab.
    filled: usize,
    /// Where the records that are not opened yet begin.
    opened: usize,
    /// Payloads still to be sent: where each begins and ends.
    spans: [(u32, u32); SPANS],
    first: usize,
    count: usize,
}

/// Small records: as many payloads as one write takes at most.
const SPANS: usize = 64;

impl Default for Open {
    fn default() -> Self {
        Self { cipher: Cipher::default(), held: None, filled: 0, opened: 0, spans: [(0, 0); SPANS], first: 0, count: 0 }
    }
}

impl Open {
    fn open(&mut self, slab: &mut [u8]) -> io::Result<()> {
        (self.first, self.count) = (0, 0);
        while self.count < SPANS
            && let Some(header) = slab[self.opened..self.filled].get(..TLS)
        {
            let length = TLS + usize::from(u16::from_be_bytes([header[3], header[4]]));
            if header[..3] != [23, 3, 3] || !(TLS + FRAME + TYPE + TAG..=RECORD).contains(&length) {
                return Err(broken("not a record"));
            }
            if self.filled - self.opened < length {
                break;
            }
            let payload = self.cipher.open(&mut slab[self.opened..self.opened + length])?;
            let begin = self.opened + TLS + FRAME;
            if payload > 0 {
                self.spans[self.count] = (u32::try_from(begin).unwrap_or(u32::MAX), u32::try_from(begin + payload).unwrap_or(u32::MAX));
                self.count += 1;
            }
            self.opened += length;
        }
        Ok(())
    }

    /// All payloads are sent: opens what else is there; moves the partial record to the front. Keeps the slab only for that.
    fn settle(&mut self) -> io::Result<bool> {
        let Some(mut slab) = self.held.take() else { return Ok(true) };
        self.open(&mut slab)?;
        if self.count > 0 {
            self.held = Some(slab);
            return Ok(false);
        }
        if self.opened < self.filled {
            slab.copy_within(self.opened..self.filled, 0);
            self.filled -= self.opened;
            self.held = Some(slab);
        } else {
            self.filled = 0;
            give_slab(slab);
        }
        self.opened = 0;
        Ok(true)
    }
}

impl Pump for Open {
    fn load(&mut self, from: &TcpStream) -> io::Result<Loaded> {
        let mut slab = self.held.take().unwrap_or_else(|| take_slab(SLAB));
        let room = &mut slab[self.filled..];
        let length = room.len();
        let result = receive(from, length, || from.try_read(room));
        match result {
            Ok(bytes @ 1..) => {
                self.filled += bytes;
                self.open(&mut slab)?;
                self.held = Some(slab);
                Ok(if self.count > 0 { Loaded::Some } else { Loaded::Part })
            }
            result => {
                let partial = self.filled > 0;
                if partial {
                    self.held = Some(slab);
                } else {
                    give_slab(slab);
                }
                match result? {
                    _ if partial => Err(broken("the tunnel ended within a record")),
                    _ => Ok(Loaded::End),
                }
            }
        }
    }

    fn unload(&mut self, to: &TcpStream) -> io::Result<bool> {
        let Some(slab) = &self.held else { return Ok(true) };
        let mut slices = [IoSlice::new(&[]); SPANS];
        let mut whole = 0;
        let left = &self.spans[self.first..self.count];
        for (slice, (begin, end)) in slices.iter_mut().zip(left) {
            *slice = IoSlice::new(&slab[*begin as usize..*end as usize]);
            whole += slice.len();
        }
        let mut sent = send(to, whole, || to.try_write_vectored(&slices[..left.len()]))?;
        if sent < whole {
            for (begin, end) in &mut self.spans[self.first..self.count] {
                let length = (*end - *begin) as usize;
                if sent < length {
                    *begin += u32::try_from(sent).unwrap_or(u32::MAX);
                    break;
                }
                sent -= length;
                self.first += 1;
            }
            return Ok(false);
        }
        self.settle()
    }
}
