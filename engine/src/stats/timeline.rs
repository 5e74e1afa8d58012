//! The course of a session: what its counters counted, by time.
//!
//! A recorder adds nothing to a counter's update. Each fault and each prefetch task compares the
//! time with the end of the current bucket; the first one that is later reads the counters, and
//! adds what they have counted since to the bucket that is over.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::whole_micros;

/// Maximum number of buckets. When they are full, pairs of them are merged.
pub const MAX_TIMELINE_BUCKETS: usize = 512;

/// Length of a bucket at first, in microseconds.
const FIRST_BUCKET_US: u64 = 100;

/// Numbers of a session by time, in buckets of equal length. In JSON, each number is a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Columns", into = "Columns")]
pub struct Timeline {
    /// Length of a bucket, in microseconds.
    pub bucket_us: u64,
    /// The buckets from the start call on, at most [`MAX_TIMELINE_BUCKETS`].
    pub buckets: Vec<TimelineBucket>,
}

/// Numbers that were counted in a part of the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimelineBucket {
    /// Number of faults read.
    pub faults: u64,
    /// Number of pages that faults loaded.
    pub demand_pages: u64,
    /// Number of pages that prefetch loaded.
    pub prefetch_pages: u64,
    /// Bytes of frame records read from the snapshot.
    pub bytes_read: u64,
}

impl TimelineBucket {
    fn minus(self, earlier: Self) -> Self {
        // Counters are read one after another, so that a later sample can lack what an earlier has.
        Self {
            faults: self.faults.saturating_sub(earlier.faults),
            demand_pages: self.demand_pages.saturating_sub(earlier.demand_pages),
            prefetch_pages: self.prefetch_pages.saturating_sub(earlier.prefetch_pages),
            bytes_read: self.bytes_read.saturating_sub(earlier.bytes_read),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            faults: self.faults.saturating_add(other.faults),
            demand_pages: self.demand_pages.saturating_add(other.demand_pages),
            prefetch_pages: self.prefetch_pages.saturating_add(other.prefetch_pages),
            bytes_read: self.bytes_read.saturating_add(other.bytes_read),
        }
    }
}

/// The JSON object of a timeline.
#[derive(Serialize, Deserialize)]
struct Columns {
    bucket_us: u64,
    faults: Vec<u64>,
    demand_pages: Vec<u64>,
    prefetch_pages: Vec<u64>,
    bytes_read: Vec<u64>,
}

impl From<Timeline> for Columns {
    fn from(timeline: Timeline) -> Self {
        let column = |get: fn(&TimelineBucket) -> u64| timeline.buckets.iter().map(get).collect();
        Self {
            bucket_us: timeline.bucket_us,
            faults: column(|bucket| bucket.faults),
            demand_pages: column(|bucket| bucket.demand_pages),
            prefetch_pages: column(|bucket| bucket.prefetch_pages),
            bytes_read: column(|bucket| bucket.bytes_read),
        }
    }
}

impl TryFrom<Columns> for Timeline {
    type Error = &'static str;

    fn try_from(columns: Columns) -> Result<Self, Self::Error> {
        let Columns {
            bucket_us,
            faults,
            demand_pages,
            prefetch_pages,
            bytes_read,
        } = columns;
        let count = faults.len();
        let others = [&demand_pages, &prefetch_pages, &bytes_read];
        if others.iter().any(|column| column.len() != count) {
            return Err("the lists of a timeline differ in length");
        }
        if count > MAX_TIMELINE_BUCKETS {
            return Err("a timeline has more than 512 buckets");
        }
        let bucket = |i: usize| TimelineBucket {
            faults: faults[i],
            demand_pages: demand_pages[i],
            prefetch_pages: prefetch_pages[i],
            bytes_read: bytes_read[i],
        };
        Ok(Self {
            bucket_us,
            buckets: (0..count).map(bucket).collect(),
        })
    }
}

/// Records a timeline while threads update the counters.
#[derive(Debug)]
pub(crate) struct TimelineRecorder {
    /// End of the current bucket, in microseconds since the start.
    until_us: AtomicU64,
    buckets: Mutex<TimelineState>,
}

#[derive(Debug)]
struct TimelineState {
    bucket_us: u64,
    /// The buckets up to the current one, which is the last.
    buckets: Vec<TimelineBucket>,
    /// Sum of all buckets: the counters when they were last read.
    counted: TimelineBucket,
}

impl Default for TimelineRecorder {
    fn default() -> Self {
        Self {
            until_us: AtomicU64::new(FIRST_BUCKET_US),
            buckets: Mutex::new(TimelineState {
                bucket_us: FIRST_BUCKET_US,
                buckets: vec![TimelineBucket::default()],
                counted: TimelineBucket::default(),
            }),
        }
    }
}

impl TimelineRecorder {
    /// Ends the current bucket if it is over. `counters` returns the counters of the session.
    /// Everything that they have counted until now belongs to the current bucket.
    pub(crate) fn at(&self, since_start: Duration, counters: impl FnOnce() -> TimelineBucket) {
        // The widths double up to this bound, which no clock reaches.
        let now = whole_micros(since_start).min(u64::MAX >> 1);
        if now < self.until_us.load(Relaxed) {
            return;
        }
        // Otherwise another thread is doing the same.
        if let Ok(mut recorded) = self.buckets.try_lock() {
            let until = recorded.end_bucket(now, counters());
            self.until_us.store(until, Relaxed);
        }
    }

    /// Returns the timeline up to now.
    pub(crate) fn load(&self, counters: TimelineBucket) -> Timeline {
        let mut recorded = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        recorded.count(counters);
        Timeline {
            bucket_us: recorded.bucket_us,
            buckets: recorded.buckets.clone(),
        }
    }
}

impl TimelineState {
    /// Adds what was counted since the last time to the current bucket.
    fn count(&mut self, counters: TimelineBucket) {
        let new = counters.minus(self.counted);
        self.counted = self.counted.plus(new);
        if let Some(bucket) = self.buckets.last_mut() {
            *bucket = bucket.plus(new);
        }
    }

    /// Makes the bucket of `now` the current one. Returns its end.
    fn end_bucket(&mut self, now: u64, counters: TimelineBucket) -> u64 {
        self.count(counters);
        while now / self.bucket_us >= MAX_TIMELINE_BUCKETS as u64 {
            self.bucket_us *= 2;
            let pairs = self.buckets.chunks(2);
            let merged = pairs.map(|pair| {
                let sum = |sum: TimelineBucket, bucket: &TimelineBucket| sum.plus(*bucket);
                pair.iter().fold(TimelineBucket::default(), sum)
            });
            self.buckets = merged.collect();
        }
        let current = now / self.bucket_us;
        let count = usize::try_from(current).map_or(MAX_TIMELINE_BUCKETS, |current| current + 1);
        // A thread that was late by a bucket changes nothing.
        let count = count.max(self.buckets.len());
        self.buckets.resize(count, TimelineBucket::default());
        (count as u64).saturating_mul(self.bucket_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(faults: u64) -> TimelineBucket {
        TimelineBucket {
            faults,
            demand_pages: 2 * faults,
            prefetch_pages: 3 * faults,
            bytes_read: 4 * faults,
        }
    }

    fn counts(timeline: &Timeline) -> Vec<u64> {
        timeline
            .buckets
            .iter()
            .map(|bucket| bucket.faults)
            .collect()
    }

    #[test]
    fn counts_belong_to_the_bucket_in_which_they_were_made() {
        let recorder = TimelineRecorder::default();
        let at = |us, count| recorder.at(Duration::from_micros(us), || faults(count));
        at(10, 1);
        at(99, 2);
        at(100, 3);
        // Two were counted before the pause, and two after it.
        at(450, 5);
        at(460, 6);
        let timeline = recorder.load(faults(7));
        assert_eq!(timeline.bucket_us, 100);
        assert_eq!(counts(&timeline), [3, 2, 0, 0, 2]);
        assert_eq!(timeline.buckets[0], faults(3));
        assert_eq!(counts(&recorder.load(faults(8))), [3, 2, 0, 0, 3]);
    }

    #[test]
    fn buckets_are_bounded_and_lose_no_count() {
        let recorder = TimelineRecorder::default();
        let mut us = 7;
        for n in 0..10_000 {
            recorder.at(Duration::from_micros(us), || faults(n));
            us += us / 400 + 13;
        }
        for late in [Duration::from_secs(1 << 40), Duration::MAX] {
            recorder.at(late, || faults(10_000));
            let timeline = recorder.load(faults(10_001));
            assert!(timeline.buckets.len() <= MAX_TIMELINE_BUCKETS);
            assert_eq!(counts(&timeline).iter().sum::<u64>(), 10_001);
        }
    }

    #[test]
    fn json_has_one_list_for_each_number() {
        let timeline = Timeline {
            bucket_us: 200,
            buckets: vec![faults(1), faults(2)],
        };
        let json = serde_json::to_value(&timeline).unwrap();
        let expected = serde_json::json!({
            "bucket_us": 200, "faults": [1, 2], "demand_pages": [2, 4],
            "prefetch_pages": [3, 6], "bytes_read": [4, 8],
        });
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<Timeline>(json).unwrap(), timeline);
        let mut uneven = expected.clone();
        uneven["faults"] = serde_json::json!([1]);
        serde_json::from_value::<Timeline>(uneven).unwrap_err();
        let mut long = expected;
        for (_, list) in long.as_object_mut().unwrap().iter_mut().skip(1) {
            *list = serde_json::json!(vec![1; 513]);
        }
        long["bucket_us"] = 1.into();
        let error = serde_json::from_value::<Timeline>(long).unwrap_err();
        assert!(error.to_string().contains("512") || error.to_string().contains("length"));
    }
}
