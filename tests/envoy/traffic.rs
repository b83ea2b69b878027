//! What goes through, unchanged, and by whose leave.

use std::io::{Read, Write};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use crate::bulk::{gibibyte_each_way, receive, send};
use crate::ground::{ENVOY, Ground, ROLES, Role};
use crate::mesh::{alone, echo_on, report, serve_echo, serve_name, wait_until};

#[test]
fn a_gibibyte_each_way_at_the_same_time_arrives_intact() {
    let _alone = alone();
    let Some(ground) = Ground::up() else { return };
    for role in ROLES {
        let (caller, server) = ground.pair(role, &ground.listen(role, 9000));
        report(&format!("Envoy as {role:?}: 2 x 1 GiB in {:.1?}", gibibyte_each_way(&caller, &server)));
    }
}

#[test]
fn five_hundred_streams_at_once_carry_each_its_own_bytes() {
    const COUNT: usize = 500;
    let _alone = alone();
    culvert::sys::limits::raise_nofile().unwrap();
    let Some(ground) = Ground::up() else { return };
    for role in ROLES {
        serve_echo(ground.listen(role, 8080));
        let mut sockets = ground.connect(role, 8080, COUNT);
        for round in 0..3 {
            let bytes = |number: usize| -> Vec<u8> {
                let word = ((number * 3 + round) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                word.to_be_bytes().into_iter().cycle().take(8_000 + 16 * number).collect()
            };
            for (number, socket) in sockets.iter_mut().enumerate() {
                socket.write_all(&bytes(number)).unwrap();
            }
            for (number, socket) in sockets.iter_mut().enumerate() {
                let expected = bytes(number);
                let mut got = vec![0; expected.len()];
                socket.read_exact(&mut got).unwrap_or_else(|error| panic!("Envoy as {role:?}, number {number}: {error}"));
                assert!(got == expected, "Envoy as {role:?}, number {number}: other bytes came back");
            }
        }
        let figure = |name| ground.figure(&format!("{}_{name}", role.figures()));
        assert_eq!(figure("rq_active"), COUNT as u64, "not all of them were open at once");
        let tunnels = figure("cx_active");
        report(&format!("Envoy as {role:?}: {COUNT} streams on {tunnels} tunnels"));
        drop(sockets);
        wait_until("all streams have ended", || figure("rq_active") == 0);
    }
}

#[test]
fn requests_to_envoy_pass_uploads_that_have_stalled_with_the_tunnels_whole_window() {
    let Some(ground) = Ground::up() else { return };
    let silent = ground.listen(Role::Server, 9000);
    serve_echo(ground.listen(Role::Server, 8080));
    let mut open = ground.connect(Role::Server, 8080, 1).remove(0);
    echo_on(&mut open, b"before").unwrap();
    let (mut stalled, mut stuck) = (Vec::new(), 0);
    for _ in 0..3 {
        let (mut caller, server) = ground.pair(Role::Server, &silent);
        caller.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        while let Ok(sent) = caller.write(&[7; 64 << 10]) {
            stuck += sent;
        }
        stalled.push((caller, server));
    }
    // Envoy gives nothing back before it is half of its window: a connection that is open has what is kept for such, 128 KiB.
    for _ in 0..1000 {
        echo_on(&mut open, &[b'x'; 100]).unwrap();
    }
    // New ones are not opened there for long.
    let tunnels = || ground.figure("http.hbone.downstream_cx_total");
    wait_until("there is another tunnel", || {
        ground.mesh.echo("client", ground.target(Role::Server, 8080)).unwrap();
        tunnels() == 2
    });
    for _ in 0..100 {
        ground.mesh.echo("client", ground.target(Role::Server, 8080)).unwrap();
    }
    echo_on(&mut open, b"after").unwrap();
    assert_eq!(tunnels(), 2);
    report(&format!("{} MiB were stuck", stuck >> 20));
}

#[test]
fn policy_sees_the_identity_of_envoys_certificate() {
    let Some(ground) = Ground::up() else { return };
    let mesh = &ground.mesh;
    for port in [7000, 8080] {
        serve_name(mesh.listen("server", port), "server");
    }
    // Only Envoy is denied, and only there.
    assert_eq!(mesh.ask_name("client", (mesh.ip("server"), 7000)).unwrap(), "server");
    assert_eq!(mesh.ask_name("envoy", ground.target(Role::Client, 8080)).unwrap(), "server");
    let identity = format!("src.identity=\"{ENVOY}\"");
    mesh.wait_for_log("left", &["\tinfo\t", "connection complete", "direction=\"inbound\"", &identity]);
    // Envoy tells its application of a refusal by an end or by a reset.
    let _ = mesh.call_fails("envoy", ground.target(Role::Client, 7000));
    let denied = ["\terror\t", "direction=\"inbound\"", "explicitly denied by: default/no-envoy", "policy=\"default/no-envoy\"", &identity];
    mesh.wait_for_log("left", &denied);
}

#[test]
fn envoy_sees_our_authority_and_the_identity_of_our_pod() {
    let Some(ground) = Ground::up() else { return };
    serve_echo(ground.listen(Role::Server, 8080));
    ground.mesh.echo("client", ground.target(Role::Server, 8080)).unwrap();
    ground.wait_for_access("CONNECT 10.244.2.2:8080 spiffe://cluster.local/ns/default/sa/client 200");
}

#[test]
fn when_envoy_drains_a_running_transfer_finishes_and_new_connections_take_new_tunnels() {
    // More does not fit into all the buffers on the way down.
    const DOWN: usize = 64 << 20;
    // Less than Envoy's window of 24 MiB for a tunnel: it gives that back half by half only, so one stream that nobody reads can take it all.
    const UP: usize = 20 << 20;
    let Some(ground) = Ground::up() else { return };
    serve_echo(ground.listen(Role::Server, 8080));
    let (caller, server) = ground.pair(Role::Server, &ground.listen(Role::Server, 9000));
    let tunnels = || ground.figure("http.hbone.downstream_cx_total");
    // Both readers stop after a part until Envoy has sent its tunnel away, so that bytes are on their way in all buffers.
    let gate = Mutex::new(());
    let closed = gate.lock().unwrap();
    let (tell, told) = mpsc::channel();
    let stop = |tell: mpsc::Sender<()>| {
        let (gate, mut tell) = (&gate, Some(tell));
        move |total| {
            if total > 1 << 20
                && let Some(tell) = tell.take()
            {
                tell.send(()).unwrap();
                drop(gate.lock());
            }
        }
    };
    let (server_stops, caller_stops) = (stop(tell.clone()), stop(tell));
    thread::scope(|scope| {
        let up = scope.spawn(|| send(&caller, UP, 1));
        let down = scope.spawn(|| send(&server, DOWN, 2));
        let at_server = scope.spawn(|| receive(&server, server_stops));
        let at_caller = scope.spawn(|| receive(&caller, caller_stops));
        (0..2).for_each(|_| told.recv().unwrap());
        assert_eq!(tunnels(), 1);
        // Envoy says GOAWAY on a tunnel with the next answer there. It goes on to accept.
        ground.order("/drain_listeners?graceful&skip_exit");
        wait_until("a new tunnel was dialled", || {
            ground.mesh.echo("client", ground.target(Role::Server, 8080)).unwrap();
            tunnels() > 1
        });
        assert!(!down.is_finished(), "nothing was left to finish");
        drop(closed);
        assert_eq!(at_server.join().unwrap(), up.join().unwrap(), "to the server");
        assert_eq!(at_caller.join().unwrap(), down.join().unwrap(), "to the caller");
    });
    drop((caller, server));
    wait_until("the old tunnel has ended", || ground.figure("http.hbone.downstream_cx_active") < tunnels());
    let mut after = ground.connect(Role::Server, 8080, 1).remove(0);
    echo_on(&mut after, b"after").unwrap();
    assert!(ground.figure("http.hbone.downstream_cx_drain_close") > 0);
    assert_eq!(ground.mesh.metric("left", "istio_tcp_connections_failed_total", &["reporter=\"source\""]), 0.0);
}
