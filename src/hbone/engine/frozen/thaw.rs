//! Taking a tunnel up.

use std::net::{SocketAddr, TcpStream as StdStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::{Frozen, State};
use crate::forward::record::{Opener, RecordError, Sealer};
use crate::forward::slab::Slab;
use crate::hbone::engine::clock::Watch;
use crate::hbone::engine::control::Frame;
use crate::hbone::engine::headers::HeaderBlock;
use crate::hbone::engine::reserve::Credit;
use crate::hbone::engine::stream::{Phase, Stream};
use crate::hbone::engine::tunnel::{Life, Side, Tunnel};
use crate::hbone::engine::{Early, Established};
use crate::hbone::hpack::Decoder;
use crate::hbone::lifetime::Lifetime;
use crate::hbone::moving::Origin;
use crate::hbone::{Config, Endpoint, Error, Role};

/// A tunnel that is ready to be driven. Its streams wait for their applications as new ones do, and come with them.
pub(in crate::hbone) struct Thawed {
    pub(in crate::hbone) origin: Origin,
    pub(in crate::hbone) address: SocketAddr,
    pub(in crate::hbone) tunnel: Box<Tunnel>,
    /// In the order in which they wait to send.
    pub(in crate::hbone) streams: Vec<(u32, Role, TcpStream)>,
    /// Takes no new streams.
    pub(in crate::hbone) leaving: bool,
}

impl Frozen {
    /// Registers the sockets with the current runtime and continues with them.
    pub(in crate::hbone) fn thaw(mut self, side: Side, endpoint: &Arc<Endpoint>) -> Result<Thawed, Error> {
        let refused = |what: &str| Error::Tunnel(format!("the tunnel cannot be taken up: {what}"));
        if self.state.side != side {
            return Err(refused("it is of the other side"));
        }
        let opener = Opener::new(self.state.receive.clone()).map_err(|error: RecordError| refused(&error.to_string()))?;
        let sealer = Sealer::new(self.state.send.clone()).map_err(|error| refused(&error.to_string()))?;
        let mut sockets = Vec::with_capacity(self.sockets.len());
        // Duplicates again: until all are registered, whatever fails resets everything.
        for socket in &self.sockets {
            sockets.push(socket.try_clone().and_then(register).map_err(|error| refused(&error.to_string()))?);
        }
        let mut sockets = sockets.into_iter();
        let socket = sockets.next().ok_or_else(|| refused("no socket"))?;
        let address = socket.peer_addr().map_err(|error| refused(&error.to_string()))?;
        let established = Established { socket, opener, sealer, chain: Vec::new(), older: false, input: Early::default() };
        let mut tunnel = Tunnel::new(established, side, self.state.endpoint(endpoint))?;
        self.state.put_into(&mut tunnel)?;
        let streams = self.state.streams.0.iter().zip(sockets).map(|(stream, socket)| (stream.id, stream.role, socket)).collect();
        // From here on the duplicates hold the connections.
        self.sockets.clear();
        let now = Instant::now();
        let lifetime = Lifetime { farewell: now + self.state.farewell, end: now + self.state.end };
        let leaving = self.state.released || self.state.goaway_received || self.state.draining.is_some();
        let chain = std::mem::take(&mut self.state.chain.0).into_iter().map(CertificateDer::from).collect();
        let origin = Origin { peer: self.state.peer.clone(), chain, lifetime, immovable: None };
        Ok(Thawed { origin, address, tunnel, streams, leaving })
    }
}

fn register(socket: OwnedFd) -> std::io::Result<TcpStream> {
    let socket = StdStream::from(socket);
    socket.set_nonblocking(true)?;
    TcpStream::from_std(socket)
}

/// An instant so long ago, or now when the clock did not run then.
fn ago(now: Instant, span: Duration) -> Instant {
    now.checked_sub(span).unwrap_or(now)
}

impl State {
    /// The endpoint with those settings that the peer was told.
    fn endpoint(&self, endpoint: &Arc<Endpoint>) -> Arc<Endpoint> {
        let promised = &self.promised;
        let config = &endpoint.config;
        let same =
            promised.frame_size == config.frame_size && promised.header_list == config.header_list && promised.max_streams == config.max_streams;
        if same {
            return endpoint.clone();
        }
        let config =
            Config { frame_size: promised.frame_size, header_list: promised.header_list, max_streams: promised.max_streams, ..config.clone() };
        Arc::new(Endpoint {
            config,
            budget: endpoint.budget.clone(),
            clock: endpoint.clock.clone(),
            revocations: endpoint.revocations.clone(),
            records_per_key: endpoint.records_per_key,
        })
    }

    /// Overwrites what a new tunnel has begun with.
    fn put_into(&mut self, tunnel: &mut Tunnel) -> Result<(), Error> {
        let now = Instant::now();
        tunnel.control = std::mem::take(&mut self.control);
        tunnel.preface_left = usize::from(self.preface_left);
        tunnel.post_handshake = std::mem::take(&mut self.post_handshake);
        (tunnel.input.slab, tunnel.input.range) = slab_with(&self.input)?;
        // Whole records may be among them.
        tunnel.input.early = !self.input.is_empty();
        (tunnel.output.slab, tunnel.output.range) = slab_with(&self.output)?;
        self.put_frame(tunnel);
        let entries = self.table.entries.0.iter().map(|entry| (&*entry.name, &*entry.value));
        tunnel.decoder = Decoder::with_table(self.table.max as usize, entries);
        tunnel.stream_window = self.promised.stream_window;
        tunnel.peer.known = self.settings.known;
        // A tunnel that was worth moving is past its first moments.
        tunnel.limit_known = true;
        tunnel.peer.initial_window = i64::from(self.settings.initial_window);
        tunnel.peer.max_streams = self.settings.max_streams;
        if self.settings.known {
            tunnel.inbox.allow(self.settings.max_streams);
        }
        tunnel.credit = Credit::resumed(self.send_window, self.widest_send_window);
        tunnel.note_shortage();
        tunnel.receive_window = self.receive_window;
        (tunnel.next_id, tunnel.last_peer_id) = (self.next_id, self.last_peer_id);
        tunnel.life = self.draining.map_or(Life::Live, |last| Life::Draining { last });
        (tunnel.released, tunnel.goaway_received) = (self.released, self.goaway_received);
        tunnel.watch = match self.clock.waits_for {
            0 => Watch::Settings,
            1 => Watch::Interval,
            _ => Watch::Answer,
        };
        tunnel.timer.as_mut().reset(now + self.clock.timer);
        tunnel.heard = ago(now, self.clock.heard);
        tunnel.temper.since = ago(now, self.temper.since);
        tunnel.temper.premature = self.temper.premature;
        tunnel.temper.local = self.temper.local;
        tunnel.temper.idle = self.temper.idle;
        tunnel.temper.empty = self.temper.empty;
        tunnel.temper.moved = self.temper.moved as usize;
        for reset in &self.reset.0 {
            tunnel.streams.remember_reset(reset.id, ago(now, reset.ago));
        }
        for stream in &mut self.streams.0 {
            let mut taken = Stream::new(stream.id, Phase::Open, stream.send_window, stream.target_window);
            // Checked when it was read.
            taken.receive_window = i32::try_from(stream.receive_window).unwrap_or(i32::MAX);
            taken.owed = stream.owed;
            taken.sparse = stream.sparse;
            (taken.sent_end, taken.received_end, taken.shut_down) = (stream.sent_end, stream.received_end, stream.shut_down);
            taken.backlog.push(&std::mem::take(&mut stream.backlog));
            tunnel.backlog += taken.backlog.len();
            tunnel.streams.insert(taken);
        }
        let promised = self.receive_window.saturating_add(i64::try_from(tunnel.backlog).unwrap_or(i64::MAX));
        tunnel.windows.resume(self.window, u32::try_from(promised).unwrap_or(u32::MAX));
        Ok(())
    }

    fn put_frame(&mut self, tunnel: &mut Tunnel) {
        tunnel.walker.scratch = std::mem::take(&mut self.frame.head);
        tunnel.walker.left = self.frame.left as usize;
        tunnel.frame = self.frame.current.as_ref().map(|current| Frame { head: current.head(), padding: current.padding.map(usize::from) });
        tunnel.gathered = std::mem::take(&mut self.frame.gathered);
        tunnel.block = self.block.take().map(|block| HeaderBlock {
            stream: block.stream,
            end_stream: block.end_stream,
            fragments: block.fragments,
            bytes: block.bytes,
        });
    }
}

fn slab_with(bytes: &[u8]) -> Result<(Option<Slab>, std::ops::Range<usize>), Error> {
    if bytes.is_empty() {
        return Ok((None, 0..0));
    }
    let mut slab = Slab::take();
    let room = slab.get_mut(..bytes.len()).ok_or_else(|| Error::Tunnel("more bytes than a slab holds".into()))?;
    room.copy_from_slice(bytes);
    Ok((Some(slab), 0..bytes.len()))
}
