//! What lies between two tunnels' ends: a relay on loopback that cuts the bytes into pieces of its own, and may break the connection or a byte.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::JoinHandle;

use crate::tunnel_peers::{connect, listen};

/// A small buffer of the kernel, in bytes. Below a segment of loopback (64 KiB) TCP only makes headway by its timers.
pub(crate) const NARROW: usize = 48 << 10;

/// What happens to a connection on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accident {
    /// Both ends see the end of the stream.
    Close,
    /// Both ends see a reset.
    Reset,
    /// One bit is another.
    Flip,
}

/// An accident, where it happens.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) accident: Accident,
    pub(crate) to_server: bool,
    /// After so many octets in that direction.
    pub(crate) after: usize,
}

/// How bytes travel.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    /// The sizes of the pieces, over and over; 0 lets everybody else go first.
    pub(crate) pieces: Vec<usize>,
    /// The kernel holds next to nothing on the way.
    pub(crate) narrow: bool,
    /// Of the first connection.
    pub(crate) fault: Option<Fault>,
}

/// The relay. Dropping it breaks what it carries.
pub(crate) struct Transport {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Transport {
    pub(crate) async fn to(server: SocketAddr, way: Way) -> Self {
        let (listener, address) = listen().await;
        let task = tokio::spawn(async move {
            let mut carried = tokio::task::JoinSet::new();
            let mut way = way;
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let far = connect(server).await;
                carried.spawn(carry(near, far, way.clone()));
                way.fault = None;
            }
        });
        Self { address, task }
    }
}

/// Nothing more is carried.
struct Broken;

async fn carry(mut near: TcpStream, mut far: TcpStream, way: Way) {
    if way.narrow {
        for socket in [&near, &far] {
            SockRef::from(socket).set_recv_buffer_size(NARROW).unwrap();
            SockRef::from(socket).set_send_buffer_size(NARROW).unwrap();
        }
    }
    let fault = |to_server: bool| way.fault.clone().filter(|fault| fault.to_server == to_server);
    let outcome = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        tokio::try_join!(copy(near_read, far_write, &way.pieces, fault(true)), copy(far_read, near_write, &way.pieces, fault(false)))
    };
    let gently = matches!(way.fault, Some(Fault { accident: Accident::Close, .. }));
    if outcome.is_err() && !gently {
        for socket in [&near, &far] {
            // It may be gone already.
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }
}

async fn copy(mut read: ReadHalf<'_>, mut write: WriteHalf<'_>, pieces: &[usize], mut fault: Option<Fault>) -> Result<(), Broken> {
    let broken = |_: io::Error| Broken;
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    for piece in pieces.iter().cycle() {
        if *piece == 0 {
            tokio::task::yield_now().await;
            continue;
        }
        let count = read.read(&mut buffer[..*piece]).await.map_err(broken)?;
        if count == 0 {
            write.shutdown().await.map_err(broken)?;
            return Ok(());
        }
        let bytes = &mut buffer[..count];
        if let Some(struck) = fault.take_if(|fault| fault.after < at + count) {
            let place = struck.after - at;
            if struck.accident == Accident::Flip {
                bytes[place] ^= 0x10;
            } else {
                write.write_all(&bytes[..place]).await.map_err(broken)?;
                return Err(Broken);
            }
        }
        write.write_all(bytes).await.map_err(broken)?;
        at += count;
    }
    Ok(())
}
