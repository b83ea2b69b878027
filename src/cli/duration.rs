//! Durations as the reference's environment writes them: `10s`, `1m30s`, `250ms`; a bare number is seconds (reference, dataplane §10.1).

use std::time::Duration;

pub(super) fn parse(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}: expected something like 10s, 1m30s, 250ms, or a number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_number_is_seconds_and_compounds_add_up() {
        assert_eq!(parse("7"), Ok(Duration::from_secs(7)));
        assert_eq!(parse("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("250ms"), Ok(Duration::from_millis(250)));
        assert!(parse("soon").is_err());
    }
}
