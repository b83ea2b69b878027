//! Replays the corpora of the fuzz targets, and tries each target on inputs near them: with bits flipped, octets cut out, and one joined to
//! another. What libFuzzer finds belongs into the corpus of its target.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

#[allow(clippy::redundant_pub_crate, unreachable_pub)]
#[path = "fuzz/src/lib.rs"]
mod targets;

/// Enough to find what a change has broken; libFuzzer is for the rest. `FUZZ_SECONDS` makes it longer.
const NEAR: u32 = 20_000;

fn replay(target: &str, body: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut seeds = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let seed = fs::read(&path).unwrap();
        assert!(seed.len() <= 64 << 10, "{} is too large to keep", path.display());
        let outcome = std::panic::catch_unwind(|| body(&seed));
        assert!(outcome.is_ok(), "{}", path.display());
        seeds.push(seed);
    }
    assert!(seeds.len() >= 8, "{target}: only {} seeds", seeds.len());
    seeds.sort();
    let longer = std::env::var("FUZZ_SECONDS").ok().map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
    let mut random = SmallRng::seed_from_u64(if longer.is_some() { rand::random() } else { 1 });
    let since = Instant::now();
    let mut tried = 0;
    while longer.map_or(tried < NEAR, |longer| since.elapsed() < longer) {
        let mut input = seeds[random.random_range(0..seeds.len())].clone();
        for _ in 0..random.random_range(1..6) {
            change(&mut input, &seeds, &mut random);
        }
        let outcome = std::panic::catch_unwind(|| body(&input));
        assert!(outcome.is_ok(), "{target}: {input:02x?}");
        tried += 1;
    }
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut SmallRng) {
    let at = random.random_range(0..=input.len());
    match random.random_range(0..6) {
        0 => input.insert(at, random.random()),
        1 => drop(input.drain(at..input.len().min(at + random.random_range(1..9)))),
        2 => input.truncate(at),
        3 => {
            let other = &seeds[random.random_range(0..seeds.len())];
            input.truncate(at);
            input.extend(&other[random.random_range(0..=other.len())..]);
        }
        4 => {
            // Values at which something changes.
            let octet = [0, 1, 0x1f, 0x20, 0x3f, 0x40, 0x7e, 0x7f, 0x80, 0xfe, 0xff][random.random_range(0..11)];
            input.iter_mut().skip(at).take(1).for_each(|place| *place = octet);
        }
        _ => input.iter_mut().skip(at).take(1).for_each(|place| *place ^= 1 << random.random_range(0..8)),
    }
    input.truncate(4096);
}

#[test]
fn records() {
    replay("record", targets::record);
}

#[test]
fn frames() {
    replay("frames", targets::frames);
}

#[test]
fn hpack() {
    replay("hpack", targets::hpack);
}
