//! Policies that are missing, wrong, or go together with their workload (craft-and-trust D9, D16).

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::ground::{Ground, MARKET, list, workload};
use crate::mesh::{echo_on, serve_echo, wait_until};

fn named(name: &str, action: &str) -> Value {
    json!({"name": name, "namespace": "shop", "scope": "WorkloadSelector", "action": action, "rules": [[]]})
}

fn names(mesh: &mut Value, key: &str) {
    workload(mesh, "till")["authorizationPolicies"] = json!([key]);
}

#[test]
fn a_policy_that_is_named_but_not_known_denies_after_a_second_with_the_reason_and_recovers_when_it_comes() {
    let ground = Ground::market();
    let till = SocketAddr::from((ground.mesh.ip("till"), 8080));
    ground.edit(|mesh| names(mesh, "shop/late"));
    let reason = "policy shop/late is named by the workload but not known\"";
    std::thread::scope(|scope| {
        for client in ["buyer", "outside"] {
            let ground = &ground;
            let (netns, began) = (ground.mesh.netns(culvert::lab::Place::Pod(client)), Instant::now());
            scope.spawn(move || {
                let mut socket = netns.run(|| std::net::TcpStream::connect(till)).unwrap().unwrap();
                assert!(echo_on(&mut socket, b"anybody?").is_err());
                assert!(began.elapsed() > Duration::from_millis(900), "{client} was not given the second");
            });
        }
    });
    for mark in ["hbone_addr", "dst.workload"] {
        let line = ground.mesh.wait_for_log("right", &["connection closed due to policy rejection", reason, mark]);
        assert!(line.contains("policy=\"shop/late\"") && line.contains("bytes_sent=0 bytes_recv=0"), "{line}");
    }
    assert!(ground.passes("buyer", (ground.mesh.ip("vault"), 8080)), "it is only about the workload that names it");
    // Whoever waits when it comes gets its verdict at once. On a busy machine the second may be over by then.
    let waited = (0..5).any(|_| {
        ground.edit(|mesh| list(mesh, "policies").retain(|policy| policy["name"] != "late"));
        let mut waiting = ground.mesh.connect("buyer", till).unwrap();
        waiting.write_all(b"hello").unwrap();
        ground.edit(|mesh| list(mesh, "policies").push(named("late", "Allow")));
        waiting.read_exact(&mut [0; 5]).is_ok()
    });
    assert!(waited, "nobody who waited was let in");
    assert!(ground.passes("buyer", till) && ground.passes("outside", till));
}

#[test]
fn a_live_connection_is_cut_when_a_policy_stays_unknown_and_is_not_when_it_comes_soon() {
    let ground = Ground::market();
    let till = (ground.mesh.ip("till"), 8080);
    let forget = || ground.edit(|mesh| list(mesh, "policies").retain(|policy| policy["name"] != "late"));
    ground.edit(|mesh| list(mesh, "policies").push(named("late", "Allow")));
    ground.edit(|mesh| names(mesh, "shop/late"));
    // On a busy machine the second may be over before the policy comes back.
    let survived = (0..5).find_map(|_| {
        let mut live = ground.mesh.connect("buyer", till).unwrap();
        echo_on(&mut live, b"still here").unwrap();
        forget();
        ground.edit(|mesh| list(mesh, "policies").push(named("late", "Allow")));
        echo_on(&mut live, b"still here").is_ok().then_some(live)
    });
    let mut live = survived.expect("none was waited for");
    forget();
    let began = Instant::now();
    let ended = live.read(&mut [0; 16]);
    let refused = matches!(&ended, Err(error) if error.kind() == ErrorKind::ConnectionReset);
    assert!(refused && began.elapsed() < Duration::from_secs(3), "{ended:?} after {:?}", began.elapsed());
    ground.mesh.wait_for_log("right", &["connection closed due to policy change: policy shop/late is named by the workload but not known"]);
}

#[test]
fn a_file_that_is_refused_changes_nothing_and_says_so_once() {
    let ground = Ground::market();
    let (till, vault) = ((ground.mesh.ip("till"), 8080), (ground.mesh.ip("vault"), 8080));
    ground.edit(|mesh| {
        names(mesh, "shop/no");
        list(mesh, "policies").push(named("no", "Deny"));
    });
    let mut live = ground.mesh.connect("buyer", vault).unwrap();
    echo_on(&mut live, b"still here").unwrap();
    let good = ground.file();
    let wrong: [fn(&mut Value); 3] = [
        |mesh| list(mesh, "policies")[0]["rules"] = json!([[[{"destinationPorts": [65616]}]]]),
        |mesh| list(mesh, "policies")[0]["rules"] = json!([[[{"sourceIps": ["10.0.0.0/33"]}]]]),
        |mesh| list(mesh, "policies")[0]["except"] = json!("me"),
    ];
    for (index, spoil) in wrong.into_iter().enumerate() {
        let mut bad = good.clone();
        // What else it says is not taken either.
        workload(&mut bad, "till")["authorizationPolicies"] = json!([]);
        spoil(&mut bad);
        ground.mesh.replace_mesh_file(&bad.to_string());
        let failures = (index + 1) as f64;
        for node in ["left", "right"] {
            wait_until("it is counted", || ground.mesh.metric(node, "culvert_static_config_failures_total", &[]) == failures);
        }
        assert!(!ground.passes("buyer", till) && ground.passes("buyer", vault) && ground.passes("outside", vault));
        echo_on(&mut live, b"still here").unwrap();
    }
    ground.mesh.replace_mesh_file("workloads: [");
    wait_until("it is counted", || ground.mesh.metric("right", "culvert_static_config_failures_total", &[]) == 4.0);
    let errors =
        || ground.mesh.log("right").into_iter().filter(|line| line.contains("static configuration refused, the old one stays")).collect::<Vec<_>>();
    wait_until("all are logged", || errors().len() >= 4);
    for (line, word) in errors().iter().zip(["65616", "33", "except"]) {
        assert!(line.contains("\terror\t") && line.contains("policies[0]") && line.contains(word), "{line}");
    }
    ground.mesh.replace_mesh_file(&good.to_string());
    ground.edit(|mesh| names(mesh, "shop/gone-too"));
    ground.edit(|mesh| workload(mesh, "till")["authorizationPolicies"] = json!([]));
    assert!(ground.passes("buyer", till));
    echo_on(&mut live, b"still here").unwrap();
    assert_eq!(errors().len(), 4);
}

#[test]
fn a_policy_that_cannot_be_enforced_denies_whom_it_is_for_and_says_why() {
    let ground = Ground::market();
    ground.edit(|mesh| {
        let mut policy = named("odd", "Allow");
        policy["scope"] = json!("Namespace");
        policy["invalid"] = json!("field 14 is not known");
        list(mesh, "policies").push(policy);
    });
    for client in ["buyer", "outside"] {
        let line = ground.refused(client, (ground.mesh.ip("till"), 8080));
        assert!(line.contains("policy shop/odd cannot be enforced: field 14 is not known\"") && line.contains("policy=\"shop/odd\""), "{line}");
        assert!(ground.passes(client, (ground.mesh.ip("vault"), 8080)));
    }
}

#[test]
fn whatever_goes_first_workload_or_policy_there_is_no_moment_of_allow() {
    let ground = Ground::of(MARKET);
    let listener = ground.mesh.listen("till", 8080);
    let till = SocketAddr::from((ground.mesh.ip("till"), 8080));
    let denied = |mesh: &mut Value| {
        names(mesh, "shop/no");
        list(mesh, "policies").push(named("no", "Deny"));
    };
    ground.edit(denied);
    let whole = ground.file();
    let (stop, tries, reached) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    listener.set_nonblocking(true).unwrap();
    std::thread::scope(|scope| {
        for client in ["buyer", "outside", "buyer"] {
            let netns = ground.mesh.netns(culvert::lab::Place::Pod(client));
            let (stop, tries) = (&stop, &tries);
            scope.spawn(move || {
                // Connections wait for what they do not find, so many are made, and nobody waits for their end.
                let mut open = std::collections::VecDeque::new();
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(socket) = netns.run(|| std::net::TcpStream::connect_timeout(&till, Duration::from_secs(1))).unwrap() {
                        let _ = (&socket).write_all(b"anybody?");
                        open.push_back(socket);
                    }
                    if open.len() > 30 {
                        open.pop_front();
                    }
                    tries.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(3));
                }
            });
        }
        let without_workload = |mesh: &mut Value| list(mesh, "workloads").retain(|entry| entry["name"] != "till");
        let without_policy = |mesh: &mut Value| list(mesh, "policies").retain(|entry| entry["name"] != "no");
        let back = |mesh: &mut Value| *mesh = whole.clone();
        // Both in one step, and each before the other; on the way back likewise.
        ground.edit(|mesh| {
            without_workload(mesh);
            without_policy(mesh);
        });
        ground.edit(back);
        ground.edit(without_policy);
        ground.edit(without_workload);
        ground.edit(|mesh| list(mesh, "policies").push(named("no", "Deny")));
        ground.edit(back);
        ground.edit(without_workload);
        ground.edit(without_policy);
        ground.edit(back);
        stop.store(true, Ordering::Relaxed);
        while listener.accept().is_ok() {
            reached.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert_eq!(reached.load(Ordering::Relaxed), 0, "of {} tries", tries.load(Ordering::Relaxed));
    assert!(tries.load(Ordering::Relaxed) > 30);
    // The test would have seen one.
    ground.edit(|mesh| workload(mesh, "till")["authorizationPolicies"] = json!([]));
    listener.set_nonblocking(false).unwrap();
    serve_echo(listener);
    assert!(ground.passes("buyer", till));
}
