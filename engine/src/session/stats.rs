//! What a session counts: relaxed atomics, read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A histogram of durations with a relative error of at most 1/16, from 1 ns to over an hour.
///
/// Log-linear: 16 buckets for each power of two, as `HdrHistogram` does it, but of atomics, so that
/// threads record without a lock.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

/// Buckets for each power of two, as a power of two.
const STEPS_LOG2: u32 = 4;
/// Powers of two covered above the first 16 ns: 2^42 ns are 73 minutes.
const BUCKETS: usize = 16 * (42 - 4 + 2);

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            max: AtomicU64::new(0),
        }
    }
}

/// Percentiles of a [`Histogram`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percentiles {
    /// Durations recorded.
    pub count: u64,
    /// Half are at most this.
    pub p50: Duration,
    /// 90 % are at most this.
    pub p90: Duration,
    /// 99 % are at most this.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

impl Histogram {
    /// Adds one duration.
    pub fn record(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)].fetch_add(1, Relaxed);
        self.max.fetch_max(nanos, Relaxed);
    }

    /// The percentiles of what was recorded so far.
    pub fn percentiles(&self) -> Percentiles {
        let counts: Vec<u64> = self.buckets.iter().map(|n| n.load(Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max = self.max.load(Relaxed);
        let at = |hundredths: u64| {
            let rank = (count * hundredths).div_ceil(100).max(1);
            let mut seen = 0;
            let found = counts.iter().position(|n| {
                seen += n;
                seen >= rank
            });
            Duration::from_nanos(found.map_or(0, upper).min(max))
        };
        Percentiles {
            count,
            p50: at(50),
            p90: at(90),
            p99: at(99),
            max: Duration::from_nanos(max),
        }
    }
}

/// The bucket of a duration.
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

/// The longest duration of a bucket, in nanoseconds.
fn upper(bucket: usize) -> u64 {
    let (power, step) = (bucket as u64 / 16, bucket as u64 % 16);
    if power == 0 {
        step
    } else {
        ((16 + step + 1) << (power - 1)) - 1
    }
}

/// Pages installed, by what they were, for one reason.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    pub(crate) copied: AtomicU64,
    pub(crate) filled: AtomicU64,
    pub(crate) zeroed: AtomicU64,
}

impl Pages {
    /// All of them.
    pub(crate) fn total(&self) -> u64 {
        [&self.copied, &self.filled, &self.zeroed]
            .iter()
            .map(|counter| counter.load(Relaxed))
            .sum()
    }
}

/// The counters of a session.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) faults: AtomicU64,
    pub(crate) fault_time: Histogram,
    pub(crate) demand: Pages,
    pub(crate) prefetch: Pages,
    pub(crate) poisoned: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) retries: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every duration lies in a bucket whose upper end is at most a sixteenth above it.
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
        let p = histogram.percentiles();
        assert_eq!(p.count, 100);
        assert_eq!(p.max, Duration::from_micros(100));
        for (found, expected) in [(p.p50, 50), (p.p90, 90), (p.p99, 99)] {
            let exact = Duration::from_micros(expected);
            assert!(found >= exact && found <= exact + exact / 16, "{found:?}");
        }
    }
}
