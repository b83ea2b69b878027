//! The serving end of the load.

use std::io;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::bulk::{Received, send, send_exactly, until};
use super::{Ask, CHUNK, HEAD, REQUEST, is_pattern, wrong};
use crate::sys::limits::raise_nofile;
use crate::sys::socket::{ListenOptions, Transparency, listen_tcp, wildcard};

/// Serves the bench's load on a port of every IPv4 address, on one thread, until the process is ended.
///
/// # Errors
/// When the port cannot be listened on.
pub fn serve(port: u16) -> io::Result<()> {
    raise_nofile()?;
    let options = ListenOptions { transparent: Transparency::Never, keepalive: None, backlog: 8192, ..ListenOptions::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listen_tcp(wildcard(port, false), &options)?.socket)?;
        loop {
            match listener.accept().await {
                // A client that goes away in the middle knows that itself.
                Ok((stream, _)) => drop(tokio::spawn(async move { serve_one(stream).await.ok() })),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    })
}

async fn serve_one(mut stream: TcpStream) -> io::Result<()> {
    // Room for one request: the client has no more than one under way.
    let mut buffer = [0; REQUEST];
    loop {
        let mut filled = 0;
        while filled < HEAD {
            match stream.read(buffer.get_mut(filled..).unwrap_or_default()).await? {
                0 => return Ok(()),
                length => filled += length,
            }
        }
        let (head, rest) = buffer.split_at(HEAD);
        let start = rest.get(..filled - HEAD).unwrap_or_default();
        match Ask::parse(head.try_into().map_err(|_| wrong("the head of a message"))?)? {
            Ask::Answer { length, answer } if length as usize <= REQUEST => {
                let length = length as usize;
                while filled < length {
                    match stream.read(buffer.get_mut(filled..length).unwrap_or_default()).await? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        read => filled += read,
                    }
                }
                if filled != length || !is_pattern(0, buffer.get(HEAD..length).unwrap_or_default()) {
                    return Err(wrong("a request"));
                }
                send_exactly(&mut stream, answer).await?;
            }
            Ask::Answer { length, answer } => {
                let mut received = Received::default();
                received.note(start);
                received.up_to(u64::from(length) - HEAD as u64, &mut stream, &mut vec![0; CHUNK / 4]).await?;
                send_exactly(&mut stream, answer).await?;
            }
            Ask::Take => {
                let mut received = Received::default();
                received.note(start);
                let count = received.all(&mut stream).await?.pure()?;
                return stream.write_all(&count.to_le_bytes()).await;
            }
            Ask::Give { nanoseconds } => {
                let deadline = Instant::now() + Duration::from_nanos(nanoseconds);
                let sent = send(&mut stream, None, until(deadline)).await?;
                stream.write_all(&sent.to_le_bytes()).await?;
                return stream.shutdown().await;
            }
        }
    }
}
