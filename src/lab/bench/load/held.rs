//! Connections that stay: what an idle stream costs shows only while there are many of them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinSet;

use super::bulk::{Received, send_exactly};
use super::client::{connect, exchange, on_own_thread};
use super::{Ask, CHUNK, HEAD_LENGTH, REQUEST, Seat, request};

/// How many connections are opened, or moved through, at once: below what a node lets one peer prove at once.
const AT_ONCE: usize = 32;

/// Open connections on a thread of their own; dropping it closes them.
#[derive(Debug)]
pub(in super::super) struct Held {
    orders: mpsc::Sender<Order>,
}

#[derive(Debug)]
struct Order {
    what: What,
    done: oneshot::Sender<io::Result<()>>,
}

#[derive(Debug)]
enum What {
    Open(usize),
    Move(u32),
}

impl Held {
    /// Starts the thread inside a namespace; there is no connection yet.
    pub(in super::super) fn start(seat: &Seat, server: SocketAddr) -> Self {
        let (orders, mut receive) = mpsc::channel::<Order>(1);
        let seat = seat.clone();
        tokio::spawn(async move {
            let work = async move {
                let mut open = Vec::new();
                while let Some(Order { what, done }) = receive.recv().await {
                    let outcome = match what {
                        What::Open(count) => open_all(&mut open, server, count).await,
                        What::Move(bytes) => move_all(&mut open, bytes).await,
                    };
                    done.send(outcome).ok();
                }
            };
            // A thread that cannot start leaves its orders unanswered, which is noticed there.
            on_own_thread(&seat, "held", work).await.ok();
        });
        Self { orders }
    }

    /// Opens connections, each with one request and its answer.
    pub(in super::super) async fn open(&self, count: usize) -> Result<(), String> {
        self.order(What::Open(count)).await
    }

    /// Moves so many bytes through each connection, first to the server, then back.
    pub(in super::super) async fn move_each(&self, bytes: u32) -> Result<(), String> {
        self.order(What::Move(bytes)).await
    }

    async fn order(&self, what: What) -> Result<(), String> {
        let (done, answer) = oneshot::channel();
        let gone = || "the load's thread has ended".to_owned();
        self.orders.send(Order { what, done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map_err(|error| error.to_string())
    }
}

async fn open_all(open: &mut Vec<TcpStream>, server: SocketAddr, count: usize) -> io::Result<()> {
    let request: Arc<[u8]> = request().into();
    let opened = at_once(vec![(); count], move |()| {
        let request = Arc::clone(&request);
        async move {
            let mut stream = connect(server).await?;
            exchange(&mut stream, &request, &mut [0; REQUEST]).await?;
            Ok(stream)
        }
    });
    open.extend(opened.await?);
    Ok(())
}

async fn move_all(open: &mut Vec<TcpStream>, bytes: u32) -> io::Result<()> {
    let moved = at_once(std::mem::take(open), move |mut stream| async move {
        let ask = Ask::Answer { length: bytes.max(HEAD_LENGTH + 1), answer: u64::from(bytes) };
        stream.write_all(&ask.head()).await?;
        send_exactly(&mut stream, u64::from(bytes.saturating_sub(HEAD_LENGTH).max(1))).await?;
        Received::default().up_to(u64::from(bytes), &mut stream, &mut vec![0; CHUNK / 4]).await?;
        Ok(stream)
    });
    *open = moved.await?;
    Ok(())
}

/// Does the same with every item, a few at once.
async fn at_once<I, T, F>(items: Vec<I>, work: impl Fn(I) -> F + Clone + Send + 'static) -> io::Result<Vec<T>>
where
    I: Send + 'static,
    T: Send + 'static,
    F: Future<Output = io::Result<T>> + Send,
{
    let items = Arc::new(Mutex::new(items));
    let mut workers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (items, work) = (Arc::clone(&items), work.clone());
        workers.spawn(async move {
            let mut done = Vec::new();
            loop {
                // On a line of its own: the lock is free while the work goes on.
                let item = items.lock().await.pop();
                let Some(item) = item else { return Ok::<_, io::Error>(done) };
                done.push(work(item).await?);
            }
        });
    }
    let mut all = Vec::new();
    while let Some(ended) = workers.join_next().await {
        all.extend(ended.map_err(io::Error::other)??);
    }
    Ok(all)
}
