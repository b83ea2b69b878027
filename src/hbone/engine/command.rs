//! What the outside asks of a tunnel's task.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::super::dial::StreamSlot;
use super::super::stream::Role;
use super::super::{ConnectResponse, Error};
use super::frame::Reason;
use super::frozen::Freeze;
use super::ready::StreamWaker;
use super::stream::{Application, Phase};
use super::tunnel::Tunnel;
use crate::forward::Ended;
use crate::sys::socket::reset_on_close;
use crate::telemetry::Meter;

/// What became of a CONNECT of ours.
pub(in crate::hbone) enum Answered {
    /// 200: the stream's id.
    Open(u32, ConnectResponse),
    /// The peer did nothing with it: another tunnel may be tried.
    Unused(Error),
    /// It failed.
    Failed(Error),
}

/// One request to the task that owns the tunnel.
pub(in crate::hbone) enum Command {
    /// Opens a stream with this header block; see [`ConnectRequest::reset_is_end`](super::super::ConnectRequest::reset_is_end).
    Open { block: Vec<u8>, reset_is_end: bool, answer: oneshot::Sender<Answered> },
    /// Answers a CONNECT of the peer; `end` refuses it.
    Answer { id: u32, block: Vec<u8>, end: bool },
    /// Gives a stream its application.
    Attach(Box<Attach>),
    /// A requester went away: gives up what nobody waits for.
    Sweep,
    /// Gives a stream up.
    Reset { id: u32, reason: Reason },
    /// No more new streams: GOAWAY, then close when the last one is done.
    Drain,
    /// Close when no stream is open.
    Release,
    /// Close now.
    Abort,
    /// Close now: the peer is believed no longer.
    Revoke,
    /// Hand the tunnel out to be taken up elsewhere.
    Freeze(Box<Freeze>),
}

/// Commands that no task will obey any more. Their senders notice; an application must not take it for an end.
pub(super) fn refuse(commands: VecDeque<Command>) {
    for command in commands {
        if let Command::Attach(attach) = command {
            let _ = reset_on_close(&attach.socket);
        }
    }
}

/// A stream's application.
pub(in crate::hbone) struct Attach {
    pub(in crate::hbone) id: u32,
    pub(in crate::hbone) socket: TcpStream,
    pub(in crate::hbone) role: Role,
    pub(in crate::hbone) meter: Arc<Meter>,
    pub(in crate::hbone) done: oneshot::Sender<Ended>,
    /// Gives the place in the pooled tunnel back when the stream is over.
    pub(in crate::hbone) slot: Option<StreamSlot>,
}

/// Requests that nobody waits for any more, and that are left until their answers, are no more than this part of what the peer serves.
const FORSAKEN: usize = 4;

impl Tunnel {
    /// Gives a stream its application.
    pub(super) fn attach(&mut self, attach: Attach) {
        let Some(slot) = self.streams.slot_of(attach.id) else {
            // The peer reset it in the meantime.
            let _ = reset_on_close(&attach.socket);
            let _ = attach.done.send(Ended::Disconnected(std::io::ErrorKind::ConnectionReset.into()));
            return;
        };
        let wake = StreamWaker::new(&self.inbox, slot);
        if let Some(stream) = self.streams.at(slot) {
            stream.phase = Phase::Relaying(Application::new(attach, wake));
            if stream.sent_end {
                stream.end_sent();
            }
            self.drain_backlog(slot);
            self.settle(slot);
            self.check_gone(slot);
            self.enqueue(slot);
        }
    }

    /// Gives up requests of ours that nobody waits for: at once, or, when there were too many of them, with their answers.
    pub(super) fn sweep(&mut self) {
        self.waiting.retain(|(_, _, answer)| !answer.is_closed());
        let (mut kept, most) = (0, self.peer.max_streams as usize / FORSAKEN);
        for slot in self.streams.slots() {
            let forsaken = self.streams.at(slot).is_some_and(|stream| matches!(&stream.phase, Phase::Asking(answer) if answer.is_closed()));
            if !forsaken {
                continue;
            }
            if kept == most || self.temper.may_take_back() {
                self.abandon(slot, Ended::Finished, Some(Reason::CANCEL));
            } else {
                kept += 1;
            }
        }
    }
}
