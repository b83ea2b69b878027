#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::time::Duration;

use serde_json::Value;

use super::*;
use crate::lab::bench::options::{Contestant, Floor, Words};

const BULK: Figure = Figure::Bulk { streams: 1, up: true };

/// A run of four contestants, with one figure whole, and one that failed and does not apply.
fn report() -> Report {
    let words = Words::parse("/bin/peer proxy").unwrap();
    let kinds = [
        ("none", Kind::Direct),
        ("culvert", Kind::Culvert),
        ("<&\"peer\">|x", Kind::Peer { client: words.clone(), server: words }),
        ("c3", Kind::Floor(Floor::C3)),
    ];
    let contestants: Vec<Contestant> = kinds.into_iter().map(|(name, kind)| Contestant { name: name.to_owned(), kind }).collect();
    let options = Options {
        figures: vec![BULK, Figure::MemoryStreams],
        contestants: contestants.clone(),
        reference: None,
        trial: Duration::from_secs(3),
        rounds: 3,
        workers: 1,
        pin: false,
        streams: 100,
        floor: None,
        steady: Duration::from_secs(1),
    };
    let speeds = [[40.0, 44.0, 20.0], [10.0, 11.0, 5.0], [5.0, 6.0, 2.0], [20.0, 22.0, 10.0]];
    let bulk = contestants.iter().zip(speeds).map(|(contestant, speeds)| {
        let mut values = BTreeMap::from([(Quantity::GbitPerSecond, speeds.to_vec())]);
        if contestant.name != "none" {
            values.insert(Quantity::CpuSecondsPerGb, speeds.iter().map(|speed| 8.0 / speed).collect());
        }
        Taken { contestant: contestant.name.clone(), values, ..Taken::default() }
    });
    let memory = contestants.iter().map(|contestant| {
        let missing = match contestant.kind {
            Kind::Direct => Missing::DoesNotApply("there is no proxy".to_owned()),
            _ => Missing::Failed("it ended\nand said why".to_owned()),
        };
        Taken { contestant: contestant.name.clone(), missing: Some(missing), stolen_percent: 7.5, ..Taken::default() }
    });
    let outcomes = vec![Outcome { figure: BULK, taken: bulk.collect() }, Outcome { figure: Figure::MemoryStreams, taken: memory.collect() }];
    let machine = Machine { cpu: "A <CPU>".to_owned(), cpus: 2, memory: 2 << 30, kernel: "6.18".to_owned(), congestion_control: "reno".to_owned() };
    Report { machine, date: "2026-11-21T05:00:00Z".to_owned(), options, outcomes }
}

/// The names of all elements, when they open and close as they should, attributes are quoted and there is one root.
fn elements(svg: &str) -> Vec<String> {
    let (mut open, mut seen, mut rest): (Vec<String>, Vec<String>, &str) = (Vec::new(), Vec::new(), svg);
    while let Some(start) = rest.find('<') {
        let text = &rest[..start];
        assert!(!text.contains('>'), "a bare '>' in {text:?}");
        let mut entities = text.split('&').skip(1);
        assert!(entities.all(|entity| ["amp;", "lt;", "gt;", "quot;"].iter().any(|name| entity.starts_with(name))), "a bare '&' in {text:?}");
        assert!(!open.is_empty() || text.trim().is_empty(), "text outside of the root: {text:?}");
        let end = start + rest[start..].find('>').expect("a tag that does not end");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let name = tag.split_whitespace().next().unwrap().to_owned();
        assert!(!open.is_empty() || seen.is_empty(), "a second root {name}");
        let quotes = tag.matches('"').count();
        assert!(quotes % 2 == 0 && quotes / 2 == tag.matches('=').count(), "attributes of {tag:?}");
        seen.push(name.clone());
        if !closed {
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} stay open");
    seen
}

#[test]
fn the_chart_is_well_formed_and_has_a_bar_for_every_value() {
    let report = report();
    let found = elements(&report.svg());
    assert_eq!(found.iter().filter(|name| *name == "rect").count(), 3);
    assert_eq!(found[0], "svg");
    let empty = Report { outcomes: Vec::new(), ..report };
    elements(&empty.svg());
}

#[test]
#[should_panic(expected = "does not end")]
fn the_judge_of_charts_sees_a_broken_one() {
    elements("<svg><rect");
}

#[test]
fn a_table_shows_median_range_and_ratio_and_every_reason() {
    let report = report();
    let text = report.text();
    assert!(text.contains("×") && text.contains("none: does not") || text.contains("not of none: there is no proxy"), "{text}");
    let line = text.lines().find(|line| line.starts_with("  culvert ")).unwrap();
    assert!(line.contains("10.0 [5.00..11.0] ×0.50") && line.contains("0.800 [0.727..1.60] ×2.00"), "{line}");
    let own = text.lines().find(|line| line.starts_with("  c3 ")).unwrap();
    assert!(own.contains("20.0 [10.0..22.0]") && !own.contains('×'), "{own}");
    assert!(text.contains("culvert: NOT TAKEN: it ended\nand said why"), "{text}");
    assert!(text.contains("took up to 7.5 %") && text.contains("cubic is not allowed"), "{text}");
    assert!(report.is_incomplete());
}

#[test]
fn a_row_for_a_readme_has_one_cell_for_each_contestant() {
    let text = report().markdown();
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 4, "{text}");
    for row in &rows {
        let cells = row.replace("\\|", "").matches('|').count();
        assert_eq!(cells, 7, "{row}");
    }
    assert!(rows[2].contains("| 10.0 (×0.50) |") && rows[3].contains("| – | 0.800 (×2.00) |"), "{text}");
    assert!(text.contains("Not taken: memory-streams of culvert: it ended\n"), "{text}");
}

#[test]
fn json_has_every_round_and_says_why_a_value_is_missing() {
    let json = report().json();
    let results = &json["figures"][0]["results"];
    assert_eq!(results[1]["contestant"], "culvert");
    assert_eq!(results[1]["values"]["gbitPerSecond"]["values"], serde_json::json!([10.0, 11.0, 5.0]));
    assert_eq!(results[1]["values"]["cpuSecondsPerGb"]["ratio"], 2.0);
    assert_eq!(results[3]["values"]["gbitPerSecond"]["ratio"], Value::Null);
    assert_eq!(json["figures"][0]["reference"], "c3");
    assert_eq!(json["figures"][1]["results"][0]["doesNotApply"], "there is no proxy");
    assert!(json["figures"][1]["results"][1]["notTaken"].as_str().unwrap().starts_with("it ended"));
}

#[test]
fn ratios_are_to_the_floor_then_the_peer_then_no_proxy_or_to_whom_was_asked() {
    let mut report = report();
    assert_eq!(report.reference(BULK), Some("c3"));
    // C3 has two hops: passthrough is compared with the peer.
    assert_eq!(report.reference(Figure::PassthroughRequests), Some("<&\"peer\">|x"));
    report.options.contestants.truncate(2);
    assert_eq!(report.reference(BULK), Some("none"));
    assert_eq!(report.reference(Figure::MemoryStreams), Some("culvert"));
    report.options.reference = Some("none".to_owned());
    assert_eq!(report.reference(Figure::MemoryStreams), None);
}

#[test]
fn numbers_have_three_digits_that_count() {
    let shown: Vec<String> = [0.0, 0.012_34, 0.123_45, 0.999_9, 1.234_5, 9.996, 12.345, 99.96, 123.4, 999.6, 1_234_567.0, -1234.0].map(number).into();
    assert_eq!(shown, ["0", "0.0123", "0.123", "1.00", "1.23", "10.0", "12.3", "100", "123", "1,000", "1,234,567", "-1,234"]);
}
