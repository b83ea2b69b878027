//! A CA that is down, slow, silent or refusing (fault F7).

use std::sync::atomic::Ordering;

use super::ca_server::{Mood, serving};
use super::pki::HOUR;
use super::*;

#[tokio::test]
async fn a_ca_that_is_down_at_start_is_named_and_found_when_it_comes() {
    let probe = server().await;
    let (address, root) = (probe.address, Authority::root("root"));
    let tls = serving(&root, &["localhost"]);
    drop(probe);
    let gone = server().await;
    let client = Client::with(&gone, |config| config.address = format!("localhost:{}", address.port()).parse().unwrap(), Config::default(), true);
    std::fs::write(client.file("root-cert.pem"), root.signer.pem()).unwrap();
    client.store.prefetch(id("web"));
    let error = client.store.fetch(&id("web")).await.unwrap_err();
    assert_eq!(error.reason(), "unreachable");
    assert!(error.to_string().contains(&format!("localhost:{}", address.port())), "{error}");
    // Within the delay that is due by then it is asked.
    let roots = root.signer.pem();
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let _server = CaServer::start_on(listener, root, roots, tls);
    client.leap(2 * SECOND).await;
    until("a certificate", || client.state("web").as_deref() == Some("Available")).await;
}

#[tokio::test]
async fn those_who_wait_for_a_ca_that_is_down_share_one_attempt() {
    let server = server().await;
    server.present(serving(&Authority::root("other"), &["localhost"]));
    let client = Client::of(&server);
    let waiting: Vec<_> = (0..8)
        .map(|n| {
            let (store, identity) = (client.store.clone(), id(&format!("n{n}")));
            tokio::spawn(async move { store.fetch(&identity).await })
        })
        .collect();
    for fetch in waiting {
        assert_eq!(fetch.await.unwrap().unwrap_err().reason(), "untrusted_ca");
    }
    assert_eq!((client.counted("untrusted_ca"), server.desk.sockets.load(Ordering::SeqCst)), (8, 1));
}

#[tokio::test]
async fn a_slow_ca_is_waited_for_and_a_silent_one_is_not() {
    let server = server().await;
    server.mood(Mood::Slow(20 * SECOND));
    let client = Client::of(&server);
    let fetch = |account: &str| {
        let (store, identity) = (client.store.clone(), id(account));
        tokio::spawn(async move { store.fetch(&identity).await })
    };
    let slow = fetch("slow");
    until("a request", || server.asked().len() == 1).await;
    client.leap(19 * SECOND).await;
    assert_eq!(client.state("slow").as_deref(), Some("Initializing"));
    client.leap(2 * SECOND).await;
    slow.await.unwrap().unwrap();
    server.mood(Mood::Hang);
    let silent = fetch("silent");
    until("a request", || server.asked().len() == 2).await;
    client.leap(31 * SECOND).await;
    assert_eq!(silent.await.unwrap().unwrap_err().reason(), "timeout");
    until("the request to be taken back", || server.desk.busy.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_refusal_says_what_to_look_at() {
    let server = server().await;
    server.mood(Mood::Refuse(tonic::Code::Unauthenticated, "request authenticate failure"));
    let client = Client::of(&server);
    let error = client.store.fetch(&id("web")).await.unwrap_err();
    assert_eq!((error.reason(), client.counted("unauthenticated")), ("unauthenticated", 1));
    let text = error.to_string();
    assert!(text.contains("request authenticate failure") && text.contains("audience istio-ca") && text.contains("run on this node"), "{text}");
    assert_eq!(client.state("web").unwrap(), format!("Unavailable: {text}"));
    for (code, reason) in
        [(tonic::Code::Unavailable, "unavailable"), (tonic::Code::Internal, "refused"), (tonic::Code::PermissionDenied, "unauthenticated")]
    {
        server.mood(Mood::Refuse(code, "no"));
        let client = Client::of(&server);
        assert_eq!(client.store.fetch(&id("web")).await.unwrap_err().reason(), reason);
    }
}

#[tokio::test]
async fn a_refusing_ca_is_asked_at_doubling_distances() {
    let server = server().await;
    server.mood(Mood::Refuse(tonic::Code::Unavailable, "busy"));
    // A hundred times the defaults, so that the time that the test itself takes is nothing beside them.
    let config = Config { retry_initial: 100 * SECOND, retry_limit: 15_000 * SECOND, ..Config::default() };
    let client = Client::with(&server, |_| {}, config, true);
    client.store.prefetch(id("web"));
    let asked = || server.asked().iter().filter(|asked| asked.impersonated().is_some_and(|identity| identity.ends_with("/web"))).count();
    until("a request", || client.counted("unavailable") == 1).await;
    for (round, seconds) in [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 15_000, 15_000].into_iter().enumerate() {
        // Within a fifth of it, and never above the longest.
        let (early, late) = (SECOND * (seconds * 3 / 4), SECOND * (seconds + seconds / 5 + 1).min(15_001));
        client.leap(early).await;
        // Somebody else's request went all the way meanwhile: this one would have been sent.
        client.store.fetch(&id(&format!("probe{round}"))).await.unwrap_err();
        client.store.forget(&id(&format!("probe{round}")));
        assert_eq!(asked(), round + 1, "earlier than {seconds} s");
        client.leap(late - early).await;
        until("the next request", || asked() == round + 2 && client.counted("unavailable") == 2 * (round as u64) + 3).await;
    }
    // A success starts it over.
    server.mood(Mood::Sign);
    client.leap(15_001 * SECOND).await;
    until("a certificate", || client.state("web").as_deref() == Some("Available")).await;
}

#[tokio::test]
async fn the_old_certificate_serves_to_its_end_while_the_ca_refuses_and_no_longer() {
    let server = server().await;
    let client = Client::of(&server);
    let old = client.store.fetch(&id("web")).await.unwrap();
    client.store.prefetch(id("web"));
    server.mood(Mood::Refuse(tonic::Code::Unavailable, "busy"));
    client.leap(14 * HOUR).await;
    until("a failed renewal", || client.counted("unavailable") >= 1).await;
    client.wall.set(old.not_after - SECOND);
    assert_eq!(client.store.fetch(&id("web")).await.unwrap().generation, old.generation);
    assert_eq!(client.state("web").as_deref(), Some("Available"));
    client.wall.set(old.not_after);
    assert_eq!(client.store.fetch(&id("web")).await.unwrap_err().reason(), "unavailable", "fails closed, with the reason");
    assert!(client.metrics().contains("culvert_certificates{state=\"unavailable\"} 1\n"));
}

#[tokio::test]
async fn a_connection_that_the_ca_closed_fails_no_request() {
    let server = server().await;
    let client = Client::of(&server);
    for n in 0..5 {
        client.store.fetch(&id(&format!("n{n}"))).await.unwrap();
        server.close();
    }
    assert_eq!(client.counted("issued"), 5, "{}", client.metrics());
    assert_eq!(client.metrics().matches("outcome=").count(), 1, "nothing but successes: {}", client.metrics());
    assert_eq!(server.desk.connections.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn a_connection_that_lay_idle_is_not_trusted_to_be_alive() {
    let server = server().await;
    let client = Client::of(&server);
    client.store.fetch(&id("one")).await.unwrap();
    client.leap(30 * SECOND).await;
    client.store.fetch(&id("two")).await.unwrap();
    assert_eq!(server.desk.connections.load(Ordering::SeqCst), 1);
    client.leap(61 * SECOND).await;
    client.store.fetch(&id("three")).await.unwrap();
    assert_eq!(server.desk.connections.load(Ordering::SeqCst), 2);
}
