//! Reading a document from YAML (of which JSON is a part), with the line and the field of whatever is wrong with it.

use std::cell::Cell;
use std::fmt;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_path_to_error::{Segment, Track};
use serde_saphyr::{Error, Location, Options, Spanned};

use super::{Document, Path, Refusal, Rows, Step};

/// Why a text is not a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Line, counted from 1; 0 if unknown.
    pub(crate) line: u64,
    /// Column, counted from 1; 0 if unknown.
    pub(crate) column: u64,
    /// Path of the field, such as `workloads[3].workloadIps[0]`; "document" for the whole.
    pub(crate) field: String,
    /// What was expected and what was found.
    pub(crate) reason: String,
}

/// Reads a document. An empty text is refused: it is more often a file that is being written than a mesh without pods.
pub(crate) fn read(text: &str) -> Result<Rows, Fault> {
    let mut path = Vec::new();
    let document = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        let mut track = Track::new();
        let document = Option::<Document>::deserialize(serde_path_to_error::Deserializer::new(deserializer, &mut track));
        if document.is_err() {
            path = steps(&track.path());
        }
        document
    });
    match document {
        Ok(Some(document)) => document.into_rows().map_err(|Refusal { path, reason }| fault(locate(text, &path), &path, reason)),
        Ok(None) => Err(fault(None, &[], "the file says nothing; write {} for an empty mesh".to_owned())),
        Err(error) => Err(explain(text, path, &error)),
    }
}

/// For lists that may be left out but not left empty: `policies:` and nothing after it is how a half-written file ends.
pub(super) fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Option::deserialize(deserializer)?.ok_or_else(|| de::Error::custom("expected a list, found nothing; write [] for an empty one"))
}

/// Limits against files that expand without end; far above a mesh of 100,000 workloads.
fn options() -> Options {
    serde_saphyr::options! {
        with_snippet: false,
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_events: 50_000_000,
            max_nodes: 25_000_000,
            max_total_scalar_bytes: 512 << 20,
        },
    }
}

fn fault(place: Option<Location>, path: &[Step], reason: String) -> Fault {
    let field = if path.is_empty() { "document".to_owned() } else { Path(path).to_string() };
    Fault { line: place.map_or(0, |place| place.line()), column: place.map_or(0, |place| place.column()), field, reason }
}

/// Puts the reader's error into the words of someone who writes the file.
fn explain(text: &str, mut path: Vec<Step>, error: &Error) -> Fault {
    let mut place = error.location();
    let reason = match error {
        Error::SerdeUnknownField { field, expected, .. } => format!("unknown field \"{field}\"; expected one of {}", expected.join(", ")),
        Error::SerdeUnknownVariant { variant, expected, .. } => format!("expected one of {}, found \"{variant}\"", expected.join(", ")),
        Error::SerdeMissingField { field, .. } => {
            place = locate(text, &path).or(place);
            format!("the field \"{field}\" is missing")
        }
        Error::SerdeInvalidType { unexpected, expected, .. } | Error::SerdeInvalidValue { unexpected, expected, .. } => {
            format!("expected {expected}, found {unexpected}")
        }
        Error::Unexpected { expected, .. } => match *expected {
            "string scalar" => "expected a single value".to_owned(),
            "sequence start" => "expected a list".to_owned(),
            "mapping start" => "expected a map".to_owned(),
            other => format!("expected {other}"),
        },
        Error::DuplicateMappingKey { key, .. } => {
            let key = key.as_deref().unwrap_or("?");
            path.push(Step::Key(key.to_owned()));
            format!("the key \"{key}\" appears twice")
        }
        Error::NullIntoString { .. } => "expected a value, found nothing; write \"\" for an empty text".to_owned(),
        Error::MultipleDocuments { .. } => "expected one YAML document, found a second one".to_owned(),
        Error::Message { msg, .. } | Error::ExternalMessage { msg, .. } => msg.clone(),
        other => {
            let said = other.to_string();
            said.split(" at line ").next().unwrap_or_default().to_owned()
        }
    };
    fault(place, &path, reason)
}

fn steps(path: &serde_path_to_error::Path) -> Vec<Step> {
    let step = |segment: &Segment| match segment {
        Segment::Seq { index } => Some(Step::Index(*index)),
        Segment::Map { key } => Some(Step::Key(key.clone())),
        Segment::Enum { variant } => Some(Step::Key(variant.clone())),
        Segment::Unknown => None,
    };
    path.iter().filter_map(step).collect()
}

/// Where the value at a path begins; of its nearest ancestor that exists, if it does not.
fn locate(text: &str, path: &[Step]) -> Option<Location> {
    let found = Cell::new(None);
    // The reader's own verdict does not matter here: what could be reached before it gave up is what is wanted.
    let _ =
        serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| Walk { path, found: &found }.deserialize(deserializer));
    found.get().or_else(|| path.split_last().and_then(|(_, parent)| locate(text, parent)))
}

/// Walks along a path and notes where it ends.
#[derive(Clone, Copy)]
struct Walk<'a> {
    path: &'a [Step],
    found: &'a Cell<Option<Location>>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.path.is_empty() {
            let value = Spanned::<IgnoredAny>::deserialize(deserializer)?;
            self.found.set(Some(value.referenced));
            return Ok(());
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value on the way to a field")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match self.path.split_first() {
                Some((Step::Key(wanted), path)) if *wanted == key => map.next_value_seed(Walk { path, ..self })?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut index = 0;
        loop {
            let more = match self.path.split_first() {
                Some((Step::Index(wanted), path)) if *wanted == index => seq.next_element_seed(Walk { path, ..self })?.is_some(),
                _ => seq.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                return Ok(());
            }
            index += 1;
        }
    }
}
