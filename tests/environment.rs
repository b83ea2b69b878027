//! The environment of `culvert proxy` from outside (reference, dataplane §10.1). What each variable does is tested beside the settings; here is that
//! the program reads them, and says which one is wrong before it does anything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::{Command, Output, Stdio};

/// The program with these variables and no others.
fn proxy(variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
    command.env_clear().envs(variables.iter().copied()).arg("proxy").args(arguments).stdin(Stdio::null());
    command.output().unwrap()
}

fn words(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_variable_that_cannot_be_read_stops_the_start_and_is_named() {
    for (variable, value, named) in [
        ("PROXY_MODE", "both", "'both'"),
        ("PROXY_CONFIG", "concurrency: many", "PROXY_CONFIG"),
        ("KEEPALIVE_TIME", "soon", "--keepalive-time"),
        ("XDS_ON_DEMAND", "maybe", "--xds-on-demand"),
        ("PACKET_MARK", "-1", "--packet-mark"),
        ("HTTP2_FRAME_SIZE", "1", "--http2-frame-size"),
        ("ZTUNNEL_WORKER_THREADS", "many", "ZTUNNEL_WORKER_THREADS"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "1x", "ZTUNNEL_RESOURCE_CPU_REQUEST"),
        ("XDS_ADDRESS", "http://plain:1", "XDS_ADDRESS"),
        ("CA_ADDRESS", "", "CA_ADDRESS is empty"),
        ("ISTIO_METAJSON_X", "{", "ISTIO_METAJSON_X is not JSON"),
        ("COMPLIANCE_POLICY", "fips", "'fips'"),
        ("LOG_FORMAT", "xml", "'xml'"),
    ] {
        let output = proxy(&[(variable, value)], &[]);
        assert!(!output.status.success(), "{variable}={value}");
        assert!(words(&output).contains(named), "{variable}={value}: {}", words(&output));
    }
}

#[test]
fn defaults_of_the_proxy_config_are_below_variables_and_variables_below_flags() {
    let config = ("PROXY_CONFIG", "discoveryAddress: 'http://from-the-config:1'");
    let variable = ("XDS_ADDRESS", "http://from-the-variable:1");
    let refused = |output: &Output| words(output).contains("XDS_ADDRESS");
    for (variables, arguments, expected) in [
        (&[config][..], &[][..], "from-the-config"),
        (&[config, variable], &[], "from-the-variable"),
        (&[config, variable], &["--xds-address", "http://from-the-flag:1"], "from-the-flag"),
    ] {
        let output = proxy(variables, arguments);
        assert!(refused(&output) && words(&output).contains(expected), "{}", words(&output));
    }
    let output = Command::new(env!("CARGO_BIN_EXE_culvert")).env_clear().env("PROXY_CONFIG", "- nothing").arg("version").output().unwrap();
    assert!(output.status.success(), "whoever is no proxy does not read it");
}

#[test]
fn the_help_names_the_variables() {
    let help = words(&proxy(&[], &["--help"]));
    for name in ["ISTIO_META_KEY", "ISTIO_METAJSON_KEY", "ISTIO_META_CLUSTER_ID", "PROXY_CONFIG", "./etc/istio/config/mesh", "NODE_NAME", "INPOD_UDS"]
    {
        assert!(help.contains(name), "{name}");
    }
}
