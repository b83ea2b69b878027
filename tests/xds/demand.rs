//! `XDS_ON_DEMAND` (reference, dataplane §3.8, 5.5).

use std::net::IpAddr;
use std::time::Duration;

use culvert::discovery::xds::Unanswered;
use culvert::model::{GatewayDestination, NamespacedHostname};
use culvert::wire::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource};

use super::xds_server::{ServerStream, pod, pod_resource, service_resource};
use super::{Setup, Stand, asker};

const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

fn on_demand(limit: u64) -> Setup {
    Setup { on_demand: Some(Duration::from_secs(limit)), ..Setup::default() }
}

/// A stand whose stream is up; istiod answers the first request of each kind.
async fn open(stand: &mut Stand) -> ServerStream {
    let mut stream = stand.server.accept().await;
    let (address, authorization) = (stream.request().await, stream.request().await);
    assert_eq!((address.resource_names_subscribe.first().unwrap().as_str(), &address.resource_names_unsubscribe[..]), ("*", &["*".to_owned()][..]));
    assert!(authorization.resource_names_subscribe.is_empty(), "policies are never on demand");
    stream.push(AUTHORIZATION_TYPE, vec![], &[]).await;
    stream.acked().await;
    stand.ready().await;
    stream
}

/// Somebody who looks an address up.
fn look_up(stand: &Stand, ip: IpAddr) -> tokio::task::JoinHandle<(Result<(), Unanswered>, bool)> {
    let mesh = stand.mesh.clone();
    tokio::spawn(async move {
        let known = mesh.know_address(&asker(), "net", ip).await;
        (known, mesh.current().snapshot.locate("net", ip, None).is_some())
    })
}

fn on_net(name: &str, aliases: &[&str]) -> Resource {
    let mut pod = pod(name, [10, 0, 0, 1]);
    pod.network = "net".into();
    Resource { aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(), ..pod_resource(&pod, "1") }
}

#[tokio::test]
async fn an_unknown_address_is_asked_for_and_an_alias_answers() {
    let mut stand = Stand::with(on_demand(10)).await;
    let mut stream = open(&mut stand).await;
    let looking = look_up(&stand, IP);
    let asked = stream.request().await;
    assert_eq!((asked.type_url.as_str(), &asked.resource_names_subscribe[..]), (ADDRESS_TYPE, &["net/10.0.0.1".to_owned()][..]));
    assert!(asked.node.is_none() && asked.response_nonce.is_empty());
    stream.push(ADDRESS_TYPE, vec![on_net("a", &["net/10.0.0.1"])], &[]).await;
    stream.acked().await;
    assert_eq!(looking.await.unwrap(), (Ok(()), true));
    assert_eq!(look_up(&stand, IP).await.unwrap(), (Ok(()), true), "known without asking");
}

#[tokio::test]
async fn what_is_nothing_of_the_mesh_is_answered_by_a_removal() {
    let mut stand = Stand::with(on_demand(10)).await;
    let mut stream = open(&mut stand).await;
    let looking = look_up(&stand, IP);
    stream.request().await;
    stream.push(ADDRESS_TYPE, vec![], &["net/10.0.0.1"]).await;
    stream.acked().await;
    assert_eq!(looking.await.unwrap(), (Ok(()), false));
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_an_error_with_a_reason() {
    let mut stand = Stand::with(Setup { on_demand: Some(Duration::from_millis(100)), ..Setup::default() }).await;
    let mut stream = open(&mut stand).await;
    let (known, there) = look_up(&stand, IP).await.unwrap();
    assert_eq!(known.unwrap_err().to_string(), "the control plane did not say within 100ms what net/10.0.0.1 is");
    assert!(!there);
    assert_eq!(stream.request().await.resource_names_subscribe, ["net/10.0.0.1"]);
    assert_eq!(stream.request().await.resource_names_unsubscribe, ["net/10.0.0.1"], "nobody wants it any more");
}

#[tokio::test]
async fn gateways_are_asked_for_by_name_or_address() {
    let mut stand = Stand::with(on_demand(10)).await;
    let mut stream = open(&mut stand).await;
    let key = NamespacedHostname { namespace: "shop".into(), hostname: "waypoint.shop".into() };
    let looking = tokio::spawn({
        let (mesh, gateway) = (stand.mesh.clone(), GatewayDestination::Hostname(key.clone()));
        async move { mesh.know_gateway(&asker(), &gateway).await }
    });
    assert_eq!(stream.request().await.resource_names_subscribe, ["shop/waypoint.shop"]);
    stream.push(ADDRESS_TYPE, vec![service_resource("waypoint.shop", [10, 9, 0, 1])], &[]).await;
    stream.acked().await;
    looking.await.unwrap().unwrap();
    assert!(stand.mesh.current().snapshot.service(&key).is_some());
}

#[tokio::test]
async fn names_that_somebody_waits_for_are_asked_again_on_the_next_stream() {
    let mut stand = Stand::with(on_demand(20)).await;
    let mut stream = open(&mut stand).await;
    let known = look_up(&stand, IP);
    stream.request().await;
    stream.push(ADDRESS_TYPE, vec![on_net("a", &["net/10.0.0.1"])], &[]).await;
    stream.acked().await;
    known.await.unwrap().0.unwrap();
    let waiting = look_up(&stand, [10, 0, 0, 7].into());
    stream.request().await;
    drop(stream);
    let mut stream = stand.server.accept().await;
    let first = stream.request().await;
    assert_eq!(first.resource_names_subscribe, ["*", "net/10.0.0.7"]);
    let versions: Vec<_> = first.initial_resource_versions.into_iter().collect();
    assert_eq!(versions, [("Kubernetes//Pod/shop/a".to_owned(), "1".to_owned()), ("net/10.0.0.7".to_owned(), String::new())]);
    stream.request().await;
    stream.push(ADDRESS_TYPE, vec![], &["net/10.0.0.7"]).await;
    assert_eq!(waiting.await.unwrap(), (Ok(()), false));
}

/// The world must be there before anybody is told to look.
#[tokio::test]
async fn an_answer_before_the_first_policies_waits_for_them() {
    let mut stand = Stand::with(on_demand(10)).await;
    let mut stream = stand.server.accept().await;
    stream.request().await;
    stream.request().await;
    let looking = look_up(&stand, IP);
    let nonce = stream.push(ADDRESS_TYPE, vec![on_net("a", &["net/10.0.0.1"])], &[]).await;
    // Whether the name is asked before or after the answer to this push is a matter of luck.
    while stream.request().await.response_nonce != nonce {}
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!looking.is_finished());
    stream.push(AUTHORIZATION_TYPE, vec![], &[]).await;
    assert_eq!(looking.await.unwrap(), (Ok(()), true));
}
