//! Medians, paired ratios and percentiles: the only arithmetic that a figure goes through.

use std::time::Duration;

/// A latency is kept in units of 100 ns: the longest is seven minutes.
const UNIT_NANOSECONDS: u128 = 100;

/// Every latency of a trial, so that percentiles are exact.
#[derive(Debug, Default)]
pub(super) struct Latencies(Vec<u32>);

impl Latencies {
    /// Adds one.
    pub(super) fn note(&mut self, latency: Duration) {
        self.0.push(u32::try_from(latency.as_nanos() / UNIT_NANOSECONDS).unwrap_or(u32::MAX));
    }

    /// Adds those of another connection.
    pub(super) fn extend(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// The smallest latency that at least `share` (0 to 1) of all do not exceed, in microseconds; 0 when there is none.
    pub(super) fn percentile(&mut self, share: f64) -> f64 {
        // Nearest rank. A share of a count is far below 2^52 and not negative.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let rank = (share * self.0.len() as f64).ceil() as usize;
        let index = rank.saturating_sub(1);
        if index >= self.0.len() {
            return 0.0;
        }
        let (_, found, _) = self.0.select_nth_unstable(index);
        f64::from(*found) / 10.0
    }
}

/// Median, smallest and largest.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` without values.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = if sorted.len() % 2 == 1 { upper } else { f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, upper) };
        Some(Self { median, min, max })
    }
}

/// The median of the ratios of values taken in the same round; `None` when rounds are missing or there is nothing to divide by.
pub(super) fn paired_ratio(values: &[f64], reference: &[f64]) -> Option<f64> {
    if values.len() != reference.len() || reference.iter().any(|value| *value <= 0.0) {
        return None;
    }
    let ratios: Vec<f64> = values.iter().zip(reference).map(|(value, reference)| value / reference).collect();
    Spread::of(&ratios).map(|spread| spread.median)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_precision_loss)]
    use super::*;

    /// The definition, word for word: the smallest value that at least this share of all do not exceed.
    fn slow_percentile(values: &[u32], share: f64) -> u32 {
        let enough = |limit: u32| values.iter().filter(|value| **value <= limit).count() as f64 >= share * values.len() as f64;
        *values.iter().filter(|value| enough(**value)).min().unwrap()
    }

    /// Half of all are not above it and half are not below it; between the two middle ones otherwise.
    fn slow_median(values: &[f64]) -> f64 {
        let half = values.len() as f64 / 2.0;
        let central = |limit: f64| {
            values.iter().filter(|value| **value <= limit).count() as f64 >= half
                && values.iter().filter(|value| **value >= limit).count() as f64 >= half
        };
        let (low, high) =
            values.iter().filter(|value| central(**value)).fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(*value), high.max(*value)));
        (low + high) / 2.0
    }

    proptest::proptest! {
        #[test]
        fn percentiles_are_those_of_the_definition(values in proptest::collection::vec(0_u32..2000, 1..300), per_mille in 1_u32..=1000) {
            let share = f64::from(per_mille) / 1000.0;
            let mut latencies = Latencies::default();
            let (first, second) = values.split_at(values.len() / 2);
            let mut other = Latencies::default();
            first.iter().for_each(|value| latencies.note(Duration::from_nanos(u64::from(*value) * 100)));
            second.iter().for_each(|value| other.note(Duration::from_nanos(u64::from(*value) * 100 + 99)));
            latencies.extend(other);
            proptest::prop_assert_eq!(latencies.count(), values.len() as u64);
            proptest::prop_assert_eq!(latencies.percentile(share), f64::from(slow_percentile(&values, share)) / 10.0);
        }

        #[test]
        fn a_median_has_half_of_all_on_either_side(values in proptest::collection::vec(-50_i32..50, 1..40)) {
            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            let spread = Spread::of(&values).unwrap();
            proptest::prop_assert_eq!(spread.median, slow_median(&values));
            proptest::prop_assert!(values.iter().all(|value| (spread.min..=spread.max).contains(value)));
            proptest::prop_assert!(values.contains(&spread.min) && values.contains(&spread.max));
        }

        #[test]
        fn a_ratio_is_of_the_same_round(pairs in proptest::collection::vec((1_u32..100, 1_u32..100), 1..20)) {
            let (values, reference): (Vec<f64>, Vec<f64>) = pairs.iter().map(|(a, b)| (f64::from(*a), f64::from(*b))).unzip();
            let ratios: Vec<f64> = pairs.iter().map(|(a, b)| f64::from(*a) / f64::from(*b)).collect();
            proptest::prop_assert_eq!(paired_ratio(&values, &reference).unwrap(), slow_median(&ratios));
        }
    }

    #[test]
    fn a_slow_machine_in_one_round_does_not_move_the_paired_ratio() {
        assert_eq!(paired_ratio(&[10.0, 20.0, 40.0], &[10.0, 20.0, 40.0]), Some(1.0));
        assert_eq!(paired_ratio(&[1.0, 2.0], &[1.0]), None);
        assert_eq!(paired_ratio(&[1.0], &[0.0]), None);
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Latencies::default().percentile(0.5), 0.0);
    }
}
