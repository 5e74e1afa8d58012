//! Statistics: the one definition of every number, of its name, and of its meaning.
//!
//! ```text
//!   Counters, which a session updates ──load──▶ Stats ─────▶ `--json`, and the text of `ctl`
//!                                               METRICS ───▶ metrics, docs/operations.md
//!                                               RunRecord ─▶ `--run-json`, with a Timeline
//! ```
//!
//! [`Stats`] has the numbers. Its fields have the names of the JSON keys, except where serde
//! renames one. [`METRICS`] and [`FRAME_CACHE_METRICS`] have the names and descriptions of the same
//! numbers as metrics. A family of numbers that differ in one label, such as [`FaultKinds`], is
//! declared by the macro `family`: the doc comment of a field also describes its label value.
//!
//! To add a number, add a field to [`Stats`] and a counter to the session, and a metric to
//! [`METRICS`]. The tests name what is missing, and print the table of the documentation.

mod durations;
mod run;
mod timeline;

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use durations::Histogram;
pub use durations::{Durations, nearest_rank, whole_micros, whole_millis};
pub use run::{RUN_VERSION, RunError, RunRecord};
pub(crate) use timeline::TimelineRecorder;
pub use timeline::{MAX_TIMELINE_BUCKETS, Timeline, TimelineBucket};

/// A counter that threads update, and whose value can be read at any time.
pub(crate) trait Counted {
    /// The type of the value.
    type Value;

    /// Returns the value so far.
    fn load(&self) -> Self::Value;
}

impl Counted for AtomicU64 {
    type Value = u64;

    fn load(&self) -> u64 {
        self.load(Relaxed)
    }
}

/// Declares a family of numbers, which is a plain struct with the type of its fields as a
/// parameter. With counters as fields, it is the part of a session that counts. Each field has a
/// label value in the metrics, which its doc comment describes.
macro_rules! family {
    (
        $(#[$about:meta])*
        pub struct $Family:ident<$C:ident = $Value:ty> counted by $Counter:ty {
            $(
                #[doc = $help:literal]
                $(#[$serde:meta])?
                pub $field:ident: $_:ident => $label:literal,
            )*
        }
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $Family<$C = $Value> {
            $(
                #[doc = $help]
                $(#[$serde])?
                pub $field: $C,
            )*
        }

        impl $Family {
            /// The label values in the order of the fields, with their descriptions.
            pub const LABELS: &'static [(&'static str, &'static str)] =
                &[$(($label, $help.trim_ascii())),*];

            /// Returns the numbers in the order of [`Self::LABELS`].
            pub fn values(&self) -> Vec<&$Value> {
                vec![$(&self.$field),*]
            }
        }

        impl $Family<$Counter> {
            /// Returns the values so far.
            pub(crate) fn load(&self) -> $Family {
                $Family { $($field: Counted::load(&self.$field)),* }
            }
        }

        impl AddAssign<&Self> for $Family {
            fn add_assign(&mut self, other: &Self) {
                $(self.$field += &other.$field;)*
            }
        }
    };
}

family! {
    /// Number of faults by the state of the page that they found. Excludes faults on a page whose
    /// failure was still being decided.
    pub struct FaultKinds<C = u64> counted by AtomicU64 {
        /// Content in a frame.
        pub stored: C => "stored",
        /// One repeated word.
        pub fill: C => "fill",
        /// Discarded or unmapped before.
        pub removed: C => "removed",
        /// There by the time of the look-up.
        pub present: C => "present",
        /// Poisoned, because it could not be restored.
        pub poisoned: C => "poisoned",
        /// Not part of the memory that was handed over.
        pub outside: C => "outside",
    }
}

family! {
    /// Time from reading a fault to resolving it, by the source of the content.
    pub struct FaultSources<C = Durations> counted by Histogram {
        /// A frame was read and decoded.
        pub read: C => "read",
        /// The frame was already decoded.
        pub cached: C => "cached",
        /// Another thread was loading the page.
        pub waited: C => "waited",
        /// Only a repeated word was needed.
        pub fill: C => "fill",
        /// No content was needed.
        pub none: C => "none",
    }
}

family! {
    /// Number of pages installed for one reason, by content.
    pub struct PageCounts<C = u64> counted by AtomicU64 {
        /// Copied from a frame.
        pub copied: C => "frame",
        /// A repeated word other than zero.
        pub filled: C => "fill",
        /// A page of zeros.
        pub zeroed: C => "zero",
    }
}

impl PageCounts {
    /// Returns the total number of pages.
    pub fn total(self) -> u64 {
        self.values().into_iter().sum()
    }
}

family! {
    /// Number of installs that were given up because memory ran out, by memory pool.
    pub struct Shortages<C = u64> counted by AtomicU64 {
        /// Memory of the machine, or of the VM's cgroup.
        pub memory: C => "memory",
        /// The pool of 2 MiB pages.
        #[serde(rename = "hugepages-2048kB")]
        pub huge_pages: C => "hugepages-2048kB",
    }
}

/// Statistics of a session so far. The JSON object has all numbers but the first three, which only
/// a restore into this process has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Time from the start call to usable memory.
    #[serde(skip)]
    pub mapped: Duration,
    /// Time from the start call to complete memory, if it is complete.
    #[serde(skip)]
    pub complete: Option<Duration>,
    /// Number of zero pages that the kernel serves itself when they are touched. They are in none
    /// of the other counts.
    #[serde(skip)]
    pub left_to_kernel: u64,
    /// Number of pages in the snapshot's regions, of 4 KiB.
    pub pages: u64,
    /// Number of pages that are neither present nor removed nor poisoned; an upper bound.
    pub missing: u64,
    /// Number of faults read, plus pages requested by
    /// [`Restored::read_at`](crate::restore::Restored::read_at).
    pub faults: u64,
    /// Number of faults by the state of the page.
    pub fault_kinds: FaultKinds,
    /// Time from reading a fault to resolving it.
    #[serde(rename = "fault_us")]
    pub fault_time: Durations,
    /// Time that faults took, by the source of the content.
    pub sources: FaultSources,
    /// Pages that faults loaded: the touched ones and those that came with them.
    pub demand: PageCounts,
    /// Pages that prefetch loaded.
    pub prefetch: PageCounts,
    /// Number of pages poisoned, including those that were healed since.
    pub poisoned: u64,
    /// Number of events read: discards, unmappings, moves.
    pub discards: u64,
    /// Number of installs that were repeated because the mappings were changing.
    pub retries: u64,
    /// Number of installs that were given up because memory ran out.
    #[serde(default)]
    pub shortages: Shortages,
    /// Bytes of frame records read from the snapshot.
    pub bytes_read: u64,
    /// Bytes decoded from frames.
    pub bytes_decoded: u64,
    /// Number of failures to load a page, by a fault or by prefetch.
    pub failures: u64,
}

impl Stats {
    /// Drops the buckets of all histograms, and keeps only the percentiles.
    pub fn drop_buckets(&mut self) {
        let FaultSources {
            read,
            cached,
            waited,
            fill,
            none,
        } = &mut self.sources;
        for times in [&mut self.fault_time, read, cached, waited, fill, none] {
            times.drop_buckets();
        }
    }
}

impl AddAssign<&Self> for Stats {
    /// Adds the statistics of another session. The numbers that only a restore into this process
    /// has stay as they are.
    fn add_assign(&mut self, other: &Self) {
        // Names every field, so that none is forgotten.
        let Self {
            mapped: _,
            complete: _,
            left_to_kernel: _,
            pages,
            missing,
            faults,
            fault_kinds,
            fault_time,
            sources,
            demand,
            prefetch,
            poisoned,
            discards,
            retries,
            shortages,
            bytes_read,
            bytes_decoded,
            failures,
        } = other;
        self.fault_kinds += fault_kinds;
        self.fault_time += fault_time;
        self.sources += sources;
        self.demand += demand;
        self.prefetch += prefetch;
        self.shortages += shortages;
        self.pages += pages;
        self.missing += missing;
        self.faults += faults;
        self.poisoned += poisoned;
        self.discards += discards;
        self.retries += retries;
        self.bytes_read += bytes_read;
        self.bytes_decoded += bytes_decoded;
        self.failures += failures;
    }
}

/// Content and effectiveness of a cache of decoded frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrameCacheStats {
    /// Number of look-ups that found the frame.
    pub hits: u64,
    /// Number of look-ups that did not find the frame.
    pub misses: u64,
    /// Number of frames that were evicted.
    pub evictions: u64,
    /// Number of frames in the cache.
    pub frames: u64,
    /// Size of these frames in bytes.
    pub bytes: u64,
}

/// A metric: one number, or one for each value of a label. The end of its name is its unit; without
/// one, it is a count.
#[derive(Debug)]
pub struct Metric<Get: 'static> {
    /// The name, without the prefix of the program and without the suffix of counters.
    pub name: &'static str,
    /// A description in one sentence.
    pub help: &'static str,
    /// The name of the label, and its values with their descriptions.
    pub label: Option<(&'static str, &'static [(&'static str, &'static str)])>,
    /// A function that returns the numbers, in the order of the label's values.
    pub get: Get,
}

/// A function that returns the numbers of a metric.
pub type Numbers<S> = fn(&S) -> Vec<u64>;
/// A function that returns the histograms of a metric.
pub type Histograms<S> = fn(&S) -> Vec<&Durations>;

/// The metrics that show the numbers of an `S`.
#[derive(Debug)]
pub struct Metrics<S: 'static> {
    /// Numbers that only grow.
    pub counters: &'static [Metric<Numbers<S>>],
    /// Numbers that grow and shrink.
    pub gauges: &'static [Metric<Numbers<S>>],
    /// Distributions of durations.
    pub histograms: &'static [Metric<Histograms<S>>],
}

/// The metrics of sessions.
pub const METRICS: Metrics<Stats> = Metrics {
    counters: &[
        Metric {
            name: "faults",
            help: "Page faults, by state of the page",
            label: Some(("kind", FaultKinds::LABELS)),
            get: |stats| copied(stats.fault_kinds.values()),
        },
        Metric {
            name: "demand_pages",
            help: "Pages installed on demand, the touched ones and their neighbours, by content",
            label: Some(("content", PageCounts::LABELS)),
            get: |stats| copied(stats.demand.values()),
        },
        Metric {
            name: "prefetch_pages",
            help: "Pages installed by prefetch, by content",
            label: Some(("content", PageCounts::LABELS)),
            get: |stats| copied(stats.prefetch.values()),
        },
        Metric {
            name: "poisoned_pages",
            help: "Pages poisoned because they could not be restored",
            label: None,
            get: |stats| vec![stats.poisoned],
        },
        Metric {
            name: "read_bytes",
            help: "Bytes of frames read from snapshots",
            label: None,
            get: |stats| vec![stats.bytes_read],
        },
        Metric {
            name: "decoded_bytes",
            help: "Bytes decoded from frames",
            label: None,
            get: |stats| vec![stats.bytes_decoded],
        },
        Metric {
            name: "discards",
            help: "Events that report discarded, unmapped or moved memory",
            label: None,
            get: |stats| vec![stats.discards],
        },
        Metric {
            name: "retries",
            help: "Installs repeated because the mappings were changing",
            label: None,
            get: |stats| vec![stats.retries],
        },
        Metric {
            name: "shortages",
            help: "Installs that failed because memory ran out, by memory pool",
            label: Some(("source", Shortages::LABELS)),
            get: |stats| copied(stats.shortages.values()),
        },
        Metric {
            name: "failures",
            help: "Failures to restore a page, for a fault or for prefetch",
            label: None,
            get: |stats| vec![stats.failures],
        },
    ],
    gauges: &[
        Metric {
            name: "pages",
            help: "Pages of the memory of VMs that are served",
            label: None,
            get: |stats| vec![stats.pages],
        },
        Metric {
            name: "missing_pages",
            help: "Pages still missing from VMs that are served",
            label: None,
            get: |stats| vec![stats.missing],
        },
    ],
    histograms: &[Metric {
        name: "fault_seconds",
        help: "Time from reading a fault to resolving it, by source of the content",
        label: Some(("source", FaultSources::LABELS)),
        get: |stats| stats.sources.values(),
    }],
};

/// The metrics of the cache of decoded frames.
pub const FRAME_CACHE_METRICS: Metrics<FrameCacheStats> = Metrics {
    counters: &[
        Metric {
            name: "frame_cache_hits",
            help: "Frames found decoded in the cache that sessions share",
            label: None,
            get: |cache| vec![cache.hits],
        },
        Metric {
            name: "frame_cache_misses",
            help: "Frames not found in the shared cache",
            label: None,
            get: |cache| vec![cache.misses],
        },
        Metric {
            name: "frame_cache_evictions",
            help: "Frames evicted from the shared cache",
            label: None,
            get: |cache| vec![cache.evictions],
        },
    ],
    gauges: &[
        Metric {
            name: "frame_cache_frames",
            help: "Frames in the shared cache",
            label: None,
            get: |cache| vec![cache.frames],
        },
        Metric {
            name: "frame_cache_bytes",
            help: "Bytes used by the shared cache",
            label: None,
            get: |cache| vec![cache.bytes],
        },
    ],
    histograms: &[],
};

fn copied(numbers: Vec<&u64>) -> Vec<u64> {
    numbers.into_iter().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills every number of the JSON object with a different value.
    fn filled() -> Stats {
        fn fill(json: &mut serde_json::Value, next: &mut u64) {
            match json {
                serde_json::Value::Object(map) => {
                    map.values_mut().for_each(|value| fill(value, next));
                }
                number => {
                    *next += 1;
                    *number = (*next).into();
                }
            }
        }
        let mut json = serde_json::to_value(Stats::default()).unwrap();
        fill(&mut json, &mut 0);
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn sum_contains_every_number() {
        let one = filled();
        let mut two = one.clone();
        two += &one;
        let (one, two) = (serde_json::to_value(one), serde_json::to_value(two));
        let (one, two) = (one.unwrap(), two.unwrap());
        for (key, value) in one.as_object().unwrap() {
            // Distributions are added up by their buckets, which have a test of their own.
            if !["fault_us", "sources"].contains(&key.as_str()) {
                assert_ne!(&two[key], value, "{key} is not added up");
            }
        }
        assert_eq!(two["pages"], one["pages"].as_u64().unwrap() * 2);
    }

    /// Every number of a session is in the metrics.
    #[test]
    fn metrics_show_every_number() {
        let stats = filled();
        let counters = METRICS.counters.iter().chain(METRICS.gauges);
        let mut shown: Vec<u64> = counters.flat_map(|metric| (metric.get)(&stats)).collect();
        // The number of faults is the sum over their kinds.
        shown.push(stats.faults);
        let json = serde_json::to_value(&stats).unwrap();
        for (key, value) in json.as_object().unwrap() {
            // The sum of the histograms by source.
            if key == "fault_us" {
                continue;
            }
            let numbers = match value {
                serde_json::Value::Object(map) => map.values().collect(),
                number => vec![number],
            };
            for number in numbers.into_iter().filter_map(serde_json::Value::as_u64) {
                assert!(shown.contains(&number), "{key} is not in the metrics");
            }
        }
    }

    #[test]
    fn label_has_one_value_for_each_number() {
        fn check<Get, T>(metrics: &[Metric<Get>], get: impl Fn(&Get) -> Vec<T>) {
            for metric in metrics {
                let labels = metric.label.map_or(1, |(_, values)| values.len());
                assert_eq!(get(&metric.get).len(), labels, "{}", metric.name);
            }
        }
        let stats = Stats::default();
        check(METRICS.counters, |get| get(&stats));
        check(METRICS.gauges, |get| get(&stats));
        check(METRICS.histograms, |get| {
            get(&stats).into_iter().cloned().collect()
        });
    }
}
