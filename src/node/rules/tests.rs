#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
#[test]
fn show() { println!("{}", script(&RulesConfig{dns_capture: true, rerouted_interfaces: vec!["tap0".into()], ..Default::default()}).unwrap()); let n = NetNs::create().unwrap(); install(&n, &RulesConfig{dns_capture: true, rerouted_interfaces: vec!["tap0".into()], ..Default::default()}).unwrap(); 
 install(&n, &RulesConfig::default()).unwrap();
 n.run(|| std::process::Command::new("nft").args(["list","ruleset"]).status()).unwrap().unwrap(); remove(&n).unwrap(); }
