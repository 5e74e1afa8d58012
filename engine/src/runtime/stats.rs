//! What a session has done, for people and programs.

use std::time::Duration;

use crate::session::{Durations, Percentiles};

/// Pages installed for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// From frames.
    pub copied: u64,
    /// Repeating a word other than zero.
    pub filled: u64,
    /// Zero.
    pub zeroed: u64,
}

/// Faults by what they met. One for whose page somebody else had yet to decide is in none of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultKinds {
    /// A page that a frame holds.
    pub stored: u64,
    /// A page that repeats one word.
    pub fill: u64,
    /// A page that its owner has discarded.
    pub removed: u64,
    /// A page that was there when the fault was looked at.
    pub present: u64,
    /// A page that is poisoned.
    pub poisoned: u64,
    /// No page of the session's.
    pub outside: u64,
}

/// From reading a fault to its answer, by where the content came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultTimes {
    /// All of them.
    pub all: Durations,
    /// No content was needed.
    pub nowhere: Durations,
    /// It repeats one word.
    pub fill: Durations,
    /// Its frame was read and decoded.
    pub read: Durations,
    /// Its frame was decoded already.
    pub cached: Durations,
    /// Another thread was bringing it, and the fault waited.
    pub another: Durations,
}

/// What a restore has done so far.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// From the start call to usable memory.
    pub mapped: Duration,
    /// From the start call to the memory being complete, if it is.
    pub complete: Option<Duration>,
    /// Faults read, and pages that [`Restored::read_at`](crate::restore::Restored::read_at) asked for.
    pub faults: u64,
    /// From reading a fault to its answer.
    pub fault_time: Percentiles,
    /// The faults by what they met.
    pub fault_kinds: FaultKinds,
    /// How long they took, by where the content came from.
    pub fault_times: FaultTimes,
    /// Pages of the snapshot's regions.
    pub pages: u64,
    /// Pages that are neither there nor discarded nor poisoned: not more than that.
    pub missing: u64,
    /// Pages that faults brought in: the touched ones and those that came with them.
    pub demand: PageCounts,
    /// Pages that prefetch brought in.
    pub prefetch: PageCounts,
    /// Zero pages that the kernel serves itself when they are touched: they are in none of the
    /// other counts.
    pub left_to_kernel: u64,
    /// Pages poisoned, also those that were healed since.
    pub poisoned: u64,
    /// Events read: discards, unmappings, moves.
    pub events: u64,
    /// Installs that had to be repeated because the mappings were changing.
    pub retries: u64,
    /// Installs that were given up because the kernel had no memory.
    pub shortages: u64,
    /// Installs of 2 MiB pages that were given up because their pool had none.
    pub huge_shortages: u64,
    /// Bytes of frames read from the snapshot.
    pub bytes_read: u64,
    /// Bytes decoded from frames.
    pub bytes_decoded: u64,
    /// Failures so far.
    pub failures: u64,
}
