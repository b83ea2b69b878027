#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::net::Ipv4Addr;

use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::time::sleep;

use super::*;
use crate::proxy::Config;
use crate::proxy::route::RouteConfig;

const NOERROR: u8 = 0;
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;
const REFUSED: u8 = 5;

/// How a nameserver behaves: after so many milliseconds an answer with a code and its number, or an error.
type Behaviour = (u64, Result<u8, io::ErrorKind>);

fn upstream(number: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 0, 0, u8::try_from(number).unwrap()), 53))
}

/// The outcome of a race, as code and number of the nameserver, when it was over, and who was asked when (milliseconds).
async fn run(behaviours: &[Behaviour]) -> (Result<(u8, u8), io::ErrorKind>, u128, Vec<(u8, u128)>) {
    let upstreams: Vec<SocketAddr> = (0..behaviours.len()).map(upstream).collect();
    let (begin, log) = (Instant::now(), RefCell::new(Vec::new()));
    let ask = |upstream: SocketAddr| {
        let std::net::IpAddr::V4(ip) = upstream.ip() else { unreachable!("all are IPv4") };
        let number = ip.octets()[3];
        log.borrow_mut().push((number, begin.elapsed().as_millis()));
        let (after, outcome) = behaviours[usize::from(number)];
        async move {
            sleep(Duration::from_millis(after)).await;
            outcome.map(|code| vec![number, 0, 0x80, code, 0, 0]).map_err(io::Error::from)
        }
    };
    let outcome = race(&upstreams, begin + DEADLINE, ask).await;
    let outcome = outcome.map(|answer| (answer[3], answer[0])).map_err(|error| error.kind());
    (outcome, begin.elapsed().as_millis(), log.into_inner())
}

const NEVER: u64 = 60_000;

#[tokio::test(start_paused = true)]
async fn the_first_nameserver_is_asked_alone_while_it_answers_in_time() {
    assert_eq!(run(&[(900, Ok(NOERROR)), (0, Ok(NOERROR))]).await, (Ok((NOERROR, 0)), 900, vec![(0, 0)]));
    assert_eq!(run(&[(10, Ok(NXDOMAIN)), (0, Ok(NOERROR))]).await, (Ok((NXDOMAIN, 0)), 10, vec![(0, 0)]), "a name that is not there is an answer");
}

#[tokio::test(start_paused = true)]
async fn a_silent_nameserver_is_joined_by_the_next_after_a_second_and_may_still_answer() {
    assert_eq!(run(&[(NEVER, Ok(NOERROR)), (10, Ok(NOERROR))]).await, (Ok((NOERROR, 1)), 1010, vec![(0, 0), (1, 1000)]));
    assert_eq!(run(&[(1500, Ok(NOERROR)), (NEVER, Ok(NOERROR))]).await.0, Ok((NOERROR, 0)));
    assert_eq!(run(&[(2200, Ok(NOERROR))]).await, (Ok((NOERROR, 0)), 2200, vec![(0, 0), (0, 1000)]));
}

#[tokio::test(start_paused = true)]
async fn a_failure_or_an_answer_that_does_not_help_moves_on_at_once() {
    for first in [Err(io::ErrorKind::ConnectionRefused), Ok(SERVFAIL), Ok(REFUSED)] {
        assert_eq!(run(&[(5, first), (10, Ok(NOERROR))]).await, (Ok((NOERROR, 1)), 15, vec![(0, 0), (1, 5)]), "{first:?}");
    }
    // Nobody is left to help: the first answer, without asking anybody twice.
    assert_eq!(run(&[(5, Ok(REFUSED)), (5, Ok(SERVFAIL))]).await, (Ok((REFUSED, 0)), 10, vec![(0, 0), (1, 5)]));
    assert_eq!(run(&[(5, Ok(SERVFAIL))]).await, (Ok((SERVFAIL, 0)), 5, vec![(0, 0)]));
    let (outcome, _, asked) = run(&[(5, Ok(SERVFAIL)), (5, Err(io::ErrorKind::ConnectionRefused))]).await;
    assert_eq!((outcome, asked.len() <= MOST_TRIES), (Ok((SERVFAIL, 0)), true));
}

#[tokio::test(start_paused = true)]
async fn nobody_is_asked_more_than_four_times_or_waited_for_longer_than_the_deadline() {
    let (outcome, over, asked) = run(&[(NEVER, Ok(0)), (NEVER, Ok(0)), (NEVER, Ok(0))]).await;
    assert_eq!((outcome, over), (Err(io::ErrorKind::TimedOut), DEADLINE.as_millis()));
    assert_eq!(asked, [(0, 0), (1, 1000), (2, 2000), (0, 3000)]);
    let refused = Err(io::ErrorKind::ConnectionRefused);
    assert_eq!(run(&[(0, refused)]).await, (Err(io::ErrorKind::ConnectionRefused), 0, vec![(0, 0), (0, 0)]));
    assert_eq!(run(&[]).await, (Err(io::ErrorKind::NotFound), 0, vec![]));
}

fn sockets() -> PodSockets {
    let config = Config {
        route: RouteConfig::default(),
        mark: None,
        keepalive: None,
        user_timeout: false,
        half_closed: Duration::from_secs(300),
        connect_timeout: Duration::from_secs(10),
        workload_timeout: Duration::from_secs(5),
        baggage: false,
        localhost_app_tunnel: false,
        policy_info: false,
    };
    PodSockets::new(None, false, &config)
}

fn query() -> Query {
    let name = hickory_proto::rr::Name::from_ascii("Example.com.").unwrap();
    let mut message = hickory_proto::op::Message::query();
    message.add_query(hickory_proto::op::Query::query(name, hickory_proto::rr::RecordType::TXT));
    Query::read(message.to_vec().unwrap()).unwrap()
}

fn answer(mut query: Vec<u8>, tail: &[u8]) -> Vec<u8> {
    query[2] |= 0x80;
    query.extend(tail);
    query
}

#[tokio::test]
async fn a_datagram_goes_on_with_another_id_and_forged_answers_are_passed_over() {
    let (query, server) = (query(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let upstream = server.local_addr().unwrap();
    let serve = tokio::spawn(async move {
        let mut ids = Vec::new();
        for _ in 0..8 {
            let mut buffer = [0; 512];
            let (length, peer) = server.recv_from(&mut buffer).await.unwrap();
            let asked = buffer[..length].to_vec();
            ids.push((asked[..2].to_vec(), peer.port()));
            let mut forged = answer(asked.clone(), b"forged");
            forged[1] ^= 1;
            server.send_to(&forged, peer).await.unwrap();
            server.send_to(b"x", peer).await.unwrap();
            server.send_to(&answer(asked, b"genuine"), peer).await.unwrap();
        }
        ids
    });
    for _ in 0..8 {
        let got = forward(&sockets(), &[upstream], &query, Transport::Udp).await.unwrap();
        assert_eq!(got, answer(query.with_id(u16::from_be_bytes([got[0], got[1]])), b"genuine"));
        assert_eq!(got[..2], query.refuse(super::super::message::Rcode::ServFail)[..2], "the client's own id comes back");
    }
    let mut ids = serve.await.unwrap();
    ids.sort();
    ids.dedup_by_key(|(id, _)| id.clone());
    assert!(ids.len() > 4, "ids are not random: {ids:?}");
    ids.sort_by_key(|(_, port)| *port);
    ids.dedup_by_key(|(_, port)| *port);
    assert!(ids.len() > 4, "ports are not random: {ids:?}");
}

#[tokio::test]
async fn a_port_where_nobody_listens_fails_at_once_over_both_transports() {
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for transport in [Transport::Udp, Transport::Tcp] {
        let begin = Instant::now();
        let error = forward(&sockets(), &[gone], &query(), transport).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{transport:?}: {error}");
        assert!(error.to_string().contains(&gone.to_string()), "{error}");
        assert!(begin.elapsed() < DEADLINE);
    }
}

#[tokio::test]
async fn a_question_over_tcp_is_passed_on_over_tcp_and_its_long_answer_comes_back_whole() {
    let (query, server) = (query(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let upstream = server.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = server.accept().await.unwrap();
        let asked = tcp::read_message(&mut stream).await.unwrap().unwrap();
        for part in tcp::framed(&answer(asked, &[7; 30_000])).chunks(9000) {
            stream.write_all(part).await.unwrap();
        }
        let _ = stream.read(&mut [0]).await;
    });
    let got = forward(&sockets(), &[upstream], &query, Transport::Tcp).await.unwrap();
    assert!(got.len() > 30_000 && got.ends_with(&[7; 30_000]));
}
