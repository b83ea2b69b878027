//! The house stays as its map says: rooms use only rooms above them, files stay small, `unsafe` and the environment have one place each, and
//! nothing outside tests panics without saying why it cannot.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Which rooms a room may use, besides itself; in the order of `src/lib.rs`.
const MAY_USE: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("policy", &["model"]),
    ("wire", &[]),
    ("lifecycle", &[]),
    ("telemetry", &["model"]),
    ("sys", &[]),
    ("forward", &["sys", "lifecycle", "telemetry"]),
    ("grpc", &["sys"]),
    ("identity", &["model", "wire", "lifecycle", "telemetry", "grpc"]),
    ("discovery", &["model", "policy", "wire", "lifecycle", "telemetry", "grpc"]),
    ("hbone", &["model", "identity", "forward", "sys", "lifecycle", "telemetry"]),
    ("pods", &["model", "wire", "sys", "lifecycle", "telemetry"]),
    ("proxy", &["model", "policy", "wire", "lifecycle", "telemetry", "sys", "forward", "identity", "discovery", "hbone", "pods"]),
    ("node", &["model", "wire", "sys", "lifecycle", "telemetry"]),
    ("control", &["model", "policy", "wire", "identity", "discovery", "lifecycle", "telemetry"]),
    ("admin", &["model", "lifecycle", "telemetry"]),
    ("lab", &["*"]),
    ("cli", &["*"]),
];
const MAX_LINES: usize = 500;

struct Source {
    path: PathBuf,
    room: String,
    /// Lines before the inline tests.
    code: Vec<String>,
}

/// Every source file that is not only tests, cut where its inline tests begin.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(&root).unwrap().to_path_buf();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !relative.components().any(|part| part.as_os_str() == "tests") {
                if relative.file_name().is_some_and(|name| name == "tests.rs") {
                    continue;
                }
                let text = fs::read_to_string(&path).unwrap();
                let code = text.lines().take_while(|line| line.trim() != "#[cfg(test)]").map(str::to_owned).collect();
                let room = relative.components().next().unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
                found.push(Source { path: relative, room, code });
            }
        }
    }
    assert!(found.len() > 50, "only {} files found", found.len());
    found
}

/// Code without strings and comments, so that words in them do not count.
fn bare(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line.split("//").next().unwrap_or_default().chars();
    let mut quoted = false;
    while let Some(letter) = rest.next() {
        match letter {
            '\\' if quoted => drop(rest.next()),
            '"' => quoted = !quoted,
            _ if !quoted => out.push(letter),
            _ => {}
        }
    }
    out
}

/// Rooms named in `crate::room` and `crate::{room, …}`.
fn rooms_named(code: &str) -> Vec<String> {
    let mut named = Vec::new();
    for (position, _) in code.match_indices("crate::") {
        let rest = &code[position + "crate::".len()..];
        if code[..position].ends_with('$') {
            continue;
        }
        let word = |text: &str| text.chars().take_while(|letter| letter.is_ascii_alphanumeric() || *letter == '_').collect::<String>();
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut item = String::new();
            for letter in list.chars() {
                match letter {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => named.push(word(std::mem::take(&mut item).trim())),
                    _ if depth == 0 => item.push(letter),
                    _ => {}
                }
            }
            named.push(word(item.trim()));
        } else {
            named.push(word(rest));
        }
    }
    named.retain(|name| !name.is_empty());
    named
}

#[test]
fn a_room_uses_only_rooms_above_it() {
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.room != "lib" && source.room != "main") {
        let list = allowed.get(source.room.as_str()).unwrap_or_else(|| panic!("{} is in no room of the map", source.path.display()));
        let code: Vec<String> = source.code.iter().map(|line| bare(line)).collect();
        for (number, room) in code.iter().enumerate().flat_map(|(index, line)| rooms_named(line).into_iter().map(move |room| (index + 1, room))) {
            if allowed.contains_key(room.as_str()) && room != source.room && !list.contains(&"*") && !list.contains(&room.as_str()) {
                wrong.push(format!("{}:{number} uses {room}; {} may use {list:?}", source.path.display(), source.room));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_map_in_lib_rs_is_in_the_order_of_the_table() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let listed: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let expected: Vec<&str> = MAY_USE.iter().map(|(room, _)| *room).collect();
    assert_eq!(listed, expected);
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let long: Vec<String> = sources()
        .iter()
        .filter(|source| source.code.len() > MAX_LINES)
        .map(|source| format!("{}: {} lines", source.path.display(), source.code.len()))
        .collect();
    assert!(long.is_empty(), "over {MAX_LINES} lines before tests:\n{}", long.join("\n"));
}

#[test]
fn unsafe_code_is_only_in_sys() {
    for source in sources().iter().filter(|source| source.room != "sys") {
        for (index, line) in source.code.iter().enumerate() {
            let code = bare(line);
            let named = code.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(|word| word == "unsafe");
            assert!(!named, "{}:{}", source.path.display(), index + 1);
        }
    }
}

#[test]
fn only_the_front_door_reads_the_environment() {
    for source in sources().iter().filter(|source| source.room != "cli") {
        for (index, line) in source.code.iter().enumerate() {
            let code = bare(line);
            assert!(!code.contains("env::var") && !code.contains("env::args"), "{}:{}", source.path.display(), index + 1);
        }
    }
}

#[test]
fn nothing_outside_tests_panics_without_an_invariant() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (index, line) in source.code.iter().enumerate() {
            let code = bare(line);
            let panics = [".unwrap()", ".expect(", "panic!(", "unreachable!(", "todo!(", "unimplemented!("].iter().any(|word| code.contains(word));
            let said = line.contains("// invariant:") || index.checked_sub(1).is_some_and(|above| source.code[above].contains("// invariant:"));
            if panics && !said {
                wrong.push(format!("{}:{}: {}", source.path.display(), index + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_room_says_what_it_is_for() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (room, _) in MAY_USE {
        let text = fs::read_to_string(root.join(room).join("mod.rs")).unwrap();
        let doc = text.lines().take_while(|line| line.starts_with("//!")).collect::<Vec<_>>().join("\n");
        assert!(doc.matches('.').count() >= 2 && doc.len() > 120, "src/{room}/mod.rs begins with no account of the room");
    }
}

#[test]
fn every_dependency_has_its_reason() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let mut in_dependencies = false;
    for line in text.lines() {
        if line.starts_with('[') {
            in_dependencies = line == "[dependencies]" || line == "[dev-dependencies]";
        } else if in_dependencies && line.contains(" = ") {
            assert!(line.contains(" # "), "no reason: {line}");
        }
    }
}

/// The text of a file below `tests`, or after `unit` of a module of `src` with its tests.
fn text_of(place: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = match place.strip_prefix("unit ") {
        None => vec![root.join(format!("{place}.rs"))],
        Some(module) => {
            let module = root.join("src").join(module.trim_end_matches("::tests").replace("::", "/"));
            let parts = fs::read_dir(module.join("tests")).into_iter().flatten().map(|entry| entry.unwrap().path());
            [module.with_extension("rs"), module.join("mod.rs"), module.join("tests.rs")].into_iter().chain(parts).collect()
        }
    };
    files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect()
}

/// A text without what is in parentheses.
fn without_remarks(text: &str) -> String {
    let mut depth = 0;
    let mut bare = String::new();
    for letter in text.chars() {
        depth += i32::from(letter == '(');
        if depth == 0 {
            bare.push(letter);
        }
        depth -= i32::from(letter == ')');
    }
    bare
}

#[test]
fn the_tests_that_coverage_names_exist() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/COVERAGE.md")).unwrap();
    let (mut wrong, mut found) = (Vec::new(), 0);
    let mut sources = BTreeMap::new();
    for (index, row) in text.lines().enumerate().filter(|(_, line)| line.starts_with("| ") && *line != "| Row | Tests |") {
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap_or_default();
        if tests.starts_with("None: ") {
            continue;
        }
        for part in without_remarks(tests).split("; ") {
            let Some((place, names)) = part.split_once(": ") else {
                wrong.push(format!("line {}: neither `place: name, name` nor `None: reason`: {part}", index + 1));
                continue;
            };
            let source = sources.entry(place.to_owned()).or_insert_with(|| text_of(place));
            for name in names.split(", ").map(str::trim) {
                if source.contains(&format!("fn {name}(")) {
                    found += 1;
                } else {
                    wrong.push(format!("line {}: no test {name} in {place}", index + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(found > 500, "only {found} tests found");
}

#[test]
fn the_finder_of_rooms_finds_them() {
    assert_eq!(rooms_named("use crate::model::{Text, Service};"), ["model"]);
    assert_eq!(rooms_named("use crate::{model::Text, policy};"), ["model", "policy"]);
    assert_eq!(rooms_named("let x = crate::sys::netns::NetNs::current();"), ["sys"]);
    assert_eq!(bare(r#"let x = "crate::model"; // crate::policy"#), "let x = ; ");
}
