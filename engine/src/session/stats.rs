//! Statistics of a session: relaxed atomics that can be read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A histogram of durations with a relative error of at most 1/16, from 1 ns to over an hour.
///
/// The scale is log-linear with 16 buckets per power of two, as in `HdrHistogram`, but the buckets
/// are atomics, so threads record without a lock.
#[derive(Debug)]
pub struct Histogram {
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

/// A copy of the content of a [`Histogram`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Durations {
    /// The non-empty buckets in rising order: the longest duration that falls into the bucket, and
    /// the number of durations in it.
    pub buckets: Vec<(Duration, u64)>,
    /// The sum of all durations.
    pub sum: Duration,
    /// The longest duration.
    pub max: Duration,
}

impl Durations {
    /// Returns the durations that all these histograms have recorded so far, combined.
    pub(crate) fn of(histograms: &[&Histogram]) -> Self {
        let sum = |counter: fn(&Histogram, usize) -> &AtomicU64, i| -> u64 {
            let counts = histograms.iter().map(|h| counter(h, i).load(Relaxed));
            counts.sum()
        };
        let buckets = (0..BUCKETS).filter_map(|i| {
            let count = sum(|h, i| &h.buckets[i], i);
            (count > 0).then(|| (Duration::from_nanos(upper(i)), count))
        });
        let max = histograms.iter().map(|h| h.max.load(Relaxed)).max();
        Self {
            buckets: buckets.collect(),
            sum: Duration::from_nanos(sum(|h, _| &h.sum, 0)),
            max: Duration::from_nanos(max.unwrap_or(0)),
        }
    }

    /// Returns the percentiles of these durations.
    pub fn percentiles(&self) -> Percentiles {
        let count = self.buckets.iter().map(|(_, count)| count).sum::<u64>();
        let at = |hundredths: u64| {
            let rank = (count * hundredths).div_ceil(100).max(1);
            let mut seen = 0;
            let found = self.buckets.iter().find(|(_, n)| {
                seen += n;
                seen >= rank
            });
            found
                .map_or(Duration::ZERO, |(longest, _)| *longest)
                .min(self.max)
        };
        Percentiles {
            count,
            p50: at(50),
            p90: at(90),
            p99: at(99),
            max: self.max,
        }
    }
}

/// Percentiles of a [`Histogram`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percentiles {
    /// Number of durations recorded.
    pub count: u64,
    /// The median: half of the durations are at most this long.
    pub p50: Duration,
    /// 90 % of the durations are at most this long.
    pub p90: Duration,
    /// 99 % of the durations are at most this long.
    pub p99: Duration,
    /// The longest duration.
    pub max: Duration,
}

impl Histogram {
    /// Records one duration.
    pub fn record(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)].fetch_add(1, Relaxed);
        self.sum.fetch_add(nanos, Relaxed);
        self.max.fetch_max(nanos, Relaxed);
    }

    /// Returns the percentiles of the durations recorded so far.
    pub fn percentiles(&self) -> Percentiles {
        self.durations().percentiles()
    }

    /// Returns the durations recorded so far.
    pub fn durations(&self) -> Durations {
        Durations::of(&[self])
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

/// Pages installed for one reason, by kind of content.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    pub(crate) copied: AtomicU64,
    pub(crate) filled: AtomicU64,
    pub(crate) zeroed: AtomicU64,
}

impl Pages {
    /// Returns the total number of pages.
    pub(crate) fn total(&self) -> u64 {
        [&self.copied, &self.filled, &self.zeroed]
            .iter()
            .map(|counter| counter.load(Relaxed))
            .sum()
    }
}

/// The state of the page that a fault found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The content is in a frame.
    Stored,
    /// The page repeats one word.
    Fill,
    /// The owner has discarded the page.
    Removed,
    /// The page was present by then.
    Present,
    /// The page is poisoned.
    Poisoned,
    /// The address belongs to no page of the session.
    Outside,
}

/// The source of the content for a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ContentSource {
    /// No content was needed.
    #[default]
    Nowhere,
    /// A repeated word.
    Fill,
    /// A frame that was read for this fault.
    Read,
    /// A frame that was already decoded.
    Cached,
    /// Another thread, which loaded and installed it.
    Another,
}

/// Facts gathered about the fault that a thread is serving.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FaultTrace {
    /// The first page state that the fault found.
    met: Option<FaultKind>,
    pub(crate) from: ContentSource,
}

impl FaultTrace {
    pub(crate) fn meet(&mut self, met: FaultKind) {
        self.met.get_or_insert(met);
    }

    /// Records that a frame was decoded, or was found decoded (`cached`). A fault that then decodes
    /// the rest of that frame, or the same frame again, keeps its first source.
    pub(crate) fn decoded(&mut self, cached: bool) {
        if !matches!(self.from, ContentSource::Read | ContentSource::Cached) {
            self.from = if cached {
                ContentSource::Cached
            } else {
                ContentSource::Read
            };
        }
    }
}

/// Number of faults by [`FaultKind`].
#[derive(Debug, Default)]
pub(crate) struct Kinds {
    pub(crate) stored: AtomicU64,
    pub(crate) fill: AtomicU64,
    pub(crate) removed: AtomicU64,
    pub(crate) present: AtomicU64,
    pub(crate) poisoned: AtomicU64,
    pub(crate) outside: AtomicU64,
}

/// Time from reading a fault to its answer, by [`ContentSource`].
#[derive(Debug, Default)]
pub(crate) struct FaultTimes {
    pub(crate) nowhere: Histogram,
    pub(crate) fill: Histogram,
    pub(crate) read: Histogram,
    pub(crate) cached: Histogram,
    pub(crate) another: Histogram,
}

impl FaultTimes {
    /// Returns all histograms.
    pub(crate) fn all(&self) -> [&Histogram; 5] {
        let Self {
            nowhere,
            fill,
            read,
            cached,
            another,
        } = self;
        [nowhere, fill, read, cached, another]
    }
}

/// The counters of a session.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) faults: AtomicU64,
    pub(crate) kinds: Kinds,
    pub(crate) fault_times: FaultTimes,
    pub(crate) demand: Pages,
    pub(crate) prefetch: Pages,
    pub(crate) poisoned: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) retries: AtomicU64,
    /// Number of installs that were abandoned for lack of memory.
    pub(crate) shortages: AtomicU64,
    /// Number of large-page installs that were abandoned because their pool had no free page.
    pub(crate) large_shortages: AtomicU64,
}

impl Stats {
    /// Returns the counter of shortages for small or large pages.
    pub(super) fn shortages_of(&self, large: bool) -> &AtomicU64 {
        if large {
            &self.large_shortages
        } else {
            &self.shortages
        }
    }

    /// Counts a fault by the page state that it found.
    pub(crate) fn met(&self, trace: FaultTrace) {
        let kinds = &self.kinds;
        let counter = match trace.met {
            // Nothing was looked up: the guard handles the fault.
            None => return,
            Some(FaultKind::Stored) => &kinds.stored,
            Some(FaultKind::Fill) => &kinds.fill,
            Some(FaultKind::Removed) => &kinds.removed,
            Some(FaultKind::Present) => &kinds.present,
            Some(FaultKind::Poisoned) => &kinds.poisoned,
            Some(FaultKind::Outside) => &kinds.outside,
        };
        add(counter, 1);
    }

    /// Records the time from reading a fault to its answer.
    pub(crate) fn took(&self, trace: FaultTrace, time: Duration) {
        let times = &self.fault_times;
        let histogram = match trace.from {
            ContentSource::Nowhere => &times.nowhere,
            ContentSource::Fill => &times.fill,
            ContentSource::Read => &times.read,
            ContentSource::Cached => &times.cached,
            ContentSource::Another => &times.another,
        };
        histogram.record(time);
    }
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let p = histogram.percentiles();
        assert_eq!(p.count, 100);
        assert_eq!(histogram.durations().sum, Duration::from_micros(5050));
        assert_eq!(p.max, Duration::from_micros(100));
        for (found, expected) in [(p.p50, 50), (p.p90, 90), (p.p99, 99)] {
            let exact = Duration::from_micros(expected);
            assert!(found >= exact && found <= exact + exact / 16, "{found:?}");
        }
    }

    #[test]
    fn histograms_together_are_one_of_all_that_they_hold() {
        let (a, b, both) = (
            Histogram::default(),
            Histogram::default(),
            Histogram::default(),
        );
        for us in 1..=100 {
            let time = Duration::from_micros(us);
            if us % 3 == 0 { &a } else { &b }.record(time);
            both.record(time);
        }
        assert_eq!(Durations::of(&[&a, &b]), both.durations());
        let counted: u64 = both.durations().buckets.iter().map(|(_, n)| n).sum();
        assert_eq!(counted, 100);
        assert_eq!(Durations::of(&[]), Durations::default());
        assert_eq!(Durations::default().percentiles(), Percentiles::default());
    }

    #[test]
    fn a_fault_has_met_what_it_met_first_and_has_its_frame_from_where_it_came_first() {
        let stats = Stats::default();
        let mut trace = FaultTrace::default();
        trace.meet(FaultKind::Stored);
        trace.from = ContentSource::Another;
        trace.meet(FaultKind::Present);
        trace.decoded(false);
        trace.decoded(true);
        stats.met(trace);
        stats.took(trace, Duration::from_micros(1));
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        assert_eq!(
            (count(&stats.kinds.stored), count(&stats.kinds.present)),
            (1, 0)
        );
        let [_, _, read, ..] = stats.fault_times.all();
        assert_eq!(read.percentiles().count, 1);
        assert_eq!(
            Durations::of(&stats.fault_times.all()).percentiles().count,
            1
        );
    }
}
