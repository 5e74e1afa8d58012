//! The counters of a session: relaxed atomics that can be read at any time. [`crate::stats`]
//! defines the numbers that they count.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::stats::{
    FaultKinds, FaultSources, Histogram, PageCounts, Shortages, TimelineBucket, TimelineRecorder,
};

/// The state of the page that a fault found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The content is in a frame.
    Stored,
    /// The page repeats one word.
    Fill,
    /// The owner had discarded or unmapped the page.
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

/// The counters of a session.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) faults: AtomicU64,
    pub(crate) fault_kinds: FaultKinds<AtomicU64>,
    pub(crate) sources: FaultSources<Histogram>,
    pub(crate) demand: PageCounts<AtomicU64>,
    pub(crate) prefetch: PageCounts<AtomicU64>,
    pub(crate) poisoned: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) shortages: Shortages<AtomicU64>,
    pub(crate) timeline: TimelineRecorder,
}

impl Counters {
    /// Returns the numbers that the timeline has; `bytes_read` is not a counter of the session.
    pub(crate) fn for_timeline(&self, bytes_read: u64) -> TimelineBucket {
        TimelineBucket {
            faults: self.faults.load(Relaxed),
            demand_pages: self.demand.load().total(),
            prefetch_pages: self.prefetch.load().total(),
            bytes_read,
        }
    }

    /// Returns the counter of shortages for small or large pages.
    pub(super) fn shortages_of(&self, large: bool) -> &AtomicU64 {
        if large {
            &self.shortages.huge_pages
        } else {
            &self.shortages.memory
        }
    }

    /// Counts a fault by the page state that it found.
    pub(crate) fn met(&self, trace: FaultTrace) {
        let kinds = &self.fault_kinds;
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
        let sources = &self.sources;
        let histogram = match trace.from {
            ContentSource::Nowhere => &sources.none,
            ContentSource::Fill => &sources.fill,
            ContentSource::Read => &sources.read,
            ContentSource::Cached => &sources.cached,
            ContentSource::Another => &sources.waited,
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

    #[test]
    fn fault_counts_by_its_first_page_state_and_first_frame_source() {
        let counters = Counters::default();
        let mut trace = FaultTrace::default();
        trace.meet(FaultKind::Stored);
        trace.from = ContentSource::Another;
        trace.meet(FaultKind::Present);
        trace.decoded(false);
        trace.decoded(true);
        counters.met(trace);
        counters.took(trace, Duration::from_micros(1));
        let kinds = counters.fault_kinds.load();
        assert_eq!((kinds.stored, kinds.present), (1, 0));
        let sources = counters.sources.load();
        let counts: Vec<_> = sources.values().iter().map(|times| times.count).collect();
        assert_eq!((sources.read.count, counts.iter().sum::<u64>()), (1, 1));
    }
}
