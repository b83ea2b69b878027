//! Serving the DNS of one pod: its UDP and TCP sockets, until a drain begins.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::forward::forward;
use super::message::{Query, Rcode, Unreadable};
use super::metrics::Labels;
use super::{Dns, Transport, tcp};
use crate::lifecycle::AcceptBackoff;
use crate::lifecycle::drain::{DrainMode, DrainWatcher};
use crate::model::{NamespacedHostname, Workload};
use crate::pods::DnsSockets;
use crate::proxy::PodProxy;
use crate::proxy::accept::accept_loop;
use crate::telemetry::limited;

/// How long a client may take to send a question or to take an answer over TCP.
const TCP_PATIENCE: Duration = Duration::from_secs(5);
/// Connections that the processes of one pod may have open to us; further ones are closed.
const MOST_CONNECTIONS: usize = 64;
/// Largest query over UDP that is looked at. Real ones have less than a tenth.
const LARGEST_QUERY: usize = 4096;
/// Queries taken before others get their turn.
const BATCH: usize = 32;
/// Queries that are still taken when a drain begins: what the socket's buffer holds.
const MOST_QUEUED: usize = 4096;

/// The DNS of one pod.
pub(super) struct PodDns {
    pub(super) pod: Arc<PodProxy>,
    pub(super) dns: Arc<Dns>,
}

/// What a question needs.
enum Step {
    /// Nothing: this is the answer.
    Answer(Vec<u8>),
    /// Others must be asked.
    PassOn(Labels),
    /// The control plane must say what these services are.
    Ask(Arc<Workload>, Vec<NamespacedHostname>),
    /// The pod must become known.
    Wait,
}

impl PodProxy {
    /// Serves 15053 until a drain begins; questions that were asked before are answered.
    pub fn serve_dns(self: &Arc<Self>, sockets: DnsSockets, dns: &Arc<Dns>, drain: &DrainWatcher) {
        let own = Arc::new(PodDns { pod: self.clone(), dns: dns.clone() });
        for socket in sockets.udp {
            tokio::spawn(own.clone().serve_udp(Arc::new(socket), drain.clone()));
        }
        let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        for listener in sockets.tcp {
            tokio::spawn(own.clone().serve_tcp(listener, connections.clone(), drain.clone()));
        }
    }
}

impl PodDns {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>, mut drain: DrainWatcher) {
        let mut backoff = AcceptBackoff::default();
        loop {
            tokio::select! {
                biased;
                mode = drain.signaled() => {
                    if mode == DrainMode::Graceful {
                        // What waits in the buffer would be lost with the socket.
                        let _ = self.take(&socket, MOST_QUEUED, &drain);
                    }
                    return;
                }
                _ = socket.readable() => {}
            }
            if let Err(error) = self.take(&socket, BATCH, &drain) {
                let pause = backoff.failed(&error);
                if !pause.is_zero() {
                    limited!(warn, "cannot receive DNS", ?pause, "cannot receive DNS queries: {error}");
                    tokio::time::sleep(pause).await;
                }
            } else {
                backoff.succeeded();
                tokio::task::yield_now().await;
            }
        }
    }

    /// Takes what waits, up to `most` queries.
    fn take(self: &Arc<Self>, socket: &Arc<UdpSocket>, most: usize, drain: &DrainWatcher) -> io::Result<()> {
        // One more byte than allowed, to see that there was more.
        let mut buffer = [0; LARGEST_QUERY + 1];
        for _ in 0..most {
            match socket.try_recv_from(&mut buffer) {
                Ok((length, peer)) => self.datagram(socket, &buffer[..length], peer, drain),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn datagram(self: &Arc<Self>, socket: &Arc<UdpSocket>, bytes: &[u8], peer: SocketAddr, drain: &DrainWatcher) {
        // Whoever forges our own address as the source shall not make us talk to ourselves for ever.
        if bytes.len() > LARGEST_QUERY || socket.local_addr().is_ok_and(|own| own.port() == peer.port()) {
            return;
        }
        let query = match Query::read(bytes.to_vec()) {
            Ok(query) => query,
            Err(Unreadable::Silence) => return,
            // Not sent is lost, as datagrams are: the client's buffer is full.
            Err(Unreadable::Answer(answer)) => return drop(socket.try_send_to(&answer, peer)),
        };
        let step = match self.step(&query, Transport::Udp) {
            Step::Answer(answer) => return drop(socket.try_send_to(&answer, peer)),
            step => step,
        };
        let permit = match self.dns.pending.acquire(self.pod.name.clone()) {
            Ok(permit) => permit,
            Err(refused) => {
                limited!(warn, "too many DNS queries", pod = %self.pod.name, "DNS query refused: {refused}");
                return drop(socket.try_send_to(&query.refuse(Rcode::ServFail), peer));
            }
        };
        let (own, socket, mut drain) = (self.clone(), socket.clone(), drain.clone());
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = drain.forced() => {}
                answer = own.finish(step, &query, Transport::Udp) => {
                    let _ = socket.try_send_to(&answer, peer);
                }
            }
            drop(permit);
        });
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener, connections: Arc<Semaphore>, drain: DrainWatcher) {
        let handed = drain.clone();
        let on_connection = move |stream: TcpStream, _: SocketAddr| {
            let Ok(permit) = connections.clone().try_acquire_owned() else {
                limited!(warn, "too many DNS connections", pod = %self.pod.name, "DNS connection closed: the pod has {MOST_CONNECTIONS} open");
                return;
            };
            let (own, mut drain) = (self.clone(), handed.clone());
            tokio::spawn(async move {
                let mut draining = drain.clone();
                tokio::select! {
                    biased;
                    () = drain.forced() => {}
                    _ = own.converse(stream, &mut draining) => {}
                }
                drop(permit);
            });
        };
        accept_loop(listener, drain, on_connection).await;
    }

    /// One question after the other, until the client is done, takes too long, or a drain begins.
    async fn converse(&self, mut stream: TcpStream, drain: &mut DrainWatcher) -> io::Result<()> {
        loop {
            let message = tokio::select! {
                biased;
                message = timeout(TCP_PATIENCE, tcp::read_message(&mut stream)) => message,
                _ = drain.signaled() => return Ok(()),
            };
            let Ok(Ok(Some(message))) = message else { return Ok(()) };
            let answer = match Query::read(message) {
                Ok(query) => self.answer(&query, Transport::Tcp).await,
                Err(Unreadable::Silence) => return Ok(()),
                Err(Unreadable::Answer(answer)) => answer,
            };
            timeout(TCP_PATIENCE, stream.write_all(&tcp::framed(&answer))).await??;
        }
    }

    /// The answer to a question, of whoever has it.
    pub(super) async fn answer(&self, query: &Query, transport: Transport) -> Vec<u8> {
        let step = match self.step(query, transport) {
            Step::Answer(answer) => return answer,
            step => step,
        };
        match self.dns.pending.acquire(self.pod.name.clone()) {
            Ok(_permit) => self.finish(step, query, transport).await,
            Err(refused) => {
                limited!(warn, "too many DNS queries", pod = %self.pod.name, "DNS query refused: {refused}");
                query.refuse(Rcode::ServFail)
            }
        }
    }

    /// What is to be done about a question, as far as that is known at once.
    fn step(&self, query: &Query, transport: Transport) -> Step {
        let name = &self.pod.name;
        match self.pod.node.mesh.current().snapshot.local_workload(&name.name, &name.namespace, &name.service_account) {
            Some(client) => self.step_of(client, query, transport),
            None => Step::Wait,
        }
    }

    fn step_of(&self, client: Arc<Workload>, query: &Query, transport: Transport) -> Step {
        let unknown = self.dns.unknown(&self.pod.node.mesh, &client, query);
        if unknown.is_empty() { self.last_step(&client, query, transport) } else { Step::Ask(client, unknown) }
    }

    /// What is to be done when all is known that can be.
    fn last_step(&self, client: &Workload, query: &Query, transport: Transport) -> Step {
        let labels = self.dns.metrics.labels(query.kind, transport, Some(client));
        self.dns.metrics.asked(&labels);
        let answer = self.dns.answer(&self.pod.node.mesh.current().snapshot, client, query, transport);
        answer.map_or(Step::PassOn(labels), Step::Answer)
    }

    /// The rest of what is to be done.
    async fn finish(&self, mut step: Step, query: &Query, transport: Transport) -> Vec<u8> {
        if matches!(step, Step::Wait) {
            step = match self.pod.local_workload().await {
                Ok(client) => self.step_of(client, query, transport),
                Err(error) => {
                    self.dns.metrics.asked(&self.dns.metrics.labels(query.kind, transport, None));
                    limited!(warn, "DNS of unknown workloads", "DNS query refused: {error}");
                    return query.refuse(Rcode::ServFail);
                }
            };
        }
        if let Step::Ask(client, unknown) = step {
            self.dns.know(&self.pod.node.mesh, &self.pod.name, &unknown).await;
            step = self.last_step(&client, query, transport);
        }
        let labels = match step {
            Step::Answer(answer) => return answer,
            Step::PassOn(labels) => labels,
            Step::Wait | Step::Ask(..) => return query.refuse(Rcode::ServFail),
        };
        let upstreams = self.dns.upstreams.current();
        self.dns.metrics.passed_on(&labels);
        let asked = Instant::now();
        let answer = forward(&self.pod.sockets, &upstreams.nameservers, query, transport).await;
        self.dns.metrics.upstream_done(&labels, answer.is_ok(), asked.elapsed());
        let (client, what) = (&self.pod.name, query.name.as_deref().unwrap_or("?"));
        match answer {
            Ok(answer) => {
                tracing::debug!(
                    target: "dns",
                    { src.workload = &*client.name, src.namespace = &*client.namespace, query = %query.kind, domain = what,
                      result = super::message::rcode(&answer) },
                    "passed on"
                );
                answer
            }
            Err(error) => {
                limited!(warn, "DNS upstream failures", pod = %self.pod.name, domain = what, "DNS query not answered: {error}");
                query.refuse(Rcode::ServFail)
            }
        }
    }
}
