#![allow(clippy::unwrap_used)]

use super::*;
use crate::identity::PeerError;
use crate::policy::{Authorization, PolicySet, Scope};
use crate::proxy::route::RouteError;

fn denial() -> Denial {
    let mut set = PolicySet::new();
    set.insert(Authorization::new("nobody", "shop", Scope::Global, Action::Allow, Vec::new()));
    let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let facts = Facts { identity: None, source_ip: nowhere, destination_ip: nowhere, destination_port: 80 };
    set.compile("shop", &[]).permit(&facts).unwrap_err()
}

fn tunnel(error: hbone::Error) -> Error {
    Error::Tunnel(Arc::new(error))
}

/// Reference, dataplane §10.4; a TLS failure is one (§12.3), whoever finds it.
#[test]
fn every_way_to_fail_has_the_response_flag_of_the_reference() {
    let io = || io::Error::other("x");
    let there: SocketAddr = "10.0.0.1:15008".parse().unwrap();
    let second = Duration::from_secs(1);
    let within = |error| tunnel(hbone::Error::Within { gateway: there, error: Box::new(error) });
    for (flag, errors) in [
        ("DENY", vec![Error::Rejected(denial()), Error::Cut(denial())]),
        ("IDENTITY_ERROR", vec![Error::Identity(IdentityError::Stopped), Error::Identity(IdentityError::Timeout(second))]),
        ("TLS_FAILURE", vec![tunnel(hbone::Error::Tls("x".into())), tunnel(PeerError::NoUri.into()), within(hbone::Error::Tls("x".into()))]),
        (
            "H2_HANDSHAKE_FAILURE",
            vec![
                tunnel(hbone::Error::Handshake("x".into())),
                tunnel(hbone::Error::Tunnel("x".into())),
                tunnel(hbone::Error::HandshakeDeadline(second)),
                tunnel(hbone::Error::PingTimeout(second)),
                tunnel(hbone::Error::Flood("x")),
            ],
        ),
        ("NETWORK_POLICY", vec![tunnel(hbone::Error::ConnectTimeout(there)), within(hbone::Error::ConnectTimeout(there))]),
        ("CERT_REVOKED", vec![tunnel(hbone::Error::Revoked), within(hbone::Error::Revoked)]),
        (
            "CONNECT",
            vec![
                tunnel(hbone::Error::Connect(io())),
                tunnel(hbone::Error::Status(503)),
                Error::Connect(io()),
                Error::Relay(io()),
                Error::Abandoned,
                Error::Route(RouteError::RecursiveCall(there)),
            ],
        ),
        // What the proxy's own end or a limit of time has cut off has not failed.
        ("-", vec![Error::Drained, Error::HalfClosed(second)]),
    ] {
        for error in errors {
            assert_eq!(error.flag().as_str(), flag, "{error:?}");
            let end = error.end();
            assert_eq!((end.flag.as_str(), end.error.as_deref()), (flag, Some(error.to_string().as_str())));
        }
    }
}
