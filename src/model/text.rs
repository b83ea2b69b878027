//! Shared immutable text.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;

use arcstr::{ArcStr, Substr};
use serde::{Deserialize, Serialize};

/// A shared, immutable string: 8 bytes, cloned by a reference count; the empty one is no allocation. Rows that repeat the same words share one.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text(ArcStr);

/// A text that may be the end of another one and then shares its memory, as the name of a pod is the end of its uid: 16 bytes.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ending(Substr);

impl Text {
    /// The text as a plain string slice.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether somebody else has it too.
    pub(super) fn is_shared(&self) -> bool {
        ArcStr::strong_count(&self.0) != Some(1)
    }
}

impl Ending {
    /// The text as a plain string slice.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A text in the memory of one that ends with it, if that one does.
    #[must_use]
    pub fn of(whole: &Text, end: &str) -> Self {
        match whole.strip_suffix(end) {
            Some(before) => Self(whole.0.substr(before.len()..)),
            None => end.into(),
        }
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Text {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(ArcStr::from(text))
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(ArcStr::from(text))
    }
}

impl fmt::Display for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, formatter)
    }
}

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        &*self.0 == other
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        &*self.0 == *other
    }
}

impl Deref for Ending {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Ending {
    fn from(text: &str) -> Self {
        Self(Substr::from(text))
    }
}

impl From<String> for Ending {
    fn from(text: String) -> Self {
        Self(Substr::from(text))
    }
}

impl From<Text> for Ending {
    fn from(text: Text) -> Self {
        Self(Substr::from(text.0))
    }
}

impl From<&Ending> for Text {
    fn from(ending: &Ending) -> Self {
        Self::from(ending.as_str())
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), formatter)
    }
}

impl PartialEq<str> for Ending {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for Ending {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}
