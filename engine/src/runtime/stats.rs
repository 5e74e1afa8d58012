//! Statistics of a session, for people and programs.

use std::time::Duration;

use crate::session::{Durations, Percentiles};

/// Number of pages installed for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages copied from frames.
    pub copied: u64,
    /// Pages that repeat a word other than zero.
    pub filled: u64,
    /// Zero pages.
    pub zeroed: u64,
}

/// Number of faults by the state of the page that they found. Excludes faults on a page whose
/// failure was still being decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultKinds {
    /// The content was in a frame.
    pub stored: u64,
    /// The page repeats one word.
    pub fill: u64,
    /// The owner had discarded the page.
    pub removed: u64,
    /// The page was present by the time it was looked up.
    pub present: u64,
    /// The page was poisoned.
    pub poisoned: u64,
    /// The address belongs to no page of the session.
    pub outside: u64,
}

/// Time from reading a fault to its answer, by the source of the content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultTimes {
    /// All faults.
    pub all: Durations,
    /// No content was needed.
    pub nowhere: Durations,
    /// The page repeats one word.
    pub fill: Durations,
    /// The frame was read and decoded for this fault.
    pub read: Durations,
    /// The frame was already decoded.
    pub cached: Durations,
    /// Another thread was loading the page, and the fault waited.
    pub another: Durations,
}

/// Statistics of a restore so far.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Time from the start call to usable memory.
    pub mapped: Duration,
    /// Time from the start call to complete memory, if it is complete.
    pub complete: Option<Duration>,
    /// Number of faults read, plus pages requested by
    /// [`Restored::read_at`](crate::restore::Restored::read_at).
    pub faults: u64,
    /// Time from reading a fault to its answer.
    pub fault_time: Percentiles,
    /// Number of faults by the state of the page.
    pub fault_kinds: FaultKinds,
    /// Time that faults took, by the source of the content.
    pub fault_times: FaultTimes,
    /// Number of pages in the snapshot's regions.
    pub pages: u64,
    /// Number of pages that are neither present nor discarded nor poisoned; an upper bound.
    pub missing: u64,
    /// Pages that faults loaded: the touched ones and those that came with them.
    pub demand: PageCounts,
    /// Pages that prefetch loaded.
    pub prefetch: PageCounts,
    /// Number of zero pages that the kernel serves itself when they are touched. They are in none
    /// of the other counts.
    pub left_to_kernel: u64,
    /// Number of pages poisoned, including those that were healed since.
    pub poisoned: u64,
    /// Number of events read: discards, unmappings, moves.
    pub events: u64,
    /// Number of installs that were repeated because the mappings were changing.
    pub retries: u64,
    /// Number of installs that were abandoned because the kernel had no memory.
    pub shortages: u64,
    /// Number of installs of 2 MiB pages that were abandoned because their pool had no free page.
    pub huge_shortages: u64,
    /// Bytes of frame records read from the snapshot.
    pub bytes_read: u64,
    /// Bytes decoded from frames.
    pub bytes_decoded: u64,
    /// Number of failures.
    pub failures: u64,
}
