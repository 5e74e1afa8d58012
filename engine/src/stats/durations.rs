//! Histograms of durations, and their percentiles.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Counted;

/// Converts a duration to whole microseconds.
pub fn whole_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Converts a duration to whole milliseconds.
pub fn whole_millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A histogram of durations with a relative error of at most 1/16, from 1 ns to over an hour.
///
/// The scale is log-linear with 16 buckets per power of two, as in `HdrHistogram`, but the buckets
/// are atomics, so threads record without a lock.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    max: AtomicU64,
}

/// Number of buckets per power of two, as a power of two.
const STEPS_LOG2: u32 = 4;
/// Number of buckets. They cover the powers of two above the first 16 ns; 2^42 ns are 73 minutes.
const BUCKETS: usize = 16 * (42 - 4 + 2);

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Records one duration.
    pub(crate) fn record(&self, duration: Duration) {
        let nanos = nanos(duration);
        self.buckets[bucket(nanos)].fetch_add(1, Relaxed);
        self.sum.fetch_add(nanos, Relaxed);
        self.max.fetch_max(nanos, Relaxed);
    }
}

impl Counted for Histogram {
    type Value = Durations;

    fn load(&self) -> Durations {
        let counts = self.buckets.iter().enumerate();
        let counts = counts.map(|(i, count)| (upper(i), count.load(Relaxed)));
        let sum = Duration::from_nanos(self.sum.load(Relaxed));
        let max = Duration::from_nanos(self.max.load(Relaxed));
        Durations::new(counts.filter(|(_, count)| *count > 0).collect(), sum, max)
    }
}

/// Returns the bucket of a duration.
fn bucket(nanos: u64) -> usize {
    let power = nanos.max(1).ilog2();
    let index = if power < STEPS_LOG2 {
        nanos
    } else {
        let step = (nanos >> (power - STEPS_LOG2)) & 15;
        u64::from(power - STEPS_LOG2 + 1) * 16 + step
    };
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// Returns the longest duration of a bucket, in nanoseconds.
fn upper(bucket: usize) -> u64 {
    let (power, step) = (bucket as u64 / 16, bucket as u64 % 16);
    if power == 0 {
        step
    } else {
        ((16 + step + 1) << (power - 1)) - 1
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Returns the position of a percentile among `count` values in rising order, counted from 1.
///
/// The position is the nearest rank, so that a percentile is a value that occurred.
pub fn nearest_rank(count: u64, permille: u16) -> u64 {
    let rank = (u128::from(count) * u128::from(permille)).div_ceil(1000);
    u64::try_from(rank).unwrap_or(u64::MAX).max(1)
}

/// A distribution of durations. In JSON, durations are in microseconds with one decimal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Durations {
    /// Number of durations.
    pub count: u64,
    /// The median: half of the durations are at most this long.
    #[serde(with = "micros")]
    pub p50: Duration,
    /// The 90th percentile: 90 % of the durations are at most this long.
    #[serde(with = "micros")]
    pub p90: Duration,
    /// The 99th percentile: 99 % of the durations are at most this long.
    #[serde(with = "micros")]
    pub p99: Duration,
    /// The longest duration.
    #[serde(with = "micros")]
    pub max: Duration,
    /// The sum of all durations.
    #[serde(with = "micros")]
    pub sum: Duration,
    /// The non-empty buckets of the histogram in rising order: the longest duration that falls into
    /// the bucket, in nanoseconds, and the number of durations in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<(u64, u64)>,
}

impl Durations {
    /// Creates a distribution from buckets in rising order. The last bucket may end above the
    /// longest duration.
    pub fn new(buckets: Vec<(u64, u64)>, sum: Duration, max: Duration) -> Self {
        let count = buckets.iter().map(|(_, count)| count).sum();
        let percentile = |permille| {
            let rank = nearest_rank(count, permille);
            let mut seen = 0;
            let found = buckets.iter().find(|(_, count)| {
                seen += count;
                seen >= rank
            });
            found.map_or(Duration::ZERO, |(upper, _)| {
                Duration::from_nanos(*upper).min(max)
            })
        };
        Self {
            count,
            p50: percentile(500),
            p90: percentile(900),
            p99: percentile(990),
            max,
            sum,
            buckets,
        }
    }

    /// Returns the durations recorded after `earlier`. The maximum is known only up to the size of
    /// its bucket.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut buckets = Vec::new();
        let mut before = earlier.buckets.iter().peekable();
        for (upper, count) in &self.buckets {
            while before.next_if(|(other, _)| other < upper).is_some() {}
            let had = before.next_if(|(other, _)| other == upper);
            let new = count.saturating_sub(had.map_or(0, |(_, count)| *count));
            if new > 0 {
                buckets.push((*upper, new));
            }
        }
        let longest = buckets.last().map_or(0, |(upper, _)| *upper);
        let sum = self.sum.saturating_sub(earlier.sum);
        Self::new(buckets, sum, Duration::from_nanos(longest))
    }

    /// Drops the buckets, and keeps only the percentiles.
    pub fn drop_buckets(&mut self) {
        self.buckets = Vec::new();
    }
}

impl AddAssign<&Self> for Durations {
    /// Adds the durations of `other`. Both need their buckets.
    fn add_assign(&mut self, other: &Self) {
        let mut buckets = Vec::with_capacity(self.buckets.len().max(other.buckets.len()));
        let mut ours = self.buckets.iter().copied().peekable();
        let mut theirs = other.buckets.iter().copied().peekable();
        loop {
            let next = match (ours.peek(), theirs.peek()) {
                (None, None) => break,
                (Some((upper, _)), None) | (None, Some((upper, _))) => *upper,
                (Some((a, _)), Some((b, _))) => *a.min(b),
            };
            let mut count = 0;
            for side in [&mut ours, &mut theirs] {
                count += side.next_if(|(upper, _)| *upper == next).map_or(0, |b| b.1);
            }
            buckets.push((next, count));
        }
        let sum = self.sum.saturating_add(other.sum);
        *self = Self::new(buckets, sum, self.max.max(other.max));
    }
}

/// Durations in JSON: microseconds with one decimal.
mod micros {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64((time.as_secs_f64() * 1e7).round() / 10.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(from)? / 1e6).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distribution(buckets: &[(u64, u64)]) -> Durations {
        let max = buckets.last().map_or(0, |(upper, _)| *upper);
        let sum = buckets.iter().map(|(upper, count)| upper * count).sum();
        let nanos = Duration::from_nanos;
        Durations::new(buckets.to_vec(), nanos(sum), nanos(max))
    }

    /// Every duration lies in a bucket whose upper end exceeds it by at most a sixteenth.
    #[test]
    fn buckets_are_narrow() {
        for exponent in 0..41 {
            for offset in [0, 1, 3, 7] {
                let nanos = (1_u64 << exponent) + (1_u64 << exponent) / 8 * offset;
                let end = upper(bucket(nanos));
                assert!(end >= nanos && end <= nanos + nanos / 16, "{nanos}: {end}");
            }
        }
    }

    #[test]
    fn percentiles_of_a_hundred() {
        let histogram = Histogram::default();
        (1..=100).for_each(|us| histogram.record(Duration::from_micros(us)));
        let found = histogram.load();
        assert_eq!(found.count, 100);
        assert_eq!(found.sum, Duration::from_micros(5050));
        assert_eq!(found.max, Duration::from_micros(100));
        for (found, expected) in [(found.p50, 50), (found.p90, 90), (found.p99, 99)] {
            let exact = Duration::from_micros(expected);
            assert!(found >= exact && found <= exact + exact / 16, "{found:?}");
        }
    }

    #[test]
    fn percentiles_are_those_of_the_buckets() {
        let found = distribution(&[(1000, 50), (2000, 40), (3000, 9), (9000, 1)]);
        let micros = [found.p50, found.p90, found.p99, found.max].map(|time| time.as_micros());
        assert_eq!((found.count, micros), (100, [1, 2, 3, 9]));
        let none = Durations::new(Vec::new(), Duration::ZERO, Duration::ZERO);
        assert_eq!(none, Durations::default());
    }

    #[test]
    fn rank_of_a_percentile_is_rounded_up() {
        for (count, permille, rank) in [(0, 990, 1), (10, 0, 1), (10, 500, 5), (11, 500, 6)] {
            assert_eq!(nearest_rank(count, permille), rank);
        }
        assert_eq!(nearest_rank(1000, 999), 999);
        assert_eq!(nearest_rank(u64::MAX, 1000), u64::MAX);
    }

    #[test]
    fn percentiles_do_not_exceed_the_maximum() {
        let nanos = Duration::from_nanos;
        let found = Durations::new(vec![(1000, 1)], nanos(900), nanos(900));
        assert_eq!((found.p99, found.max), (nanos(900), nanos(900)));
    }

    #[test]
    fn since_returns_the_difference() {
        let before = distribution(&[(1000, 5), (4000, 1)]);
        let after = distribution(&[(1000, 5), (2000, 7), (4000, 3), (5000, 1)]);
        let new = after.since(&before);
        assert_eq!(new.buckets, [(2000, 7), (4000, 2), (5000, 1)]);
        let micros = [new.p50, new.p99].map(|time| time.as_micros());
        assert_eq!((new.count, micros), (10, [2, 5]));
        assert_eq!(after.since(&after).count, 0);
        // A new worker starts at 0.
        assert_eq!(before.since(&after).count, 0);
    }

    #[test]
    fn sum_has_the_durations_of_both() {
        let mut all = distribution(&[(1000, 5), (4000, 1)]);
        all += &distribution(&[(500, 1), (1000, 2), (9000, 3)]);
        assert_eq!(all.buckets, [(500, 1), (1000, 7), (4000, 1), (9000, 3)]);
        let micros = [all.max, all.p50, all.sum].map(|time| time.as_nanos());
        assert_eq!((all.count, micros), (12, [9000, 1000, 38_500]));

        // Histograms added up are the histogram of all durations.
        let [a, b, both] = std::array::from_fn(|_| Histogram::default());
        for us in 1..=100 {
            let time = Duration::from_micros(us);
            if us % 3 == 0 { &a } else { &b }.record(time);
            both.record(time);
        }
        let mut sum = a.load();
        sum += &b.load();
        assert_eq!(sum, both.load());
    }

    #[test]
    fn json_has_microseconds_with_one_decimal() {
        let found = distribution(&[(3_749, 2)]);
        let json = serde_json::to_value(&found).unwrap();
        let expected = serde_json::json!({
            "count": 2, "p50": 3.7, "p90": 3.7, "p99": 3.7, "max": 3.7, "sum": 7.5,
            "buckets": [[3749, 2]],
        });
        assert_eq!(json, expected);
        let read: Durations = serde_json::from_value(json).unwrap();
        assert_eq!(read.p50, Duration::from_nanos(3_700));
        assert_eq!(serde_json::to_value(&read).unwrap(), expected);
        let negative = serde_json::json!({
            "count": 1, "p50": -1.0, "p90": 0, "p99": 0, "max": 0, "sum": 0,
        });
        serde_json::from_value::<Durations>(negative).expect_err("a negative duration");
    }
}
