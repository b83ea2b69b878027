//! Steady bulk allocates nothing: no buffer, no future, no list per record, per read or per wake-up. A binary of its own, with an allocator that
//! counts what the thread of a test asks for; both ends of the tunnel, the applications and the runtime are on that one thread.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// An allocator cannot be written without.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use culvert::hbone::{Config, ConnectResponse, Role};
use culvert::telemetry::Meter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[allow(dead_code, unreachable_pub)]
#[path = "support/tunnel_peers.rs"]
mod tunnel_peers;

use tunnel_peers::{OurClient, OurServer, Realm, connected};

/// Counts, and leaves the work to the system's allocator.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending counts no more.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WARM_UP: usize = 64 << 20;
/// 4,096 full records and a few.
const STEADY: usize = 64 << 20;
/// What may be left in the steady phase: lists that reach a new largest size. Anything per record, per read or per turn of a task would be in the
/// hundreds at least.
const MOST: usize = 16;

/// Sends so much from one end to the other, which lets the others run so often after each read; how many allocations there were once the
/// warm-up had passed.
async fn bulk(mut from: TcpStream, mut to: TcpStream, rests: usize) -> usize {
    let writer = tokio::spawn(async move {
        let bytes = vec![7; 1 << 20];
        for _ in 0..(WARM_UP + STEADY) / bytes.len() {
            from.write_all(&bytes).await.unwrap();
        }
        from
    });
    let mut buffer = vec![0; 256 << 10];
    let mut before = 0;
    for phase in [WARM_UP, STEADY] {
        before = ALLOCATIONS.get();
        let mut left = phase;
        while left > 0 {
            let most = left.min(buffer.len());
            left -= to.read(&mut buffer[..most]).await.unwrap();
            for _ in 0..rests {
                tokio::task::yield_now().await;
            }
        }
    }
    let after = ALLOCATIONS.get();
    drop(writer.await.unwrap());
    after - before
}

#[tokio::test]
async fn a_tunnel_in_steady_bulk_allocates_nothing_per_record() {
    for up in [true, false] {
        let realm = Realm::new();
        let mut server = OurServer::with(&realm, Config::default()).await;
        let client = OurClient::to(server.address, &realm, Config::default()).await;
        let (near, far) = tokio::join!(client.open(), server.accept_one());
        let (near, far) = (near.unwrap(), far);
        let allocations = if up { bulk(near.socket, far.socket, 0).await } else { bulk(far.socket, near.socket, 0).await };
        assert!(allocations <= MOST, "{allocations} allocations for {} records, up: {up}", STEADY >> 14);
    }
}

#[tokio::test]
async fn an_application_that_is_slower_than_its_tunnel_allocates_nothing_per_record_either() {
    let realm = Realm::new();
    let mut server = OurServer::with(&realm, Config::default()).await;
    let client = OurClient::to(server.address, &realm, Config::default()).await;
    let accept = async {
        let stream = server.request().await.accept(&ConnectResponse::default()).unwrap();
        let (socket, relayed) = connected().await;
        // What the socket does not take waits in the stream's backlog.
        socket2::SockRef::from(&relayed).set_send_buffer_size(64 << 10).unwrap();
        tokio::spawn(async move { stream.relay(relayed, Role::Server, &Arc::new(Meter::default())).await });
        socket
    };
    let (near, far) = tokio::join!(client.open(), accept);
    let allocations = bulk(near.unwrap().socket, far, 20).await;
    assert!(allocations <= MOST, "{allocations} allocations for {} records", STEADY >> 14);
}

#[tokio::test]
async fn the_relay_in_steady_bulk_allocates_nothing_per_chunk() {
    for up in [true, false] {
        let ((near, client), (server, far)) = (connected().await, connected().await);
        let relay = tokio::spawn(async move { culvert::forward::relay(client, server, &Arc::new(Meter::default())).await });
        let allocations = if up { bulk(near, far, 0).await } else { bulk(far, near, 0).await };
        assert!(allocations <= MOST, "{allocations} allocations for {} MiB, up: {up}", STEADY >> 20);
        drop(relay);
    }
}
