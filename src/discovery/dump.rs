//! The mesh sections of the config dump (reference, dataplane §10.2).

use serde_json::{Value, json};

use super::World;
use super::form::Document;

/// `workloads` (by uid), `services` (by host name), `policies` (by key), `stagedServices` and an empty `staticConfig`, as a JSON
/// object. The first four can be loaded again as a static file; what a dump cannot show is the ports of endpoints that a service
/// leaves out for their health, for which the ports of the service are then taken.
#[must_use]
pub fn dump(world: &World) -> Value {
    sections(world, &Document::default())
}

/// [`dump`] with a `staticConfig` that says exactly what the world holds.
pub(super) fn with_static_config(world: &World) -> Value {
    sections(world, &Document::of(&world.snapshot, &world.policies))
}

fn sections(world: &World, fixed: &Document) -> Value {
    let mut sections = to_value(&Document::dumped(&world.snapshot, &world.policies));
    if let Value::Object(fields) = &mut sections {
        fields.entry("stagedServices").or_insert_with(|| json!({}));
        fields.insert("staticConfig".to_owned(), to_value(fixed));
    }
    sections
}

fn to_value(document: &Document) -> Value {
    // invariant: every map of a document has text or numbers as keys, the one thing that JSON asks for.
    serde_json::to_value(document).unwrap_or_default()
}
