//! Medians with their spread, and percentiles.

use serde::{Deserialize, Serialize};
use snaprestore_engine::stats::nearest_rank;

/// Median and range of some samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Number of samples.
    pub count: usize,
    /// The smallest.
    pub min: f64,
    /// A quarter of the samples is below.
    pub q1: f64,
    /// Half of the samples is below.
    pub median: f64,
    /// Three quarters of the samples are below.
    pub q3: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Returns the spread of `samples`, or none if there are none.
    pub fn from_samples(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        Some(Self {
            count: sorted.len(),
            min: *sorted.first()?,
            q1: at(&sorted, 0.25),
            median: at(&sorted, 0.5),
            q3: at(&sorted, 0.75),
            max: *sorted.last()?,
        })
    }
}

/// Returns the value below which `part` of the sorted values lie, interpolated linearly between two
/// of them: the few rounds of a benchmark are samples, and not all values of a distribution, whose
/// percentiles [`Latencies`] has.
fn at(sorted: &[f64], part: f64) -> f64 {
    let place = part * float(sorted.len().saturating_sub(1) as u64);
    let low = index(place.floor());
    let high = (low + 1).min(sorted.len() - 1);
    let (low_value, high_value) = (sorted[low], sorted[high]);
    low_value + (high_value - low_value) * (place - place.floor())
}

/// Durations in microseconds, by percentile.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// Number of durations.
    pub count: u64,
    /// Half of the durations are at most this.
    pub p50: f64,
    /// Nine in ten are at most this.
    pub p90: f64,
    /// 99 in a hundred are at most this.
    pub p99: f64,
    /// 999 in a thousand are at most this.
    pub p999: f64,
    /// The longest.
    pub max: f64,
    /// Percentiles 0 to 100, for charts.
    pub curve: Vec<f64>,
}

impl Latencies {
    /// Returns the percentiles of durations in nanoseconds.
    pub fn from_nanos(mut nanos: Vec<u64>) -> Option<Self> {
        nanos.sort_unstable();
        let count = nanos.len() as u64;
        let micros = |permille: u16| {
            let rank = usize::try_from(nearest_rank(count, permille)).ok()?;
            nanos.get(rank - 1).map(|nanos| float(*nanos) / 1e3)
        };
        Some(Self {
            count,
            p50: micros(500)?,
            p90: micros(900)?,
            p99: micros(990)?,
            p999: micros(999)?,
            max: micros(1000)?,
            curve: (0..=100)
                .filter_map(|percent| micros(percent * 10))
                .collect(),
        })
    }
}

/// Converts a count, or a number of bytes or nanoseconds, to a floating-point number. Below 2^53 it
/// is exact.
#[expect(
    clippy::cast_precision_loss,
    reason = "what is measured is far below 2^53"
)]
pub fn float(number: u64) -> f64 {
    number as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a place in a vector, computed from its length"
)]
fn index(place: f64) -> usize {
    place as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn empty_samples_have_no_spread() {
        assert_eq!(Spread::from_samples([]), None);
        assert_eq!(Latencies::from_nanos(Vec::new()), None);
    }

    #[test]
    fn single_sample_is_the_whole_spread() {
        let spread = Spread::from_samples([7.0]).unwrap();
        assert!(
            [spread.min, spread.q1, spread.median, spread.q3, spread.max]
                .iter()
                .all(|value| near(*value, 7.0))
        );
        assert_eq!(spread.count, 1);
    }

    #[test]
    fn sample_order_does_not_matter() {
        let spread = Spread::from_samples([4.0, 1.0, 3.0, 2.0]).unwrap();
        assert!(near(spread.median, 2.5) && near(spread.q1, 1.75) && near(spread.q3, 3.25));
        assert!(near(spread.min, 1.0) && near(spread.max, 4.0));
    }

    #[test]
    fn percentiles_are_measured_durations() {
        let latencies =
            Latencies::from_nanos((1..=1000).map(|us| us * 1000).rev().collect()).unwrap();
        assert!(near(latencies.p50, 500.0) && near(latencies.p99, 990.0));
        assert!(near(latencies.p999, 999.0) && near(latencies.max, 1000.0));
        assert_eq!(latencies.curve.len(), 101);
        assert!(near(latencies.curve[0], 1.0) && near(latencies.curve[100], 1000.0));
    }
}
