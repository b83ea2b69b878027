//! What a bench is asked to do; the front door writes it, the inside reads it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::figure::Figure;

/// A whole bench.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// What to measure, in this order.
    pub figures: Vec<Figure>,
    /// Who takes part, in this order.
    pub contestants: Vec<Contestant>,
    /// The contestant that ratios are to; `None`: the floor, else the first peer, else no proxy.
    pub reference: Option<String>,
    /// Length of a trial.
    pub trial: Duration,
    /// Trials of each contestant that count; one more is dropped.
    pub rounds: u32,
    /// Worker threads of each proxy (`ZTUNNEL_WORKER_THREADS`).
    pub workers: u32,
    /// Everything is pinned to one of two CPUs.
    pub pin: bool,
    /// Idle streams for the memory figure; the two other memory figures use at most a tenth.
    pub streams: usize,
    /// The built program of the floors (`benches/floor`); it is there when a floor takes part.
    pub floor: Option<PathBuf>,
    /// How long memory must stay the same to be believed.
    pub steady: Duration,
}

/// Who is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Contestant {
    /// As it is printed.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

/// What stands between client and server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Kind {
    /// Nothing.
    Direct,
    /// Two proxies of this program.
    Culvert,
    /// Two proxies of another one.
    Peer {
        /// On the client's side.
        client: Words,
        /// On the server's side.
        server: Words,
    },
    /// A program that does the least.
    Floor(Floor),
}

/// Which floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Floor {
    /// Splice, one hop.
    C1,
    /// Read and write, two hops.
    C2,
    /// The same with encryption in place.
    C3,
}

impl Floor {
    /// Its name, also on its own command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::C1 => "c1",
            Self::C2 => "c2",
            Self::C3 => "c3",
        }
    }
}

/// A command line in words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words {
    /// `NAME=VALUE` words before the program.
    pub env: BTreeMap<String, String>,
    /// Program and arguments.
    pub arguments: Vec<String>,
}

impl Words {
    /// Cuts a line as a shell would: at white space, but for quotes and backslashes. Nothing else is special.
    ///
    /// # Errors
    /// When a quote is not closed, or there is no program.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut words = Self::default();
        for word in split(line)? {
            match word.split_once('=').filter(|(name, _)| words.arguments.is_empty() && is_variable(name)) {
                Some((name, value)) => drop(words.env.insert(name.to_owned(), value.to_owned())),
                None => words.arguments.push(word),
            }
        }
        if words.arguments.is_empty() { Err(format!("{line:?} names no program")) } else { Ok(words) }
    }
}

impl std::fmt::Display for Words {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let env = self.env.iter().map(|(name, value)| format!("{name}={value}"));
        let words: Vec<String> = env.chain(self.arguments.iter().cloned()).collect();
        to.write_str(&words.join(" "))
    }
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && !name.starts_with(|first: char| first.is_ascii_digit())
}

fn split(line: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word) = (Vec::new(), None::<String>);
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match letters.next().ok_or_else(|| format!("{line:?}: a quote is not closed"))? {
                        closing if closing == letter => break,
                        '\\' if letter == '"' => word.extend(letters.next()),
                        inside => word.push(inside),
                    }
                }
            }
            '\\' => word.get_or_insert_default().extend(letters.next()),
            space if space.is_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_line_is_cut_as_a_shell_cuts_it() {
        let words = Words::parse(r#"A=1 B="x y" /bin/some\ one proxy 'a  "b"' "c\"d" e=f"" "#).unwrap();
        assert_eq!(words.arguments, ["/bin/some one", "proxy", "a  \"b\"", "c\"d", "e=f"]);
        assert_eq!(words.env.into_iter().collect::<Vec<_>>(), [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "x y".to_owned())]);
        assert_eq!(Words::parse("''").unwrap().arguments, [""]);
        assert_eq!(Words::parse("1A=b").unwrap().arguments, ["1A=b"]);
    }

    #[test]
    fn a_line_without_a_program_or_an_end_is_refused() {
        assert!(Words::parse("  ").unwrap_err().contains("no program"));
        assert!(Words::parse("A=1").unwrap_err().contains("no program"));
        assert!(Words::parse("proxy 'x").unwrap_err().contains("not closed"));
    }
}
