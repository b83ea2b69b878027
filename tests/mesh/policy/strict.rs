//! STRICT: who must show an identity (reference, dataplane §4.5 and §6.3).

use super::ground::Ground;

fn peers(key: &str, spec: &str) -> String {
    let (namespace, name) = key.split_once('/').unwrap();
    format!("  - {{metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}\n")
}

const STRICT: &str = "{mtls: {mode: STRICT}}";
const BLAMED: &str = "explicitly denied by: istio-system/istio_converted_static_strict\"";

/// Whether plain connections pass, and that those with an identity do.
fn plain_passes(ground: &Ground, server: &str, port: u16, expected: bool) {
    for target in ground.both(server, port) {
        assert_eq!(ground.passes("outside", target), expected, "outside to {server} {target}");
        assert!(ground.passes("buyer", target) && ground.passes("clerk", target), "{server} {target}");
    }
}

#[test]
fn under_strict_only_tunnels_get_in_and_after_its_removal_plain_connections_again() {
    let ground = Ground::market();
    plain_passes(&ground, "till", 8080, true);
    ground.set_peers(&[peers("istio-system/default", STRICT)]);
    for server in ["till", "vault"] {
        plain_passes(&ground, server, 8080, false);
    }
    for target in ground.both("till", 8080) {
        let line = ground.refused("outside", target);
        assert!(line.contains(BLAMED) && line.contains("policy=\"istio-system/istio_converted_static_strict\""), "{line}");
    }
    ground.set_peers(&[]);
    for server in ["till", "vault"] {
        plain_passes(&ground, server, 8080, true);
    }
}

#[test]
fn strict_of_a_namespace_stays_in_it_and_a_narrower_word_wins() {
    let ground = Ground::market();
    ground.set_peers(&[peers("bank/default", STRICT)]);
    plain_passes(&ground, "vault", 8080, false);
    plain_passes(&ground, "till", 8080, true);
    let permissive = "{selector: {matchLabels: {app: money}}, mtls: {mode: PERMISSIVE}}";
    ground.set_peers(&[peers("istio-system/default", STRICT), peers("shop/open", permissive)]);
    plain_passes(&ground, "till", 8080, true);
    plain_passes(&ground, "shelf", 8080, false);
    plain_passes(&ground, "vault", 8080, false);
}

#[test]
fn strict_may_be_said_of_single_ports_and_be_lifted_from_them() {
    let ground = Ground::market();
    let ports = |mode: &str, port_mode: &str| {
        let spec = format!("{{selector: {{matchLabels: {{app: money}}}}, mtls: {{mode: {mode}}}, portLevelMtls: {{9000: {{mode: {port_mode}}}}}}}");
        [peers("shop/ports", &spec)]
    };
    ground.set_peers(&ports("PERMISSIVE", "STRICT"));
    plain_passes(&ground, "till", 8080, true);
    plain_passes(&ground, "till", 9000, false);
    plain_passes(&ground, "shelf", 9000, true);
    let line = ground.refused("outside", (ground.mesh.ip("till"), 9000));
    assert!(line.contains("explicitly denied by: shop/converted_peer_authentication_ports\""), "{line}");
    ground.set_peers(&ports("STRICT", "PERMISSIVE"));
    plain_passes(&ground, "till", 8080, false);
    plain_passes(&ground, "till", 9000, true);
}
