//! The seam: the forwarding core takes the place of the stock `h2`, so nothing outside `hbone` may know what is underneath.

use std::fs;
use std::path::Path;

#[test]
fn no_http_type_leaves_the_room_of_tunnels() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![src.clone()];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path == src.join("hbone") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            // Pages over HTTP/1.1 and calls to control planes have nothing to do with tunnels.
            let other_http = ["admin", "grpc", "control"].iter().any(|room| path.starts_with(src.join(room)));
            let text = fs::read_to_string(&path).unwrap_or_default();
            for (number, line) in text.lines().enumerate() {
                // Every other part is outside quotes.
                let code: String = line.split("//").next().unwrap_or_default().split('"').step_by(2).collect();
                let words: Vec<&str> = code.split(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != ':').collect();
                let leaks = |crate_name: &str| words.iter().any(|word| word.starts_with(&format!("{crate_name}::")));
                assert!(!leaks("h2") && (other_http || !leaks("http")), "{}:{}: {line}", path.display(), number + 1);
            }
            seen += 1;
        }
    }
    assert!(seen > 50);
}

#[test]
fn no_http_type_is_in_what_the_room_shows() {
    let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/hbone");
    for entry in fs::read_dir(room).unwrap() {
        let path = entry.unwrap().path();
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let mut lines = text.lines().enumerate();
        while let Some((number, line)) = lines.next() {
            if !line.trim_start().starts_with("pub ") {
                continue;
            }
            // A signature may go over several lines.
            let mut signature = line.to_owned();
            while !signature.contains(['{', ';', ',']) || signature.matches('(').count() > signature.matches(')').count() {
                let Some((_, next)) = lines.next() else { break };
                signature.push_str(next);
            }
            assert!(!signature.contains("h2::") && !signature.contains("http::"), "{}:{}: {signature}", path.display(), number + 1);
        }
    }
}
