//! A look at the wire: every packet of a namespace, sorted into TCP streams, and what the streams to and from the HBONE port consist of.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::Error;

/// Where tunnels are accepted.
const HBONE_PORT: u16 = 15008;
/// ETH_P_ALL in network byte order.
const ALL_PROTOCOLS: i32 = 0x0003_u16.to_be() as i32;
/// A TLS record carries at most 2^14 bytes and 256 of expansion (RFC 8446 §5.2), plus what TLS 1.2 may add.
const LONGEST_RECORD: usize = 16384 + 2048;
/// Segments are up to 64 KiB here, because virtual links do not cut them.
const LONGEST_FRAME: usize = 128 * 1024;

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seen {
    /// TCP packets with a payload.
    pub packets: usize,
    /// Streams (one direction of a connection) from or to port 15008.
    pub tunnel_streams: usize,
    /// Whole TLS records in them.
    pub tls_records: usize,
    /// Bytes in them.
    pub tunnel_bytes: usize,
    /// Those of them that are not a sequence of TLS records.
    pub not_tls: usize,
    /// Packets in which a marker could be read, per marker.
    pub markers: BTreeMap<String, usize>,
}

/// Looks at every packet of this process's network namespace until standard input ends, and returns what was seen.
///
/// # Errors
/// `EPERM` without `CAP_NET_RAW`.
pub fn look(markers: Vec<String>) -> Result<Seen, Error> {
    let failed = || Error::failed::<io::Error>("cannot look at the wire");
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS))).map_err(failed())?;
    // 32 MiB if allowed: a look that misses packets could miss the very packet.
    socket.set_recv_buffer_size(32 << 20).ok();
    socket.set_read_timeout(Some(Duration::from_millis(20))).map_err(failed())?;
    println!("looking");
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut io::sink()).ok();
        ended.send(()).ok();
    });
    let mut look = Look::new(markers);
    let mut frame = vec![0; LONGEST_FRAME];
    loop {
        // Asked before reading: what was sent before the end is read after it.
        let last = end.try_recv().is_ok();
        while let Some(length) = receive(&socket, &mut frame).map_err(failed())? {
            look.frame(frame.get(..length).unwrap_or_default());
        }
        if last {
            return Ok(look.seen());
        }
    }
}

fn receive(mut socket: &Socket, frame: &mut [u8]) -> io::Result<Option<usize>> {
    match socket.read(frame) {
        Ok(length) => Ok(Some(length)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
        // A link went down; the others go on.
        Err(error) if error.kind() == io::ErrorKind::NetworkDown => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sorts packets into streams.
#[derive(Debug, Default)]
struct Look {
    markers: Vec<String>,
    seen: Seen,
    streams: HashMap<(SocketAddr, SocketAddr), Stream>,
}

impl Look {
    fn new(markers: Vec<String>) -> Self {
        let seen = Seen { markers: markers.iter().map(|marker| (marker.clone(), 0)).collect(), ..Seen::default() };
        Self { markers, seen, streams: HashMap::new() }
    }

    /// Takes one Ethernet frame; everything but TCP is ignored.
    fn frame(&mut self, frame: &[u8]) {
        let Some(segment) = Segment::parse(frame) else { return };
        if segment.source.port() == HBONE_PORT || segment.destination.port() == HBONE_PORT {
            self.streams.entry((segment.source, segment.destination)).or_default().take(&segment);
        }
        if segment.payload.is_empty() {
            return;
        }
        self.seen.packets += 1;
        for marker in &self.markers {
            if segment.payload.windows(marker.len().max(1)).any(|window| window == marker.as_bytes()) {
                *self.seen.markers.entry(marker.clone()).or_default() += 1;
            }
        }
    }

    fn seen(mut self) -> Seen {
        for stream in self.streams.values().filter(|stream| stream.bytes > 0) {
            self.seen.tunnel_streams += 1;
            self.seen.tls_records += stream.records;
            self.seen.tunnel_bytes += stream.bytes;
            self.seen.not_tls += usize::from(stream.not_tls);
        }
        self.seen
    }
}

/// One direction of a connection, put in order as far as it was seen from its beginning.
#[derive(Debug, Default)]
struct Stream {
    /// Sequence number of the next byte; `None` until the SYN was seen.
    next: Option<u32>,
    /// Segments that came too early, by sequence number.
    early: BTreeMap<u32, Vec<u8>>,
    /// Bytes in order that are not a whole record yet.
    rest: Vec<u8>,
    bytes: usize,
    records: usize,
    not_tls: bool,
    /// It had begun before we looked.
    under_way: bool,
}

impl Stream {
    fn take(&mut self, segment: &Segment<'_>) {
        if segment.syn {
            self.next = Some(segment.sequence.wrapping_add(1));
            return;
        }
        if segment.payload.is_empty() {
            return;
        }
        // A stream whose beginning was missed is read from here on, and a packet that does not begin a record counts as not TLS.
        if self.next.is_none() {
            self.next = Some(segment.sequence);
            self.under_way = true;
        }
        self.early.insert(segment.sequence, segment.payload.to_vec());
        while let Some(payload) = self.ready() {
            self.bytes += payload.len();
            self.rest.extend_from_slice(&payload);
            self.read_records();
        }
    }

    /// The bytes that come next, if they are here. Every packet is seen more than once (each link it passes): what is known is dropped.
    fn ready(&mut self) -> Option<Vec<u8>> {
        let next = self.next?;
        let known = |sequence: u32| next.wrapping_sub(sequence);
        let at = self.early.keys().copied().find(|sequence| known(*sequence) < u32::MAX / 2)?;
        let payload = self.early.remove(&at)?;
        let fresh = payload.get(usize::try_from(known(at)).unwrap_or(usize::MAX)..).unwrap_or_default().to_vec();
        self.next = Some(next.wrapping_add(u32::try_from(fresh.len()).unwrap_or(0)));
        Some(fresh)
    }

    /// Content type 20 to 23, version 3.x, a length within bounds (RFC 8446 §5.1); a stream begins with a handshake record.
    fn read_records(&mut self) {
        while let [kind, 3, minor, high, low, ..] = *self.rest.as_slice() {
            let length = usize::from(u16::from_be_bytes([high, low]));
            let plausible = (20..=23).contains(&kind)
                && minor <= 4
                && (1..=LONGEST_RECORD).contains(&length)
                && (self.records > 0 || kind == 22 || self.under_way);
            self.not_tls |= !plausible;
            if self.not_tls || self.rest.len() < 5 + length {
                break;
            }
            self.rest.drain(..5 + length);
            self.records += 1;
        }
        self.not_tls |= self.rest.get(1).is_some_and(|major| *major != 3);
        if self.not_tls {
            self.rest.clear();
        }
    }
}

/// The parts of a TCP segment that matter here.
#[derive(Debug)]
struct Segment<'a> {
    source: SocketAddr,
    destination: SocketAddr,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// From an Ethernet frame with IPv4 or IPv6 and TCP; `None` for anything else.
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let kind = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
        let packet = frame.get(14..)?;
        let number = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
        let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match kind {
            0x0800 => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
                if *packet.get(9)? != 6 {
                    return None;
                }
                (address(12)?.into(), address(16)?.into(), packet.get(header..usize::from(number(2)?))?)
            }
            0x86dd => {
                let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
                if *packet.get(6)? != 6 {
                    return None;
                }
                (address(8)?.into(), address(24)?.into(), packet.get(40..40 + usize::from(number(4)?))?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            source: SocketAddr::new(source, port(0)?),
            destination: SocketAddr::new(destination, port(2)?),
            sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
            syn: tcp.get(13)? & 0x02 != 0,
            payload: tcp.get(header..)?,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn frame(sequence: u32, syn: bool, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(40 + payload.len()).unwrap().to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(40000_u16.to_be_bytes());
        frame.extend(HBONE_PORT.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, if syn { 2 } else { 16 }, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn record(kind: u8, length: u8) -> Vec<u8> {
        let mut record = vec![kind, 3, 3, 0, length];
        record.resize(5 + usize::from(length), 0xaa);
        record
    }

    fn seen(frames: &[Vec<u8>]) -> Seen {
        let mut look = Look::new(vec!["secret".to_owned()]);
        frames.iter().for_each(|frame| look.frame(frame));
        look.seen()
    }

    #[test]
    fn records_are_counted_across_packets_in_any_order_and_seen_twice() {
        let bytes = [record(22, 10), record(23, 20), record(23, 5)].concat();
        let start = u32::MAX - 7;
        let cut = [frame(start.wrapping_add(1), false, &bytes[..12]), frame(start.wrapping_add(13), false, &bytes[12..])];
        for order in [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1]] {
            let frames: Vec<Vec<u8>> = [frame(start, true, &[])].into_iter().chain(order.map(|index| cut[index].clone())).collect();
            let seen = seen(&frames);
            assert_eq!((seen.tunnel_streams, seen.tls_records, seen.not_tls, seen.tunnel_bytes), (1, 3, 0, bytes.len()), "{order:?}");
        }
    }

    #[test]
    fn anything_else_on_the_tunnel_port_is_noticed() {
        for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), record(23, 10), [record(22, 10), b"secret!".to_vec()].concat()] {
            assert_eq!(seen(&[frame(0, true, &[]), frame(1, false, &bytes)]).not_tls, 1, "{bytes:?}");
        }
    }

    #[test]
    fn a_marker_is_found_in_the_clear() {
        assert_eq!(seen(&[frame(1, false, b"my secret is")]).markers["secret"], 1);
    }

    #[test]
    fn packets_of_other_kinds_and_broken_ones_are_ignored() {
        let whole = frame(1, false, b"payload");
        for length in 0..whole.len() {
            Look::default().frame(&whole[..length]);
        }
    }
}
