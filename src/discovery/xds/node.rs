//! Who we say we are (reference, dataplane §5.4).

use serde_json::Value as Json;

use crate::wire::google::{Kind, ListValue, Struct, Value};
use crate::wire::xds::Node;

/// The parts of our name, and what else the control plane may want to know.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Address of the proxy's own pod (`INSTANCE_IP`); a made-up one if it is empty, because istiod wants one.
    pub ip: String,
    /// Name of the proxy's own pod (`POD_NAME`).
    pub pod: String,
    /// Its namespace (`POD_NAMESPACE`); istiod holds the token against it.
    pub namespace: String,
    /// The node (`NODE_NAME`); istiod pushes the workloads of this node even to a client that asks on demand.
    pub node: String,
    /// Further members of the metadata, such as `CLUSTER_ID`; a later one takes the place of an earlier one.
    pub metadata: Vec<(String, Json)>,
}

impl Identity {
    /// As it goes into the first request of a type.
    #[must_use]
    pub fn node(&self) -> Node {
        let Self { ip, pod, namespace, node, metadata } = self;
        let ip = if ip.is_empty() { "1.1.1.1" } else { ip };
        let own = [("NAME", pod.as_str()), ("NAMESPACE", namespace), ("INSTANCE_IPS", ip), ("NODE_NAME", node)];
        let mut members: Struct = own.into_iter().collect();
        members.fields.extend(metadata.iter().map(|(name, value)| (name.clone(), value_of(value))));
        Node { id: format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"), cluster: String::new(), metadata: Some(members) }
    }
}

fn value_of(json: &Json) -> Value {
    let kind = match json {
        Json::Null => Kind::Null(0),
        Json::Bool(flag) => Kind::Bool(*flag),
        // Numbers of this message are floating-point; larger integers lose digits, as they do everywhere in JSON.
        Json::Number(number) => Kind::Number(number.as_f64().unwrap_or(0.0)),
        Json::String(text) => Kind::Text(text.clone()),
        Json::Array(values) => Kind::List(ListValue { values: values.iter().map(value_of).collect() }),
        Json::Object(members) => Kind::Struct(Struct { fields: members.iter().map(|(name, value)| (name.clone(), value_of(value))).collect() }),
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_node_has_the_four_parts_and_the_metadata_that_istiod_reads() {
        let identity = Identity {
            ip: "10.0.0.1".into(),
            pod: "ztunnel-x".into(),
            namespace: "istio-system".into(),
            node: "n1".into(),
            metadata: vec![("CLUSTER_ID".into(), "Kubernetes".into()), ("NODE_NAME".into(), "n2".into())],
        };
        let node = identity.node();
        assert_eq!(node.id, "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local");
        let members = node.metadata.unwrap();
        let text = |name| members.text(name);
        assert_eq!((text("NAME"), text("NAMESPACE"), text("INSTANCE_IPS")), (Some("ztunnel-x"), Some("istio-system"), Some("10.0.0.1")));
        assert_eq!((text("CLUSTER_ID"), text("NODE_NAME")), (Some("Kubernetes"), Some("n2")), "what is set by hand wins");
    }

    #[test]
    fn a_node_without_an_address_has_one_all_the_same() {
        assert_eq!(Identity::default().node().id, "ztunnel~1.1.1.1~.~.svc.cluster.local");
    }

    #[test]
    fn every_kind_of_json_becomes_its_value() {
        let json = serde_json::json!({"a": null, "b": true, "c": 1.5, "d": "x", "e": [1], "f": {"g": "h"}});
        let Some(Kind::Struct(members)) = value_of(&json).kind else { panic!("not an object") };
        let kind = |name: &str| members.fields[name].kind.clone().unwrap();
        assert_eq!((kind("a"), kind("b"), kind("c"), kind("d")), (Kind::Null(0), Kind::Bool(true), Kind::Number(1.5), Kind::Text("x".into())));
        assert_eq!(kind("e"), Kind::List(ListValue { values: vec![Value { kind: Some(Kind::Number(1.0)) }] }));
        assert_eq!(kind("f"), Kind::Struct([("g", "h")].into_iter().collect()));
    }
}
