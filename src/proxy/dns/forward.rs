//! Asking the upstream resolvers what the mesh does not own.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::message::{Query, is_no_help};
use super::{Transport, tcp};
use crate::proxy::PodSockets;

/// After this much time nobody is waited for any more: a little before the C library's resolver stops to listen (5 s), so that it hears of the failure.
pub(super) const DEADLINE: Duration = Duration::from_millis(4500);
/// Without an answer for this long, the next nameserver is asked as well; the first one may still answer.
const ASK_NEXT_AFTER: Duration = Duration::from_secs(1);
/// Most datagrams to upstream resolvers for one question.
const MOST_TRIES: usize = 4;
/// Most datagrams that are no answer to the question which one try looks at.
const MOST_STRAYS: usize = 64;
/// Largest UDP datagram.
const LARGEST: usize = 65_535;

/// The first answer of the nameservers, in the order of `upstreams`; another one is asked after a second, and at once when one fails. Of answers that
/// do not help (SERVFAIL, REFUSED, NOTIMP) the first is taken when nobody is left to ask.
///
/// # Errors
/// There is no nameserver; none of them answers within [`DEADLINE`]; the failure of the last one when all failed.
pub(super) async fn forward(sockets: &PodSockets, upstreams: &[SocketAddr], query: &Query, transport: Transport) -> io::Result<Vec<u8>> {
    let ask = |upstream: SocketAddr| async move {
        match transport {
            Transport::Udp => ask_udp(sockets, upstream, query).await,
            Transport::Tcp => ask_tcp(sockets, upstream, query).await,
        }
    };
    race(upstreams, Instant::now() + DEADLINE, ask).await
}

async fn race<F: Future<Output = io::Result<Vec<u8>>>>(
    upstreams: &[SocketAddr],
    deadline: Instant,
    ask: impl Fn(SocketAddr) -> F,
) -> io::Result<Vec<u8>> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "there is no nameserver in resolv.conf");
    let mut no_help = None;
    let mut not_helping = 0;
    // Everybody once, then once more, for a datagram that was lost.
    let mut next = upstreams.iter().chain(upstreams).copied().take(MOST_TRIES);
    let mut asked = FuturesUnordered::new();
    let mut ask_next = Instant::now();
    loop {
        if not_helping == upstreams.len()
            && let Some(answer) = no_help.take()
        {
            return Ok(answer);
        }
        if ask_next <= Instant::now() {
            match next.next() {
                Some(upstream) => {
                    asked.push(ask(upstream));
                    ask_next = Instant::now() + ASK_NEXT_AFTER;
                }
                None if asked.is_empty() => return no_help.ok_or(failure),
                None => ask_next = deadline,
            }
        }
        tokio::select! {
            biased;
            Some(outcome) = asked.next() => match outcome {
                Ok(answer) if is_no_help(&answer) => {
                    not_helping += 1;
                    no_help.get_or_insert(answer);
                    ask_next = Instant::now();
                }
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    failure = error;
                    ask_next = Instant::now();
                }
            },
            () = sleep_until(deadline) => {
                let silent = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {upstreams:?}"));
                return no_help.ok_or_else(silent);
            }
            () = sleep_until(ask_next) => {}
        }
    }
}

async fn ask_udp(sockets: &PodSockets, upstream: SocketAddr, query: &Query) -> io::Result<Vec<u8>> {
    let named = |error: &io::Error| io::Error::new(error.kind(), format!("{upstream}: {error}"));
    let socket = sockets.datagrams(upstream).map_err(|error| named(&error))?;
    let id = rand::random();
    socket.send(&query.with_id(id)).await.map_err(|error| named(&error))?;
    for _ in 0..MOST_STRAYS {
        let answer = receive(&socket).await.map_err(|error| named(&error))?;
        if let Some(answer) = query.accept(answer, id, query.udp_limit()) {
            return Ok(answer);
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("{upstream} answers another question")))
}

/// The next datagram. There is no buffer while there is none.
async fn receive(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    loop {
        // That nobody listens there comes as an error, which alone does not make a socket readable.
        if socket.ready(Interest::READABLE | Interest::ERROR).await?.is_error() {
            let pending = || socket.take_error().and_then(|error| Err(error.unwrap_or_else(|| io::ErrorKind::WouldBlock.into())));
            match socket.try_io(Interest::ERROR, pending) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Ok(()) | Err(_) => continue,
            }
        }
        let mut bytes = Vec::with_capacity(LARGEST);
        match socket.try_recv_buf(&mut bytes) {
            Ok(_) => {
                bytes.shrink_to_fit();
                return Ok(bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn ask_tcp(sockets: &PodSockets, upstream: SocketAddr, query: &Query) -> io::Result<Vec<u8>> {
    let id = rand::random();
    let talk = async {
        let mut stream = sockets.resolver(upstream).await?;
        stream.write_all(&tcp::framed(&query.with_id(id))).await?;
        tcp::read_message(&mut stream).await?.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    let answer = timeout_at(Instant::now() + DEADLINE, talk).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let answer = answer.map_err(|error| io::Error::new(error.kind(), format!("{upstream}: {error}")))?;
    let accepted = query.accept(answer, id, LARGEST);
    accepted.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{upstream} answers another question")))
}

#[cfg(test)]
mod tests;
