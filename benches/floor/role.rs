//! The two processes of a floor: where they listen, and where each accepted connection goes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use culvert::sys::socket::{DialOptions, dial_socket, original_destination};
use culvert::telemetry::Meter;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::crypt::{Open, Seal};
use crate::duplex::duplex;
use crate::plain::{Copy, Splice};

/// What is done with the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// splice(2)
    C1,
    /// read and write, 256 KiB
    C2,
    /// C2 with AEAD in place on the tunnel
    C3,
    /// Culvert's own relay for plain connections, to compare with one hop of c1
    Relay,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    #[arg(long, value_enum)]
    pub(crate) kind: Kind,
    /// Address to accept on
    #[arg(long)]
    pub(crate) listen: SocketAddr,
    /// Address to dial. IP 0.0.0.0: that of the original destination (or the one that was dialled), with this port
    #[arg(long)]
    pub(crate) to: Option<SocketAddr>,
    /// SO_MARK of dialled sockets
    #[arg(long)]
    pub(crate) mark: Option<u32>,
    /// Ask the kernel where a redirected connection wanted to go, and go there unless --to says otherwise
    #[arg(long)]
    pub(crate) original_destination: bool,
}

/// Accepts for ever.
pub(crate) async fn serve(listener: TcpListener, options: Options, source: bool) -> io::Result<()> {
    loop {
        match listener.accept().await {
            Ok((accepted, _)) => {
                let target = target(&accepted, &options)?;
                let (kind, mark) = (options.kind, options.mark);
                tokio::spawn(async move {
                    // The peer of a failed connection sees it closed; that is all a floor has to say.
                    if let Ok(dialled) = dial(target, mark).await {
                        relay(kind, source, accepted, dialled).await;
                    }
                });
            }
            // No descriptors, or a connection that is gone already.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn relay(kind: Kind, source: bool, accepted: TcpStream, dialled: TcpStream) {
    match (kind, source) {
        (Kind::C1, _) => duplex(accepted, dialled, Splice::default(), Splice::default()).await,
        (Kind::C2, _) => duplex(accepted, dialled, Copy::default(), Copy::default()).await,
        (Kind::Relay, _) => drop(culvert::forward::relay(accepted, dialled, &Meter::default()).await),
        (Kind::C3, true) => duplex(accepted, dialled, Seal::default(), Open::default()).await,
        (Kind::C3, false) => duplex(accepted, dialled, Open::default(), Seal::default()).await,
    }
}

fn target(accepted: &TcpStream, options: &Options) -> io::Result<SocketAddr> {
    let to = match options.to {
        Some(to) if !to.ip().is_unspecified() => return Ok(to),
        to => to,
    };
    let asked = if options.original_destination { original_destination(accepted)? } else { accepted.local_addr()? };
    Ok(to.map_or(asked, |to| SocketAddr::new(asked.ip(), to.port())))
}

async fn dial(target: SocketAddr, mark: Option<u32>) -> io::Result<TcpStream> {
    let (socket, _) = dial_socket(target, None, &DialOptions { mark, ..DialOptions::default() })?;
    TcpSocket::from_std_stream(socket.into()).connect(target).await
}
